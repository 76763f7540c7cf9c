"""The preference C: what the demonstrations of a task alone say about the output's colours and size.

Pure numpy functions of (demonstrations, test input, shape), never of an answer, and a cache that serves batches as
tensors. Imports arc_data, numpy and torch; used by the prompt, the planner's start, the loss, memory and evaluation.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arc_data import MAX_SIDE, NUM_COLORS, Context, Grid, Query

Demonstrations = Sequence[tuple[Grid, Grid]]
Shape = tuple[int, int]

NUM_FEATURES = 32
FLOOR = 0.05  # uniform share of every cell's distribution
HIST_SMOOTHING = 0.1  # alpha added to each colour of the summed histograms
INPUT_SHARE = 0.4  # mu, weight of the test input's colours in the histogram
MAP_BACKOFF = 5.0  # kappa of the colour map, in cells
POSITION_WEIGHT = 0.3  # share of the position counts where a demonstration has the wanted size
POSITION_BACKOFF = 3.0  # kappa of the position counts, in demonstrations
RULE_WEIGHT = 0.9  # probability of the size that the first applicable rule gives
GUESS_WEIGHT = 0.5  # probability of the best size when no rule applies
SIZE_FLOOR = 1e-4  # least marginal probability of a side


@dataclass(frozen=True, eq=False)
class Preference:
    """C for one input at one output shape.

    log_prob float32 [h, w, 10], normalised, every probability >= FLOOR / 10; confidence in [0, 1], the geometric mean
    probability of the demonstrations' cells, each demonstration predicted from the others (0 with fewer than two);
    candidates (grid, weight, name), best first, all different, weights sum to 1.
    """

    log_prob: np.ndarray
    confidence: float
    candidates: list[tuple[Grid, float, str]]


# 1. Colours ---------------------------------------------------------------------------------------------------------


def demo_prior(demonstrations: Demonstrations, test_input: Grid, shape: Shape) -> Preference:
    """Return the preference for the output of `test_input` at `shape`.

    Histogram of the demonstration outputs mixed with the colours of the test input; where all sizes agree, colour map
    counts that back off to copy rate and histogram; where a demonstration has the wanted size, its position counts.
    Shapes: [h, w] grids -> log_prob [h, w, 10].
    """
    count = len(demonstrations)
    histogram = _histograms(demonstrations, test_input)
    is_map = count > 0 and all(a.shape == b.shape for a, b in demonstrations)
    table = _color_tables(demonstrations, histogram) if is_map else None
    if table is not None and tuple(shape) == test_input.shape:
        prob = table[-1][test_input]
        name = "colour map"
    else:
        prob = np.broadcast_to(histogram[-1], (*shape, NUM_COLORS))
        name = "most common colour"
    same_shape = [b for _, b in demonstrations if b.shape == tuple(shape)]
    if same_shape:
        seen = sum(_EYE[b] for b in same_shape)
        prob = _with_positions(prob, seen, len(same_shape))
        name = name if table is not None else "position counts"
    prob = (1 - FLOOR) * prob + FLOOR / NUM_COLORS
    log_prob = np.log(prob / prob.sum(-1, keepdims=True))
    confidence = math.exp(_leave_one_out(demonstrations, histogram, table)) if count > 1 else 0.0
    candidates = _candidates(log_prob, test_input, histogram[-1], name)
    return Preference(log_prob.astype(np.float32), confidence, candidates)


_EYE = np.eye(NUM_COLORS)


def _counts(grid: Grid) -> np.ndarray:
    return np.bincount(grid.ravel(), minlength=NUM_COLORS)


def _histograms(demonstrations: Demonstrations, test_input: Grid) -> np.ndarray:
    """Return colour distributions [D + 1, 10]: row i without demonstration i (its input as test input), then all."""
    shares = np.array([_counts(b) / b.size for _, b in demonstrations]).reshape(-1, NUM_COLORS)
    inputs = np.array([_counts(x) / x.size for x in (*(a for a, _ in demonstrations), test_input)])
    total = shares.sum(0, keepdims=True)
    rest = np.concatenate([total - shares, total]) + HIST_SMOOTHING
    return (1 - INPUT_SHARE) * rest / rest.sum(1, keepdims=True) + INPUT_SHARE * inputs


def _color_tables(demonstrations: Demonstrations, histogram: np.ndarray) -> np.ndarray:
    """Return p(c_out | c_in) [D + 1, 10, 10]: table i without demonstration i, then the one of all."""
    code = np.concatenate([(i * 100 + a.astype(np.int64) * 10 + b).ravel() for i, (a, b) in enumerate(demonstrations)])
    own = np.bincount(code, minlength=len(demonstrations) * 100).reshape(-1, NUM_COLORS, NUM_COLORS)
    total = own.sum(0, keepdims=True)
    counts = np.concatenate([total - own, total])
    cells = counts.sum((1, 2))
    copied = np.trace(counts, axis1=1, axis2=2) / np.maximum(cells, 1)  # rho: share of cells that keep their colour
    rate = copied[:, None, None]
    backoff = rate * _EYE + (1 - rate) * histogram[:, None, :]
    return (counts + MAP_BACKOFF * backoff) / (counts.sum(2, keepdims=True) + MAP_BACKOFF)


def _with_positions(prob: np.ndarray, seen: np.ndarray, count: int) -> np.ndarray:
    """Return `prob` mixed with position counts `seen` out of `count` demonstrations, which back off to `prob`."""
    counted = (seen + POSITION_BACKOFF * prob) / (count + POSITION_BACKOFF)
    return (1 - POSITION_WEIGHT) * prob + POSITION_WEIGHT * counted


def _leave_one_out(demonstrations: Demonstrations, histogram: np.ndarray, table: np.ndarray | None) -> float:
    """Return the mean over demonstrations of the nats per cell when each is predicted from the others, <= 0."""
    groups: dict[Shape, list[int]] = {}
    for i, (_, output) in enumerate(demonstrations):
        groups.setdefault(output.shape, []).append(i)
    total = 0.0
    for members in groups.values():
        outputs = np.stack([demonstrations[i][1] for i in members])
        rows = np.array(members)[:, None, None]
        if table is None:
            prob = histogram[rows, outputs]
        else:
            prob = table[rows, np.stack([demonstrations[i][0] for i in members]), outputs]
        if len(members) > 1:
            agree = (outputs[:, None] == outputs[None]).sum(1) - 1
            prob = _with_positions(prob, agree, len(members) - 1)
        total += float(np.log((1 - FLOOR) * prob + FLOOR / NUM_COLORS).mean((1, 2)).sum())
    return total / len(demonstrations)


def _candidates(
    log_prob: np.ndarray, test_input: Grid, histogram: np.ndarray, name: str
) -> list[tuple[Grid, float, str]]:
    """Return at least two different grids, weighted by their geometric mean probability per cell."""
    shape = log_prob.shape[:2]
    best = log_prob.argmax(-1)
    order = np.argpartition(log_prob, NUM_COLORS - 2, axis=-1)  # the last is the largest, the one before the second
    top = np.take_along_axis(log_prob, order[..., -2:], -1)
    margin = top[..., 1] - top[..., 0]
    second = np.where(order[..., -1] == best, order[..., -2], order[..., -1])
    # the runner-up changes the cells that are least sure, all at once where the colour map ties them
    changed = margin <= margin.min() + 1e-9
    proposals = [(best, name), (np.where(changed, second, best), "runner-up")]
    if test_input.shape == shape:
        proposals.append((test_input, "copy input"))
    proposals.append((np.full(shape, histogram.argmax()), "most common colour"))
    found: dict[bytes, tuple[Grid, float, str]] = {}
    for grid, label in proposals:
        grid = grid.astype(np.uint8)
        key = grid.tobytes()
        if key in found:
            if found[key][2] == "runner-up":
                found[key] = (*found[key][:2], label)
            continue
        score = math.exp(float(np.take_along_axis(log_prob, grid[..., None].astype(np.intp), -1).mean()))
        found[key] = (grid, score, label)
    total = sum(score for _, score, _ in found.values())
    ranked = sorted(found.values(), key=lambda item: -item[1])  # stable: proposals keep their order in ties
    return [(grid, score / total, label) for grid, score, label in ranked]


# 2. Size ------------------------------------------------------------------------------------------------------------


def size_rule(demonstrations: Demonstrations, test_input: Grid) -> tuple[str, Shape | None]:
    """Return the first rule that all demonstrations obey and the size it gives: ("none", None) if there is none.

    Rules in order: "same" as the input, constant "ratio" per axis (integer or fraction, giving whole sides up to 30),
    "constant" output size.
    """
    for name, shape in _rule_sizes(demonstrations, test_input):
        return name, shape
    return "none", None


def _rule_sizes(demonstrations: Demonstrations, test_input: Grid) -> list[tuple[str, Shape]]:
    """Return (rule, size) of every rule that applies, in the cascade's order."""
    if not demonstrations:
        return []
    found: list[tuple[str, Shape]] = []
    height, width = test_input.shape
    if all(a.shape == b.shape for a, b in demonstrations):
        found.append(("same", (height, width)))
    else:
        ratios = {(Fraction(b.shape[0], a.shape[0]), Fraction(b.shape[1], a.shape[1])) for a, b in demonstrations}
        if len(ratios) == 1:
            rows, columns = next(iter(ratios))
            rows, columns = rows * height, columns * width
            if rows.denominator == columns.denominator == 1 and max(rows, columns) <= MAX_SIDE:
                found.append(("ratio", (int(rows), int(columns))))
    if len({b.shape for _, b in demonstrations}) == 1:
        found.append(("constant", demonstrations[0][1].shape))
    return found


