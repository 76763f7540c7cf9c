"""More hypotheses about outputs of another size than the input: panels, parts, layouts, bars, tilings, extensions.

Imports numpy and grid_hypotheses; used by demo_prior beside the bank of grid_hypotheses. The conventions are the same:
symbols are colours or marks, ties go to what comes first in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, wraps

import numpy as np

from grid_hypotheses import (
    MARK,
    MAX_OBJECTS,
    VIEWS,
    Box,
    Grid,
    Layer,
    ObjectSet,
    Scene,
    Shape,
    _layers,
    _per_kind,
    bounding_box,
    count_in_panels,
    enlarge_cells,
    for_other_shape,
    if_it_fits,
    label,
    most_common,
    on_panels,
)

MAX_LISTED = 30  # cells or objects that are listed one by one


# 1. Panels ------------------------------------------------------------------------------------------------------------


def _num_colors(grids: np.ndarray) -> np.ndarray:
    """Return how many colours each of the grids [n, h, w] has."""
    cells = np.sort(grids.reshape(len(grids), -1), 1)
    return 1 + (cells[:, 1:] != cells[:, :-1]).sum(1)


def _num_symmetries(grids: np.ndarray) -> np.ndarray:
    """Return how many of its views each of the grids [n, h, w] equals."""
    height, width = grids.shape[1:]
    views = VIEWS if height == width else VIEWS[:4]
    return sum((np.stack([turned(grid) for grid in grids]) == grids).all((1, 2)) for turned in views)


PANEL_TRAITS = {"colours": _num_colors, "symmetry": _num_symmetries}


@on_panels
def extreme_panel(panels: np.ndarray, background: int, trait: str, most: bool) -> Grid:
    """Return the first panel with the most or least of a trait."""
    values = PANEL_TRAITS[trait](panels)
    return panels[int(values.argmax() if most else values.argmin())]


@on_panels
def odd_shaped_panel(panels: np.ndarray, background: int) -> Grid:
    """Return the first panel whose foreground, colours aside, has the fewest equals."""
    masks = panels != background
    return panels[int((masks[:, None] == masks).all((2, 3)).sum(1).argmin())]


@on_panels
def combine_four_panels(panels: np.ndarray, background: int) -> Grid | None:
    """Return a mark for the set of four panels that have foreground in a cell."""
    if len(panels) != 4:
        return None
    return MARK + ((panels != background).astype(np.int64) << np.arange(4)[:, None, None]).sum(0)


@for_other_shape
def fold_panels(scene: Scene, shape: Shape) -> Grid | None:
    """Return the panels of up to two rows and columns laid upon each other, mirrored about the lines between them."""
    panels = scene.panels(shape)
    if panels is None or panels.grids.shape[1:] != shape or max(panels.layout) > 2:
        return None
    grid = np.full(shape, scene.background)
    for index, panel in enumerate(panels.grids):
        row, column = divmod(index, panels.layout[1])
        folded = VIEWS[2 * row + column](panel)
        grid = np.where(grid == scene.background, folded, grid)
    return grid


@for_other_shape
def panel_in_panel(scene: Scene, shape: Shape, around: int, recolored: bool) -> Grid | None:
    """Return one of the first two panels, made smaller if needed, at each foreground cell of panel `around`.

    The copies are in their own colours or, if `recolored`, in that of the cell they stand for.
    """
    if scene.separators is None or len(scene.separators[0].grids) < 2:
        return None
    cells, copied = scene.separators[0].grids[around], scene.separators[0].grids[1 - around]
    (height, width), (h, w) = cells.shape, shape
    if h % height or w % width or h * w == height * width:
        return None
    small = shrink(copied, (h // height, w // width), scene.background)
    if small is None:
        return None
    blocks = cells[np.arange(h)[:, None] // (h // height), np.arange(w) // (w // width)]
    copies = np.tile(small, cells.shape)
    is_set = (blocks != scene.background) & (copies != scene.background)
    return np.where(is_set, blocks if recolored else copies, scene.background)


def on_any_layout(function: Callable[..., np.ndarray]) -> Callable[..., Grid | None]:
    """Return a hypothesis that asks `function(panels, background)` for one symbol per panel, also for square panels."""

    @wraps(function)
    def hypothesis(scene: Scene, shape: Shape) -> Grid | None:
        panels = scene.panels(shape) if shape != scene.shape else None
        if panels is None or panels.layout != shape:
            return None
        return function(panels.grids, scene.background).reshape(shape)

    return hypothesis


@on_any_layout
def fullest_panels(panels: np.ndarray, background: int) -> np.ndarray:
    """Return a mark per panel: whether it has the most foreground."""
    cells = (panels != background).sum((1, 2))
    return MARK + (cells == cells.max())


@on_any_layout
def panel_foregrounds(panels: np.ndarray, background: int) -> np.ndarray:
    """Return the most common foreground colour of every panel, the background where there is none."""
    is_foreground = panels != background
    best = most_common(is_foreground.nonzero()[0], panels[is_foreground], len(panels))
    return np.where(best < 0, background, best)


@lru_cache(maxsize=8)
def compartments(scene: Scene) -> list[tuple[list[Box], list[int]]]:
    """Return for each of the two most frequent colours the boxes of the regions that it encloses, and odd colours.

    The odd colour of a region is its rarest, the first of equals in reading order.
    """
    found = []
    for wall in sorted(scene.reading_order, key=lambda color: -scene.counts[color])[:2]:
        labels, count = label(scene.grid, scene.grid != wall, False, False)
        at_border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])).tolist()
        inner = [k for k in range(1, count + 1) if k not in at_border] if count <= MAX_OBJECTS else []
        masks = [labels == k for k in inner]
        odd = [min(dict.fromkeys(cells := scene.grid[mask].tolist()), key=cells.count) for mask in masks]
        found.append(([bounding_box(mask) for mask in masks], odd))
    return found


@for_other_shape
def compartment_colors(scene: Scene, shape: Shape) -> Grid | None:
    """Return the odd colour of each region enclosed by one colour, in their layout."""
    if not 1 < shape[0] * shape[1] <= MAX_OBJECTS:
        return None
    for boxes, colors in compartments(scene):
        if len(boxes) == shape[0] * shape[1]:
            return _laid_out(np.array(colors), boxes, shape, scene.background)
    return None


# 2. Parts made smaller ------------------------------------------------------------------------------------------------


def shrink(grid: Grid, shape: Shape, background: int | None = None) -> Grid | None:
    """Return the most common colour of each of equal parts; with a background, its foreground colour if it has any."""
    (height, width), (h, w) = grid.shape, shape
    if h > height or w > width:
        return None
    groups = (np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width
    if background is None:
        return most_common(groups, grid, h * w).reshape(shape)
    seen = grid != background
    best = most_common(groups[seen], grid[seen], h * w)
    return np.where(best < 0, background, best).reshape(shape)


@for_other_shape
def shrink_grid(scene: Scene, shape: Shape, foreground: bool) -> Grid | None:
    """Return the most common (foreground) colour of each of equal parts of the grid."""
    return shrink(scene.grid, shape, scene.background if foreground else None)


@for_other_shape
def count_in_parts(scene: Scene, shape: Shape) -> Grid | None:
    """Return a mark for each of equal parts: its foreground cells (at most 15)."""
    (height, width), (h, w) = scene.shape, shape
    if h > height or w > width:
        return None
    starts = [-(-np.arange(n) * side // n) for n, side in zip(shape, scene.shape, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(scene.foreground.astype(np.int64), starts[0], 0), starts[1], 1)
    return MARK + np.minimum(sums, 15)


@lru_cache(maxsize=8)
def solids(scene: Scene) -> tuple[np.ndarray, int]:
    """Return component numbers [H, W] of the foreground that lies in one-colour squares of 3 x 3 cells; their count.

    Where there is none, of the background that does: in noise the most frequent colour may be that of an object.
    """
    grid, cells = scene.grid, np.zeros(scene.shape, bool)
    if min(scene.shape) < 3:
        return cells.astype(np.int64), 0
    beside, below = grid[:, 1:] == grid[:, :-1], grid[1:] == grid[:-1]
    triples = beside[:, 1:] & beside[:, :-1]
    squares = triples[:-2] & triples[1:-1] & triples[2:] & (below[:-1] & below[1:])[:, :-2]
    if (squares & scene.foreground[:-2, :-2]).any():
        squares &= scene.foreground[:-2, :-2]
    height, width = squares.shape
    for row in range(3):
        for column in range(3):
            cells[row : row + height, column : column + width] |= squares
    return label(grid, cells, False, True)


def _solid_box(scene: Scene) -> tuple[Box, int] | None:
    """Return the box of the solid cells of the colour that has most of them, and that colour."""
    labels, count = solids(scene)
    if not count:
        return None
    colors = scene.grid[labels > 0]
    color = int(most_common(np.zeros(len(colors), np.int64), colors, 1)[0])
    return bounding_box((labels > 0) & (scene.grid == color)), color


@for_other_shape
def shrink_solids(scene: Scene, shape: Shape, recolored: bool) -> Grid | None:
    """Return the box of the solid cells, made smaller; if `recolored`, in the colour of the other foreground."""
    found = _solid_box(scene)
    if found is None:
        return None
    box, color = found
    small = shrink(scene.grid[box], shape)
    if small is None or not recolored:
        return small
    others = [other for other in scene.by_frequency if other != color]
    return np.where(small == color, others[0], scene.background) if others else None


@if_it_fits
def crop_solids(scene: Scene, crossed: bool) -> Grid | None:
    """Return the box of the solid cells; `crossed`: other cells in it are drawn out to rows and columns."""
    found = _solid_box(scene)
    if found is None or not crossed:
        return found and scene.grid[found[0]]
    part = scene.grid[found[0]]
    is_odd = part != found[1]
    if not is_odd.any():
        return part
    lines = is_odd.any(1, keepdims=True) | is_odd.any(0)
    return np.where(lines, part[is_odd][0], part)


@for_other_shape
def shrink_foreground(scene: Scene, shape: Shape) -> Grid | None:
    """Return the box of the foreground, made smaller."""
    return None if scene.foreground_box is None else shrink(scene.grid[scene.foreground_box], shape)


@for_other_shape
def shrunk_in_itself(scene: Scene, shape: Shape) -> Grid | None:
    """Return the box of the foreground, made smaller and copied at each of its own foreground cells."""
    side = math.isqrt(shape[0])
    if scene.foreground_box is None or shape != (side * side, side * side):
        return None
    small = shrink(scene.grid[scene.foreground_box], (side, side))
    if small is None:
        return None
    mask = np.kron(small != scene.background, np.ones((side, side), np.int64)) > 0
    return np.where(mask, np.tile(small, (side, side)), scene.background)


@for_other_shape
def small_where_large(scene: Scene, shape: Shape) -> Grid | None:
    """Return the object of the wanted shape with most colours, where the largest object, made smaller, is set."""
    objects = scene.objects[1]
    if not objects.is_usable or objects.count < 2:
        return None
    fitting = _fitting(objects, shape)
    if not fitting:
        return None
    small = max(fitting, key=lambda k: objects.num_box_colors[k])
    large = int(objects.sizes.argmax())
    mask = None if large == small else shrink(objects.masks[large - 1].astype(np.int64), shape)
    if mask is None:
        return None
    return np.where(mask > 0, scene.grid[objects.boxes[small - 1]], scene.background)


# 3. Objects and cells in an order -------------------------------------------------------------------------------------


def clusters(positions: Sequence[float], count: int) -> np.ndarray | None:
    """Return for each position the number of its cluster; the widest gaps, the first of equals, divide `count`."""
    values = np.unique(positions)
    if len(values) < count:
        return None
    widest = np.argsort(values[:-1] - values[1:], kind="stable")[: count - 1]
    bounds = np.sort(values[widest])
    return np.searchsorted(bounds, positions, side="left")


def places(boxes: list[Box], layout: Shape) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the row and column of each box in a layout, None if two would share a place.

    A layout without gaps is filled row by row, others are divided at the widest gaps.
    """
    middles = [np.array([box[axis].start + box[axis].stop for box in boxes]) for axis in (0, 1)]
    if len(boxes) == layout[0] * layout[1]:
        rows = np.argsort(np.argsort(middles[0], kind="stable"), kind="stable") // layout[1]
        place = np.argsort(np.lexsort((middles[1], rows)), kind="stable")
        return rows, place % layout[1]
    found = [clusters(middle, count) for middle, count in zip(middles, layout, strict=True)]
    if found[0] is None or found[1] is None:
        return None
    rows, columns = found
    if len(set((rows * layout[1] + columns).tolist())) < len(boxes):
        return None
    return rows, columns


