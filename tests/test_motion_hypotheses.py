"""Hypotheses of motion, lines, filling, stamping and marking: each on a hand-made example, and their contract.

Grids are written row by row, one character per symbol: 0-9 colours, a = the first mark, b the second, ...
"""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid_hypotheses import MARK, NUM_SYMBOLS, Scene
from motion_hypotheses import MOTION_LAYERS, PARTS

FUNCTIONS = {layer.name: layer.function for layer in MOTION_LAYERS}


def parse(rows: str) -> np.ndarray:
    return np.array([[int(symbol, NUM_SYMBOLS) for symbol in row] for row in rows.split()])


# 1. Every hypothesis by hand ------------------------------------------------------------------------------------------

REGIONS = {
    "01000 11022 00020": {
        "size of each background region": "b1hhh 11h22 hhh2b",
        "largest and smallest background regions": "b1aaa 11a22 aaa2b",
        "form of each background region": "a1ccc 11c22 ccc2a",
        "borders of each background region": "c1eee 11e22 eee2c",
    },
    "111110000 100011110 111110010 000011110 000000000": {
        "parity of each hole": "111110000 1bbb11110 11111aa10 000011110 000000000",
    },
    "000000000 111111100 101010100 111111100 101010100 111111100 101010100 111111100": {
        "holes at the edge": "000000000 111111100 1b1b1b100 111111100 1b1a1b100 111111100 1b1b1b100 111111100",
    },
    "00100 20103 00100": {"fill regions from their seeds": "22133 22133 22133"},
    "3011110 0012010 0011110 0000000": {
        "fill between walls": "3311113 3312213 3311113 3333333",
        "fill inside walls": "3011110 0012210 0011110 0000000",
    },
}

DISTANCES = {
    "1111100 1111100 1111100 1111100 1111100 0000000": {
        "depth in one-colour objects": "aaaaa00 abbba00 abcba00 abbba00 aaaaa00 0000000",
    },
    "10000 00000 00002": {
        "nearest foreground": "11122 11122 11122",
        "nearest foreground, in straight steps": "11112 11122 11222",
        "rings around the foreground": "10122 00100 11102",
        "rings around the foreground, in straight steps": "10102 01020 10202",
        "distance to the foreground": "1abbb aabaa bbba2",
        "distance to the foreground, in straight steps": "1abcb abcba bcba2",
    },
    "1000 0000 0000 2000": {"nearest row": "1111 1111 2222 2222"},
    "1002": {"nearest column": "1122"},
    "10002 00000": {"meet halfway in rows": "11a22 00000"},
    "10 00 00 20 00": {"meet halfway in columns": "10 10 20 20 00"},
    "120 003 040": {
        "colour at the left border": "111 000 000",
        "colour at the right border": "000 333 000",
        "colour at the upper border": "120 120 120",
        "colour at the lower border": "040 040 040",
    },
    "1022 0000 0304 0003": {
        "foreground in its leftmost colour": "1011 0000 0303 0003",
        "foreground in its rightmost colour": "2022 0000 0404 0003",
        "foreground in its uppermost colour": "1022 0000 0302 0002",
        "foreground in its lowermost colour": "1023 0000 0303 0003",
    },
}

