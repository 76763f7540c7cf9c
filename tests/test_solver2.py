"""Threshold, memory, reader and Z table against brute force, closed forms and invariances."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import MemoryConfig
from solver2 import Candidates, EmaThreshold, LessonBuffer, Lessons, MemoryBuffer, MemoryReader, ZTable, z_update

FEATURES, PROMPT = 6, 8


def make_candidates(tasks, *, pairs=None, score=1.0, prior=0.0, exact=None, seed=0, features=None, prompt=None):
    """Return random candidates, one per task id."""
    generator = torch.Generator().manual_seed(seed)
    count = len(tasks)
    score_B = torch.as_tensor(score, dtype=torch.float32).expand(count).clone()
    color_map = torch.rand(count, 10, 10, generator=generator)
    return Candidates(
        task_ids=tasks, pair_ids=pairs or ["train:0"] * count, size_rules=["same"] * count,
        features=torch.rand(count, FEATURES, generator=generator) if features is None else features,
        prompt=torch.randn(count, PROMPT, generator=generator) if prompt is None else prompt,
        delta=torch.randn(count, PROMPT, generator=generator), color_map=color_map / color_map.sum(-1, keepdim=True),
        score=score_B, prior_score=torch.as_tensor(prior, dtype=torch.float32).expand(count).clone(),
        exact=score_B >= 1.0 if exact is None else torch.as_tensor(exact).expand(count).clone())


def make_memory(**settings):
    return MemoryBuffer(MemoryConfig(**settings), feature_dim=FEATURES, prompt_dim=PROMPT)


def count_hits(memory, recall):
    memory.count_hits(recall.index, recall.valid)


def reload_state(state):
    """Return the state after a weights_only round trip through bytes."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


# Threshold


def test_threshold_equals_the_recursion_written_out():
    config = MemoryConfig()
    threshold, scores = EmaThreshold(config), np.random.default_rng(0).beta(2, 2, 300)
    mean = square = 0.0
    for n, score in enumerate(scores, 1):
        threshold.admit(float(score), False)
        mean = config.threshold_beta * mean + (1 - config.threshold_beta) * score
        square = config.threshold_beta * square + (1 - config.threshold_beta) * score**2
        unbiased = mean / (1 - config.threshold_beta**n)
        deviation = math.sqrt(max(square / (1 - config.threshold_beta**n) - unbiased**2, 0))
        expected = min(max(unbiased + config.threshold_kappa * deviation, config.threshold_low), config.threshold_high)
        assert threshold.theta == pytest.approx(expected if n >= 50 else config.threshold_low, abs=1e-12)


def test_threshold_batch_leaves_the_state_of_one_by_one_and_decides_with_the_old_statistics():
    scores = np.random.default_rng(1).random(200)
    one, batched = EmaThreshold(MemoryConfig()), EmaThreshold(MemoryConfig())
    for chunk in scores.reshape(-1, 20):
        before = batched.theta
        accepted = batched.admit_batch(chunk, np.zeros(20, bool))
        assert (accepted == (chunk >= before)).all()
        for score in chunk:
            one.admit(float(score), False)
    assert batched.state_dict() == pytest.approx(one.state_dict(), abs=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([math.nan, math.inf])), st.booleans()),
                min_size=1, max_size=120), st.integers(1, 40))  # fmt: skip
def test_threshold_is_the_same_for_every_cut_into_batches_and_stays_in_its_bounds(scored, size):
    one, batched, config = EmaThreshold(MemoryConfig()), EmaThreshold(MemoryConfig()), MemoryConfig()
    for start in range(0, len(scored), size):
        score, exact = (np.array(x) for x in zip(*scored[start:start + size], strict=True))
        theta = batched.theta
        accepted = batched.admit_batch(score, exact)
        assert (accepted == np.isfinite(score) & (exact | (np.nan_to_num(score) >= theta))).all()
        for x in score:
            one.admit(float(x), False)
        assert config.threshold_low <= batched.theta <= config.threshold_high
    assert batched.state_dict() == pytest.approx(one.state_dict(), abs=1e-12)


def test_threshold_stays_reachable_when_every_score_is_one_and_admits_exact_below_it():
    threshold = EmaThreshold(MemoryConfig())
    assert all(threshold.admit(1.0, False) for _ in range(300))
    assert threshold.theta == 0.95
    assert not threshold.admit(0.94, False) and threshold.admit(0.1, True)


def test_threshold_admits_a_third_of_beta_scores_and_nothing_of_zeros():
    threshold, scores = EmaThreshold(MemoryConfig()), np.random.default_rng(2).beta(2, 2, 4000)
    rate = np.mean([threshold.admit(float(score), False) for score in scores][100:])
    assert rate == pytest.approx(0.336, abs=0.04)
    zeros = EmaThreshold(MemoryConfig())
    assert not any(zeros.admit(0.0, False) for _ in range(100))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_threshold_ignores_a_score_that_is_not_finite(score):
    threshold = EmaThreshold(MemoryConfig())
    for _ in range(60):
        threshold.admit(0.5, False)
    before = threshold.state_dict()
    assert not threshold.admit(score, False) and not threshold.admit(score, True)
    assert threshold.state_dict() == before
    assert threshold.admit_batch(np.array([score, 0.9]), np.array([True, False])).tolist() == [False, True]