def size_prior(demonstrations: Demonstrations, test_input: Grid) -> list[tuple[Shape, float]]:
    """Return ((h, w), probability) best first, different sizes, probabilities sum to 1.

    The first applicable rule gets RULE_WEIGHT; the rest is shared by the other rules, the demonstrations' output sizes
    by frequency, and the input's own size. Without a rule the most frequent of those gets GUESS_WEIGHT.
    """
    rules = [shape for _, shape in _rule_sizes(demonstrations, test_input)]
    votes: Counter[Shape] = Counter()
    for _, output in demonstrations:
        votes[output.shape] += 1
    if not rules:  # a repeated output size beats the input's size, which beats sizes seen once
        repeated = votes and max(votes.values()) > 1
        votes[test_input.shape] += 0.5 if repeated else 1.5
    else:
        votes[test_input.shape] += 0.5
    for shape in rules[1:]:
        votes[shape] += 2.0
    winner = rules[0] if rules else max(votes, key=votes.__getitem__)  # ties: the first seen
    del votes[winner]
    if not votes:
        return [(winner, 1.0)]
    weight, total = (RULE_WEIGHT if rules else GUESS_WEIGHT), sum(votes.values())
    rest = [(shape, (1 - weight) * vote / total) for shape, vote in votes.items()]
    return [(winner, weight), *sorted(rest, key=lambda item: -item[1])]


