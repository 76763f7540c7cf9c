"""The bank of grid hypotheses: each on a hand-made example, its symmetries, its limits, and its helpers by brute force.

Grids are written row by row, one character per symbol: 0-9 colours, a = the first mark, b the second, ...
"""

from __future__ import annotations

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid_hypotheses import (
    DOWN,
    LAYERS,
    LEFT,
    MARK,
    MAX_OBJECTS,
    NO_HIT,
    NUM_SYMBOLS,
    RIGHT,
    UP,
    VIEWS,
    Scene,
    background_color,
    bounding_box,
    column_pairs,
    inpaint,
    label,
    most_common,
    neighbor_counts,
    periodic,
    rays,
    unview,
    view,
)

FUNCTIONS = {layer.name: layer.function for layer in LAYERS}


def parse(rows: str) -> np.ndarray:
    return np.array([[int(symbol, NUM_SYMBOLS) for symbol in row] for row in rows.split()])


# 1. Every hypothesis by hand ------------------------------------------------------------------------------------------

OBJECTS = "1102033 1100030 0000000 2044405 0040405 0044400 0000000"
OBJECT_NAMES = "AA-B-CC AA---C- ------- D-EEE-F --E-E-F --EEE-- -------"  # in reading order
MIXED = "1200 1100 0003"  # one object of two colours and a single cell


def marked(values: str) -> str:
    """Return OBJECTS with the marks of the objects A to F in place of their cells."""
    marks = dict(zip("ABCDEF", values, strict=True))
    return "".join(marks.get(name, "0" if name == "-" else " ") for name in OBJECT_NAMES)


GEOMETRY = {
    "120 003": {
        "identity": "120 003",
        "mirror left-right": "021 300",
        "mirror top-bottom": "003 120",
        "half turn": "300 021",
        "transpose": "10 20 03",
        "quarter turn left": "03 20 10",
        "quarter turn right": "01 02 30",
        "anti-transpose": "30 02 01",
    },
    "1122 1122 0033 0033": {"shrink blocks": "12 03"},
    "12 03": {
        "enlarge cells": "111222 111222 000333 000333",
        "tile": "12121 03030 12121",
        "tile, mirrored every other copy": "12211 03300 03300",
        "tile, mirrored every other copy from the first": "30033 21122 21122",
        "tile, every other row of copies mirrored": "12121 03030 21212",
        "tile, turned right around the centre": "1201 0332 2330 1021",
        "tile, turned left around the centre": "1223 0310 0130 3221",
        "tile, turned left in reading order": "1223 0310 3001 2132",
        "copy at each foreground cell": "1212 0303 aa12 aa03",
        "copy at each background cell": "aaaa aaaa 12aa 03aa",
        "copy at each cell of colour 3": "aaaa aaaa aa12 aa03",
        "copy at each cell but of colour 3": "1212 0303 12aa 03aa",
    },
    "10 20": {
        "copy at each most frequent cell": "aa10 aa20 aa10 aa20",
        "copy at each rarest cell": "10aa 20aa aaaa aaaa",
    },
}

CROPS = {
    "0000 0120 0310 0000": {
        "crop to the foreground": "12 31",
        "crop to the foreground, mirrored": "21 13",
        "crop the upper left": "00 01",
        "crop the upper right": "00 20",
        "crop the lower left": "03 00",
        "crop the lower right": "10 00",
        "crop the centre": "12 31",
    },
    "00000 01110 01210 01110 00000": {
        "crop inside the foreground": "2",
        "crop inside the box of colour 1": "2",
        "crop inside the box of the most frequent colour": "2",
    },
    "22000 20300 00030 00000": {
        "crop to the box of colour 3": "30 03",
        "crop to the box of the rarest colour": "30 03",
        "crop to the box of the most frequent colour": "22 20",
    },
    "10002 11110 11110 20002": {"crop inside the box of the rarest colour": "111 111"},
    "1221 3443 9665 1771": {"behind the patch, by symmetry": "5"},
    "12121 21212 12921 21212": {"behind the patch, by period": "1"},
    "1100 1100 0022": {"drop repeated rows and columns": "10 02"},
    "1020 0000 3004": {"drop empty rows and columns": "120 304"},
    "12500 30500 55555 00512 00540": {"drop the separators": "1200 3000 0012 0040"},
}

