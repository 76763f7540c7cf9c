"""What a run folder says, read so that a dead, damaged or strange one can still be reported on.

Every file may be missing, cut short, or written by somebody else: what cannot be used is left out and named in
`problems`, and nothing is renamed or written. Imports the standard library, config and report. Used by report_page.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from config import PROGRAM, one_line, parse_json, read_regular
from report import MAX_JSON, MAX_METRICS, NON_FINITE, PREDICTIONS, RunFolderError

MAX_PREDICTIONS = 200_000_000  # bytes of one file
MAX_SIDE = 30
NEARLY = 0.95  # share of right cells from which an output is nearly solved
KNOWN_FILES = ("run.json", "config.json", "metrics.jsonl", "epochs.csv", "run.log")
GRIDS = ("input", "target", "first", "second", "unrefined", "output")

Key = tuple[str, int]  # task id and number of the test input


class NoRunError(RunFolderError):
    """There is no such run."""

    exit_code = 5


def find_run_folder(name: str, out: str | Path = "runs") -> Path:
    """Return the run folder that a name or path means; "" and a folder of runs: the newest run there.

    Raises: NoRunError when there is none.
    """
    place = Path(name).expanduser() if name else Path(out)
    for path in (place, Path(out) / name):
        if any((path / known).is_file() for known in KNOWN_FILES):
            return path
    newest = newest_run(place)
    if newest is not None:
        return newest
    runs = sorted(run.name for run in runs_in(Path(out)))
    hint = f"there are: {', '.join(runs[-5:])}" if runs else f"python {PROGRAM} --epochs 1 makes one"
    raise NoRunError(f"no run in {place}" if place.is_dir() else f"no such run: {name or out}", hint)


def runs_in(place: Path) -> list[Path]:
    """Return the run folders in a folder."""
    found = place.iterdir() if place.is_dir() else ()
    return [path for path in found if any((path / known).is_file() for known in KNOWN_FILES)]


def newest_run(place: Path) -> Path | None:
    """Return the run that LATEST names in a folder, else the one last changed; None without any."""
    runs = runs_in(place)
    try:
        latest = read_regular(place / "LATEST", 4096).decode().strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    named = [path for path in runs if path.name == latest]
    return (named or sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True) or [None])[0]


# Outputs -------------------------------------------------------------------------------------------------------------


def is_grid(text: Any) -> bool:
    """Return whether a value is a grid as text: 1 to 30 rows of as many digits, "/" between them."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,30}(?:/[0-9]{1,30}){0,29}", text):
        return False
    return len(set(map(len, text.split("/")))) == 1


def rows_of(grid: str) -> list[str]:
    """Return the rows of a grid, each a text of digits."""
    return grid.split("/")


def shape_of(grid: str) -> tuple[int, int]:
    """Return (rows, columns) of a grid."""
    rows = rows_of(grid)
    return len(rows), len(rows[0])


def cells_of(grid: str) -> str:
    """Return the digits of a grid, row by row."""
    return grid.replace("/", "")


@functools.lru_cache(maxsize=20_000)
def union_cells(grid: str, target: str) -> float:
    """Return the right cells over the union of both areas, aligned top-left."""
    (h, w), (th, tw) = shape_of(grid), shape_of(target)
    right = sum(sum(map(operator.eq, row, other)) for row, other in zip(rows_of(grid), rows_of(target), strict=False))
    return right / (h * w + th * tw - min(h, th) * min(w, tw))


def one_color(target: str) -> str:
    """Return the grid of the target's size in its most common colour."""
    height, width = shape_of(target)
    return "/".join([Counter(cells_of(target)).most_common(1)[0][0] * width] * height)


@dataclass(frozen=True)
class Output:
    """One test output of a validation: its record, and the grids that stay the same (empty where unknown)."""

    record: Mapping[str, Any]
    task: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """Return task id and number of the test input."""
        return self.record["task"], self.record["test"]

    def number(self, name: str) -> float | None:
        """Return a number of the record; None where it has none."""
        value = self.record.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def flag(self, name: str) -> bool:
        """Return whether a number is there and not 0."""
        return bool(self.number(name))

    def grid(self, name: str) -> str:
        """Return a grid of the record or of the task, "" where it is unknown."""
        return self.record.get(name) or self.task.get(name) or ""

    @property
    def unrefined(self) -> str:
        """Return the first attempt under the prompt as written."""
        return self.grid("unrefined") or self.grid("first")

    @property
    def efe(self) -> float | None:
        """Return the expected free energy, risk and ambiguity in nats per cell; None where it is unknown."""
        parts = [self.number(name) for name in ("risk", "ambiguity")]
        return None if None in parts else sum(parts)

    @cached_property
    def delta(self) -> float:
        """Return the cells that the refinement gained."""
        return (self.number("cells") or 0.0) - (self.number("unrefined_cells") or 0.0)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Return what the output is: solved, nearly, size (wrong), copy, worse, better."""
        found = []
        if self.flag("exact"):
            found.append("solved")
        elif self.flag("size") and (self.number("cells") or 0.0) >= NEARLY:
            found.append("nearly")
        if not self.flag("size"):
            found.append("size")
        if self.grid("first") and self.grid("first") == self.grid("input"):
            found.append("copy")
        if self.delta:
            found.append("worse" if self.delta < 0 else "better")
        return tuple(found)


@dataclass(frozen=True)
class Validation:
    """What one epoch's validation left: facts about it, and its outputs in order."""

    epoch: int
    head: Mapping[str, Any]
    outputs: tuple[Output, ...]


