"""What can be said of one cell of a grid: binary features and colour experts for the tree, integer keys for the tables.

Imports numpy and grid_hypotheses; used by demo_prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from grid_hypotheses import NO_HIT, NUM_COLORS, NUM_SYMBOLS, Grid, Scene, neighbor_counts

NUM_MARKS = 6  # marks that have a feature of their own
OBJECT_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20)
OUTSIDE = NUM_SYMBOLS + 1  # the value of neighbours beyond the border
_STEPS = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)
_ORTHOGONAL = (1, 3, 4, 6)  # of _STEPS: up, left, right, down


def neighbors(grid: Grid) -> list[Grid]:
    """Return the 8 neighbours of every cell, in reading order, OUTSIDE beyond the border."""
    height, width = grid.shape
    padded = np.pad(grid, 1, constant_values=OUTSIDE)
    return [padded[1 + a : height + 1 + a, 1 + b : width + 1 + b] for a, b in _STEPS]


# 1. Features and experts ----------------------------------------------------------------------------------------------


def features(scene: Scene, layers: Sequence[Grid], colors: Sequence[int]) -> np.ndarray:
    """Return binary features [cells, F] of the cells of a scene, of which `layers` are readings in its shape."""
    palette = np.array(colors)[:, None, None]
    blocks = [
        *_layer_blocks(scene, np.stack(layers), palette),
        *_neighbor_blocks(scene, palette),
        *_place_blocks(scene),
        *_ray_blocks(scene, palette),
        *_object_blocks(scene),
        *_line_blocks(scene, palette),
    ]
    return np.concatenate(blocks).reshape(-1, scene.grid.size).T


def experts(scene: Scene, layers: Sequence[Grid], colors: Sequence[int]) -> np.ndarray:
    """Return the colour that each expert gives each cell, [cells, E]: layers first, then rays, constants, ranks."""
    stacked, rays = np.stack(layers), np.stack(scene.rays)
    ranked = scene.by_frequency or [scene.background]
    constants = np.array([*colors, ranked[0], ranked[-1]])
    planes = (
        np.where(stacked < NUM_COLORS, stacked, scene.background),
        np.where(rays == NO_HIT, scene.grid, rays),
        np.broadcast_to(constants[:, None, None], (len(constants), *scene.shape)),
    )
    return np.concatenate(planes).reshape(-1, scene.grid.size).T


def _layer_blocks(scene: Scene, layers: np.ndarray, palette: np.ndarray) -> Iterator[np.ndarray]:
    marks = np.arange(NUM_COLORS, NUM_COLORS + NUM_MARKS)
    symbols = np.concatenate([palette.ravel(), [scene.background], marks]).astype(layers.dtype)
    yield (layers[:, None] == symbols[:, None, None]).reshape(-1, *scene.shape)
    yield layers[1:8] == layers[0]


def _at_least(counts: np.ndarray, most: int) -> np.ndarray:
    return counts >= np.arange(1, most + 1)[:, None, None]


def _neighbor_blocks(scene: Scene, palette: np.ndarray) -> Iterator[np.ndarray]:
    around = np.stack(neighbors(scene.grid))
    is_same = around == scene.grid
    yield _at_least(neighbor_counts(scene.foreground, False), 4)
    yield _at_least(neighbor_counts(scene.foreground), 8)
    yield _at_least(is_same[list(_ORTHOGONAL)].sum(0), 4)
    yield _at_least(is_same.sum(0), 8)
    yield around != scene.background
    yield is_same
    yield (around == palette[..., None]).any(1)


def _place_blocks(scene: Scene) -> Iterator[np.ndarray]:
    height, width = scene.shape
    row, column = np.indices(scene.shape)
    yield np.stack((row == 0, row == height - 1, column == 0, column == width - 1))
    yield np.stack((row % 2 == 0, column % 2 == 0, (row + column) % 2 == 0))
    yield np.stack((row % 3 == 0, row % 3 == 1, column % 3 == 0, column % 3 == 1))
    yield np.stack(((height - 1 - row) % 2 == 0, (width - 1 - column) % 2 == 0))
    yield np.stack((row == column, row + column == width - 1, row < height / 2, column < width / 2))


def _ray_blocks(scene: Scene, palette: np.ndarray) -> Iterator[np.ndarray]:
    rays = np.stack(scene.rays)
    is_hit = rays != NO_HIT
    yield is_hit
    yield (rays[[0, 2, 4, 5]] == rays[[1, 3, 7, 6]]) & is_hit[[0, 2, 4, 5]]
    yield is_hit[[0, 2]] & is_hit[[1, 3]]
    for part in (rays[:4], rays[4:]):
        yield (part == palette[..., None]).any(1)


def _object_blocks(scene: Scene) -> Iterator[np.ndarray]:
    yield scene.enclosed[None]
    for objects in scene.objects:
        size = objects.sizes[objects.labels]
        smallest, largest = (objects.sizes[1:].min(), objects.sizes.max()) if objects.count else (1, 1)
        yield size >= np.array(OBJECT_SIZES)[:, None, None]
        yield np.stack((size == largest, size == smallest, objects.is_at_border[objects.labels] > 0))


def _line_blocks(scene: Scene, palette: np.ndarray) -> Iterator[np.ndarray]:
    ranked = scene.by_frequency or [scene.background]
    yield np.stack((scene.grid == ranked[0], scene.grid == ranked[-1]))
    is_color = scene.grid == palette
    for axis in (1, 0):
        count = scene.foreground.sum(axis, keepdims=True)
        found = np.stack((count > 0, count == scene.shape[axis], count == count.max()))
        found = np.concatenate([found, is_color.any(axis + 1, keepdims=True)])
        yield np.broadcast_to(found, (len(found), *scene.shape))


# 2. Keys --------------------------------------------------------------------------------------------------------------


def keys(scene: Scene) -> dict[str, np.ndarray]:
    """Return integer keys [H, W] of the cells' surroundings by name; equal keys mean equal surroundings."""
    grid, (height, width) = scene.grid, scene.shape
    row, column = np.arange(height)[:, None], np.arange(width)
    around, rays = np.stack(neighbors(grid)), np.stack(scene.rays)
    cross = around[list(_ORTHOGONAL)]
    foreground = scene.foreground
    return {
        "its foreground neighbours": _key(grid, neighbor_counts(foreground)),
        "its four neighbours, sorted": _key(grid, *np.sort(cross, 0)),
        "its eight neighbours, sorted": _key(grid, *np.sort(around, 0)),
        "its four neighbours": _key(grid, *cross),
        "its eight neighbours": _key(grid, *around),
        "what is left, right, above, below": _key(grid, *rays[:4]),
        "what is left, right, above, below, sorted": _key(grid, *np.sort(rays[:4], 0)),
        "what is on its diagonals": _key(grid, *rays[4:]),
        "what is left and right": _key(grid, *rays[:2]),
        "what is above and below": _key(grid, *rays[2:4]),
        "its row": _key(grid, row),
        "its column": _key(grid, column),
        "its row from below": _key(grid, height - 1 - row),
        "its column from the right": _key(grid, width - 1 - column),
        "its place": _key(grid, row, column),
        "its chessboard colour": _key(grid, (row + column) % 2),
        "the first cell of its row": _key(grid, grid[:, :1]),
        "the first cell of its column": _key(grid, grid[:1]),
        "the foreground in its row": _key(grid, foreground.sum(1, keepdims=True)),
        "the foreground in its column": _key(grid, foreground.sum(0, keepdims=True)),
    }


def _key(*parts: np.ndarray) -> np.ndarray:
    """Return one number for up to 9 parts below 67, another one for other parts."""
    total = np.zeros(parts[0].shape, np.int64)
    for part in parts:
        total = total * 67 + part
    return total
