"""The tree of experts: against one tree per group grown from the definitions, what it may see, and what it shares."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import expert_tree as module
from expert_tree import (
    BAGS,
    GOOD_ENOUGH,
    MAX_DEPTH,
    MIN_GAIN,
    MIN_SHARE,
    MIN_WEIGHT,
    Cells,
    bagged_left_out,
    log_likelihood,
    predict_left_out,
)


def make_cells(features, experts, labels, sizes, weight=None, num_layers: int | None = None) -> Cells:
    """Return cells in groups of `sizes`; `labels` and `weight` are those of the groups before the last."""
    experts, known = np.asarray(experts), len(labels)
    weights = np.zeros(len(experts), np.float32)
    weights[:known] = 1 if weight is None else weight
    hits = np.zeros(experts.shape, np.float32)
    hits[:known] = (experts[:known] == np.asarray(labels)[:, None]) * weights[:known, None]
    num_layers = experts.shape[1] - 1 if num_layers is None else num_layers
    prior = np.where(np.arange(experts.shape[1]) < num_layers, 0, -0.5)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Cells(np.asarray(features, np.float32), experts, hits, weights, starts, prior, num_layers)


def random_case(seed: int, num_groups: int = 4):
    """Return features, experts, labels and group sizes; two features gate three of five experts, labels have noise."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 25, num_groups)
    features = rng.random((sizes.sum(), 6)) < rng.uniform(0.2, 0.8, 6)
    experts = rng.integers(0, 10, (sizes.sum(), 5))
    labels = experts[np.arange(sizes.sum()), np.where(features[:, 2], 3, np.where(features[:, 4], 0, 1))]
    is_noisy = rng.random(len(labels)) < 0.1 * (seed % 3)
    labels = np.where(is_noisy, rng.integers(0, 10, len(labels)), labels)[: sizes[:-1].sum()]
    return features, experts, labels, sizes


def random_cells(seed: int, num_groups: int = 4) -> Cells:
    features, experts, labels, sizes = random_case(seed, num_groups)
    weight = np.random.default_rng(seed + 99).choice([0, 0.5, 1, 2], len(labels)) if seed % 2 else None
    return make_cells(features, experts, labels, sizes, weight, num_layers=2 + seed % 3)


def random_base(seed: int, num_cells: int) -> np.ndarray:
    return np.random.default_rng(seed + 1000).dirichlet(np.ones(10), num_cells)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """Return a list that grows by the number of trees and the depth left at every node visited."""
    found, grow = [], module._grow

    def counted(cells, index, trees, depth, base, out):
        found.append((len(trees), depth))
        grow(cells, index, trees, depth, base, out)

    monkeypatch.setattr(module, "_grow", counted)
    return found


# One tree after another -----------------------------------------------------------------------------------------------


def score(right: float, total: float) -> float:
    """Return the log-likelihood of a rate with 0.3 cells more on either side, wrong cells sharing nine colours."""
    rate = (right + 0.3) / (total + 0.6)
    return right * math.log(rate) + (total - right) * math.log((1 - rate) / 9)


def counts(cells: Cells, rows: list[int]) -> tuple[list[float], float]:
    """Return the hits of every expert and the weight of some cells."""
    hits = [sum(float(cells.hits[row, k]) for row in rows) for k in range(cells.experts.shape[1])]
    return hits, sum(float(cells.weight[row]) for row in rows)


def side_score(cells: Cells, rows: list[int]) -> float:
    """Return the score of one side of a split: the layer or the other expert with most hits."""
    hits, total = counts(cells, rows)
    layers, others = hits[: cells.num_layers], hits[cells.num_layers :]
    return max(score(max(layers), total) + cells.log_prior[0], score(max(others), total) + cells.log_prior[-1])


def best_feature(cells: Cells, rows: list[int], before: float) -> int | None:
    best, chosen = MIN_GAIN, None
    for feature in range(cells.features.shape[1]):
        yes = [row for row in rows if cells.features[row, feature]]
        no = [row for row in rows if not cells.features[row, feature]]
        if min(counts(cells, yes)[1], counts(cells, no)[1]) < MIN_WEIGHT:
            continue
        gain = side_score(cells, yes) + side_score(cells, no) - before
        if gain >= best and (chosen is None or gain > best + 1e-4):  # of equal gains the first
            best, chosen = gain, feature
    return chosen


