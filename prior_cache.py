"""What the demonstrations say, for whole batches: computed once, transformed per view, kept in memory and on the disk.

Imports demo_prior, prior_store, arc_data, numpy and torch. Used by the system, evaluation and the driver; the prompt,
the planner's start, the loss and the memory are fed from it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from answer_traits import NUM_MISFITS
from arc_data import MAX_SIDE, NUM_COLORS, PAD, Context, Query, canvas_shape, to_device
from demo_prior import MAX_CANDIDATES, REPAIRED, Preference, Shape
from prior_store import (
    MIN_PARALLEL,
    UNREADABLE,
    PriorStore,
    Work,
    compute_all,
    compute_preference,
    compute_sizes,
    core_count,
    decode_preference,
    decode_sizes,
    value_key,
)
from size_hypotheses import size_rule
from task_features import canonical_colors, color_map, context_features

SIZE_FLOOR = 1e-4  # least marginal probability of a side
NUM_EVIDENCE = NUM_MISFITS + 6  # numbers about a candidate
SUM_SCALE = np.array([0.2, 0.2, 0.1], np.float32)  # brings the sums of misfits to the size of the other numbers

Request = tuple[Context, Shape | None]  # an input and an output shape, both in the frame of its augmentation


@dataclass(frozen=True)
class BuildPlan:
    """What `PriorCache.build` will compute: inputs by task, each with what is missing; `found` inputs need nothing."""

    jobs: list[list[tuple[Context, Work]]]
    found: int

    @property
    def missing(self) -> int:
        """Return the number of inputs to compute."""
        return sum(map(len, self.jobs))


class PriorCache:
    """Preferences, sizes and features of contexts, computed once in the unaugmented frame and transformed on demand.

    In memory a context is known by its key (task id, pair id), so one cache serves one data set; on the disk, which
    `open_disk` adds, by its grids. The least recently used entries go first once there are more than `max_entries`.
    """

    def __init__(self, effort: str = "standard", max_entries: int = 65536):
        self.effort, self.max_entries = effort, max_entries
        self.store: PriorStore | None = None
        self._entries: OrderedDict[tuple, Any] = OrderedDict()

    # The disk

    def open_disk(self, folder: str, warn: Callable[[str], None]) -> PriorStore:
        """Return the store in `folder` ('': the default one), which from now on is asked before anything is computed.

        `warn` gets one line when the disk cannot be used; the cache then works without.
        """
        self.close()
        self.store = PriorStore(folder, warn)
        return self.store

    @property
    def folder(self) -> str:
        """Return the folder in which values are kept, '' when they are not."""
        return str(self.store.path.parent) if self.store is not None and self.store.is_usable else ""

    def close(self) -> None:
        """Write what waits to be written and leave the disk."""
        if self.store is not None:
            self.store.close()
            self.store = None

    # Computing ahead

    def plan(self, requests: Iterable[Request]) -> BuildPlan:
        """Return what is neither in memory nor on the disk; a shape None asks for the likeliest size of the input.

        The sizes of every input are part of the plan.
        """
        wanted: dict[tuple[str, str], tuple[Context, dict[Shape | None, None]]] = {}
        for context, shape in requests:
            plain = None if shape is None else context.augmentation.apply_shape((int(shape[0]), int(shape[1])))
            wanted.setdefault(context.key, (context, {}))[1][plain] = None
        there = self._there([(context, None) for context, _ in wanted.values()])
        resolved: list[tuple[Context, list[Shape | None]]] = []
        for context, shapes in wanted.values():
            if None in shapes and _name(context, None) in there:
                likeliest = self._sizes(context)[0][0]
                shapes = dict.fromkeys(likeliest if shape is None else shape for shape in shapes)
            resolved.append((context, list(shapes)))
        there |= self._there([(c, shape) for c, shapes in resolved for shape in shapes if shape is not None])
        jobs: dict[str, list[tuple[Context, Work]]] = {}
        for context, shapes in resolved:
            needs_sizes = _name(context, None) not in there
            missing = tuple(shape for shape in shapes if shape is None or _name(context, shape) not in there)
            if missing or needs_sizes:
                work = Work(context.demonstrations, context.input, missing, needs_sizes)
                jobs.setdefault(context.task_id, []).append((context, work))
        return BuildPlan(list(jobs.values()), len(wanted) - sum(map(len, jobs.values())))

    def build(
        self,
        plan: BuildPlan,
        processes: int = 0,
        tick: Callable[[int], Any] = lambda done: None,
        stopping: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda text: None,
    ) -> int:
        """Return the number of inputs computed: all that are missing, unless `stopping` returned True.

        `processes` 0: one per core, or none besides this one when there is little to do. `tick` gets 1 for each input,
        `note` a line when there can be no other processes.
        """
        processes = processes or (core_count() if plan.missing >= MIN_PARALLEL else 1)
        works = [[work for _, work in job] for job in plan.jobs]
        count = 0
        try:
            with closing(compute_all(self.effort, works, processes, stopping, note)) as results:
                for job, place, values in results:
                    context = plan.jobs[job][place][0]
                    for key, shape, data in values:
                        self._remember(_name(context, shape), _decode(shape, data))
                        if self.store is not None:
                            self.store.put(key, data)
                    count += 1
                    tick(1)
        finally:
            if self.store is not None:
                self.store.flush()
        return count

    # One context

    def preference(self, context: Context, shape: Shape) -> Preference:
        """Return the preference in the frame of the context's augmentation; `shape` is in that frame too."""
        plain, view = self._preference(context, shape), context.augmentation
        if view.is_identity:
            return plain
        candidates = [(view.apply(grid), weight, name) for grid, weight, name in plain.candidates]
        log_prob = np.ascontiguousarray(view.apply_scores(plain.log_prob))
        return Preference(log_prob, plain.confidence, candidates, plain.misfits)

    def sizes(self, context: Context) -> list[tuple[Shape, float]]:
        """Return size_prior in the frame of the context's augmentation."""
        return [(context.augmentation.apply_shape(shape), probability) for shape, probability in self._sizes(context)]

    def features_of(self, context: Context) -> np.ndarray:
        """Return context_features, float32 [NUM_FEATURES], the same under every augmentation."""
        return self._get(("features", context.key), lambda: context_features(context.demonstrations, context.input))

    # Batches

    def features(self, source: Query | Context) -> Tensor | np.ndarray:
        """Return features float32 [B, NUM_FEATURES] of a query, or the numpy [NUM_FEATURES] of one context."""
        if isinstance(source, Context):
            return self.features_of(source)
        rows = np.stack([self.features_of(context) for context in source.contexts])
        return to_device(torch.from_numpy(rows), source.input.device)

    def preferences(self, query: Query, sizes: Tensor | Sequence[Shape], canvas: int | Shape) -> Tensor:
        """Return log-probabilities float32 [B, H, W, 10] on a canvas (H, W); uniform outside each size.

        `sizes` are (h, w) in the augmented frame, within the canvas (a single number: a square); a tensor on a GPU is
        copied, so prefer lists there.
        """
        batch = np.full((len(query), *canvas_shape(canvas), NUM_COLORS), -math.log(NUM_COLORS), np.float32)
        for cells, context, shape in zip(batch, query.contexts, _plain_shapes(sizes), strict=True):
            plain = self._preference(context, shape)
            cells[: int(shape[0]), : int(shape[1])] = context.augmentation.apply_scores(plain.log_prob)
        return to_device(torch.from_numpy(batch), query.input.device)

    def confidences(self, query: Query, sizes: Tensor | Sequence[Shape]) -> Tensor:
        """Return the confidence float32 [B] of each context's preference at its size."""
        pairs = zip(query.contexts, _plain_shapes(sizes), strict=True)
        values = [self._preference(context, shape).confidence for context, shape in pairs]
        return to_device(torch.tensor(values, dtype=torch.float32), query.input.device)

    def candidates(
        self, query: Query, sizes: Tensor | Sequence[Shape], canvas: int | Shape, count: int = MAX_CANDIDATES
    ) -> tuple[Tensor, Tensor]:
        """Return candidate grids int64 [B, count, H, W], PAD outside, and their weights float32 [B, count].

        `canvas` as in `preferences`. Best first; a context with fewer candidates has empty ones of weight 0 at the end.
        """
        grids = np.full((len(query), count, *canvas_shape(canvas)), PAD, np.int64)
        weights = np.zeros((len(query), count), np.float32)
        for b, (context, shape) in enumerate(zip(query.contexts, _plain_shapes(sizes), strict=True)):
            kept = self._preference(context, shape).candidates[:count]
            if kept:
                seen = context.augmentation.apply(np.stack([grid for grid, _, _ in kept], -1))
                grids[b, : len(kept), : int(shape[0]), : int(shape[1])] = np.moveaxis(seen, -1, 0)
                weights[b, : len(kept)] = [weight for _, weight, _ in kept]
        device = query.input.device
        return to_device(torch.from_numpy(grids), device), to_device(torch.from_numpy(weights), device)

    def evidence(self, query: Query, sizes: Tensor | Sequence[Shape]) -> tuple[Tensor, Tensor]:
        """Return what is known of each candidate, float32 [B, MAX_CANDIDATES, NUM_EVIDENCE], and which exist.

        The same under every augmentation. See `candidate_evidence`.
        """
        evidence = np.zeros((len(query), MAX_CANDIDATES, NUM_EVIDENCE), np.float32)
        exists = np.zeros((len(query), MAX_CANDIDATES), bool)
        for b, (context, shape) in enumerate(zip(query.contexts, _plain_shapes(sizes), strict=True)):
            found = candidate_evidence(self._preference(context, shape))
            evidence[b, : len(found)], exists[b, : len(found)] = found, True
        device = query.input.device
        return to_device(torch.from_numpy(evidence), device), to_device(torch.from_numpy(exists), device)

    def likeliest_sizes(self, query: Query) -> list[Shape]:
        """Return the most probable output size of each context, in the frame of its augmentation."""
        return [self.sizes(context)[0][0] for context in query.contexts]

    def size_log_prob(self, query: Query) -> Tensor:
        """Return log-probabilities float32 [B, 2, 30] of the numbers of rows and of columns, 1..30."""
        rows = []
        for context in query.contexts:
            marginals = self._get(("sides", context.key), lambda c=context: side_marginals(self._sizes(c)))
            rows.append(marginals[::-1] if context.augmentation.transposes else marginals)
        return to_device(torch.from_numpy(np.stack(rows)), query.input.device)

    def canonical(self, query: Query) -> Tensor:
        """Return canonical colours [B, 10] int64: the frequency rank of each (augmented) colour."""
        rows = np.empty((len(query), NUM_COLORS), np.int64)
        for row, context in zip(rows, query.contexts, strict=True):
            row[list(context.augmentation.colors)] = self._canonical(context)
        return to_device(torch.from_numpy(rows), query.input.device)

    def color_maps(self, contexts: Sequence[Context]) -> Tensor:
        """Return color_map in canonical colours, float32 [B, 10, 10] on the host; the same under every augmentation."""
        maps = [
            self._get(("map", c.key), lambda c=c: color_map(c.demonstrations, self._canonical(c)))
            for c in contexts
        ]
        return torch.from_numpy(np.stack(maps))

    def size_rules(self, contexts: Sequence[Context]) -> list[str]:
        """Return the name of each context's size rule."""
        return [self._get(("rule", c.key), lambda c=c: size_rule(c.demonstrations, c.input)[0]) for c in contexts]

    # The entries

    def _get(self, name: tuple, compute: Callable[[], Any]) -> Any:
        if name in self._entries:
            self._entries.move_to_end(name)
            return self._entries[name]
        return self._remember(name, compute())

    def _remember(self, name: tuple, value: Any) -> Any:
        self._entries[name] = value
        self._entries.move_to_end(name)
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
        return value

    def _preference(self, context: Context, shape: Shape) -> Preference:
        """Return the unaugmented preference for the augmented `shape`."""
        plain = context.augmentation.apply_shape((int(shape[0]), int(shape[1])))
        return self._get(_name(context, plain), lambda: self._value(context, plain))

    def _sizes(self, context: Context) -> list[tuple[Shape, float]]:
        return self._get(_name(context, None), lambda: self._value(context, None))

    def _value(self, context: Context, shape: Shape | None) -> Any:
        """Return the preference at an unaugmented shape, or the sizes (None), from the disk or computed."""
        demonstrations, test_input = context.demonstrations, context.input
        key = value_key(self.effort, demonstrations, test_input, shape)
        data = self.store.get(key) if self.store is not None else None
        if data is not None:
            try:
                return _decode(shape, data)
            except UNREADABLE:  # its checksum is right, so another program wrote it
                self.store.forget(key)
        if shape is None:
            data = compute_sizes(demonstrations, test_input)
        else:
            data = compute_preference(self.effort, demonstrations, test_input, shape)
        if self.store is not None:
            self.store.put(key, data)
        return _decode(shape, data)

    def _there(self, items: Sequence[tuple[Context, Shape | None]]) -> set[tuple]:
        """Return the names of those of (context, unaugmented shape) that are in memory or on the disk."""
        names = {_name(context, shape): (context, shape) for context, shape in items}
        there = names.keys() & self._entries.keys()
        if self.store is not None:
            keys = {
                name: value_key(self.effort, context.demonstrations, context.input, shape)
                for name, (context, shape) in names.items()
                if name not in there
            }
            found = self.store.have(keys.values())
            there |= {name for name, key in keys.items() if key in found}
        return there

    def _canonical(self, context: Context) -> np.ndarray:
        return self._get(("ranks", context.key), lambda: canonical_colors(context.demonstrations, context.input))


