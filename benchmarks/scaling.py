"""Measure how the time of a training step grows: with the side of the grids, planning steps, depth, tasks and memory.

    python benchmarks/scaling.py [--sweeps side steps depth tasks memory] [--rounds 3] [--threads 1] [flags]

Trains on made-up tasks (colours renamed, square grids of one side) with the driver's own step, four pairs to a batch,
and changes one thing at a time: the side; --num-steps; --read-blocks and --plan-blocks together; the number of tasks in
the data set; the entries in the memory before it begins. The settings of a sweep take turns, four steps each, one of
which scores refinements; the time of a setting is the least of its rounds. Prints milliseconds per pair and the
exponent of a power law, fitted to all points and to the last two. On a CPU the time is that of the processor, which
other work disturbs least. The flags are the driver's. Exits with 1 when the time grows with the number of tasks or
entries by more than an exponent of 0.1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
if "--threads" not in sys.argv:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import argparse
import math
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from overfit import write_folder
from throughput import step_once, wait

import trainloop_complete_with_fixes as driver
from arc_data import ArcTask, Pair
from config import parse_command_line
from report import Console
from solver2 import Candidates

SIDE, TASKS = 10, 8
SWEEPS: dict[str, tuple[int, ...]] = {
    "side": (5, 10, 15, 20, 30),
    "steps": (1, 2, 4, 8),
    "depth": (1, 2, 4),
    "tasks": (8, 100, 1000),
    "memory": (16, 256, 4096),
}
FLAT = {"tasks": 0.1, "memory": 0.1}  # largest exponents
STEPS_PER_ROUND = 4


@dataclass
class Setting:
    """One point of a sweep: its value, a run, and the seconds per pair of each round."""

    value: int
    run: driver.Run
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Take the steps of a round."""
        device = self.run.runtime.device
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        wait(device)
        began = clock()
        pairs = sum(step_once(self.run, 0, 0) for _ in range(STEPS_PER_ROUND))
        wait(device)
        self.seconds.append((clock() - began) / pairs)


def made_up_tasks(count: int, side: int) -> list[ArcTask]:
    """Return tasks of four pairs on side x side grids, each of which renames the colours in its own way."""
    rng = np.random.default_rng(0)
    tasks = []
    for number in range(count):
        names = rng.permutation(10).astype(np.uint8)
        grids = [rng.integers(0, 4, (side, side), dtype=np.uint8) for _ in range(4)]
        tasks.append(ArcTask(f"{number:08x}", tuple(Pair(grid, names[grid]) for grid in grids), ()))
    return tasks


def build(folder: Path, data: Path, value: int, flags: list[str]) -> Setting:
    """Return a point of a sweep, its batch's priors computed and its first step taken."""
    words = ["--data", str(data), "--out", tempfile.mkdtemp(dir=folder), "--model", "tiny", "--batch-size", "4", *flags]
    run = driver.build_run(parse_command_line(words), Console(quiet=True), None)
    run.stop.release()  # a signal ends this script at once
    run.system.train()
    step_once(run, 0, 0)
    return Setting(value, run)


def data_of(folder: Path, count: int, side: int) -> Path:
    """Return a folder with so many made-up tasks of that side."""
    path = folder / f"tasks_{count}_{side}"
    if not path.exists():
        path.mkdir()
        write_folder(made_up_tasks(count, side), path)
    return path


def fill_memory(run: driver.Run, entries: int) -> None:
    """Give the memory so many entries of tasks that are not in the data."""
    memory, generator = run.system.memory, torch.Generator().manual_seed(0)
    names = [f"memory{i}" for i in range(entries)]
    ones = torch.ones(entries)
    prompt = torch.randn(entries, memory.prompt_dim, generator=generator)
    memory.admit(Candidates(
        task_ids=names, pair_ids=["train:0"] * entries, size_rules=["same"] * entries,
        features=torch.randn(entries, memory.feature_dim, generator=generator), prompt=prompt, delta=0.1 * prompt,
        color_map=torch.full((entries, 10, 10), 0.1), score=ones, prior_score=0 * ones, exact=ones > 0,
    ))  # fmt: skip


def settings_of(sweep: str, folder: Path, flags: list[str], values: tuple[int, ...]) -> list[Setting]:
    """Return the points of a sweep."""
    settings = []
    for value in values:
        data = data_of(folder, value if sweep == "tasks" else TASKS, value if sweep == "side" else SIDE)
        own = {"steps": ["--num-steps", str(value)],
               "depth": ["--read-blocks", str(value), "--plan-blocks", str(value)]}  # fmt: skip
        settings.append(build(folder, data, value, [*flags, *own.get(sweep, [])]))
        if sweep == "memory":
            fill_memory(settings[-1].run, value)
    return settings


def exponent(values: list[int], seconds: list[float]) -> float:
    """Return the exponent of the power law fitted to seconds against values."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def measured(sweep: str, folder: Path, flags: list[str], rounds: int, values: tuple[int, ...]) -> float:
    """Print what a sweep takes; return the exponent of its last two points, or of all where that is larger."""
    settings = settings_of(sweep, folder, flags, values)
    for _ in range(rounds):
        for setting in settings:
            setting.measure()
    for setting in settings:
        setting.run.close()
    xs, ys = [s.value for s in settings], [min(s.seconds) for s in settings]
    whole, last = exponent(xs, ys), exponent(xs[-2:], ys[-2:])
    spread = max(max(s.seconds) / min(s.seconds) for s in settings)
    points = ", ".join(f"{x}: {1e3 * y:.1f}" for x, y in zip(xs, ys, strict=True))
    print(f"{sweep:7s} ms per pair {points}; exponent {whole:.2f}, of the last two {last:.2f}"
          f" (rounds differ by up to {spread - 1:.0%})", flush=True)  # fmt: skip
    return max(whole, last)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args, flags = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batches of 4 pairs, side {SIDE} and {TASKS} tasks"
          " where they are not varied")  # fmt: skip
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for sweep in args.sweeps:
            found = measured(sweep, Path(folder), flags, args.rounds, SWEEPS[sweep])
            good &= found <= FLAT.get(sweep, math.inf)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