def _laid_out(colors: np.ndarray, boxes: list[Box], shape: Shape, background: int) -> Grid | None:
    found = places(boxes, shape) if 1 < len(boxes) <= shape[0] * shape[1] else None
    if found is None:
        return None
    grid = np.full(shape, background)
    grid[found] = colors
    return grid


@for_other_shape
def lay_out_objects(scene: Scene, shape: Shape, margin: int) -> Grid | None:
    """Return one cell in its most common colour for each object, where it lies among the others, in a margin."""
    objects = scene.objects[1]
    layout = (shape[0] - 2 * margin, shape[1] - 2 * margin)
    if not objects.is_usable or min(layout) < 1:
        return None
    found = _laid_out(objects.colors[1:], objects.boxes, layout, scene.background)
    return None if found is None else np.pad(found, margin, constant_values=scene.background)


@for_other_shape
def lay_out_regions(scene: Scene, shape: Shape, solid: bool) -> Grid | None:
    """Return one cell for each 4-connected one-colour region or each solid, where it lies among the others."""
    if solid:
        labels, count = solids(scene)
    elif 1 < scene.objects[0].count <= min(shape[0] * shape[1], MAX_OBJECTS):
        labels, count = label(scene.grid, scene.foreground, False, True)
    else:
        return None
    if not 1 < count <= min(shape[0] * shape[1], MAX_OBJECTS):
        return None
    masks = [labels == k for k in range(1, count + 1)]
    colors = np.array([scene.grid[mask][0] for mask in masks])
    return _laid_out(colors, [bounding_box(mask) for mask in masks], shape, scene.background)


