"""The whole bank of hypotheses, whatever its module: shapes, symbols, names, renaming of colours, time."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo_prior import BANK
from grid_hypotheses import MARK, NUM_SYMBOLS, Scene

SIDES = st.integers(1, 12)


def drawn(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Return noise, scattered objects, or panels between lines, depending on the seed."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, rng.integers(1, 11), shape, dtype=np.uint8)
    if seed % 3:
        grid[rng.random(shape) < 0.7] = 0
    if seed % 3 == 2:
        for axis, side in enumerate(shape):
            if side > 4:
                np.moveaxis(grid, axis, 0)[side // 2] = 5
    return grid


def test_names_differ_and_can_be_read():
    names = [layer.name for layer in BANK]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[ -~]{3,120}", name) for name in names)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), SIDES, SIDES, st.one_of(st.none(), st.tuples(SIDES, SIDES)))
def test_every_layer_gives_symbols_of_the_wanted_shape_or_nothing(seed, height, width, shape):
    grid = drawn(seed, (height, width))
    scene, shape = Scene(grid), shape or grid.shape
    for layer in BANK:
        found = layer.function(scene, shape)
        if found is None:
            continue
        assert found.shape == shape and found.dtype.kind in "iu", layer.name
        assert found.min() >= 0 and found.max() < NUM_SYMBOLS, layer.name
    assert np.array_equal(scene.grid, grid)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), SIDES, SIDES, st.booleans(), st.permutations(range(1, 10)))
def test_renaming_colours_renames_symbols(seed, height, width, same, order):
    grid = drawn(seed, (height, width))
    shape = grid.shape if same else (max(1, height // 2), max(1, width // 2))
    names = np.array([0, *order, *range(MARK, NUM_SYMBOLS)], np.uint8)
    scene, other = Scene(grid), Scene(names[grid])
    if scene.background != 0 or other.background != 0:
        return  # colour 0 is special only as the background
    for layer in BANK:
        if re.search(r"colour \d", layer.name):
            continue
        found, renamed = layer.function(scene, shape), layer.function(other, shape)
        assert (found is None) == (renamed is None), layer.name
        assert found is None or np.array_equal(names[found], renamed), layer.name


@pytest.mark.parametrize("colors", [2, 10])
@pytest.mark.parametrize("shape", [(30, 30), (15, 15), (3, 3)])
def test_all_layers_together_take_bounded_time_on_noise(colors, shape):
    grid = np.random.default_rng(colors).integers(0, colors, (30, 30), dtype=np.uint8)
    scene, start = Scene(grid), time.process_time()
    for layer in BANK:
        layer.function(scene, shape)
    assert time.process_time() - start < 0.5
