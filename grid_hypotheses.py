"""Hypotheses about an output grid: named pure functions from one input grid and a wanted shape to a grid of symbols.

A symbol is a colour 0-9 or a mark 10-31, whose colour the demonstrations decide. Ties go to what comes first in reading
order, so renaming colours renames every result. Imports numpy only; used by demo_prior, which weighs the hypotheses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import NamedTuple

import numpy as np

Grid = np.ndarray
Shape = tuple[int, int]
Box = tuple[slice, slice]

NUM_COLORS = 10
NUM_SYMBOLS = 32
MARK = 10  # the first mark
NO_HIT = NUM_SYMBOLS - 1  # what a ray returns that meets nothing
MAX_OBJECTS = 40  # a grid with more is texture, not objects
MAX_PANELS = 16  # equal parts of a grid without separators

# The eight views of a square; rows may become columns in the last four
VIEWS: tuple[Callable[[Grid], Grid], ...] = (
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x.T,
    lambda x: x.T[::-1],
    lambda x: x.T[:, ::-1],
    lambda x: x[::-1, ::-1].T,
)
LEFT, RIGHT, UP, DOWN = range(4)


# 1. Helpers on arrays -------------------------------------------------------------------------------------------------


def view(x: Grid, direction: int) -> Grid:
    """Return the grid turned so that `direction` (LEFT, RIGHT, UP, DOWN) points to column 0."""
    return (x, x[:, ::-1], x.T, x[::-1].T)[direction]


def unview(x: Grid, direction: int) -> Grid:
    """Return the grid of which `x` is the view in `direction`."""
    return (x, x[:, ::-1], x.T, x.T[::-1])[direction]


def most_common(groups: np.ndarray, colors: np.ndarray, count: int) -> np.ndarray:
    """Return the most common colour of every group 0..count-1, -1 for empty groups.

    `groups` and `colors` run over cells in reading order; ties go to the colour seen first.
    """
    code = groups.ravel() * NUM_COLORS + colors.ravel()
    cells = np.bincount(code, minlength=count * NUM_COLORS).reshape(count, NUM_COLORS)
    first = np.full(count * NUM_COLORS, code.size)
    first[code[::-1]] = np.arange(code.size)[::-1]  # of repeated indices the last assignment stays
    best = (cells * (code.size + 1) - first.reshape(cells.shape)).argmax(1)
    return np.where(cells.any(1), best, -1)


def background_color(grid: Grid) -> int:
    """Return the most frequent colour, colour 0 counted with a fifth of the cells more; ties: 0, then the first."""
    counts = np.bincount(grid.ravel(), minlength=NUM_COLORS) + 0.0
    counts[0] += 0.2 * grid.size
    best = np.flatnonzero(counts == counts.max())
    if len(best) == 1 or best[0] == 0:
        return int(best[0])
    return int(next(color for color in grid.flat if color in best))


def label(grid: Grid, mask: np.ndarray, diagonal: bool, one_color: bool) -> tuple[np.ndarray, int]:
    """Return component numbers [H, W], from 1 in reading order of their first cells, 0 outside the mask; their count.

    Cells are 8-connected if `diagonal`, else 4-connected; with `one_color` different colours stay apart.
    """
    cells = np.where(mask, grid if one_color else 0, np.int64(-1))
    index = np.arange(grid.size).reshape(grid.shape)
    links = [_links(cells, index, pair) for pair in (_NEIGHBORS if diagonal else _NEIGHBORS[:2])]
    a, b = (np.concatenate(ends) for ends in zip(*links, strict=True))
    parent = index.ravel()
    while True:  # roots of linked cells move to the lower one, then all cells to the root of their root
        roots = parent[a], parent[b]
        lower, moved = np.minimum(*roots), parent.copy()
        np.minimum.at(moved, roots[0], lower)
        np.minimum.at(moved, roots[1], lower)
        moved = moved[moved]
        moved = moved[moved]
        if (moved == parent).all():
            break
        parent = moved
    is_first = (parent == index.ravel()) & mask.ravel()
    numbers = is_first.cumsum()
    return np.where(mask, numbers[parent].reshape(grid.shape), 0), int(numbers[-1])


_NEIGHBORS = (
    (np.s_[1:, :], np.s_[:-1, :]),
    (np.s_[:, 1:], np.s_[:, :-1]),
    (np.s_[1:, 1:], np.s_[:-1, :-1]),
    (np.s_[1:, :-1], np.s_[:-1, 1:]),
)


def _links(cells: Grid, index: np.ndarray, pair: tuple[Box, Box]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of neighbouring cells that are equal and not -1."""
    here, there = pair
    is_linked = (cells[here] == cells[there]) & (cells[here] >= 0)
    return index[here][is_linked], index[there][is_linked]


def neighbor_counts(mask: np.ndarray, diagonal: bool = True) -> np.ndarray:
    """Return how many of the 8 (4 without the diagonal ones) neighbours of each cell are set."""
    padded = np.pad(mask.astype(np.int64), 1)
    columns = padded[:, :-2] + padded[:, 2:]
    middle = padded[:, 1:-1]
    if not diagonal:
        return columns[1:-1] + middle[:-2] + middle[2:]
    rows = columns + middle
    return rows[:-2] + columns[1:-1] + rows[2:]


def bounding_box(mask: np.ndarray) -> Box | None:
    """Return the slices of the smallest rectangle that holds all set cells, None if there are none."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def rays(grid: Grid, background: int) -> tuple[Grid, ...]:
    """Return 8 grids: the colour of the first foreground cell to the left, right, up, down, then to the upper left,
    upper right, lower left, lower right; NO_HIT where there is none."""
    straight = [unview(_last_hit(view(grid, d).T, background).T, d) for d in range(4)]
    diagonal = [f(_last_diagonal_hit(f(grid), background)) for f in VIEWS[:4]]
    return (*straight, *diagonal)


def _last_hit(grid: Grid, background: int) -> Grid:
    """Return the colour of the nearest foreground cell above each cell, NO_HIT if there is none."""
    height, width = grid.shape
    row = np.zeros((height, width), np.int64)  # 1 + the row of the last hit so far
    row[1:] = np.where(grid[:-1] != background, np.arange(1, height)[:, None], 0)
    np.maximum.accumulate(row, 0, out=row)
    colors = np.concatenate([np.full((1, width), NO_HIT), grid])
    return colors[row, np.arange(width)]


def _last_diagonal_hit(grid: Grid, background: int) -> Grid:
    """Return the colour of the nearest foreground cell to the upper left of each cell, NO_HIT if there is none."""
    height, width = grid.shape
    # shifting row i by i columns turns one set of diagonals into columns
    padded = np.full((height, width + height), background)
    padded[:, :width] = grid[:, ::-1]
    sheared = padded.ravel()[: height * (width + height - 1)].reshape(height, -1)
    hits = np.full((height, width + height), NO_HIT)
    hits.ravel()[: sheared.size] = _last_hit(sheared, background).ravel()
    return hits[:, :width][:, ::-1]


def column_pairs(grid: Grid, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Return in how many rows two columns are both seen, and in how many they differ there, both [W, W].

    Cells of colour `hidden` are not seen.
    """
    seen = (grid != hidden).astype(np.float32)
    colors = [color for color in np.unique(grid).tolist() if color != hidden]
    shown = seen.T @ seen
    if not colors:
        return shown, shown
    cells = np.concatenate([grid == color for color in colors]).astype(np.float32)
    return shown, shown - cells.T @ cells