TRAITS = {  # most and least: colour of the object, crop to it
    "cells": ("4", "444 404 444", "2", "2"),
    "copies of its shape": ("2", "2", "1", "11 11"),
    "colours in its box": ("3", "33 30", "1", "11 11"),
    "mirror symmetry": ("1", "11 11", "3", "33 30"),
    "other cells in its box": ("3", "33 30", "1", "11 11"),
    "objects of its colour": ("2", "2", "1", "11 11"),
}

SUMMARIES = {
    MIXED: {
        "number of one-colour objects": "d",
        "number of objects": "c",
        "tally of one-colour objects": "bbba",
        "tally of objects": "bbaa",
    },
    "1102 0320 2000": {
        "colours from frequent to rare": "21300",
        "colours from rare to frequent": "31200",
        "solid of the most frequent colour": "22",
        "solid of the rarest colour": "33",
    },
    "10520 01522": {
        "panel 1": "10 01",
        "panel 2": "20 22",
        "which panels are set": "da cd",
        "panels stacked, first on top": "10 21",
        "panels stacked, last on top": "20 22",
        "fullest panel": "20 22",
        "emptiest panel": "10 01",
        "cells in each panel": "cd",
        "colour of each panel": "12",
    },
    "1000 0203 0405 6000": {"panel 3": "04 60", "panel 4": "05 00"},
    "101012 010134": {"panel unlike the others": "12 34"},
    "713723 743753": {"panel 1": "13 43"},  # between lines of the colour that comes first
}

PATTERNS = {
    "1012 2101 0212 2120": {"period under the background": "12121 21212 12121"},
    "1512 2151 5212 2125": {"period under colour 5": "1212 2121 1212 2121"},
    "1212 2121": {"continue the period": "121 212 121"},
    "1221 3443 0665 1771": {"symmetry under the background": "1221 3443 5665 1771"},
    "1221 3443 9665 1771": {"symmetry under colour 9": "1221 3443 5665 1771"},
    "120 000 300": {
        "fill from the left-right mirror": "121 000 303",
        "fill from the top-bottom mirror": "120 000 320",
        "fill from both mirrors": "121 000 323",
        "fill from the transpose": "123 200 300",
        "fill from all views": "121 202 323",
    },
}

WHOLE_GRIDS = {
    "010 200 003": {
        "gravity left": "100 200 300",
        "gravity right": "001 002 003",
        "gravity up": "213 000 000",
        "gravity down": "000 000 213",
    },
    "120 003 000": {
        "shift right": "012 300 000",
        "shift left": "201 030 000",
        "shift down": "000 120 003",
        "shift up": "003 000 120",
    },
    "110 000 300": {
        "sort the rows": "000 300 110",
        "sort the columns": "011 000 003",
        "cells in each row": "ccc aaa bbb",
        "cells in each column": "cba cba cba",
    },
    "110 200 003": {"swap the two most frequent colours": "220 100 003"},
    "110 000": {"swap background and foreground": "001 111"},
    "120 220 000": {"rows in their colours": "111 222 000", "columns in their colours": "120 120 120"},
    "111 120 000": {"mark one-colour rows": "aaa 120 aaa"},
    "120 110 100": {"mark one-colour columns": "a2a a1a a0a"},
    "1203 0000 4500": {"rings": "aaaa abba aaaa"},
}

