"""Tasks told in another way: colours by their role, all pairs in one direction, a part of each input in its place.

A hypothesis that is too simple for a task may do for the task rewritten: that a shape takes the most frequent colour,
whatever that is, is a constant once colours are ranked. Imports numpy and grid_hypotheses; used by demo_prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from grid_hypotheses import NUM_COLORS, VIEWS, Grid, Layer, Scene, Shape

Demonstrations = Sequence[tuple[Grid, Grid]]
IDENTITY = np.arange(NUM_COLORS)
TURNED_PRIOR = -1.0  # log weight of what a turned task says


class Rewrite(NamedTuple):
    """A rewritten task, at the shape of its rewritten answer.

    Colour c of the answer is colour colors[c] of the rewritten one, and its cell k the latter's cell cells[k].
    """

    name: str
    demonstrations: Demonstrations
    test_input: Grid
    shape: Shape
    colors: np.ndarray = IDENTITY
    cells: np.ndarray | slice = slice(None)
    log_prior: float = 0.0

    def restore(self, prob: np.ndarray) -> np.ndarray:
        """Return probabilities [n, 10] of the rewritten answer's cells as those of the answer's."""
        return prob[self.cells][:, self.colors]

    def then(self, other: Rewrite) -> Rewrite:
        """Return this rewriting followed by another one of what it gives."""
        cells = other.cells if isinstance(self.cells, slice) else _picked(other.cells, self.cells)
        name, log_prior = f"{self.name}, {other.name}", self.log_prior + other.log_prior
        return other._replace(name=name, colors=other.colors[self.colors], cells=cells, log_prior=log_prior)


def _picked(cells: np.ndarray | slice, places: np.ndarray) -> np.ndarray:
    return places if isinstance(cells, slice) else cells[places]


# 1. Colours by role ---------------------------------------------------------------------------------------------------


def ranked_colors(demonstrations: Demonstrations, test_input: Grid, shape: Shape) -> Iterator[Rewrite]:
    """Yield the task with the colours that vary between inputs renamed, in each pair, by their frequency in its input.

    Colours that all inputs hold, or none, keep their names. Nothing is yielded where that changes nothing.
    """
    inputs = [*(a for a, _ in demonstrations), test_input]
    counts = np.stack([np.bincount(grid.ravel(), minlength=NUM_COLORS) for grid in inputs])
    slots = np.flatnonzero((counts > 0).any(0) & ~(counts > 0).all(0))
    if len(slots) < 2:
        return
    renamed = np.stack([_ranked(grid, row, slots) for grid, row in zip(inputs, counts, strict=True)])
    if (renamed == renamed[0]).all():
        return
    pairs = [(names[a], names[b]) for names, (a, b) in zip(renamed, demonstrations, strict=False)]
    yield Rewrite("colours by frequency", pairs, renamed[-1][test_input], shape, colors=renamed[-1])


def _ranked(grid: Grid, counts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return new names [10] of the colours: those in `slots` by frequency, ties in reading order, absent ones last."""
    names = IDENTITY.copy()
    present = [color for color in dict.fromkeys(grid.ravel().tolist()) if color in slots]
    ordered = sorted(present, key=lambda color: -counts[color])
    names[[*ordered, *(color for color in slots.tolist() if not counts[color])]] = slots
    return names.astype(np.uint8)


# 2. One direction -----------------------------------------------------------------------------------------------------


def turned_alike(demonstrations: Demonstrations, test_input: Grid, shape: Shape, toward: str) -> Iterator[Rewrite]:
    """Yield the task with each pair turned or mirrored so that one sort of cells of its input lies at the upper left.

    `toward`: "foreground" or "rarest colour". Nothing is yielded where all pairs are turned in the same way.
    """
    turns = [_turn(Scene(grid), toward) for grid in (*(a for a, _ in demonstrations), test_input)]
    if len(set(turns)) < 2:
        return
    pairs = [(_turned(a, turn), _turned(b, turn)) for turn, (a, b) in zip(turns, demonstrations, strict=False)]
    places = VIEWS[turns[-1]](np.arange(shape[0] * shape[1]).reshape(shape))
    yield Rewrite(f"turned by the {toward}", pairs, _turned(test_input, turns[-1]), places.shape,
                  cells=np.argsort(places.ravel()), log_prior=TURNED_PRIOR)  # fmt: skip