def inpaint(grid: Grid, hidden: int) -> Grid | None:
    """Return the grid with cells of colour `hidden` reflected about the best axes, None if neither axis fits.

    An axis fits if no two seen cells differ and at least 30% of the grid is compared; most cells compared is best.
    """
    current, found = grid, False
    for transposed in (False, True):
        oriented = current.T if transposed else current
        axis = _mirror_axis(*column_pairs(oriented, hidden), oriented.size)
        if axis is None:
            continue
        part = oriented[:, axis]
        filled = oriented.copy()
        filled[:, axis] = np.where(part == hidden, part[:, ::-1], part)
        current, found = (filled.T if transposed else filled), True
    return current if found else None


def _mirror_axis(shown: np.ndarray, unequal: np.ndarray, size: int) -> slice | None:
    """Return the columns about whose middle the grid is best mirrored."""
    n = len(shown)
    sums = np.arange(n)[:, None] + np.arange(n)  # columns j and k mirror each other about (j + k) / 2
    compared = np.bincount(sums.ravel(), shown.ravel(), 2 * n - 1)
    clashes = np.bincount(sums.ravel(), unequal.ravel(), 2 * n - 1)
    compared[(clashes > 0) | (compared < 0.3 * size)] = 0
    low, high = (n + 1) // 2, 2 * n - n // 2 - 1
    if low >= high or not compared[low:high].any():
        return None
    best = low + int(compared[low:high].argmax())
    return slice(max(0, best - n + 1), min(n, best + 1))


def periodic(grid: Grid, hidden: int, shape: Shape) -> Grid | None:
    """Return the seen cells repeated with the smallest row and column periods, at `shape`.

    None if there is no period or a cell of it is hidden everywhere.
    """
    rows, columns = _period(*column_pairs(grid.T, hidden)), _period(*column_pairs(grid, hidden))
    if (rows, columns) == grid.shape:
        return None
    tile = np.full((rows, columns), -1)
    i, j = np.nonzero(grid != hidden)
    tile[i % rows, j % columns] = grid[i, j]
    if (tile < 0).any():
        return None
    return tile[np.arange(shape[0])[:, None] % rows, np.arange(shape[1]) % columns]


def _period(shown: np.ndarray, unequal: np.ndarray) -> int:
    """Return the smallest shift at which no two columns clash, at most two thirds of their number, else the number."""
    n = len(shown)
    shift = np.abs(np.arange(n)[:, None] - np.arange(n))
    clashes = np.bincount(shift.ravel(), unequal.ravel(), n)
    fits = np.flatnonzero(clashes[1 : min(int(n / 1.5), n - 1) + 1] == 0)
    return int(fits[0]) + 1 if len(fits) else n


# 2. What the hypotheses share -----------------------------------------------------------------------------------------


class Panels(NamedTuple):
    """Equal sub-grids [n, h, w] in reading order and how many there are along rows and columns."""

    grids: np.ndarray
    layout: Shape


class ObjectSet:
    """The components of a scene's foreground: labels [H, W] (0 none), their count, and properties computed when asked.

    Property arrays have count + 1 entries, so that they are indexed by label; entry 0 is a filler.
    """

    def __init__(self, scene: Scene, one_color: bool):
        self.scene = scene
        self.labels, self.count = label(scene.grid, scene.foreground, True, one_color)

    @property
    def is_usable(self) -> bool:
        """Whether there are objects, and few enough to be objects."""
        return 0 < self.count <= MAX_OBJECTS

    def _filled(self, values: list) -> np.ndarray:
        return np.array([0, *values], np.int64)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Cells of each object."""
        sizes = np.bincount(self.labels.ravel(), minlength=self.count + 1)
        sizes[0] = 0
        return sizes

    @cached_property
    def boxes(self) -> list[Box]:
        """Bounding boxes of the objects 1..count."""
        height, width = self.scene.shape
        rows, columns = np.zeros((self.count + 1, height), bool), np.zeros((self.count + 1, width), bool)
        rows[self.labels, np.arange(height)[:, None]] = True
        columns[self.labels, np.arange(width)] = True
        top, bottom = rows.argmax(1).tolist(), (height - rows[:, ::-1].argmax(1)).tolist()
        left, right = columns.argmax(1).tolist(), (width - columns[:, ::-1].argmax(1)).tolist()
        return [(slice(top[k], bottom[k]), slice(left[k], right[k])) for k in range(1, self.count + 1)]

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """The objects' cells within their boxes."""
        return [self.labels[box] == k for k, box in enumerate(self.boxes, 1)]

    @cached_property
    def colors(self) -> np.ndarray:
        """The most common colour of each object; entry 0 is the background."""
        colors = most_common(self.labels, self.scene.grid, self.count + 1)
        colors[0] = self.scene.background
        return colors

    @cached_property
    def color_repeats(self) -> np.ndarray:
        """How many objects have each object's most common colour."""
        return self._filled(np.bincount(self.colors[1:], minlength=NUM_COLORS)[self.colors[1:]])

    @cached_property
    def shape_repeats(self) -> np.ndarray:
        """How many objects have each object's shape, colours aside."""
        keys = [(mask.shape, mask.tobytes()) for mask in self.masks]
        repeats = Counter(keys)
        return self._filled([repeats[key] for key in keys])

    @cached_property
    def mirrors(self) -> np.ndarray:
        """Bits: 1 if the shape is its own left-right mirror image, 2 if its top-bottom one."""
        return self._filled(
            [int((mask == mask[:, ::-1]).all()) + 2 * int((mask == mask[::-1]).all()) for mask in self.masks]
        )

    @cached_property
    def symmetry(self) -> np.ndarray:
        """How many of the two mirrors each shape has."""
        return self.mirrors % 2 + self.mirrors // 2

    @cached_property
    def is_rectangle(self) -> np.ndarray:
        """Whether each object fills its box."""
        return self._filled([mask.all() for mask in self.masks])

    @cached_property
    def heights(self) -> np.ndarray:
        """Rows that each object spans."""
        return self._filled([mask.shape[0] for mask in self.masks])

    @cached_property
    def is_at_border(self) -> np.ndarray:
        """Whether each object touches the border of the grid."""
        at_border = np.zeros(self.count + 1, np.int64)
        for edge in (self.labels[0], self.labels[-1], self.labels[:, 0], self.labels[:, -1]):
            at_border[edge] = 1
        return at_border

    @cached_property
    def holes(self) -> np.ndarray:
        """Enclosed background regions of each object; a region belongs to the object above its first cell."""
        labels, count = self.scene.enclosed_labels
        holes = np.zeros(self.count + 1, np.int64)
        first = np.zeros(count + 1, np.int64)
        first[labels.ravel()[::-1]] = np.arange(labels.size)[::-1]
        np.add.at(holes, self.labels.ravel()[first[1:] - labels.shape[1]], 1)
        return holes

    @cached_property
    def ranks(self) -> np.ndarray:
        """Rank of each object's size, 0 the largest; equal sizes have equal ranks."""
        return self._filled(np.unique(-self.sizes[1:], return_inverse=True)[1].tolist())

    def order(self, axis: int) -> np.ndarray:
        """Return 1, 2... for the objects from top to bottom (axis 0) or left to right (1) of their boxes."""
        starts = [box[axis].start for box in self.boxes]
        return self._filled(np.argsort(np.argsort(starts, kind="stable"), kind="stable") + 1)

    @cached_property
    def _box_colors(self) -> np.ndarray:
        """Cells of each colour in the boxes of the objects 1..count, [count, 10]."""
        cells = self.scene.grid[..., None] == np.arange(NUM_COLORS)
        sums = np.pad(cells.astype(np.int64), ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
        top, bottom = (np.array([getattr(box[0], end) for box in self.boxes]) for end in ("start", "stop"))
        left, right = (np.array([getattr(box[1], end) for box in self.boxes]) for end in ("start", "stop"))
        return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]

    @cached_property
    def num_box_colors(self) -> np.ndarray:
        """Different colours in each object's box."""
        return self._filled((self._box_colors > 0).sum(1))

    @cached_property
    def others_in_box(self) -> np.ndarray:
        """Cells in each object's box that do not have its most common colour."""
        own = np.take_along_axis(self._box_colors, self.colors[1:, None], 1)[:, 0]
        return self._filled(self._box_colors.sum(1) - own)