CELLS = {
    "111111 100101 111111 000000 000000": {
        "enclosed": "111111 1aa1a1 111111 000000 000000",
        "enclosed, by size": "111111 1cc1b1 111111 000000 000000",
        "enclosed, largest": "111111 1bb1a1 111111 000000 000000",
    },
    "000 010 000": {"outline": "0a0 a1a 0a0", "outline with corners": "aaa a1a aaa"},
    "00000 01110 01110 01110 00000": {"rim": "00000 0aaa0 0a1a0 0aaa0 00000"},
    "020 101 020": {
        "link in rows and columns": "020 121 020",
        "link in rows": "020 111 020",
        "link in columns": "020 121 020",
        "between equal colours": "020 1b1 020",
    },
    "1003 0000 1002": {"link in rows and columns": "1003 1000 1002"},
    "10010": {"between equal colours": "1cc10"},
    "1 0 1 0 0": {"between equal colours": "1 d 1 0 0"},
    "102 000 201": {"link in diagonals": "102 010 201"},
    "1003 0000 0010": {"link in diagonals": "1003 0100 0010"},
    "0030 0100 3001": {"link in diagonals": "0030 0100 3001"},
    "001 000 100": {"link in diagonals": "001 010 100"},
    "0000 0100 0020": {
        "rays from the left": "0000 0111 0022",
        "rays from the right": "0000 1100 2220",
        "rays from above": "0000 0100 0120",
        "rays from below": "0120 0120 0020",
        "rays in rows": "0000 1111 2222",
        "rays in columns": "0120 0120 0120",
        "rays in rows, then columns": "0120 1111 2222",
        "rays in columns, then rows": "0120 1121 2122",
        "rays in diagonals": "1010 0102 1020",
    },
    "120 003": {"keep colour 1": "100 000"},
    "2003 0020 0000": {"mark the box of colour 2": "2aa3 aa20 0000"},
}

OBJECT_CHANGES = {  # on OBJECTS, the same for objects of one colour and of any
    "size of each {}": marked("ebdbic"),
    "size rank of each {}": marked("becead"),
    "holes of each {}": marked("aaaaba"),
    "hole parity of each {}": marked("aaaaba"),
    "copies of each {}": marked("bcbcbb"),
    "{}s from top to bottom": marked("bcdefg"),
    "{}s from left to right": marked("befcdg"),
    "height of each {}": marked("cbcbdc"),
    "symmetry of each {}": marked("hhahdh"),
    "{}s at the border": marked("bbbbab"),
    "mark the largest {}": marked("1232a5"),
    "mark the smallest {}": marked("1a3a45"),
    "drop {}s of one or two cells": marked("103040"),
    "keep the largest {}": marked("000040"),
    "fill the box of each {}": "1102033 1100033 0000000 2044405 0044405 0044400 0000000",
}

MIXED_OBJECTS = {
    "1110 2020 2220 0000": {"holes of each one-colour object": "bbb0 a0a0 aaa0 0000"},  # it is the upper object's
    "1110020 0100022 0000020": {"colour of the one-colour object with most mirror symmetry": "1"},
    MIXED: {
        "size of each one-colour object": "db00 dd00 000b",
        "size of each object": "ee00 ee00 000b",
        "colour of the one-colour object with least cells": "2",
        "colour of the object with least cells": "3",
        "crop to the object with most cells": "12 11",
        "unify each object": "1100 1100 0003",
        "mirror each object left-right": "2100 1100 0003",
        "mirror each object top-bottom": "1100 1200 0003",
        "swap the colours of each object": "2100 2200 0003",
    },
}


def examples() -> list[tuple[str, str, str]]:
    """Return (name, grid, expected) of all tables."""
    tables = (GEOMETRY, CROPS, SUMMARIES, PATTERNS, WHOLE_GRIDS, CELLS, MIXED_OBJECTS)
    found = [(n, grid, out) for table in tables for grid, cases in table.items() for n, out in cases.items()]
    for kind in ("one-colour object", "object"):
        for trait, (most_color, most_crop, least_color, least_crop) in TRAITS.items():
            found.append((f"colour of the {kind} with most {trait}", OBJECTS, most_color))
            found.append((f"crop to the {kind} with most {trait}", OBJECTS, most_crop))
            found.append((f"colour of the {kind} with least {trait}", OBJECTS, least_color))
            found.append((f"crop to the {kind} with least {trait}", OBJECTS, least_crop))
        found += [(name.format(kind), OBJECTS, out) for name, out in OBJECT_CHANGES.items()]
    return found


