"""Hypotheses for outputs of the input's shape: what moves, grows, is joined, filled, stamped, completed or marked.

The same contract as in grid_hypotheses: pure functions from a scene and a wanted shape to symbols, ties to what comes
first in reading order. Imports numpy and grid_hypotheses; used by demo_prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial, wraps

import numpy as np

from grid_hypotheses import (
    DOWN,
    LEFT,
    MARK,
    MAX_OBJECTS,
    NUM_COLORS,
    RIGHT,
    UP,
    VIEWS,
    Box,
    Grid,
    Layer,
    ObjectSet,
    Panels,
    Scene,
    bounding_box,
    flip_objects,
    for_same_shape,
    label,
    most_common,
    neighbor_counts,
    unview,
    view,
)

MAX_MOVERS = 20  # objects that move
MAX_TEMPLATES = 4
MAX_MARKERS = 40  # cells that are looked for
MAX_SOURCES = 200  # foreground cells to which distances are measured
MAX_JOINED = 8  # cells that are joined in pairs
FAR = 10**6  # a distance beyond all others
ALMOST_FULL = 0.9  # share of a line that has one colour
HIGHEST = 20  # the largest number that a mark stands for
TURNS = tuple(VIEWS[k] for k in (0, 3, 5, 6, 1, 2, 4, 7))  # turns before mirror images
STEPS8 = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)


# 1. Helpers -----------------------------------------------------------------------------------------------------------


class Parts(ObjectSet):
    """Given components of a scene, with the properties of an ObjectSet."""

    def __init__(self, scene: Scene, labels: np.ndarray, count: int):
        self.scene, self.labels, self.count = scene, labels, count


@lru_cache(maxsize=4)
def _regions(scene: Scene) -> Parts:
    """Return the 4-connected regions of the background."""
    return Parts(scene, *label(scene.grid, scene.ground, False, False))


@lru_cache(maxsize=4)
def _blocks(scene: Scene) -> Parts:
    """Return the 4-connected objects of one colour."""
    return Parts(scene, *label(scene.grid, scene.foreground, False, True))


def _group(scene: Scene, mask: np.ndarray) -> Parts:
    """Return the objects of set cells, of any colours; those with one cell between them are one."""
    smeared = mask.copy()  # grown right and down, so that the first cell of a component stays the first
    smeared[1:] |= mask[:-1]
    smeared[:, 1:] |= smeared[:, :-1].copy()
    labels, count = label(scene.grid, smeared, True, False)
    return Parts(scene, np.where(mask, labels, 0), count)


@lru_cache(maxsize=4)
def _clusters(scene: Scene) -> Parts:
    """Return the objects of any colours, those with one cell between them being one."""
    return _group(scene, scene.foreground)


@lru_cache(maxsize=4)
def _loose_objects(scene: Scene) -> Parts:
    """Return the objects of any colours that are left without full lines of one colour."""
    grid = scene.grid
    is_line = (grid == grid[:, :1]).all(1)[:, None] | (grid == grid[:1]).all(0)
    return Parts(scene, *label(grid, scene.foreground & ~is_line, True, False))


PARTS: dict[str, Callable[[Scene], ObjectSet]] = {
    "one-colour object": lambda scene: scene.objects[0],
    "object": lambda scene: scene.objects[1],
    "block": _blocks,
    "cluster": _clusters,
    "loose object": _loose_objects,
}


def on_parts(function: Callable[..., Grid | None], most: int = MAX_OBJECTS) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(scene, parts, ...)` for the same shape, of 1 to `most` parts."""

    @wraps(function)
    def hypothesis(scene: Scene, kind: str, **parameters) -> Grid | None:
        parts = PARTS[kind](scene)
        return function(scene, parts, **parameters) if 0 < parts.count <= most else None

    return for_same_shape(hypothesis)


def _number(values: np.ndarray) -> np.ndarray:
    """Return marks for numbers from 0, those above HIGHEST alike."""
    return MARK + np.minimum(values, HIGHEST)


