"""Answer inputs from several views of their tasks: plan each view, undo it, and vote for two attempts that differ.

May import evaluate and everything below. Used by answering. Takes contexts only, never an answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arc_data import (
    NUM_COLORS,
    Augmentation,
    Context,
    Grid,
    collate,
    draw_augmentation,
    evaluation_batches,
    generator,
)
from arc_system import ARCSystem, Runtime, agreement_with_input
from distributed import ALONE, World
from evaluate import Item, Plan, evaluation_mode, plan

NUM_DIHEDRAL = 8
UNPLANNED = -math.log(NUM_COLORS)  # log-probability of a cell on which a view did not plan
VALIDATED_TOGETHER = 64  # inputs whose views are held at once


def choose_views(count: int, seed: int) -> list[Augmentation]:
    """Return `count` different views: as it is, then the other dihedral transforms, then recoloured ones as well."""
    views = [Augmentation(dihedral) for dihedral in range(min(count, NUM_DIHEDRAL))]
    for number in range(NUM_DIHEDRAL, count):
        colors = draw_augmentation("full", generator(seed, "view", number)).colors
        views.append(Augmentation(number % NUM_DIHEDRAL, colors))
    return views


@dataclass(frozen=True)
class Belief:
    """What one view says, undone: log-probabilities of the cells [h, w, 10] at the size it planned, and of the numbers
    of rows and of columns [2, 30]."""

    cells: np.ndarray
    sides: np.ndarray

    @property
    def grid(self) -> Grid:
        """Return the most probable colours."""
        return self.cells.argmax(-1).astype(np.uint8)

    def log_likelihood(self, grid: Grid) -> float:
        """Return the log-probability of a grid, its size included; of cells at another size uniform ones."""
        height, width = grid.shape
        size = float(self.sides[0, height - 1] + self.sides[1, width - 1])
        if grid.shape != self.cells.shape[:2]:
            return size + grid.size * UNPLANNED
        return size + float(np.take_along_axis(self.cells, grid[..., None].astype(np.int64), -1).sum())


@dataclass(frozen=True)
class Ballot:
    """All that is known of one input before the vote: the beliefs of its views, the prior's candidates (grid,
    probability) in the judge's order, whether the prior is confident enough to answer at once, and whether the judge
    decides between candidates."""

    beliefs: tuple[Belief, ...]
    candidates: tuple[tuple[Grid, float], ...]
    confident: bool
    judges: bool = True


def collect_ballots(
    system: ARCSystem,
    runtime: Runtime,
    contexts: Sequence[Context],
    views: Sequence[Augmentation],
    batch_cells: int,
    tick: Callable[[int], object] = lambda done: None,
) -> list[Ballot]:
    """Return the ballot of each context, seen in all views; `tick` gets the number of views planned."""
    items = [(dataclasses.replace(c, augmentation=view), i) for i, c in enumerate(contexts) for view in views]
    beliefs: list[list[Belief]] = [[] for _ in contexts]
    with evaluation_mode(system):
        for batch in evaluation_batches(items, batch_cells):
            query, _ = collate([items[i][0] for i in batch])
            made = plan(system, query.to(runtime.device), runtime)
            for i, belief in zip(batch, beliefs_of(made, query.contexts), strict=True):
                beliefs[items[i][1]].append(belief)
            tick(len(batch))
    return [ballot_of(system, context, found) for context, found in zip(contexts, beliefs, strict=True)]


def beliefs_of(made: Plan, contexts: Sequence[Context]) -> list[Belief]:
    """Return what a plan says of each context, in the frame without augmentation."""
    cells = torch.log_softmax(made.trajectory.final().float(), -1).cpu().numpy()
    sides = torch.stack([torch.log_softmax(x.float(), 1) for x in made.scene.size_logits], 1).cpu().numpy()
    beliefs = []
    for context, own, rows, (height, width) in zip(contexts, cells, sides, made.sizes.tolist(), strict=True):
        view = context.augmentation
        plain = np.ascontiguousarray(view.undo_scores(own[:height, :width]))
        beliefs.append(Belief(plain, rows[::-1] if view.transposes else rows))
    return beliefs


def ballot_of(system: ARCSystem, context: Context, beliefs: Sequence[Belief]) -> Ballot:
    """Return the ballot of one context; the prior's candidates are those at its likeliest size."""
    shape, least = system.prior.sizes(context)[0][0], system.config.agent.answer_confidence
    grids, probabilities = system.judged(collate([context])[0].to(system.device), [shape], shape)
    found = zip(grids[0].cpu().numpy().astype(np.uint8), probabilities[0].tolist(), strict=True)
    candidates = tuple((grid, probability) for grid, probability in found if probability > 0)
    confident = system.prior.preference(context, shape).confidence >= least
    return Ballot(tuple(beliefs), candidates, confident, least <= 1)


@dataclass(frozen=True)
class Verdict:
    """One answer after the vote: how many views planned it, its log-likelihood summed over all views, and how likely it
    is held to be: its share of the votes, the prior's grid counting with its own weight where no view planned it."""

    grid: Grid
    votes: int
    log_likelihood: float
    probability: float