@pytest.mark.parametrize("name, rows, expected", examples())
def test_layer_gives_the_hand_made_result(name, rows, expected):
    wanted = parse(expected)
    found = FUNCTIONS[name](Scene(parse(rows)), wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def test_every_layer_has_an_example_up_to_its_colour():
    # layers that name a colour are one layer up to the renaming tested below
    def general(name):
        return re.sub(r"colour \d$", "colour #", name)

    shown = {general(name) for name, _, _ in examples()}
    assert {general(layer.name) for layer in LAYERS} == shown


DOES_NOT_APPLY = [
    ("identity", "120 003", (3, 2)),
    ("transpose", "120 003", (2, 3)),
    ("enlarge cells", "12", (1, 3)),
    ("enlarge cells", "12", (1, 2)),
    ("shrink blocks", "123", (1, 2)),
    ("tile", "120 003", (2, 3)),
    ("tile", "120 003", (1, 2)),
    ("tile, turned right around the centre", "120", (2, 6)),
    ("copy at each foreground cell", "12", (1, 2)),
    ("copy at each cell of colour 5", "12 03", (4, 4)),
    ("crop to the foreground", "000 000", (1, 1)),
    ("crop to the foreground", "010 000", (1, 2)),
    ("crop inside the foreground", "010 000", (1, 1)),
    ("crop to the box of colour 4", "010", (1, 1)),
    ("crop the upper left", "01 20", (1, 3)),
    ("crop to the object with most cells", "00 00", (1, 1)),
    ("behind the patch, by symmetry", "123 456 789", (1, 1)),
    ("drop the separators", "12 34", (1, 1)),
    ("colours from frequent to rare", "00", (1, 1)),
    ("number of objects", "010", (1, 2)),
    ("tally of objects", "010", (1, 1)),
    ("tally of objects", "010", (4, 8)),
    ("panel 3", "10520 01522", (2, 2)),
    ("panel 1", "1052 0152", (3, 3)),
    ("panel 1", "12345 23456 34567 45678 56789", (1, 1)),
    ("which panels are set", "1000 0203 0405 6000", (2, 2)),
    ("cells in each panel", "10520 01522", (2, 1)),
    ("continue the period", "1234 5678", (3, 3)),
    ("period under colour 7", "1212 2121 1212", (3, 4)),
    ("symmetry under colour 2", "1212 2121 1212", (3, 4)),
    ("fill from the transpose", "120 003", (2, 3)),
    ("swap the two most frequent colours", "10 00", (2, 2)),
    ("swap background and foreground", "12 00", (2, 2)),
    ("enclosed", "010 101 001", (3, 3)),
    ("keep colour 1", "10 00", (2, 2)),
    ("keep colour 0", "12 00", (2, 2)),
    ("size of each object", "00 00", (2, 2)),
    ("swap the colours of each object", "10 00", (2, 2)),
    ("gravity left", "01 00", (1, 2)),
]


@pytest.mark.parametrize("name, rows, shape", DOES_NOT_APPLY)
def test_layer_is_none_when_it_does_not_apply(name, rows, shape):
    assert FUNCTIONS[name](Scene(parse(rows)), shape) is None


def test_object_layers_are_none_when_there_are_too_many_objects():
    grid = np.zeros((13, 13), int)
    grid[::2, ::2] = 3  # 49 single cells
    assert Scene(grid).objects[0].count == 49 > MAX_OBJECTS
    assert FUNCTIONS["size of each object"](Scene(grid), grid.shape) is None
    assert FUNCTIONS["number of objects"](Scene(grid), (1, 1)) is None


# 2. The whole bank on any grid ----------------------------------------------------------------------------------------


def grids(max_side: int = 12):
    """Return a strategy of grids: noise of few or many colours, grown blocks, sparse cells."""

    def build(seed: int, height: int, width: int, colors: int, kind: str) -> np.ndarray:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, colors, (height, width))
        if kind == "blocks":
            return np.kron(noise, np.ones((2, 3), int))[:height, :width]
        if kind == "sparse":
            return np.where(rng.random(noise.shape) < 0.3, rng.permutation(10)[noise], rng.integers(0, 10))
        return rng.permutation(10)[noise]

    sides = st.integers(1, max_side)
    kinds = st.sampled_from(["noise", "blocks", "sparse"])
    return st.builds(build, st.integers(0, 2**32 - 1), sides, sides, st.integers(1, 10), kinds)