def test_keep_is_weaker_than_admit_by_the_hysteresis_and_changes_nothing():
    threshold = EmaThreshold(MemoryConfig())
    for score in np.random.default_rng(3).random(100):
        threshold.admit(float(score), False)
    theta, before = threshold.theta, threshold.state_dict()
    assert threshold.keep(theta - 0.049) and not threshold.keep(theta - 0.051)
    assert threshold.state_dict() == before


def test_threshold_state_round_trip_continues_equally():
    first = EmaThreshold(MemoryConfig())
    for score in np.random.default_rng(4).random(80):
        first.admit(float(score), False)
    second = EmaThreshold(MemoryConfig())
    second.load_state_dict(reload_state(first.state_dict()))
    for score in np.random.default_rng(5).random(20):
        assert first.admit(float(score), False) == second.admit(float(score), False)
    assert first.theta == second.theta


# Memory


def reference_recall(memory, features, prompt, task):
    """Return (number, similarity) of what one query must recall, from the definition and in float64."""
    state = memory.state_dict()
    rows = {name: value.double().numpy() for name, value in state["rows"].items()}
    mean = state["mean"].numpy()
    std = np.maximum(np.sqrt(state["squares"].numpy() / state["seen"]), 1e-3)

    def standard(x):
        x = np.clip((x - mean) / std, -5, 5)
        return x / np.linalg.norm(x)

    found = []
    for i in range(len(memory)):
        if state["names"]["task"][int(rows["task"][i])] == task:
            continue
        cos_f = standard(rows["features"][i]) @ standard(features.double().numpy())
        cos_p = rows["prompt"][i] @ prompt.double().numpy()
        cos_p /= np.linalg.norm(rows["prompt"][i]) * np.linalg.norm(prompt.numpy())
        similarity = 0.5 * cos_f + 0.5 * cos_p
        if similarity >= memory.config.memory_similarity:
            found.append((-similarity, int(rows["number"][i])))
    found.sort()
    return [(number, -negative) for negative, number in found[:memory.config.memory_top_k]]


def test_recall_equals_brute_force_over_all_entries():
    memory = make_memory(memory_similarity=0.45)
    memory.admit(make_candidates([f"t{i}" for i in range(100)], seed=1))
    query = make_candidates([f"t{i}" for i in range(10)], seed=2)
    recall = memory.recall(query.features, query.prompt, query.task_ids)
    for b in range(10):
        expected = reference_recall(memory, query.features[b], query.prompt[b], f"t{b}")
        count = len(expected)
        assert recall.valid[b].tolist() == [True] * count + [False] * (5 - count)
        assert recall.index[b, :count].tolist() == [number for number, _ in expected]
        torch.testing.assert_close(recall.similarity[b, :count].double(),
                                   torch.tensor([s for _, s in expected], dtype=torch.float64), atol=1e-5, rtol=0)
        competing = torch.tensor([s for _, s in expected] + [0.45]).double() / 0.1
        weights = torch.cat([recall.weights[b, :count], recall.weights[b, -1:]]).double()
        torch.testing.assert_close(weights, competing.softmax(0), atol=1e-5, rtol=0)
    assert recall.valid.any() and not recall.valid.all()
    assert (recall.weights[:, :-1][~recall.valid] == 0).all()


def test_features_are_standardised_by_all_that_were_offered():
    memory, offered = make_memory(), []
    for batch, count in enumerate((3, 1, 20, 7)):
        candidates = make_candidates([f"t{batch}.{i}" for i in range(count)], score=0.0, seed=batch)
        candidates.features.mul_(batch + 1.0).add_(3.0)
        if count > 5:
            candidates.features[2, 1] = math.nan
        offered.append(candidates.features)
        memory.admit(candidates)
    rows = torch.cat(offered).double()
    rows = rows[rows.isfinite().all(1)].numpy()
    state = memory.state_dict()
    assert len(memory) == 0 and state["seen"] == len(rows) == 29
    np.testing.assert_allclose(state["mean"], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(state["squares"] / state["seen"]), rows.std(0), rtol=1e-9)