class Scene:
    """One grid and what several hypotheses need to know of it, each property computed when first asked."""

    def __init__(self, grid: Grid):
        self.grid = np.array(grid, np.int64)
        self.grid.flags.writeable = False  # results may be views of it
        self.shape: Shape = self.grid.shape
        self.background = background_color(self.grid)
        self.foreground = self.grid != self.background
        self._panels: dict[Shape, Panels | None] = {}

    @cached_property
    def counts(self) -> np.ndarray:
        """Cells of each colour, [10]."""
        return np.bincount(self.grid.ravel(), minlength=NUM_COLORS)

    @cached_property
    def colors(self) -> list[int]:
        """The colours present, ascending."""
        return np.flatnonzero(self.counts).tolist()

    @cached_property
    def reading_order(self) -> list[int]:
        """The colours present, in order of their first cells."""
        return list(dict.fromkeys(self.grid.ravel().tolist()))

    @cached_property
    def by_frequency(self) -> list[int]:
        """The foreground colours, most frequent first; ties in reading order."""
        return sorted(
            (color for color in self.reading_order if color != self.background), key=lambda color: -self.counts[color]
        )

    @cached_property
    def ground(self) -> np.ndarray:
        """The background cells."""
        return ~self.foreground

    @cached_property
    def enclosed_labels(self) -> tuple[np.ndarray, int]:
        """Numbers from 1 of the background regions that are not 4-connected to the border, 0 elsewhere; their count."""
        labels, count = label(self.grid, self.ground, False, False)
        is_closed = np.ones(count + 1, bool)
        is_closed[0] = False
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            is_closed[edge] = False
        numbers = np.where(is_closed, is_closed.cumsum(), 0)
        return numbers[labels], int(is_closed.sum())

    @cached_property
    def enclosed(self) -> np.ndarray:
        """The background cells that are not 4-connected to the border."""
        return self.enclosed_labels[0] > 0

    @cached_property
    def hole_sizes(self) -> np.ndarray:
        """Cells of the enclosed region that each cell lies in, 0 outside."""
        labels, count = self.enclosed_labels
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        sizes[0] = 0
        return sizes[labels]

    @cached_property
    def rays(self) -> tuple[Grid, ...]:
        """The function rays of the grid."""
        return rays(self.grid, self.background)

    @cached_property
    def links(self) -> tuple[np.ndarray, ...]:
        """Background cells between two equal colours: in the row, the column, the falling and the rising diagonal."""
        ends = ((0, 1), (2, 3), (4, 7), (5, 6))
        return tuple((self.rays[a] == self.rays[b]) & (self.rays[a] != NO_HIT) & self.ground for a, b in ends)

    @cached_property
    def objects(self) -> tuple[ObjectSet, ObjectSet]:
        """The 8-connected objects: of one colour, and of any colours."""
        return ObjectSet(self, True), ObjectSet(self, False)

    @cached_property
    def foreground_box(self) -> Box | None:
        """The box of all foreground."""
        return bounding_box(self.foreground)

    @cached_property
    def color_boxes(self) -> list[Box | None]:
        """The box of each colour 0..9."""
        return [bounding_box(self.grid == color) if self.counts[color] else None for color in range(NUM_COLORS)]

    @cached_property
    def row_colors(self) -> np.ndarray:
        """The most common foreground colour of each row, the background where there is none."""
        return self._line_colors(self.grid)

    @cached_property
    def column_colors(self) -> np.ndarray:
        """The most common foreground colour of each column, the background where there is none."""
        return self._line_colors(self.grid.T)

    def _line_colors(self, lines: Grid) -> np.ndarray:
        is_foreground = lines != self.background
        index = is_foreground.nonzero()[0]
        best = most_common(index, lines[is_foreground], len(lines))
        return np.where(best < 0, self.background, best)

    @cached_property
    def distinct_lines(self) -> Grid:
        """The grid without rows and columns that equal the one before."""
        rows = np.concatenate([[True], (self.grid[1:] != self.grid[:-1]).any(1)])
        columns = np.concatenate([[True], (self.grid[:, 1:] != self.grid[:, :-1]).any(0)])
        return self.grid[rows][:, columns]

    @cached_property
    def separators(self) -> tuple[Panels, np.ndarray, np.ndarray] | None:
        """The fewest equal panels between full lines of one colour, and which rows and columns are not such lines."""
        grid = self.grid
        is_row, is_column = (grid == grid[:, :1]).all(1), (grid == grid[:1]).all(0)
        best = None
        for color in self.reading_order:
            if color == self.background and self.counts[color] > 0.4 * grid.size:
                continue
            keep_row, keep_column = ~(is_row & (grid[:, 0] == color)), ~(is_column & (grid[0] == color))
            if keep_row.all() and keep_column.all():
                continue
            rows, columns = _equal_parts(keep_row), _equal_parts(keep_column)
            if not rows or not columns or len(rows) * len(columns) < 2:
                continue
            if best is None or len(rows) * len(columns) < len(best[0].grids):
                panels = np.stack([grid[r, c] for r in rows for c in columns])
                best = Panels(panels, (len(rows), len(columns))), keep_row, keep_column
        return best

    def panels(self, shape: Shape) -> Panels | None:
        """Return the panels between separators if they or their layout have `shape`, else equal parts of `shape`."""
        if shape not in self._panels:
            self._panels[shape] = self._find_panels(shape)
        return self._panels[shape]

    def _find_panels(self, shape: Shape) -> Panels | None:
        found = self.separators[0] if self.separators else None
        if found is not None and shape in (found.grids.shape[1:], found.layout):
            return found
        (height, width), (h, w) = self.shape, shape
        rows, columns = height // h, width // w
        if height % h or width % w or not 1 < rows * columns <= MAX_PANELS:
            return None
        parts = self.grid.reshape(rows, h, columns, w).swapaxes(1, 2).reshape(-1, h, w)
        return Panels(parts, (rows, columns))


