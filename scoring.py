"""Scores of attempts against answers under the three rules in use, with intervals, and the submission file.

Works on grids alone, whoever made them. Imports numpy, config, intervals, arc_data and report. Used by verbs.
Attempts are {task_id: [[attempt_1, attempt_2], ... one list per test input]}; a single attempt counts as both.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arc_data import NUM_COLORS, ArcTask, DataError, Grid, Pair, describe, load_json, parse_grid, require_answers
from config import one_line
from intervals import bootstrap_interval, wilson_interval
from report import write_text_atomic

Attempts = Mapping[str, Sequence[Sequence[Grid]]]
NUM_ATTEMPTS = 2
KEYS = ("attempt_1", "attempt_2")
SIDE_BINS = ((5, "<= 5"), (10, "6-10"), (20, "11-20"), (30, "21-30"))  # bins of an output's longer side
COLOR_BINS = ("1", "2", "3", "4", "5 or more")  # bins of the number of colours in an answer


# 1. Shares and their intervals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How much of `of` is right (a count, or a sum of parts), and the 95 % interval of the share."""

    right: float
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Return the share, nan of nothing."""
        return self.right / self.of if self.of else math.nan


def _proportion(values: Iterable[bool]) -> Share:
    values = [bool(value) for value in values]
    return Share(sum(values), len(values), *wilson_interval(sum(values), len(values)))


def _mean(per_task: Sequence[Sequence[float]]) -> Share:
    """Return the mean of all values, which are given task by task."""
    sums, counts = [math.fsum(values) for values in per_task], [len(values) for values in per_task]
    return Share(math.fsum(sums), sum(counts), *bootstrap_interval(sums, counts))


# 2. Scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Scores of the outputs of one kind: exact at one and at two attempts, and mean cell accuracy of the first."""

    exact: tuple[Share, Share]
    cells: float


