"""Numbers that describe a task, from its demonstrations and test input: features, colour ranks, colour map.

Imports numpy and size_hypotheses; used by prior_cache for the prompt, the size head and the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grid_hypotheses import NUM_COLORS, Grid
from size_hypotheses import MAX_SIDE, size_rule

Demonstrations = Sequence[tuple[Grid, Grid]]

NUM_FEATURES = 32


def _counts(grid: Grid) -> np.ndarray:
    return np.bincount(grid.ravel(), minlength=NUM_COLORS)


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
