"""What is said of one cell: every block of features, the experts and the keys, cell by cell from their descriptions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cell_features import NUM_MARKS, OBJECT_SIZES, OUTSIDE, experts, features, keys, neighbors
from cell_features import _key as key
from grid_hypotheses import MARK, NO_HIT, Scene

AROUND = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
RAYS = [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
SIDES = [(-1, 0), (0, -1), (0, 1), (1, 0)]


def grids() -> list[np.ndarray]:
    """Return small grids: noise of few and of many colours, sparse cells, a frame, lines, one colour, one cell."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        shape = rng.integers(1, 8, 2)
        names = rng.permutation(10)
        found.append(names[rng.integers(0, rng.integers(1, 10), shape)])
        found.append(np.where(rng.random(shape) < 0.3, names[rng.integers(0, 3, shape)], names[4]))
    frame = np.zeros((7, 6), int)
    frame[1:6, 1:5], frame[2:5, 2:4], frame[3, 2] = 3, 0, 7
    found += [frame, np.full((3, 4), 5), np.array([[0, 2, 0], [1, 1, 1], [0, 2, 0]]), np.array([[6]])]
    return found


GRIDS = grids()
EACH = pytest.mark.parametrize("index", range(len(GRIDS)))


class Case:
    """A grid, random layers in its shape, colours in a random order, and what is near a cell, without numpy's help."""

    def __init__(self, index: int):
        rng = np.random.default_rng(100 + index)
        self.grid, (self.height, self.width) = GRIDS[index], GRIDS[index].shape
        self.scene = Scene(self.grid)
        self.background = self.scene.background
        low = rng.integers(0, 32, (rng.integers(1, 11), self.height, self.width))
        self.layers = [self.grid, *np.where(rng.random(low.shape) < 0.5, self.grid, low)]
        self.colors = rng.permutation(10)[: rng.integers(1, 6)].tolist()
        self.cells = [(i, j) for i in range(self.height) for j in range(self.width)]
        self.present = [self.at(*cell) for cell in self.cells]
        foreground = [color for color in dict.fromkeys(self.present) if color != self.background]
        self.ranked = sorted(foreground, key=lambda color: -self.present.count(color)) or [self.background]
        self.objects = [{cell: self.object_of(*cell, kind) for cell in self.cells} for kind in (True, False)]

    def at(self, i: int, j: int) -> int | None:
        """Return the colour of a cell, None outside."""
        return int(self.grid[i, j]) if 0 <= i < self.height and 0 <= j < self.width else None

    def is_foreground(self, i: int, j: int) -> bool:
        return self.at(i, j) not in (None, self.background)

    def ray(self, i: int, j: int, step: tuple[int, int]) -> int | None:
        """Return the first foreground colour on the way from a cell, None if there is none."""
        i, j = i + step[0], j + step[1]
        while self.at(i, j) == self.background:
            i, j = i + step[0], j + step[1]
        return self.at(i, j)

    def region(self, i: int, j: int, steps: list[tuple[int, int]], is_in: Callable[[int, int], bool]) -> set:
        """Return the cells that steps lead to from a cell, through such as belong."""
        found, open_cells = {(i, j)}, [(i, j)]
        while open_cells:
            row, column = open_cells.pop()
            more = {(row + a, column + b) for a, b in steps} - found
            more = {cell for cell in more if self.at(*cell) is not None and is_in(*cell)}
            found |= more
            open_cells += more
        return found

    def object_of(self, i: int, j: int, one_color: bool) -> set:
        """Return the cells of the object that a cell is in, none for background."""
        if not self.is_foreground(i, j):
            return set()
        color = self.at(i, j)
        return self.region(i, j, AROUND, lambda a, b: self.at(a, b) == color if one_color else self.is_foreground(a, b))

    def reaches_border(self, cells: set) -> bool:
        return any(i in (0, self.height - 1) or j in (0, self.width - 1) for i, j in cells)


# Features -------------------------------------------------------------------------------------------------------------


def layer_claims(case: Case, i: int, j: int) -> list[bool]:
    symbols = [*case.colors, case.background, *range(MARK, MARK + NUM_MARKS)]
    claims = [layer[i, j] == symbol for layer in case.layers for symbol in symbols]
    return claims + [layer[i, j] == case.layers[0][i, j] for layer in case.layers[1:8]]


