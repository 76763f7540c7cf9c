"""Tests of answer_traits: traits of grids drawn by hand, and which rules candidates break."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 - puts the modules on the path
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from answer_traits import CHANGES, FAR, NUM_MISFITS, RULES, grid_traits, misfits, pair_traits

GRIDS = arrays(np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 9))


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def test_traits_of_a_grid_by_hand():
    traits = grid_traits(grid("0110", "0110", "0000", "3000", "0020"))
    expected = {
        "colors": 4, "color set": 0b1111, "common": 0, "ink": 6, "ink colors": 3, "even": False, "most": 4, "least": 1,
        "first color": 1, "cells 1": 4, "has 2": True, "has 4": False, "parts": 3, "parts: largest": 4,
        "parts: smallest": 1, "parts: are boxes": True, "objects": 3, "objects: kinds of boxes": 2, "things": 3,
        "things: of one box": False, "things: largest box": 4, "gaps": 1, "holes": 0, "rows: plain": 1,
        "rows: plain ink": 0, "rows: different": 4, "rows: with ink": 4, "columns: with ink": 3, "left-right": False,
        "border ink": 4, "lone": 2, "lone ink": 2, "box height": 5, "box width": 3, "box full": False, "squares": True,
    }  # fmt: skip
    assert {name: traits[name] for name in expected} == expected


def test_holes_symmetry_and_periods_by_hand():
    ring = grid_traits(grid("555", "505", "555"))
    assert ring["holes"] == 1 and ring["left-right"] and ring["half turn"] and ring["transposed"]
    assert ring["border plain"] and ring["parts: are boxes"] is False and ring["lone gaps"] == 1
    striped = grid_traits(grid("12", "21", "12", "21"))
    assert striped["rows: period"] == 2 and striped["columns: period"] == 0 and striped["rows: different"] == 2
    assert grid_traits(grid("77", "77"))["common"] == 7 and grid_traits(grid("77", "77"))["ink"] == 0


def test_diagonal_cells_of_two_colors_are_one_thing_two_objects_two_parts():
    traits = grid_traits(grid("100", "020", "001"))
    assert (traits["parts"], traits["objects"], traits["things"]) == (3, 3, 1)
    assert grid_traits(grid("100", "010", "001"))["objects"] == 1


def test_traits_of_a_pair_by_hand():
    traits = pair_traits(grid("110", "002"), grid("110", "332"))
    expected = {
        "come": 1 << 3, "gone": 0, "any come": True, "same counts": False, "keeps the number of 1": True,
        "keeps the number of 0": False, "changed": 2, "changed from": 1, "changed to": 1 << 3, "kinds of change": 1,
        "colors changed entirely": 0, "colors changed partly": 1, "changes": 1, "largest change": 2,
        "rows changed": 1, "columns changed": 2, "ink kept": True, "gaps kept": False, "ambiguous": False,
    }  # fmt: skip
    assert {name: traits[name] for name in expected} == expected
    other_shape = pair_traits(grid("110", "002"), grid("1"))
    assert [other_shape[name] for name in CHANGES] == [0] * len(CHANGES) and other_shape["gone"] == 0b101


@settings(max_examples=60, deadline=None)
@given(GRIDS, GRIDS)
def test_traits_are_the_same_numbers_whatever_the_grid(before, after):
    """Every grid has every trait, finite; what counts cells or asks for symmetry agrees with the grid turned over."""
    traits, turned = grid_traits(after), grid_traits(np.ascontiguousarray(after[::-1, ::-1]))
    values = np.array([*traits.values(), *pair_traits(before, after).values()], float)
    assert np.isfinite(values).all() and 2 * len(traits) + len(pair_traits(before, after)) == len(RULES)
    kept = [name for name in traits if not name.endswith((" color", "common"))]  # ties go by number
    assert {name: traits[name] for name in kept} == {name: turned[name] for name in kept}
    assert sum(traits[f"cells {color}"] for color in range(10)) == after.size


def test_a_candidate_like_the_demonstrations_breaks_no_rule_and_another_the_ones_it_breaks():
    task = [(grid("10", "00"), grid("30", "00")), (grid("01", "00"), grid("03", "00")),
            (grid("00", "01"), grid("00", "03"))]  # fmt: skip
    right, colored, filled = grid("00", "30"), grid("00", "40"), grid("33", "33")
    found = misfits(task, grid("00", "10"), [right, colored, filled])
    assert found.dtype == np.float16 and found.shape == (3, NUM_MISFITS)
    broken, unseen, distance = found.reshape(3, 3, -1).transpose(1, 0, 2)
    names = [{RULES[k] for k in np.flatnonzero(row)} for row in broken]
    assert names[0] == set() and {"has 4", "cells 3", "come", "changed to"} <= names[1]
    assert "ink" in names[2] and "ink" not in names[1] and set(broken[1][broken[1] > 0]) == {0.75}  # three agree
    assert (distance[0][broken[0] > 0] == 0).all() and distance.max() <= FAR
    assert not (broken.astype(bool) & unseen.astype(bool)).any()


def test_where_demonstrations_differ_nothing_is_broken_and_new_values_are_unseen():
    task = [(grid("00"), grid("01")), (grid("00"), grid("02"))]
    found = misfits(task, grid("00"), [grid("01"), grid("03")]).reshape(2, 3, -1)
    place = RULES.index("first color")
    assert found[0, :, place].tolist() == [0, 0, 0] and found[1, :2, place].tolist() == [0, 1]
    assert found[1, 2, place] == pytest.approx(1 / (1 + 0.5 + 0.15), abs=1e-3)


def test_without_demonstrations_no_rule_is_known():
    assert not misfits([], grid("1"), [grid("1"), grid("2")]).any() and misfits([], grid("1"), []).shape[0] == 0
