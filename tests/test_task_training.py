"""Tests of training at test time: what is fitted, what it is fitted on, and that nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import Lab, differences

import task_training
from arc_data import Answer, Augmentation, Context, Pair, collate, leave_one_out
from arc_data import test_contexts as test_items
from config import ConfigError
from evaluate import predict
from grid_accuracy_loss import cell_nats
from model_persistence import rng_state
from prior_cache import PriorCache
from task_training import StandIns, TaskTraining, demonstration_loss, trained_on_demonstrations

MODES = ("slot", "low-rank", "full")


@pytest.fixture
def lab(make_lab, known_priors) -> Lab:
    """Return a system whose planner listens to its prompt: all weights are moved, as its heads start at zero."""
    lab = make_lab("--answer-confidence", "2")
    lab.system.prior = known_priors
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lab.system.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return lab


@pytest.fixture(scope="session")
def known_priors() -> PriorCache:
    """Return one cache for all tests, so that each prior is computed once."""
    return PriorCache()


@pytest.fixture(scope="session")
def contexts(tasks) -> list[Context]:
    """Return the test inputs of four tasks under other names, so that the system knows none of them."""
    return [dataclasses.replace(context, task_id=f"new-{context.task_id}") for context, _ in test_items(tasks[::2])]


def settings(**values) -> TaskTraining:
    return TaskTraining(**{"steps": 3, "batch_cells": 2048, **values})


def trained(lab, contexts, chosen=None, **hooks):
    return trained_on_demonstrations(lab.system, lab.runtime, contexts, chosen or settings(), **hooks)


def everything(system) -> dict:
    """Return copies of all that must come back: tensors, the objects they are, flags, modes, memory, random state."""
    named = [*system.named_parameters(), *system.named_buffers()]
    return {
        "tensors": {name: x.detach().clone() for name, x in named},
        "objects": {name: id(x) for name, x in named},
        "flags": {name: p.requires_grad for name, p in system.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in system.named_parameters()},
        "modes": {name: module.training for name, module in system.named_modules()},
        "memory": system.memory.state_dict(),
        "random": rng_state(),
    }


def answers(system, runtime, contexts) -> tuple[torch.Tensor, ...]:
    """Return attempts and prompts, all the bits that could differ."""
    prediction = predict(system, collate(contexts)[0], runtime)
    return prediction.grid, prediction.second, prediction.embedding


def demonstration_nats(lab, contexts) -> float:
    """Return the mean nats per cell of the contexts' demonstrations, each predicted from the others."""
    items, _ = leave_one_out(contexts)
    query, answer = collate([c for c, _ in items], [grid for _, grid in items])
    with torch.no_grad():
        scene = lab.system.observe(query)
        reading, _ = lab.system.read(query, scene, answer.target_size, answer.canvas)
        return float(cell_nats(lab.system.plan(scene, reading, scene.embedding).final(), answer.target).mean())


# Nothing is left ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
def test_every_bit_comes_back(lab, contexts, weights):
    lab.system.policy.eval()  # a mode of its own
    for parameter in lab.system.memory_reader.parameters():
        parameter.requires_grad_(False)
    query, answer = lab.batch(0)
    demonstration_loss(lab.system, query, answer).backward()
    before = everything(lab.system)
    with trained(lab, contexts, settings(weights=weights)) as slotted:
        assert not lab.system.training and not lab.system.agent.training
        inside = everything(lab.system)
        answers(lab.system, lab.runtime, slotted)
        for draw in (torch.rand, np.random.rand):
            draw(3)
        random.random()
        lab.system.z_table.update(*z_visit(slotted))
    assert differences(before, everything(lab.system)) == []
    assert differences(before["tensors"], inside["tensors"]) and before["flags"] == inside["flags"]
    optimizer_parameters = {id(p) for g in lab.optimizers.main["muon"].param_groups for p in g["params"]}
    assert optimizer_parameters <= set(before["objects"].values())