def _box_sides(parts: ObjectSet) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths of the boxes of the parts, from index 1 on."""
    sides = [(box[0].stop - box[0].start, box[1].stop - box[1].start) for box in parts.boxes]
    height, width = np.array([(0, 0), *sides]).T
    return height, width


def _touching(labels: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return (label, colour) of the 4-neighbouring pairs of a labelled cell and an unlabelled one."""
    pairs = []
    for a, b in (
        (np.s_[1:], np.s_[:-1]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        is_edge = (labels[a] > 0) & (labels[b] == 0)
        pairs.append((labels[a][is_edge], grid[b][is_edge]))
    groups, colors = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return groups, colors


def _cast(free: np.ndarray, row: int, column: int, step: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells from a cell on (without it) in a direction, up to the first that is not free."""
    distance = np.arange(1, max(free.shape))
    rows, columns = row + step[0] * distance, column + step[1] * distance
    is_inside = (rows >= 0) & (rows < free.shape[0]) & (columns >= 0) & (columns < free.shape[1])
    rows, columns = rows[is_inside], columns[is_inside]
    is_free = free[rows, columns]
    end = len(is_free) if is_free.all() else int(is_free.argmin())
    return rows[:end], columns[:end]


# 2. Background regions ------------------------------------------------------------------------------------------------


def on_regions(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(scene, regions, ...)` for the same shape where there are two regions."""

    @wraps(function)
    def hypothesis(scene: Scene, **parameters) -> Grid | None:
        regions = _regions(scene)
        return function(scene, regions, **parameters) if regions.count > 1 else None

    return for_same_shape(hypothesis)


def _mark_regions(scene: Scene, regions: Parts, values: np.ndarray) -> Grid:
    return np.where(scene.ground, _number(values)[regions.labels], scene.grid)


@on_regions
def mark_region_sizes(scene: Scene, regions: Parts) -> Grid:
    """Return the grid with every background region marked by its cells."""
    return _mark_regions(scene, regions, regions.sizes)


@on_regions
def mark_region_extremes(scene: Scene, regions: Parts) -> Grid:
    """Return the grid with the background marked: largest regions, smallest ones, others."""
    sizes = regions.sizes
    kind = np.where(sizes == sizes.max(), 0, np.where(sizes == sizes[1:].min(), 1, 2))
    return _mark_regions(scene, regions, kind)


@on_regions
def mark_region_forms(scene: Scene, regions: Parts) -> Grid:
    """Return the grid with every background region marked: square, other rectangle, other shape."""
    height, width = _box_sides(regions)
    is_full = regions.sizes == height * width
    return _mark_regions(scene, regions, np.where(is_full & (height == width), 0, np.where(is_full, 1, 2)))


@on_regions
def mark_hole_parity(scene: Scene, regions: Parts) -> Grid | None:
    """Return the grid with every enclosed background region marked by whether its cells are odd."""
    if not scene.enclosed.any():
        return None
    return np.where(scene.enclosed, MARK + (regions.sizes % 2)[regions.labels], scene.grid)


@on_regions
def mark_outer_holes(scene: Scene, regions: Parts) -> Grid | None:
    """Return the grid with every enclosed background region marked by whether it is at the edge of the box of all."""
    if not scene.enclosed.any():
        return None
    rows, columns = bounding_box(scene.enclosed)
    edge = np.zeros(scene.shape, bool)
    edge[rows, columns] = True
    edge[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = False
    is_outer = np.bincount(regions.labels[edge], minlength=regions.count + 1) > 0
    return np.where(scene.enclosed, MARK + is_outer[regions.labels], scene.grid)


@on_regions
def mark_region_borders(scene: Scene, regions: Parts) -> Grid:
    """Return the grid with every background region marked by the number of borders that it touches."""
    touched = np.zeros(regions.count + 1, np.int64)
    labels = regions.labels
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touched[np.unique(edge)] += 1
    return _mark_regions(scene, regions, touched)


@on_regions
def fill_from_seeds(scene: Scene, regions: Parts) -> Grid | None:
    """Return the grid with every background region in the colour that touches it most, the commonest colour aside."""
    groups, colors = _touching(regions.labels, scene.grid)
    is_seed = colors != scene.by_frequency[0]
    if not is_seed.any():
        return None
    best = most_common(groups[is_seed], colors[is_seed], regions.count + 1)
    return np.where(scene.ground & (best >= 0)[regions.labels], best[regions.labels], scene.grid)


@for_same_shape
def fill_between_walls(scene: Scene, closed: bool) -> Grid | None:
    """Return the grid with each region between walls of the commonest colour in the commonest other colour in it.

    With `closed` only regions that do not touch the border change.
    """
    if len(scene.by_frequency) < 2:
        return None
    inside = scene.grid != scene.by_frequency[0]
    rooms = Parts(scene, *label(scene.grid, inside, False, False))
    is_seed = inside & scene.foreground
    best = most_common(rooms.labels[is_seed], scene.grid[is_seed], rooms.count + 1)
    is_filled = best >= 0
    if closed:
        is_filled &= rooms.is_at_border == 0
    is_filled[0] = False
    return np.where(is_filled[rooms.labels], best[rooms.labels], scene.grid)


# 3. Distances ---------------------------------------------------------------------------------------------------------


@for_same_shape
def mark_object_depth(scene: Scene) -> Grid:
    """Return the grid with every one-colour object marked by the distance to its edge."""
    core, depth = _core(scene) & scene.foreground, np.zeros(scene.shape, np.int64)
    while core.any():
        depth += core
        core &= neighbor_counts(core) == 8
    return np.where(scene.foreground, _number(depth), scene.grid)


def _core(scene: Scene) -> np.ndarray:
    """Return the cells all of whose 8 neighbours have their colour."""
    grid = np.pad(scene.grid, 1, constant_values=-1)
    core = np.ones(scene.shape, bool)
    height, width = scene.shape
    for a, b in STEPS8:
        core &= grid[1 + a : 1 + a + height, 1 + b : 1 + b + width] == scene.grid
    return core


def _distances(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the foreground colours [K] and the row and column distances [cells, K] to them."""
    rows, columns = np.nonzero(scene.foreground)
    row, column = np.indices(scene.shape).reshape(2, -1, 1)
    return scene.grid[rows, columns], np.abs(row - rows), np.abs(column - columns)


def on_sources(function: Callable[..., Grid | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that is asked for the same shape where there are a few foreground cells."""

    @wraps(function)
    def hypothesis(scene: Scene, **parameters) -> Grid | None:
        return function(scene, **parameters) if 0 < scene.foreground.sum() <= MAX_SOURCES else None

    return for_same_shape(hypothesis)


@on_sources
def spread_nearest(scene: Scene, diagonal: bool) -> Grid:
    """Return the grid with every cell in the colour of the nearest foreground, in steps with or without diagonals."""
    colors, rows, columns = _distances(scene)
    distance = np.maximum(rows, columns) if diagonal else rows + columns
    return colors[distance.argmin(1)].reshape(scene.shape)


@on_sources
def spread_rings(scene: Scene, diagonal: bool) -> Grid:
    """Return the grid with background at even distances from the foreground in the colour of the nearest."""
    colors, rows, columns = _distances(scene)
    distance = np.maximum(rows, columns) if diagonal else rows + columns
    nearest, least = colors[distance.argmin(1)], distance.min(1)
    return np.where(least % 2 == 0, nearest, scene.background).reshape(scene.shape)


@on_sources
def mark_distance(scene: Scene, diagonal: bool) -> Grid:
    """Return the grid with the background marked by its distance to the foreground."""
    _, rows, columns = _distances(scene)
    distance = (np.maximum(rows, columns) if diagonal else rows + columns).min(1).reshape(scene.shape)
    return np.where(scene.ground, _number(distance - 1), scene.grid)


@for_same_shape
def spread_lines(scene: Scene, axis: int) -> Grid | None:
    """Return every row (axis 0) or column (1) in the colour of the nearest one that has foreground."""
    colors = scene.row_colors if axis == 0 else scene.column_colors
    found = np.flatnonzero(scene.foreground.any(1 - axis))
    if not len(found):
        return None
    nearest = found[np.abs(np.arange(len(colors))[:, None] - found).argmin(1)]
    line = colors[nearest]
    return np.broadcast_to(line[:, None] if axis == 0 else line, scene.shape)


@for_same_shape
def meet_halfway(scene: Scene, axis: int) -> Grid | None:
    """Return the grid with background between foreground in a row (axis 0) or column (1) in the nearer colour.

    The middle is marked.
    """
    grid = scene.grid if axis == 0 else scene.grid.T
    height, width = grid.shape
    is_hit, place = grid != scene.background, np.arange(width)
    left = np.maximum.accumulate(np.where(is_hit, place, -1), 1)
    right = np.minimum.accumulate(np.where(is_hit, place, width)[:, ::-1], 1)[:, ::-1]
    is_between = ~is_hit & (left >= 0) & (right < width)
    if not is_between.any():
        return None
    row = np.arange(height)[:, None]
    near, far = place - left, right - place
    colors = np.where(near < far, grid[row, left], grid[row, np.minimum(right, width - 1)])
    filled = np.where(is_between, np.where(near == far, MARK, colors), grid)
    return filled if axis == 0 else filled.T


@for_same_shape
def line_ends(scene: Scene, direction: int) -> Grid:
    """Return every row or column in the colour of its cell at the border in a direction."""
    turned = view(scene.grid, direction)
    return unview(np.broadcast_to(turned[:, :1], turned.shape), direction)


@for_same_shape
def first_in_line(scene: Scene, direction: int) -> Grid:
    """Return the grid with foreground in the colour of the foreground that is outermost in a direction."""
    turned = view(scene.grid, direction)
    first = (turned != scene.background).argmax(1)
    colors = turned[np.arange(len(turned)), first][:, None]
    return unview(np.where(turned != scene.background, colors, turned), direction)


# 4. Marks of objects and cells ----------------------------------------------------------------------------------------


def _mark_objects(scene: Scene, objects: ObjectSet, values: np.ndarray) -> Grid:
    return np.where(objects.labels > 0, _number(values)[objects.labels], scene.grid)


@on_parts
def mark_trait_extremes(scene: Scene, objects: ObjectSet, trait: str, most: bool) -> Grid | None:
    """Return the grid with a mark on the objects with the most, or least, of a trait, unless all are alike."""
    values = getattr(objects, trait)
    extreme = values[1:].max() if most else values[1:].min()
    is_extreme = values == extreme
    is_extreme[0] = False
    return np.where(is_extreme[objects.labels], MARK, scene.grid) if is_extreme.sum() < objects.count else None


def _starts(objects: ObjectSet) -> np.ndarray:
    """Return the first row, end row, first column, end column of the parts' boxes, [4, count + 1]."""
    return np.array([(0, 0, 0, 0), *((r.start, r.stop, c.start, c.stop) for r, c in objects.boxes)]).T


@on_parts
def mark_halves(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object's cells marked by the half of its box, along both axes, or its middle."""
    top, bottom, left, right = (side[objects.labels] for side in _starts(objects))
    rows, columns = np.indices(scene.shape)
    vertical = 1 + np.sign(2 * rows - (top + bottom - 1))
    horizontal = 1 + np.sign(2 * columns - (left + right - 1))
    return np.where(objects.labels > 0, MARK + 3 * vertical + horizontal, scene.grid)


@on_parts
def mark_box_parity(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object's cells marked by the parities of their row and column in its box."""
    top, _, left, _ = (side[objects.labels] for side in _starts(objects))
    rows, columns = np.indices(scene.shape)
    return np.where(objects.labels > 0, MARK + 2 * ((rows - top) % 2) + (columns - left) % 2, scene.grid)


@on_parts
def mark_odd_cells(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with a mark on cells in odd rows and odd columns of their object's box, counted from 0."""
    top, _, left, _ = (side[objects.labels] for side in _starts(objects))
    rows, columns = np.indices(scene.shape)
    is_odd = (rows - top) % 2 * ((columns - left) % 2) == 1
    return np.where((objects.labels > 0) & is_odd, MARK, scene.grid)


@on_parts
def mark_specks(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with a mark on objects of one or two cells."""
    return np.where((objects.labels > 0) & (objects.sizes <= 2)[objects.labels], MARK, scene.grid)


@on_parts
def mark_box_edges(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object's cells marked by the number of edges of its box that they lie on."""
    top, bottom, left, right = (side[objects.labels] for side in _starts(objects))
    rows, columns = np.indices(scene.shape)
    edges = (rows == top) | (rows == bottom - 1), (columns == left) | (columns == right - 1)
    return np.where(objects.labels > 0, MARK + edges[0] + edges[1], scene.grid)


@on_parts
def outline_several(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with a mark on background around every object of several cells."""
    return np.where(scene.ground & (neighbor_counts((objects.sizes > 1)[objects.labels]) > 0), MARK, scene.grid)


@on_parts
def mark_widths(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked by its width."""
    return _mark_objects(scene, objects, _box_sides(objects)[1])


@on_parts
def mark_forms(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked: box square, wide or high, and whether it fills the box."""
    height, width = _box_sides(objects)
    form = np.where(height == width, 0, np.where(height < width, 1, 2))
    return _mark_objects(scene, objects, form + 3 * (objects.sizes == height * width))


@on_parts
def mark_ends(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked by its cells with one orthogonal neighbour."""
    is_end = scene.foreground & (neighbor_counts(scene.foreground, False) == 1)
    return _mark_objects(scene, objects, np.bincount(objects.labels[is_end], minlength=objects.count + 1))


@on_parts
def mark_corners(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with every object marked by its cells that turn or branch."""
    across = neighbor_counts(scene.foreground, False)
    padded = np.pad(scene.foreground, 1)
    is_straight = (padded[:-2, 1:-1] & padded[2:, 1:-1]) | (padded[1:-1, :-2] & padded[1:-1, 2:])
    is_corner = scene.foreground & ((across > 2) | ((across == 2) & ~is_straight))
    return _mark_objects(scene, objects, np.bincount(objects.labels[is_corner], minlength=objects.count + 1))


@on_parts
def mark_minority(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with a mark on cells that do not have their object's most common colour."""
    return np.where(scene.foreground & (scene.grid != objects.colors[objects.labels]), MARK, scene.grid)


@on_parts
def outline_by_size(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with background around every object marked by the object's cells."""
    size = np.pad(objects.sizes[objects.labels], 1)
    height, width = scene.shape
    around = np.max([size[1 + a : 1 + a + height, 1 + b : 1 + b + width] for a, b in STEPS8], 0)
    return np.where(scene.ground & (around > 0), _number(around), scene.grid)


@for_same_shape
def outline_in_color(scene: Scene, diagonal: bool) -> Grid:
    """Return the grid with background next to foreground in that colour, the first in reading order of neighbours."""
    grid = scene.grid
    padded = np.pad(scene.grid, 1, constant_values=scene.background)
    height, width = scene.shape
    for a, b in STEPS8:
        if diagonal or not a or not b:
            beside = padded[1 + a : 1 + a + height, 1 + b : 1 + b + width]
            grid = np.where(grid == scene.background, beside, grid)
    return grid


def _draw_frame(grid: Grid, box: Box, grow: int, symbol: int) -> None:
    """Write the outline of a box, grown on all sides, in place; what lies outside the grid is cut."""
    rows, columns = (slice(side.start - grow, side.stop + grow) for side in box)
    inside = slice(max(0, rows.start), max(0, rows.stop)), slice(max(0, columns.start), max(0, columns.stop))
    for row in (rows.start, rows.stop - 1):
        if 0 <= row < grid.shape[0] and rows.stop > rows.start:
            grid[row, inside[1]] = symbol
    for column in (columns.start, columns.stop - 1):
        if 0 <= column < grid.shape[1] and columns.stop > columns.start:
            grid[inside[0], column] = symbol


@on_parts
def frame_objects(scene: Scene, objects: ObjectSet) -> Grid:
    """Return the grid with a marked frame on the background around the box of every object."""
    grid = scene.grid.copy()
    for box in objects.boxes:
        _draw_frame(grid, box, 1, MARK)
    return np.where(scene.foreground, scene.grid, grid)


@for_same_shape
def frame_rarest(scene: Scene, grow: int) -> Grid | None:
    """Return the grid with a marked frame on the background along the box of the rarest colour."""
    if not scene.by_frequency:
        return None
    grid = scene.grid.copy()
    _draw_frame(grid, scene.color_boxes[scene.by_frequency[-1]], grow, MARK)
    return np.where(scene.foreground, scene.grid, grid)


@for_same_shape
def mark_rarest_boxes(scene: Scene) -> Grid | None:
    """Return the grid with a mark on other cells in the boxes of clusters of the rarest colour."""
    if not scene.by_frequency:
        return None
    is_rarest = scene.grid == scene.by_frequency[-1]
    clusters = _group(scene, is_rarest)
    if clusters.count > MAX_OBJECTS:
        return None
    marked = np.zeros(scene.shape, bool)
    for box in clusters.boxes:
        marked[box] = True
    return np.where(marked & ~is_rarest, MARK, scene.grid)


@for_same_shape
def mark_block_sizes(scene: Scene) -> Grid | None:
    """Return the grid with the 4-connected one-colour objects marked by their cells."""
    blocks = _blocks(scene)
    return _mark_objects(scene, blocks, blocks.sizes) if blocks.count else None


@for_same_shape
def mark_block_extremes(scene: Scene) -> Grid | None:
    """Return the grid with the 4-connected one-colour objects marked: largest, smallest, others."""
    blocks = _blocks(scene)
    if not blocks.count:
        return None
    sizes = blocks.sizes
    kind = np.where(sizes == sizes.max(), 0, np.where(sizes == sizes[1:].min(), 1, 2))
    return _mark_objects(scene, blocks, kind)


def _opened(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the cells that lie in a rectangle of set cells of the given size."""
    if mask.shape[0] < height or mask.shape[1] < width:
        return np.zeros(mask.shape, bool)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (height, width)).all((2, 3))
    padded = np.pad(windows, ((height - 1, height - 1), (width - 1, width - 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (height, width)).any((2, 3))


@for_same_shape
def mark_squares(scene: Scene, side: int, ground: bool) -> Grid | None:
    """Return the grid with a mark on cells that lie in a square of background, or of foreground, of the given side."""
    found = _opened(scene.ground if ground else scene.foreground, side, side)
    return np.where(found, MARK, scene.grid) if found.any() else None


@for_same_shape
def mark_one_color_squares(scene: Scene, side: int) -> Grid | None:
    """Return the grid with a mark on cells that lie in a square of one colour of the given side."""
    if min(scene.shape) < side:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(scene.grid, (side, side))
    padded = np.pad((windows == windows[..., :1, :1]).all((2, 3)), side - 1)
    found = np.lib.stride_tricks.sliding_window_view(padded, (side, side)).any((2, 3))
    return np.where(found, MARK, scene.grid) if found.any() else None


@for_same_shape
def mark_pluses(scene: Scene, ground: bool) -> Grid | None:
    """Return the grid with a mark on cells of pluses (a cell and its four neighbours) of background or foreground."""
    mask = scene.ground if ground else scene.foreground
    centre = mask & (neighbor_counts(mask, False) == 4)
    if not centre.any():
        return None
    return np.where(centre | (neighbor_counts(centre, False) > 0), MARK, scene.grid)


def _largest_rectangles(mask: np.ndarray) -> np.ndarray:
    """Return the cells of all rectangles of set cells that have the most cells."""
    height, width = mask.shape
    place = np.arange(width)
    best, found, rows = 0, np.zeros(mask.shape, bool), mask
    for h in range(1, height + 1):
        if h > 1:
            rows = rows[:-1] & mask[h - 1 :]
        if not rows.any() or h * width < best:
            continue
        length = place - np.maximum.accumulate(np.where(rows, -1, place), 1)
        longest = int(length.max())
        if h * longest < best:
            continue
        if h * longest > best:
            best, found = h * longest, np.zeros(mask.shape, bool)
        for row, end in np.argwhere(length == longest)[:MAX_MOVERS]:
            found[row : row + h, end - longest + 1 : end + 1] = True
    return found


@for_same_shape
def mark_largest_rectangle(scene: Scene, ground: bool) -> Grid | None:
    """Return the grid with a mark on the largest rectangles of background, or of foreground."""
    mask = scene.ground if ground else scene.foreground
    return np.where(_largest_rectangles(mask), MARK, scene.grid) if mask.any() else None


# 5. Colours taken from other objects ----------------------------------------------------------------------------------


def _recolored(scene: Scene, objects: ObjectSet, colors: np.ndarray) -> Grid:
    return np.where(objects.labels > 0, colors[objects.labels], scene.grid)


@on_parts
def color_of_same_shape(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with objects of the most repeated colour in the colour of another object of their shape."""
    colors = objects.colors.copy()
    usual = int(colors[1 + int(objects.color_repeats[1:].argmax())])
    teacher = {}
    for k, mask in enumerate(objects.masks, 1):
        if colors[k] != usual:
            teacher.setdefault((mask.shape, mask.tobytes()), int(colors[k]))
    for k, mask in enumerate(objects.masks, 1):
        if colors[k] == usual:
            colors[k] = teacher.get((mask.shape, mask.tobytes()), usual)
    return _recolored(scene, objects, colors) if teacher else None


@on_parts
def color_of_nearest(scene: Scene, objects: ObjectSet, keep: bool) -> Grid | None:
    """Return the grid with the largest object's colour replaced, object by object, by the nearest other colour.

    Without `keep` the objects of other colours vanish.
    """
    colors = objects.colors
    usual = int(colors[1 + int(objects.sizes[1:].argmax())])
    is_other = colors[1:] != usual
    if not is_other.any():
        return None
    cells = np.argwhere(scene.foreground)
    if len(cells) > MAX_SOURCES:
        return None
    labels = objects.labels[cells[:, 0], cells[:, 1]]
    is_target = colors[labels] != usual
    targets, hue = cells[is_target], colors[labels[is_target]]
    nearest = colors.copy()
    for k in np.flatnonzero(colors[1:] == usual) + 1:
        gaps = ((cells[labels == k][:, None] - targets) ** 2).sum(2).min(0)
        nearest[k] = hue[gaps.argmin()]
    new = colors.copy()
    new[1:] = np.where(is_other, colors[1:] if keep else scene.background, nearest[1:])
    return _recolored(scene, objects, new)


@for_same_shape
def fill_color_boxes(scene: Scene) -> Grid | None:
    """Return the grid with the background in the box of each colour in that colour, the rarest on top."""
    grid = scene.grid.copy()
    for color in scene.by_frequency:
        part = grid[scene.color_boxes[color]]
        part[scene.ground[scene.color_boxes[color]]] = color
    return grid if scene.by_frequency else None


def _legend(scene: Scene) -> tuple[dict[int, int], np.ndarray] | None:
    """Return what each colour of a legend stands beside, and the legend's cells: objects two cells wide or high."""
    objects = scene.objects[1]
    if not objects.is_usable:
        return None
    table, cells = {}, np.zeros(scene.shape, bool)
    for box, mask in zip(objects.boxes, objects.masks, strict=True):
        if not mask.all() or 2 not in mask.shape or max(mask.shape) > 8:
            continue
        part = scene.grid[box]
        pairs = part if part.shape[1] == 2 else part.T
        if (pairs[:, 0] == pairs[:, 1]).any():
            continue
        table.update(pairs.tolist())
        cells[box] = True
    return (table, cells) if table and (scene.foreground & ~cells).any() else None


@for_same_shape
def box_by_legend(scene: Scene) -> Grid | None:
    """Return the grid with background in the grown box of each object in the colour beside its own in a legend."""
    found = _legend(scene)
    if found is None or not scene.objects[0].is_usable:
        return None
    grid, objects = scene.grid.copy(), scene.objects[0]
    for color, (rows, columns) in zip(objects.colors[1:].tolist(), objects.boxes, strict=True):
        if color in found[0] and not found[1][rows, columns].any():
            part = grid[max(0, rows.start - 1) : rows.stop + 1, max(0, columns.start - 1) : columns.stop + 1]
            part[part == scene.background] = found[0][color]
    return np.where(scene.enclosed, scene.background, grid)


# 6. Motion ------------------------------------------------------------------------------------------------------------


on_movers = partial(on_parts, most=MAX_MOVERS)


def _free_way(occupied: np.ndarray, mask: np.ndarray, direction: int) -> int:
    """Return how far the cells of a mask can move in a direction before they meet an occupied cell or the border."""
    cells, blocks = view(mask, direction), view(occupied, direction)
    place = np.arange(cells.shape[1])
    last = np.maximum.accumulate(np.where(blocks, place, -1), 1)
    return int((place - last)[cells].min()) - 1


_STEPS = {LEFT: (0, -1), RIGHT: (0, 1), UP: (-1, 0), DOWN: (1, 0)}


def _move(scene: Scene, objects: ObjectSet, moves: list[tuple[int, int]], trail: bool = False) -> Grid:
    """Return the grid after objects moved, one after the other, in a direction until contact; `trail`: they leave one.

    `moves` are (object, direction).
    """
    grid = scene.grid.copy()
    for k, direction in moves:
        mask = objects.labels == k
        rows, columns = np.nonzero(mask)
        colors = grid[rows, columns]
        occupied = (grid != scene.background) & ~mask
        distance = _free_way(occupied, mask, direction)
        a, b = _STEPS[direction]
        for step in range(1, distance + 1) if trail else ():
            grid[rows + a * step, columns + b * step] = colors
        if not trail:
            grid[rows, columns] = scene.background
            grid[rows + a * distance, columns + b * distance] = colors
    return grid


def _edge(box: Box, direction: int) -> int:
    """Return the place of the leading edge of a box on the way in a direction, small where it is ahead."""
    rows, columns = box
    return {LEFT: columns.start, RIGHT: -columns.stop, UP: rows.start, DOWN: -rows.stop}[direction]


@on_movers
def fall(scene: Scene, objects: ObjectSet, direction: int) -> Grid:
    """Return the grid with all objects moved in a direction until contact, the foremost first."""
    order = sorted(range(objects.count), key=lambda k: _edge(objects.boxes[k], direction))
    return _move(scene, objects, [(k + 1, direction) for k in order])


@on_movers
def fall_to_bar(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with all objects moved towards the one border that is a foreground line of one colour."""
    lines = [view(scene.grid, direction)[:, 0] for direction in range(4)]
    bars = [d for d, line in enumerate(lines) if line[0] != scene.background and (line == line[0]).all()]
    if len(bars) != 1:
        return None
    order = sorted(range(objects.count), key=lambda k: _edge(objects.boxes[k], bars[0]))
    return _move(scene, objects, [(k + 1, bars[0]) for k in order])


def _overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop


def _direction(box: Box, target: Box) -> int | None:
    """Return the direction from a box to one that shares rows or columns with it, None if it shares neither or both."""
    in_rows, in_columns = _overlap(box[0], target[0]), _overlap(box[1], target[1])
    if in_rows == in_columns:
        return None
    if in_rows:
        return LEFT if target[1].start < box[1].start else RIGHT
    return UP if target[0].start < box[0].start else DOWN


def _distance(box: Box, target: Box) -> int:
    return max(max(t.start - b.stop, b.start - t.stop) for b, t in zip(box, target, strict=True))


@on_movers
def trail_to_largest(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with a trail to the largest object from each one in its rows or columns."""
    if objects.count < 2:
        return None
    target = objects.boxes[int(objects.sizes[1:].argmax())]
    moves = [(_distance(box, target), k, _direction(box, target)) for k, box in enumerate(objects.boxes, 1)]
    moves = [(k, direction) for _, k, direction in sorted(moves, key=lambda move: move[:2]) if direction is not None]
    return _move(scene, objects, moves, trail=True) if moves else None


@on_movers
def approach_own_color(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with objects moved to the largest object of their colour."""
    sizes, colors = objects.sizes, objects.colors
    moves = []
    for k, box in enumerate(objects.boxes, 1):
        alike = np.flatnonzero((colors[1:] == colors[k]) & (sizes[1:] > sizes[k]))
        if not len(alike):
            continue
        target = objects.boxes[int(alike[sizes[1 + alike].argmax()])]
        direction = _direction(box, target)
        if direction is not None:
            moves.append((_distance(box, target), k, direction))
    return _move(scene, objects, [move[1:] for move in sorted(moves)]) if moves else None


@on_parts
def move_by_size(scene: Scene, objects: ObjectSet, direction: int) -> Grid:
    """Return the grid with every object moved in a direction by its own height or width."""
    grid = np.where(objects.labels > 0, scene.background, scene.grid)
    rows, columns = np.nonzero(objects.labels)
    labels, (a, b) = objects.labels[rows, columns], _STEPS[direction]
    height, width = _box_sides(objects)
    places = np.stack([rows + a * height[labels], columns + b * width[labels]], 1)
    is_inside = ((places >= 0) & (places < scene.shape)).all(1)
    grid[places[is_inside, 0], places[is_inside, 1]] = scene.grid[rows, columns][is_inside]
    return grid


@on_parts
def turn_objects(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with every object turned by a quarter about the middle of its box, where that is a cell."""
    grid, found = scene.grid.copy(), False
    for k, mask in enumerate(objects.masks, 1):
        height, width = mask.shape
        if (height + width) % 2 == 0 and mask.size > 1:
            grid[objects.labels == k] = scene.background
    for box, mask in zip(objects.boxes, objects.masks, strict=True):
        height, width = mask.shape
        if (height + width) % 2 or mask.size == 1:
            continue
        found = True
        turned = np.rot90(np.where(mask, scene.grid[box], -1), -1)
        _stamp(
            grid,
            turned,
            np.array([box[0].start, box[1].start]) + (height - width) // 2 * np.array([1, -1]),
            scene.background,
        )
    return grid if found else None


@on_parts
def centre_largest(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with the largest object moved to the middle of the box of the others."""
    k = 1 + int(objects.sizes[1:].argmax())
    others = bounding_box((objects.labels > 0) & (objects.labels != k))
    if others is None:
        return None
    box = objects.boxes[k - 1]
    way = [o.start + o.stop - b.start - b.stop for o, b in zip(others, box, strict=True)]
    if any(w % 2 for w in way):
        return None
    template = np.where(objects.masks[k - 1], scene.grid[box], -1)
    grid = np.where(objects.labels == k, scene.background, scene.grid)
    _stamp(grid, template, np.array([b.start + w // 2 for b, w in zip(box, way, strict=True)]), scene.background)
    return grid


@on_parts
def gather(scene: Scene, objects: ObjectSet, anchor: str, unaligned: str) -> Grid | None:
    """Return the grid with single cells moved to the edge of an object: the nearest, the largest, or of "own" colour.

    Those that share no row or column with it "move", "stay" or "vanish".
    """
    sizes, colors = objects.sizes, objects.colors
    if anchor == "nearest":
        is_anchor = 2 * sizes > max(2, sizes.max())
    elif anchor == "largest":
        is_anchor = colors == colors[sizes.argmax()]
    else:
        largest = np.zeros(NUM_COLORS, np.int64)
        np.maximum.at(largest, colors[1:], sizes[1:])
        is_anchor = (sizes == largest[colors]) & (sizes > 1)
    is_anchor[0] = False
    anchors = np.flatnonzero(is_anchor)
    place = np.argwhere(scene.foreground & ~is_anchor[objects.labels])
    if not len(anchors) or not 0 < len(place) <= MAX_SOURCES:
        return None
    boxes = np.array([[(side.start, side.stop) for side in objects.boxes[k - 1]] for k in anchors])  # [n, axis, end]
    goal = np.clip(place[:, None], boxes[..., 0] - 1, boxes[..., 1])  # [cells, n, axis]
    is_off = ((goal < boxes[..., 0]) | (goal >= boxes[..., 1])).all(2)
    cost = np.abs(goal - place[:, None]).sum(2) + (unaligned != "move") * FAR * is_off
    own = scene.grid[place[:, 0], place[:, 1]]
    if anchor == "own":
        cost = np.where(own[:, None] == colors[anchors], cost, FAR)
    best = cost.argmin(1)
    rows = np.arange(len(place))
    goes, target = cost[rows, best] < FAR, np.clip(goal[rows, best], 0, np.array(scene.shape) - 1)
    grid = np.where(scene.foreground & ~is_anchor[objects.labels], scene.background, scene.grid)
    if unaligned == "stay":
        grid[place[~goes, 0], place[~goes, 1]] = own[~goes]
    grid[target[goes, 0], target[goes, 1]] = own[goes]
    return grid


# 7. Lines -------------------------------------------------------------------------------------------------------------


@on_parts
def shoot_tips(scene: Scene, objects: ObjectSet, backward: bool) -> Grid | None:
    """Return the grid with a ray from the odd cell of each object, away from its other cells (or across them)."""
    grid, found = scene.grid.copy(), False
    for k, (box, mask) in enumerate(zip(objects.boxes, objects.masks, strict=True), 1):
        is_tip = mask & (scene.grid[box] != objects.colors[k])
        if is_tip.sum() != 1 or mask.sum() < 3:
            continue
        tip = np.argwhere(is_tip)[0]
        body = np.argwhere(mask & ~is_tip).mean(0)
        away = tip - body
        step = tuple(int(s) for s in np.sign(np.round(away, 6)) * (np.abs(away) > 0.5 * np.abs(away).max()))
        color = scene.grid[box][tuple(tip)]
        row, column = int(tip[0]) + box[0].start, int(tip[1]) + box[1].start
        if backward:
            step = (-step[0], -step[1])
        free = scene.ground | (objects.labels == k)
        cells = _cast(free, row, column, step) if any(step) else ((), ())
        if len(cells[0]):
            found = True
            grid[cells] = np.where(scene.ground[cells], color, grid[cells])
    return grid if found else None


def _joining_line(scene: Scene) -> np.ndarray | None:
    """Return the cells between aligned cells of the rarest colour, None if there are none."""
    if not scene.by_frequency or not 2 <= scene.counts[scene.by_frequency[-1]] <= MAX_JOINED:
        return None
    cells = np.argwhere(scene.grid == scene.by_frequency[-1])
    line = np.zeros(scene.shape, bool)
    for i, a in enumerate(cells):
        for b in cells[i + 1 :]:
            way = b - a
            length = int(np.abs(way).max())
            if length > 1 and ((np.abs(way) == length) | (way == 0)).all():
                points = a + np.arange(1, length)[:, None] * np.sign(way)
                line[points[:, 0], points[:, 1]] = True
    line &= scene.grid != scene.by_frequency[-1]
    return line if line.any() else None


@for_same_shape
def join_rarest(scene: Scene) -> Grid | None:
    """Return the grid with marks between aligned cells of the rarest colour: on background, on anything else."""
    line = _joining_line(scene)
    return None if line is None else np.where(line, MARK + scene.foreground, scene.grid)


@for_same_shape
def join_rarest_touching(scene: Scene) -> Grid | None:
    """Return the grid with marks between aligned cells of the rarest colour and on all objects in between."""
    line = _joining_line(scene)
    if line is None:
        return None
    objects = _blocks(scene)
    touched = np.bincount(objects.labels[line], minlength=objects.count + 1) > 0
    touched[0] = False
    return np.where(touched[objects.labels], MARK + 1, np.where(line, MARK, scene.grid))


@for_same_shape
def cross_through_squares(scene: Scene) -> Grid | None:
    """Return the grid with lines through the middle of each square of nine cells of one colour, crossings marked."""
    middle = _core(scene) & scene.foreground
    rows, columns = np.nonzero(middle)
    if not 0 < len(rows) <= MAX_JOINED:
        return None
    across, along = np.full(scene.shape, -1), np.full(scene.shape, -1)
    across[rows] = scene.grid[rows, columns][:, None]
    along[:, columns] = scene.grid[rows, columns]
    is_crossing = (across >= 0) & (along >= 0) & (across != along)
    grid = np.where(along >= 0, along, np.where(across >= 0, across, scene.grid))
    return np.where(is_crossing, MARK, grid)


@for_same_shape
def mark_emptiest_lines(scene: Scene, axis: int) -> Grid:
    """Return the grid with a mark on the background of the rows (axis 0) or columns (1) that have most of it."""
    cells = scene.ground.sum(1 - axis, keepdims=True)
    return np.where(scene.ground & (cells == cells.max()), MARK, scene.grid)


@for_same_shape
def smooth_stripes(scene: Scene) -> Grid:
    """Return rows, or columns, whichever agree more, in their most common colour."""
    results = []
    for lines in (scene.grid, scene.grid.T):
        height, width = lines.shape
        colors = most_common(np.arange(height).repeat(width), lines, height)
        filled = np.broadcast_to(colors[:, None], lines.shape)
        results.append((int((filled == lines).sum()), filled))
    rows, columns = results
    return rows[1] if rows[0] >= columns[0] else columns[1].T


@on_parts
def draw_diamonds(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with background marked in the diamond whose diagonal is a straight object."""
    inside = np.zeros(scene.shape, bool)
    rows, columns = np.indices(scene.shape)
    for (r, c), mask in zip(objects.boxes, objects.masks, strict=True):
        height, width = mask.shape
        if min(height, width) == 1 and mask.size > 2:
            twice = np.abs(2 * rows - (r.start + r.stop - 1)) + np.abs(2 * columns - (c.start + c.stop - 1))
            inside |= twice < mask.size
    inside &= scene.ground
    return np.where(inside, MARK, scene.grid) if inside.any() else None


@for_same_shape
def fill_to_corner(scene: Scene) -> Grid | None:
    """Return the grid with the rectangle from the foreground to the nearest corner in the foreground's colour."""
    if scene.foreground_box is None or len(scene.by_frequency) != 1:
        return None
    grid = scene.grid.copy()
    sides = []
    for side, length in zip(scene.foreground_box, scene.shape, strict=True):
        sides.append(slice(0, side.stop) if side.start < length - side.stop else slice(side.start, length))
    grid[tuple(sides)] = scene.by_frequency[0]
    return grid


@for_same_shape
def join_by_elbow(scene: Scene, color: int) -> Grid | None:
    """Return the grid with two lone cells joined by a marked path with one turn, which leaves a colour vertically."""
    cells = np.argwhere(scene.foreground)
    if len(cells) != 2 or scene.counts[color] != 1 or color == scene.background:
        return None
    (top, start), (bottom, end) = cells.tolist()
    leaves_top = scene.grid[top, start] == color
    grid = scene.grid.copy()
    grid[top : bottom + 1, start if leaves_top else end] = MARK
    grid[bottom if leaves_top else top, min(start, end) : max(start, end) + 1] = MARK
    return np.where(scene.foreground, scene.grid, grid)


@for_same_shape
def bounce(scene: Scene, direction: int) -> Grid | None:
    """Return the grid with a diagonal path in a direction from the only foreground cell, reflected by the sides."""
    turned = view(scene.grid, direction)
    cells = np.argwhere(turned != scene.background)
    height, width = turned.shape
    if len(cells) != 1 or height < 2 or cells[0][1] == 0:
        return None
    row, column = cells[0].tolist()
    way = np.arange(column + 1) * (1 if 2 * row < height else -1)
    place = (row + way) % (2 * height - 2)
    grid = turned.copy()
    grid[np.minimum(place, 2 * height - 2 - place), column - np.arange(column + 1)] = turned[row, column]
    return unview(grid, direction)


# 8. Stamps and symmetry -----------------------------------------------------------------------------------------------


def _templates(objects: ObjectSet, grid: Grid) -> list[int]:
    """Return the objects with several colours, the largest first."""
    order = sorted(range(objects.count), key=lambda k: -objects.sizes[k + 1])
    many = [
        k for k in order if objects.sizes[k + 1] > 3 and len(np.unique(grid[objects.boxes[k]][objects.masks[k]])) > 1
    ]
    return many[:MAX_TEMPLATES]


def _places(grid: Grid, marker: Grid, ground: int) -> np.ndarray:
    """Return the upper left corners where all set cells (>= 0) of `marker` fit, its ground also outside."""
    cells = np.argwhere(marker >= 0)
    colors = marker[cells[:, 0], cells[:, 1]]
    first = int((colors != ground).argmax())
    corners = np.argwhere(grid == colors[first]) - cells[first]
    places = corners[:, None] + cells  # [corners, cells, axis]
    is_inside = ((places >= 0) & (places < grid.shape)).all(2)
    rows, columns = np.where(is_inside[..., None], places, 0).transpose(2, 0, 1)
    fits = np.where(is_inside, grid[rows, columns] == colors, colors == ground)
    return corners[fits.all(1)]


def _stamp(grid: Grid, template: Grid, corner: np.ndarray, background: int) -> None:
    """Write the set cells (>= 0) of a template on the background of `grid`, in place."""
    rows, columns = np.nonzero(template >= 0)
    colors = template[rows, columns]
    rows, columns = rows + corner[0], columns + corner[1]
    is_inside = (rows >= 0) & (rows < grid.shape[0]) & (columns >= 0) & (columns < grid.shape[1])
    rows, columns, colors = rows[is_inside], columns[is_inside], colors[is_inside]
    is_free = grid[rows, columns] == background
    grid[rows[is_free], columns[is_free]] = colors[is_free]


def _stamp_markers(scene: Scene, grid: Grid, hidden: Grid, template: Grid, color: int, exact: bool) -> bool:
    """Stamp a template on `grid`, in any view, where its cells but of one colour are found in `hidden`; say if any are.

    With `exact` the others must be background there. Cells that are found are crossed out.
    """
    marker = np.where(template == color, scene.background if exact else -1, template)
    if not 0 < (marker >= 0).sum() <= MAX_MARKERS:
        return False
    found = False
    for turn in TURNS if (marker >= 0).sum() > 1 else TURNS[:1]:
        turned = turn(marker)
        cells = np.argwhere((turned >= 0) & (turned != scene.background))
        for corner in _places(hidden, turned, scene.background)[:MAX_MOVERS]:
            found = True
            _stamp(grid, turn(template), corner, scene.background)
            rows, columns = (cells + corner).T
            hidden[rows, columns] = -3
    return found


@on_parts
def stamp_at_markers(scene: Scene, objects: ObjectSet, keep: bool) -> Grid | None:
    """Return the grid with many-coloured objects completed, in any view, where cells of their rarer colours recur.

    Without `keep` the first objects vanish.
    """
    grid, found = scene.grid.copy(), False
    templates = _templates(objects, scene.grid)
    is_template = np.isin(objects.labels, [k + 1 for k in templates])
    hidden = np.where(is_template, -2, scene.grid)
    for k in templates:
        template = np.where(objects.masks[k], scene.grid[objects.boxes[k]], -1)
        found |= _stamp_markers(scene, grid, hidden, template, int(objects.colors[k + 1]), False)
    if not found:
        return None
    return grid if keep else np.where(is_template, scene.background, grid)


@on_parts
def stamp_at_color(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with many-coloured objects copied to single cells of a colour that they hold once."""
    grid, found = scene.grid.copy(), False
    templates = [np.where(objects.masks[k], scene.grid[objects.boxes[k]], -1) for k in _templates(objects, scene.grid)]
    for single in np.flatnonzero(objects.sizes == 1):
        color, box = objects.colors[single], objects.boxes[single - 1]
        fitting = [template for template in templates if (template == color).sum() == 1]
        if fitting:
            found = True
            corner = np.array([box[0].start, box[1].start]) - np.argwhere(fitting[0] == color)[0]
            _stamp(grid, fitting[0], corner, scene.background)
    return grid if found else None


@on_parts
def stamp_largest_box(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with what is in the box of the largest object completed, in any view, where the rest recurs."""
    k = int(objects.sizes[1:].argmax())
    grid, hidden = scene.grid.copy(), scene.grid.copy()
    hidden[objects.boxes[k]] = -2
    template = scene.grid[objects.boxes[k]]
    if not ((template != objects.colors[k + 1]) & (template != scene.background)).any():
        return None
    return grid if _stamp_markers(scene, grid, hidden, template, int(objects.colors[k + 1]), True) else None


@on_movers
def repeat_towards_hints(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the grid with the largest object repeated towards each other one, in its colour, up to the border."""
    if objects.count < 2 or objects.sizes.max() < 3:
        return None
    k = int(objects.sizes[1:].argmax())
    (top, bottom), (left, right) = ((side.start, side.stop) for side in objects.boxes[k])
    sides = np.array([bottom - top, right - left])
    grid = scene.grid.copy()
    for other, (rows, columns) in enumerate(objects.boxes, 1):
        if other == k + 1:
            continue
        way = np.array([_side(rows, objects.boxes[k][0]), _side(columns, objects.boxes[k][1])])
        template = np.where(objects.masks[k], objects.colors[other], -1)
        for copy in range(1, 1 + max(scene.shape) // int(sides.min() + 1) if way.any() else 0):
            _stamp(grid, template, np.array([top, left]) + copy * way * (sides + 1), scene.background)
    return grid


def _side(a: slice, b: slice) -> int:
    """Return -1 if a range lies before another, 1 if behind it, 0 if they overlap."""
    return int(a.start >= b.stop) - int(a.stop <= b.start)


@on_parts
def paste_into_solids(scene: Scene, objects: ObjectSet, turn: int) -> Grid | None:
    """Return the grid with a view of a many-coloured full object in place of each one-colour one of the same box."""
    full = [k for k in range(objects.count) if objects.masks[k].all() and objects.masks[k].size > 3]
    patterns = [k for k in full if len(np.unique(scene.grid[objects.boxes[k]])) > 1]
    grid = scene.grid.copy()
    for k in full:
        alike = [p for p in patterns if objects.masks[p].shape == objects.masks[k].shape]
        if k not in patterns and alike:
            grid[objects.boxes[k]] = VIEWS[turn](scene.grid[objects.boxes[alike[0]]])
    return grid if patterns else None


@on_parts
def share_fullest_shape(scene: Scene, objects: ObjectSet) -> Grid | None:
    """Return the objects with the box of the one with most holes in its shape, in their colours; others vanish."""
    holes = objects.holes[1:]
    if objects.count < 2 or holes.max() < 2:
        return None
    model = objects.masks[int(holes.argmax())]
    grid = np.full(scene.shape, scene.background)
    for color, box, mask in zip(objects.colors[1:], objects.boxes, objects.masks, strict=True):
        if mask.shape == model.shape:
            grid[box] = np.where(model, color, scene.background)
    return grid


@on_parts
def stamp_at_cells(scene: Scene, objects: ObjectSet, own_color: bool) -> Grid | None:
    """Return the grid with the largest object stamped around every single cell; `own_color`: in the cell's colour."""
    singles = np.flatnonzero(objects.sizes == 1)
    if not len(singles) or objects.sizes.max() < 3:
        return None
    k = int(objects.sizes[1:].argmax())
    template = np.where(objects.masks[k], scene.grid[objects.boxes[k]], -1)
    grid = scene.grid.copy()
    for single in singles:
        box = objects.boxes[single - 1]
        cell = np.array([box[0].start, box[1].start])
        stamp = np.where(template >= 0, objects.colors[single], -1) if own_color else template
        if not own_color:
            grid[tuple(cell)] = scene.background
        _stamp(grid, stamp, cell - (np.array(template.shape) - 1) // 2, scene.background)
    return grid


def _reflections(centre: np.ndarray, cells: np.ndarray, turns: bool) -> list[np.ndarray]:
    """Return the places [n, 2] of cells mirrored, or turned, about a centre (twice its coordinates)."""
    row, column = (2 * cells - centre).T
    first = [(column, -row), (-column, row)] if turns else [(row, -column), (-row, column)]
    return [(np.stack(image, 1) + centre) // 2 for image in (*first, (-row, -column))]


def _complete(scene: Scene, grid: Grid, cells: np.ndarray, centre: np.ndarray, turns: bool) -> None:
    """Write the reflections of cells about a centre on the background of `grid`, in place."""
    colors = scene.grid[cells[:, 0], cells[:, 1]]
    for image in _reflections(centre, cells, turns):
        _write(scene, grid, image, colors)


def _write(scene: Scene, grid: Grid, places: np.ndarray, colors: np.ndarray) -> None:
    """Write colours at those of the places [n, 2] that are background of `grid`, in place."""
    is_inside = ((places >= 0) & (places < scene.shape)).all(1)
    rows, columns = places[is_inside].T
    is_free = grid[rows, columns] == scene.background
    grid[rows[is_free], columns[is_free]] = colors[is_inside][is_free]


def _centre(grid: Grid, mask: np.ndarray) -> np.ndarray:
    """Return twice the centre of the rarest colour that mirrors itself both ways in a square, else that of the box."""
    counts = np.bincount(grid[mask], minlength=NUM_COLORS)
    colors = sorted(dict.fromkeys(grid[mask].tolist()), key=lambda color: counts[color])
    for color in colors if len(colors) > 1 else ():
        cells = mask & (grid == color)
        box = bounding_box(cells)
        part = cells[box]
        if part.shape[0] == part.shape[1] and (part == part[::-1]).all() and (part == part[:, ::-1]).all():
            return np.array([side.start + side.stop - 1 for side in box])
    return np.array(mask.shape) - 1


@on_movers
def complete_objects(scene: Scene, objects: ObjectSet, turns: bool) -> Grid:
    """Return the grid with every object mirrored or turned about its symmetric part, or its box's centre."""
    grid = scene.grid.copy()
    for k, (box, mask) in enumerate(zip(objects.boxes, objects.masks, strict=True), 1):
        if objects.sizes[k] < 3:
            continue
        corner = np.array([box[0].start, box[1].start])
        centre = _centre(scene.grid[box], mask) + 2 * corner
        if turns and centre.sum() % 2:
            continue
        _complete(scene, grid, np.argwhere(mask) + corner, centre, turns)
    return grid


@for_same_shape
def complete_about_cross(scene: Scene) -> Grid | None:
    """Return the grid with the foreground mirrored about the crossing of rows and columns that one colour nearly fills.

    The most frequent colour of which there are both is the cross.
    """
    for color in scene.by_frequency:
        is_color = scene.grid == color
        rows = np.flatnonzero(is_color.mean(1) > ALMOST_FULL)
        columns = np.flatnonzero(is_color.mean(0) > ALMOST_FULL)
        if len(rows) and len(columns):
            grid = scene.grid.copy()
            centre = np.array([rows[0] + rows[-1], columns[0] + columns[-1]])
            _complete(scene, grid, np.argwhere(scene.foreground), centre, False)
            return grid
    return None


# 9. Patterns ----------------------------------------------------------------------------------------------------------


@for_same_shape
def continue_diagonals(scene: Scene) -> Grid | None:
    """Return the grid filled with diagonal stripes of the shortest period that agrees with the foreground."""
    rows, columns = np.nonzero(scene.foreground)
    colors = scene.grid[rows, columns]
    row, column = np.indices(scene.shape)
    for period in range(2, 10):
        for sign in (1, -1):
            table = np.full(period, -1)
            place = (rows + sign * columns) % period
            table[place] = colors
            if (table >= 0).all() and (table[place] == colors).all():
                return table[(row + sign * column) % period]
    return None


@for_same_shape
def repeat_foreground(scene: Scene, axes: str) -> Grid | None:
    """Return the grid with the box of the foreground repeated along the "rows", the "columns", or "all" over."""
    box = scene.foreground_box
    if box is None or scene.grid[box].size > scene.grid.size / 2:
        return None
    part = scene.grid[box]
    rows = (np.arange(scene.shape[0]) - box[0].start) % part.shape[0]
    columns = (np.arange(scene.shape[1]) - box[1].start) % part.shape[1]
    tiled = part[rows[:, None], columns]
    if axes == "all":
        return tiled
    grid = np.full(scene.shape, scene.background)
    strip = (box[0], slice(None)) if axes == "rows" else (slice(None), box[1])
    grid[strip] = tiled[strip]
    return grid


# 10. Panels in place --------------------------------------------------------------------------------------------------


def on_panels_in_place(function: Callable[..., np.ndarray | None]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(panels, scene)` for new panels [n, h, w] and puts them in place."""

    @wraps(function)
    def hypothesis(scene: Scene, **parameters) -> Grid | None:
        found = scene.separators or _panels_on_ground(scene)
        if found is None:
            return None
        panels, keep_row, keep_column = found
        new = function(panels, scene, **parameters)
        if new is None:
            return None
        rows, columns = panels.layout
        h, w = panels.grids.shape[1:]
        joined = new.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)
        grid = scene.grid.copy()
        grid[np.ix_(keep_row, keep_column)] = joined
        return grid

    return for_same_shape(hypothesis)


def _panels_on_ground(scene: Scene) -> tuple[Panels, np.ndarray, np.ndarray] | None:
    """Return panels of equal size between full lines of background, and which rows and columns are not such lines."""
    keeps = scene.foreground.any(1), scene.foreground.any(0)
    runs = []
    for keep in keeps:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8))).tolist()
        runs.append([slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)])
        if len({run.stop - run.start for run in runs[-1]}) != 1:
            return None
    if len(runs[0]) * len(runs[1]) < 2:
        return None
    grids = np.stack([scene.grid[r, c] for r in runs[0] for c in runs[1]])
    return Panels(grids, (len(runs[0]), len(runs[1]))), *keeps


def _panel_ground(panels: Panels, scene: Scene) -> int:
    """Return the most common colour in panels, the first at ties."""
    return int(most_common(np.zeros(panels.grids.size, np.int64), panels.grids.ravel(), 1)[0])


@on_panels_in_place
def link_panels(panels: Panels, scene: Scene, axes: str) -> np.ndarray:
    """Return panels in which equal colours at the same place of two panels in a row or column are joined.

    Of `axes` "rows", "columns", "both" and "marked" the last marks where different colours cross.
    """
    cells = panels.grids.reshape(*panels.layout, *panels.grids.shape[1:])
    return _linked(cells, _panel_ground(panels, scene), axes).reshape(panels.grids.shape)


@for_same_shape
def link_rooms(scene: Scene) -> Grid | None:
    """Return the rooms between full lines in their commonest colour, equal ones joined, where others cross marked.

    The lines have the colour that most full rows and columns have; rooms may differ in size.
    """
    grid = scene.grid
    is_row, is_column = (grid == grid[:, :1]).all(1), (grid == grid[:1]).all(0)
    ends = np.concatenate([grid[is_row, 0], grid[0, is_column]])
    if not len(ends):
        return None
    wall = int(most_common(np.zeros_like(ends), ends, 1)[0])
    if wall == scene.background:
        return None
    walls = is_row & (grid[:, 0] == wall), is_column & (grid[0] == wall)
    row, column = (wall_line.cumsum() for wall_line in walls)
    shape = int(row[-1]) + 1, int(column[-1]) + 1
    inside = ~walls[0][:, None] & ~walls[1]
    if shape[0] * shape[1] < 4 or not inside.any():
        return None
    index = row[:, None] * shape[1] + column
    ground = int(most_common(np.zeros(inside.sum(), np.int64), grid[inside], 1)[0])
    is_set = inside & (grid != ground)
    colors = most_common(index[is_set], grid[is_set], shape[0] * shape[1])
    linked = _linked(np.where(colors < 0, ground, colors).reshape(shape), ground, "marked")
    return np.where(inside, linked.ravel()[index], grid)


def _linked(cells: np.ndarray, ground: int, axes: str) -> np.ndarray:
    """Return cells in which equal colours along the first or second axis are joined."""
    links = []
    for axis in {"rows": (1,), "columns": (0,)}.get(axes, (1, 0)):
        line = np.moveaxis(cells, axis, 0)
        before, after = _hits(line, ground), _hits(line[::-1], ground)[::-1]
        is_between = (line == ground) & (before == after) & (before >= 0)
        links.append(np.moveaxis(np.where(is_between, before, -1), 0, axis))
    result = cells
    for link in links:
        result = np.where(link >= 0, link, result)
    if axes == "marked":
        result = np.where((links[0] >= 0) & (links[1] >= 0) & (links[0] != links[1]), MARK, result)
    return result


def _hits(lines: np.ndarray, ground: int) -> np.ndarray:
    """Return the last colour other than `ground` before each cell along axis 0, -1 if there is none."""
    place = np.arange(len(lines)).reshape(-1, *([1] * (lines.ndim - 1)))
    last = np.maximum.accumulate(np.where(lines != ground, place + 1, 0), 0)
    last = np.concatenate([np.zeros_like(last[:1]), last[:-1]])
    padded = np.concatenate([np.full_like(lines[:1], -1), lines])
    return np.take_along_axis(padded, last, 0)


@on_panels_in_place
def merge_panels(panels: Panels, scene: Scene) -> np.ndarray:
    """Return every panel with its ground filled from the other panels."""
    ground = _panel_ground(panels, scene)
    top = (panels.grids != ground).argmax(0)
    merged = np.take_along_axis(panels.grids, top[None], 0)
    return np.where(panels.grids == ground, merged, panels.grids)


@on_panels_in_place
def copy_fullest_panel(panels: Panels, scene: Scene) -> np.ndarray:
    """Return the fullest panel in place of every panel."""
    filled = (panels.grids != _panel_ground(panels, scene)).sum((1, 2))
    return np.broadcast_to(panels.grids[int(filled.argmax())], panels.grids.shape)


@on_panels_in_place
def mark_full_panels(panels: Panels, scene: Scene) -> np.ndarray:
    """Return panels whose cells are marks of their foreground's size rank, 0 the fullest."""
    filled = (panels.grids != _panel_ground(panels, scene)).sum((1, 2))
    rank = np.unique(-filled, return_inverse=True)[1]
    return np.broadcast_to(_number(rank)[:, None, None], panels.grids.shape)


# 11. The bank ---------------------------------------------------------------------------------------------------------


def _layers(family: str, function: Callable, table: dict[str, dict]) -> list[Layer]:
    """Return a layer for every name of a table of parameters."""
    return [Layer(name, family, partial(function, **parameters)) for name, parameters in table.items()]


TRAITS = (
    ("copies of their shape", "shape_repeats", "one-colour object"),
    ("objects of their colour", "color_repeats", "one-colour object"),
    ("mirror symmetry", "symmetry", "one-colour object"),
    ("height", "heights", "one-colour object"),
    ("other cells in their box", "others_in_box", "object"),
)
BOTH = ("one-colour object", "object")


def _per_kind(family: str, function: Callable, name: str, kinds: tuple[str, ...] = BOTH, **parameters) -> list[Layer]:
    """Return a layer for every kind of parts; `name` has a {} for the kind."""
    return _layers(family, function, {name.format(kind): {"kind": kind, **parameters} for kind in kinds})


def _region_layers() -> Iterator[Layer]:
    yield Layer("size of each background region", "region", mark_region_sizes)
    yield Layer("largest and smallest background regions", "regionrank", mark_region_extremes)
    yield Layer("form of each background region", "regionform", mark_region_forms)
    yield Layer("parity of each hole", "parity", mark_hole_parity)
    yield Layer("holes at the edge", "outerhole", mark_outer_holes)
    yield Layer("borders of each background region", "regionborder", mark_region_borders)
    yield Layer("fill regions from their seeds", "seed", fill_from_seeds)
    yield from _layers("wall", fill_between_walls, {
        "fill between walls": {"closed": False},
        "fill inside walls": {"closed": True},
    })  # fmt: skip


def _distance_layers() -> Iterator[Layer]:
    yield Layer("depth in one-colour objects", "depth", mark_object_depth)
    yield from _layers("nearest", spread_nearest, {
        "nearest foreground": {"diagonal": True},
        "nearest foreground, in straight steps": {"diagonal": False},
    })  # fmt: skip
    yield from _layers("nearrings", spread_rings, {
        "rings around the foreground": {"diagonal": True},
        "rings around the foreground, in straight steps": {"diagonal": False},
    })  # fmt: skip
    yield from _layers("distance", mark_distance, {
        "distance to the foreground": {"diagonal": True},
        "distance to the foreground, in straight steps": {"diagonal": False},
    })  # fmt: skip
    yield from _layers("nearline", spread_lines, {"nearest row": {"axis": 0}, "nearest column": {"axis": 1}})
    yield from _layers("halfway", meet_halfway, {
        "meet halfway in rows": {"axis": 0},
        "meet halfway in columns": {"axis": 1},
    })  # fmt: skip
    names = ("left", "right", "upper", "lower")
    yield from _layers(
        "lineend", line_ends, {f"colour at the {n} border": {"direction": d} for d, n in enumerate(names)}
    )
    yield from _layers("outermost", first_in_line, {
        f"foreground in its {n}most colour": {"direction": d} for d, n in enumerate(names)
    })  # fmt: skip


def _trait_layers() -> Iterator[Layer]:
    for noun, trait, kind in TRAITS:
        yield from _layers("extremes", partial(mark_trait_extremes, kind=kind, trait=trait), {
            f"mark {kind}s with {amount} {noun}": {"most": most} for amount, most in (("most", True), ("least", False))
        })  # fmt: skip
    yield Layer("odd cells of each object", "odd", partial(mark_odd_cells, kind="one-colour object"))
    yield Layer("mark blocks of one or two cells", "specks", partial(mark_specks, kind="block"))
    yield Layer("halves of each one-colour object", "half", partial(mark_halves, kind="one-colour object"))
    yield Layer("parities in each one-colour object", "boxparity", partial(mark_box_parity, kind="one-colour object"))
    yield Layer("box edges of each one-colour object", "boxedge", partial(mark_box_edges, kind="one-colour object"))
    yield Layer("outline of each object of several cells", "outlinesize", partial(outline_several, kind="block"))
    yield Layer("width of each one-colour object", "width", partial(mark_widths, kind="one-colour object"))
    yield Layer("form of each one-colour object", "form", partial(mark_forms, kind="one-colour object"))
    yield Layer("ends of each one-colour object", "ends", partial(mark_ends, kind="one-colour object"))
    yield Layer("corners of each one-colour object", "corners", partial(mark_corners, kind="one-colour object"))
    yield Layer("minority cells of each object", "minority", partial(mark_minority, kind="object"))
    yield from _per_kind("outlinesize", outline_by_size, "outline by size of each {}")
    yield from _layers("outlinecolor", outline_in_color, {
        "outline in colour": {"diagonal": False},
        "outline with corners in colour": {"diagonal": True},
    })  # fmt: skip
    yield Layer("frame around each object", "framing", partial(frame_objects, kind="one-colour object"))
    yield from _layers("framing", frame_rarest, {
        "frame on the box of the rarest colour": {"grow": 0},
        "frame inside the box of the rarest colour": {"grow": -1},
    })  # fmt: skip
    yield Layer("boxes of the rarest colour", "rarestbox", mark_rarest_boxes)
    yield Layer("size of each block", "block", mark_block_sizes)
    yield Layer("largest and smallest blocks", "blockrank", mark_block_extremes)
    yield from _layers("square", mark_squares, {
        "squares of side 2 of foreground": {"side": 2, "ground": False},
        "squares of side 3 of foreground": {"side": 3, "ground": False},
        "squares of side 2 of background": {"side": 2, "ground": True},
        "squares of side 3 of background": {"side": 3, "ground": True},
    })  # fmt: skip
    yield from _layers("square", mark_one_color_squares, {
        f"squares of side {side} of one colour": {"side": side} for side in (3, 4)
    })  # fmt: skip
    yield from _layers("plus", mark_pluses, {
        "pluses of foreground": {"ground": False},
        "pluses of background": {"ground": True},
    })  # fmt: skip
    yield from _layers("rectangle", mark_largest_rectangle, {
        "largest rectangle of foreground": {"ground": False},
        "largest rectangle of background": {"ground": True},
    })  # fmt: skip


def _color_layers() -> Iterator[Layer]:
    yield Layer(
        "colour of the object of the same shape", "sameshape", partial(color_of_same_shape, kind="one-colour object")
    )
    yield Layer("colour of the nearest object", "nearcolor", partial(color_of_nearest, kind="block", keep=True))
    yield Layer(
        "colour of the nearest object, which vanishes", "nearcolor", partial(color_of_nearest, kind="block", keep=False)
    )
    yield Layer("fill the box of each colour", "boxes", fill_color_boxes)
    yield Layer("boxes by the legend", "legend", box_by_legend)


def _motion_layers() -> Iterator[Layer]:
    for direction, name in enumerate(("left", "right", "up", "down")):
        yield Layer(f"move each block {name} until contact", "fall", partial(fall, kind="block", direction=direction))
    yield Layer("move each block to the bar", "bar", partial(fall_to_bar, kind="block"))
    yield Layer("trail of each block to the largest", "trail", partial(trail_to_largest, kind="block"))
    yield Layer("move each object to its colour", "homing", partial(approach_own_color, kind="one-colour object"))
    for direction, name in enumerate(("left", "right", "up", "down")):
        yield Layer(
            f"move each object {name} by its size",
            "stride",
            partial(move_by_size, kind="one-colour object", direction=direction),
        )
    yield Layer("turn each object by a quarter", "turn", partial(turn_objects, kind="block"))
    yield Layer("centre the largest object", "centre", partial(centre_largest, kind="one-colour object"))
    yield from _layers("gather", partial(gather, kind="one-colour object"), {
        "gather cells": {"anchor": "nearest", "unaligned": "move"},
        "gather aligned cells": {"anchor": "nearest", "unaligned": "stay"},
        "gather aligned cells at the largest": {"anchor": "largest", "unaligned": "vanish"},
        "gather aligned cells at their colour": {"anchor": "own", "unaligned": "vanish"},
    })  # fmt: skip


def _line_layers() -> Iterator[Layer]:
    yield Layer("ray from each odd cell", "tip", partial(shoot_tips, kind="object", backward=False))
    yield Layer("ray from each odd cell across", "tip", partial(shoot_tips, kind="object", backward=True))
    yield Layer("join the rarest colour", "join", join_rarest)
    yield Layer("join the rarest colour and what is between", "join", join_rarest_touching)
    yield Layer("cross through squares", "crossing", cross_through_squares)
    yield from _layers("emptiest", mark_emptiest_lines, {"emptiest rows": {"axis": 0}, "emptiest columns": {"axis": 1}})
    yield Layer("stripes", "stripes", smooth_stripes)
    for color in range(NUM_COLORS):
        yield Layer(f"elbow that leaves colour {color} vertically", "elbow", partial(join_by_elbow, color=color))
    for direction, name in enumerate(("left", "right", "up", "down")):
        yield Layer(f"bounce {name}", "bounce", partial(bounce, direction=direction))
    yield Layer("diamonds on lines", "diamond", partial(draw_diamonds, kind="one-colour object"))
    yield Layer("rectangle to the nearest corner", "cornerbox", fill_to_corner)


def _pattern_layers() -> Iterator[Layer]:
    yield from _per_kind("stamp", stamp_at_markers, "complete each {} at markers", ("object", "cluster"), keep=True)
    yield Layer("move each object to markers", "stamp", partial(stamp_at_markers, kind="object", keep=False))
    yield Layer("copy objects to single cells", "stamp", partial(stamp_at_color, kind="object"))
    yield Layer("complete the largest box at markers", "stamp", partial(stamp_largest_box, kind="one-colour object"))
    yield Layer(
        "repeat the largest object towards others", "hint", partial(repeat_towards_hints, kind="one-colour object")
    )
    for turn, name in enumerate(("", " mirrored left-right", " mirrored top-bottom", " turned by half")):
        yield Layer(f"paste into solids{name}", "paste", partial(paste_into_solids, kind="object", turn=turn))
    yield Layer("share the shape with most holes", "share", partial(share_fullest_shape, kind="one-colour object"))
    yield from _per_kind("copy", stamp_at_cells, "copy the largest {} to cells", ("loose object",), own_color=False)
    yield from _per_kind(
        "copy", stamp_at_cells, "copy the largest {} to cells in their colour", ("loose object",), own_color=True
    )
    yield from _layers("flip", partial(flip_objects, kind=0), {
        "mirror each one-colour object left-right": {"index": 1},
        "mirror each one-colour object top-bottom": {"index": 2},
    })  # fmt: skip
    yield from _layers("complete", partial(complete_objects, kind="object"), {
        "complete each object by both mirrors": {"turns": False},
        "complete each object by quarter turns": {"turns": True},
    })  # fmt: skip
    yield Layer("complete about the cross", "cross", complete_about_cross)
    yield Layer("continue the diagonals", "diagonal", continue_diagonals)
    yield from _layers("repeat", repeat_foreground, {
        "repeat the foreground all over": {"axes": "all"},
        "repeat the foreground along rows": {"axes": "rows"},
        "repeat the foreground along columns": {"axes": "columns"},
    })  # fmt: skip


def _panel_layers() -> Iterator[Layer]:
    yield from _layers("panellink", link_panels, {
        "link panels in rows": {"axes": "rows"},
        "link panels in columns": {"axes": "columns"},
        "link panels in rows and columns": {"axes": "both"},
    })  # fmt: skip
    yield Layer("link rooms", "panellink", link_rooms)
    yield Layer("merge panels", "panelmerge", merge_panels)
    yield Layer("copy the fullest panel", "panelmerge", copy_fullest_panel)
    yield Layer("rank of each panel", "panelrank", mark_full_panels)


MOTION_LAYERS: tuple[Layer, ...] = (
    *_region_layers(),
    *_distance_layers(),
    *_trait_layers(),
    *_color_layers(),
    *_motion_layers(),
    *_line_layers(),
    *_pattern_layers(),
    *_panel_layers(),
)
assert len({layer.name for layer in MOTION_LAYERS}) == len(MOTION_LAYERS), "names of layers must differ"