def _side_marginals(sizes: Sequence[tuple[Shape, float]]) -> np.ndarray:
    """Return log-probabilities [2, 30] of the number of rows and of columns, 1..30, floored at SIZE_FLOOR."""
    marginals = np.zeros((2, MAX_SIDE))
    for (height, width), probability in sizes:
        marginals[0, height - 1] += probability
        marginals[1, width - 1] += probability
    return np.log((1 - MAX_SIDE * SIZE_FLOOR) * marginals + SIZE_FLOOR).astype(np.float32)


# 3. Numbers that describe a task ------------------------------------------------------------------------------------


def canonical_colors(demonstrations: Demonstrations, test_input: Grid) -> np.ndarray:
    """Return canonical int64 [10]: the rank of each colour by its count in all visible grids, 0 the most frequent.

    Ties go to the lower colour.
    """
    counts = _counts(test_input) + sum(_counts(grid) for pair in demonstrations for grid in pair)
    canonical = np.empty(NUM_COLORS, np.int64)
    canonical[np.argsort(-counts, kind="stable")] = np.arange(NUM_COLORS)
    return canonical


def color_map(demonstrations: Demonstrations, canonical: np.ndarray) -> np.ndarray:
    """Return p(c_out | c_in) float32 [10, 10] in canonical colours, counted on same-size demonstrations.

    Rows of colours that no such demonstration holds are uniform.
    """
    counts = np.zeros((NUM_COLORS, NUM_COLORS))
    for a, b in demonstrations:
        if a.shape == b.shape:
            code = canonical[a] * NUM_COLORS + canonical[b]
            counts += np.bincount(code.ravel(), minlength=NUM_COLORS**2).reshape(NUM_COLORS, NUM_COLORS)
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), 1 / NUM_COLORS).astype(np.float32)


def context_features(demonstrations: Demonstrations, test_input: Grid) -> np.ndarray:
    """Return float32 [NUM_FEATURES] in [-1, 1], invariant under dihedral transforms and colour renaming.

    Sizes and ratios (0-15), colours (16-23), what is kept (24-27), symmetries (28-31); see the helpers.
    """
    values = [
        *_size_features(demonstrations, test_input),
        *_color_features(demonstrations, test_input),
        *_change_features(demonstrations),
        *_symmetry_features(demonstrations, test_input),
    ]
    assert len(values) == NUM_FEATURES, len(values)
    return np.clip(np.array(values, np.float64), -1, 1).astype(np.float32)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else 0.0