def answer(cells: Cells, base: np.ndarray, asked: list[int], rows: list[int], depth: int, out: np.ndarray) -> None:
    """Write the probabilities of the cells asked for, by a tree fitted on other ones."""
    hits, total = counts(cells, rows)
    scores = [score(hit, total) + prior for hit, prior in zip(hits, cells.log_prior, strict=True)]
    feature = best_feature(cells, rows, max(scores)) if depth and max(scores) <= GOOD_ENOUGH else None
    if feature is not None:
        for side in (0, 1):
            here = [[row for row in part if cells.features[row, feature] == side] for part in (asked, rows)]
            answer(cells, base, *here, depth - 1, out)
        return
    posterior = [math.exp(value - max(scores)) for value in scores]
    posterior = [p if p >= MIN_SHARE else 0 for p in posterior]
    for row in asked:
        prob = np.zeros(10)
        for p, hit, color in zip(posterior, hits, cells.experts[row], strict=True):
            prob[color] += p / sum(posterior) * (hit + 0.3) / (total + 0.6)
        out[row] = prob + (1 - prob.sum()) * base[row]


def reference(cells: Cells, base: np.ndarray) -> np.ndarray:
    """Return what predict_left_out returns, by one tree after another."""
    out = np.full((len(base), 10), np.nan)
    for start, stop in zip(cells.starts[:-1], cells.starts[1:], strict=True):
        asked = list(range(start, stop))
        others = [row for row in range(len(base)) if row not in asked]
        answer(cells, base, asked, others, MAX_DEPTH, out)
    return out