def neighbor_claims(case: Case, i: int, j: int) -> list[bool]:
    own = case.at(i, j)
    around = [case.at(i + a, j + b) for a, b in AROUND]
    sides = [case.at(i + a, j + b) for a, b in SIDES]
    counts = [
        (sum(color not in (None, case.background) for color in sides), 4),
        (sum(color not in (None, case.background) for color in around), 8),
        (sides.count(own), 4),
        (around.count(own), 8),
    ]
    claims = [count >= least for count, most in counts for least in range(1, most + 1)]
    claims += [color != case.background for color in around]  # what is outside is not background
    claims += [color == own for color in around]
    return claims + [color in around for color in case.colors]


def place_claims(case: Case, i: int, j: int) -> list[bool]:
    below, beyond = case.height - 1 - i, case.width - 1 - j
    return [
        *(i == 0, below == 0, j == 0, beyond == 0),
        *(i % 2 == 0, j % 2 == 0, (i + j) % 2 == 0),
        *(i % 3 == 0, i % 3 == 1, j % 3 == 0, j % 3 == 1),
        *(below % 2 == 0, beyond % 2 == 0),
        *(i == j, i == beyond, i < case.height / 2, j < case.width / 2),
    ]


def ray_claims(case: Case, i: int, j: int) -> list[bool]:
    left, right, up, down, *diagonal = hits = [case.ray(i, j, step) for step in RAYS]
    upper_left, upper_right, lower_left, lower_right = diagonal
    opposite = [(left, right), (up, down), (upper_left, lower_right), (upper_right, lower_left)]
    return [
        *(hit is not None for hit in hits),
        *(a == b and a is not None for a, b in opposite),
        *(a is not None and b is not None for a, b in opposite[:2]),
        *(color in hits[:4] for color in case.colors),
        *(color in diagonal for color in case.colors),
    ]


def object_claims(case: Case, i: int, j: int) -> list[bool]:
    is_ground = not case.is_foreground(i, j)
    ground = case.region(i, j, SIDES, lambda a, b: not case.is_foreground(a, b))
    claims = [is_ground and not case.reaches_border(ground)]
    all_ground = {cell for cell in case.cells if not case.is_foreground(*cell)}
    for objects in case.objects:
        sizes = [len(cells) for cells in objects.values() if cells]
        own = objects[i, j]
        claims += [len(own) >= size for size in OBJECT_SIZES]
        claims += [len(own) == max(sizes, default=-1), len(own) == min(sizes, default=-1)]
        claims.append(case.reaches_border(own or all_ground))  # the background counts as one
    return claims


def line_claims(case: Case, i: int, j: int) -> list[bool]:
    claims = [case.at(i, j) == case.ranked[0], case.at(i, j) == case.ranked[-1]]
    rows = [[(a, b) for b in range(case.width)] for a in range(case.height)]
    columns = [[(a, b) for a in range(case.height)] for b in range(case.width)]
    for lines, own in ((rows, i), (columns, j)):
        counts = [sum(case.is_foreground(*cell) for cell in line) for line in lines]
        claims += [counts[own] > 0, counts[own] == len(lines[own]), counts[own] == max(counts)]
        claims += [any(case.at(*cell) == color for cell in lines[own]) for color in case.colors]
    return claims


BLOCKS = (layer_claims, neighbor_claims, place_claims, ray_claims, object_claims, line_claims)


@EACH
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_features_equal_the_claims_of_each_cell(index, block):
    case = Case(index)
    found = features(case.scene, case.layers, case.colors)
    widths, place = [len(claims(case, 0, 0)) for claims in BLOCKS], BLOCKS.index(block)
    assert found.dtype == bool and found.shape == (len(case.cells), sum(widths))
    part = found[:, sum(widths[:place]) : sum(widths[: place + 1])]
    np.testing.assert_array_equal(part, [block(case, *cell) for cell in case.cells])


def test_most_claims_are_true_of_some_cells_and_false_of_others():
    cases = [Case(index) for index in range(len(GRIDS))]
    for claims in (place_claims, object_claims):  # the others are as many as layers and colours
        rows = np.array([claims(case, *cell) for case in cases for cell in case.cells], bool)
        assert (rows.any(0) & ~rows.all(0)).mean() > 0.9, claims


def test_features_have_the_same_columns_for_every_grid_of_a_task():
    first = np.arange(12).reshape(3, 4) % 3
    widths = {features(Scene(grid), [grid, grid, grid], [0, 1, 2, 5]).shape[1]
              for grid in (first, np.zeros((1, 1), int), np.full((5, 2), 2))}  # fmt: skip
    assert len(widths) == 1


# Experts --------------------------------------------------------------------------------------------------------------