def _spread(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))


def _size_features(demonstrations: Demonstrations, test_input: Grid) -> list[float]:
    shapes = [(a.shape, b.shape) for a, b in demonstrations]
    rule, shape = size_rule(demonstrations, test_input)
    logs = [(math.log(b[0] / a[0]), math.log(b[1] / a[1])) for a, b in shapes]
    area = [(r + c) / (2 * math.log(MAX_SIDE)) for r, c in logs]
    cells, side = float(MAX_SIDE**2), math.log(MAX_SIDE)
    return [
        min(len(demonstrations), 10) / 10,
        _mean([a == b for a, b in shapes]),
        float(rule == "same"),
        float(rule == "ratio"),
        float(rule == "constant"),
        _mean(area),
        _spread(area),
        _mean([max(pair) for pair in logs]) / side,
        _mean([min(pair) for pair in logs]) / side,
        _mean([a == b[::-1] for a, b in shapes]),
        _mean([a[0] * a[1] for a, _ in shapes]) / cells,
        _mean([b[0] * b[1] for _, b in shapes]) / cells,
        test_input.size / cells,
        (shape[0] * shape[1] / cells) if shape else 0.0,
        abs(math.log(test_input.shape[0] / test_input.shape[1])) / side,
        _mean([b[0] == b[1] for _, b in shapes]),
    ]


def _color_features(demonstrations: Demonstrations, test_input: Grid) -> list[float]:
    pairs = [(_counts(a), _counts(b)) for a, b in demonstrations]
    test = _counts(test_input) > 0
    sets = [(a > 0, b > 0) for a, b in pairs]
    new = [b & ~a for a, b in sets]
    union = np.any(new, axis=0) if new else np.zeros(NUM_COLORS, bool)
    common = np.all(new, axis=0) if new else union
    return [
        _mean([float(a.sum()) for a, _ in sets]) / NUM_COLORS,
        _mean([float(b.sum()) for _, b in sets]) / NUM_COLORS,
        float(test.sum()) / NUM_COLORS,
        _mean([float(n.any()) for n in new]),
        float(common.sum()) / max(1.0, float(union.sum())),
        _mean([float((a & test).sum() / (a | test).sum()) for a, _ in sets]),
        _mean([float(a.max() / a.sum()) for a, _ in pairs]),
        _mean([float(b.max() / b.sum()) for _, b in pairs]),
    ]


def _change_features(demonstrations: Demonstrations) -> list[float]:
    """Return copy rate and its spread, share of changed cells that were the most common colour, determinism."""
    kept, ground, counts = [], [], np.zeros((NUM_COLORS, NUM_COLORS))
    for a, b in demonstrations:
        if a.shape != b.shape:
            continue
        own = np.bincount((a.astype(np.int64) * 10 + b).ravel(), minlength=100).reshape(NUM_COLORS, NUM_COLORS)
        stays, rows = np.diag(own), own.sum(1)
        kept.append(float(stays.sum() / a.size))
        leaves = a.size - stays.sum()
        largest = rows == rows.max()  # several colours in a tie, so that renaming changes nothing
        ground.append(float((rows - stays)[largest].mean() / leaves) if leaves else 0.0)
        counts += own
    determinism = float(counts.max(1).sum() / counts.sum()) if kept else 0.0
    return [_mean(kept), 2 * _spread(kept), _mean(ground), determinism]


def _symmetry_features(demonstrations: Demonstrations, test_input: Grid) -> list[float]:
    """Return rates of mirror symmetry (any axis) of inputs, outputs and test input, and of outputs' half-turns."""
    return [
        _mean([_is_mirrored(a) for a, _ in demonstrations]),
        _mean([_is_mirrored(b) for _, b in demonstrations]),
        float(_is_mirrored(test_input)),
        _mean([bool((b == b[::-1, ::-1]).all()) for _, b in demonstrations]),
    ]


def _is_mirrored(grid: Grid) -> bool:
    if (grid == grid[::-1]).all() or (grid == grid[:, ::-1]).all():
        return True
    return grid.shape[0] == grid.shape[1] and bool((grid == grid.T).all() or (grid == grid[::-1, ::-1].T).all())


# 4. Cache and batches -----------------------------------------------------------------------------------------------