def vote(ballot: Ballot, agreement: Callable[[Sequence[Grid]], Sequence[float]]) -> list[Verdict]:
    """Return the answers, all different and at least two, best first.

    Planned grids and the prior's candidates are ranked by the number of views, then by the summed log-likelihood, then
    by `agreement`, which is asked for grids that are equal in both. The best candidate comes first where the prior is
    confident, and second elsewhere; and where the first of that ranking is a candidate itself, the judge's order of the
    candidates goes before it.
    """
    planned = Counter(_key(belief.grid) for belief in ballot.beliefs)
    weights = {_key(grid): weight for grid, weight in ballot.candidates}
    keys = list(dict.fromkeys([*planned, *(_key(grid) for grid, _ in ballot.candidates)]))
    if len(keys) == 1:
        keys.append(_key(runner_up(ballot.beliefs[0])))
    verdicts = []
    for key in keys:
        grid = _grid(key)
        likelihood = math.fsum(belief.log_likelihood(grid) for belief in ballot.beliefs)
        share = planned[key] / len(ballot.beliefs) if planned[key] else weights.get(key, 0.0)
        verdicts.append(Verdict(grid, planned[key], likelihood, min(share, 1.0)))
    ranked = _ranked(verdicts, agreement)
    if ballot.candidates:
        best = _key(ballot.candidates[0][0])
        first = next(verdict for verdict in ranked if _key(verdict.grid) == best)
        others = [verdict for verdict in ranked if verdict is not first]
        if ballot.judges and _key(ranked[0].grid) in weights:
            place = {key: number for number, key in enumerate(weights)}
            return sorted(ranked, key=lambda verdict: place.get(_key(verdict.grid), len(place)))
        ranked = [first, *others] if ballot.confident or ranked[0] is first else [others[0], first, *others[1:]]
    return ranked


def _ranked(verdicts: list[Verdict], agreement: Callable[[Sequence[Grid]], Sequence[float]]) -> list[Verdict]:
    """Return the verdicts by votes, log-likelihood and, among those equal in both, agreement."""
    groups: dict[tuple[int, float], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.votes, verdict.log_likelihood), []).append(verdict)
    ranked = []
    for place in sorted(groups, reverse=True):
        equal = groups[place]
        if len(equal) > 1:
            values = agreement([verdict.grid for verdict in equal])
            order = sorted(range(len(equal)), key=lambda i: -values[i])  # noqa: B023 - used at once
            equal = [equal[i] for i in order]
        ranked += equal
    return ranked


def validate_votes(
    system: ARCSystem,
    runtime: Runtime,
    items: Sequence[Item],
    views: Sequence[Augmentation],
    batch_cells: int,
    tick: Callable[[int], object] = lambda done: None,
    world: World = ALONE,
) -> dict[str, float]:
    """Return the scores of the vote over items (context, answer): views, and voted_exact and voted_two_exact, counts of
    the first attempt and of both. The items are dealt out to the processes."""
    right = np.zeros(2, np.int64)
    mine = items[world.rank :: world.size]
    for start in range(0, len(mine), VALIDATED_TOGETHER):
        some = mine[start : start + VALIDATED_TOGETHER]
        ballots = collect_ballots(system, runtime, [context for context, _ in some], views, batch_cells)
        for (context, answer), ballot in zip(some, ballots, strict=True):
            attempts = vote(ballot, lambda grids, c=context: agreements(system, runtime, c, grids))[:2]
            found = [np.array_equal(attempt.grid, answer) for attempt in attempts]
            right += (found[0], any(found))
        tick(len(some))
    exact, two = world.sum([torch.tensor(right, device=runtime.device)])[0].tolist()
    return {"views": len(views), "voted_exact": exact, "voted_two_exact": two}


def runner_up(belief: Belief) -> Grid:
    """Return the belief's grid with its least certain cell in its second colour."""
    grid = belief.grid
    ordered = np.sort(belief.cells, -1)
    least = np.unravel_index((ordered[..., -1] - ordered[..., -2]).argmin(), grid.shape)
    grid[least] = belief.cells[least].argsort()[-2]
    return grid


def _key(grid: Grid) -> tuple[tuple[int, ...], bytes]:
    return grid.shape, np.ascontiguousarray(grid).tobytes()


def _grid(key: tuple[tuple[int, ...], bytes]) -> Grid:
    return np.frombuffer(key[1], np.uint8).reshape(key[0])


@torch.no_grad()
def agreements(system: ARCSystem, runtime: Runtime, context: Context, grids: Sequence[Grid]) -> list[float]:
    """Return for each grid the share of input cells that the backward planner finds from it, under the prompt as
    written."""
    query, answer = collate([context] * len(grids), list(grids))
    query, guess = query.to(runtime.device), answer.to(runtime.device)
    with evaluation_mode(system), runtime.autocast():
        prompt = system.observe(query).embedding
        backward = system.agent.plan_backward(query, guess.target, guess.target_size, prompt)
    return agreement_with_input(query, backward).tolist()