def test_recall_payload_belongs_to_the_recalled_entry():
    memory, stored = make_memory(), make_candidates([f"t{i}" for i in range(20)], seed=3)
    memory.admit(stored)
    recall = memory.recall(stored.features, stored.prompt, ["other"] * 20)
    assert recall.index[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(recall.similarity[:, 0], torch.ones(20), atol=1e-5, rtol=0)
    assert torch.equal(recall.prompts[:, 0], stored.prompt) and torch.equal(recall.deltas[:, 0], stored.delta)
    assert torch.equal(recall.color_maps[:, 0], stored.color_map)


def test_recall_never_returns_the_querys_own_task_nor_its_pair():
    memory = make_memory(memory_similarity=-1.0, memory_top_k=50)
    tasks, pairs = [f"t{i // 2}" for i in range(20)], [f"p{i}" for i in range(20)]
    stored = make_candidates(tasks, pairs=pairs, seed=4)
    memory.admit(stored)
    assert len(memory) == 20
    own = memory.state_dict()["names"]["task"]
    recall = memory.recall(stored.features, stored.prompt, tasks)
    task_of = dict(zip(memory.state_dict()["rows"]["number"].tolist(), memory.state_dict()["rows"]["task"].tolist(),
                       strict=True))
    for b in range(20):
        found = recall.index[b][recall.valid[b]].tolist()
        assert len(found) == 18 and all(own[task_of[number]] != tasks[b] for number in found)
    by_pair = memory.recall(stored.features[:1], stored.prompt[:1], ["unknown"], ["p0"])
    assert by_pair.valid.sum() == 19 and 0 not in by_pair.index[by_pair.valid].tolist()


def test_random_recall_is_as_full_but_not_by_likeness_and_never_the_own_task():
    memory = make_memory(memory_recall="random")
    tasks = [f"t{i}" for i in range(200)]
    memory.admit(make_candidates(tasks, seed=7))
    query = make_candidates(tasks, seed=8)
    recall = memory.recall(query.features, query.prompt, tasks)
    again = memory.recall(query.features.flip(0), query.prompt.flip(0), tasks[::-1])
    assert recall.valid.all() and torch.equal(recall.index, again.index.flip(0))
    assert (recall.index != torch.arange(200)[:, None]).all()
    assert (recall.similarity >= memory.config.memory_similarity).all() and (recall.similarity <= 1).all()
    counts = torch.bincount(recall.index.flatten(), minlength=200)
    assert counts.max() < 20 and (counts > 0).sum() > 150  # spread over the entries


def test_recall_of_an_empty_memory_is_the_null_entry_alone():
    recall = make_memory().recall(torch.rand(3, FEATURES), torch.randn(3, PROMPT), ["a", "b", "c"])
    assert recall.weights.tolist() == [[0.0] * 5 + [1.0]] * 3
    assert not recall.valid.any() and recall.index.eq(-1).all() and recall.prompts.shape == (3, 5, PROMPT)


def test_recall_breaks_ties_by_age_whatever_the_layout():
    prompt, features = torch.ones(12, PROMPT), torch.ones(12, FEATURES) * 0.5
    memory = make_memory(memory_capacity=8, memory_similarity=-1.0)
    for i in range(12):
        memory.admit(make_candidates([f"t{i}"], score=0.5 + i * 0.01, features=features[:1], prompt=prompt[:1], seed=i))
    numbers = sorted(memory.state_dict()["rows"]["number"].tolist())
    recall = memory.recall(features[:2], prompt[:2], ["x", "y"])
    assert recall.index.tolist() == [numbers[:5]] * 2


def test_recall_is_detached_and_changes_nothing():
    memory = make_memory()
    memory.admit(make_candidates([f"t{i}" for i in range(30)], seed=6))
    features = torch.rand(4, FEATURES, requires_grad=True)
    prompt = torch.randn(4, PROMPT, requires_grad=True)
    before = reload_state(memory.state_dict())
    recall = memory.recall(features, prompt, ["q"] * 4)
    assert not any(value.requires_grad for value in vars(recall).values())
    after = memory.state_dict()
    assert after["counters"] == before["counters"] and torch.equal(after["mean"], before["mean"])
    assert all(torch.equal(after["rows"][name], before["rows"][name]) for name in before["rows"])


def test_recall_with_nan_query_returns_nothing():
    memory = make_memory(memory_similarity=-1.0)
    memory.admit(make_candidates(["a", "b"]))
    recall = memory.recall(torch.full((1, FEATURES), math.nan), torch.ones(1, PROMPT), ["q"])
    assert not recall.valid.any() and recall.weights[0, -1] == 1 and recall.similarity.isfinite().all()


@pytest.mark.parametrize("field", ["features", "prompt", "delta", "color_map", "score", "prior_score"])
def test_admit_leaves_out_what_is_not_finite(field):
    memory, candidates = make_memory(), make_candidates(["a", "b", "c"])
    getattr(candidates, field).view(3, -1)[1, 0] = math.nan
    assert memory.admit(candidates) == 2
    assert memory.state_dict()["names"]["task"] == ["a", "c"]
    assert memory.state_dict()["mean"].isfinite().all()


def test_admit_leaves_out_what_the_prior_answers_as_well_and_the_threshold_sees_it():
    score, prior = [0.6, 0.6, 1.0, 1.0, 0.1], [0.5, 0.6, 1.0, 0.9, 0.0]
    memory = make_memory(threshold_low=0.2)
    assert memory.admit(make_candidates(list("abcde"), score=score, prior=prior)) == 2
    state = memory.state_dict()
    assert state["names"]["task"] == ["a", "d"]  # e beats the prior, and stays below the threshold
    alone = make_memory(threshold_low=0.2)
    alone.admit(make_candidates(list("abcde"), score=score))
    assert state["threshold"] == alone.state_dict()["threshold"] and state["threshold"]["count"] == 5
    assert state["counters"]["offered"] == 5 and len(alone) == 4


def test_capacity_holds_and_the_least_useful_entry_leaves():
    memory = make_memory(memory_capacity=10)
    scores = torch.rand(40, generator=torch.Generator().manual_seed(7)) * 0.7 + 0.2
    memory.admit(make_candidates([f"t{i}" for i in range(40)], score=scores, exact=True))
    assert len(memory) == 10
    kept = memory.state_dict()["rows"]["score"]
    # All entries are about equally old (their age bonus differs by at most .1 * (1 - exp(-40 / 2000)) = .002).
    assert kept.min() >= scores.sort(descending=True).values[9] - 0.005


def test_gain_protects_an_entry_from_eviction():
    memory = make_memory(memory_capacity=2)
    memory.admit(make_candidates(["low"], score=0.3, seed=1))
    memory.admit(make_candidates(["mid"], score=0.5, seed=2))
    index = torch.tensor([[0]])
    for _ in range(30):
        memory.update_gain(index, torch.tensor([0.5]), torch.tensor([[0.9, 0.1]]))
    memory.admit(make_candidates(["new"], score=0.6, seed=3))
    state = memory.state_dict()
    assert {state["names"]["task"][int(i)] for i in state["rows"]["task"]} == {"low", "new"}


def test_utility_weighs_score_gain_and_age_and_a_poor_candidate_does_not_enter():
    memory = make_memory(memory_capacity=2)
    memory.admit(make_candidates(["helpful", "good"], score=[0.3, 0.6], exact=True))
    for _ in range(60):
        memory.update_gain(torch.tensor([[0]]), torch.tensor([0.05]), torch.tensor([[1.0]]))
    # With a gain of .05 "helpful" is worth .3 + .5 tanh(1) + .1 = .78, "good" .6 + .1.
    assert memory.admit(make_candidates(["poor"], score=0.55, exact=True)) == 0 and memory.statistics()["evicted"] == 0
    assert memory.admit(make_candidates(["new"], score=0.65, exact=True)) == 1 and memory.statistics()["evicted"] == 1
    state = memory.state_dict()
    assert {state["names"]["task"][int(i)] for i in state["rows"]["task"]} == {"helpful", "new"}
    for name, score in (("newer", 0.85), ("newest", 0.9)):  # the second finds "helpful" below the .95 of the first
        assert memory.admit(make_candidates([name], score=score, exact=True)) == 1
    state = memory.state_dict()
    assert {state["names"]["task"][int(i)] for i in state["rows"]["task"]} == {"newer", "newest"}


def test_empty_memory_has_nothing_to_refresh_or_remove():
    memory = make_memory()
    assert memory.refresh(["a"], ["train:0"], torch.ones(1, PROMPT)) == 0
    assert memory.reevaluate(["a"], ["train:0"], torch.ones(1)) == 0


def test_update_gain_is_an_average_weighted_by_attention_and_skips_entries_that_left():
    memory = make_memory()
    memory.admit(make_candidates(["a", "b", "c"]))
    memory.update_gain(torch.tensor([[0, 2], [2, 99]]), torch.tensor([1.0, -1.0]),
                       torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.4, 0.1]]))
    # c: share .75, mean (.25 - .5) / .75.
    torch.testing.assert_close(memory.state_dict()["rows"]["gain"], torch.tensor([0.05, 0.0, 0.1 * (0.25 - 0.5)]))


