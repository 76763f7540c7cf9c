"""Measure what voting over views is worth: exact answers at 1, 8, 16 and 32 views of the same weights, and the time.

    python benchmarks/views.py --weights runs/NAME [--protocol arc1-eval] [--tasks 100] [--views 1 8 16 32]

The answers must be ones that the weights have not seen; where they were chosen by them, as those of `arc2` are, the
line of status says so. "network" votes without the prior's candidates, "prior" gives its two best grids, "both" is what
`eval`, `predict` and `submit` do. Differences are paired by output against the smallest number of views, with 95 %
intervals. All numbers of views share one set of plans: each larger one adds its views to those of the smaller ones.
Seconds are per task, planning and voting, with the priors computed before.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from answering import Solver
from arc_data import ArcTask, Grid, select_tasks, test_contexts
from config import PROTOCOLS, AnswerConfig
from evaluate import paired_interval
from protocols import VALIDATED, compare, load_protocol, require_unseen, status_line
from scoring import wilson_interval
from voting import Ballot, Verdict, agreements, choose_views, collect_ballots, vote


@dataclass
class Arm:
    """One way to answer: which outputs are exact at one and at two attempts [outputs, 2], and the seconds per task."""

    name: str
    exact: np.ndarray
    seconds: float


def staged_ballots(solver: Solver, tasks: Sequence[ArcTask], counts: Sequence[int]) -> list[tuple[list[Ballot], float]]:
    """Return, for each number of views, the ballots of all test inputs and the seconds that planning them took."""
    contexts = solver.contexts(tasks)
    views = choose_views(max(counts), solver.system.config.run.seed)
    found: list[tuple[list[Ballot], float]] = []
    before, seconds = [()] * len(contexts), 0.0
    for low, high in zip([0, *counts], counts, strict=False):
        began = time.monotonic()
        ballots = collect_ballots(solver.system, solver.runtime, contexts, views[low:high], solver.batch_cells)
        seconds += time.monotonic() - began
        ballots = [
            dataclasses.replace(ballot, beliefs=(*earlier, *ballot.beliefs))
            for earlier, ballot in zip(before, ballots, strict=True)
        ]
        before = [ballot.beliefs for ballot in ballots]
        found.append((ballots, seconds))
    return found


def decide(solver: Solver, tasks: Sequence[ArcTask], ballots: Sequence[Ballot]) -> list[list[Verdict]]:
    """Return the verdicts on each test input."""

    def verdicts(context, ballot: Ballot) -> list[Verdict]:
        return vote(ballot, lambda grids: agreements(solver.system, solver.runtime, context, grids))

    return [verdicts(context, ballot) for context, ballot in zip(solver.contexts(tasks), ballots, strict=True)]


def exactness(attempts: Sequence[Sequence[Grid]], answers: Sequence[Grid]) -> np.ndarray:
    """Return whether one of the first n attempts is the answer, bool [outputs, 2] for n = 1, 2."""
    hits = [[np.array_equal(grid, answer) for grid in two[:2]] for two, answer in zip(attempts, answers, strict=True)]
    return np.array([[row[0], any(row)] for row in hits])


def measure(solver: Solver, tasks: Sequence[ArcTask], counts: Sequence[int]) -> list[Arm]:
    """Return the arms: the prior alone, then the network alone and both for each number of views."""
    answers = [answer for _, answer in test_contexts(tasks)]
    arms = []
    for count, (ballots, seconds) in zip(counts, staged_ballots(solver, tasks, counts), strict=True):
        if not arms:
            prior = [[grid for grid, _ in ballot.candidates] for ballot in ballots]
            arms.append(Arm("prior", exactness(prior, answers), 0.0))
        alone = [dataclasses.replace(ballot, candidates=(), confident=False) for ballot in ballots]
        for name, cast in (("network", alone), ("both", ballots)):
            began = time.monotonic()
            attempts = [[verdict.grid for verdict in found] for found in decide(solver, tasks, cast)]
            spent = (seconds + time.monotonic() - began) / len(tasks)
            arms.append(Arm(f"{name}, {count} view{'s' * (count > 1)}", exactness(attempts, answers), spent))
    return arms


HEADER = ("| arm | exact | two attempts | two attempts against the fewest views | s per task |\n"
          "|---|---|---|---|---|")  # fmt: skip


def row(arm: Arm, base: Arm) -> str:
    """Return one line of the table."""
    outputs = len(arm.exact)
    shares = []
    for right in arm.exact.sum(0).tolist():
        low, high = wilson_interval(right, outputs)
        shares.append(f"{right}/{outputs} = {right / outputs:.3f} [{low:.3f}, {high:.3f}]")
    won, lost = (int((sign * (arm.exact[:, 1] * 1 - base.exact[:, 1]) > 0).sum()) for sign in (1, -1))
    low, high = paired_interval(won, lost, outputs)
    against = f"{won - lost:+d} [{low:+d}, {high:+d}]" if arm is not base else ""
    return f"| {arm.name} | {shares[0]} | {shares[1]} | {against} | {arm.seconds:.2f} |"


def table(arms: Sequence[Arm]) -> list[str]:
    """Return the lines of the table; the base of each kind of arm is its first one."""
    bases: dict[str, Arm] = {}
    return [row(arm, bases.setdefault(arm.name.split(",")[0], arm)) for arm in arms]


def parser_of(text: str | None, refinements: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with what every script has that answers with a run; `text` says what it does."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="", help="a run or its best/; default: the newest run")
    parser.add_argument("--refine", choices=refinements, default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache-dir", default="", help="the priors' folder; default as in the driver")
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__, ("none", "search"))
    parser.add_argument("--protocol", choices=PROTOCOLS, default="arc1-eval", help="what is answered")
    parser.add_argument("--tasks", type=int, default=0, help="at most this many of them, by hash; 0: all")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 8, 16, 32])
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    torch.set_num_threads(args.threads)
    answers = AnswerConfig(device=args.device, refine=args.refine, cache_dir=args.cache_dir)
    solver = Solver.load(args.weights or answers.weights, answers, lambda text: print(text, file=sys.stderr))
    tasks = select_tasks(load_protocol(args.protocol).scored, args.tasks)
    comparison = compare(tasks, solver.seen.pairs)
    require_unseen(comparison, args.protocol, (VALIDATED,) if args.protocol == "arc2" else ())
    solver.system.prior.build(solver.plan_priors(tasks))
    print(f"`python benchmarks/views.py {shlex.join(words)}`: {solver.runtime.device.type}, torch {torch.__version__}\n"
          f"{args.protocol}: {status_line(comparison)}\n\n{HEADER}", flush=True)  # fmt: skip
    for line in table(measure(solver, tasks, sorted(set(args.views)))):
        print(line)
    solver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