def _equal_parts(keep: np.ndarray) -> list[slice] | None:
    """Return the runs of set entries, None if their lengths differ."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8))).tolist()
    parts = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return parts if len({part.stop - part.start for part in parts}) == 1 else None


Hypothesis = Callable[[Scene, Shape], "Grid | None"]


def for_same_shape(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(scene, ...)` only where output and input have the same shape."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape, **parameters) -> Grid | None:
        return function(scene, **parameters) if shape == scene.shape else None

    hypothesis.on_scene = function
    return hypothesis


def for_other_shape(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(scene, shape, ...)` only where output and input differ in shape."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape, **parameters) -> Grid | None:
        return function(scene, shape, **parameters) if shape != scene.shape else None

    return hypothesis


def if_it_fits(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that keeps the part `function(scene, ...)` of a grid only if it has the wanted shape."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape, **parameters) -> Grid | None:
        if shape == scene.shape:
            return None
        part = function(scene, **parameters)
        return part if part is not None and part.shape == shape else None

    hypothesis.on_scene = function
    return hypothesis


# 3. Views, scales, tiles ----------------------------------------------------------------------------------------------


def whole_view(scene: Scene, shape: Shape, index: int) -> Grid | None:
    """Return one of the eight views of the grid."""
    if shape != (scene.shape[::-1] if index > 3 else scene.shape):
        return None
    return VIEWS[index](scene.grid)


@for_other_shape
def enlarge_cells(scene: Scene, shape: Shape) -> Grid | None:
    """Return the grid with every cell grown to a block."""
    (height, width), (h, w) = scene.shape, shape
    if h % height or w % width:
        return None
    return scene.grid[np.arange(h)[:, None] // (h // height), np.arange(w) // (w // width)]


@for_other_shape
def shrink_blocks(scene: Scene, shape: Shape) -> Grid | None:
    """Return the first cell of every block."""
    (height, width), (h, w) = scene.shape, shape
    return None if height % h or width % w else scene.grid[:: height // h, :: width // w]


def _is_tiling(scene: Scene, shape: Shape) -> bool:
    return shape != scene.shape and (shape[0] > scene.shape[0] or shape[1] > scene.shape[1])


def tile(scene: Scene, shape: Shape) -> Grid | None:
    """Return copies of the grid, cut at the wanted shape."""
    if not _is_tiling(scene, shape):
        return None
    return scene.grid[np.arange(shape[0])[:, None] % scene.shape[0], np.arange(shape[1]) % scene.shape[1]]


def tile_mirrored(scene: Scene, shape: Shape, first: bool) -> Grid | None:
    """Return copies of which every other one is mirrored, the first too if `first`."""
    if not _is_tiling(scene, shape):
        return None
    lines = []
    for length, side in zip(shape, scene.shape, strict=True):
        copy, line = np.divmod(np.arange(length), side)
        is_flipped = copy % 2 == (0 if first else 1)
        lines.append(np.where(is_flipped, side - 1 - line, line))
    return scene.grid[np.ix_(*lines)]


def tile_rows_mirrored(scene: Scene, shape: Shape) -> Grid | None:
    """Return copies; every other row of copies is mirrored left-right."""
    if not _is_tiling(scene, shape):
        return None
    copy, row = np.divmod(np.arange(shape[0]), scene.shape[0])
    column = np.arange(shape[1]) % scene.shape[1]
    is_flipped = copy[:, None] % 2 == 1
    return scene.grid[row[:, None], np.where(is_flipped, scene.shape[1] - 1 - column, column)]


def tile_turned(scene: Scene, shape: Shape, turns: tuple[int, int, int]) -> Grid | None:
    """Return four copies: the grid, then upper right, lower left, lower right turned left by quarter `turns`."""
    height, width = scene.shape
    if height != width or shape != (2 * height, 2 * width):
        return None
    x = scene.grid
    right, below, across = (np.rot90(x, turn) for turn in turns)
    return np.block([[x, right], [below, across]])


def _copies_where(scene: Scene, shape: Shape, mask: np.ndarray) -> Grid:
    height, width = scene.shape
    blocks = mask[np.arange(shape[0])[:, None] // height, np.arange(shape[1]) // width]
    return np.where(blocks, tile(scene, shape), MARK)


def _is_square(scene: Scene, shape: Shape) -> bool:
    height, width = scene.shape
    return shape != scene.shape and shape == (height * height, width * width)


def tile_where(scene: Scene, shape: Shape, which: str) -> Grid | None:
    """Return a copy of the grid in place of each cell of one kind, a mark elsewhere."""
    if not _is_square(scene, shape):
        return None
    if which in ("foreground", "background"):
        mask = scene.foreground if which == "foreground" else scene.ground
    else:
        extreme = max if which == "most frequent" else min
        mask = scene.grid == extreme(scene.reading_order, key=lambda color: scene.counts[color])
    return _copies_where(scene, shape, mask)


def tile_where_color(scene: Scene, shape: Shape, color: int, inverse: bool) -> Grid | None:
    """Return a copy of the grid in place of each cell of a colour (`inverse`: of other colours), a mark elsewhere."""
    if not _is_square(scene, shape) or not scene.counts[color]:
        return None
    return _copies_where(scene, shape, (scene.grid == color) != inverse)


# 4. Crops -------------------------------------------------------------------------------------------------------------


def _cut(grid: Grid, box: Box | None, margin: int = 0) -> Grid | None:
    if box is None:
        return None
    part = grid[box]
    return part[margin:-margin, margin:-margin] if margin else part


def _frequency_box(scene: Scene, rank: int) -> Box | None:
    return scene.color_boxes[scene.by_frequency[rank]] if scene.by_frequency else None


@if_it_fits
def crop_foreground(scene: Scene, margin: int) -> Grid | None:
    """Return the box of the foreground, without its outermost `margin` lines."""
    return _cut(scene.grid, scene.foreground_box, margin)


@if_it_fits
def crop_foreground_mirrored(scene: Scene) -> Grid | None:
    """Return the box of the foreground, mirrored left-right."""
    return None if scene.foreground_box is None else scene.grid[scene.foreground_box][:, ::-1]


@if_it_fits
def crop_color(scene: Scene, color: int, margin: int) -> Grid | None:
    """Return the box of a colour, without its outermost `margin` lines."""
    return _cut(scene.grid, scene.color_boxes[color], margin)


@if_it_fits
def crop_ranked_color(scene: Scene, rank: int, margin: int) -> Grid | None:
    """Return the box of the most frequent (rank 0) or rarest (-1) foreground colour."""
    return _cut(scene.grid, _frequency_box(scene, rank), margin)


@for_other_shape
def behind_patch(scene: Scene, shape: Shape, repair: Callable[[Grid, int], Grid | None]) -> Grid | None:
    """Return what a solid patch of the wanted shape covers, if the rest of the grid tells."""
    for color in (*scene.by_frequency, scene.background):
        box = scene.color_boxes[color]
        if box is None or scene.grid[box].shape != shape or scene.counts[color] != shape[0] * shape[1]:
            continue
        repaired = repair(scene.grid, color)
        if repaired is not None:
            return repaired[box]
    return None


def _by_period(grid: Grid, hidden: int) -> Grid | None:
    return periodic(grid, hidden, grid.shape)


@for_other_shape
def crop_corner(scene: Scene, shape: Shape, corner: str) -> Grid | None:
    """Return the corner (or the centre) of the grid that has the wanted shape."""
    spare_rows, spare_columns = scene.shape[0] - shape[0], scene.shape[1] - shape[1]
    if spare_rows < 0 or spare_columns < 0:
        return None
    top = {"upper": 0, "lower": spare_rows, "centre": spare_rows // 2}[corner.split()[0]]
    left = {"left": 0, "right": spare_columns, "centre": spare_columns // 2}[corner.split()[-1]]
    return scene.grid[top : top + shape[0], left : left + shape[1]]


@if_it_fits
def drop_repeated_lines(scene: Scene) -> Grid:
    """Return the grid without rows and columns that equal the one before."""
    return scene.distinct_lines


@if_it_fits
def drop_empty_lines(scene: Scene) -> Grid:
    """Return the rows and columns that hold foreground."""
    return scene.grid[scene.foreground.any(1)][:, scene.foreground.any(0)]


@if_it_fits
def drop_separators(scene: Scene) -> Grid | None:
    """Return the panels side by side, without the lines between them."""
    if scene.separators is None:
        return None
    _, rows, columns = scene.separators
    return scene.grid[rows][:, columns]


# 5. Objects as outputs, counts, solids --------------------------------------------------------------------------------

KINDS = ("one-colour object", "object")
TRAITS = {
    "cells": "sizes",
    "copies of its shape": "shape_repeats",
    "colours in its box": "num_box_colors",
    "mirror symmetry": "symmetry",
    "other cells in its box": "others_in_box",
    "objects of its colour": "color_repeats",
}


def _extreme_object(objects: ObjectSet, trait: str, most: bool) -> int:
    values = getattr(objects, trait)[1:]
    return 1 + int(values.argmax() if most else values.argmin())


@if_it_fits
def crop_object(scene: Scene, kind: int, trait: str, most: bool) -> Grid | None:
    """Return the box of the object with the most or least of a trait."""
    objects = scene.objects[kind]
    if not objects.is_usable:
        return None
    return scene.grid[objects.boxes[_extreme_object(objects, trait, most) - 1]]


@for_other_shape
def color_of_object(scene: Scene, shape: Shape, kind: int, trait: str, most: bool) -> Grid | None:
    """Return a solid of the colour of the object with the most or least of a trait."""
    objects = scene.objects[kind]
    if not objects.is_usable:
        return None
    return np.full(shape, objects.colors[_extreme_object(objects, trait, most)])


@for_other_shape
def count_objects(scene: Scene, shape: Shape, kind: int) -> Grid | None:
    """Return one mark that is the number of objects (at most 15)."""
    if shape != (1, 1) or not scene.objects[kind].is_usable:
        return None
    return np.array([[MARK + min(scene.objects[kind].count, 15)]])


@for_other_shape
def tally_objects(scene: Scene, shape: Shape, kind: int) -> Grid | None:
    """Return a marked cell for each object, in reading order."""
    cells = shape[0] * shape[1]
    if not 1 < cells <= 30 or not scene.objects[kind].is_usable:
        return None
    return MARK + (np.arange(cells) < scene.objects[kind].count).astype(np.int64).reshape(shape)


@for_other_shape
def list_colors(scene: Scene, shape: Shape, ascending: bool) -> Grid | None:
    """Return the foreground colours by frequency in reading order, then background."""
    if not scene.by_frequency:
        return None
    cells = shape[0] * shape[1]
    colors = scene.by_frequency[::-1] if ascending else scene.by_frequency
    return np.array((colors + [scene.background] * cells)[:cells], np.int64).reshape(shape)


@for_other_shape
def solid(scene: Scene, shape: Shape, rank: int) -> Grid | None:
    """Return a solid of the most frequent (rank 0) or rarest (-1) foreground colour."""
    return np.full(shape, scene.by_frequency[rank]) if scene.by_frequency else None


# 6. Panels ------------------------------------------------------------------------------------------------------------


def on_panels(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(panels [n, h, w], background)` where panels of the wanted shape exist."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape, **parameters) -> Grid | None:
        panels = scene.panels(shape) if shape != scene.shape else None
        if panels is None or panels.grids.shape[1:] != shape:
            return None
        return function(panels.grids, scene.background, **parameters)

    return hypothesis


@on_panels
def pick_panel(panels: np.ndarray, background: int, index: int) -> Grid | None:
    """Return one of the panels, in reading order."""
    return panels[index] if index < len(panels) else None


@on_panels
def combine_panels(panels: np.ndarray, background: int) -> Grid | None:
    """Return a mark for the set of panels, of two or three, that have foreground in a cell."""
    if len(panels) > 3:
        return None
    return MARK + ((panels != background).astype(np.int64) << np.arange(len(panels))[:, None, None]).sum(0)


@on_panels
def stack_panels(panels: np.ndarray, background: int, first_on_top: bool) -> Grid:
    """Return the panels laid upon each other, background being transparent."""
    order = panels if first_on_top else panels[::-1]
    top = (order != background).argmax(0)
    return np.take_along_axis(order, top[None], 0)[0]


@on_panels
def odd_panel(panels: np.ndarray, background: int) -> Grid:
    """Return the first panel that has the fewest equals."""
    return panels[int((panels[:, None] == panels).all((2, 3)).sum(1).argmin())]


@on_panels
def fullest_panel(panels: np.ndarray, background: int, most: bool) -> Grid:
    """Return the first panel with the most or least foreground."""
    cells = (panels != background).sum((1, 2))
    return panels[int(cells.argmax() if most else cells.argmin())]


def on_layout(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(panels, background)` for one symbol per panel of a panel grid."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape) -> Grid | None:
        panels = scene.panels(shape) if shape != scene.shape else None
        if panels is None or panels.layout != shape or panels.grids.shape[1:] == shape:
            return None
        return function(panels.grids, scene.background).reshape(shape)

    return hypothesis


@on_layout
def count_in_panels(panels: np.ndarray, background: int) -> np.ndarray:
    """Return a mark per panel: its foreground cells (at most 15)."""
    return MARK + np.minimum((panels != background).sum((1, 2)), 15)


@on_layout
def panel_colors(panels: np.ndarray, background: int) -> np.ndarray:
    """Return the most common colour of every panel."""
    return most_common(np.arange(len(panels)).repeat(panels[0].size), panels, len(panels))


# 7. Repairs: period and symmetry --------------------------------------------------------------------------------------


def _is_damage(scene: Scene, color: int) -> bool:
    """Return whether a colour has few enough cells to hide a pattern."""
    limit = 0.5 if color == scene.background else 0.35
    return scene.grid.size >= 9 and 0 < scene.counts[color] < limit * scene.grid.size


def repair_period(scene: Scene, shape: Shape, color: int | None) -> Grid | None:
    """Return the periodic pattern under the cells of a colour (None: of the background), continued to the shape."""
    color = _hidden_color(scene, color)
    return periodic(scene.grid, color, shape) if color is not None else None


@for_same_shape
def repair_symmetry(scene: Scene, color: int | None) -> Grid | None:
    """Return the mirror-symmetric pattern under the cells of a colour (None: of the background)."""
    color = _hidden_color(scene, color)
    return inpaint(scene.grid, color) if color is not None and len(scene.colors) > 2 else None


def _hidden_color(scene: Scene, color: int | None) -> int | None:
    if color == scene.background:
        return None
    color = scene.background if color is None else color
    return color if _is_damage(scene, color) else None


@for_other_shape
def continue_period(scene: Scene, shape: Shape) -> Grid | None:
    """Return the grid's periodic pattern, continued to the shape."""
    return periodic(scene.grid, -1, shape)