def test_duplicate_keeps_the_better_score_with_its_history():
    memory = make_memory()
    assert memory.admit(make_candidates(["a"], score=0.5, seed=1)) == 1
    first = make_candidates(["a"], seed=1)
    count_hits(memory, memory.recall(first.features, first.prompt, ["q"]))
    memory.update_gain(torch.tensor([[0]]), torch.tensor([1.0]), torch.tensor([[1.0]]))
    better, worse = make_candidates(["a"], score=0.8, seed=2), make_candidates(["a"], score=0.6, seed=3)
    assert memory.admit(better) == 0 and memory.admit(worse) == 0
    rows = memory.state_dict()["rows"]
    assert len(memory) == 1 and rows["score"].tolist() == pytest.approx([0.8])
    assert torch.equal(rows["prompt"], better.prompt)
    assert rows["hits"].tolist() == [1] and rows["gain"].tolist() == pytest.approx([0.1])
    assert memory.statistics()["replaced"] == 1


def test_nearly_equal_key_of_the_same_task_is_a_duplicate_but_not_of_another_task():
    memory, first = make_memory(), make_candidates(["a"], score=0.5)
    memory.admit(make_candidates([f"x{i}" for i in range(20)], seed=9))
    memory.admit(first)
    size = len(memory)
    close = make_candidates(["a"], pairs=["train:7"], score=0.6, features=first.features, prompt=first.prompt * 1.01)
    assert memory.admit(close) == 0 and len(memory) == size
    other = make_candidates(["b"], pairs=["train:7"], score=0.6, features=first.features, prompt=first.prompt)
    assert memory.admit(other) == 1


def test_at_most_two_entries_per_task_and_the_better_ones():
    memory = make_memory()
    for i, score in enumerate([0.5, 0.3, 0.7, 0.4, 0.9]):
        memory.admit(make_candidates(["a"], pairs=[f"train:{i}"], score=score, seed=i))
    assert sorted(memory.state_dict()["rows"]["score"].tolist()) == pytest.approx([0.7, 0.9])
    assert memory.statistics()["evicted"] == 2


def test_score_around_the_threshold_is_admitted_once_and_never_evicted():
    memory = make_memory()
    rng = np.random.default_rng(8)
    for i in range(300):
        memory.admit(make_candidates([f"t{i}"], score=float(rng.beta(2, 2)), exact=False, seed=i))
    admitted = removed = 0
    for i in range(400):
        score = memory.threshold.theta + (0.02 if i % 2 else -0.02)
        admitted += memory.admit(make_candidates(["osc"], score=score, exact=False, seed=5))
        removed += memory.reevaluate(["osc"], ["train:0"], torch.tensor([score]))
    assert (admitted, removed) == (1, 0)


