"""Predict output grids and score them: validation on unseen test pairs, with the trivial baselines beside the model.

May import arc_system and everything below. Used by the driver. `predict` takes a Query and nothing else; answers enter
`judge` only, and the second look at the true size, which is scored under a name that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arc_data import Answer, Context, Grid, Query, collate, evaluation_batches
from arc_system import ARCSystem, Runtime, Scene, canvas_for
from grid_accuracy_loss import cell_accuracy, cell_nats, exact_match
from prior_cache import PriorCache
from reward_shaping import cells_union

Item = tuple[Context, Grid]


@dataclass
class Prediction:
    """What the system answers to a batch of queries.

    sizes [B, 2] predicted; grid [B, S, S] colours under the refined prompt and unrefined under the prompt as written
    (PAD outside the predicted size); embedding [B, Dp] the refined prompt; steps [B] planning steps used.
    """

    sizes: Tensor
    grid: Tensor
    unrefined: Tensor
    embedding: Tensor
    steps: Tensor
    scene: Scene


@torch.no_grad()
def predict(system: ARCSystem, query: Query, runtime: Runtime) -> Prediction:
    """Return predictions of size and cells from the query alone; deterministic (the policy's mean move)."""
    with runtime.autocast():
        scene = system.observe(query)
        sizes = scene.sizes()
        reading, _ = system.read(query, scene, sizes, canvas_for(sizes))
        proposal = system.policy.propose(scene.prompt, scene.features, 1, deterministic=True)
        refined = system.policy.refine(scene.embedding, proposal, 0)
        after = system.plan(scene, reading, refined)
        before = system.plan(scene, reading, scene.embedding)
    halted = after.halt_logits > 0
    steps = torch.where(halted.any(1), halted.int().argmax(1) + 1, after.halt_logits.shape[1])
    return Prediction(sizes, after.decode(), before.decode(), refined, steps, scene)


@dataclass
class Tally:
    """Sums over outputs; a mean divides by its own count once."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, values: Tensor | np.ndarray | Sequence[float]) -> None:
        """Add one value per output."""
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        self.counts[name] = self.counts.get(name, 0.0) + values.numel()

    def mean(self, name: str) -> float:
        """Return the mean, nan when nothing was added."""
        count = self.counts.get(name, 0.0)
        return self.sums[name] / count if count else float("nan")


def validate(
    system: ARCSystem,
    runtime: Runtime,
    items: Sequence[Item],
    batch_cells: int,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Return the validation metrics of the system over items (context, answer), in evaluation mode.

    Keys: outputs, exact (count at the predicted size), accuracy, cells_true, cells_predicted, cells_unrefined,
    accuracy_delta, size_accuracy, nats_gained, prompt_gap, steps.
    """
    tally = Tally()
    with evaluation_mode(system):
        for batch in evaluation_batches(items, batch_cells):
            contexts = [items[i][0] for i in batch]
            query, answer = collate(contexts, [items[i][1] for i in batch])
            query, answer = query.to(runtime.device), answer.to(runtime.device)
            judge(tally, predict(system, query, runtime), answer)
            look_at_true_size(tally, system, runtime, query, answer)
            tick(len(batch))
    return {
        "outputs": int(tally.counts["exact"]),
        "exact": int(tally.sums["exact"]),
        "accuracy": tally.mean("exact"),
        "cells_true": tally.mean("cells_true"),
        "cells_predicted": tally.mean("after"),
        "cells_unrefined": tally.mean("before"),
        "accuracy_delta": tally.mean("after") - tally.mean("before"),
        "size_accuracy": tally.mean("size"),
        "nats_gained": tally.mean("prior_nats") - tally.mean("nats"),
        "prompt_gap": tally.mean("shuffled_nats") - tally.mean("paired_nats"),
        "steps": tally.mean("steps"),
    }


@contextlib.contextmanager
def evaluation_mode(system: ARCSystem) -> Iterator[None]:
    """Switch the system to evaluation mode inside, and back afterwards."""
    was_training = system.training
    system.eval()
    try:
        yield
    finally:
        system.train(was_training)


def judge(tally: Tally, prediction: Prediction, answer: Answer) -> None:
    """Add what one batch of predictions is worth: exact and size at the predicted size, cells over the union area."""
    sizes, target, target_size = prediction.sizes, answer.target, answer.target_size
    tally.add("exact", exact_match(prediction.grid, sizes, target, target_size))
    tally.add("size", (sizes == target_size).all(1))
    tally.add("after", cells_union(prediction.grid, sizes, target, target_size))
    tally.add("before", cells_union(prediction.unrefined, sizes, target, target_size))
    tally.add("steps", prediction.steps)


@torch.no_grad()
def look_at_true_size(tally: Tally, system: ARCSystem, runtime: Runtime, query: Query, answer: Answer) -> None:
    """Add cells, nats and the prompt gap with the true output size given; none of it is a prediction."""
    with runtime.autocast():
        scene = system.observe(query)
        proposal = system.policy.propose(scene.prompt, scene.features, 1, deterministic=True)
        refined = system.policy.refine(scene.embedding, proposal, 0)
        side = answer.target.shape[-1]
        reading, preference = system.read(query, scene, answer.target_size, side, answer.shapes)
        own = system.plan(scene, reading, refined)
        shuffled = system.plan(scene, reading, refined.roll(len(query) // 2, 0)) if len(query) > 1 else None
    right, cells = cell_accuracy(own.decode(), answer.target)
    tally.add("cells_true", right / cells)
    nats = cell_nats(own.final(), answer.target)
    tally.add("nats", nats)
    prior = system.prior.preferences(query, answer.shapes, side).to(runtime.device)
    tally.add("prior_nats", cell_nats(prior, answer.target))
    if shuffled is not None:
        tally.add("paired_nats", nats)
        tally.add("shuffled_nats", cell_nats(shuffled.final(), answer.target))


# Baselines that need no training -------------------------------------------------------------------------------------


def baselines(items: Iterable[Item], prior: PriorCache) -> dict[str, float]:
    """Return cells (true size) and exact counts of three trivial answers, and the share of sizes the rule gets right.

    copy: the input; color: the answer's own most common colour, an upper bound for every one-colour answer; prior: the
    demonstrations' prior (its exact matches at its own predicted size).
    """
    tally = Tally()
    for context, answer in items:
        _, grid = context.seen()
        shape = answer.shape
        copied = grid.shape == shape
        tally.add("copy_cells", [float((grid == answer).mean()) if copied else 0.0])
        tally.add("copy_exact", [copied and bool((grid == answer).all())])
        color = np.bincount(answer.ravel(), minlength=10).argmax()
        tally.add("color_cells", [float((answer == color).mean())])
        tally.add("color_exact", [bool((answer == color).all())])
        guess = prior.preference(context, shape).log_prob.argmax(-1)
        right_size = prior.sizes(context)[0][0] == shape
        tally.add("prior_cells", [float((guess == answer).mean())])
        tally.add("prior_exact", [right_size and bool((guess == answer).all())])
        tally.add("rule_size", [right_size])
    return {
        "copy_cells": tally.mean("copy_cells"),
        "copy_exact": int(tally.sums["copy_exact"]),
        "color_cells": tally.mean("color_cells"),
        "color_exact": int(tally.sums["color_exact"]),
        "prior_cells": tally.mean("prior_cells"),
        "prior_exact": int(tally.sums["prior_exact"]),
        "rule_size": tally.mean("rule_size"),
    }