@dataclass(frozen=True)
class Scores:
    """All scores of a set of attempts. A pair of shares is at one attempt and at two.

    per_output: outputs that are exact (Kaggle); task_fraction: mean over tasks of the share of exact outputs (ARC
    Prize leaderboard); strict: tasks with all outputs exact; size: outputs of the right size; cells: mean share of
    right cells of the first attempt, 0 where its size differs; cells_union: the same over the union of both areas,
    aligned top-left.
    groups: {"output side" | "size" | "colours": {label: Group}}, labels without outputs left out.
    Intervals: Wilson for counts; bootstrap over tasks for task_fraction, cells and cells_union.
    """

    tasks: int
    outputs: int
    per_output: tuple[Share, Share]
    task_fraction: tuple[Share, Share]
    strict: tuple[Share, Share]
    size: tuple[Share, Share]
    cells: Share
    cells_union: Share
    groups: dict[str, dict[str, Group]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; each share holds its "value" beside right, of, low and high."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return {"value": value.value, **dataclasses.asdict(value)}
    if isinstance(value, Group):
        return {"exact": _plain(value.exact), "cells": value.cells}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Judged:
    """One output: exact and of the right size at one and at two attempts, cells of the first, group labels."""

    exact: tuple[bool, bool]
    size: tuple[bool, bool]
    cells: float
    cells_union: float
    labels: tuple[tuple[str, str], ...]


def score(attempts: Attempts, tasks: Sequence[ArcTask]) -> Scores:
    """Return the scores of the attempts on every test input of `tasks`; attempts at other tasks are not looked at.

    Raises: DataError when an answer is unknown, or when a test input has no attempt or more than two.
    """
    require_answers(tasks)
    tasks = [task for task in tasks if task.test]
    judged = []
    for task in tasks:
        given = _attempts_at(attempts, task)
        judged.append([_judge(some, pair) for some, pair in zip(given, task.test, strict=True)])
    outputs = [output for task in judged for output in task]

    def at_each(count: Callable[[int], Share]) -> tuple[Share, Share]:
        return count(0), count(1)

    return Scores(
        tasks=len(judged),
        outputs=len(outputs),
        per_output=at_each(lambda n: _proportion(output.exact[n] for output in outputs)),
        task_fraction=at_each(
            lambda n: _mean([[sum(output.exact[n] for output in task) / len(task)] for task in judged])
        ),
        strict=at_each(lambda n: _proportion(all(output.exact[n] for output in task) for task in judged)),
        size=at_each(lambda n: _proportion(output.size[n] for output in outputs)),
        cells=_mean([[output.cells for output in task] for task in judged]),
        cells_union=_mean([[output.cells_union for output in task] for task in judged]),
        groups=_groups(outputs),
    )


def _attempts_at(attempts: Attempts, task: ArcTask) -> Sequence[Sequence[Grid]]:
    """Return the attempts at a task, one or two for each test input. Raises: DataError naming task and input."""
    given = attempts.get(task.id, ())
    if len(given) != len(task.test):
        raise DataError(f"task {task.id}: attempts for {len(given)} of {len(task.test)} test inputs")
    for i, some in enumerate(given):
        if not 1 <= len(some) <= NUM_ATTEMPTS:
            raise DataError(f"task {task.id}: test[{i}] has {len(some)} attempts; expected 1 or {NUM_ATTEMPTS}")
    return given


def _judge(attempts: Sequence[Grid], pair: Pair) -> _Judged:
    answer, first = pair.output, attempts[0]
    exact = [np.array_equal(attempt, answer) for attempt in attempts]
    size = [np.shape(attempt) == answer.shape for attempt in attempts]
    side, colors = max(answer.shape), len(np.unique(answer))
    labels = (
        ("output side", next(label for most, label in SIDE_BINS if side <= most)),
        ("size", "as the input" if answer.shape == pair.input.shape else "changed"),
        ("colours", COLOR_BINS[min(colors, len(COLOR_BINS)) - 1]),
    )
    right, union = _right_and_union(first, answer)
    cells = right / answer.size if size[0] else 0.0
    return _Judged((exact[0], any(exact)), (size[0], any(size)), cells, right / union, labels)


def _right_and_union(grid: Grid, answer: Grid) -> tuple[int, int]:
    """Return how many cells agree and how many either grid has, both aligned top-left."""
    height, width = (min(a, b) for a, b in zip(np.shape(grid), answer.shape, strict=True))
    right = int((np.asarray(grid)[:height, :width] == answer[:height, :width]).sum())
    return right, np.size(grid) + answer.size - height * width


def _groups(outputs: Sequence[_Judged]) -> dict[str, dict[str, Group]]:
    """Return the scores by kind of output, labels in the order of their bins."""
    found: dict[tuple[str, str], list[_Judged]] = defaultdict(list)
    for output in outputs:
        for place in output.labels:
            found[place].append(output)
    sides = tuple(label for _, label in SIDE_BINS)
    order = {"output side": sides, "size": ("as the input", "changed"), "colours": COLOR_BINS}
    return {
        name: {label: _group(found[name, label]) for label in labels if (name, label) in found}
        for name, labels in order.items()
    }


def _group(outputs: Sequence[_Judged]) -> Group:
    one, two = (_proportion(output.exact[n] for output in outputs) for n in range(NUM_ATTEMPTS))
    return Group((one, two), math.fsum(output.cells for output in outputs) / len(outputs))


def copy_input(tasks: Iterable[ArcTask]) -> dict[str, list[list[Grid]]]:
    """Return attempts that are the inputs: a baseline."""
    return {task.id: [[pair.input] for pair in task.test] for task in tasks}


def one_color(tasks: Iterable[ArcTask]) -> dict[str, list[list[Grid]]]:
    """Return attempts of the answer's size in its own most common colour: no answer in one colour can do better."""

    def painted(answer: Grid) -> Grid:
        return np.full_like(answer, np.bincount(answer.ravel(), minlength=NUM_COLORS).argmax())

    return {task.id: [[painted(pair.output)] for pair in task.test] for task in tasks}


# 3. The table ------------------------------------------------------------------------------------------------------


def score_lines(columns: Mapping[str, Scores]) -> list[str]:
    """Return a table of lines: one row per score, one column per set of attempts, the first with intervals and counts.

    All columns must be scores of the same outputs. The rows of a group count exact outputs at two attempts.
    """
    first = next(iter(columns.values()))
    assert all((s.tasks, s.outputs) == (first.tasks, first.outputs) for s in columns.values()), "scores of other data"
    rows: list[tuple[str, list[Share]]] = []
    for label, name in (
        ("outputs exact (Kaggle)", "per_output"),
        ("mean of task fractions (leaderboard)", "task_fraction"),
        ("tasks with all outputs exact (strict)", "strict"),
        ("outputs of the right size", "size"),
    ):
        for n in range(NUM_ATTEMPTS):
            rows.append((f"{label}, {n + 1}", [getattr(scores, name)[n] for scores in columns.values()]))
    rows.append(("cells, 0 at a wrong size", [scores.cells for scores in columns.values()]))
    rows.append(("cells over the union of both areas", [scores.cells_union for scores in columns.values()]))
    for name, groups in first.groups.items():
        for label in groups:
            rows.append((f"{name} {label}, 2", [scores.groups[name][label].exact[1] for scores in columns.values()]))
    table = [(label, [_with_interval(shares[0]), *(f"{s.value:.3f}" for s in shares[1:])]) for label, shares in rows]
    table.insert(0, ("attempts after the comma", list(columns)))
    widths = [max(len(cells[i]) for _, cells in table) for i in range(len(columns))]
    wide = max(len(label) for label, _ in table)
    head = f"Scores of {first.outputs} outputs in {first.tasks} tasks, 95 % intervals:"
    return [head] + [
        f"  {label:<{wide}} | " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip(" ")
        for label, cells in table
    ]


def _with_interval(share: Share) -> str:
    count = f" ({int(share.right)}/{share.of})" if isinstance(share.right, int) else ""
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]{count}"