TRAITS = {
    "1102200 0000000 3300400 0300000": {
        "mark one-colour objects with most copies of their shape": "aa0aa00 0000000 3300400 0300000",
        "mark one-colour objects with least copies of their shape": "1102200 0000000 aa00a00 0a00000",
        "mark one-colour objects with most mirror symmetry": "aa0aa00 0000000 3300a00 0300000",
        "mark one-colour objects with least mirror symmetry": "1102200 0000000 aa00400 0a00000",
        "mark one-colour objects with most height": "1102200 0000000 aa00400 0a00000",
        "mark one-colour objects with least height": "aa0aa00 0000000 3300a00 0300000",
    },
    "10020 00000 10300": {
        "mark one-colour objects with most objects of their colour": "a0020 00000 a0300",
        "mark one-colour objects with least objects of their colour": "100a0 00000 10a00",
    },
    "1100 1200 0003": {
        "mark objects with most other cells in their box": "aa00 aa00 0003",
        "mark objects with least other cells in their box": "1100 1200 000a",
        "minority cells of each object": "1100 1a00 0003",
    },
    "11111 11111 11111 00000 00000": {
        "odd cells of each object": "11111 1a1a1 11111 00000 00000",
        "halves of each one-colour object": "aabcc ddeff gghii 00000 00000",
        "parities in each one-colour object": "ababa cdcdc ababa 00000 00000",
        "box edges of each one-colour object": "cbbbc baaab cbbbc 00000 00000",
    },
    "1110 1000 0022 0000": {
        "width of each one-colour object": "ddd0 d000 00cc 0000",
        "form of each one-colour object": "bbb0 b000 00ee 0000",
        "ends of each one-colour object": "ccc0 c000 00cc 0000",
        "corners of each one-colour object": "bbb0 b000 00aa 0000",
    },
    "11022 10000 00003": {
        "mark blocks of one or two cells": "110aa 10000 0000a",
        "size of each block": "dd0cc d0000 0000b",
        "largest and smallest blocks": "aa0cc a0000 0000b",
    },
}

SURROUNDINGS = {
    "10000 00000 00023 00000": {
        "outline by size of each object": "1b000 bbccc 00c23 00ccc",
        "outline by size of each one-colour object": "1b000 bbbbb 00b23 00bbb",
    },
    "10000 00000 00022 00000": {"outline of each object of several cells": "10000 00aaa 00a22 00aaa"},
    "000 010 000": {"outline in colour": "010 111 010", "outline with corners in colour": "111 111 111"},
    "00000 00000 00110 00010 00000": {"frame around each object": "00000 0aaaa 0a11a 0a01a 0aaaa"},
    "100010 033000 033000 033000 100010 000000": {
        "frame on the box of the rarest colour": "1aaa10 a330a0 a330a0 a330a0 1aaa10 000000",
        "frame inside the box of the rarest colour": "100010 033a00 033a00 033a00 100010 000000",
    },
    "30100 30010 30000 30100 30001": {"boxes of the rarest colour": "301aa 30a1a 30aaa 301aa 30aa1"},
    "22000 22000 00333 00333 00333": {
        "squares of side 2 of foreground": "aa000 aa000 00aaa 00aaa 00aaa",
        "squares of side 3 of foreground": "22000 22000 00aaa 00aaa 00aaa",
    },
    "11111 10011 10001 10001 11001": {
        "squares of side 2 of background": "11111 1aa11 1aaa1 1aaa1 11aa1",
        "squares of side 3 of background": None,
    },
    "11111 10001 10001 10001 11111 00000": {
        "squares of side 3 of background": "11111 1aaa1 1aaa1 1aaa1 11111 00000",
    },
    "12342 21111 31111 41111 31111": {"squares of side 4 of one colour": "12342 2aaaa 3aaaa 4aaaa 3aaaa"},
    "12342 21112 31113 41112 32323": {
        "squares of side 3 of one colour": "12342 2aaa2 3aaa3 4aaa2 32323",
        "squares of side 4 of one colour": None,
    },
    "0100 1112 0100 0000": {"pluses of foreground": "0a00 aaa2 0a00 0000"},
    "10111 00011 10110 00000": {"pluses of background": "1a111 aaa11 1a110 00000"},
    "1100 1100 1003 0000 0000": {
        "largest rectangle of foreground": "aa00 aa00 1003 0000 0000",
        "largest rectangle of background": "1100 1100 1003 aaaa aaaa",
    },
}

COLORS = {
    "11000 10000 00011 00010 02200 02000": {
        "colour of the object of the same shape": "22000 20000 00022 00020 02200 02000",
    },
    "111000 000000 200030": {
        "colour of the nearest object": "222000 000000 200030",
        "colour of the nearest object, which vanishes": "222000 000000 000000",
    },
    "1000 0000 0010 0202": {"fill the box of each colour": "1110 1110 1110 0222"},
    "130000 000000 000110 000010 000000": {"boxes by the legend": "130000 003333 003113 003313 003333"},
}

