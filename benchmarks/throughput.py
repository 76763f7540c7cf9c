"""Measure how fast a whole training step is, against a fixed 30 x 30 canvas and against one pair at a time.

    python benchmarks/throughput.py [--preset tiny] [--device cpu] [--steps 48] [--threads 2] [flags of the driver]

Takes batches of an epoch on all ARC-AGI-2 training tasks, --steps of them evenly spaced, and trains on each in three
ways, one after the other, with the driver's own step (prompt, both directions, loss, reward, policy, memory): as the
run does; the same batch with every grid on a 30 x 30 canvas; and its pairs one by one on that canvas, at most --alone
of them, evenly spaced. Prints pairs and useful cells per second and the share of the computed cells that are real;
the factors, each with its range over the rounds into which the batches fall; the FLOPs that torch counts, as FLOP/s
and as a share of what one large matrix product reaches here; on a CUDA GPU the kernels of a step, and the share of
its time that they fill; and each part's share of a step, as benchmarks/step_cost.py takes it. With `tiny` on a CPU it
exits with 1 when a limit is missed. The time is that of the clock on the wall: on a shared machine only the factors
mean something.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
if "--threads" in sys.argv[:-1]:  # before torch: idle threads of a larger pool take time from the others
    os.environ.setdefault("OMP_NUM_THREADS", sys.argv[sys.argv.index("--threads") + 1])

import argparse
import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import step_cost
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import trainloop_complete_with_fixes as driver
from arc_data import MAX_SIDE, PAD, Answer, Query, TaskSampler
from arc_system import on_canvas
from config import parse_command_line
from report import Console

LIMITS = {"fixed 30x30 canvas": 3.5, "batch size 1": 8.0}  # at least so much faster
LEAST_REAL = 0.75  # of the cells computed
FLOP_BATCHES = 3
PROFILED_BATCHES = 8
SHOWN_KERNELS = 12


def evenly(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


# What is compared ----------------------------------------------------------------------------------------------------


def widened(batch: tuple[Query, Answer]) -> tuple[Query, Answer]:
    """Return the batch with every grid on a 30 x 30 canvas."""
    query, answer = batch
    grids = {name: on_canvas(getattr(query, name), MAX_SIDE) for name in ("input", "demo_input", "demo_output")}
    target = on_canvas(answer.target, MAX_SIDE)
    return dataclasses.replace(query, **grids), dataclasses.replace(answer, target=target)


class Batches:
    """The batches of a run's sampler, widened or not; alone > 0: at most so many pairs of each, one by one."""

    def __init__(self, sampler: TaskSampler, wide: bool = False, alone: int = 0):
        self.sampler, self.wide, self.alone = sampler, wide, alone
        self._own: dict[int, int] = {}  # of pairs one by one: the batch and the pair that a number stands for

    def numbers(self, k: int) -> list[int]:
        """Return the numbers that stand for batch k: itself, or those of its single pairs."""
        if not self.alone:
            return [k]
        count = len(self.sampler.batch(0, k)[0])
        return [k * 100_000 + i for i in evenly(count, self.alone)]

    def batch(self, epoch: int, number: int) -> tuple[Query, Answer]:
        """Return the batch of a number, as the driver asks for it."""
        return self.parts(epoch, number, 1)[0]

    def parts(self, epoch: int, number: int, count: int) -> list[tuple[Query, Answer]]:
        """Return the batch of a number in parts, as the driver asks for them."""
        if self.alone:
            k, i = divmod(number, 100_000)
            parts = [self.sampler.parts(epoch, k, 100_000)[i]]
        else:
            parts = self.sampler.parts(epoch, number, count)
        return [widened(part) for part in parts] if self.wide else parts