# 4. The submission file --------------------------------------------------------------------------------------------


def write_submission(path: str | Path, attempts: Attempts, tasks: Sequence[ArcTask]) -> None:
    """Write {id: [{"attempt_1": grid, "attempt_2": grid}, ...]} for every task and test input, in order, atomically.

    Raises: DataError when an attempt is missing or no grid; then nothing is written.
    """
    table = {}
    for task in tasks:
        table[task.id] = []
        for i, some in enumerate(_attempts_at(attempts, task)):
            grids = [np.asarray(some[min(n, len(some) - 1)]).tolist() for n in range(NUM_ATTEMPTS)]
            for key, grid in zip(KEYS, grids, strict=True):
                parse_grid(grid, f"task {task.id}", f"test[{i}].{key}")
            table[task.id].append(dict(zip(KEYS, grids, strict=True)))
    write_text_atomic(Path(path), json.dumps(table, separators=(",", ":")) + "\n")


def read_submission(path: str | Path) -> dict[str, list[list[Grid]]]:
    """Return the attempts in a submission file. Raises: DataError naming the first fault."""
    table = load_json(Path(path))
    _require_none(path, list(_faults(table)))
    return _attempts_in(table)


def _attempts_in(table: Mapping[str, Any]) -> dict[str, list[list[Grid]]]:
    return {
        task_id: [[parse_grid(output[key], f"task {task_id}", f"test[{i}].{key}") for key in KEYS]
                  for i, output in enumerate(outputs)]
        for task_id, outputs in table.items()
    }  # fmt: skip


def check_submission(source: str | Path | Mapping[str, Any], tasks: Sequence[ArcTask]) -> list[str]:
    """Return the problems of a submission (a file, or the object in one) to `tasks`, one line each; none when it is
    right. Of each grid the first fault is told.
    """
    try:
        table = load_json(Path(source)) if isinstance(source, (str, Path)) else source
    except DataError as error:
        return [one_line(str(error).splitlines()[0])]
    problems = list(_faults(table))
    if isinstance(table, Mapping):
        inputs = {task.id: len(task.test) for task in tasks}
        problems += [f"task {task_id}: missing" for task_id in inputs if task_id not in table]
        for task_id, outputs in table.items():
            if task_id not in inputs:
                problems.append(f"task {task_id}: unknown, no such task in the challenges")
            elif isinstance(outputs, list) and len(outputs) != inputs[task_id]:
                problems.append(f"task {task_id}: {len(outputs)} outputs for {inputs[task_id]} test inputs")
    return [one_line(problem) for problem in problems]


def score_submission(path: str | Path, tasks: Sequence[ArcTask]) -> Scores:
    """Return the scores of a submission file; `tasks` hold the answers (load_tasks takes a solutions file).

    Raises: DataError when the file has problems, naming the first, or when an answer is unknown.
    """
    table = load_json(Path(path))
    _require_none(path, check_submission(table, tasks))
    return score(_attempts_in(table), tasks)


def _require_none(path: str | Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{path}: {one_line(problems[0])}{more}")


def _faults(table: Any) -> Iterator[str]:
    """Yield what is wrong with a submission whatever the tasks are."""
    if not isinstance(table, Mapping):
        yield f"expected an object {{task_id: [...]}}; found {describe(table)}"
        return
    for task_id, outputs in table.items():
        if not isinstance(outputs, list):
            yield f"task {task_id}: expected a list of outputs; found {describe(outputs)}"
            continue
        for i, output in enumerate(outputs):
            yield from _faults_of_output(output, f"task {task_id}", f"test[{i}]")


def _faults_of_output(output: Any, where: str, name: str) -> Iterator[str]:
    if not isinstance(output, Mapping):
        yield f"{where}: {name} must be an object with {' and '.join(KEYS)}; found {describe(output)}"
        return
    for key in output:
        if key not in KEYS:
            yield f"{where}: {name}.{key} is not one of {', '.join(KEYS)}"
    for key in KEYS:
        if key not in output:
            yield f"{where}: {name} has no {key}"
            continue
        try:
            parse_grid(output[key], where, f"{name}.{key}")
        except DataError as error:
            yield str(error)