@pytest.mark.parametrize("seed", range(10))
def test_predictions_equal_one_tree_per_group_grown_from_the_definitions(seed, calls):
    cells = random_cells(seed)
    base = random_base(seed, len(cells.weight))
    found = predict_left_out(cells, base)
    np.testing.assert_allclose(found, reference(cells, base), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert found.min() >= 0
    assert min(depth for _, depth in calls) < MAX_DEPTH  # there is something to split


def test_a_chain_of_exceptions_ends_at_the_largest_depth(calls):
    # expert k is right where feature k is set: each split takes one away
    which = np.tile(np.repeat(np.arange(10), 12), 2)
    features = which[:, None] == np.arange(10)
    experts = (which[:, None] + np.arange(10) * (1 + np.arange(len(which)) % 9)[:, None]) % 10
    labels = experts[np.arange(len(which)), which][: len(which) // 2]
    cells = make_cells(features, experts, labels, [len(labels) // 2, len(labels) // 2, len(labels)])
    base = random_base(0, len(which))
    np.testing.assert_allclose(predict_left_out(cells, base), reference(cells, base), atol=1e-6, rtol=0)
    assert min(depth for _, depth in calls) == 0


@pytest.mark.parametrize("prior, is_split", [(0, True), (-0.9, True), (-1.0, False), (-3.0, False)])
def test_a_small_mistake_is_split_away_if_the_gain_pays_for_the_prior(prior, is_split, calls):
    # the layer is right in three of four cells, the other expert in two: the gain is 3.97 and the prior
    experts = [[1, 9], [2, 9], [3, 3], [9, 4], [1, 2], [3, 4]]
    cells = make_cells([[1], [1], [0], [0], [1], [0]], experts, [1, 2, 3, 4], [4, 2])
    cells = replace(cells, log_prior=np.array([0, prior]))
    base = random_base(0, 6)
    np.testing.assert_allclose(predict_left_out(cells, base), reference(cells, base), atol=1e-6, rtol=0)
    assert (len(calls) == 3) == is_split


def test_log_likelihood_equals_the_formula():
    right, total = np.array([0.0, 1, 2.5, 7]), np.array([0.0, 3, 2.5, 40])
    np.testing.assert_allclose(log_likelihood(right, total), [score(r, n) for r, n in zip(right, total, strict=True)])


# What a tree finds ----------------------------------------------------------------------------------------------------


def gated(seed: int, is_flipped: bool = False) -> tuple[Cells, np.ndarray, np.ndarray]:
    """Return cells of which expert 0 is right where feature 3 is set and expert 2 elsewhere, the labels, a base."""
    rng = np.random.default_rng(seed)
    sizes = [30, 30, 30, 30]
    features, experts = rng.random((120, 8)) < 0.5, rng.integers(0, 10, (120, 5))
    labels = experts[np.arange(120), np.where(features[:, 3] != is_flipped, 0, 2)]
    return make_cells(features, experts, labels[:90], sizes), labels, np.full((120, 10), 0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("is_flipped", [False, True])
def test_a_rule_that_gates_two_experts_is_found(seed, is_flipped):
    cells, labels, base = gated(seed, is_flipped)
    prob = predict_left_out(cells, base)
    assert (prob[np.arange(120), labels] > 0.95).all()


def test_a_split_needs_enough_weight_on_either_side():
    cells, labels, base = gated(0)
    few = np.flatnonzero(cells.features[:90, 3])
    weight = np.ones(90)
    for total, is_found in ((0.9 * MIN_WEIGHT, False), (20, True)):
        weight[few] = total / len(few)
        lighter = make_cells(cells.features, cells.experts, labels[:90], [30] * 4, weight)
        prob = predict_left_out(lighter, base)[90:]
        right = prob[np.arange(30), labels[90:]][cells.features[90:, 3] > 0]
        assert (right > 0.8).all() == is_found


def test_what_no_expert_claims_is_the_base():
    features, labels = np.zeros((8, 2)), [1, 2, 3, 4, 5, 6]
    cells = make_cells(features, np.full((8, 2), 9), labels, [3, 3, 2])
    base = random_base(3, 8)
    prob = predict_left_out(cells, base)
    np.testing.assert_allclose(prob[6:, :9] / prob[6:, :9].sum(1, keepdims=True),
                               base[6:, :9] / base[6:, :9].sum(1, keepdims=True))  # fmt: skip
    assert (prob[6:, 9] > base[6:, 9]).all()


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_without_other_cells_the_priors_share_half_with_the_base(sizes):
    rng = np.random.default_rng(0)
    features, experts = rng.random((6, 4)) < 0.5, rng.integers(0, 10, (6, 4))
    num_labels = sum(sizes[:-1])
    cells, base = make_cells(features, experts, experts[:num_labels, 1], sizes), random_base(0, 6)
    asked = slice(0, sizes[0])  # no other group has labels
    share = np.exp(cells.log_prior) / np.exp(cells.log_prior).sum()
    expected = 0.5 * base + 0.5 * sum(share[k] * np.eye(10)[experts[:, k]] for k in range(4))
    np.testing.assert_allclose(predict_left_out(cells, base)[asked], expected[asked])


def test_cells_without_features_get_a_leaf():
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 10, (20, 3))
    cells, base = make_cells(np.zeros((20, 0)), experts, rng.integers(0, 10, 15), [8, 7, 5]), random_base(0, 20)
    np.testing.assert_allclose(predict_left_out(cells, base), reference(cells, base), atol=1e-6)
    alone = make_cells(np.zeros((20, 1)), experts, rng.integers(0, 10, 15), [8, 7, 5])
    np.testing.assert_allclose(bagged_left_out(alone, base).sum(1), 1)  # some bags are shown no feature


# What a tree may see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_labels_of_a_group_never_change_its_prediction(seed):
    features, experts, labels, sizes = random_case(seed)
    base = random_base(seed, sizes.sum())
    for predict in (predict_left_out, bagged_left_out):
        plain = predict(make_cells(features, experts, labels, sizes), base)
        for group, (start, stop) in enumerate(zip(np.cumsum(sizes) - sizes, np.cumsum(sizes), strict=True)):
            if group == len(sizes) - 1:
                continue
            flipped, weight = labels.copy(), np.ones(len(labels))
            flipped[start:stop] = (labels[start:stop] + 1 + np.arange(stop - start) % 9) % 10
            weight[start:stop] = np.arange(stop - start) % 3
            other = predict(make_cells(features, experts, flipped, sizes, weight), base)
            assert np.array_equal(other[start:stop], plain[start:stop])
            assert not np.array_equal(other, plain)


def test_the_last_group_follows_the_labels_of_all_others():
    cells, labels, base = gated(1)
    prob = predict_left_out(cells, base)[90:]
    for group in range(3):
        rows = slice(30 * group, 30 * group + 30)
        wrong = labels.copy()
        wrong[rows] = (wrong[rows] + 1) % 10
        other = predict_left_out(make_cells(cells.features, cells.experts, wrong[:90], [30] * 4), base)[90:]
        right = np.arange(30), labels[90:]
        assert (other[right] < prob[right]).all()


def test_the_order_of_the_other_groups_changes_nothing():
    features, experts, labels, sizes = random_case(3)
    base, ends = random_base(3, sizes.sum()), np.cumsum(sizes)
    parts = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    order = np.concatenate([parts[2], parts[0], parts[1], parts[3]])
    plain = predict_left_out(make_cells(features, experts, labels, sizes), base)
    moved = make_cells(features[order], experts[order], labels[order[: len(labels)]], sizes[[2, 0, 1, 3]])
    assert np.array_equal(predict_left_out(moved, base[order]), plain[order])


# What trees share -----------------------------------------------------------------------------------------------------


def one_by_one(cells: Cells, base: np.ndarray) -> np.ndarray:
    """Return the predictions of trees that are grown apart."""
    out = np.empty((len(base), 10))
    for tree in range(len(cells.starts) - 1):
        module._grow(cells, np.arange(len(base)), [tree], MAX_DEPTH, base, out)
    return out


def test_trees_that_choose_alike_share_their_nodes(calls):
    rng = np.random.default_rng(0)
    sizes = [20] * 10
    features, experts = rng.random((200, 10)) < 0.5, rng.integers(0, 10, (200, 4))
    labels = experts[np.arange(200), np.where(features[:, 2], 0, np.where(features[:, 7], 1, 2))]
    cells, base = make_cells(features, experts, labels[:180], sizes), random_base(0, 200)
    apart = one_by_one(cells, base)
    num_apart = len(calls)
    calls.clear()
    assert np.array_equal(predict_left_out(cells, base), apart)
    assert calls[0] == (10, MAX_DEPTH) and len(calls) == 5 and num_apart == 10 * 5  # two splits, three leaves


@pytest.mark.parametrize("seed", range(6))
def test_trees_that_share_nodes_equal_trees_grown_apart(seed, calls):
    cells = random_cells(seed, 6)
    base = random_base(seed, len(cells.weight))
    apart = one_by_one(cells, base)
    num_apart = len(calls)
    assert np.array_equal(predict_left_out(cells, base), apart)
    assert len(calls) - num_apart < 0.6 * num_apart


# Bags -----------------------------------------------------------------------------------------------------------------


def test_bags_are_the_same_at_every_call_and_leave_the_global_random_state():
    cells = random_cells(4)
    base = random_base(4, len(cells.weight))
    copies = [x.copy() for x in (cells.features, cells.experts, cells.hits, cells.weight, base)]
    state = np.random.get_state()
    first = bagged_left_out(cells, base)
    np.random.seed(123)  # what others draw makes no difference
    again = bagged_left_out(cells, base)
    np.random.set_state(state)
    assert np.array_equal(first, again)
    bagged_left_out(cells, base)
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))
    for copy, now in zip(copies, (cells.features, cells.experts, cells.hits, cells.weight, base), strict=True):
        assert np.array_equal(copy, now)
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-12)
    assert first.min() >= 0


def test_a_bag_is_the_mean_of_trees_that_see_a_part(monkeypatch):
    rng = np.random.default_rng(0)
    experts = np.tile(np.arange(12), (30, 1)) % 10  # colours and priors tell where a column is from
    features = np.tile(rng.random((1, 40)), (30, 1))
    cells = make_cells(features, experts, rng.integers(0, 10, 20), [10, 10, 10], num_layers=9)
    base, parts, results = random_base(0, 30), [], []

    def watched(part, base):
        parts.append(part)
        results.append(predict_left_out(part, base))
        return results[-1]

    monkeypatch.setattr(module, "predict_left_out", watched)
    mean = bagged_left_out(cells, base)
    np.testing.assert_allclose(mean, np.mean(results, 0))
    assert len(parts) == BAGS and len({part.features.tobytes() for part in parts}) == BAGS
    for part in parts:
        heard = [int(np.flatnonzero((cells.experts[0] == k) & (cells.log_prior == p))[0])
                 for k, p in zip(part.experts[0], part.log_prior, strict=True)]  # fmt: skip
        assert heard[0] == 0 and heard[part.num_layers :] == [9, 10, 11] and heard == sorted(heard)
        assert np.array_equal(part.hits, cells.hits[:, heard]) and np.array_equal(part.weight, cells.weight)
        assert set(part.features[0]) < set(cells.features[0])
    assert 10 <= np.mean([part.features.shape[1] for part in parts]) <= 30
    assert 4 <= np.mean([part.num_layers for part in parts]) < 9