@for_other_shape
def pack_objects(scene: Scene, shape: Shape, kind: int, gap: int) -> Grid | None:
    """Return the objects, all of one height and width, moved together where they lie among each other."""
    objects = scene.objects[kind]
    if not objects.is_usable or objects.count < 2:
        return None
    height, width = objects.masks[0].shape
    rows, columns = (shape[0] + gap) // (height + gap), (shape[1] + gap) // (width + gap)
    if shape != (rows * (height + gap) - gap, columns * (width + gap) - gap) or rows * columns < objects.count:
        return None
    if any(mask.shape != (height, width) for mask in objects.masks):
        return None
    found = places(objects.boxes, (rows, columns))
    if found is None:
        return None
    grid = np.full(shape, scene.background)
    for row, column, box in zip(*found, objects.boxes, strict=True):
        top, left = row * (height + gap), column * (width + gap)
        grid[top : top + height, left : left + width] = scene.grid[box]
    return grid


@for_other_shape
def largest_in_colors(scene: Scene, shape: Shape) -> Grid | None:
    """Return the largest object side by side in the colours of the other objects, from left to right or downwards."""
    objects = scene.objects[0]
    if not objects.is_usable or objects.count < 2:
        return None
    largest = int(objects.sizes.argmax())
    mask = objects.masks[largest - 1]
    count = objects.count - 1
    axis = next((axis for axis in (0, 1) if shape == _stacked_shape(mask.shape, count, axis)), None)
    if axis is None:
        return None
    others = [k for k in np.argsort(objects.order(axis), kind="stable").tolist() if k not in (0, largest)]
    copies = [np.where(mask, objects.colors[k], scene.background) for k in others]
    return np.concatenate(copies, axis)