def candidate_evidence(preference: Preference) -> np.ndarray:
    """Return float32 [candidates, NUM_EVIDENCE]: misfits, their three sums, log weight, the prior's confidence in its
    first candidate, and whether it is a repaired one."""
    count = len(preference.candidates)
    broken = preference.misfits.astype(np.float32)
    sums = broken.reshape(count, 3, -1).sum(2) * SUM_SCALE
    weights = np.array([weight for _, weight, _ in preference.candidates], np.float32)
    is_repaired = np.array([name.startswith(REPAIRED) for _, _, name in preference.candidates], np.float32)
    confidence = np.zeros(count, np.float32)
    confidence[:1] = preference.confidence
    return np.column_stack((broken, sums, np.log(weights + 1e-6) / 5, confidence, is_repaired))


def side_marginals(sizes: Sequence[tuple[Shape, float]]) -> np.ndarray:
    """Return log-probabilities [2, 30] of the number of rows and of columns, 1..30, floored at SIZE_FLOOR."""
    marginals = np.zeros((2, MAX_SIDE))
    for (height, width), probability in sizes:
        marginals[0, height - 1] += probability
        marginals[1, width - 1] += probability
    return np.log((1 - MAX_SIDE * SIZE_FLOOR) * marginals + SIZE_FLOOR).astype(np.float32)


def _name(context: Context, shape: Shape | None) -> tuple:
    return ("sizes", context.key) if shape is None else ("cells", context.key, shape)


def _decode(shape: Shape | None, data: bytes) -> Any:
    """Return the decoded value. Raises: one of UNREADABLE, also for a preference of another shape."""
    if shape is None:
        return decode_sizes(data)
    preference = decode_preference(data)
    if preference.log_prob.shape[:2] != tuple(shape):
        raise ValueError("a preference of another shape")
    return preference


def _plain_shapes(sizes: Tensor | Sequence[Shape]) -> Sequence[Shape]:
    return sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