def _usable(record: Mapping[str, Any]) -> bool:
    """Return whether a line about an output can be shown: names of the right kind, and grids that are grids."""
    named = isinstance(record.get("task"), str) and isinstance(record.get("test"), int)
    pairs, neighbours = record.get("demonstrations", []), record.get("neighbours", [])
    planning, backward = record.get("planning", []), record.get("backward", [])
    if not all(isinstance(value, list) for value in (pairs, neighbours, planning, backward)):
        return False
    steps = [*planning, *backward]
    return (
        named
        and all(is_grid(record[name]) for name in GRIDS if name in record)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_grid, pair)) for pair in (*pairs, *steps))
        and all(shape_of(step[0]) == shape_of(step[1]) for step in steps)
        and all(map(_is_entry, neighbours))
    )  # fmt: skip


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of the memory can be shown."""
    return isinstance(entry, dict) and all(is_grid(entry[name]) for name in GRIDS if name in entry)


# The run -------------------------------------------------------------------------------------------------------------


@dataclass
class RunRecord:
    """A run as far as its files tell. `problems` are sentences about what is missing or damaged."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[Key, dict[str, Any]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)  # with a file of predictions
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return self.path.resolve().name

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Return what the files of a run folder say."""
        run = cls(path)
        config = run._object("config.json", dict)
        run.settings = config.pop("config", {}) if isinstance(config.get("config"), dict) else {}
        run.facts = config
        run.sessions = [entry for entry in run._object("env.json", list) if isinstance(entry, dict)]
        run.status = run._object("run.json", dict)
        run.metrics = [
            {name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in record.items()}
            for record in run._lines("metrics.jsonl", MAX_METRICS)
        ]
        run.epochs = sorted(epoch for path in run._files() if (epoch := epoch_of(path.name)) >= 0)
        if run.epochs:
            for record in run._lines(f"{PREDICTIONS}/tasks.jsonl", MAX_PREDICTIONS):
                if _usable(record) and "target" in record and "input" in record:
                    run.tasks[record["task"], record["test"]] = record
        return run

    def validation(self, epoch: int, sample_only: bool = False) -> Validation:
        """Return what a validation left; `sample_only`: of the outputs that are shown step by step alone."""
        name, outputs, head = f"{PREDICTIONS}/epoch_{epoch:04d}.jsonl", [], {}
        unusable = 0
        for number, record in enumerate(self._lines(name, MAX_PREDICTIONS, b'"planning"' if sample_only else b"")):
            if number == 0 and "task" not in record:
                head = record
            elif _usable(record):
                task = self.tasks.get((record["task"], record["test"]), {})
                outputs.append(Output(record, task))
            else:
                unusable += 1
        if unusable:
            self.problem(f"{name}: {unusable} lines say nothing that can be shown")
        expected = head.get("outputs")
        if not sample_only and isinstance(expected, int) and len(outputs) < expected:
            self.problem(f"{name} holds {len(outputs)} of {expected} outputs")
        return Validation(epoch, head, tuple(outputs))

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the records of one kind of event."""
        return [record for record in self.metrics if record.get("event") == event]

    def problem(self, text: str) -> None:
        """Note, once, what is missing or damaged."""
        if text not in self.problems:
            self.problems.append(text)

    def _files(self) -> list[Path]:
        place = self.path / PREDICTIONS
        return list(place.iterdir()) if place.is_dir() else []

    def _object(self, name: str, kind: type) -> Any:
        """Return the object in a JSON file, an empty one where there is none."""
        try:
            value = parse_json(read_regular(self.path / name, MAX_JSON))
        except FileNotFoundError:
            self.problem(f"{name} is missing")
            return kind()
        except (OSError, ValueError) as error:
            self.problem(f"{name} cannot be read ({one_line(getattr(error, 'strerror', None) or error, 100)})")
            return kind()
        if not isinstance(value, kind):
            self.problem(f"{name} is damaged: it holds no {'object' if kind is dict else 'list'}")
            return kind()
        return value

    def _lines(self, name: str, limit: int, containing: bytes = b"") -> Iterator[dict[str, Any]]:
        """Yield the objects in a file of lines; what is no object is counted, and said. With `containing` only those
        lines that hold it."""
        try:
            content = read_regular(self.path / name, limit)
        except FileNotFoundError:
            self.problem(f"{name} is missing")
            return
        except OSError as error:
            self.problem(f"{name} cannot be read ({one_line(error.strerror or error, 100)})")
            return
        if content and not content.endswith(b"\n"):
            self.problem(f"{name} ends in the middle of a line")
        damaged = 0
        for line in content.splitlines():
            if containing not in line:
                continue
            try:
                value = parse_json(line)
            except ValueError:
                damaged += 1
                continue
            if isinstance(value, dict):
                yield value
            else:
                damaged += 1
        if damaged:
            self.problem(f"{name}: {damaged} damaged line{'s' * (damaged > 1)} left out")


def epoch_of(name: str) -> int:
    """Return the epoch in the name of a file of predictions, -1 where it is none."""
    found = re.fullmatch(r"epoch_(\d{4,9})\.jsonl", name)
    return int(found[1]) if found else -1