def z_visit(contexts):
    query = collate(contexts)[0]
    return query.task_slot, query.input, query.input, query.input, query.input >= 0, query.color_permutation


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["fitting", "inside"])
def test_every_bit_comes_back_after_an_interruption(lab, contexts, error, place):
    def interrupt(*_):
        raise error("stop")

    before = everything(lab.system)
    hooks = {"tick": interrupt} if place == "fitting" else {}
    with pytest.raises(error, match="stop"), trained(lab, contexts, settings(weights="full"), **hooks):
        interrupt()
    assert differences(before, everything(lab.system)) == []


def test_it_works_where_gradients_are_switched_off(lab, contexts):
    with torch.no_grad(), trained(lab, contexts, settings(steps=1, weights="full")):
        assert not torch.is_grad_enabled()


def test_predictions_afterwards_are_those_from_before(lab, contexts):
    lab.system.eval()
    before = answers(lab.system, lab.runtime, contexts)
    with trained(lab, contexts, settings(lr=0.05, weights="full")) as slotted:
        assert differences(before, answers(lab.system, lab.runtime, slotted)) != []
    assert differences(before, answers(lab.system, lab.runtime, contexts)) == []


# What is fitted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
def test_each_mode_moves_exactly_its_tensors(lab, contexts, weights):
    system, chosen = lab.system, settings(weights=weights, rank=4)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    with trained(lab, contexts, chosen):
        after = dict(system.named_parameters())
        moved = {n for n, p in before.items() if n != task_training.SLOT and not torch.equal(p, after[n])}
        grown = {name for name, p in before.items() if p.shape != after[name].shape}
    used = {name for name in before if name.startswith("agent.") and not name.startswith(task_training.UNUSED)}
    matrices = {name for name in used if before[name].ndim == 2 and min(before[name].shape) > 4}
    assert grown == {task_training.SLOT}
    assert moved == {"slot": set(), "low-rank": matrices, "full": used}[weights]


def test_low_rank_updates_have_that_rank(lab, contexts):
    name = "agent.evidence_embed.weight"
    before = lab.system.get_parameter(name).detach().clone()
    with trained(lab, contexts, settings(weights="low-rank", rank=3, lr=0.05)):
        change = (lab.system.get_parameter(name) - before).detach().double()
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 3


def test_every_task_gets_a_slot_of_its_own(lab, contexts):
    system, table = lab.system, lab.system.prompt_model.task_slot.weight.detach().clone()
    with trained(lab, contexts, settings(weights="slot", steps=9)) as slotted:
        rows = system.prompt_model.task_slot.weight.detach()
        assert torch.equal(rows[: len(table)], table) and len(rows) == len(table) + 4
        assert len(system.z_table.z) == len(rows) and (system.z_table.z[len(table) :] == 1).all()
        fresh = rows[len(table) :]
        assert len({tuple(row.tolist()) for row in [table[0], *fresh]}) == 5, "two slots are alike"
    expected = {name: len(table) - 1 + i for i, name in enumerate(dict.fromkeys(c.task_id for c in contexts))}
    assert [c.task_index for c in slotted] == [expected[c.task_id] for c in contexts]
    assert [dataclasses.replace(c, task_index=-1) for c in slotted] != slotted
    assert [c.key for c in slotted] == [c.key for c in contexts]


def test_tasks_of_the_run_get_fresh_slots_too(lab, tasks):
    known = [c for c, _ in test_items(tasks, {task.id: i for i, task in enumerate(tasks)})]
    with trained(lab, known) as slotted:
        assert min(c.task_index for c in slotted) == len(tasks)


def test_without_a_step_predictions_are_those_of_an_unknown_task(lab, contexts):
    lab.system.eval()
    before = answers(lab.system, lab.runtime, contexts)
    for weights in MODES:
        with trained(lab, contexts, settings(weights=weights), stopping=lambda: True) as slotted:
            assert differences(before, answers(lab.system, lab.runtime, slotted)) == []


