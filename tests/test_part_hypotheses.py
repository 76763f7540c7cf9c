"""Hypotheses about outputs of another size: each on a hand-made example, its symmetries, its limits.

Grids are written row by row, one character per symbol: 0-9 colours, a = the first mark, b the second, ...
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid_hypotheses import LAYERS, MARK, NUM_SYMBOLS, Scene
from part_hypotheses import PART_LAYERS, clusters, compartments, places, shrink, solids

FUNCTIONS = {layer.name: layer.function for layer in PART_LAYERS}


def parse(rows: str) -> np.ndarray:
    return np.array([[int(symbol, NUM_SYMBOLS) for symbol in row] for row in rows.split()])


# 1. Every hypothesis by hand ------------------------------------------------------------------------------------------

PANELS = {
    "12511 30522": {"panel with most colours": "12 30", "panel with least colours": "11 22"},
    "12511 20523": {"panel with most symmetry": "12 20", "panel with least symmetry": "11 23"},
    "10503510 01540502": {"panel shaped unlike the others": "03 40"},
    "10520 00500 55555 00530 01500": {
        "which of four panels are set": "la ae",  # the first, second and fourth; the third
        "panels folded": "12 03",
    },
    "12500 00503": {"panels folded": "12 30"},
    "10534 01530": {
        "second panel at each cell of the first": "3400 3000 0034 0030",
        "second panel at each cell of the first, in its colour": "1100 1000 0011 0010",
        "first panel at each cell of the second": "1010 0101 1000 0100",
        "first panel at each cell of the second, in its colour": "3040 0304 3000 0300",
    },
    "10503 01500 55555 00520 00520": {
        "foreground cells of each panel": "cb ac",
        "which panels are fullest": "ba ab",
        "foreground colour of each panel": "13 02",
    },
    "8888888 8118118 8128118 8888888": {"odd colour of each compartment": "21"},
}

PARTS = {
    "1100 1102 3000 0040": {
        "most common colour of each part": "10 00",
        "foreground colour of each part": "12 34",
        "foreground cells of each part": "eb bb",
    },
    "000000000 022222200 022222200 022222230 000222000 000222000 000222003": {
        "solids made smaller": "22 02",
        "solids made smaller, in the other colour": "33 03",
    },
    "03000000 " + "02222222 " * 3 + "02224222 " + "02222222 " * 3: {
        "crop to the solids": "2222222 " * 3 + "2224222 " + "2222222 " * 3,
        "crop to the solids, other cells drawn out": "2224222 " * 3 + "4444444 " + "2224222 " * 3,
    },
    "00000 01122 01122 03344 03344": {"foreground made smaller": "12 34"},
    "00000 11000 11000 11110 11110": {"foreground made smaller, in itself": "1000 1100 1010 1111"},
    "111100000 111100230 110000450 110000000": {"small object where the large one is set": "23 40"},
}

ORDERS = {
    "0000000 0110022 0110022 0000000 0330000": {
        "one cell for each object in its place": "12 30",
        "one cell for each object in its place, in a margin": "0000 0120 0300 0000",
        "one cell for each region in its place": "12 30",
    },
    "1112220 1112220 1112220 0000000 3330000 3330060 3330000": {"one cell for each solid in its place": "12 30"},
    "01000002 00000000 00300000": {
        "colours of objects from top to bottom": "12 30",
        "colours of objects from top to bottom, rows by turns": "12 03",
        "colours of objects from left to right": "13 20",
        "colours of objects from left to right, rows by turns": "13 02",
    },
    "11000 01022 00002": {
        "one-colour objects moved together": "1122 0102",
        "objects moved together": "1122 0102",
        "one-colour objects moved together, with a gap": "11022 01002",
        "objects moved together, with a gap": "11022 01002",
    },
    "1100000 0100203 0000000": {"largest object in the other objects' colours": "2233 0203"},
    "11111 00000 22022 00000 33333 40040": {"stripes in the colours of lines": "1111 2222 3333"},
}

BARS = {
    "1020202 0000000 1000000 0000003": {
        "objects of each colour as rows, falling, from the start": "222 110 300",
        "objects of each colour as rows, falling, from the end": "222 011 003",
        "objects of each colour as rows, rising, from the start": "300 110 222",
        "objects of each colour as rows, rising, from the end": "003 011 222",
        "objects of each colour as columns, falling, from the start": "213 210 200",
        "objects of each colour as columns, falling, from the end": "200 210 213",
        "objects of each colour as columns, rising, from the start": "312 012 002",
        "objects of each colour as columns, rising, from the end": "002 012 312",
        "cells of each colour as rows, falling, from the start": "222 110 300",
        "cells of each colour as rows, falling, from the end": "222 011 003",
        "cells of each colour as rows, rising, from the start": "300 110 222",
        "cells of each colour as rows, rising, from the end": "003 011 222",
        "cells of each colour as columns, falling, from the start": "213 210 200",
        "cells of each colour as columns, falling, from the end": "200 210 213",
        "cells of each colour as columns, rising, from the start": "312 012 002",
        "cells of each colour as columns, rising, from the end": "002 012 312",
    },
    "11100 00000 20000 20000": {
        "columns of each colour as rows, falling, from the start": "111 200",
        "columns of each colour as rows, falling, from the end": "111 002",
        "columns of each colour as rows, rising, from the start": "200 111",
        "columns of each colour as rows, rising, from the end": "002 111",
        "rows of each colour as columns, falling, from the start": "21 20",
        "rows of each colour as columns, falling, from the end": "20 21",
        "rows of each colour as columns, rising, from the start": "12 02",
        "rows of each colour as columns, rising, from the end": "02 12",
    },
    "11100 20002": {
        "rings in colours from frequent to rare": "111 121 111",
        "rings in colours from rare to frequent": "222 212 222",
        "rings in colours from the largest box to the smallest": "222 212 222",
    },
    "1102 1100": {"tally of regions on every other cell": "ba ba"},
}

TILES = {
    "12 03": {
        "enlarge cells, if at all": "12 03",
        "tile, no row of copies mirrored top-bottom, every other column left-right": "1221 0330",
        "tile, no row of copies mirrored top-bottom, the first and every other column left-right": "2112 3003",
        "tile, every other row of copies mirrored top-bottom, no column left-right": "12 03 03 12",
        "tile, every other row of copies mirrored top-bottom, the first and every other column left-right": (
            "2112 3003 3003 2112"
        ),
        "tile, the first and every other row of copies mirrored top-bottom, no column left-right": "03 12 12 03",
        "tile, the first and every other row of copies mirrored top-bottom, every other column left-right": (
            "0330 1221 1221 0330"
        ),
        "tile, the first and every other row of copies mirrored left-right, no column top-bottom": "21 30 12 03",
        "tile, no row of copies mirrored left-right, every other column top-bottom": "1203 0312",
        "tile, no row of copies mirrored left-right, the first and every other column top-bottom": "0312 1203",
        "quarters tiled, turned right to the upright one": "3001 2132 2312 1003",
        "quarters tiled, turned left to the upright one": "3023 2110 0112 3203",
        "tile with lines between": "12a12 03a03 aaaaa",
        "copies on the falling diagonal": "1200 0300 0012 0003",
        "copies on the rising diagonal": "0012 0003 1200 0300",
        "as many copies as foreground cells": "1212 0303 1200 0300",
        "edges repeated outward": "1122 1122 0033 0033",
        "edges repeated outward but for corners": "a12a 1122 0033 a03a",
        "margin around the grid": "aaaa a12a a03a aaaa",
        "each row further right": "12a a03",
        "each row further left": "a12 03a",
    },
    "010 000": {"tile, corners of the foreground marked": "010010 a0aa0a 010010 a0aa0a"},
    "123": {"each row further right": "123 a12", "each row further left": "a12 123"},
    "000 100 000": {
        "enlarge cells, falling diagonals of squares": "000000 000000 110000 110000 00a000 000a00",
        "enlarge cells, diagonals of squares": "000a00 00a000 110000 110000 00a000 000a00",
    },
    "120 012 001": {"continue the diagonal": "1200 0120 0012 0001"},
    "021 210 100": {"continue the diagonal": "0021 0210 2100 1000"},
}

CROPS = {
    "1100 0100 0300 2220 0000 2020": {"crop to the marked object": "11 01"},
    "00000 01110 01210 01110 00000": {
        "crop around the rarest colour": "111 121 111",
        "crop around the most frequent colour": "111 121 111",
        "crop around the foreground": "2",
    },
    "00000000 02000020 00033000 00030000 02000020": {"crop to what the largest box of a colour holds": "33 30"},
    "222200 200203 200200 222200": {"largest box of a colour, filled with the rest": "2222 2332 2332 2222"},
    "0000 0121 0343 0121": {"crop the upper left quarter of the foreground": "12 34"},
}

OVERLAYS = {
    "1000000 0500050 0000020": {"surroundings of equal cells laid upon each other": "100 050 020"},
    "11100 10100 11100 00002": {"colours laid centred upon each other": "111 121 111"},
    "3330333 3130333 3330332 0000000 0000000": {"objects laid upon each other": "333 313 332"},
}


def examples() -> list[tuple[str, str, str]]:
    """Return (name, grid, expected) of all tables."""
    tables = (PANELS, PARTS, ORDERS, BARS, TILES, CROPS, OVERLAYS)
    return [(name, grid, out) for table in tables for grid, cases in table.items() for name, out in cases.items()]


@pytest.mark.parametrize("name, rows, expected", examples())
def test_layer_gives_the_hand_made_result(name, rows, expected):
    wanted = parse(expected)
    found = FUNCTIONS[name](Scene(parse(rows)), wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def test_every_layer_has_an_example():
    assert {layer.name for layer in PART_LAYERS} == {name for name, _, _ in examples()}


DOES_NOT_APPLY = [
    ("panel with most colours", "123 451 236", (2, 2), "no panels"),
    ("which of four panels are set", "10520 00500", (2, 2), "two panels"),
    ("panels folded", "1050101 0150101", (2, 2), "the parts differ in width"),
    ("odd colour of each compartment", "888 818 888", (1, 2), "one compartment"),
    ("first panel at each cell of the second", "10534 01530", (3, 3), "no multiple of the panel"),
    ("most common colour of each part", "12 34", (3, 3), "larger than the grid"),
    ("solids made smaller", "110 110 000", (1, 1), "no square of three cells"),
    ("one cell for each object in its place", "10 00", (1, 1), "one object"),
    ("one cell for each object in its place", "100 001 010", (2, 4), "fewer columns with objects"),
    ("objects moved together", "11000 01022 00000", (2, 4), "objects of different shapes"),
    ("largest object in the other objects' colours", "1100000 0100203", (2, 6), "two others"),
    ("colours of objects from left to right", "0102030", (1, 2), "more objects than cells"),
    ("objects of each colour as rows, falling, from the start", "1020 0000", (2, 2), "bars of one cell"),
    ("rings in colours from frequent to rare", "110 002", (5, 5), "fewer colours than rings"),
    ("enlarge cells, if at all", "12", (1, 3), "no multiple"),
    ("copies on the falling diagonal", "12 03", (5, 5), "no multiple"),
    ("edges repeated outward", "12 03", (4, 6), "margins of different widths"),
    ("each row further right", "12 03", (2, 4), "no room for the last row, or too much"),
    ("continue the diagonal", "12 34", (4, 4), "no step"),
    ("crop to the marked object", "110 000 002", (1, 2), "not touched"),
    ("crop around the rarest colour", "010 000 000", (2, 2), "no common centre"),
    ("crop around the rarest colour", "010 000 000", (3, 3), "same shape"),
    ("largest box of a colour, filled with the rest", "2220 2020 2223 0003", (3, 3), "does not fit"),
    ("surroundings of equal cells laid upon each other", "100002 050000 000050 300000", (3, 3), "more elsewhere"),
]


@pytest.mark.parametrize("name, rows, shape, reason", DOES_NOT_APPLY)
def test_layer_is_none_when_it_does_not_apply(name, rows, shape, reason):
    assert FUNCTIONS[name](Scene(parse(rows)), shape) is None, reason


# 2. All layers on any grid --------------------------------------------------------------------------------------------


def grids(max_side: int = 12):
    """Return a strategy of grids: noise of few or many colours, grown blocks, sparse cells, panels."""

    def build(seed: int, height: int, width: int, colors: int, kind: str) -> np.ndarray:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, colors, (height, width))
        if kind == "blocks":
            return np.kron(noise, np.ones((3, 3), int))[:height, :width]
        if kind == "sparse":
            return np.where(rng.random(noise.shape) < 0.2, rng.permutation(10)[noise], rng.integers(0, 10))
        if kind == "panels":
            side = rng.integers(2, 5)
            lines = (np.arange(height)[:, None] % side == side - 1) | (np.arange(width) % side == side - 1)
            return np.where(lines, 5, rng.permutation(10)[noise])
        return rng.permutation(10)[noise]

    sides = st.integers(1, max_side)
    kinds = st.sampled_from(["noise", "blocks", "sparse", "panels"])
    return st.builds(build, st.integers(0, 2**32 - 1), sides, sides, st.integers(1, 10), kinds)


def wanted_shapes(grid: np.ndarray) -> list[tuple[int, int]]:
    """Return shapes that reach all kinds of layers."""
    height, width = grid.shape
    shapes = [
        (height, width),
        *((1, 1), (2, 2), (3, 3), (4, 4), (1, 4), (9, 9), (30, 30)),
        *((2 * height, 2 * width), (height + 2, width + 2), (height, width + height - 1), (height, 2 * width)),
        (height, max(1, (width - 1) // 2)),
        (max(1, height - 2), max(1, width - 2)),
    ]
    return sorted({(min(h, 30), min(w, 30)) for h, w in shapes})


def bank(grid: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    scene = Scene(grid)
    results = {layer.name: layer.function(scene, shape) for layer in PART_LAYERS}
    return {name: result for name, result in results.items() if result is not None}


def assert_valid(grid: np.ndarray, shape: tuple[int, int]) -> None:
    for name, result in bank(grid, shape).items():
        assert isinstance(result, np.ndarray) and result.dtype.kind in "iu", name
        assert result.shape == shape, name
        assert result.min() >= 0 and result.max() < NUM_SYMBOLS, name


@settings(max_examples=150, deadline=None)
@given(grids(30), st.data())
def test_layers_give_symbols_of_the_wanted_shape_on_any_grid(grid, data):
    drawn = st.tuples(st.integers(1, 30), st.integers(1, 30))
    assert_valid(grid, data.draw(st.one_of(st.sampled_from(wanted_shapes(grid)), drawn)))


@settings(max_examples=150, deadline=None)
@given(grids(), st.permutations(range(1, 10)), st.data())
def test_renaming_colours_renames_every_layer(grid, order, data):
    renamed = np.array([0, *order, *range(MARK, NUM_SYMBOLS)])  # colour 0 stays, as it is favoured as background
    shape = data.draw(st.sampled_from(wanted_shapes(grid)))
    plain, other = bank(grid, shape), bank(renamed[grid], shape)
    assert set(plain) == set(other)
    for name, result in plain.items():
        np.testing.assert_array_equal(renamed[result], other[name], name)


@settings(max_examples=30, deadline=None)
@given(grids(10), st.randoms(use_true_random=False))
def test_layers_neither_depend_on_each_other_nor_change_the_grid(grid, random):
    shape = random.choice(wanted_shapes(grid))
    together, original = bank(grid, shape), grid.copy()
    for layer in random.sample(PART_LAYERS, 40):
        alone = layer.function(Scene(grid), shape)
        assert (alone is None) == (layer.name not in together), layer.name
        if alone is not None:
            np.testing.assert_array_equal(alone, together[layer.name], layer.name)
    np.testing.assert_array_equal(grid, original)


def adversarial_grids() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows, columns = np.indices((30, 30))
    dots = np.zeros((30, 30), int)
    dots[::5, ::5] = 1 + np.arange(36).reshape(6, 6) % 9  # as many objects as are looked at
    return {
        "checkerboard": (rows + columns) % 2,
        "noise": rng.integers(0, 10, (30, 30)),
        "two-colour noise": rng.integers(0, 2, (30, 30)),
        "rows": rows % 10,
        "dots": dots,
        "one colour": np.full((30, 30), 7),
        "panels": np.where((rows % 5 == 4) | (columns % 5 == 4), 5, rng.integers(0, 3, (30, 30))),
        "lattice": np.where((rows % 5 == 0) | (columns % 5 == 0), 5, (rows // 5 + columns // 5) % 4),
        "line": rng.integers(0, 10, (1, 30)),
        "cell": np.array([[4]]),
    }


@pytest.mark.parametrize("name", adversarial_grids())
def test_layers_are_valid_and_fast_on_adversarial_grids(name):
    grid = adversarial_grids()[name]
    for shape in wanted_shapes(grid):
        assert_valid(grid, shape)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            bank(grid, shape)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.05, (shape, seconds)


def test_names_differ_from_those_of_the_bank_and_families_are_single_words():
    names = [layer.name for layer in (*LAYERS, *PART_LAYERS)]
    assert len(set(names)) == len(names)
    assert all(layer.family.isalpha() and layer.family.islower() for layer in PART_LAYERS)


# 3. Helpers -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(grids(9), st.data())
def test_shrink_equals_counting_in_each_part(grid, data):
    shape = data.draw(st.tuples(*(st.integers(1, side) for side in grid.shape)))
    small = shrink(grid, shape)
    parts = [np.arange(side) * n // side for side, n in zip(grid.shape, shape, strict=True)]
    for i, j in np.ndindex(shape):
        cells = grid[parts[0] == i][:, parts[1] == j].ravel().tolist()
        assert small[i, j] == max(dict.fromkeys(cells), key=cells.count)


def test_shrink_prefers_foreground_where_it_is_told_the_background():
    np.testing.assert_array_equal(shrink(parse("000100 000000"), (1, 2), 0), parse("01"))


def test_clusters_are_divided_at_the_widest_gaps():
    assert clusters([1, 9, 2, 5, 10], 3).tolist() == [0, 2, 0, 1, 2]
    assert clusters([3, 3, 4], 1).tolist() == [0, 0, 0]
    assert clusters([3, 3, 4], 3) is None


def test_places_fill_a_full_layout_row_by_row_and_leave_gaps_in_others():
    def box(row, column):
        return slice(row, row + 1), slice(column, column + 1)

    rows, columns = places([box(0, 8), box(1, 2), box(9, 5), box(9, 7)], (2, 2))
    assert rows.tolist() == [0, 0, 1, 1] and columns.tolist() == [1, 0, 0, 1]
    rows, columns = places([box(0, 8), box(1, 2), box(9, 2)], (2, 2))
    assert rows.tolist() == [0, 0, 1] and columns.tolist() == [1, 0, 0]
    assert places([box(0, 2), box(1, 2), box(9, 8)], (2, 2)) is None


def test_solids_are_of_the_background_where_no_foreground_is_solid():
    assert solids(Scene(parse("111000 111020 111000")))[1] == 1
    labels, count = solids(Scene(parse("1111 1111 1111 1112")))
    assert count == 1 and labels[3, 3] == 0 and labels[3, 2] == 1
    assert solids(Scene(parse("11 11")))[1] == 0


def test_compartments_are_what_a_frequent_colour_encloses():
    (boxes, colors), _ = compartments(Scene(parse("88888 81128 88888 80000")))
    assert colors == [2] and boxes == [(slice(1, 2), slice(1, 4))]  # the region below is open