@EACH
def test_experts_name_the_colours_of_layers_rays_constants_and_ranks(index):
    case = Case(index)
    found = experts(case.scene, case.layers, case.colors)
    expected = []
    for i, j in case.cells:
        symbols = [int(layer[i, j]) for layer in case.layers]
        hits = [case.ray(i, j, step) for step in RAYS]
        expected.append([
            *(symbol if symbol < 10 else case.background for symbol in symbols),
            *(case.at(i, j) if hit is None else hit for hit in hits),
            *case.colors,
            case.ranked[0],
            case.ranked[-1],
        ])  # fmt: skip
    np.testing.assert_array_equal(found, expected)
    assert found.min() >= 0 and found.max() < 10


@EACH
def test_neighbors_are_the_cells_around(index):
    case = Case(index)
    for found, (a, b) in zip(neighbors(case.grid), AROUND, strict=True):
        expected = [case.at(i + a, j + b) for i, j in case.cells]
        assert found.ravel().tolist() == [OUTSIDE if color is None else color for color in expected]


# Keys -----------------------------------------------------------------------------------------------------------------


def sorted_hits(values: list[int | None]) -> list[int]:
    return sorted(-1 if value is None else value for value in values)


def surroundings(case: Case, i: int, j: int) -> dict[str, object]:
    """Return what each key is named after."""
    hits = [case.ray(i, j, step) for step in RAYS]
    sides, around = ([case.at(i + a, j + b) for a, b in steps] for steps in (SIDES, AROUND))
    row, column = [(i, b) for b in range(case.width)], [(a, j) for a in range(case.height)]
    return {
        "its foreground neighbours": sum(case.is_foreground(i + a, j + b) for a, b in AROUND),
        "its four neighbours, sorted": sorted_hits(sides),
        "its eight neighbours, sorted": sorted_hits(around),
        "its four neighbours": sides,
        "its eight neighbours": around,
        "what is left, right, above, below": hits[:4],
        "what is left, right, above, below, sorted": sorted_hits(hits[:4]),
        "what is on its diagonals": hits[4:],
        "what is left and right": hits[:2],
        "what is above and below": hits[2:4],
        "its row": i,
        "its column": j,
        "its row from below": case.height - i,
        "its column from the right": case.width - j,
        "its place": (i, j),
        "its chessboard colour": (i + j) % 2,
        "the first cell of its row": case.at(i, 0),
        "the first cell of its column": case.at(0, j),
        "the foreground in its row": sum(case.is_foreground(*cell) for cell in row),
        "the foreground in its column": sum(case.is_foreground(*cell) for cell in column),
    }


@pytest.fixture(scope="module")
def told() -> tuple[dict[str, list], dict[str, list]]:
    """Return the keys and, as text, the surroundings of the cells of all grids, by name."""
    numbers, texts = {}, {}
    for index in range(len(GRIDS)):
        case = Case(index)
        for name, found in keys(case.scene).items():
            assert found.shape == case.grid.shape and found.dtype == np.int64
            numbers.setdefault(name, []).extend(found.ravel().tolist())
        for i, j in case.cells:
            for name, value in surroundings(case, i, j).items():
                texts.setdefault(name, []).append(f"{case.at(i, j)}: {value}")
    return numbers, texts


NAMES = list(keys(Scene(GRIDS[0])))


def test_every_key_has_a_description():
    assert list(surroundings(Case(0), 0, 0)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_equal_where_cell_and_surroundings_are(name, told):
    numbers, texts = (table[name] for table in told)
    assert len(numbers) == len(texts)
    pairs = set(zip(numbers, texts, strict=True))
    assert len(pairs) == len(set(numbers)) == len(set(texts)) > 10


@pytest.mark.parametrize("count", range(1, 10))
def test_different_parts_never_have_the_same_key(count):
    rng = np.random.default_rng(count)
    rows = np.unique(rng.integers(0, 64, (20_000, count)), axis=0)
    near = np.unique(np.abs(rows[:1] + rng.integers(-1, 2, (20_000, count))), axis=0)
    for parts in (rows, near):
        assert len(np.unique(key(*parts.T))) == len(parts)


def test_a_key_takes_parts_of_rows_and_columns():
    cell, row, column = np.arange(6).reshape(2, 3), np.array([[1], [2]]), np.array([3, 4, 5])
    wide = key(cell, np.repeat(row, 3, 1), np.repeat(column[None], 2, 0))
    np.testing.assert_array_equal(key(cell, row, column), wide)


def test_largest_parts_fit_a_key():
    assert NO_HIT < OUTSIDE < 64
    assert 67**9 < 2**63  # nine parts below 67 fit, so that no product wraps