def test_a_single_demonstration_gives_nothing_to_fit(lab, contexts):
    lone = dataclasses.replace(contexts[0], task_id="lone", demonstrations=contexts[0].demonstrations[:1])
    steps = []
    before = answers(lab.system, lab.runtime, [lone])
    with trained(lab, [lone], tick=steps.append) as slotted:
        assert differences(before, answers(lab.system, lab.runtime, slotted)) == [] and not steps
    with trained(lab, [*contexts[1:4], lone], settings(weights="slot"), tick=steps.append) as slotted:
        rows = lab.system.prompt_model.task_slot.weight
        assert torch.equal(rows[slotted[-1].task_index + 1], rows[0]) and len(steps) == 3
        assert differences(before, answers(lab.system, lab.runtime, slotted[-1:])) == []


def test_a_system_without_slots_is_fitted_in_its_weights(make_lab, known_priors, contexts):
    lab = make_lab("--no-use-task-slot")
    lab.system.prior = known_priors
    with pytest.raises(ConfigError, match="no task slots"), trained(lab, contexts, settings(weights="slot")):
        pass
    with trained(lab, contexts, settings(weights="full")) as slotted:
        answers(lab.system, lab.runtime, slotted)


# What it is fitted on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
def test_demonstrations_are_predicted_better(lab, contexts, weights):
    lab.system.eval()
    before = demonstration_nats(lab, contexts)
    lr = 7e-3 if weights == "full" else 0.01
    chosen = settings(steps=16, lr=lr, slot_lr=0.1, weights=weights, augment="none", batch_cells=10**6)
    with trained(lab, contexts, chosen) as slotted:
        assert demonstration_nats(lab, slotted) < before - 0.005


def constructed() -> tuple[Context, np.ndarray]:
    """Return a task whose rule, to paint a cell's colour plus 3, no demonstration shows for the colours asked for."""
    rng = np.random.default_rng(0)
    grids = [rng.integers(1, 5, (4, 4)).astype(np.uint8) for _ in range(4)]
    shown = tuple((grid, (grid + 3).astype(np.uint8)) for grid in grids[:3])
    return Context("constructed", "test:0", shown, grids[3]), (grids[3] + 3).astype(np.uint8)


def test_an_unseen_task_is_answered_better(make_lab):
    context, answer = constructed()
    lab = make_lab("--kappa", "0", "--answer-confidence", "2", "--refine", "none")
    lab.system.eval()

    def right(context):
        grid = predict(lab.system, collate([context])[0], lab.runtime).grid[0]
        return int((grid[:4, :4] == torch.from_numpy(answer.astype(np.int64))).sum())

    before = right(context)
    with trained(lab, [context], settings(steps=25, weights="full", lr=0.06, augment="none")) as (fitted,):
        assert right(fitted) == 16 and before < 16


def test_scrambled_answers_change_no_bit(lab, tasks):
    plain = [dataclasses.replace(task, id=f"new-{task.id}") for task in tasks[::2]]
    scrambled = [
        dataclasses.replace(task, test=tuple(Pair(p.input, np.ascontiguousarray(9 - p.input)) for p in task.test))
        for task in plain
    ]
    found = []
    for version in (plain, scrambled):
        with trained(lab, [c for c, _ in test_items(version)]) as slotted:
            found.append((answers(lab.system, lab.runtime, slotted), everything(lab.system)["tensors"]))
    assert differences(*found) == []
    assert not [f.name for f in dataclasses.fields(Context) if f.type == "Answer"]


def test_contexts_that_may_hold_each_others_answers_are_refused(lab, contexts):
    held_out = [context for context, _ in leave_one_out(contexts[:1])[0]]
    with pytest.raises(ValueError, match="show different demonstrations"), trained(lab, held_out):
        pass