def test_reevaluate_removes_a_bad_entry_only_after_the_grace():
    memory = make_memory()
    memory.admit(make_candidates(["old"], score=0.9, seed=1))
    memory.admit(make_candidates([f"t{i}" for i in range(150)], score=0.9, exact=True, seed=2))
    assert memory.reevaluate(["old"], ["train:0"], torch.tensor([0.1])) == 0
    memory.admit(make_candidates([f"u{i}" for i in range(60)], score=0.9, exact=True, seed=3))
    assert memory.reevaluate(["old"], ["train:1"], torch.tensor([0.1])) == 0
    size = len(memory)
    assert memory.reevaluate(["t0", "old"], ["train:0"] * 2, torch.tensor([math.nan, 0.1])) == 1
    state = memory.state_dict()
    assert len(memory) == size - 1
    assert "old" not in {state["names"]["task"][int(i)] for i in state["rows"]["task"]}


def test_refresh_replaces_only_prompts_that_moved():
    memory = make_memory()
    stored = make_candidates(["a", "b", "c"], seed=1)
    memory.admit(stored)
    current = torch.stack([-stored.prompt[0], stored.prompt[1] * 3, torch.full((PROMPT,), math.nan)])
    assert memory.refresh(["a", "b", "c"], ["train:0"] * 3, current) == 1
    assert torch.equal(memory.state_dict()["rows"]["prompt"],
                       torch.stack([-stored.prompt[0], stored.prompt[1], stored.prompt[2]]))
    recall = memory.recall(stored.features[:1], -stored.prompt[:1], ["q"])
    assert recall.index[0, 0] == 0 and recall.similarity[0, 0] > 0.999


def test_memory_state_round_trip_recalls_identically_and_continues_equally():
    memory = make_memory(memory_capacity=60)
    memory.admit(make_candidates([f"t{i}" for i in range(100)], seed=1), step=7, version=2)
    query = make_candidates([f"t{i}" for i in range(30, 46)], seed=2)
    count_hits(memory, memory.recall(query.features, query.prompt, query.task_ids))
    copy = make_memory(memory_capacity=60)
    copy.load_state_dict(reload_state(memory.state_dict()))
    for _ in range(2):
        first, second = (m.recall(query.features, query.prompt, query.task_ids) for m in (memory, copy))
        assert all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items())
        assert memory.statistics() == copy.statistics()
        more = make_candidates([f"v{i}" for i in range(20)], score=0.97, seed=3)
        assert memory.admit(more) == copy.admit(more)


def test_memory_refuses_a_state_of_other_widths_and_stays_as_it_was():
    memory, other = make_memory(), MemoryBuffer(MemoryConfig(), feature_dim=FEATURES, prompt_dim=PROMPT + 1)
    memory.admit(make_candidates(["a"]))
    with pytest.raises(ValueError, match="prompt"):
        memory.load_state_dict(other.state_dict())
    assert len(memory) == 1


def test_memory_loads_into_a_smaller_capacity_keeping_the_most_useful():
    memory, small = make_memory(), make_memory(memory_capacity=3)
    memory.admit(make_candidates([f"t{i}" for i in range(6)], score=[0.3, 0.9, 0.4, 0.8, 0.5, 0.7]))
    small.load_state_dict(memory.state_dict())
    assert small.state_dict()["rows"]["score"].tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_statistics_count_queries_and_hits():
    memory = make_memory()
    stored = make_candidates(["a", "b"], seed=1)
    memory.admit(stored)
    for tasks in (["q", "q"], ["a", "b"]):
        count_hits(memory, memory.recall(stored.features, stored.prompt, tasks))
    found = memory.statistics()
    assert found["queries"] == 4 and found["size"] == 2 and found["admissions"] == 2 and found["offered"] == 2
    assert 2 <= found["hits"] <= 6 and found["hit_rate"] == found["answered"] / 4


# Reader


@pytest.mark.parametrize("filled", [False, True])
def test_every_parameter_of_the_reader_moves_within_three_steps(filled):
    torch.manual_seed(0)
    memory = make_memory(memory_similarity=-1.0)
    if filled:
        memory.admit(make_candidates([f"t{i}" for i in range(9)], seed=1))
    reader = MemoryReader(memory.config, PROMPT)
    start = {name: value.detach().clone() for name, value in reader.named_parameters()}
    optimizer = torch.optim.Adam(reader.parameters(), lr=0.01)
    query = make_candidates(["x", "y"], seed=2)
    log_prob = torch.randn(2, 3, 3, 10).log_softmax(-1)
    for _ in range(3):
        recall = memory.recall(query.features, query.prompt, query.task_ids)
        prompt = reader.extend_prompt(query.prompt, recall)
        preference = reader.extend_preference(log_prob, recall, torch.arange(10).expand(2, 10),
                                              torch.randint(0, 10, (2, 3, 3)))
        optimizer.zero_grad()
        (prompt.pow(2).sum() - preference[..., 0].sum()).backward()
        optimizer.step()
    assert [name for name, value in reader.named_parameters() if torch.equal(value, start[name])] == []


def test_untrained_reader_leaves_the_prompt_and_nearly_the_preference():
    memory = make_memory(memory_similarity=-1.0)
    memory.admit(make_candidates(["a", "b", "c"]))
    query = make_candidates(["x"], seed=2)
    reader, recall = MemoryReader(memory.config, PROMPT), memory.recall(query.features, query.prompt, ["x"])
    log_prob = torch.randn(1, 2, 2, 10).log_softmax(-1)
    for found in (recall, None):
        assert torch.equal(reader.extend_prompt(query.prompt, found), query.prompt)
        grid = torch.zeros(1, 2, 2, dtype=torch.long)
        mixed = reader.extend_preference(log_prob, found, torch.arange(10)[None], grid)
        assert (mixed.exp() - log_prob.exp()).abs().max() <= torch.sigmoid(torch.tensor(-4.0)) + 1e-6