def wanted_shapes(grid: np.ndarray) -> list[tuple[int, int]]:
    """Return shapes that reach all kinds of layers."""
    height, width = grid.shape
    shapes = [
        (height, width),
        (width, height),
        (1, 1),
        (2, 2),
        (3, 3),
        (1, 4),
        (30, 30),
        (2 * height, 2 * width),
        (height, max(1, width // 2)),
        (max(1, height - 2), max(1, width - 2)),
        (height * height, width * width),
    ]
    return sorted({(min(h, 30), min(w, 30)) for h, w in shapes})  # fmt: skip


def bank(grid: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    scene = Scene(grid)
    results = {layer.name: layer.function(scene, shape) for layer in LAYERS}
    return {name: result for name, result in results.items() if result is not None}


def assert_valid(grid: np.ndarray, shape: tuple[int, int]) -> None:
    for name, result in bank(grid, shape).items():
        assert isinstance(result, np.ndarray) and result.dtype.kind in "iu", name
        assert result.shape == shape, name
        assert result.min() >= 0 and result.max() < NUM_SYMBOLS, name


@settings(max_examples=60, deadline=None)
@given(grids(30), st.data())
def test_bank_gives_symbols_of_the_wanted_shape_on_any_grid(grid, data):
    drawn = st.tuples(st.integers(1, 30), st.integers(1, 30))
    shape = data.draw(st.one_of(st.sampled_from(wanted_shapes(grid)), drawn))
    assert_valid(grid, shape)


@settings(max_examples=60, deadline=None)
@given(grids(), st.permutations(range(1, 10)), st.data())
def test_renaming_colours_renames_every_layer(grid, order, data):
    renamed = np.array([0, *order, *range(MARK, NUM_SYMBOLS)])  # colour 0 stays, as it is favoured as background
    shape = data.draw(st.sampled_from(wanted_shapes(grid)))
    plain, other = bank(grid, shape), bank(renamed[grid], shape)

    def new_name(name):
        return re.sub(r"colour (\d)$", lambda found: f"colour {renamed[int(found[1])]}", name)

    assert {new_name(name) for name in plain} == set(other)
    for name, result in plain.items():
        np.testing.assert_array_equal(renamed[result], other[new_name(name)], name)


def adversarial_grids() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows, columns = np.indices((30, 30))
    dots = np.zeros((30, 30), int)
    dots[::5, ::5] = 1 + np.arange(36).reshape(6, 6) % 9  # as many objects as are looked at
    spiral = np.minimum(np.minimum(rows, 29 - rows), np.minimum(columns, 29 - columns)) % 2
    spiral[np.arange(1, 15), np.arange(14)] ^= 1
    return {
        "checkerboard": (rows + columns) % 2,
        "colourful checkerboard": (rows + columns) % 10,
        "noise": rng.integers(0, 10, (30, 30)),
        "two-colour noise": rng.integers(0, 2, (30, 30)),
        "rows": rows % 10,
        "columns": columns % 3,
        "dots": dots,
        "grown dots": np.maximum(np.maximum(dots, np.roll(dots, 1, 0)), np.roll(dots, (1, 1), (0, 1))),
        "spiral": spiral,
        "one colour": np.full((30, 30), 7),
        "panels": np.where((rows % 5 == 4) | (columns % 5 == 4), 5, rng.integers(0, 3, (30, 30))),
        "symmetric": np.maximum(np.abs(2 * rows - 29), np.abs(2 * columns - 29)) % 9,
        "line": rng.integers(0, 10, (1, 30)),
        "cell": np.array([[4]]),
    }


@pytest.mark.parametrize("name", adversarial_grids())
def test_bank_is_valid_and_fast_on_adversarial_grids(name):
    grid = adversarial_grids()[name]
    for shape in wanted_shapes(grid):
        assert_valid(grid, shape)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            bank(grid, shape)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.06, (shape, seconds)


@settings(max_examples=15, deadline=None)
@given(grids(8), st.randoms(use_true_random=False))
def test_layers_do_not_depend_on_each_other(grid, random):
    shape = random.choice(wanted_shapes(grid))
    together, original = bank(grid, shape), grid.copy()
    for layer in random.sample(LAYERS, 40):
        alone = layer.function(Scene(grid), shape)
        assert (alone is None) == (layer.name not in together), layer.name
        if alone is not None:
            np.testing.assert_array_equal(alone, together[layer.name], layer.name)
    np.testing.assert_array_equal(grid, original)


def test_names_are_unique_and_families_are_single_words():
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
    assert all(layer.family.isalpha() and layer.family.islower() for layer in LAYERS)


# 3. Helpers -----------------------------------------------------------------------------------------------------------


def flood(grid: np.ndarray, mask: np.ndarray, diagonal: bool, one_color: bool) -> tuple[np.ndarray, int]:
    """Return what label returns, by flooding."""
    labels, count = np.zeros(grid.shape, int), 0
    steps = [s for s in itertools.product((-1, 0, 1), repeat=2) if any(s) and (diagonal or 0 in s)]
    for start in np.argwhere(mask):
        if labels[tuple(start)]:
            continue
        count += 1
        open_cells = [tuple(start)]
        labels[tuple(start)] = count
        while open_cells:
            i, j = open_cells.pop()
            for di, dj in steps:
                cell = (i + di, j + dj)
                if not (0 <= cell[0] < grid.shape[0] and 0 <= cell[1] < grid.shape[1]):
                    continue
                if mask[cell] and not labels[cell] and not (one_color and grid[cell] != grid[i, j]):
                    labels[cell] = count
                    open_cells.append(cell)
    return labels, count


@settings(max_examples=40, deadline=None)
@given(grids(), st.booleans(), st.booleans())
def test_label_equals_flooding(grid, diagonal, one_color):
    mask = grid != background_color(grid)
    labels, count = label(grid, mask, diagonal, one_color)
    expected, number = flood(grid, mask, diagonal, one_color)
    assert count == number
    np.testing.assert_array_equal(labels, expected)


def test_label_asks_numpy_for_no_number_that_a_grid_of_bytes_cannot_hold(monkeypatch):
    """Until 2.4 numpy.where wraps such a number round, from 2.5 it raises."""
    where = np.where

    def strict(condition, *values):
        kinds = [x if type(x) is int else np.asarray(x).dtype for x in values]
        return where(condition, *(np.result_type(*kinds).type(x) if type(x) is int else x for x in values))

    monkeypatch.setattr(np, "where", strict)
    grid = np.array([[1, 0, 1]], np.uint8)
    labels, count = label(grid, grid > 0, False, True)
    assert count == 2 and labels.tolist() == [[1, 0, 2]]


def test_label_follows_a_long_spiral():
    grid = adversarial_grids()["spiral"]
    for mask in (grid > 0, grid == 0):
        labels, count = label(grid, mask, False, True)
        expected, number = flood(grid, mask, False, True)
        assert count == number
        np.testing.assert_array_equal(labels, expected)


@settings(max_examples=25, deadline=None)
@given(grids(9))
def test_rays_equal_a_walk_from_each_cell(grid):
    background = background_color(grid)
    steps = ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
    for found, (di, dj) in zip(rays(grid, background), steps, strict=True):
        for i, j in np.ndindex(grid.shape):
            expected, row, column = NO_HIT, i + di, j + dj
            while 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1] and expected == NO_HIT:
                if grid[row, column] != background:
                    expected = grid[row, column]
                row, column = row + di, column + dj
            assert found[i, j] == expected, (di, dj, i, j)


@settings(max_examples=25, deadline=None)
@given(grids(9), st.booleans())
def test_neighbor_counts_equal_counting(grid, diagonal):
    mask = grid > 4
    counts = neighbor_counts(mask, diagonal)
    for i, j in np.ndindex(grid.shape):
        around = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a or b) and (diagonal or a * b == 0)]
        inside = [cell for cell in around if 0 <= cell[0] < grid.shape[0] and 0 <= cell[1] < grid.shape[1]]
        assert counts[i, j] == sum(mask[cell] for cell in inside)


