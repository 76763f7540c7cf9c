"""What a validation leaves for the report: it is what was scored, changes no bit, and is written once per epoch."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Lab, comparable, differences

import trainloop_complete_with_fixes as driver
from arc_data import PAD, ArcTask, collate, test_contexts
from distributed import ALONE
from evaluate import Tally, collect, judge_beside_prior, plan_back, predict, validate
from gallery import SAMPLE, Gallery, cut, grid_text, planning_steps, sample_of
from loss_function import expected_free_energy
from run_record import RunRecord, cells_of, is_grid, shape_of, union_cells
from solver2 import Candidates

RUN = Path("runs/demo")


@pytest.fixture(scope="module")
def watched(make_lab, tasks) -> tuple[Lab, list, Gallery, dict]:
    """Return a trained lab whose memory holds something, its items, the gallery of a validation, and its scores."""
    lab = make_lab("--memory-similarity", "-1", "--answer-confidence", "2", "--lr", "3e-2", "--muon-lr", "3e-2",
                   "--refine", "mean")  # fmt: skip
    for k in range(3):  # so that the planner listens to its prompt
        lab.step(k, rewarded=False)
    remember(lab, tasks)
    items = test_contexts(tasks)
    gallery = Gallery(items, lab.system.memory, tasks, functools.partial(plan_back, lab.system, lab.runtime))
    scores = validate(lab.system, lab.runtime, items, 4096, watcher=gallery)
    return lab, items, gallery, scores


def remember(lab: Lab, tasks: list[ArcTask]) -> None:
    """Fill the memory with the first pair of each task."""
    count, torch_random = len(tasks), torch.Generator().manual_seed(0)
    memory = lab.system.memory
    noise = torch.randn(count, memory.feature_dim + 2 * memory.prompt_dim, generator=torch_random)
    features, prompt, delta = noise.split((memory.feature_dim, memory.prompt_dim, memory.prompt_dim), 1)
    ones, zeros = torch.ones(count), torch.zeros(count)
    memory.admit(Candidates(
        task_ids=[task.id for task in tasks], pair_ids=["train:0"] * count, size_rules=["same"] * count,
        features=features, prompt=prompt, delta=delta, color_map=torch.full((count, 10, 10), 0.1), score=ones,
        prior_score=zeros, exact=ones > 0))  # fmt: skip
    assert len(memory) == count


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grids_become_text_and_padding_is_cut_off():
    canvas = torch.full((4, 5), -100)
    canvas[:2, :3] = torch.tensor([[0, 1, 2], [3, 9, 5]])
    assert grid_text(cut(canvas.numpy().astype(np.int8))) == "012/395"
    assert is_grid("012/395") and not any(map(is_grid, ("", "01/2", "0a", "0/", 7, "0" * 31, "/".join("0" * 31))))


def test_rows_are_what_was_scored(watched, tmp_path):
    lab, items, gallery, scores = watched
    gallery.write(tmp_path, epoch=3, step=12)
    head, *rows = lines(tmp_path / "predictions" / "epoch_0003.jsonl")
    assert (head["epoch"], head["step"], head["outputs"]) == (3, 12, len(items))
    assert [(row["task"], row["test"]) for row in rows] == [(c.task_id, 0) for c, _ in items]
    assert sum(row["exact"] for row in rows) == scores["exact"]
    assert sum(row["two"] for row in rows) == scores["two_exact"]
    assert np.mean([row["cells"] for row in rows]) == pytest.approx(scores["cells_predicted"], abs=1e-5)
    for row, (_, answer) in zip(rows, items, strict=True):
        target = grid_text(answer)
        assert row["cells"] == pytest.approx(union_cells(row["first"], target), abs=1e-5)
        unrefined = row.get("unrefined", row["first"])
        assert row["unrefined_cells"] == pytest.approx(union_cells(unrefined, target), abs=1e-5)
        assert row["exact"] == (row["first"] == target) and row["two"] == (target in (row["first"], row["second"]))
        assert row["size"] == (shape_of(row["first"]) == answer.shape)
        assert bool(row["reward"]) <= ("unrefined" in row) and row["risk"] >= 0 and row["ambiguity"] > 0


def test_tasks_are_written_once_and_joined_when_others_are_validated(watched, tasks, tmp_path):
    lab, items, gallery, _ = watched
    gallery.write(tmp_path, epoch=0, step=1)
    path = tmp_path / "predictions" / "tasks.jsonl"
    (path.parent / ".epoch_0000.jsonl.99.tmp").write_text("half a li")
    rows, stamp = lines(path), path.stat().st_mtime_ns
    assert [row["task"] for row in rows] == [c.task_id for c, _ in items]
    for row, task in zip(rows, tasks, strict=True):
        assert row["input"] == grid_text(task.test[0].input) and row["target"] == grid_text(task.test[0].output)
        assert row["demonstrations"] == [[grid_text(p.input), grid_text(p.output)] for p in task.train]
    gallery.write(tmp_path, epoch=1, step=2)
    assert path.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in path.parent.iterdir()) == ["epoch_0000.jsonl", "epoch_0001.jsonl", "tasks.jsonl"]
    other = [ArcTask("other", tasks[0].train, tasks[0].test)]
    validated = Gallery(test_contexts(other), lab.system.memory, tasks)
    validate(lab.system, lab.runtime, test_contexts(other), 4096, watcher=validated)
    validated.write(tmp_path, epoch=2, step=3)
    assert [row["task"] for row in lines(path)] == [*(task.id for task in tasks), "other"]


def test_the_planning_steps_are_those_of_the_trajectory(watched):
    lab, items, gallery, _ = watched
    query, _ = collate([c for c, _ in items[:3]], [a for _, a in items[:3]])
    lab.system.eval()
    prediction = predict(lab.system, query, lab.runtime)
    steps = planning_steps(prediction, [0, 2])
    for place, row in enumerate((0, 2)):
        assert len(steps[place]) == lab.config.agent.num_steps
        assert steps[place][-1][0] == grid_text(cut(prediction.planned[row].numpy().astype(np.int8)))
        height, width = shape_of(steps[place][-1][0])
        best = prediction.beliefs[row, -1, :height, :width].softmax(-1).amax(-1)
        assert cells_of(steps[place][-1][1]) == "".join(str(min(int(p * 10), 9)) for p in best.flatten().tolist())
    lab.system.train()


def test_the_backward_steps_go_from_the_planned_grid_to_the_input(watched, tmp_path):
    lab, items, gallery, _ = watched
    gallery.write(tmp_path, epoch=0, step=1)
    _, *rows = lines(tmp_path / "predictions" / "epoch_0000.jsonl")
    row, (context, _) = rows[2], items[2]
    planned = np.array([list(map(int, line)) for line in row["planning"][-1][0].split("/")], np.uint8)
    query, _ = collate([context], [planned])
    lab.system.eval()
    prompt = predict(lab.system, query, lab.runtime).embedding
    lab.system.train()
    beliefs, inputs = plan_back(lab.system, lab.runtime, [context], [planned], prompt)
    assert grid_text(cut(inputs[0].numpy().astype(np.int8))) == grid_text(context.input)
    height, width = context.input.shape
    nearest = beliefs[0, 0, :height, :width].argmax(-1).numpy().astype(np.uint8)  # b_0, which should be the input
    assert row["backward"][-1][0] == grid_text(nearest)
    assert [len(r["backward"]) for r in rows] == [lab.config.agent.num_steps] * len(rows)


def test_the_reward_of_an_output_is_what_refining_gained_in_potential(watched):
    lab, items, _, _ = watched
    query, answer = collate([c for c, _ in items[:3]], [a for _, a in items[:3]])
    lab.system.eval()
    made = predict(lab.system, query, lab.runtime)
    lab.system.train()
    other = torch.where(made.grid == PAD, PAD, (made.grid + 1) % 10)
    tallies = [Tally(), Tally(), Tally()]
    for tally, grid, unrefined in zip(tallies, (made.grid, other, made.grid), (made.grid, other, other), strict=True):
        judged = dataclasses.replace(made, grid=grid, unrefined=unrefined)
        judge_beside_prior(tally, judged, query, answer, lab.config.reward)
    better, worse, both = tallies
    expected = better.values("potential") - worse.values("potential")
    assert both.values("reward") == pytest.approx(expected, abs=1e-6)
    assert (both.values("reward") > 0).any() and not better.values("reward").any()


def test_the_free_energy_of_single_outputs_has_the_mean_of_the_loss(make_lab):
    lab = make_lab()
    query, answer = lab.batch()
    result = driver.train_step(lab.system, query, answer, driver.Moment(0, 4.0, False))  # all terms weigh
    _, preference = lab.system.read(query, result.scene, answer.target_size, answer.canvas, answer.shapes)
    found = expected_free_energy(result.trajectory, preference, lab.config.loss.preference_floor)
    for name, values in zip(("risk", "ambiguity"), found, strict=True):
        assert values.shape == (len(query),)
        assert values.mean().item() == pytest.approx(result.terms.terms[name].item(), abs=1e-6)


def test_what_the_memory_recalled_is_shown_with_its_pair(watched, tasks, tmp_path):
    lab, _, gallery, _ = watched
    gallery.write(tmp_path, epoch=0, step=1)
    head, *rows = lines(tmp_path / "predictions" / "epoch_0000.jsonl")
    pairs = {(t.id, f"train:{i}"): p for t in tasks for i, p in enumerate(t.train)}
    found = [(row, entry) for row in rows for entry in row["neighbours"]]
    assert found and all(entry["task"] != row["task"] for row, entry in found)
    for _, entry in found:
        pair = pairs[entry["task"], entry["pair"]]
        assert (entry["input"], entry["output"]) == (grid_text(pair.input), grid_text(pair.output))
        assert -1 <= entry["similarity"] <= 1 and 0 <= entry["weight"] <= 1
    for row in rows:
        order = [entry["similarity"] for entry in row["neighbours"]]
        assert order == sorted(order, reverse=True)
    memory = head["memory"]
    assert memory["size"] == len(lab.system.memory) == sum(memory["scores"]) == sum(memory["ages"])
    assert [(e["task"], e["pair"]) for e in lab.system.memory.entries()] == lab.system.memory.owners()
    hits = [entry["hits"] for entry in memory["most_used"]]
    assert hits == sorted(hits, reverse=True) and all(entry["hits"] == 0 for entry in memory["unused"])


def test_the_sample_does_not_depend_on_the_other_outputs(tasks):
    many = [ArcTask(f"task{i}", tasks[0].train, tasks[0].test) for i in range(60)]
    items = test_contexts(many)
    chosen = {items[i][0].task_id for i in sample_of(items)}
    assert len(chosen) == SAMPLE
    fewer = test_contexts([task for task in many[::-1] if task.id in chosen or task.id.endswith("7")])
    assert {fewer[i][0].task_id for i in sample_of(fewer)} == chosen


def test_watching_a_validation_changes_nothing(make_lab, tasks, watched):
    """Neither the scores, nor any random state, nor the system."""
    items, outcomes = test_contexts(tasks), []
    for with_gallery in (False, True):
        lab = make_lab("--memory-similarity", "-1", "--refine-samples", "2")
        remember(lab, tasks)
        lab.step(0)
        back = functools.partial(plan_back, lab.system, lab.runtime)
        gallery = Gallery(items, lab.system.memory, tasks, back) if with_gallery else None
        scores = validate(lab.system, lab.runtime, items, 4096, watcher=gallery)
        random = driver.rng_state()
        lab.step(1)
        outcomes.append([scores, random["torch"], lab.system.memory.state_dict(), dict(lab.system.state_dict())])
    assert differences(*outcomes) == []


def test_batches_do_not_matter_for_what_is_kept(watched):
    lab, items, gallery, _ = watched
    kept = [collect(lab.system, lab.runtime, items, cells, watcher=gallery).kept for cells in (1, 100_000)]
    same = [kept[0][i]["first"] == kept[1][i]["first"] for i in range(len(items))]
    assert kept[0].keys() == kept[1].keys() and all(same)


# In a run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_file_per_validation_and_a_page(reference):
    names = sorted(path.name for path in (reference.path / "predictions").iterdir())
    assert names == ["epoch_0000.jsonl", "epoch_0001.jsonl", "tasks.jsonl"]
    run = RunRecord.read(reference.path)
    assert run.problems == [] and [len(run.validation(epoch).outputs) for epoch in run.epochs] == [8, 8]
    exact = [record["val_exact"] for record in run.of("epoch")]
    assert [sum(o.flag("exact") for o in run.validation(e).outputs) for e in run.epochs] == exact
    assert "8 test grids exact after 2 epochs" in (reference.path / "report.html").read_text()
    assert "report.html" in reference.printed


def test_a_resumed_run_leaves_the_same_bytes_and_so_does_its_backup(reference, drive, monkeypatch):
    """Stopped in epoch 1, brought back from a backup that also holds files of an attempt that was given up."""
    train_step = driver.train_step

    def interrupted(system, query, answer, moment):
        if moment.step == 9:
            signal.raise_signal(signal.SIGTERM)
        return train_step(system, query, answer, moment)

    monkeypatch.setattr(driver, "train_step", interrupted)
    assert drive(*reference.argv, "--backup", "drive") == 143
    monkeypatch.setattr(driver, "train_step", train_step)
    kept = Path("drive/demo/predictions")
    assert sorted(path.name for path in kept.iterdir()) == ["epoch_0000.jsonl", "tasks.jsonl"]
    assert Path("drive/demo/report.html").is_file()
    for epoch in (1, 2):
        (kept / f"epoch_{epoch:04d}.jsonl").write_text("given up\n")
    shutil.rmtree("runs")
    assert drive("--resume", "drive") == 0
    payload, records, weights = comparable(RUN)
    payload["config"]["run"]["backup"] = ""
    assert differences(comparable(reference.path), (payload, records, weights)) == []
    places = (reference.path / "predictions", RUN / "predictions", kept)
    expected, *found = ({path.name: path.read_bytes() for path in place.iterdir()} for place in places)
    assert found == [expected, expected]


def test_what_cannot_be_written_is_a_warning(drive, new_flags, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(driver, "write_report", refuse)
    monkeypatch.setattr(Gallery, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert drive(*new_flags("--epochs", "1", "--max-batches", "1")) == 0
    said = capsys.readouterr().err
    assert "warning: predictions not written (No space left on device); training goes on" in said
    assert "warning: report.html not written (RuntimeError: no page today); training goes on" in said
    assert not (RUN / "predictions").exists() and not (RUN / "report.html").exists()


def test_a_page_that_takes_long_is_written_at_the_end_only(tmp_path, monkeypatch):
    written: list[Path] = []
    monkeypatch.setattr(driver, "write_report", written.append)
    monkeypatch.setattr(driver, "write_curves", written.append)
    run = SimpleNamespace(page_seconds=0.0, page_written=0.0, folder=SimpleNamespace(path=tmp_path), world=ALONE)
    driver.write_page(run)
    assert written == [tmp_path] and 0 < run.page_seconds < driver.MAX_PAGE_SECONDS
    for seconds, ago, is_written in ((2.1, 1e6, False), (1.9, 1e6, True), (1.9, 37.0, False), (1.9, 39.0, True)):
        run.page_seconds, run.page_written = seconds, time.monotonic() - ago
        written.clear()
        driver.write_page(run)
        assert bool(written) is is_written
    run.page_seconds = 2.1
    written.clear()
    driver.write_page(run, last=True)
    assert written == [tmp_path] * 2