# 8. Changes of the whole grid -----------------------------------------------------------------------------------------


@for_same_shape
def overlay_views(scene: Scene, indices: tuple[int, ...]) -> Grid | None:
    """Return the grid with its background filled from its other views."""
    if scene.shape[0] != scene.shape[1] and max(indices) > 3:
        return None
    grid = scene.grid
    for index in indices:
        grid = np.where(grid == scene.background, VIEWS[index](scene.grid), grid)
    return grid


@for_same_shape
def gravity(scene: Scene, direction: int) -> Grid:
    """Return the grid with all foreground cells fallen in a direction."""
    turned = view(scene.grid, direction)
    order = np.argsort(turned == scene.background, 1, kind="stable")
    return unview(np.take_along_axis(turned, order, 1), direction)


@for_same_shape
def shift(scene: Scene, step: tuple[int, int]) -> Grid:
    """Return the grid moved by one cell; what leaves enters on the other side."""
    return np.roll(scene.grid, step, (0, 1))


@for_same_shape
def sort_lines(scene: Scene, axis: int) -> Grid:
    """Return the rows (axis 0) or columns (1) in order of their foreground cells."""
    return np.take(scene.grid, scene.foreground.sum(1 - axis).argsort(kind="stable"), axis)


@for_same_shape
def swap_colors(scene: Scene) -> Grid | None:
    """Return the grid with the two most frequent foreground colours swapped."""
    return _swapped(scene.grid, *scene.by_frequency[:2]) if len(scene.by_frequency) > 1 else None