MOTION = {
    "00010 01100 00002 00000": {
        "move each block left until contact": "10000 11000 20000 00000",
        "move each block right until contact": "00001 00011 00002 00000",
        "move each block up until contact": "01112 00000 00000 00000",
        "move each block down until contact": "00000 00000 00000 01112",
    },
    "01000 00200 00000 33333": {"move each block to the bar": "00000 00000 01200 33333"},
    "00200 00000 01100 01100 00000": {"trail of each block to the largest": "00200 00200 01100 01100 00000"},
    "11000 11010 00000 02000 02200": {"move each object to its colour": "11000 11100 00000 02000 02200"},
    "00000 01100 00000": {
        "move each object left by its size": "00000 10000 00000",
        "move each object right by its size": "00000 00011 00000",
        "move each object up by its size": "01100 00000 00000",
        "move each object down by its size": "00000 00000 01100",
    },
    "00000 00000 01110 00000 00000": {"turn each object by a quarter": "00000 00100 00100 00100 00000"},
    "200020 000000 000000 000000 200020 011100": {
        "centre the largest object": "200020 000000 011100 000000 200020 000000",
    },
    "300000 000000 001100 001100 000000 002000": {
        "gather cells": "000000 030000 001100 001100 002000 000000",
        "gather aligned cells": "300000 000000 001100 001100 002000 000000",
        "gather aligned cells at the largest": "000000 000000 001100 001100 002000 000000",
    },
    "100020 100000 100010 001000": {"gather aligned cells at their colour": "100000 100000 110000 000000"},
}

LINES = {
    "000000 012000 011000 000000": {
        "ray from each odd cell": "000200 012000 011000 000000",
        "ray from each odd cell across": "000000 012000 011000 200000",
    },
    "00000 00000 01110 00200 00000": {"ray from each odd cell across": "00200 00200 01110 00200 00000"},
    "2003302 0003300 0000000": {
        "join the rarest colour": "2aabba2 0003300 0000000",
        "join the rarest colour and what is between": "2aabba2 000bb00 0000000",
    },
    "1110000 1110000 1112220 0002220 0002220 0000000": {
        "cross through squares": "1110200 1111a11 1112220 2a22222 0102220 0100200",
    },
    "1000 0000 0020": {"emptiest rows": "1000 aaaa 0020", "emptiest columns": "1a0a 0a0a 0a2a"},
    "1223 1223 1123 1223": {"stripes": "1223 1223 1223 1223"},
    "000 010 000 002": {
        "elbow that leaves colour 1 vertically": "000 010 0a0 0a2",
        "elbow that leaves colour 2 vertically": "000 01a 00a 002",
    },
    "000 000 100": {"bounce up": "001 010 100"},
    "100 000 000 000": {"bounce down": "100 010 001 010"},
    "000000 000010 000000": {"bounce left": "010000 101010 000100", "bounce right": "000000 000010 000001"},
    "0000000 0000000 0111110 0000000 0000000": {"diamonds on lines": "000a000 00aaa00 0111110 00aaa00 000a000"},
    "0000 0100 0000 0000 0000": {"rectangle to the nearest corner": "1100 1100 0000 0000 0000"},
}