def cell_counts(query: Query, answer: Answer) -> tuple[int, int]:
    """Return (real cells, cells of the canvases) of all that a step reads and plans on, in both directions.

    Forwards these are the outputs and the demonstrations' outputs, backwards the demonstrations' inputs and the frame
    of the input and the output, each a rectangle of one size in a batch.
    """
    real = answer.mask.sum() + (query.demo_output != PAD).sum() + (query.demo_input != PAD).sum()
    inputs, outputs = query.input_size, answer.target_size
    both = torch.minimum(inputs, outputs).prod(1)
    real = real + (inputs.prod(1) + outputs.prod(1) - both).sum()
    frame = [max(a, b) for a, b in zip(query.input.shape[1:], answer.target.shape[1:], strict=True)]
    canvases = answer.target.numel() + query.demo_output.numel() + query.demo_input.numel()
    return int(real), canvases + len(query) * frame[0] * frame[1]


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Arm:
    """One way to train on the same batches, and what it took: of each measured batch a row of seconds, CPU seconds and
    pairs."""

    name: str
    run: driver.Run
    batches: Batches
    rows: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)
    measured: list[int] = dataclasses.field(default_factory=list)
    real: int = 0
    computed: int = 0

    def train(self, k: int, measured: bool) -> None:
        """Train on batch k."""
        numbers = self.batches.numbers(k)
        counted = [self.batches.batch(0, number) for number in numbers] if measured else []
        wait(self.run.runtime.device)
        began, cpu = time.perf_counter(), time.process_time()
        pairs = sum(step_once(self.run, number, k) for number in numbers)
        wait(self.run.runtime.device)
        if measured:
            self.rows.append((time.perf_counter() - began, time.process_time() - cpu, pairs))
            self.measured.append(k)
        for query, answer in counted:
            real, computed = cell_counts(query, answer)
            self.real, self.computed = self.real + real, self.computed + computed

    def per_pair(self, which: slice = slice(None)) -> tuple[float, float]:
        """Return (seconds, CPU seconds) per pair over some of the batches."""
        seconds, cpu, pairs = np.array(self.rows[which]).sum(0)
        return seconds / pairs, cpu / pairs


def step_once(run: driver.Run, number: int, k: int) -> int:
    """Take one step of the driver, with its accounting; return the number of pairs."""
    state, every = run.state, run.config.policy.rl_every
    moment = driver.Moment(state.step, k / run.batches(0), bool(every) and state.step % every == 0)
    step = driver.take_step(run, 0, number, moment, watch_qwen=False)
    driver.count_step(run, step)
    state.step += 1
    return len(step.contexts)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arms_of(run: driver.Run, alone: int) -> list[Arm]:
    """Return the three ways, which share the system and its weights, each with a state of its own."""

    def arm(name: str, batches: Batches) -> Arm:
        state = driver.LoopState(**driver.computed_on(run.runtime))
        total = run.batches(0)
        own = dataclasses.replace(run, sampler=batches, state=state)
        own.batches = lambda epoch: total
        return Arm(name, own, batches)

    sampler = run.sampler
    return [arm("as trained", Batches(sampler)), arm("fixed 30x30 canvas", Batches(sampler, wide=True)),
            arm("batch size 1", Batches(sampler, wide=True, alone=alone))]  # fmt: skip


def rounds(count: int, most: int = 4) -> Iterator[slice]:
    """Yield the batches of each round, at most `most` of nearly equal length."""
    edges = np.linspace(0, count, min(most, count) + 1).round().astype(int)
    yield from (slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))


def counted_flops(arm: Arm, count: int) -> float:
    """Return the FLOP/s of training on some of the measured batches: FLOPs of a second step, seconds of the first."""
    flops, seconds = 0, 0.0
    for i in evenly(len(arm.rows), count):
        with FlopCounterMode(display=False) as counter:
            step_once(arm.run, arm.measured[i], arm.measured[i])
        flops, seconds = flops + counter.get_total_flops(), seconds + arm.rows[i][0]
    return flops / seconds


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of one large matrix product, the best of several."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


# Reporting -----------------------------------------------------------------------------------------------------------


def table(arms: list[Arm]) -> list[str]:
    """Return what each arm reached, one line each."""
    lines = [f"{'':20s} {'pairs/s':>9s} {'useful cells/s':>15s} {'real cells':>11s} {'CPU ms per pair':>16s}"]
    for arm in arms:
        seconds, cpu = arm.per_pair()
        total = sum(row[0] for row in arm.rows)
        lines.append(f"{arm.name:20s} {1 / seconds:9.2f} {arm.real / total:15.0f} {arm.real / arm.computed:11.1%}"
                     f" {1e3 * cpu:16.1f}")  # fmt: skip
    return lines


def factors(arms: list[Arm]) -> dict[str, tuple[float, list[float]]]:
    """Return how many times faster the first arm is than each other one, in all and in each round."""
    ours, *others = arms
    return {
        arm.name: (arm.per_pair()[0] / ours.per_pair()[0],
                   [arm.per_pair(part)[0] / ours.per_pair(part)[0] for part in rounds(len(ours.rows))])
        for arm in others
    }  # fmt: skip