def test_only_the_demonstrations_are_predicted(lab, contexts, monkeypatch):
    seen = []

    def record(system, query, answer):
        seen.extend(zip(query.contexts, answer.target, strict=True))
        return demonstration_loss(system, query, answer)

    monkeypatch.setattr(task_training, "demonstration_loss", record)
    with trained(lab, contexts, settings(weights="slot", augment="none")):
        pass
    shown = {c.task_id: c.demonstrations for c in contexts}
    for context, target in seen:
        number = int(context.pair_id.removeprefix("train:"))
        assert context.input is shown[context.task_id][number][0]
        rows, columns = shown[context.task_id][number][1].shape
        assert np.array_equal(target[:rows, :columns], shown[context.task_id][number][1])
        assert all(a is not context.input for a, _ in context.demonstrations)


# How it is fitted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
def test_it_is_a_pure_function_of_weights_contexts_and_settings(lab, contexts, weights):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        with trained(lab, contexts, settings(weights=weights, seed=seed)) as slotted:
            found.append((everything(lab.system)["tensors"], answers(lab.system, lab.runtime, slotted)))
    assert differences(found[0], found[1]) == [] and differences(found[0][0], found[2][0]) != []


def test_it_stops_early_when_asked_to(lab, contexts):
    done = []
    with trained(lab, contexts, settings(steps=9), tick=done.append, stopping=lambda: len(done) == 2) as slotted:
        rows = lab.system.prompt_model.task_slot.weight
        assert done == [1, 1] and not torch.equal(rows[-len(contexts) :], rows[:1].expand(len(contexts), -1))
        answers(lab.system, lab.runtime, slotted)


def test_steps_that_are_not_finite_change_nothing(lab, contexts, monkeypatch):
    losses, done = iter((torch.nan, 1.0, torch.inf)), []

    def spoiled(system, query, answer):
        return demonstration_loss(system, query, answer) * next(losses)

    monkeypatch.setattr(task_training, "demonstration_loss", spoiled)
    with trained(lab, contexts, settings(weights="full"), tick=done.append) as slotted:
        assert all(torch.isfinite(p).all() for p in lab.system.parameters()) and done == [1, 1, 1]
        assert torch.isfinite(answers(lab.system, lab.runtime, slotted)[2]).all()


def test_views_of_a_context_share_its_slot(lab, contexts):
    views = [Augmentation(dihedral, (0, 2, 1, *range(3, 10))) for dihedral in range(8)]
    turned = [dataclasses.replace(context, augmentation=view) for context in contexts[:2] for view in views]
    with trained(lab, contexts[:2]) as slotted:
        plain = everything(lab.system)["tensors"]
        more = [dataclasses.replace(slotted[0], augmentation=view) for view in views]
        answers(lab.system, lab.runtime, more)
    with trained(lab, turned) as slotted:
        assert len({c.task_index for c in slotted}) == 2
        assert differences(plain, everything(lab.system)["tensors"]) == []
        answers(lab.system, lab.runtime, slotted)


def test_the_loss_is_nats_and_sizes_of_the_batch(lab):
    query, answer = lab.batch(0)
    loss = demonstration_loss(lab.system, query, answer)
    assert loss.ndim == 0 and loss.requires_grad and isinstance(answer, Answer)


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"lr": -1.0}, {"weights": "all"}, {"augment": "x"}, {"rank": 0}, {"batch_cells": 0}]
)
def test_settings_are_checked(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        TaskTraining(**values)


def test_stand_ins_are_put_and_taken_without_a_trace(lab):
    before = everything(lab.system)
    stand_ins = StandIns(lab.system, settings(), 2)
    with contextlib.suppress(RuntimeError):
        stand_ins.lay()
        assert lab.system.prompt_model.task_slot.weight.shape[0] == before["tensors"][task_training.SLOT].shape[0] + 2
    stand_ins.remove()
    assert differences(before, everything(lab.system)) == []