STAMPS = {
    "2110000 0100000 0000000 0000020 0000000 0000000": {
        "complete each object at markers": "2110000 0100000 0000000 0000021 0000001 0000000",
        "move each object to markers": "0000000 0000000 0000000 0000021 0000001 0000000",
    },
    "1102000 1000000 0000000 0000020 0000000 0000000": {
        "complete each cluster at markers": "1102000 1000000 0000000 0011020 0010000 0000000",
    },
    "231100 000000 000003 000000": {"copy objects to single cells": "231100 000000 000023 000000"},
    "1110000 1210000 1110000 0000000 0000020 0000000 0000000": {
        "complete the largest box at markers": "1110000 1210000 1110000 0000111 0000121 0000111 0000000",
    },
    "0000000000 0110000000 0110200000 0000000000": {
        "repeat the largest object towards others": "0000000000 0110220220 0110220220 0000000000",
    },
    "121000 211000 000000 000444 000444": {
        "paste into solids": "121000 211000 000000 000121 000211",
        "paste into solids mirrored left-right": "121000 211000 000000 000121 000112",
        "paste into solids mirrored top-bottom": "121000 211000 000000 000211 000121",
        "paste into solids turned by half": "121000 211000 000000 000112 000121",
    },
    "11111022222 10101020002 11111022222 00000000030": {
        "share the shape with most holes": "11111022222 10101020202 11111022222 00000000000",
    },
    "22000 02000 00000 00030 00000": {
        "copy the largest loose object to cells": "22000 02000 00000 00022 00002",
        "copy the largest loose object to cells in their colour": "22000 02000 00000 00033 00003",
    },
    "1100 1000 0022 0002": {
        "mirror each one-colour object left-right": "1100 0100 0022 0020",
        "mirror each one-colour object top-bottom": "1000 1100 0002 0022",
    },
    "00000 01100 00200 00000 00000": {
        "complete each object by both mirrors": "00000 01110 00200 01110 00000",
        "complete each object by quarter turns": "00000 01110 01210 01110 00000",
    },
    "10200 02200 22222 00200 00200": {"complete about the cross": "10201 02220 22222 02220 10201"},
}

PANELS = "11011011 13011013 00000000 11011011 11011011 00000000 11011011 13011011"
PATTERNS = {
    "0120 1200 2000 0000": {"continue the diagonals": "2121 1212 2121 1212"},
    "000000 012000 003000 000000": {
        "repeat the foreground all over": "303030 212121 303030 212121",
        "repeat the foreground along rows": "000000 212121 303030 000000",
        "repeat the foreground along columns": "003000 012000 003000 012000",
    },
    PANELS: {
        "link panels in rows": "11011011 13013013 00000000 11011011 11011011 00000000 11011011 13011011",
        "link panels in columns": "11011011 13011013 00000000 11011011 13011011 00000000 11011011 13011011",
        "link panels in rows and columns": "11011011 13013013 00000000 11011011 13011011 00000000 11011011 13011011",
        "merge panels": "11011011 13013013 00000000 11011011 13013013 00000000 11011011 13013013",
        "copy the fullest panel": "11011011 13013013 00000000 11011011 13013013 00000000 11011011 13013013",
        "rank of each panel": "aa0bb0aa aa0bb0aa 00000000 bb0bb0bb bb0bb0bb 00000000 aa0bb0bb aa0bb0bb",
    },
    "00501500 00500500 55555555 20500520 00500500 55555555 00510500 00500500": {
        "link rooms": "00511500 00511500 55555555 225aa522 225aa522 55555555 00511500 00511500",
    },
}

TABLES = (REGIONS, DISTANCES, TRAITS, SURROUNDINGS, COLORS, MOTION, LINES, STAMPS, PATTERNS)
EXAMPLES = [(name, grid, out) for table in TABLES for grid, cases in table.items() for name, out in cases.items()]


@pytest.mark.parametrize("name, rows, expected", EXAMPLES)
def test_layer_gives_the_hand_made_result(name, rows, expected):
    grid = parse(rows)
    found = FUNCTIONS[name](Scene(grid), grid.shape)
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, parse(expected))


def test_every_layer_has_an_example_up_to_its_colour():
    def general(name):
        return re.sub(r"colour \d", "colour #", name)

    assert {general(name) for name in FUNCTIONS} == {general(name) for name, _, out in EXAMPLES if out}


DOES_NOT_APPLY = [
    ("size of each background region", "000 010 000"),
    ("parity of each hole", "010 111 010"),
    ("fill regions from their seeds", "010 010 010"),
    ("nearest foreground", "000 000"),
    ("meet halfway in rows", "100 002"),
    ("mark one-colour objects with most height", "10 02"),
    ("move each block to the bar", "010 000 000"),
    ("trail of each block to the largest", "1100 0000 0002"),
    ("gather cells", "000 010 000"),
    ("join the rarest colour", "100 002"),
    ("elbow that leaves colour 3 vertically", "000 010 000 002"),
    ("bounce up", "101 000"),
    ("complete each object at markers", "211 010 000"),
    ("complete the largest box at markers", "1100 1000 0000 0002"),
    ("boxes by the legend", "1300 0000"),
    ("continue the diagonals", "1200 3400 0000"),
    ("link rooms", "010 000 000"),
    ("link panels in rows", "110 011 101"),
]