def print_flops(arm: Arm) -> None:
    """Print the FLOP/s of the arm beside those of a large matrix product in the precision of the run."""
    runtime = arm.run.runtime
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(runtime.precision, torch.float32)
    reached, peak = counted_flops(arm, FLOP_BATCHES), matmul_peak(runtime.device, dtype)
    print(f"counted FLOPs: {reached / 1e9:.1f} GFLOP/s, {reached / peak:.1%} of the {peak / 1e9:.0f} of a large"
          f" {str(dtype).removeprefix('torch.')} matrix product")  # fmt: skip


def print_shares(arm: Arm, count: int) -> None:
    """Print each part's share of a step, from the profiler, over some of the measured batches."""
    chosen = [(0, arm.measured[i]) for i in evenly(len(arm.rows), count)]
    times, _ = step_cost.measure(arm.run, chosen)
    times.pop(step_cost.OWN_BACKWARD)
    whole = sum(times.values())
    print("share of a step, under the profiler: "
          + ", ".join(f"{part} {times[part] / whole:.1%}" for part in step_cost.PARTS))  # fmt: skip


def print_kernels(arm: Arm, count: int) -> None:
    """Print how many kernels a step launches on a GPU, what share of its time they fill, and the longest of them."""
    chosen = evenly(len(arm.rows), count)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in chosen:
            step_once(arm.run, arm.measured[i], arm.measured[i])
        wait(arm.run.runtime.device)
    times: Counter = Counter()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    for event in events:
        times[event.name] += event.device_time_total
    busy, whole = sum(times.values()), 1e6 * sum(arm.rows[i][0] for i in chosen)
    print(f"kernels: {len(events) / len(chosen):.0f} a step, {1e-3 * busy / len(chosen):.1f} ms of the"
          f" {1e-3 * whole / len(chosen):.1f} ms that one takes without the profiler, {busy / whole:.0%}")  # fmt: skip
    for name, spent in times.most_common(SHOWN_KERNELS):
        print(f"  {spent / busy:5.1%}  {name[:100]}")


def measured(run: driver.Run, batches: list[int], warmup: int, alone: int) -> list[Arm]:
    """Return the arms after training on the batches, of which the first ones only warm up."""
    arms = arms_of(run, alone)
    run.system.train()
    for n, k in enumerate(batches):
        for arm in arms:
            arm.train(k, n >= warmup)
    return arms


def judged(arms: list[Arm], limits: bool) -> int:
    """Print the factors; return the exit code."""
    good = arms[0].real / arms[0].computed >= LEAST_REAL
    if limits:
        print(f"limits: {LEAST_REAL:.0%} real cells, " + ", ".join(f"{x}x vs {name}" for name, x in LIMITS.items()))
    found = factors(arms)
    for arm, (name, (_, each)) in zip(arms[1:], found.items(), strict=True):
        processor = arm.per_pair()[1] / arms[0].per_pair()[1]
        print(f"vs {name}, by rounds: {min(each):.1f} to {max(each):.1f}; by the processor's time: {processor:.1f}")
    for name, (factor, _) in found.items():
        print(f"vs {name}: {factor:.1f}x")
        good &= factor >= LIMITS[name]
    return int(limits and not good)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=48, help="batches to measure")
    parser.add_argument("--warmup-batches", type=int, default=2)
    parser.add_argument("--alone", type=int, default=8, help="most pairs of a batch that are trained on one by one")
    parser.add_argument("--threads", type=int, default=2)
    args, flags = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as out:
        words = ["--preset", args.preset, "--device", args.device, "--model", "tiny", "--out", out, *flags]
        run = driver.build_run(parse_command_line(words), Console(quiet=True), None)
        run.stop.release()  # a signal ends this script at once
        batches = evenly(run.batches(0), args.warmup_batches + args.steps)
        step_cost.prepare_priors(run, [(0, k) for k in batches])
        arms = measured(run, batches, args.warmup_batches, args.alone)
        pairs = sum(row[2] for row in arms[0].rows)
        print(f"{args.preset} on {args.device}, {args.threads} threads, torch {torch.__version__},"
              f" {run.config.data.data}, seed {run.config.run.seed}: {len(arms[0].rows)} of"
              f" {run.batches(0)} batches, {pairs / len(arms[0].rows):.1f} pairs each")  # fmt: skip
        print(*table(arms), sep="\n")
        print_flops(arms[0])
        if run.runtime.device.type == "cuda":
            print_kernels(arms[0], PROFILED_BATCHES)
        print_shares(arms[0], PROFILED_BATCHES)
        run.close()
    return judged(arms, args.preset == "tiny" and args.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