def _stacked_shape(shape: Shape, count: int, axis: int) -> Shape:
    return (shape[0] * count, shape[1]) if axis == 0 else (shape[0], shape[1] * count)


@for_other_shape
def list_objects(scene: Scene, shape: Shape, axis: int, snake: bool) -> Grid | None:
    """Return one cell for each object, from top to bottom (axis 0) or left to right (1); `snake`: rows by turns."""
    objects = scene.objects[0]
    cells = shape[0] * shape[1]
    if not objects.is_usable or not 1 < objects.count <= cells <= MAX_LISTED:
        return None
    ordered = objects.colors[1:][np.argsort(objects.order(axis)[1:], kind="stable")]
    grid = np.concatenate([ordered, np.full(cells - len(ordered), scene.background)]).reshape(shape)
    if snake:
        grid[1::2] = grid[1::2, ::-1]
    return grid


def line_stripes(scene: Scene, shape: Shape) -> Grid | None:
    """Return a row or column for each one-cell-wide line, in order, the commoner direction alone, repeats dropped."""
    objects = scene.objects[0]
    if not objects.is_usable or objects.count < 2:
        return None
    lines = [[k for k, m in enumerate(objects.masks) if m.shape[a] == 1 < m.shape[1 - a]] for a in (0, 1)]
    axis = int(len(lines[1]) > len(lines[0]))
    ordered = sorted(lines[axis], key=lambda k: objects.boxes[k][axis].start)
    colors = objects.colors[1:][ordered]
    colors = colors[np.concatenate([[True], colors[1:] != colors[:-1]])] if len(colors) else colors
    if len(colors) != shape[axis] or len(colors) < 2:
        return None
    return np.broadcast_to(colors[:, None] if axis == 0 else colors, shape)


# 4. Bars, rings, tallies ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _measures(scene: Scene) -> tuple[list[int], dict[str, list[int]]]:
    """Return the foreground colours in reading order without those of full lines, and measures of each."""
    grid = scene.grid
    full = {scene.background, *grid[(grid == grid[:, :1]).all(1), 0].tolist()}
    full.update(grid[0, (grid == grid[:1]).all(0)].tolist())
    colors = [color for color in scene.reading_order if color not in full]
    objects = scene.objects[0]
    repeats = np.bincount(objects.colors[1:], minlength=10).tolist()
    boxes = [scene.color_boxes[color] for color in colors]
    return colors, {
        "objects": [repeats[color] for color in colors],
        "cells": [int(scene.counts[color]) for color in colors],
        "columns": [box[1].stop - box[1].start for box in boxes],
        "rows": [box[0].stop - box[0].start for box in boxes],
    }


@for_other_shape
def bars(scene: Scene, shape: Shape, measure: str, ascending: bool, axis: int, at_end: bool) -> Grid | None:
    """Return a row (axis 0) or column (1) per colour, as long as a measure of it says, sorted by length."""
    if not 1 < shape[axis] <= 9 or len(scene.by_frequency) < shape[axis]:
        return None
    colors, measures = _measures(scene)
    lengths = measures[measure]
    if len(colors) != shape[axis] or max(lengths) != shape[1 - axis]:
        return None
    lengths = np.array(lengths)
    order = np.argsort(lengths if ascending else -lengths, kind="stable")
    cells = np.arange(shape[1 - axis])
    is_set = (cells[::-1] if at_end else cells) < lengths[order][:, None]
    grid = np.where(is_set, np.array(colors)[order][:, None], scene.background)
    return grid if axis == 0 else grid.T


def color_rings(scene: Scene, shape: Shape, by: str) -> Grid | None:
    """Return rings in the foreground colours, outside the most frequent, the rarest or that of the largest box."""
    count = (min(shape) + 1) // 2
    if not 1 < count <= 9 or len(scene.by_frequency) != count:
        return None
    colors = scene.by_frequency[::-1] if by == "rarity" else scene.by_frequency
    if by == "box":
        colors = sorted(scene.by_frequency, key=lambda color: -scene.grid[scene.color_boxes[color]].size)
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in shape)
    return np.array(colors)[np.minimum(rows[:, None], columns)]