@for_same_shape
def swap_background(scene: Scene) -> Grid | None:
    """Return the grid with background and foreground swapped, where there are two colours."""
    return _swapped(scene.grid, scene.background, scene.by_frequency[0]) if len(scene.colors) == 2 else None


def _swapped(grid: Grid, a: int, b: int) -> Grid:
    return np.where(grid == a, b, np.where(grid == b, a, grid))


@for_same_shape
def row_colors(scene: Scene) -> Grid:
    """Return every row in its most common foreground colour."""
    return np.broadcast_to(scene.row_colors[:, None], scene.shape)


@for_same_shape
def column_colors(scene: Scene) -> Grid:
    """Return every column in its most common foreground colour."""
    return np.broadcast_to(scene.column_colors, scene.shape)


@for_same_shape
def mark_uniform_lines(scene: Scene, axis: int) -> Grid:
    """Return the grid with a mark on rows (axis 0) or columns (1) that have one colour."""
    first = scene.grid[:, :1] if axis == 0 else scene.grid[:1]
    return np.where((scene.grid == first).all(1 - axis, keepdims=True), MARK, scene.grid)


@for_same_shape
def line_counts(scene: Scene, axis: int) -> Grid:
    """Return a mark per row (axis 0) or column (1): its foreground cells (at most 20)."""
    counts = scene.foreground.sum(1 - axis, keepdims=True)
    return np.broadcast_to(MARK + np.minimum(counts, 20), scene.shape)


@for_same_shape
def rings(scene: Scene) -> Grid:
    """Return marks for the distance to the border."""
    height, width = scene.shape
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return MARK + np.minimum(np.minimum(rows, height - 1 - rows), np.minimum(columns, width - 1 - columns))


# 9. Background that is enclosed, adjacent or between ------------------------------------------------------------------


@for_same_shape
def mark_enclosed(scene: Scene, by: str) -> Grid | None:
    """Return the grid with enclosed background marked: "presence", region "size", or whether it is the "largest"."""
    if not scene.enclosed.any():
        return None
    sizes = scene.hole_sizes
    extra = {"presence": 0, "size": np.minimum(sizes, 20), "largest": sizes == sizes.max()}[by]
    return np.where(scene.enclosed, MARK + extra, scene.grid)


@for_same_shape
def mark_outside(scene: Scene, diagonal: bool) -> Grid:
    """Return the grid with a mark on background next to foreground."""
    return np.where(scene.ground & (neighbor_counts(scene.foreground, diagonal) > 0), MARK, scene.grid)


@for_same_shape
def mark_rim(scene: Scene) -> Grid:
    """Return the grid with a mark on foreground next to background."""
    return np.where(scene.foreground & (neighbor_counts(scene.ground, False) > 0), MARK, scene.grid)


@for_same_shape
def link(scene: Scene, lines: str) -> Grid:
    """Return the grid with equal colours linked through background; `lines` lists the directions, the last on top."""
    grid = scene.grid
    for line in lines:
        index, ray = {"H": (0, 0), "V": (1, 2), "\\": (2, 4), "/": (3, 5)}[line]
        grid = np.where(scene.links[index], scene.rays[ray], grid)
    return grid


@for_same_shape
def mark_links(scene: Scene) -> Grid:
    """Return the grid with background between equal colours marked by direction: both, in the row, in the column."""
    across, along = scene.links[:2]
    return np.where(across & along, MARK + 1, np.where(across, MARK + 2, np.where(along, MARK + 3, scene.grid)))


@for_same_shape
def shoot(scene: Scene, sources: tuple[int, ...]) -> Grid:
    """Return the grid with background taking the first colour that a ray meets; `sources` index Scene.rays."""
    grid = scene.grid
    for source in sources:
        ray = scene.rays[source]
        grid = np.where((grid == scene.background) & (ray != NO_HIT), ray, grid)
    return grid


@for_same_shape
def keep_color(scene: Scene, color: int) -> Grid | None:
    """Return the cells of one foreground colour among several, the rest background."""
    if not _is_one_of_several(scene, color):
        return None
    return np.where(scene.grid == color, scene.grid, scene.background)


@for_same_shape
def mark_color_box(scene: Scene, color: int) -> Grid | None:
    """Return the grid with background marked in the box of one foreground colour among several."""
    if not _is_one_of_several(scene, color):
        return None
    grid = scene.grid.copy()
    part = grid[scene.color_boxes[color]]
    part[part == scene.background] = MARK
    return grid


def _is_one_of_several(scene: Scene, color: int) -> bool:
    return len(scene.by_frequency) > 1 and scene.counts[color] > 0 and color != scene.background


# 10. Changes of every object ------------------------------------------------------------------------------------------


