"""Predict output grids in two attempts and score them on unseen test pairs, beside the prior and trivial baselines.

May import arc_system and everything below. Used by the driver. `predict` takes a Query and nothing else; answers enter
the judges only, and the second look at the true size, which is scored under a name that says so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arc_data import (
    PAD,
    Answer,
    Context,
    Grid,
    Query,
    collate,
    evaluation_batches,
    leave_one_out,
)
from arc_system import ARCSystem, Runtime, Scene, canvas_for, keyed_generator, on_canvas
from config import RewardConfig
from distributed import ALONE, World
from grid_accuracy_loss import Reading, Trajectory, cell_accuracy, cell_nats, exact_match, grid_sizes
from loss_function import expected_free_energy
from policy_refined import leave_one_out_advantage
from prior_cache import PriorCache
from reward_shaping import cells_union, color_counts, potentials, skill

RESAMPLES = 10_000  # of a bootstrap interval of counts
RESAMPLES_OF_A_MEAN = 2_000
MEAN_FACTORS = (1, 0, 0.5, 2, 3, 4)  # how far a search may go along the policy's mean move
PLANNED_TOGETHER = 8  # moves of a search that are planned in one batch; bounds its memory
STEP_LENGTHS = (1, 2, 4)  # of the policy gradient at prediction, in mean lengths of a sampled move
NAMES_SHOWN = 3  # of the hypotheses that carried the prior's exact answers

Item = tuple[Context, Grid]


@dataclass
class Prediction:
    """What the system answers to a batch of queries; all grids are int64 [B, S, S], PAD outside their size.

    grid: the first attempt; second: another answer, the first one again only where there is no other; unrefined: the
    first attempt under the prompt as written; planned: the planner's own grid under the refined prompt; candidates
    [B, 2, S, S]: the best grids of the prior at its likeliest size, in its own order; judged [B, 2, S, S]: in the
    judge's. Where at_once [B], the best of these is the first attempt and no planning step counts. steps [B] planning
    steps used; embedding [B, Dp] the refined prompt; beliefs [B, T, H, W, C] logits of each planning step under it, on
    a canvas that may be smaller than S x S.
    """

    grid: Tensor
    second: Tensor
    unrefined: Tensor
    planned: Tensor
    candidates: Tensor
    judged: Tensor
    at_once: Tensor
    steps: Tensor
    embedding: Tensor
    beliefs: Tensor
    scene: Scene

    @property
    def sizes(self) -> Tensor:
        """Return the sizes [B, 2] of the first attempt."""
        return grid_sizes(self.grid)


@dataclass
class Plan:
    """What the planner makes of a batch of queries before anything is decided.

    trajectory: under the refined prompts `embedding` [B, Dp], on the predicted sizes [B, 2]; shapes: the prior's
    likeliest sizes; confident [B]: where the prior would answer at once.
    """

    scene: Scene
    reading: Reading
    sizes: Tensor
    shapes: list[tuple[int, int]]
    confident: Tensor
    embedding: Tensor
    trajectory: Trajectory


@torch.no_grad()
def plan(system: ARCSystem, query: Query, runtime: Runtime) -> Plan:
    """Return the plan of the query alone; deterministic."""
    with runtime.autocast():
        scene = system.observe(query)
        sizes = scene.sizes()
        reading, _ = system.read(query, scene, sizes, canvas_for(sizes))
        shapes = system.prior.likeliest_sizes(query)
        confident = system.prior.confidences(query, shapes) >= system.config.agent.answer_confidence
        refined = refine_prompts(system, query, scene, confident)
        return Plan(scene, reading, sizes, shapes, confident, refined, system.plan(scene, reading, refined))


@torch.no_grad()
def predict(system: ARCSystem, query: Query, runtime: Runtime) -> Prediction:
    """Return two attempts from the query alone; deterministic. See `two_attempts`."""
    made = plan(system, query, runtime)
    after = made.trajectory
    with runtime.autocast():
        before = system.plan(made.scene, made.reading, made.scene.embedding)
    halted = after.halt_logits > 0
    steps = torch.where(halted.any(1), halted.int().argmax(1) + 1, after.halt_logits.shape[1])
    heights, widths = zip(made.reading.mask.shape[1:], *made.shapes, strict=True)
    canvas = (max(heights), max(widths))
    planned, unrefined = on_canvas(after.decode(), canvas), on_canvas(before.decode(), canvas)
    candidates, _ = system.prior.candidates(query, made.shapes, canvas, count=2)
    judged, _ = system.judged(query, made.shapes, canvas)
    at_once, judges = made.confident & has_cells(judged[:, 0]), system.config.agent.answer_confidence <= 1
    first, second = two_attempts(planned, judged, at_once, judges)
    unrefined, _ = two_attempts(unrefined, judged, at_once, judges)
    steps = torch.where(at_once, 0, steps)
    return Prediction(first, second, unrefined, planned, candidates, judged[:, :2], at_once, steps, made.embedding,
                      after.forward, made.scene)  # fmt: skip


# Refinement of the prompt at prediction ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moves:
    """Moves of B prompts to try: mean [B, Dp] of the policy; samples [G, B, Dp] of it, from the mean; memories
    [2K, B, Dp]: of each recalled entry the refinement that worked there, and half the way to its prompt."""

    mean: Tensor
    samples: Tensor
    memories: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Moves:
        """Return the moves changed by a function of moves [M, B, Dp]."""
        return Moves(change(self.mean[None])[0], change(self.samples), change(self.memories))


def refine_prompts(system: ARCSystem, query: Query, scene: Scene, confident: Tensor) -> Tensor:
    """Return the prompts [B, Dp] to predict with, as --refine says; no search where `confident` [B]."""
    config, seed = system.config.evaluation, system.config.run.seed
    if config.refine == "none":
        return scene.embedding
    if config.refine == "mean":
        return scene.embedding + candidate_moves(system, scene, 0).mean
    moves = candidate_moves(system, scene, config.refine_samples)
    if config.refine == "isotropic":
        moves = moves.map(lambda x: random_directions(x, seed))
    chosen = (~confident).nonzero().flatten()
    found = moves.mean.clone()
    contexts = [query.contexts[i] for i in chosen.tolist()]
    found[chosen] = search(Demonstrations(system, contexts), moves.map(lambda x: x[:, chosen]))
    if config.refine == "random":
        found = random_directions(found[None], seed)[0]
    return scene.embedding + found


def candidate_moves(system: ARCSystem, scene: Scene, samples: int) -> Moves:
    """Return the moves to try. The samples use the same noise for every prompt, so that an answer does not depend on
    the batch it is in."""
    origin = torch.zeros_like(scene.embedding, dtype=torch.float32)
    mean = system.policy.refine(origin, system.policy.propose(scene.prompt, scene.features, 1, deterministic=True), 0)
    drawn = memories = origin[None][:0]
    if samples:
        noise = keyed_generator(torch.device("cpu"), system.config.run.seed, "search")
        proposal = system.policy.propose(scene.prompt, scene.features, samples, noise, shared=True)
        drawn = system.policy.refine(origin, proposal) - mean
    if scene.recall is not None:
        recall = scene.recall
        halfway = torch.where(recall.valid[..., None], 0.5 * (recall.prompts - scene.embedding[:, None]), 0.0)
        memories = torch.cat((recall.deltas, halfway), 1).transpose(0, 1)
    return Moves(mean, drawn, memories)


def random_directions(moves: Tensor, seed: int) -> Tensor:
    """Return moves [M, B, Dp] of the same lengths in random directions, the same for every prompt: a control."""
    noise = torch.randn(len(moves), 1, moves.shape[-1], generator=keyed_generator(torch.device("cpu"), seed, "random"))
    return F.normalize(noise.to(moves.device), dim=-1) * moves.norm(dim=-1, keepdim=True)


def search(demonstrations: Demonstrations, moves: Moves) -> Tensor:
    """Return [B, Dp] the moves under which the demonstrations predict one another best.

    First how far to go along the policy's mean; from there its samples, what the memory recalls, and steps along the
    policy gradient that the samples' rewards give. The reward is the fall in nats per cell of the demonstrations, so no
    answer is needed. Of moves that are equally good the first is taken, which is the mean.
    """
    each = torch.arange(moves.mean.shape[0], device=moves.mean.device)
    along = torch.stack([factor * moves.mean for factor in MEAN_FACTORS])
    nats = demonstrations.nats(along)
    nearest, best = nats.min(0)
    start = along[best, each]
    beside = start + torch.cat((moves.samples, moves.memories))
    found = demonstrations.nats(beside)
    count = len(moves.samples)
    steps = start + policy_gradient_steps(moves.samples, -found[:count])
    tried = torch.cat((start[None], beside, steps))
    return tried[torch.cat((nearest[None], found, demonstrations.nats(steps))).argmin(0), each]


def policy_gradient_steps(moves: Tensor, rewards: Tensor) -> Tensor:
    """Return steps [len(STEP_LENGTHS), B, Dp] along the score-function estimate of the rewards' gradient.

    Shapes:  moves [G, B, Dp] samples, rewards [G, B]
    A step's length is a multiple of the samples' mean distance from their mean; 0 where all rewards are equal.
    Source: Williams 1992 (REINFORCE) for a Gaussian's mean, with the leave-one-out baseline of `policy_refined`.
    """
    advantage = leave_one_out_advantage(rewards, torch.zeros_like(rewards[0]))
    spread = moves - moves.mean(0)
    direction = F.normalize((advantage[..., None] * spread).sum(0), dim=-1)
    length = spread.norm(dim=-1).mean(0)[:, None]
    return torch.stack([factor * length * direction for factor in STEP_LENGTHS])


class Demonstrations:
    """The demonstrations of B contexts, each read once, to be predicted from the others under many prompts."""

    def __init__(self, system: ARCSystem, contexts: Sequence[Context]):
        self.agent = system.agent
        items, owner = leave_one_out(contexts)
        self.owners = torch.tensor(owner, dtype=torch.int64, device=system.device)
        self.count = torch.bincount(self.owners, minlength=len(contexts)).clamp(min=1)
        self.parts: list[tuple[Tensor, Reading, Tensor, Tensor]] = []  # prompts, reading, target, whose
        for batch in evaluation_batches(items, system.config.data.batch_cells):
            query, answer = collate([items[i][0] for i in batch], [items[i][1] for i in batch])
            query, answer = query.to(system.device), answer.to(system.device)
            scene = system.observe(query)
            reading, _ = system.read(query, scene, answer.target_size, answer.canvas, answer.shapes)
            self.parts.append((scene.embedding, reading, answer.target, self.owners[batch]))

    def nats(self, moves: Tensor) -> Tensor:
        """Return [M, B] nats per cell under prompts moved by `moves` [M, B, Dp]; all demonstrations weigh alike.

        0 for a context with a single demonstration.
        """
        return torch.cat([self._nats(some) for some in moves.split(PLANNED_TOGETHER)])

    def _nats(self, moves: Tensor) -> Tensor:
        count, total = len(moves), torch.zeros(moves.shape[:2], device=moves.device)
        for embedding, reading, target, owners in self.parts:
            planned = self.agent.plan(reading.repeat(count), (embedding + moves[:, owners]).flatten(0, 1))
            nats = cell_nats(planned.final(), target.repeat(count, 1, 1))
            total.index_add_(1, owners, nats.view(count, -1))
        return total / self.count


def has_cells(grid: Tensor) -> Tensor:
    """Return [B] True where a grid [B, S, S] is more than padding."""
    return (grid != PAD).flatten(1).any(1)


def two_attempts(planned: Tensor, judged: Tensor, at_once: Tensor, judges: bool = True) -> tuple[Tensor, Tensor]:
    """Return the first and the second attempt, both [B, S, S].

    Shapes:  planned [B, S, S], judged [B, K, S, S] the candidates, best first, at_once [B]
    A grid that the planner alone knows comes first, and the best candidate second, the other way round where at_once.
    Where the planner's grid is a candidate, the best two candidates are the attempts; unless the judge may not decide
    (`judges`), when the planner's grid comes first in any case but at_once. Of two alike, the second gives way to the
    next candidate.
    """
    best, next_best = judged[:, 0], judged[:, 1]
    known = (planned[:, None] == judged).flatten(2).all(2).any(1) & judges
    swapped, decided = at_once[:, None, None], known[:, None, None]
    first = torch.where(swapped | decided, best, planned)
    second = torch.where(decided, next_best, torch.where(swapped, planned, best))
    alike = (first == second).flatten(1).all(1)
    second = torch.where(alike[:, None, None], next_best, second)
    return first, torch.where(has_cells(second)[:, None, None], second, first)


@dataclass
class Tally:
    """One value per output and name, in the order of `add`; a mean divides once.

    kept: what a `Watcher` keeps of single outputs, plain data by the number of the item.
    """

    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    kept: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor | np.ndarray | Sequence[float]) -> None:
        """Add one value per output."""
        self.parts.setdefault(name, []).append(torch.as_tensor(values, dtype=torch.float64).cpu().numpy().ravel())

    def values(self, name: str) -> np.ndarray:
        """Return all values, float64 [outputs]; empty when nothing was added."""
        return np.concatenate(self.parts.get(name, [np.zeros(0)]))

    def extend(self, other: Tally) -> None:
        """Add what another tally holds, after what is there."""
        for name, parts in other.parts.items():
            self.parts.setdefault(name, []).extend(parts)
        self.kept |= other.kept

    def sum(self, name: str) -> float:
        """Return the sum, 0 when nothing was added."""
        return float(self.values(name).sum())

    def mean(self, name: str) -> float:
        """Return the mean, nan when nothing was added."""
        values = self.values(name)
        return float(values.mean()) if values.size else float("nan")


class Watcher(Protocol):
    """Who looks at a validation without changing it."""

    def look(self, tally: Tally, batch: Sequence[int], query: Query, prediction: Prediction) -> None:
        """Keep in `tally.kept` what is wanted of the predictions for the items of one batch."""

    def finish(self, tally: Tally) -> None:
        """Take the tally of all outputs."""


def validate(
    system: ARCSystem,
    runtime: Runtime,
    items: Sequence[Item],
    batch_cells: int,
    tick: Callable[[int], None] = lambda done: None,
    world: World = ALONE,
    watcher: Watcher | None = None,
) -> dict[str, float]:
    """Return the validation metrics of the system over items (context, answer), in evaluation mode.

    Keys: outputs, exact (count at the predicted size), accuracy, cells_true, cells_predicted, cells_unrefined,
    accuracy_delta (cells that the refinement gained, with _low and _high) and refinement_nats (nats per cell that it
    gained at the true size, with both), size_accuracy, nats_gained, prompt_gap, steps; at_once (count of inputs that
    the prior answers), at_once_exact, at_once_planned (exact among these, and so the planner's own grids for them);
    potential, potential_prior (means), skill; copied, constant (shares, see `judge_habits`); and beside the prior, each
    with the suffixes of `beside_prior`: exact, unsure_exact (the inputs not answered at once), two_exact (at two
    attempts), judged_exact and judged_two_exact (the prior's candidates in the judge's order).
    """
    tally = collect(system, runtime, items, batch_cells, tick, world, watcher)
    if watcher is not None:
        watcher.finish(tally)
    return summary(tally)


def collect(
    system: ARCSystem,
    runtime: Runtime,
    items: Sequence[Item],
    batch_cells: int,
    tick: Callable[[int], None] = lambda done: None,
    world: World = ALONE,
    watcher: Watcher | None = None,
) -> Tally:
    """Return what `validate` sums up, output by output; "item" says which of the items each value belongs to.

    The batches are dealt out to the processes; each gets the whole tally, in the order of the batches.
    """
    batches, tallies = evaluation_batches(items, batch_cells), []
    with evaluation_mode(system):
        for batch in batches[world.rank :: world.size]:
            contexts = [items[i][0] for i in batch]
            query, answer = collate(contexts, [items[i][1] for i in batch])
            query, answer = query.to(runtime.device), answer.to(runtime.device)
            prediction, tally = predict(system, query, runtime), Tally()
            judge(tally, prediction, answer)
            judge_habits(tally, prediction, query, answer)
            judge_beside_prior(tally, prediction, query, answer, system.config.reward)
            look_at_true_size(tally, system, runtime, prediction, query, answer)
            tally.add("item", batch)
            if watcher is not None:
                watcher.look(tally, batch, query, prediction)
            tallies.append(tally)
            tick(len(batch))
    dealt, whole = world.gather(tallies), Tally()
    for number in range(len(batches)):
        whole.extend(dealt[number % world.size][number // world.size])
    return whole


def summary(tally: Tally) -> dict[str, float]:
    """Return the metrics of `validate`."""
    potential, base = tally.mean("potential"), tally.mean("potential_prior")
    delta = tally.values("after") - tally.values("before")
    refined = tally.values("unrefined_nats") - tally.values("nats")
    return {
        "outputs": tally.values("exact").size,
        "accuracy": tally.mean("exact"),
        "cells_true": tally.mean("cells_true"),
        "cells_predicted": tally.mean("after"),
        "cells_unrefined": tally.mean("before"),
        **with_interval("accuracy_delta", delta),
        **with_interval("refinement_nats", refined),
        "size_accuracy": tally.mean("size"),
        "nats_gained": tally.mean("prior_nats") - tally.mean("nats"),
        "prompt_gap": tally.mean("shuffled_nats") - tally.mean("paired_nats"),
        "steps": tally.mean("steps"),
        "copied": tally.mean("copied"),
        "constant": tally.mean("constant"),
        **{name: int(tally.sum(name)) for name in ("at_once", "at_once_exact", "at_once_planned")},
        "potential": potential,
        "potential_prior": base,
        "skill": float(skill(torch.tensor(potential), torch.tensor(base))),
        **beside_prior(tally, "exact"),
        **beside_prior(tally, "unsure_exact"),
        **beside_prior(tally, "two_exact"),
        **beside_prior(tally, "judged_exact"),
        **beside_prior(tally, "judged_two_exact"),
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
    chosen, chosen_next = prediction.judged.unbind(1)
    first, prior, at_once = is_exact(prediction.grid), is_exact(best), prediction.at_once
    tally.add("planned_exact", is_exact(prediction.planned))
    compare(tally, "exact", first, prior)
    compare(tally, "judged_exact", is_exact(chosen), prior)
    compare(tally, "judged_two_exact", is_exact(chosen) | is_exact(chosen_next), prior | is_exact(next_best))
    compare(tally, "unsure_exact", first[~at_once], prior[~at_once])
    compare(tally, "two_exact", first | is_exact(prediction.second), prior | is_exact(next_best))
    tally.add("at_once", at_once)
    tally.add("at_once_exact", first & at_once)
    tally.add("at_once_planned", is_exact(prediction.planned) & at_once)
    reached = potential(prediction.grid)
    tally.add("potential", reached)
    tally.add("potential_prior", potential(best))
    tally.add("reward", reached - potential(prediction.unrefined))


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
    ours, prior, won, lost = (int(tally.sum(name + end)) for end in ("", "_prior", "_won", "_lost"))
    outputs = tally.values(name).size
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


def with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Return NAME (the mean of one value per output), NAME_low and NAME_high: its 95 % bootstrap interval.

    The resamples are the same in every call, and the order of the values does not matter.
    """
    rng, count, values = np.random.default_rng(0), len(values), np.sort(values)
    drawn = [values[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES_OF_A_MEAN)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


@torch.no_grad()
def look_at_true_size(
    tally: Tally, system: ARCSystem, runtime: Runtime, prediction: Prediction, query: Query, answer: Answer
) -> None:
    """Add cells, nats and the prompt gap with the true output size given; none of it is a prediction."""
    scene, refined = prediction.scene, prediction.embedding
    with runtime.autocast():
        reading, preference = system.read(query, scene, answer.target_size, answer.canvas, answer.shapes)
        own, plain = system.plan(scene, reading, refined), system.plan(scene, reading, scene.embedding)
        shuffled = system.plan(scene, reading, refined.roll(len(query) // 2, 0)) if len(query) > 1 else None
    right, cells = cell_accuracy(own.decode(), answer.target)
    tally.add("cells_true", right / cells)
    nats = cell_nats(own.final(), answer.target)
    tally.add("nats", nats)
    for name, value in zip(
        ("risk", "ambiguity"), expected_free_energy(own, preference, system.config.loss.preference_floor), strict=True
    ):
        tally.add(name, value)
    tally.add("unrefined_nats", cell_nats(plain.final(), answer.target))
    prior = system.prior.preferences(query, answer.shapes, answer.canvas).to(runtime.device)
    tally.add("prior_nats", cell_nats(prior, answer.target))
    if shuffled is not None:
        tally.add("paired_nats", nats)
        tally.add("shuffled_nats", cell_nats(shuffled.final(), answer.target))


@torch.no_grad()
def plan_back(
    system: ARCSystem, runtime: Runtime, contexts: Sequence[Context], grids: Sequence[Grid], prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how the backward planner goes from the grids to the inputs, under the prompts [B, Dp].

    Beliefs [B, T, H, W, C] of colours, entry t is b_t, and the inputs [B, H, W] that b_0 should be. Only looks.
    """
    query, guess = collate(list(contexts), list(grids))
    query, guess = query.to(runtime.device), guess.to(runtime.device)
    with evaluation_mode(system), runtime.autocast():
        beliefs = system.agent.plan_backward(query, guess.target, guess.target_size, prompts)
    height, width = query.input.shape[1:]
    return beliefs[:, :, :height, :width], query.input


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
        "copy_exact": int(tally.sum("copy_exact")),
        "color_cells": tally.mean("color_cells"),
        "color_exact": int(tally.sum("color_exact")),
        "prior_cells": tally.mean("prior_cells"),
        "prior_exact": int(tally.sum("prior_exact")),
        "prior_two_exact": int(tally.sum("prior_two_exact")),
        "prior_names": "; ".join(f"{name} ({count})" for name, count in names.most_common(NAMES_SHOWN)),
        "rule_size": tally.mean("rule_size"),
    }
