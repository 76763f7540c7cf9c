"""What a validation leaves for the report: a line per output, grids of a fixed sample at each planning step, memory.

Only looks: it draws no random number and changes nothing that is trained, remembered or scored. What it writes is a
function of the validation alone (no times), so a resumed run writes the same bytes. May import evaluate and everything
below. Used by the driver; `run_record` reads the files, and says what stands in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arc_data import PAD, ArcTask, Context, Query
from arc_system import to_host
from config import UnsafeFileError, parse_json, read_regular
from evaluate import Item, Prediction, Tally
from report import PREDICTIONS, write_text_atomic
from run_record import MAX_PREDICTIONS, epoch_of
from solver2 import MemoryBuffer, Recall

SAMPLE = 24  # tasks that are shown step by step in every epoch
SHOWN_ENTRIES = 12  # of the memory: the most used ones, and as many that were never used
BINS = 10  # of the memory's histograms
# Values of the tally that every output has, and their names in the file.
NUMBERS = {
    "exact": "exact", "two_exact": "two", "size": "size", "exact_prior": "prior", "two_exact_prior": "prior_two",
    "planned_exact": "planned", "at_once": "at_once", "steps": "steps", "after": "cells", "before": "unrefined_cells",
    "cells_true": "cells_true", "nats": "nats", "unrefined_nats": "unrefined_nats", "prior_nats": "prior_nats",
    "risk": "risk", "ambiguity": "ambiguity", "reward": "reward",
}  # fmt: skip
PlanBack = Callable[[Sequence[Context], Sequence[np.ndarray], Tensor], tuple[Tensor, Tensor]]
COUNTS = ("exact", "two", "size", "prior", "prior_two", "planned", "at_once", "steps")


def grid_text(grid: np.ndarray) -> str:
    """Return a grid of digits 0-9 as text: rows from top to bottom, "/" between them."""
    return "/".join(bytes(row).decode("ascii") for row in (grid + 48).astype(np.uint8))


def cut(canvas: np.ndarray) -> np.ndarray:
    """Return the grid [H, W] at the upper left of a canvas [S, S] that is PAD elsewhere."""
    inside = canvas != PAD
    return canvas[: int(inside.any(1).sum()), : int(inside.any(0).sum())]


def sample_of(items: Sequence[Item]) -> frozenset[int]:
    """Return the items shown step by step: the first output of SAMPLE tasks, chosen by the hash of their ids alone."""
    first: dict[str, int] = {}
    for number, (context, _) in enumerate(items):
        first.setdefault(context.task_id, number)
    order = sorted(first, key=lambda task_id: blake2b(task_id.encode(), digest_size=8).digest())
    return frozenset(first[task_id] for task_id in order[:SAMPLE])


class Gallery:
    """A `Watcher` of one validation of `items`, and the writer of its files.

    `tasks` hold the pairs that the memory may have learned from. `back` is `evaluate.plan_back` for a system, None
    where the backward planner is not trained.
    """

    def __init__(
        self, items: Sequence[Item], memory: MemoryBuffer, tasks: Iterable[ArcTask], back: PlanBack | None = None
    ):
        self.items, self.memory, self._back = items, memory, back
        self.sample = sample_of(items)
        self._pairs = {(t.id, f"train:{i}"): pair for t in tasks for i, pair in enumerate(t.train)}
        self._entries = {entry["number"]: entry for entry in memory.entries()}
        self._tally = Tally()

    def look(self, tally: Tally, batch: Sequence[int], query: Query, prediction: Prediction) -> None:
        """Keep the attempts of one batch as text, and of the sample each planning step and what the memory recalled."""
        made = to_host(*(x.to(torch.int8) for x in (prediction.grid, prediction.second, prediction.unrefined)))
        grids = [canvases.numpy() for canvases in made]
        for row, item in enumerate(batch):
            first, second, unrefined = (grid_text(cut(canvases[row])) for canvases in grids)
            tally.kept[item] = {"first": first, "second": second}
            if unrefined != first:
                tally.kept[item]["unrefined"] = unrefined
        rows, recall = [row for row, item in enumerate(batch) if item in self.sample], prediction.scene.recall
        if rows:
            for row, steps in zip(rows, planning_steps(prediction, rows), strict=True):
                tally.kept[batch[row]] |= {"planning": steps, "neighbours": self._recalled(recall, row)}
            if self._back is not None:
                contexts = [self.items[batch[row]][0] for row in rows]
                planned = [cut(grid).astype(np.uint8) for grid in prediction.planned[rows].to(torch.int8).cpu().numpy()]
                beliefs, inputs = self._back(contexts, planned, prediction.embedding[rows])
                for row, steps in zip(rows, belief_steps(beliefs, inputs != PAD), strict=True):
                    tally.kept[batch[row]]["backward"] = steps[::-1]

    def finish(self, tally: Tally) -> None:
        """Take the tally of all outputs."""
        self._tally = tally

    def write(self, folder: Path, epoch: int, step: int) -> None:
        """Write epoch_NNNN.jsonl: what the epoch is, then a line per output; and tasks.jsonl where an output is new.
        Files of later epochs belong to an attempt that was given up; they go. Raises: OSError.
        """
        place = folder / PREDICTIONS
        place.mkdir(exist_ok=True)
        for left in place.glob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self._write_tasks(place / "tasks.jsonl")
        for path in place.glob("epoch_*.jsonl"):
            if epoch_of(path.name) > epoch:
                path.unlink(missing_ok=True)
        head = {"epoch": epoch, "step": step, "outputs": len(self.items), "memory": self._memory(step)}
        write_lines(place / f"epoch_{epoch:04d}.jsonl", [head, *self._rows()])

    def _rows(self) -> list[dict[str, Any]]:
        """Return a record per output, in the order of the items."""
        order = self._tally.values("item").astype(int).tolist()
        columns = {name: self._tally.values(key).tolist() for key, name in NUMBERS.items()}
        rows = []
        for place, item in sorted(enumerate(order), key=lambda both: both[1]):
            values = {name: number(column[place], name in COUNTS) for name, column in columns.items()}
            rows.append({**self._name(item), **values, **self._tally.kept[item]})
        return rows

    def _name(self, item: int) -> dict[str, Any]:
        context = self.items[item][0]
        return {"task": context.task_id, "test": int(context.pair_id.rpartition(":")[2])}

    def _write_tasks(self, path: Path) -> None:
        """Write the grids that stay the same, of these items and of what the file holds already, once."""
        rows = {}
        for item, (context, answer) in enumerate(self.items):
            name, shown = self._name(item), [[grid_text(a), grid_text(b)] for a, b in context.demonstrations]
            grids = {"input": grid_text(context.input), "target": grid_text(answer)}
            rows[name["task"], name["test"]] = {**name, "demonstrations": shown, **grids}
        there = read_rows(path)
        if not rows.keys() <= there.keys():
            write_lines(path, list({**there, **rows}.values()))

    def _recalled(self, recall: Recall | None, row: int) -> list[dict[str, Any]]:
        """Return the entries that the memory recalled for one row of a batch, the most similar first."""
        if recall is None:
            return []
        columns = (recall.index[row], recall.similarity[row], recall.weights[row])
        found = zip(*(values.tolist() for values in columns), strict=False)  # weights have the null entry's as well
        return [{**self._grids(self._entries[index]), "similarity": number(similarity), "weight": number(weight)}
                for index, similarity, weight in found if index in self._entries]  # fmt: skip

    def _grids(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return whose pair an entry remembers, and its grids where it is a pair of these tasks."""
        name = {"task": entry["task"], "pair": entry["pair"]}
        pair = self._pairs.get((entry["task"], entry["pair"]))
        return name if pair is None else {**name, "input": grid_text(pair.input), "output": grid_text(pair.output)}

    def _memory(self, step: int) -> dict[str, Any]:
        """Return what the memory holds: its counts, histograms of scores and ages, and some entries as grids."""
        entries = list(self._entries.values())
        used = sorted((e for e in entries if e["hits"]), key=lambda e: (-e["hits"], e["number"]))
        unused = sorted((e for e in entries if not e["hits"]), key=lambda e: -e["number"])

        def shown(some: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            facts = ("hits", "step", "score", "gain")
            return [{**self._grids(e), **{name: number(e[name]) for name in facts}} for e in some[:SHOWN_ENTRIES]]

        counts = {name: number(value) for name, value in self.memory.statistics().items()}
        scores = np.histogram([e["score"] for e in entries], BINS, (0.0, 1.0))[0]
        ages = np.histogram([step - e["step"] for e in entries], BINS, (0, max(step, 1)))[0]
        return {**counts, "capacity": self.memory.config.memory_capacity, "never_used": len(unused),
                "scores": scores.tolist(), "ages": ages.tolist(), "oldest": max(step, 1),
                "most_used": shown(used), "unused": shown(unused)}  # fmt: skip


def planning_steps(prediction: Prediction, rows: Sequence[int]) -> list[list[list[str]]]:
    """Return for each of the rows [grid, confidence] of every planning step, as text; see `belief_steps`."""
    chosen = torch.tensor(rows, device=prediction.beliefs.device)
    height, width = prediction.beliefs.shape[2:4]
    return belief_steps(prediction.beliefs[chosen], prediction.planned[chosen, :height, :width] != PAD)


def belief_steps(beliefs: Tensor, is_cell: Tensor) -> list[list[list[str]]]:
    """Return for each row [grid, confidence] of every step of beliefs [N, T, H, W, C], as text.

    Shown are the cells where is_cell [N, H, W]. The confidence of a cell is the probability of its colour, in tenths
    and rounded down, at most 9.
    """
    best, colors = beliefs.float().softmax(-1).max(-1)
    inside = is_cell[:, None].expand_as(colors)

    def texts(values: Tensor) -> list[list[str]]:
        cells = torch.where(inside, values, PAD).to(torch.int8).cpu().numpy()
        return [[grid_text(cut(step)) for step in steps] for steps in cells]

    both = zip(texts(colors), texts((best * 10).floor().clamp(0, 9).long()), strict=True)
    return [[list(step) for step in zip(*pair, strict=True)] for pair in both]


def number(value: float, is_count: bool = False) -> float | int | None:
    """Return a value as the files hold it: whole where it counts, to five places, None where it is not finite."""
    if not math.isfinite(value):
        return None
    return int(value) if is_count or isinstance(value, int) else round(value, 5)


def read_rows(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the records of tasks.jsonl by task and test input; none where the file is missing or damaged."""
    try:
        rows = [parse_json(line) for line in read_regular(path, MAX_PREDICTIONS).splitlines()]
        return {(row["task"], row["test"]): row for row in rows}
    except (FileNotFoundError, UnsafeFileError, ValueError, LookupError, TypeError):  # it is written anew
        return {}


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object per line, atomically."""
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records]
    write_text_atomic(path, "".join(lines))