def tally_every_other(scene: Scene, shape: Shape) -> Grid | None:
    """Return a marked cell for each 4-connected one-colour region, on every other cell in reading order."""
    cells = shape[0] * shape[1]
    if not 2 < cells <= MAX_LISTED or not scene.objects[0].is_usable:
        return None
    _, count = label(scene.grid, scene.foreground, False, True)
    index = np.arange(cells)
    return MARK + ((index % 2 == 0) & (index // 2 < count)).astype(np.int64).reshape(shape)


# 5. Tilings and extensions --------------------------------------------------------------------------------------------


enlarge = enlarge_cells.__wrapped__  # also by a factor of one, where other demonstrations are enlarged


@for_other_shape
def enlarge_with_diagonals(scene: Scene, shape: Shape, rising: bool) -> Grid | None:
    """Return the enlarged grid with marks on the diagonals that run outward from the corners of the largest squares."""
    grid = enlarge(scene, shape)
    if grid is None or not scene.objects[0].is_usable:
        return None
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    tall, wide = shape[0] // scene.shape[0], shape[1] // scene.shape[1]
    hit = np.zeros(shape, bool)
    objects = scene.objects[0]
    squares = [k for k, mask in enumerate(objects.masks) if mask.shape[0] == mask.shape[1] and mask.all()]
    side = max((objects.masks[k].shape[0] for k in squares), default=0)
    for box in (objects.boxes[k] for k in squares if objects.masks[k].shape[0] == side):
        top, bottom = box[0].start * tall, box[0].stop * tall - 1
        left, right = box[1].start * wide, box[1].stop * wide - 1
        above, under = top - rows, rows - bottom
        hit |= ((above > 0) & (above == left - columns)) | ((under > 0) & (under == columns - right))
        if rising:
            hit |= ((above > 0) & (above == columns - right)) | ((under > 0) & (under == left - columns))
    return np.where(hit & (grid == scene.background), MARK, grid)


def _copies(scene: Scene, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (copy, line) of the rows [h, 1], then of the columns [w]; None if the shape does not hold two copies."""
    if shape == scene.shape or shape[0] < scene.shape[0] or shape[1] < scene.shape[1]:
        return None
    copy_row, row = np.divmod(np.arange(shape[0])[:, None], scene.shape[0])
    copy_column, column = np.divmod(np.arange(shape[1]), scene.shape[1])
    return copy_row, row, copy_column, column


FLIPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "no": lambda copy: copy < 0,
    "every other": lambda copy: copy % 2 == 1,
    "the first and every other": lambda copy: copy % 2 == 0,
}


def tile_flipped(scene: Scene, shape: Shape, rows: str, columns: str, crossed: bool) -> Grid | None:
    """Return copies: `rows` of them mirrored top-bottom, `columns` left-right; `crossed`: the other way round."""
    found = _copies(scene, shape)
    if found is None:
        return None
    copy_row, row, copy_column, column = found
    in_rows, in_columns = FLIPS[rows](copy_row), FLIPS[columns](copy_column)
    down, across = (in_columns, in_rows) if crossed else (in_rows, in_columns)
    row, column = np.where(down, scene.shape[0] - 1 - row, row), np.where(across, scene.shape[1] - 1 - column, column)
    return scene.grid[row, column]


def tile_turned_parts(scene: Scene, shape: Shape, turns: tuple[int, int, int, int]) -> Grid | None:
    """Return four quarters, each tiled with the grid turned left by quarter `turns`."""
    height, width = scene.shape
    if height != width or shape[0] != shape[1] or shape[0] % (2 * height):
        return None
    copies = shape[0] // (2 * height)
    parts = [np.tile(np.rot90(scene.grid, turn), (copies, copies)) for turn in turns]
    return np.block([parts[:2], parts[2:]])


def tile_apart(scene: Scene, shape: Shape) -> Grid | None:
    """Return copies with a marked line between neighbours."""
    if _copies(scene, shape) is None:
        return None
    row, column = np.arange(shape[0])[:, None] % (scene.shape[0] + 1), np.arange(shape[1]) % (scene.shape[1] + 1)
    padded = np.pad(scene.grid, ((0, 1), (0, 1)), constant_values=MARK)
    return padded[row, column]


def tile_diagonally(scene: Scene, shape: Shape, rising: bool) -> Grid | None:
    """Return copies on the falling or rising diagonal, background elsewhere."""
    found = _copies(scene, shape)
    if found is None or shape[0] % scene.shape[0] or shape[1] % scene.shape[1]:
        return None
    copy_row, row, copy_column, column = found
    if rising:
        copy_column = copy_column[-1] - copy_column
    return np.where(copy_row == copy_column, scene.grid[row, column], scene.background)


def tile_as_often(scene: Scene, shape: Shape) -> Grid | None:
    """Return as many copies in reading order as the grid has foreground cells, background elsewhere."""
    found = _copies(scene, shape)
    if found is None or shape[0] % scene.shape[0] or shape[1] % scene.shape[1]:
        return None
    copy_row, row, copy_column, column = found
    number = copy_row * (shape[1] // scene.shape[1]) + copy_column
    return np.where(number < scene.foreground.sum(), scene.grid[row, column], scene.background)


def tile_with_corners(scene: Scene, shape: Shape) -> Grid | None:
    """Return copies with marks on background that touches foreground by a corner."""
    found = _copies(scene, shape)
    if found is None:
        return None
    grid = scene.grid[found[1], found[3]]
    padded = np.pad(grid != scene.background, 1)
    touched = padded[:-2, :-2] | padded[:-2, 2:] | padded[2:, :-2] | padded[2:, 2:]
    return np.where(touched & (grid == scene.background), MARK, grid)


def pad_edges(scene: Scene, shape: Shape, corners: bool) -> Grid | None:
    """Return the grid with a margin that repeats its edges; without `corners`, these are marked."""
    margin = shape[0] - scene.shape[0]
    if margin <= 0 or margin % 2 or shape[1] - scene.shape[1] != margin:
        return None
    margin //= 2
    grid = np.pad(scene.grid, margin, mode="edge")
    if not corners:
        outer = [(np.arange(n) < margin) | (np.arange(n) >= n - margin) for n in shape]
        grid[np.ix_(*outer)] = MARK
    return grid


def pad_marked(scene: Scene, shape: Shape) -> Grid | None:
    """Return the grid with a marked margin."""
    margin = shape[0] - scene.shape[0]
    if margin <= 0 or margin % 2 or shape[1] - scene.shape[1] != margin:
        return None
    return np.pad(scene.grid, margin // 2, constant_values=MARK)


def shear(scene: Scene, shape: Shape, leftwards: bool) -> Grid | None:
    """Return the rows (of a single row: copies), each one cell further to the right or left than the one above."""
    (height, width), (h, w) = scene.shape, shape
    if shape == scene.shape or w < width or not (height == 1 < h or (h == height and w == width + h - 1)):
        return None
    row = np.arange(h)[:, None]
    column = np.arange(w) - (h - 1 - row if leftwards else row)
    inside = (column >= 0) & (column < width)
    return np.where(inside, scene.grid[row % height, column.clip(0, width - 1)], MARK)


def continue_diagonal(scene: Scene, shape: Shape) -> Grid | None:
    """Return the grid continued by the shortest falling, else rising step that maps its foreground onto itself."""
    if _copies(scene, shape) is None or not scene.foreground.any():
        return None
    for turned in VIEWS[:2]:
        found = _continue_falling(turned(scene.grid), shape, scene.background)
        if found is not None:
            return turned(found)
    return None


def _continue_falling(grid: Grid, shape: Shape, background: int) -> Grid | None:
    height, width = grid.shape
    for step in range(1, min(height, width) // 2 + 1):
        before, after = grid[:-step, :-step], grid[step:, step:]
        if (before == after).all() and (before != background).any():
            break
    else:
        return None
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])
    back = np.maximum(np.maximum(row - height + step, column - width + step) // step, 0) * step
    row, column = row - back, column - back
    return np.where((row >= 0) & (column >= 0), grid[row.clip(0), column.clip(0)], background)


# 6. Crops -------------------------------------------------------------------------------------------------------------


def _fitting(objects: ObjectSet, shape: Shape) -> list[int]:
    """Return the objects whose box has a shape."""
    return [
        k for k, (rows, columns) in enumerate(objects.boxes, 1)
        if rows.stop - rows.start == shape[0] and columns.stop - columns.start == shape[1]
    ]  # fmt: skip


@if_it_fits
def crop_marked(scene: Scene) -> Grid | None:
    """Return the first one-colour object that a cell of the rarest colour touches, without that colour."""
    objects = scene.objects[0]
    if not objects.is_usable or len(scene.by_frequency) < 2:
        return None
    rarest = scene.by_frequency[-1]
    marker = np.pad(scene.grid == rarest, 1)
    columns = marker[:, :-2] | marker[:, 1:-1] | marker[:, 2:]
    near = objects.labels[columns[:-2] | columns[1:-1] | columns[2:]]
    touched = [k for k in np.unique(near).tolist() if k and objects.colors[k] != rarest]
    if not touched:
        return None
    part = scene.grid[objects.boxes[touched[0] - 1]]
    return np.where(part == rarest, scene.background, part)


def _around(scene: Scene, box: Box | None, shape: Shape) -> Grid | None:
    """Return the part of a shape that has the same centre as a box."""
    if box is None:
        return None
    starts = [box[axis].start + box[axis].stop - shape[axis] for axis in (0, 1)]
    if any(start % 2 or start < 0 for start in starts):
        return None
    top, left = starts[0] // 2, starts[1] // 2
    if top + shape[0] > scene.shape[0] or left + shape[1] > scene.shape[1]:
        return None
    return scene.grid[top : top + shape[0], left : left + shape[1]]


@for_other_shape
def crop_around_color(scene: Scene, shape: Shape, rank: int) -> Grid | None:
    """Return the part around the centre of the most frequent (rank 0) or rarest (-1) foreground colour's box."""
    return _around(scene, scene.color_boxes[scene.by_frequency[rank]], shape) if scene.by_frequency else None


@for_other_shape
def crop_around_foreground(scene: Scene, shape: Shape) -> Grid | None:
    """Return the part around the centre of the foreground's box."""
    return _around(scene, scene.foreground_box, shape)


def _widest_color(scene: Scene) -> int | None:
    """Return the foreground colour whose box is largest in area; ties in order of frequency."""
    return max(scene.by_frequency, key=lambda color: scene.grid[scene.color_boxes[color]].size, default=None)


@if_it_fits
def crop_content(scene: Scene) -> Grid | None:
    """Return the first one-colour object that lies in the largest box of another colour."""
    objects, color = scene.objects[0], _widest_color(scene)
    if color is None or not objects.is_usable:
        return None
    box = scene.color_boxes[color]
    for k, part in enumerate(objects.boxes, 1):
        inside = all(box[axis].start <= part[axis].start and part[axis].stop <= box[axis].stop for axis in (0, 1))
        if inside and objects.colors[k] != color:
            return scene.grid[part]
    return None


@if_it_fits
def crop_quarter(scene: Scene) -> Grid | None:
    """Return the upper left quarter of the foreground's box, the middle lines included."""
    if scene.foreground_box is None:
        return None
    part = scene.grid[scene.foreground_box]
    return part[: (part.shape[0] + 1) // 2, : (part.shape[1] + 1) // 2]


@if_it_fits
def fill_frame(scene: Scene) -> Grid | None:
    """Return the largest box of a colour, with the other foreground, grown to fit, inside."""
    color = _widest_color(scene)
    if color is None:
        return None
    box = scene.color_boxes[color]
    grid, outside = scene.grid[box].copy(), scene.grid.copy()
    outside[box] = scene.background
    rest = bounding_box(outside != scene.background)
    height, width = grid.shape[0] - 2, grid.shape[1] - 2
    if rest is None or min(height, width) < 1:
        return None
    part = outside[rest]
    if height % part.shape[0] or width % part.shape[1]:
        return None
    grown = part.repeat(height // part.shape[0], 0).repeat(width // part.shape[1], 1)
    inside = grid[1:-1, 1:-1]
    inside[...] = np.where(grown == scene.background, inside, grown)
    return grid


# 7. Parts laid upon each other ----------------------------------------------------------------------------------------


@for_other_shape
def overlay_windows(scene: Scene, shape: Shape) -> Grid | None:
    """Return the surroundings of all cells of a colour laid upon each other, if they hold all foreground unharmed."""
    if shape[0] % 2 == 0 or shape[1] % 2 == 0 or shape == (1, 1) or len(scene.by_frequency) < 2:
        return None
    tall, wide = shape[0] // 2, shape[1] // 2
    padded = np.pad(scene.grid, ((tall, tall), (wide, wide)), constant_values=scene.background)
    for color in scene.by_frequency:
        if not 1 < scene.counts[color] <= 9:
            continue
        spots = np.argwhere(scene.grid == color).tolist()
        windows = np.stack([padded[i : i + shape[0], j : j + shape[1]] for i, j in spots])
        top = windows.max(0, where=windows != scene.background, initial=-1)
        rest = padded.copy()
        for i, j in spots:
            rest[i : i + shape[0], j : j + shape[1]] = scene.background
        if ((windows == top) | (windows == scene.background)).all() and (rest == scene.background).all():
            return np.where(top < 0, scene.background, top)
    return None


@for_other_shape
def overlay_colors(scene: Scene, shape: Shape) -> Grid | None:
    """Return the cells of each foreground colour, cut to their box, laid centred upon each other, small ones on top."""
    boxes = {color: scene.color_boxes[color] for color in scene.by_frequency}
    sides = {color: scene.grid[box].shape for color, box in boxes.items()}
    if len(boxes) < 2 or shape not in sides.values():
        return None
    grid = np.full(shape, scene.background)
    for color in sorted(boxes, key=lambda color: -sides[color][0] * sides[color][1]):
        spare = [shape[axis] - sides[color][axis] for axis in (0, 1)]
        if any(n < 0 or n % 2 for n in spare):
            return None
        top, left = spare[0] // 2, spare[1] // 2
        part = grid[top : shape[0] - top, left : shape[1] - left]
        part[scene.grid[boxes[color]] == color] = color
    return grid


@for_other_shape
def overlay_objects(scene: Scene, shape: Shape) -> Grid | None:
    """Return the objects of the wanted shape laid upon each other, the main colour of each being transparent."""
    objects = scene.objects[1]
    if not objects.is_usable or objects.count < 2:
        return None
    fitting = _fitting(objects, shape)
    if len(fitting) < 2:
        return None
    parts = np.stack([scene.grid[objects.boxes[k - 1]] for k in fitting])
    is_odd = parts != objects.colors[fitting][:, None, None]
    return np.take_along_axis(parts, is_odd.argmax(0)[None], 0)[0]


# 8. The layers --------------------------------------------------------------------------------------------------------


def _panel_layers() -> Iterator[Layer]:
    for noun in PANEL_TRAITS:
        yield from _layers("panel", extreme_panel, {
            f"panel with most {noun}": {"trait": noun, "most": True},
            f"panel with least {noun}": {"trait": noun, "most": False},
        })  # fmt: skip
    yield Layer("panel shaped unlike the others", "panel", odd_shaped_panel)
    yield Layer("which of four panels are set", "boolean", combine_four_panels)
    yield Layer("panels folded", "stack", fold_panels)
    for around, name in enumerate(("second panel at each cell of the first", "first panel at each cell of the second")):
        yield from _layers("kronecker", panel_in_panel, {
            name: {"around": around, "recolored": False},
            f"{name}, in its colour": {"around": around, "recolored": True},
        })  # fmt: skip
    yield Layer("foreground cells of each panel", "layout", on_any_layout(count_in_panels.__wrapped__))
    yield Layer("odd colour of each compartment", "layout", compartment_colors)
    yield Layer("which panels are fullest", "layout", fullest_panels)
    yield Layer("foreground colour of each panel", "layout", panel_foregrounds)


def _part_layers() -> Iterator[Layer]:
    yield from _layers("scale", shrink_grid, {
        "most common colour of each part": {"foreground": False},
        "foreground colour of each part": {"foreground": True},
    })  # fmt: skip
    yield from _layers("solid", shrink_solids, {
        "solids made smaller": {"recolored": False},
        "solids made smaller, in the other colour": {"recolored": True},
    })  # fmt: skip
    yield from _layers("solid", crop_solids, {
        "crop to the solids": {"crossed": False},
        "crop to the solids, other cells drawn out": {"crossed": True},
    })  # fmt: skip
    yield Layer("foreground cells of each part", "scale", count_in_parts)
    yield Layer("foreground made smaller", "foreground", shrink_foreground)
    yield Layer("foreground made smaller, in itself", "kronecker", shrunk_in_itself)
    yield Layer("small object where the large one is set", "mask", small_where_large)


def _order_layers() -> Iterator[Layer]:
    yield from _layers("layout", lay_out_objects, {
        "one cell for each object in its place": {"margin": 0},
        "one cell for each object in its place, in a margin": {"margin": 1},
    })  # fmt: skip
    yield from _layers("layout", lay_out_regions, {
        "one cell for each region in its place": {"solid": False},
        "one cell for each solid in its place": {"solid": True},
    })  # fmt: skip
    for gap, name in enumerate(("{}s moved together", "{}s moved together, with a gap")):
        yield from _per_kind("pack", pack_objects, name, gap=gap)
    yield Layer("largest object in the other objects' colours", "pack", largest_in_colors)
    for axis, way in enumerate(("from top to bottom", "from left to right")):
        yield from _layers("list", list_objects, {
            f"colours of objects {way}": {"axis": axis, "snake": False},
            f"colours of objects {way}, rows by turns": {"axis": axis, "snake": True},
        })  # fmt: skip
    yield Layer("stripes in the colours of lines", "stripe", line_stripes)


def _summary_layers() -> Iterator[Layer]:
    for axis, line in enumerate(("rows", "columns")):
        for measure in ("objects", "cells", ("columns", "rows")[axis]):
            for ascending, order in enumerate(("falling", "rising")):
                for at_end, end in enumerate(("start", "end")):
                    choice = {"measure": measure, "ascending": bool(ascending), "axis": axis, "at_end": bool(at_end)}
                    name = f"{measure} of each colour as {line}, {order}, from the {end}"
                    yield Layer(name, "bar", partial(bars, **choice))
    yield from _layers("ring", color_rings, {
        "rings in colours from frequent to rare": {"by": "frequency"},
        "rings in colours from rare to frequent": {"by": "rarity"},
        "rings in colours from the largest box to the smallest": {"by": "box"},
    })  # fmt: skip
    yield Layer("tally of regions on every other cell", "tally", tally_every_other)


def _tile_layers() -> Iterator[Layer]:
    yield Layer("enlarge cells, if at all", "scale", enlarge)
    yield from _layers("scale", enlarge_with_diagonals, {
        "enlarge cells, falling diagonals of squares": {"rising": False},
        "enlarge cells, diagonals of squares": {"rising": True},
    })  # fmt: skip
    for rows in FLIPS:
        for columns in FLIPS:
            if rows != columns:
                name = f"tile, {rows} row of copies mirrored top-bottom, {columns} column left-right"
                yield Layer(name, "tile", partial(tile_flipped, rows=rows, columns=columns, crossed=False))
    first = "the first and every other"
    for rows, columns in ((first, "no"), ("no", "every other"), ("no", first)):
        name = f"tile, {rows} row of copies mirrored left-right, {columns} column top-bottom"
        yield Layer(name, "tile", partial(tile_flipped, rows=rows, columns=columns, crossed=True))
    yield from _layers("tile", tile_turned_parts, {
        "quarters tiled, turned right to the upright one": {"turns": (2, 3, 1, 0)},
        "quarters tiled, turned left to the upright one": {"turns": (2, 1, 3, 0)},
    })  # fmt: skip
    yield Layer("tile with lines between", "tile", tile_apart)
    yield from _layers("tile", tile_diagonally, {
        "copies on the falling diagonal": {"rising": False},
        "copies on the rising diagonal": {"rising": True},
    })  # fmt: skip
    yield Layer("as many copies as foreground cells", "tile", tile_as_often)
    yield Layer("tile, corners of the foreground marked", "tile", tile_with_corners)
    yield from _layers("pad", pad_edges, {
        "edges repeated outward": {"corners": True},
        "edges repeated outward but for corners": {"corners": False},
    })  # fmt: skip
    yield Layer("margin around the grid", "pad", pad_marked)
    yield from _layers("shear", shear, {
        "each row further right": {"leftwards": False},
        "each row further left": {"leftwards": True},
    })  # fmt: skip
    yield Layer("continue the diagonal", "period", continue_diagonal)


def _crop_layers() -> Iterator[Layer]:
    yield Layer("crop to the marked object", "object", crop_marked)
    yield from _layers("around", crop_around_color, {
        "crop around the most frequent colour": {"rank": 0},
        "crop around the rarest colour": {"rank": -1},
    })  # fmt: skip
    yield Layer("crop around the foreground", "around", crop_around_foreground)
    yield Layer("crop to what the largest box of a colour holds", "box", crop_content)
    yield Layer("largest box of a colour, filled with the rest", "box", fill_frame)
    yield Layer("crop the upper left quarter of the foreground", "foreground", crop_quarter)


def _overlay_layers() -> Iterator[Layer]:
    yield Layer("surroundings of equal cells laid upon each other", "overlay", overlay_windows)
    yield Layer("colours laid centred upon each other", "overlay", overlay_colors)
    yield Layer("objects laid upon each other", "overlay", overlay_objects)


PART_LAYERS: tuple[Layer, ...] = (
    *_panel_layers(),
    *_part_layers(),
    *_order_layers(),
    *_summary_layers(),
    *_tile_layers(),
    *_crop_layers(),
    *_overlay_layers(),
)
assert len({layer.name for layer in PART_LAYERS}) == len(PART_LAYERS), "names of layers must differ"