def on_objects(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(scene, objects, ...)` for the same shape where there are few objects."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape, kind: int, **parameters) -> Grid | None:
        if shape != scene.shape or not scene.objects[kind].is_usable:
            return None
        return function(scene, scene.objects[kind], **parameters)

    hypothesis.on_scene = lambda scene, **parameters: hypothesis(scene, scene.shape, **parameters)
    return hypothesis


def _mark(scene: Scene, objects: ObjectSet, values: np.ndarray) -> Grid:
    return np.where(scene.foreground, MARK + np.minimum(values, 20)[objects.labels], scene.grid)


@on_objects
def mark_trait(scene: Scene, objects: ObjectSet, trait: str) -> Grid:
    """Return the grid with every object marked by a property (at most 20)."""
    return _mark(scene, objects, getattr(objects, trait))


@on_objects
def mark_order(scene: Scene, objects: ObjectSet, axis: int) -> Grid:
    """Return the grid with the objects numbered from top to bottom (axis 0) or left to right (1)."""
    return _mark(scene, objects, objects.order(axis))


@on_objects
def mark_hole_parity(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked by whether it has an odd number of holes."""
    return _mark(scene, objects, objects.holes % 2)


@on_objects
def mark_symmetry(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked by its mirror symmetries and by whether it is a rectangle."""
    return _mark(scene, objects, objects.mirrors + 4 * objects.is_rectangle)


@on_objects
def mark_extremes(scene: Scene, objects: ObjectSet, most: bool) -> Grid:
    """Return the grid with the largest or smallest objects marked."""
    sizes = objects.sizes
    extreme = sizes.max() if most else sizes[1:].min()
    return np.where(sizes[objects.labels] == extreme, MARK, scene.grid)


@on_objects
def drop_specks(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid without objects of one or two cells."""
    return np.where(objects.sizes[objects.labels] <= 2, scene.background, scene.grid)


@on_objects
def keep_largest(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the largest objects alone."""
    return np.where(objects.sizes[objects.labels] == objects.sizes.max(), scene.grid, scene.background)


@on_objects
def fill_boxes(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with the background in each object's box in the object's colour."""
    grid = scene.grid.copy()
    for color, box in zip(objects.colors[1:], objects.boxes, strict=True):
        part = grid[box]
        part[part == scene.background] = color
    return grid


@on_objects
def unify_colors(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with each object in its most common colour."""
    return np.where(scene.foreground, objects.colors[objects.labels], scene.grid)


@on_objects
def flip_objects(scene: Scene, objects: ObjectSet, index: int) -> Grid:
    """Return the grid with each object mirrored in place."""
    grid = np.full(scene.shape, scene.background)
    for box, mask in zip(objects.boxes, objects.masks, strict=True):
        flipped = VIEWS[index](mask)
        grid[box][flipped] = VIEWS[index](scene.grid[box])[flipped]
    return grid


@on_objects
def swap_in_objects(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with the two colours of each two-coloured object swapped."""
    table = np.tile(np.arange(NUM_COLORS), (objects.count + 1, 1))
    present = np.zeros((objects.count + 1, NUM_COLORS), bool)
    present[objects.labels, scene.grid] = True
    present[0] = False
    two = np.flatnonzero(present.sum(1) == 2)
    if not len(two):
        return None
    low, high = present[two].argmax(1), NUM_COLORS - 1 - present[two, ::-1].argmax(1)
    table[two, low], table[two, high] = high, low
    return table[objects.labels, scene.grid]


# 11. The bank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One hypothesis: function(scene, shape) returns an integer symbol grid of exactly that shape, or None.

    `name` is for reports; layers of one `family` explain the same kind of task.
    """

    name: str
    family: str
    function: Hypothesis

    @property
    def on_scene(self) -> Callable[[Scene], Grid | None] | None:
        """The hypothesis without regard to a wanted shape; None where it needs one."""
        function = getattr(self.function, "func", self.function)
        inner = getattr(function, "on_scene", None)
        return inner and partial(inner, **getattr(self.function, "keywords", {}))


def _layers(family: str, function: Callable, table: dict[str, dict]) -> list[Layer]:
    """Return a layer for every name of a table of parameters."""
    return [Layer(name, family, partial(function, **parameters)) for name, parameters in table.items()]


def _per_color(family: str, function: Callable, name: str, **parameters) -> list[Layer]:
    """Return a layer for every colour; `name` has a {} for it."""
    return [Layer(name.format(c), family, partial(function, color=c, **parameters)) for c in range(NUM_COLORS)]


def _per_kind(family: str, function: Callable, name: str, **parameters) -> list[Layer]:
    """Return a layer for one-colour and one for any objects; `name` has a {} for the kind."""
    return [Layer(name.format(kind), family, partial(function, kind=k, **parameters)) for k, kind in enumerate(KINDS)]


def _geometry_layers() -> Iterator[Layer]:
    names = ("identity", "mirror left-right", "mirror top-bottom", "half turn", "transpose", "quarter turn left",
             "quarter turn right", "anti-transpose")  # fmt: skip
    yield from _layers("dihedral", whole_view, {name: {"index": k} for k, name in enumerate(names)})
    yield Layer("enlarge cells", "scale", enlarge_cells)
    yield Layer("shrink blocks", "scale", shrink_blocks)
    yield Layer("tile", "tile", tile)
    yield from _layers("tile", tile_mirrored, {
        "tile, mirrored every other copy": {"first": False},
        "tile, mirrored every other copy from the first": {"first": True},
    })  # fmt: skip
    yield Layer("tile, every other row of copies mirrored", "tile", tile_rows_mirrored)
    yield from _layers("tile", tile_turned, {
        "tile, turned right around the centre": {"turns": (3, 1, 2)},
        "tile, turned left around the centre": {"turns": (1, 3, 2)},
        "tile, turned left in reading order": {"turns": (1, 2, 3)},
    })  # fmt: skip
    kinds = ("foreground", "background", "most frequent", "rarest")
    yield from _layers("kronecker", tile_where, {f"copy at each {kind} cell": {"which": kind} for kind in kinds})
    yield from _per_color("kronecker", tile_where_color, "copy at each cell of colour {}", inverse=False)
    yield from _per_color("kronecker", tile_where_color, "copy at each cell but of colour {}", inverse=True)


def _crop_layers() -> Iterator[Layer]:
    yield from _layers("foreground", crop_foreground, {
        "crop to the foreground": {"margin": 0},
        "crop inside the foreground": {"margin": 1},
    })  # fmt: skip
    yield Layer("crop to the foreground, mirrored", "foreground", crop_foreground_mirrored)
    yield from _per_color("box", crop_color, "crop to the box of colour {}", margin=0)
    yield from _per_color("box", crop_color, "crop inside the box of colour {}", margin=1)
    yield from _layers("frequency", crop_ranked_color, {
        "crop to the box of the rarest colour": {"rank": -1, "margin": 0},
        "crop inside the box of the rarest colour": {"rank": -1, "margin": 1},
        "crop to the box of the most frequent colour": {"rank": 0, "margin": 0},
        "crop inside the box of the most frequent colour": {"rank": 0, "margin": 1},
    })  # fmt: skip
    yield from _layers("behind", behind_patch, {
        "behind the patch, by symmetry": {"repair": inpaint},
        "behind the patch, by period": {"repair": _by_period},
    })  # fmt: skip
    corners = ("upper left", "upper right", "lower left", "lower right", "centre")
    yield from _layers("corner", crop_corner, {f"crop the {name}": {"corner": name} for name in corners})
    yield Layer("drop repeated rows and columns", "distinct", drop_repeated_lines)
    yield Layer("drop empty rows and columns", "distinct", drop_empty_lines)
    yield Layer("drop the separators", "distinct", drop_separators)


def _summary_layers() -> Iterator[Layer]:
    for noun, trait in TRAITS.items():
        for amount, most in (("most", True), ("least", False)):
            choice = {"trait": trait, "most": most}
            yield from _per_kind("object", crop_object, f"crop to the {{}} with {amount} {noun}", **choice)
            yield from _per_kind("hue", color_of_object, f"colour of the {{}} with {amount} {noun}", **choice)
    yield from _per_kind("count", count_objects, "number of {}s")
    yield from _per_kind("tally", tally_objects, "tally of {}s")
    yield from _layers("palette", list_colors, {
        "colours from frequent to rare": {"ascending": False},
        "colours from rare to frequent": {"ascending": True},
    })  # fmt: skip
    yield from _layers("solid", solid, {
        "solid of the most frequent colour": {"rank": 0},
        "solid of the rarest colour": {"rank": -1},
    })  # fmt: skip


def _panel_layers() -> Iterator[Layer]:
    yield from _layers("panel", pick_panel, {f"panel {k + 1}": {"index": k} for k in range(4)})
    yield Layer("which panels are set", "boolean", combine_panels)
    yield from _layers("stack", stack_panels, {
        "panels stacked, first on top": {"first_on_top": True},
        "panels stacked, last on top": {"first_on_top": False},
    })  # fmt: skip
    yield Layer("panel unlike the others", "panel", odd_panel)
    yield from _layers("panel", fullest_panel, {"fullest panel": {"most": True}, "emptiest panel": {"most": False}})
    yield Layer("cells in each panel", "layout", count_in_panels)
    yield Layer("colour of each panel", "layout", panel_colors)


def _pattern_layers() -> Iterator[Layer]:
    for family, function in (("period", repair_period), ("symmetry", repair_symmetry)):
        yield Layer(f"{family} under the background", family, partial(function, color=None))
        yield from _per_color(family, function, f"{family} under colour {{}}")
    yield Layer("continue the period", "period", continue_period)
    yield from _layers("mirror", overlay_views, {
        "fill from the left-right mirror": {"indices": (1,)},
        "fill from the top-bottom mirror": {"indices": (2,)},
        "fill from both mirrors": {"indices": (1, 2, 3)},
        "fill from the transpose": {"indices": (4,)},
        "fill from all views": {"indices": tuple(range(1, 8))},
    })  # fmt: skip


def _whole_grid_layers() -> Iterator[Layer]:
    directions = ("left", "right", "up", "down")
    yield from _layers("gravity", gravity, {f"gravity {name}": {"direction": d} for d, name in enumerate(directions)})
    steps = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    yield from _layers("shift", shift, {f"shift {name}": {"step": step} for name, step in steps.items()})
    yield from _layers("sorting", sort_lines, {"sort the rows": {"axis": 0}, "sort the columns": {"axis": 1}})
    yield Layer("swap the two most frequent colours", "swap", swap_colors)
    yield Layer("swap background and foreground", "swap", swap_background)
    yield Layer("rows in their colours", "line", row_colors)
    yield Layer("columns in their colours", "line", column_colors)
    for axis, lines in enumerate(("row", "column")):
        yield Layer(f"mark one-colour {lines}s", "uniform", partial(mark_uniform_lines, axis=axis))
        yield Layer(f"cells in each {lines}", "linecount", partial(line_counts, axis=axis))
    yield Layer("rings", "rings", rings)


def _cell_layers() -> Iterator[Layer]:
    yield Layer("enclosed", "enclosed", partial(mark_enclosed, by="presence"))
    yield Layer("enclosed, by size", "enclosed", partial(mark_enclosed, by="size"))
    yield Layer("enclosed, largest", "enclosed", partial(mark_enclosed, by="largest"))
    yield Layer("outline", "outline", partial(mark_outside, diagonal=False))
    yield Layer("outline with corners", "outline", partial(mark_outside, diagonal=True))
    yield Layer("rim", "outline", mark_rim)
    yield from _layers("link", link, {
        "link in rows and columns": {"lines": "HV"},
        "link in rows": {"lines": "H"},
        "link in columns": {"lines": "V"},
        "link in diagonals": {"lines": "/\\"},
    })  # fmt: skip
    yield Layer("between equal colours", "link", mark_links)
    sources = {"from the left": (0,), "from the right": (1,), "from above": (2,), "from below": (3,),
               "in rows": (0, 1), "in columns": (2, 3), "in rows, then columns": (0, 1, 2, 3),
               "in columns, then rows": (2, 3, 0, 1), "in diagonals": (4, 5, 6, 7)}  # fmt: skip
    yield from _layers("rays", shoot, {f"rays {name}": {"sources": rays} for name, rays in sources.items()})
    yield from _per_color("keep", keep_color, "keep colour {}")
    yield from _per_color("colorbox", mark_color_box, "mark the box of colour {}")


def _object_layers() -> Iterator[Layer]:
    yield from _per_kind("size", mark_trait, "size of each {}", trait="sizes")
    yield from _per_kind("rank", mark_trait, "size rank of each {}", trait="ranks")
    yield from _per_kind("extremes", mark_extremes, "mark the largest {}", most=True)
    yield from _per_kind("extremes", mark_extremes, "mark the smallest {}", most=False)
    yield from _per_kind("holes", mark_trait, "holes of each {}", trait="holes")
    yield from _per_kind("holes", mark_hole_parity, "hole parity of each {}")
    yield from _per_kind("likeness", mark_trait, "copies of each {}", trait="shape_repeats")
    yield from _per_kind("order", mark_order, "{}s from top to bottom", axis=0)
    yield from _per_kind("order", mark_order, "{}s from left to right", axis=1)
    yield from _per_kind("height", mark_trait, "height of each {}", trait="heights")
    yield from _per_kind("balance", mark_symmetry, "symmetry of each {}")
    yield from _per_kind("border", mark_trait, "{}s at the border", trait="is_at_border")
    yield from _per_kind("specks", drop_specks, "drop {}s of one or two cells")
    yield from _per_kind("largest", keep_largest, "keep the largest {}")
    yield from _per_kind("boxfill", fill_boxes, "fill the box of each {}")
    yield Layer("unify each object", "unify", partial(unify_colors, kind=1))
    yield Layer("mirror each object left-right", "flip", partial(flip_objects, kind=1, index=1))
    yield Layer("mirror each object top-bottom", "flip", partial(flip_objects, kind=1, index=2))
    yield Layer("swap the colours of each object", "swap", partial(swap_in_objects, kind=1))


LAYERS: tuple[Layer, ...] = (
    *_geometry_layers(),
    *_crop_layers(),
    *_summary_layers(),
    *_panel_layers(),
    *_pattern_layers(),
    *_whole_grid_layers(),
    *_cell_layers(),
    *_object_layers(),
)
assert len({layer.name for layer in LAYERS}) == len(LAYERS), "names of layers must differ"