@settings(max_examples=25, deadline=None)
@given(grids(9), st.integers(0, 9))
def test_column_pairs_equal_comparing(grid, hidden):
    shown, unequal = column_pairs(grid, hidden)
    for a, b in np.ndindex(shown.shape):
        seen = (grid[:, a] != hidden) & (grid[:, b] != hidden)
        assert shown[a, b] == seen.sum()
        assert unequal[a, b] == (seen & (grid[:, a] != grid[:, b])).sum()


@settings(max_examples=25, deadline=None)
@given(grids(9))
def test_enclosed_equals_what_flooding_from_outside_leaves_dry(grid):
    scene = Scene(grid)
    padded = np.pad(scene.ground, 1, constant_values=True)
    labels, _ = flood(np.zeros_like(padded, int), padded, False, False)
    np.testing.assert_array_equal(scene.enclosed, (padded & (labels != 1))[1:-1, 1:-1])


def test_unview_undoes_view():
    grid = np.arange(6).reshape(2, 3)
    for direction in (LEFT, RIGHT, UP, DOWN):
        np.testing.assert_array_equal(unview(view(grid, direction), direction), grid)
    assert [int(view(grid, d)[0, 0]) for d in (LEFT, RIGHT)] == [0, 2]
    assert [int(view(grid, d)[0, 0]) for d in (UP, DOWN)] == [0, 3]
    assert len({VIEWS[k](grid).tobytes() + bytes(VIEWS[k](grid).shape) for k in range(8)}) == 8