def test_extended_prompt_equals_the_gated_means_written_out():
    torch.manual_seed(4)
    memory = make_memory(memory_similarity=-1.0)
    memory.admit(make_candidates([f"t{i}" for i in range(4)], seed=1))
    query, reader = make_candidates(["x", "y"], seed=2), MemoryReader(memory.config, PROMPT)
    torch.nn.init.normal_(reader.token_gate)
    torch.nn.init.constant_(reader.delta_gate, 0.7)
    recall = memory.recall(query.features, query.prompt, query.task_ids)
    extended = reader.extend_prompt(query.prompt, recall)
    for b in range(2):
        weights = recall.weights[b].tolist()
        move, token = weights[-1] * reader.null_delta, weights[-1] * reader.null_prompt
        for j, weight in enumerate(weights[:-1]):
            move, token = move + weight * recall.deltas[b, j], token + weight * recall.prompts[b, j]
        torch.testing.assert_close(extended[b], query.prompt[b] + 0.7 * move + reader.token_gate * token)


def test_no_recall_equals_the_recall_of_an_empty_memory():
    reader, query = MemoryReader(MemoryConfig(), PROMPT), make_candidates(["x", "y"])
    torch.nn.init.normal_(reader.token_gate)
    torch.nn.init.normal_(reader.delta_gate)
    recall = make_memory().recall(query.features, query.prompt, query.task_ids)
    torch.testing.assert_close(reader.extend_prompt(query.prompt, None), reader.extend_prompt(query.prompt, recall))
    arguments = (torch.arange(10).expand(2, 10), torch.randint(-1, 11, (2, 4, 4)))
    log_prob = torch.randn(2, 4, 4, 10).log_softmax(-1)
    torch.testing.assert_close(reader.extend_preference(log_prob, None, *arguments),
                               reader.extend_preference(log_prob, recall, *arguments))


def test_extended_preference_equals_the_mixture_cell_by_cell():
    torch.manual_seed(3)
    memory = make_memory(memory_similarity=-1.0)
    memory.admit(make_candidates([f"t{i}" for i in range(4)], seed=1))
    query = make_candidates(["x", "y"], seed=2)
    recall = memory.recall(query.features, query.prompt, query.task_ids)
    reader = MemoryReader(memory.config, PROMPT)
    torch.nn.init.constant_(reader.prior_gate, 0.3)
    canonical = torch.stack([torch.randperm(10), torch.randperm(10)])
    grid = torch.randint(0, 10, (2, 3, 4))
    grid[0, 0, 0], grid[1, 2, 3] = -100, 10
    log_prob = torch.randn(2, 3, 4, 10).log_softmax(-1)
    mixed = reader.extend_preference(log_prob, recall, canonical, grid)
    w = torch.sigmoid(torch.tensor(0.3)).item()
    for b, h, x in np.ndindex(2, 3, 4):
        for c in range(10):
            color, remembered = int(grid[b, h, x]), 0.1
            if 0 <= color <= 9:
                maps = recall.color_maps[b, :, canonical[b, color], canonical[b, c]].tolist()
                weights = recall.weights[b].tolist()
                remembered = 0.1 * weights[-1] + sum(w_j * m_j for w_j, m_j in zip(weights, maps, strict=False))
            expected = math.log((1 - w) * log_prob[b, h, x, c].exp() + w * remembered)
            assert mixed[b, h, x, c].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)


# Lessons


def make_lessons(count, width=5, seed=0, told=True):
    generator = torch.Generator().manual_seed(seed)
    key, direction = (torch.randn(count, width, generator=generator) for _ in range(2))
    return Lessons(key, direction, torch.as_tensor(told).expand(count).clone())


def make_lesson_buffer(width=5, **settings):
    return LessonBuffer(MemoryConfig(**settings), width)


def recalled_by_hand(lessons, owners, key, task, temperature=0.2):
    """Return the mean direction for one query, entry by entry in float64."""
    keys, directions = (x.half().double().numpy() for x in (lessons.key, lessons.direction))
    mean, std = keys.mean(0), np.maximum(keys.std(0), 0.01)

    def unit(x):
        x = np.clip((x - mean) / std, -3, 3)
        return x / max(np.linalg.norm(x), 1e-12)

    total, norm = np.zeros(keys.shape[1]), 0.0
    for own, k, direction in zip(owners, keys, directions, strict=True):
        if own[0] != task:
            weight = math.exp(unit(key.double().numpy()) @ unit(k) / temperature)
            total, norm = total + weight * direction, norm + weight
    return total / norm if norm else total


