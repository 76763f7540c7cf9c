"""What the pages of a report are about: the facts of a run, and shares with their intervals.

Imports config, intervals, run_record and the page's parts. Used by page_outputs, page_compare and report_page.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from config import ConfigError, TrainConfig, from_dict
from intervals import bootstrap_interval, wilson_interval
from page_parts import numeric, percent
from run_record import Output, RunRecord, Validation

MOST = 10**9  # outputs that a log may name


@dataclass
class Facts:
    """A run, its last validation, and what the script is to know."""

    run: RunRecord
    data: dict[str, Any] = field(default_factory=lambda: {"epochs": [], "frames": [], "images": []})

    @cached_property
    def validation(self) -> Validation | None:
        """Return the last validation that left its outputs."""
        return self.run.validation(self.run.epochs[-1]) if self.run.epochs else None

    @property
    def outputs(self) -> Sequence[Output]:
        """Return the outputs of the last validation."""
        return self.validation.outputs if self.validation else ()

    @cached_property
    def shown(self) -> list[Output]:
        """Return the outputs whose grids are known, the most instructive first: nearly solved, then by their cells."""
        known = [output for output in self.outputs if output.grid("first") and output.grid("target")]
        return sorted(known, key=lambda o: (order_of(o), -(o.number("cells") or 0.0), o.key))

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """Return the epoch records, validated or not."""
        return self.run.of("epoch")

    @cached_property
    def scored(self) -> list[dict[str, Any]]:
        """Return the records of epochs that were validated."""
        return [record for record in self.epochs if numeric(record.get("val_exact")) is not None]

    @cached_property
    def last_step(self) -> float:
        """Return the number of batches done so far, as far as the log tells."""
        return max([numeric(record.get("step")) or 0.0 for record in self.run.metrics], default=0.0)

    @cached_property
    def config(self) -> TrainConfig | None:
        """Return the run's settings; None where they are missing or another version's."""
        if not self.run.settings:
            return None
        try:
            return from_dict(TrainConfig, self.run.settings)
        except ConfigError as error:
            self.run.problem(f"config.json holds settings of another version ({error})")
            return None


def order_of(output: Output) -> int:
    """Return where an output belongs in the gallery: nearly solved, then unsolved, then solved."""
    return 0 if "nearly" in output.kinds else 2 if "solved" in output.kinds else 1


def solved_tasks(outputs: Sequence[Output]) -> tuple[int, int]:
    """Return (tasks with all outputs exact, tasks)."""
    tasks: dict[str, list[bool]] = defaultdict(list)
    for output in outputs:
        tasks[output.key[0]].append(output.flag("exact"))
    return sum(map(all, tasks.values())), len(tasks)


@dataclass(frozen=True)
class Score:
    """A share of outputs or tasks, or a mean, with its 95 % interval."""

    value: float
    low: float
    high: float
    count: str = ""

    def cell(self) -> str:
        """Return it as a table's cell."""
        count = f" <small>{self.count}</small>" if self.count else ""
        return f"{percent(self.value)}{count}<br><small>{percent(self.low)} to {percent(self.high)}</small>"


def share(claims: Iterable[bool]) -> Score:
    """Return a proportion with Wilson's interval."""
    claims = [bool(claim) for claim in claims]
    return proportion(sum(claims), len(claims))


def proportion(right: int, of: int) -> Score:
    """Return a share with Wilson's interval; counts that make no share, from a damaged log, are brought into range."""
    of = min(max(of, 0), MOST)
    right = min(max(right, 0), of)
    return Score(right / of if of else math.nan, *wilson_interval(right, of), f"{right}/{of}")


def mean_over_tasks(outputs: Sequence[Output], value: Callable[[Output], float], by_task: bool = False) -> Score:
    """Return a mean over outputs, or with `by_task` over the tasks' own means; bootstrap interval over tasks."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for output in outputs:
        tasks[output.key[0]].append(value(output))
    values = [[math.fsum(some) / len(some)] if by_task else some for some in tasks.values()]
    sums, counts = [math.fsum(some) for some in values], [len(some) for some in values]
    total = sum(counts)
    return Score(math.fsum(sums) / total if total else math.nan, *bootstrap_interval(sums, counts))
