"""Train for hours and see that nothing grows: memory, files, open files, threads, time per batch.

    python benchmarks/soak.py [--batches 2000] [--save-every 10] [--side 10] [--backup] [flags of the driver]

Runs the driver's own loop on real tasks, and looks every `--save-every` batches at the resident memory (and on a GPU at
what is allocated), at the files of the run folder, at the open files and threads of the process, and at the seconds per
batch. The first quarter is the warm-up: caches fill, the memory bank grows. Over the rest a line is fitted to each.
Exits with 1 when the resident memory grows by more than 5 %, the files, open files or threads by more than one, or the
time per batch by more than 25 %.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import threading
import time

import numpy as np
import torch
from overfit import small_tasks, write_folder

import trainloop_complete_with_fixes as driver
from config import parse_command_line
from report import Console

LIMITS = {"resident MB": 0.05, "allocated MB": 0.05, "seconds per batch": 0.25}  # relative
COUNTS = ("files", "open files", "threads")  # may differ by one: a save may just be under way


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def look(run: driver.Run, seconds: float) -> dict[str, float]:
    """Return what might grow."""
    on_gpu = run.runtime.device.type == "cuda"
    return {
        "resident MB": resident_bytes() / 2**20,
        "allocated MB": torch.cuda.memory_allocated() / 2**20 if on_gpu else 0.0,
        "files": sum(1 for path in run.folder.path.rglob("*") if path.is_file() and not path.name.startswith(".tmp")),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "seconds per batch": seconds,
    }


def growth(values: list[float]) -> tuple[float, float, float]:
    """Return (start, end) of the line fitted to the last three quarters of the values, and end / start - 1."""
    rest = np.array(values[len(values) // 4 :])
    slope, start = np.polyfit(np.arange(len(rest)), rest, 1)
    end = start + slope * (len(rest) - 1)
    return float(start), float(end), float(end / start - 1) if start else 0.0


def soak(run: driver.Run, batches: int) -> list[dict[str, float]]:
    """Return what was seen after each save, from training for so many batches with the driver's own loop."""
    seen: list[dict[str, float]] = []
    every, last = run.config.run.save_every, [time.monotonic(), 0]
    learn = driver.learn_from

    def learn_and_look(system, query, answer, result, step):
        admitted = learn(system, query, answer, result, step)
        if (step + 1) % every == 0:
            now = time.monotonic()
            seen.append(look(run, (now - last[0]) / (step + 1 - last[1])))
            last[:] = [now, step + 1]
            print(f"batch {step + 1}: " + ", ".join(f"{k} {v:.3g}" for k, v in seen[-1].items() if v), flush=True)
        if step + 1 >= batches:
            run.stop.signal = 15  # as if the session were over
        return admitted

    driver.learn_from = learn_and_look
    driver.train(run)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--side", type=int, default=10, help="longest side of the tasks' demonstrations")
    parser.add_argument("--backup", action="store_true", help="keep a backup as well")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        tasks = Path(place) / "tasks"
        tasks.mkdir()
        write_folder(small_tasks(0, 1, args.side), tasks)
        words = ["--data", str(tasks), "--out", f"{place}/runs", "--save-every", str(args.save_every), "--epochs",
                 "1000000", "--eval-every", "1000000", "--save-share", "0", "--fresh",
                 *(["--backup", f"{place}/drive"] if args.backup else []), *flags]  # fmt: skip
        run = driver.build_run(parse_command_line(words), Console(quiet=True), None)
        print(f"{run.batches(0)} batches per epoch, {run.runtime.device}, torch {torch.__version__}")
        driver.prepare_priors(run)
        began = time.monotonic()
        seen = soak(run, args.batches)
        run.close()
    print(f"{args.batches} batches with {len(seen)} saves in {(time.monotonic() - began) / 60:.1f} min")
    good = True
    for name in seen[0]:
        start, end, share = growth([row[name] for row in seen])
        is_flat = abs(end - start) <= 1 if name in COUNTS else share <= LIMITS[name]
        good &= is_flat
        print(f"{name:18s} {start:10.3f} -> {end:10.3f}  ({share:+.1%})  {'flat' if is_flat else 'GROWS'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