def _turned(grid: Grid, turn: int) -> Grid:
    return np.ascontiguousarray(VIEWS[turn](grid))


def _turn(scene: Scene, toward: str) -> int:
    """Return the first of the eight views in which the cells' centre is highest, then farthest to the left."""
    mask = scene.foreground
    if toward == "rarest colour":
        mask = scene.grid == min(scene.reading_order, key=lambda color: scene.counts[color])
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0
    down, right = ((2 * x.mean() + 1) / side - 1 for x, side in zip((rows, columns), scene.shape, strict=True))
    centers = ((down, right), (down, -right), (-down, right), (-down, -right),
               (right, down), (-right, down), (right, -down), (-right, -down))  # fmt: skip
    return min(range(8), key=lambda turn: (round(centers[turn][0], 9), round(centers[turn][1], 9), turn))


# 3. Another input -----------------------------------------------------------------------------------------------------

# families whose results may take the input's place
REPLACING = {"foreground", "distinct", "mirror", "gravity", "largest", "specks", "unify"}
REPLACED_PRIOR = -0.3


def replaced_inputs(
    demonstrations: Demonstrations, test_input: Grid, shape: Shape, layers: Sequence[Layer]
) -> Iterator[Rewrite]:
    """Yield the task with what one of the layers makes of each input in its place; of equal ones, the first."""
    inputs = [*(a for a, _ in demonstrations), test_input]
    scenes = [Scene(grid) for grid in inputs]
    seen = {_bytes(inputs)}
    changes = [(layer.name, layer.on_scene) for layer in layers if layer.family in REPLACING and layer.on_scene]
    for name, change in (*changes, *_PARTS):
        replaced = _on_all(change, scenes)
        if replaced is None or _bytes(replaced) in seen:
            continue
        seen.add(_bytes(replaced))
        pairs = [(grid, b) for grid, (_, b) in zip(replaced, demonstrations, strict=False)]
        yield Rewrite(name, pairs, replaced[-1], shape, log_prior=REPLACED_PRIOR)


def _on_all(change: Callable[[Scene], Grid | None], scenes: list[Scene]) -> list[Grid] | None:
    """Return what a change makes of all scenes, None if it makes no grid of colours of one of them."""
    grids = []
    for scene in reversed(scenes):
        grid = change(scene)
        if grid is None or not grid.size or grid.max() >= NUM_COLORS:
            return None
        grids.append(np.ascontiguousarray(grid, np.uint8))
    return grids[::-1]


def _bytes(grids: Sequence[Grid]) -> bytes:
    return b"".join(bytes(grid.shape) + grid.astype(np.uint8).tobytes() for grid in grids)


def _panel(scene: Scene, index: int) -> Grid | None:
    """Return one of the panels between separators."""
    panels = scene.separators and scene.separators[0].grids
    return panels[index] if panels is not None and index < len(panels) else None


def _half(scene: Scene, axis: int, second: bool) -> Grid | None:
    """Return the first or second half of the rows (axis 0) or columns (1)."""
    length = scene.shape[axis]
    return None if length % 2 else np.split(scene.grid, 2, axis)[second]


_PARTS: tuple[tuple[str, Callable[[Scene], Grid | None]], ...] = (
    *((f"panel {k + 1}", partial(_panel, index=k)) for k in range(4)),
    ("upper half", partial(_half, axis=0, second=False)),
    ("lower half", partial(_half, axis=0, second=True)),
    ("left half", partial(_half, axis=1, second=False)),
    ("right half", partial(_half, axis=1, second=True)),
)
