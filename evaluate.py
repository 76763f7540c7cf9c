"""Predict output grids in two attempts and score them on unseen test pairs, beside the prior and trivial baselines.

May import arc_system and everything below. Used by the driver. `predict` takes a Query and nothing else; answers enter
the judges only, and the second look at the true size, which is scored under a name that says so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arc_data import PAD, Answer, Context, Grid, Query, canvas_side, collate, evaluation_batches
from arc_system import ARCSystem, Runtime, Scene, canvas_for, on_canvas
from config import RewardConfig
from grid_accuracy_loss import cell_accuracy, cell_nats, exact_match, grid_sizes
from prior_cache import PriorCache
from reward_shaping import cells_union, color_counts, potentials, skill

RESAMPLES = 10_000  # of a bootstrap interval
NAMES_SHOWN = 3  # of the hypotheses that carried the prior's exact answers

Item = tuple[Context, Grid]


@dataclass
class Prediction:
    """What the system answers to a batch of queries; all grids are int64 [B, S, S], PAD outside their size.

    grid: the first attempt; second: another answer, the first one again only where there is no other; unrefined: the
    first attempt under the prompt as written; planned: the planner's own grid under the refined prompt; candidates
    [B, 2, S, S]: the best grids of the prior at its likeliest size. Where at_once [B], the prior's best grid is the
    first attempt and no planning step counts. steps [B] planning steps used; embedding [B, Dp] the refined prompt.
    """

    grid: Tensor
    second: Tensor
    unrefined: Tensor
    planned: Tensor
    candidates: Tensor
    at_once: Tensor
    steps: Tensor
    embedding: Tensor
    scene: Scene

    @property
    def sizes(self) -> Tensor:
        """Return the sizes [B, 2] of the first attempt."""
        return grid_sizes(self.grid)


@torch.no_grad()
def predict(system: ARCSystem, query: Query, runtime: Runtime) -> Prediction:
    """Return two attempts from the query alone; deterministic (the policy's mean move).

    The first is planned, unless the prior is confident enough to answer at once with its own best grid.
    """
    with runtime.autocast():
        scene = system.observe(query)
        sizes = scene.sizes()
        side = canvas_for(sizes)
        reading, _ = system.read(query, scene, sizes, side)
        proposal = system.policy.propose(scene.prompt, scene.features, 1, deterministic=True)
        refined = system.policy.refine(scene.embedding, proposal, 0)
        after = system.plan(scene, reading, refined)
        before = system.plan(scene, reading, scene.embedding)
    halted = after.halt_logits > 0
    steps = torch.where(halted.any(1), halted.int().argmax(1) + 1, after.halt_logits.shape[1])
    shapes = system.prior.likeliest_sizes(query)
    side = max(side, canvas_side(max(max(shape) for shape in shapes)))
    planned, unrefined = on_canvas(after.decode(), side), on_canvas(before.decode(), side)
    candidates, _ = system.prior.candidates(query, shapes, side, count=2)
    at_once = system.prior.confidences(query, shapes) >= system.config.agent.answer_confidence
    at_once &= has_cells(candidates[:, 0])
    first, second = two_attempts(planned, candidates, at_once)
    unrefined = torch.where(at_once[:, None, None], first, unrefined)
    steps = torch.where(at_once, 0, steps)
    return Prediction(first, second, unrefined, planned, candidates, at_once, steps, refined, scene)


def has_cells(grid: Tensor) -> Tensor:
    """Return [B] True where a grid [B, S, S] is more than padding."""
    return (grid != PAD).flatten(1).any(1)


def two_attempts(planned: Tensor, candidates: Tensor, at_once: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second attempt, both [B, S, S].

    Shapes:  planned [B, S, S], candidates [B, 2, S, S] best first, at_once [B]
    First the planner's grid and then the best candidate, or the other way round where at_once; of the two alike, the
    second gives way to the next candidate.
    """
    best, next_best = candidates.unbind(1)
    swapped = at_once[:, None, None]
    first, second = torch.where(swapped, best, planned), torch.where(swapped, planned, best)
    alike = (first == second).flatten(1).all(1)
    second = torch.where(alike[:, None, None], next_best, second)
    return first, torch.where(has_cells(second)[:, None, None], second, first)


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
    accuracy_delta, size_accuracy, nats_gained, prompt_gap, steps; at_once (count of inputs that the prior answers),
    at_once_exact, at_once_planned (exact among these, and so the planner's own grids for them); potential,
    potential_prior (means), skill; copied, constant (shares, see `judge_habits`); and beside the prior, each with the
    suffixes of `beside_prior`: exact, unsure_exact (the inputs not answered at once), two_exact (at two attempts).
    """
    tally = Tally()
    with evaluation_mode(system):
        for batch in evaluation_batches(items, batch_cells):
            contexts = [items[i][0] for i in batch]
            query, answer = collate(contexts, [items[i][1] for i in batch])
            query, answer = query.to(runtime.device), answer.to(runtime.device)
            prediction = predict(system, query, runtime)
            judge(tally, prediction, answer)
            judge_habits(tally, prediction, query, answer)
            judge_beside_prior(tally, prediction, query, answer, system.config.reward)
            look_at_true_size(tally, system, runtime, query, answer)
            tick(len(batch))
    potential, base = tally.mean("potential"), tally.mean("potential_prior")
    return {
        "outputs": int(tally.counts["exact"]),
        "accuracy": tally.mean("exact"),
        "cells_true": tally.mean("cells_true"),
        "cells_predicted": tally.mean("after"),
        "cells_unrefined": tally.mean("before"),
        "accuracy_delta": tally.mean("after") - tally.mean("before"),
        "size_accuracy": tally.mean("size"),
        "nats_gained": tally.mean("prior_nats") - tally.mean("nats"),
        "prompt_gap": tally.mean("shuffled_nats") - tally.mean("paired_nats"),
        "steps": tally.mean("steps"),
        "copied": tally.mean("copied"),
        "constant": tally.mean("constant"),
        **{name: int(tally.sums[name]) for name in ("at_once", "at_once_exact", "at_once_planned")},
        "potential": potential,
        "potential_prior": base,
        "skill": float(skill(torch.tensor(potential), torch.tensor(base))),
        **beside_prior(tally, "exact"),
        **beside_prior(tally, "unsure_exact"),
        **beside_prior(tally, "two_exact"),
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
    """Add what the first attempts of one batch are worth: sizes, cells over the union area, with planning steps."""
    sizes, target, target_size = prediction.sizes, answer.target, answer.target_size
    tally.add("size", (sizes == target_size).all(1))
    tally.add("after", cells_union(prediction.grid, sizes, target, target_size))
    tally.add("before", cells_union(prediction.unrefined, sizes, target, target_size))
    tally.add("steps", prediction.steps)


def judge_habits(tally: Tally, prediction: Prediction, query: Query, answer: Answer) -> None:
    """Add which first attempts are the input, where the output has the input's size, and which are of one colour."""
    kept = (answer.target_size == query.input_size).all(1)
    tally.add("copied", exact_match(prediction.grid, prediction.sizes, query.input, query.input_size)[kept])
    tally.add("constant", (color_counts(prediction.grid) > 0).sum(1) == 1)


def judge_beside_prior(
    tally: Tally, prediction: Prediction, query: Query, answer: Answer, config: RewardConfig
) -> None:
    """Add which attempts of one batch are exact, and the potential of the first, beside the prior's own candidates."""

    def is_exact(grid: Tensor) -> Tensor:
        return exact_match(grid, grid_sizes(grid), answer.target, answer.target_size)

    def potential(grid: Tensor) -> Tensor:
        sizes = grid_sizes(grid)
        return potentials(grid, sizes, answer.target, answer.target_size, query.input, query.input_size, config).total

    best, next_best = prediction.candidates.unbind(1)
    first, prior, at_once = is_exact(prediction.grid), is_exact(best), prediction.at_once
    compare(tally, "exact", first, prior)
    compare(tally, "unsure_exact", first[~at_once], prior[~at_once])
    compare(tally, "two_exact", first | is_exact(prediction.second), prior | is_exact(next_best))
    tally.add("at_once", at_once)
    tally.add("at_once_exact", first & at_once)
    tally.add("at_once_planned", is_exact(prediction.planned) & at_once)
    tally.add("potential", potential(prediction.grid))
    tally.add("potential_prior", potential(best))


def compare(tally: Tally, name: str, ours: Tensor, prior: Tensor) -> None:
    """Add for each output whether ours is exact, whether the prior is, and whether only one of the two."""
    tally.add(name, ours)
    tally.add(f"{name}_prior", prior)
    tally.add(f"{name}_won", ours & ~prior)
    tally.add(f"{name}_lost", prior & ~ours)


def beside_prior(tally: Tally, name: str) -> dict[str, int]:
    """Return what `compare` counted: NAME (exact), NAME_of (outputs), NAME_prior (exact), and NAME_low, NAME_high.

    The last two bound the difference of the first and the third: see `paired_interval`.
    """
    ours, prior, won, lost = (int(tally.sums[name + end]) for end in ("", "_prior", "_won", "_lost"))
    outputs = int(tally.counts[name])
    low, high = paired_interval(won, lost, outputs)
    return {name: ours, f"{name}_of": outputs, f"{name}_prior": prior, f"{name}_low": low, f"{name}_high": high}


def paired_interval(won: int, lost: int, outputs: int) -> tuple[int, int]:
    """Return the 95 % bootstrap interval of won - lost, where each of `outputs` is won, lost or neither.

    How many of either kind there are among outputs drawn with replacement is multinomial, so no output is drawn. The
    resamples are the same in every call.
    """
    if not outputs:
        return 0, 0
    shares = np.array([won, lost, outputs - won - lost]) / outputs
    drawn = np.random.default_rng(0).multinomial(outputs, shares, RESAMPLES)
    low, high = np.quantile(drawn[:, 0] - drawn[:, 1], (0.025, 0.975), method="nearest")
    return int(low), int(high)


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


def baselines(items: Iterable[Item], prior: PriorCache) -> dict[str, float | str]:
    """Return cells (true size) and exact counts of three trivial answers, and the share of sizes the rule gets right.

    copy: the input; color: the answer's own most common colour, an upper bound for every one-colour answer; prior: the
    demonstrations' prior (its cells at the true size; exact: its best candidate at its own likeliest size, two_exact:
    one of its best two; names: the hypotheses that carried most of its exact answers, with their numbers).
    """
    tally, names = Tally(), Counter()
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
        tally.add("prior_cells", [float((guess == answer).mean())])
        size = prior.sizes(context)[0][0]
        best = prior.preference(context, size).candidates[:2]
        exact = [np.array_equal(grid, answer) for grid, _, _ in best]
        names.update(name.partition(" between ")[0] for _, _, name in best[:1] if exact[0])
        tally.add("prior_exact", [any(exact[:1])])
        tally.add("prior_two_exact", [any(exact)])
        tally.add("rule_size", [size == shape])
    return {
        "copy_cells": tally.mean("copy_cells"),
        "copy_exact": int(tally.sums["copy_exact"]),
        "color_cells": tally.mean("color_cells"),
        "color_exact": int(tally.sums["color_exact"]),
        "prior_cells": tally.mean("prior_cells"),
        "prior_exact": int(tally.sums["prior_exact"]),
        "prior_two_exact": int(tally.sums["prior_two_exact"]),
        "prior_names": "; ".join(f"{name} ({count})" for name, count in names.most_common(NAMES_SHOWN)),
        "rule_size": tally.mean("rule_size"),
    }
