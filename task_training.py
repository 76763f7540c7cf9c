"""Training at test time: fit the prompt's task slot, and weights, on the demonstrations of the tasks to be answered.

May import arc_system and everything below. Each demonstration is predicted from the others of its task, as in training,
so that no answer is needed: contexts have no field for one. The system's own tensors are never written. Copies stand in
for them while the block lasts, and the very objects come back afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arc_data import Answer, ArcTask, Context, Pair, Query, TaskSampler
from arc_system import ARCSystem, Runtime, keyed_generator, learning_rate_scale
from config import ConfigError, DataConfig, check_settings, setting
from grid_accuracy_loss import cell_nats
from loss_function import size_loss
from model_persistence import rng_state, set_rng_state

SLOT = "prompt_model.task_slot.weight"
SIZE_WEIGHT = 0.5  # of the size loss beside the cells' nats, as in the last part of training
WARMUP, DECAY = 0.1, 0.5  # shares of the steps in which the learning rate rises and falls
FULL_SHARE = 0.3  # of the learning rate of low-rank updates, which start at zero
BETAS = (0.9, 0.95)
UNUSED = ("agent.backward_planner.", "agent.preference_", "agent.halt_head.")  # no answer depends on these


@dataclass(frozen=True, kw_only=True)
class TaskTraining:
    """How a system is trained on the demonstrations of the tasks that it is about to answer.

    Raises: ConfigError naming the setting whose value is not acceptable.
    """

    steps: int = setting(16, "optimizer steps; a step is one batch of demonstrations", low=1)
    weights: str = setting(
        "slot",
        "what is fitted: slot (one vector per task), low-rank (and low-rank updates of the agent's matrices), or full"
        " (and all weights of the agent that answers depend on)",
        choices=("slot", "low-rank", "full"),
    )
    slot_lr: float = setting(0.03, "peak learning rate of the task slots", low=0)
    lr: float = setting(1e-3, f"peak learning rate of low-rank updates; full weights take {FULL_SHARE} of it", low=0)
    rank: int = setting(8, "rank of the low-rank updates", low=1)
    augment: str = setting("full", "augmentation of the demonstrations", choices=("none", "dihedral", "full"))
    batch_cells: int = setting(4096, "cells per batch, counted on the padded canvases", low=1)
    seed: int = setting(0, "seed of batches, augmentation and low-rank updates", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        check_settings(self)


# 1. The block ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trained_on_demonstrations(
    system: ARCSystem,
    runtime: Runtime,
    contexts: Sequence[Context],
    settings: TaskTraining,
    tick: Callable[[int], object] = lambda done: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[list[Context]]:
    """Yield the contexts with fresh task slots; inside the block the system is fitted to their demonstrations.

    Contexts of one task share a slot, which starts as that of unknown tasks, whether or not the run has trained on the
    task. Inside, the system is in evaluation mode; afterwards every tensor, flag, mode and the random state is as it
    was, whatever happened. `tick` gets 1 for each step, and `stopping` is asked before each. A pure function of
    weights, contexts and settings.
    Raises: ConfigError when slots are to be fitted and the system has none; ValueError when contexts of one task show
    different demonstrations, as one of these might be the other's answer.
    """
    tasks, slots = fresh_slots(system, contexts)
    stand_ins = StandIns(system, settings, len(tasks))
    with _left_as_found(system):
        system.eval()
        try:
            with _frozen(system), torch.enable_grad():
                fit(system, runtime, tasks, stand_ins, settings, tick, stopping)
            stand_ins.settle()
            yield slots
        finally:
            stand_ins.remove()


def fresh_slots(system: ARCSystem, contexts: Sequence[Context]) -> tuple[list[ArcTask], list[Context]]:
    """Return the tasks of the contexts, without test pairs, and the contexts pointing to new rows of the task table.

    Task j of the list has row j after the rows that the table has.
    Raises: ValueError when contexts of one task show different demonstrations.
    """
    taken = system.z_table.z.shape[0] - 1
    tasks: dict[str, ArcTask] = {}
    rows: dict[str, int] = {}
    for context in contexts:
        shown = tuple(Pair(*pair) for pair in context.demonstrations)
        task = tasks.setdefault(context.task_id, ArcTask(context.task_id, shown, ()))
        if not _same_pairs(task.train, shown):
            raise ValueError(f"the contexts of task {context.task_id} show different demonstrations")
        rows.setdefault(context.task_id, taken + len(rows))
    return list(tasks.values()), [dataclasses.replace(c, task_index=rows[c.task_id]) for c in contexts]


def _same_pairs(some: Sequence[Pair], others: Sequence[Pair]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and bool((a == b).all())
        for one, other in zip(some, others, strict=True)
        for a, b in ((one.input, other.input), (one.output, other.output))
    )


@contextlib.contextmanager
def _left_as_found(system: ARCSystem) -> Iterator[None]:
    """Put the mode of every module and the random state back at the end."""
    modes = [(module, module.training) for module in system.modules()]
    state = rng_state()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_rng_state(state)


@contextlib.contextmanager
def _frozen(system: ARCSystem) -> Iterator[None]:
    """Let no parameter of the system ask for a gradient inside, and put the flags back at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in system.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