@pytest.mark.parametrize("name, rows", DOES_NOT_APPLY)
def test_layer_is_none_when_it_does_not_apply(name, rows):
    grid = parse(rows)
    assert FUNCTIONS[name](Scene(grid), grid.shape) is None


def test_clusters_join_what_has_one_cell_between():
    grid = parse("1010010 0000000 0000003")
    assert [PARTS[kind](Scene(grid)).count for kind in ("block", "object", "cluster")] == [4, 4, 2]
    np.testing.assert_array_equal(PARTS["cluster"](Scene(grid)).labels, parse("1010020 0000000 0000002"))


# 2. All of them on any grid -------------------------------------------------------------------------------------------


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Return noise, blocks or scattered cells of few or many colours."""
    rng = np.random.default_rng(seed)
    grid = rng.permutation(10)[rng.integers(0, rng.integers(1, 11), (height, width))]
    if seed % 3 == 1:
        grid = np.kron(grid, np.ones((2, 3), int))[:height, :width]
    if seed % 2:
        grid[rng.random(grid.shape) < 0.75] = rng.integers(0, 10)
    return grid


def bank(grid: np.ndarray) -> dict[str, np.ndarray]:
    scene = Scene(grid)
    results = {layer.name: layer.function(scene, grid.shape) for layer in MOTION_LAYERS}
    return {name: result for name, result in results.items() if result is not None}


def grids(most: int) -> st.SearchStrategy[np.ndarray]:
    sides = st.integers(1, most)
    return st.builds(noise, st.integers(0, 2**32 - 1), sides, sides)


@settings(max_examples=30, deadline=None)
@given(grids(30))
def test_layers_give_symbols_of_the_grid_s_shape_on_any_grid(grid):
    original = grid.copy()
    for name, result in bank(grid).items():
        assert isinstance(result, np.ndarray) and result.dtype.kind in "iu", name
        assert result.shape == grid.shape, name
        assert result.min() >= 0 and result.max() < NUM_SYMBOLS, name
    np.testing.assert_array_equal(grid, original)


@settings(max_examples=30, deadline=None)
@given(grids(12), st.permutations(range(1, 10)))
def test_renaming_colours_renames_every_layer(grid, order):
    renamed = np.array([0, *order, *range(MARK, NUM_SYMBOLS)])  # colour 0 stays, as it is favoured as background
    plain, other = bank(grid), bank(renamed[grid])

    def new_name(name):
        return re.sub(r"colour (\d)", lambda found: f"colour {renamed[int(found[1])]}", name)

    assert {new_name(name) for name in plain} == set(other)
    for name, result in plain.items():
        np.testing.assert_array_equal(renamed[result], other[new_name(name)], name)


@settings(max_examples=10, deadline=None)
@given(grids(10), st.randoms(use_true_random=False))
def test_layers_do_not_depend_on_each_other(grid, random):
    together = bank(grid)
    for layer in random.sample(MOTION_LAYERS, 30):
        alone = layer.function(Scene(grid), grid.shape)
        assert (alone is None) == (layer.name not in together), layer.name
        if alone is not None:
            np.testing.assert_array_equal(alone, together[layer.name], layer.name)


def test_layers_ask_for_the_same_shape():
    scene = Scene(parse("1200 0120 0000"))
    assert all(layer.function(scene, (4, 3)) is None for layer in MOTION_LAYERS)


@pytest.mark.parametrize("density", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("colors", [2, 10])
def test_layers_are_fast_on_large_noise(density, colors):
    rng = np.random.default_rng(0)
    grid = np.where(rng.random((30, 30)) < density, rng.integers(0, colors, (30, 30)), 0)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        bank(grid)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05, seconds


def test_names_are_unique_and_families_are_single_words():
    assert len(FUNCTIONS) == len(MOTION_LAYERS)
    assert all(layer.family.isalpha() and layer.family.islower() for layer in MOTION_LAYERS)