def test_lessons_are_recalled_as_computed_by_hand_and_never_for_their_own_task():
    buffer, lessons = make_lesson_buffer(), make_lessons(7)
    owners = [("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("d", "5"), ("e", "6"), ("e", "7")]
    buffer.admit(lessons, *map(list, zip(*owners, strict=True)))
    assert buffer.owners() == owners
    asking = ["a", "new", "e", "c"]
    keys = make_lessons(len(asking), seed=3).key
    for key, task, mean in zip(keys, asking, buffer.recall(keys, asking), strict=True):
        np.testing.assert_allclose(mean, recalled_by_hand(lessons, owners, key, task), atol=1e-5)


def test_no_lesson_is_recalled_from_an_empty_buffer_or_one_that_holds_the_own_task_only():
    buffer = make_lesson_buffer()
    assert not buffer.recall(make_lessons(2).key, ["a", "b"]).any()
    buffer.admit(make_lessons(2), ["a", "a"], ["1", "2"])
    assert not buffer.recall(make_lessons(1).key, ["a"]).any()
    assert buffer.recall(make_lessons(1).key, ["b"]).any()


def test_lessons_that_teach_nothing_or_are_not_finite_are_left_out_and_a_pair_seen_again_is_replaced():
    buffer, lessons = make_lesson_buffer(), make_lessons(4, told=torch.tensor([True, False, True, True]))
    lessons.key[2, 0], lessons.direction[3, 1] = torch.nan, 1e6  # no half-precision number is as large
    buffer.admit(lessons, list("abcd"), list("1234"))
    assert buffer.owners() == [("a", "1")]
    later = make_lessons(2, seed=1)
    buffer.admit(later, ["b", "a"], ["2", "1"])
    assert buffer.owners() == [("a", "1"), ("b", "2")]
    assert torch.equal(buffer.state_dict()["rows"]["direction"], later.direction[[1, 0]].half())


def test_a_full_buffer_forgets_the_lesson_not_renewed_for_longest():
    buffer = make_lesson_buffer(memory_capacity=3)
    for step, pair in enumerate("1234" "3" "5"):
        buffer.admit(make_lessons(1, seed=step), [f"t{pair}"], [pair])
    assert sorted(pair for _, pair in buffer.owners()) == ["3", "4", "5"]


def test_bytes_are_those_of_the_entries_up_to_the_capacity():
    buffer = make_lesson_buffer(memory_capacity=3)
    for entries in (1, 2, 3, 4):
        buffer.admit(make_lessons(1, seed=entries), [f"t{entries}"], ["1"])
        rows = buffer.state_dict()["rows"].values()
        assert buffer.bytes_of(entries) == sum(x.numel() * x.element_size() for x in rows)


def test_random_lessons_depend_on_task_and_entry_alone():
    buffer = make_lesson_buffer(memory_recall="random")
    buffer.admit(make_lessons(6), list("abcdef"), list("123456"))
    one = buffer.recall(make_lessons(2, seed=1).key, ["x", "y"])
    other = buffer.recall(make_lessons(2, seed=2).key, ["x", "y"])
    assert torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_lessons_survive_a_weights_only_file_bit_for_bit_and_a_smaller_buffer_keeps_the_newest():
    buffer = make_lesson_buffer()
    for step, pair in enumerate("12341"):
        buffer.admit(make_lessons(1, seed=step), [f"t{pair}"], [pair])
    state, key = reload_state(buffer.state_dict()), make_lessons(2, seed=9).key
    again, small = make_lesson_buffer(), make_lesson_buffer(memory_capacity=2)
    again.load_state_dict(state)
    assert torch.equal(again.recall(key, ["x", "t1"]), buffer.recall(key, ["x", "t1"]))
    for store in (again, buffer):
        store.admit(make_lessons(1, seed=7), ["t2"], ["2"])
    assert torch.equal(again.state_dict()["rows"]["number"], buffer.state_dict()["rows"]["number"])
    small.load_state_dict(state)
    assert small.owners() == [("t1", "1"), ("t4", "4")]
    with pytest.raises(ValueError, match="expected key of shape"):
        make_lesson_buffer(width=6).load_state_dict(state)


# Z-learning


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_z_goes_to_the_exponential_of_a_constant_reward_and_unvisited_entries_stay_one(temperature):
    table = ZTable(3, temperature=temperature)
    c_in, target = torch.full((1, 2, 2), 4), torch.full((1, 2, 2), 7)
    mask, permutation = torch.ones(1, 2, 2, dtype=torch.bool), torch.arange(10)[None]
    for _ in range(200):
        table.update(torch.tensor([2]), c_in, torch.full((1, 2, 2), 5), target, mask, permutation)
    assert table.z[2, 4, 7].item() == pytest.approx(math.exp(1 / temperature), abs=1e-4)
    assert table.z[2, 4, 5].item() == pytest.approx(math.exp(-1 / temperature), abs=1e-4)
    table.z[2, 4, 7] = table.z[2, 4, 5] = 1.0
    assert (table.z == 1).all()


def reference_table(z, slots, c_in, prediction, target, mask, permutation, rate=0.1):
    """Return z after one update, by loops over cells."""
    visits = {}
    for b, h, w in np.ndindex(*c_in.shape):
        if not mask[b, h, w] or slots[b] == 0:
            continue
        inverse = {int(new): old for old, new in enumerate(permutation[b])}
        row = inverse.get(int(c_in[b, h, w]), 10)
        true, guess = inverse[int(target[b, h, w])], inverse[int(prediction[b, h, w])]
        visits.setdefault((int(slots[b]), row, true), []).append(math.e)
        if guess != true:
            visits.setdefault((int(slots[b]), row, guess), []).append(1 / math.e)
    z = z.clone()
    for entry, values in visits.items():
        z[entry] = (1 - rate) * z[entry] + rate * sum(values) / len(values)
    return z


def test_z_table_update_and_lookup_equal_loops_over_cells():
    generator = torch.Generator().manual_seed(0)
    table = ZTable(4)
    for _ in range(3):
        slots = torch.randint(0, 5, (6,), generator=generator)
        c_in = torch.randint(-1, 11, (6, 3, 4), generator=generator)
        c_in[c_in == -1] = -100
        prediction, target = (torch.randint(0, 10, (6, 3, 4), generator=generator) for _ in range(2))
        prediction = torch.where(torch.rand(6, 3, 4, generator=generator) < 0.4, target, prediction)
        mask = torch.rand(6, 3, 4, generator=generator) < 0.7
        permutation = torch.stack([torch.randperm(10, generator=generator) for _ in range(6)])
        expected = reference_table(table.z, slots, c_in, prediction, target, mask, permutation)
        table.update(slots, c_in, prediction, torch.where(mask, target, -100), mask, permutation)
        torch.testing.assert_close(table.z, expected)
    assert (table.z[0] == 1).all() and (table.z[1:] != 1).any()
    found = table.lookup(slots, c_in, permutation)
    for b, h, w in np.ndindex(6, 3, 4):
        inverse = permutation[b].argsort()
        row = int(inverse[c_in[b, h, w]]) if 0 <= c_in[b, h, w] <= 9 else 10
        torch.testing.assert_close(found[b, h, w], table.z[slots[b], row, inverse].log())


def test_z_table_learns_the_same_whatever_the_colour_permutation():
    plain, permuted = ZTable(1), ZTable(1)
    generator = torch.Generator().manual_seed(1)
    c_in, prediction, target = (torch.randint(0, 10, (1, 5, 5), generator=generator) for _ in range(3))
    mask, slot = torch.ones(1, 5, 5, dtype=torch.bool), torch.tensor([1])
    identity, permutation = torch.arange(10), torch.randperm(10, generator=generator)
    plain.update(slot, c_in, prediction, target, mask, identity[None])
    permuted.update(slot, *(permutation[x] for x in (c_in, prediction, target)), mask, permutation[None])
    assert torch.equal(plain.z, permuted.z)
    torch.testing.assert_close(permuted.lookup(slot, permutation[c_in], permutation[None])[..., permutation],
                               plain.lookup(slot, c_in, identity[None]))


def test_z_stays_within_its_bounds_and_weighs_the_prior():
    table, generator = ZTable(1), torch.Generator().manual_seed(2)
    for _ in range(50):
        c_in, prediction, target = (torch.randint(0, 10, (1, 6, 6), generator=generator) for _ in range(3))
        table.update(torch.tensor([1]), c_in, prediction, target, torch.ones(1, 6, 6, dtype=torch.bool),
                     torch.arange(10)[None])
    assert table.z.min() >= 1 / math.e - 1e-6 and table.z.max() <= math.e + 1e-6
    prior = torch.randn(1, 6, 6, 10, generator=generator).log_softmax(-1)
    log_z = table.lookup(torch.tensor([1]), c_in, torch.arange(10)[None])
    z = table.z[1][c_in[0]][None]
    torch.testing.assert_close((prior + log_z).softmax(-1),
                               prior.exp() * z / (prior.exp() * z).sum(-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_z_table_with_empty_mask_changes_nothing_and_survives_a_round_trip():
    table = ZTable(2)
    cells = torch.zeros(1, 2, 2, dtype=torch.long)
    empty, permutation = torch.zeros(1, 2, 2, dtype=torch.bool), torch.arange(10)[None]
    table.update(torch.tensor([1]), cells, cells, cells, empty, permutation)
    assert (table.z == 1).all()
    table.update(torch.tensor([1]), cells, cells, cells, ~empty, permutation)
    copy = ZTable(2)
    copy.load_state_dict(reload_state(table.state_dict()))
    assert torch.equal(copy.z, table.z) and not torch.equal(copy.z, torch.ones_like(copy.z))


def test_z_learning_converges_to_the_linear_solution_on_a_chain():
    """Random walk on 0..n-1, cost .1 per state, absorbing right end with z = 1 (Todorov's linear Bellman equation)."""
    n, cost, rng = 6, 0.1, np.random.default_rng(0)
    passive = np.zeros((n, n))
    for s in range(n - 1):
        passive[s, max(s - 1, 0)] += 0.5
        passive[s, s + 1] += 0.5
    inner = np.eye(n - 1) - math.exp(-cost) * passive[:-1, :-1]
    exact = np.linalg.solve(inner, math.exp(-cost) * passive[:-1, -1])
    z = torch.ones(n, dtype=torch.float64)
    for sweep in range(3000):
        state = rng.integers(0, n - 1, 16)
        following = torch.from_numpy(np.where(rng.random(16) < 0.5, np.maximum(state - 1, 0), state + 1))
        index = torch.from_numpy(state)
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, index, math.exp(-cost) * z[following])
        z = z_update(z, total, torch.bincount(index, minlength=n), 0.5 / (1 + sweep / 100))
    assert np.abs(z[:-1].numpy() - exact).max() < 0.03


def test_recall_stays_in_single_precision_under_autocast():
    memory = make_memory(memory_similarity=-1.0)
    memory.admit(make_candidates([f"t{i}" for i in range(9)], seed=1))
    query = make_candidates(["x"], seed=2)
    plain = memory.recall(query.features, query.prompt, ["x"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = memory.recall(query.features, query.prompt, ["x"])
    assert torch.equal(plain.weights, cast.weights) and cast.weights.dtype == torch.float32