# 2. What is fitted ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A tensor of the system that another stands in for: its table, name, the original, and what makes the other."""

    table: dict[str, Tensor | None]
    name: str
    original: Tensor
    make: Callable[[], Tensor]


class StandIns:
    """Tensors that stand in for a system's own, made of `leaves`: the slots' and the weights' fitted parameters.

    `lay` puts them in place with their graphs, `settle` without, and `remove` brings the originals back.
    """

    def __init__(self, system: ARCSystem, settings: TaskTraining, tasks: int):
        self.slots: list[nn.Parameter] = []
        self.weights: list[nn.Parameter] = []
        self.places: list[Place] = []
        parameters = dict(system.named_parameters())
        if SLOT in parameters:
            self._add_slots(system, parameters[SLOT], tasks)
        elif settings.weights == "slot":
            raise ConfigError("this system has no task slots to fit", "fit weights: low-rank or full")
        z = system.z_table.z
        self.first = len(z) - 1  # the task_index of the first task
        grown = torch.cat((z, z.new_ones(tasks, *z.shape[1:])))
        self._add(system, "z_table.z", z, lambda: grown)
        for name, parameter in parameters.items():
            if name.startswith("agent.") and not name.startswith(UNUSED):
                if settings.weights == "full":
                    self._add_copy(system, name, parameter)
                elif settings.weights == "low-rank" and parameter.ndim == 2 and min(parameter.shape) > settings.rank:
                    self._add_low_rank(system, name, parameter, settings)

    def _add(self, system: ARCSystem, name: str, original: Tensor, make: Callable[[], Tensor]) -> None:
        path, _, last = name.rpartition(".")
        module = system.get_submodule(path)
        table = module._parameters if last in module._parameters else module._buffers
        self.places.append(Place(table, last, original, make))

    def _add_slots(self, system: ARCSystem, table: Tensor, tasks: int) -> None:
        """Add `tasks` rows, each at first the row 0 of unknown tasks."""
        rows = nn.Parameter(table.detach()[:1].repeat(tasks, 1))
        self.slots.append(rows)
        self._add(system, SLOT, table, lambda: torch.cat((table.detach(), rows)))

    def _add_copy(self, system: ARCSystem, name: str, original: Tensor) -> None:
        copy = nn.Parameter(original.detach().clone())
        self.weights.append(copy)
        self._add(system, name, original, lambda: copy)

    def _add_low_rank(self, system: ARCSystem, name: str, original: Tensor, settings: TaskTraining) -> None:
        """Add W + B A with A [rank, in] random and B [out, rank] zero, so that at first nothing changes."""
        rows, columns = original.shape
        noise = torch.randn(settings.rank, columns, generator=keyed_generator(torch.device("cpu"), settings.seed, name))
        into = nn.Parameter((noise / columns**0.5).to(original))
        out = nn.Parameter(original.new_zeros(rows, settings.rank))
        self.weights += [into, out]
        self._add(system, name, original, lambda: original.detach() + out @ into)

    def lay(self) -> None:
        """Put what the fitted parameters make in place of the originals."""
        for place in self.places:
            place.table[place.name] = place.make()

    def settle(self) -> None:
        """Put the same in place without graphs: parameters where the originals are."""
        for place in self.places:
            made = place.make().detach()
            is_parameter = isinstance(place.original, nn.Parameter)
            place.table[place.name] = nn.Parameter(made, place.original.requires_grad) if is_parameter else made

    def remove(self) -> None:
        """Put the originals back."""
        for place in self.places:
            place.table[place.name] = place.original