class PriorCache:
    """Preferences, sizes and features of contexts, computed once in the unaugmented frame and transformed on demand.

    A context is known by its key (task id, pair id), so one cache serves one data set. The least recently used entries
    go first once there are more than `max_entries`.
    """

    def __init__(self, max_entries: int = 16384):
        self.max_entries = max_entries
        self._entries: OrderedDict[tuple, Any] = OrderedDict()

    def _get(self, key: tuple, compute: Callable[[], Any]) -> Any:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        value = self._entries[key] = compute()
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
        return value

    def _preference(self, context: Context, shape: Shape) -> Preference:
        """Return the unaugmented preference for the augmented `shape`."""
        plain = context.augmentation.apply_shape((int(shape[0]), int(shape[1])))
        return self._get(
            ("cells", context.key, plain), lambda: demo_prior(context.demonstrations, context.input, plain)
        )

    def preference(self, context: Context, shape: Shape) -> Preference:
        """Return the preference in the frame of the context's augmentation; `shape` is in that frame too."""
        plain, view = self._preference(context, shape), context.augmentation
        if view.is_identity:
            return plain
        candidates = [(view.apply(grid), weight, name) for grid, weight, name in plain.candidates]
        return Preference(np.ascontiguousarray(view.apply_scores(plain.log_prob)), plain.confidence, candidates)

    def sizes(self, context: Context) -> list[tuple[Shape, float]]:
        """Return size_prior in the frame of the context's augmentation."""
        plain = self._get(("sizes", context.key), lambda: size_prior(context.demonstrations, context.input))
        return [(context.augmentation.apply_shape(shape), probability) for shape, probability in plain]

    def features_of(self, context: Context) -> np.ndarray:
        """Return context_features, float32 [NUM_FEATURES], the same under every augmentation."""
        return self._get(("features", context.key), lambda: context_features(context.demonstrations, context.input))

    def features(self, source: Query | Context) -> Tensor | np.ndarray:
        """Return features float32 [B, NUM_FEATURES] of a query, or the numpy [NUM_FEATURES] of one context."""
        if isinstance(source, Context):
            return self.features_of(source)
        rows = np.stack([self.features_of(context) for context in source.contexts])
        return torch.from_numpy(rows).to(source.input.device)

    def preferences(self, query: Query, sizes: Tensor | Sequence[Shape], side: int) -> Tensor:
        """Return log-probabilities float32 [B, side, side, 10]; uniform outside each size.

        `sizes` are (h, w) in the augmented frame, at most `side`; a tensor on a GPU is copied, so prefer lists there.
        """
        shapes = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
        batch = np.full((len(query), side, side, NUM_COLORS), -math.log(NUM_COLORS), np.float32)
        for canvas, context, shape in zip(batch, query.contexts, shapes, strict=True):
            plain = self._preference(context, shape)
            canvas[: int(shape[0]), : int(shape[1])] = context.augmentation.apply_scores(plain.log_prob)
        return torch.from_numpy(batch).to(query.input.device)

    def size_log_prob(self, query: Query) -> Tensor:
        """Return log-probabilities float32 [B, 2, 30] of the numbers of rows and of columns, 1..30."""
        rows = []
        for context in query.contexts:
            marginals = self._get(
                ("sides", context.key),
                lambda context=context: _side_marginals(size_prior(context.demonstrations, context.input)),
            )
            rows.append(marginals[::-1] if context.augmentation.transposes else marginals)
        return torch.from_numpy(np.stack(rows)).to(query.input.device)

    def canonical(self, query: Query) -> Tensor:
        """Return canonical colours [B, 10] int64: the frequency rank of each (augmented) colour."""
        rows = np.empty((len(query), NUM_COLORS), np.int64)
        for row, context in zip(rows, query.contexts, strict=True):
            row[list(context.augmentation.colors)] = self._canonical(context)
        return torch.from_numpy(rows).to(query.input.device)

    def color_maps(self, query: Query) -> Tensor:
        """Return color_map in canonical colours, float32 [B, 10, 10] on the host; the same under every augmentation."""
        maps = [
            self._get(("map", c.key), lambda c=c: color_map(c.demonstrations, self._canonical(c)))
            for c in query.contexts
        ]
        return torch.from_numpy(np.stack(maps))

    def size_rules(self, query: Query) -> list[str]:
        """Return the name of each context's size rule."""
        return [self._get(("rule", c.key), lambda c=c: size_rule(c.demonstrations, c.input)[0]) for c in query.contexts]

    def _canonical(self, context: Context) -> np.ndarray:
        return self._get(("ranks", context.key), lambda: canonical_colors(context.demonstrations, context.input))