def test_background_prefers_zero_then_the_first_colour():
    assert background_color(parse("1122")) == 1
    assert background_color(parse("2211")) == 2
    assert background_color(parse("11100 11000")) == 0  # five of ten each
    assert background_color(parse("1111100000")) == 0
    assert background_color(parse("1111110000")) == 0  # six against four and a fifth of ten
    assert background_color(parse("1111111000")) == 1


def test_most_common_breaks_ties_by_reading_order():
    groups = np.array([0, 0, 1, 1, 1, 3])
    assert most_common(groups, np.array([7, 2, 5, 3, 3, 9]), 4).tolist() == [7, 3, -1, 9]


def test_bounding_box_is_tight():
    mask = np.zeros((4, 5), bool)
    assert bounding_box(mask) is None
    mask[1, 3] = mask[2, 1] = True
    assert bounding_box(mask) == (slice(1, 3), slice(1, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 7), st.integers(6, 9))
def test_inpaint_restores_a_mirrored_grid(seed, half, height):
    rng = np.random.default_rng(seed)
    left = rng.integers(1, 9, (height, half))
    whole = np.concatenate([left, left[:, ::-1]], 1)
    damaged = whole.copy()
    damaged[1:3, :2] = 9
    np.testing.assert_array_equal(inpaint(damaged, 9), whole)
    np.testing.assert_array_equal(inpaint(damaged.T, 9), whole.T)


def test_inpaint_is_none_without_a_symmetry():
    assert inpaint(parse("1234 5678 1357 9264"), 9) is None
    assert inpaint(parse("1991 9999 9999 9999"), 9) is None  # too little to compare


def test_inpaint_finds_axes_off_the_middle():
    np.testing.assert_array_equal(inpaint(parse("5121 6343 7829"), 9), parse("5121 6343 7828"))
    np.testing.assert_array_equal(inpaint(parse("1215 3436 9287"), 9), parse("1215 3436 8287"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3))
def test_periodic_restores_and_continues_a_tiling(seed, rows, columns):
    rng = np.random.default_rng(seed)
    tile = rng.integers(0, 9, (rows, columns))
    large = np.tile(tile, (12, 12))[:12, :12]
    damaged = large[:9, :9].copy()
    damaged[2:4, 3:5] = 9
    np.testing.assert_array_equal(periodic(damaged, 9, (12, 12)), large)


def test_periodic_is_none_without_a_period():
    assert periodic(parse("123 456 789"), 0, (3, 3)) is None


def test_scene_describes_the_grid():
    scene = Scene(parse("0110 0330 2000"))
    assert scene.shape == (3, 4) and scene.background == 0
    assert scene.counts.tolist() == [7, 2, 1, 2, 0, 0, 0, 0, 0, 0]
    assert scene.colors == [0, 1, 2, 3] and scene.by_frequency == [1, 3, 2]
    assert [objects.count for objects in scene.objects] == [3, 1]
    with pytest.raises(ValueError, match="read-only"):
        scene.grid[0, 0] = 1