# 3. Fitting -----------------------------------------------------------------------------------------------------------


def fit(
    system: ARCSystem, runtime: Runtime, tasks: Sequence[ArcTask], stand_ins: StandIns, settings: TaskTraining,
    tick: Callable[[int], object], stopping: Callable[[], bool],
) -> int:  # fmt: skip
    """Return the number of steps taken on the demonstrations of the tasks, each predicted from the others of its task.

    0 when no task has two demonstrations. A step whose loss or gradient is not finite changes nothing.
    """
    if not any(len(task.train) > 1 for task in tasks):
        return 0
    sampler = TaskSampler(tasks, DataConfig(augment=settings.augment), settings.seed, settings.batch_cells)
    optimizer = make_optimizer(stand_ins, settings)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.scaler.is_enabled())
    for step, (query, answer) in zip(range(settings.steps), _batches(sampler), strict=False):
        if stopping():
            return step
        scale = learning_rate_scale(step, settings.steps, WARMUP, DECAY)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        stand_ins.lay()
        query = dataclasses.replace(query, task_slot=query.task_slot + stand_ins.first).to(runtime.device)
        with runtime.autocast():
            loss = demonstration_loss(system, query, answer.to(runtime.device))
        take_step(loss, optimizer, scaler, system.config.optim.clip)
        tick(1)
    return settings.steps


def _batches(sampler: TaskSampler) -> Iterator[tuple[Query, Answer]]:
    """Yield the batches of all epochs, one after the other, without end."""
    for epoch in itertools.count():
        for k in range(sampler.num_batches(epoch)):
            yield sampler.batch(epoch, k)


def make_optimizer(stand_ins: StandIns, settings: TaskTraining) -> torch.optim.AdamW:
    """Return AdamW without weight decay, slots and weights with their own peak learning rates."""
    lr = settings.lr * (FULL_SHARE if settings.weights == "full" else 1.0)
    groups = [{"params": stand_ins.slots, "lr": settings.slot_lr}, {"params": stand_ins.weights, "lr": lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def demonstration_loss(system: ARCSystem, query: Query, answer: Answer) -> Tensor:
    """Return the mean over the demonstrations of nats per cell at the true size, and of the weighed size loss.

    The prompt is moved by the policy's mean, as predictions move theirs, unless these use it as it is written.
    """
    scene = system.observe(query)
    reading, _ = system.read(query, scene, answer.target_size, answer.canvas, answer.shapes)
    embedding = scene.embedding
    if system.config.evaluation.refine != "none":
        mean_move = system.policy.propose(scene.prompt, scene.features, 1, deterministic=True)
        embedding = system.policy.refine(embedding, mean_move, 0)
    trajectory = system.plan(scene, reading, embedding)
    sizes = size_loss(trajectory.row_logits, trajectory.col_logits, answer.target_size)
    return (cell_nats(trajectory.final(), answer.target) + SIZE_WEIGHT * sizes).mean()


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: float) -> bool:
    """Return whether the step was taken: not where loss or gradient is not finite, which changes nothing."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    is_finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
    if is_finite:
        optimizer.step()
    if scaler.is_enabled():
        scaler.update(None if is_finite else scaler.get_scale() * scaler.get_backoff_factor())
    return is_finite
