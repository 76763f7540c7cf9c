"""What answers of one task have in common: traits of grids and of (input, output) pairs, and whether a candidate fits.

A trait is a number: how many colours, objects, holes; symmetric or not; which colours changed, and so on. Where the
demonstrations agree on it, an answer that has another value breaks a rule of the task. Which rules matter is learned
(`CandidateJudge` in arc_system). Imports numpy and grid_hypotheses; used by demo_prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from grid_hypotheses import NUM_COLORS, Grid, label

FAR = 3.0  # distances beyond it are all alike
ENOUGH = 4  # demonstrations that agree; fewer weigh less

Traits = dict[str, float]


# 1. Traits of one grid ------------------------------------------------------------------------------------------------


def grid_traits(grid: Grid) -> Traits:
    """Return the traits of a grid; black is the background, or the most common colour where there is no black."""
    counts = np.bincount(grid.ravel(), minlength=NUM_COLORS)
    common = int(counts.argmax())
    background = 0 if counts[0] else common
    ink = grid != background
    colors = [color for color in range(NUM_COLORS) if counts[color] and color != background]
    amounts = sorted(int(counts[color]) for color in colors) or [0]
    ranked = sorted(colors, key=lambda color: -counts[color]) or [-1]
    traits: Traits = {
        "colors": int((counts > 0).sum()), "color set": _as_bits(np.flatnonzero(counts)), "common": common,
        "ink": int(ink.sum()), "ink share": round(float(ink.mean()), 3), "ink colors": len(colors),
        "even": amounts[0] == amounts[-1], "most": amounts[-1], "least": amounts[0],
        "first color": ranked[0], "last color": ranked[-1],
    }  # fmt: skip
    traits |= {f"cells {color}": int(counts[color]) for color in range(NUM_COLORS)}
    traits |= {f"has {color}": counts[color] > 0 for color in range(NUM_COLORS)}
    for name, diagonal, one_color in (("parts", False, True), ("objects", True, True), ("things", True, False)):
        traits |= _object_traits(name, *label(grid, ink, diagonal, one_color))
    gaps, count = label(grid, ~ink, False, True)
    open_gaps = np.unique(np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]))
    traits |= {"gaps": count, "holes": count - int((open_gaps > 0).sum())}
    return traits | _line_traits(grid, ink) | _shape_traits(grid, ink)


def _object_traits(name: str, labels: np.ndarray, count: int) -> Traits:
    """Return the traits of connected components numbered from 1: how many, how large, which boxes."""
    rows, cols = np.nonzero(labels)
    index = labels[rows, cols] - 1
    sizes = np.bincount(index, minlength=count)
    edges = np.full((2, 2, max(count, 1)), [[[99]], [[-1]]])  # (least, most) of (row, column)
    for axis, place in enumerate((rows, cols)):
        np.minimum.at(edges[0, axis], index, place)
        np.maximum.at(edges[1, axis], index, place)
    height, width = (edges[1] - edges[0] + 1)[:, :count]
    boxes = np.unique(height * 100 + width)
    return {
        name: count,
        f"{name}: largest": int(sizes.max(initial=0)),
        f"{name}: smallest": int(sizes.min()) if count else 0,
        f"{name}: of one size": len(np.unique(sizes)) <= 1,
        f"{name}: are boxes": bool((height * width == sizes).all()),
        f"{name}: kinds of boxes": len(boxes),
        f"{name}: of one box": len(boxes) <= 1,
        f"{name}: largest box": int((height * width).max(initial=0)),
    }


def _line_traits(grid: Grid, ink: np.ndarray) -> Traits:
    """Return the traits of rows and columns: of one colour, repeated, periodic, with how many edges between cells."""
    traits: Traits = {}
    for name, lines, inked in (("rows", grid, ink), ("columns", grid.T, ink.T)):
        plain = (lines == lines[:, :1]).all(1)
        traits |= {
            f"{name}: plain": int(plain.sum()),
            f"{name}: all plain": plain.all(),
            f"{name}: plain ink": int((plain & inked[:, 0]).sum()),
            f"{name}: different": len({line.tobytes() for line in np.ascontiguousarray(lines)}),
            f"{name}: with ink": int(inked.any(1).sum()),
            f"{name}: period": next((p for p in range(1, len(lines)) if (lines[p:] == lines[:-p]).all()), 0),
            f"{name}: edges": int((lines[1:] != lines[:-1]).sum()),
        }
    return traits


def _shape_traits(grid: Grid, ink: np.ndarray) -> Traits:
    """Return symmetries, what lies on the border, lone cells, and the box of all ink."""
    border = np.concatenate([grid[0], grid[-1], grid[:, 0], grid[:, -1]])
    border_ink = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    around = np.pad(grid.astype(int), 1, constant_values=-1)
    lone = np.ones(grid.shape, bool)
    for side in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
        lone &= side != grid
    rows, cols = np.nonzero(ink)
    box = (int(np.ptp(rows)) + 1, int(np.ptp(cols)) + 1) if len(rows) else (0, 0)
    corner = grid[1:, 1:]
    square = (corner == grid[:-1, 1:]) & (corner == grid[1:, :-1]) & (corner == grid[:-1, :-1]) & ink[1:, 1:]
    return {
        "left-right": np.array_equal(grid, grid[:, ::-1]), "up-down": np.array_equal(grid, grid[::-1]),
        "transposed": np.array_equal(grid, grid.T), "half turn": np.array_equal(grid, grid[::-1, ::-1]),
        "border plain": bool((border == border[0]).all()), "border ink": int(border_ink.sum()),
        "border inked": border_ink.any(), "lone": int(lone.sum()), "lone ink": int((lone & ink).sum()),
        "lone gaps": int((lone & ~ink).sum()), "any lone": lone.any(), "box height": box[0], "box width": box[1],
        "box full": len(rows) > 0 and box[0] * box[1] == len(rows), "squares": square.any(),
    }  # fmt: skip


@lru_cache(maxsize=4096)
def _known_traits(data: bytes, height: int, width: int) -> np.ndarray:
    traits = grid_traits(np.frombuffer(data, np.uint8).reshape(height, width))
    return np.array(list(traits.values()), np.float64)


def _values(grid: Grid) -> np.ndarray:
    """Return the values of `grid_traits`; the candidates of one pair after another share grids."""
    return _known_traits(np.ascontiguousarray(grid, np.uint8).tobytes(), *grid.shape)


# 2. Traits of a pair --------------------------------------------------------------------------------------------------


def pair_traits(before: Grid, after: Grid) -> Traits:
    """Return the traits of an input and an output: which colours come, go and keep their number, what changed."""
    old, new = (np.bincount(grid.ravel(), minlength=NUM_COLORS) for grid in (before, after))
    come, gone = np.flatnonzero((new > 0) & (old == 0)), np.flatnonzero((old > 0) & (new == 0))
    ranks = {int(color): rank for rank, color in enumerate(np.argsort(-old, kind="stable")) if old[color]}
    by_count = [int(color) for color in np.argsort(-new, kind="stable") if new[color]]
    traits: Traits = {
        "come": _as_bits(come), "gone": _as_bits(gone), "number come": len(come), "number gone": len(gone),
        "any come": len(come) > 0, "same counts": (old == new).all(),
        "same counts in any colors": (np.sort(old) == np.sort(new)).all(),
        "same ink counts": (np.sort(old[1:]) == np.sort(new[1:])).all(),
        "keeps what it has": (new[1:] == old[1:])[new[1:] > 0].all(), "common kept": old.argmax() == new.argmax(),
        "rank of the first": ranks.get(by_count[0], -1),
        "rank of the second": ranks.get(by_count[1], -1) if len(by_count) > 1 else -2,
    }  # fmt: skip
    traits |= {f"keeps the number of {color}": old[color] == new[color] for color in range(NUM_COLORS)}
    return traits | _change_traits(before, after)


CHANGES = (
    "changed", "nothing changed", "changed from", "changed to", "kinds from", "kinds to", "kinds of change", "which",
    "colors changed entirely", "colors changed partly", "changes", "changes of one size", "smallest change",
    "largest change", "rows changed", "columns changed", "border changed", "ink kept", "ink covered", "gaps kept",
    "ambiguous",
)  # fmt: skip


def _change_traits(before: Grid, after: Grid) -> Traits:
    """Return the traits of the cells that changed; all 0 where the shapes differ."""
    if before.shape != after.shape:
        return dict.fromkeys(CHANGES, 0)
    changed = before != after
    kinds = np.unique(before[changed].astype(int) * NUM_COLORS + after[changed])
    sources, targets = np.unique(kinds // NUM_COLORS), np.unique(kinds % NUM_COLORS)
    entirely = sum(bool(changed[before == color].all()) for color in sources)
    labels, count = label(changed.astype(np.uint8), changed, True, True)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    border = np.concatenate([changed[0], changed[-1], changed[:, 0], changed[:, -1]])
    ink, gap = before != 0, before == 0
    values = (
        int(changed.sum()), not changed.any(), _as_bits(sources), _as_bits(targets), len(sources), len(targets),
        len(kinds), _as_bits(kinds) % 100_003, entirely, len(sources) - entirely, count, len(np.unique(sizes)) <= 1,
        int(sizes.min()) if count else 0, int(sizes.max(initial=0)), int(changed.any(1).sum()),
        int(changed.any(0).sum()), border.any(), not changed[ink].any(), (after[ink] != 0).all(),
        not changed[gap].any(), len(sources) < len(kinds),
    )  # fmt: skip
    return dict(zip(CHANGES, values, strict=True))


def _as_bits(numbers: np.ndarray) -> int:
    return sum(1 << int(number) for number in numbers)


# 3. Whether a candidate fits ------------------------------------------------------------------------------------------

_EXAMPLE = np.zeros((2, 2), np.uint8)
RULES = (
    *grid_traits(_EXAMPLE),
    *(f"more {name}" for name in grid_traits(_EXAMPLE)),
    *pair_traits(_EXAMPLE, _EXAMPLE),
)
NUM_MISFITS = 3 * len(RULES)


def _rule_values(before: Grid, after: Grid) -> np.ndarray:
    """Return the value of each of RULES for a pair."""
    mine = _values(after)
    pair = np.array(list(pair_traits(before, after).values()), np.float64)
    return np.concatenate([mine, mine - _values(before), pair])


def misfits(
    demonstrations: Sequence[tuple[Grid, Grid]], test_input: Grid, candidates: Sequence[Grid]
) -> np.ndarray:
    """Return float16 [candidates, NUM_MISFITS]: how far each candidate is from what the demonstrations have in common.

    For each of RULES three numbers. Broken: all demonstrations agree and the candidate has another value (the more
    demonstrations, up to ENOUGH, the nearer to 1). Unseen: they differ, and it has none of their values. Distance to
    the nearest of their values in units of their spread, at most FAR. All are 0 without demonstrations.
    """
    found = np.zeros((len(candidates), 3, len(RULES)), np.float16)
    if demonstrations:
        known = np.stack([_rule_values(before, after) for before, after in demonstrations])
        agree = (known == known[0]).all(0)
        scale = 1 + known.std(0) + 0.1 * abs(known.mean(0))
        for k, candidate in enumerate(candidates):
            distance = abs(known - _rule_values(test_input, candidate)).min(0)
            other = distance > 0
            found[k] = (
                other & agree,
                other & ~agree,
                np.minimum(distance / scale, FAR),
            )
        found[:, 0] *= min(len(demonstrations), ENOUGH) / ENOUGH
    return found.reshape(len(candidates), NUM_MISFITS)
