"""Answer whole tasks with trained weights: load them, vote over views, chunk by chunk, and keep what is done.

    from answering import Solver
    solver = Solver.load("runs/NAME")
    answers = solver.solve(load_tasks("my_task.json"))

May import voting, task_training, evaluate and everything below. Used by verbs. Nothing here reads a test output: tasks
become contexts, which have no field for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arc_data import ArcTask, Augmentation, Context, Grid, leave_one_out, parse_grid, test_contexts
from arc_system import STORES, ARCSystem, Runtime, choose_device, choose_runtime
from config import (
    AnswerConfig,
    ConfigError,
    TrainConfig,
    from_dict,
    one_line,
    parse_json,
    read_regular,
    resolve,
    with_values,
)
from memory_ladder import free_memory, is_out_of_memory
from model_persistence import CheckpointError, load_best_weights
from prior_cache import BuildPlan
from protocols import REMEMBERED, TRAINED, VALIDATED, Fingerprint, pair_hash
from report import write_text_atomic
from task_training import TaskTraining, trained_on_demonstrations
from voting import Ballot, Verdict, agreements, choose_views, collect_ballots, vote

CHUNK = 16  # tasks that are answered together; what is done is kept after each chunk
MAX_PARTIAL = 500_000_000  # bytes of a file of partial results
FALLBACK = np.zeros((2, 2), np.uint8)  # the answer where even the input cannot be copied

Attempts = dict[str, list[list[Grid]]]


# 1. Weights --------------------------------------------------------------------------------------------------------


def find_weights(place: str) -> Path:
    """Return the folder with the model.safetensors that `place` means: see --weights.

    Raises: CheckpointError with exit code 5 when there are none.
    """
    try:
        path = Path(place).expanduser()
        if not path.exists() and (Path("runs") / place).exists():
            path = Path("runs") / place
        for folder in (path.parent if path.name == "model.safetensors" else path, path / "best"):
            if (folder / "model.safetensors").is_file():
                return folder
        found = [run / "best" for run in path.iterdir() if (run / "best" / "model.safetensors").is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        reason = "no such folder" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else error
        raise CheckpointError(f"no weights: {one_line(place, 150)} ({one_line(reason, 100)})",
                              "train first, or name a run's best/ folder with --weights") from error
    if not found:
        raise CheckpointError(f"no weights: no model.safetensors in {place}, its best/ or its runs",
                              "train first, or name a run's best/ folder with --weights")  # fmt: skip
    return max(found, key=lambda folder: ((folder / "model.safetensors").stat().st_mtime_ns, folder.parent.name))


def settings_of(facts: Mapping[str, Any], answers: AnswerConfig) -> TrainConfig:
    """Return the settings that the weights were trained with, and those of answering.

    Raises: CheckpointError when this version does not know them.
    """
    saved = dict(facts.get("config", {}))
    seed = saved.pop("seed", 42)
    try:
        config = from_dict(TrainConfig, saved)
        changes: dict[str, Any] = {
            "run.seed": seed,
            "evaluation.refine": "none" if answers.refine == "train" else answers.refine,
            "agent.answer_confidence": answers.answer_confidence,
            "prompt.offline": answers.offline,
        }
        if answers.refine_samples:
            changes["evaluation.refine_samples"] = answers.refine_samples
        if answers.model:
            changes["prompt.model"] = answers.model
        return resolve(with_values(config, changes), "cpu")  # the cells per batch: the rest is in the file
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the weights were written by another version ({error})",
                              "use the version that trained them") from error


def task_count(facts: Mapping[str, Any]) -> int:
    """Return how many tasks the weights were trained on. Raises: CheckpointError unless that many are named."""
    count, named = facts.get("num_tasks"), facts.get("tasks")
    if not isinstance(named, list) or count != len(named):
        raise CheckpointError("config.json does not name the tasks that the weights were trained on",
                              "give the best/ folder of a run of this version")  # fmt: skip
    return len(named)


def require_fit(system: ARCSystem, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of other names or shapes than the settings make. Raises: CheckpointError naming each."""
    stores = tuple(f"{store}." for store in STORES)
    here = {name: tuple(x.shape) for name, x in system.export_state()[0].items() if not name.startswith(stores)}
    there = {name: tuple(x.shape) for name, x in tensors.items() if not name.startswith(stores)}
    faults = [f"{name} is missing" for name in here if name not in there]
    faults += [f"{name} is unknown" for name in there if name not in here]
    faults += [
        f"{name} is {list(there[name])} in the file, {list(here[name])} by config.json"
        for name in here
        if name in there and here[name] != there[name]
    ]
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"model.safetensors and config.json do not fit: {'; '.join(faults[:4])}{more}",
                              "give the best/ folder of one run, both files of it")  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the weights have seen: the ids of the tasks in the order of their slots, and pairs by what they were seen
    as."""

    task_ids: tuple[str, ...]
    pairs: dict[str, list[Fingerprint]]

    @classmethod
    def of(cls, facts: Mapping[str, Any], memory: Sequence[tuple[str, str]]) -> Seen:
        """Return it from the facts beside the weights; `memory` are the (task, pair) ids of its entries.

        Raises: CheckpointError when the facts do not say it.
        """
        try:
            pairs = {
                kind: [
                    Fingerprint(str(task), str(pair), str(exact), str(canonical))
                    for task, found in facts["seen"][kind].items()
                    for pair, (exact, canonical) in found.items()
                ]
                for kind in (TRAINED, VALIDATED)
            }
            task_ids = tuple(str(name) for name in facts["tasks"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("config.json does not say which pairs the weights have seen",
                                  "give the best/ folder of a run of this version") from error
        remembered = set(memory)
        pairs[REMEMBERED] = [f for f in pairs[TRAINED] if (f.task_id, f.pair_id) in remembered]
        return cls(task_ids, pairs)

    def slots(self, tasks: Sequence[ArcTask]) -> dict[str, int]:
        """Return the slot of each task that was trained on: one of that id, of which a demonstration was."""
        trained: dict[str, set[str]] = {}
        for pair in self.pairs[TRAINED]:
            trained.setdefault(pair.task_id, set()).add(pair.exact)
        place = {task_id: slot for slot, task_id in enumerate(self.task_ids)}
        return {
            task.id: place[task.id]
            for task in tasks
            if task.id in place and any(pair_hash(pair) in trained.get(task.id, ()) for pair in task.train)
        }


# 2. The solver -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """Two different attempts at one test input, best first, and how likely each is held to be."""

    attempts: tuple[Grid, Grid]
    probabilities: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        grids = {f"attempt_{n + 1}": grid.tolist() for n, grid in enumerate(self.attempts)}
        return {**grids, "probabilities": [round(p, 6) for p in self.probabilities]}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Solved:
        """Return what `to_json` wrote. Raises: DataError, KeyError, TypeError or ValueError when it is none."""
        first, second = (parse_grid(value[f"attempt_{n}"], where, f"attempt_{n}") for n in (1, 2))
        p, q = (float(p) for p in value["probabilities"])
        return cls((first, second), (p, q))


@dataclass(frozen=True)
class Trust:
    """How well a task's own demonstrations are predicted from one another: exact of `of`, and the mean share of right
    cells. `of` is 0 where there is one demonstration only."""

    exact: int
    of: int
    cells: float


@dataclass
class Progress:
    """Whom to tell about the work: `tick` gets the number of views planned, `stopping` ends the work after a chunk,
    `note` gets a line, `failed` the id of a task that could not be answered, and why."""

    tick: Callable[[int], object] = lambda done: None
    stopping: Callable[[], bool] = lambda: False
    warn: Callable[[str], object] = lambda text: None
    failed: Callable[[str, str], object] = lambda task_id, reason: None


class Solver:
    """Trained weights that answer tasks. `seen` says what they were trained on."""

    def __init__(self, system: ARCSystem, runtime: Runtime, answers: AnswerConfig, seen: Seen, folder: Path,
                 facts: Mapping[str, Any], digest: str):  # fmt: skip
        self.system, self.runtime, self.answers, self.seen = system, runtime, answers, seen
        self.folder, self.facts, self.digest = folder, facts, digest
        gpu = runtime.device.type != "cpu"
        self.views = choose_views(answers.views or (16 if gpu else 8), system.config.run.seed)
        self.batch_cells = answers.batch_cells or 2 * system.config.data.batch_cells

    @classmethod
    def load(
        cls, weights: str | Path = "", answers: AnswerConfig | None = None, warn: Callable[[str], None] = print
    ) -> Solver:
        """Return the solver with the weights that `weights` (or answers.weights) means.

        Raises: CheckpointError without usable weights; ModelError without the language model; DeviceError.
        """
        answers = answers or AnswerConfig()
        folder = find_weights(str(weights) or answers.weights)
        tensors, facts = load_best_weights(folder)
        config = settings_of(facts, answers)
        device = choose_device(answers.device)
        runtime = choose_runtime(device, answers.precision)
        with contextlib.redirect_stdout(sys.stderr):  # what loading a model says; stdout may be for JSON alone
            system = ARCSystem(config, task_count(facts))
        require_fit(system, tensors)
        try:
            system.import_state(tensors, facts)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 150)
            raise CheckpointError(f"the weights in {folder} cannot be used ({reason})",
                                  "give the best/ folder of a run") from error
        system.to(device).eval()
        system.prior.open_disk(answers.cache_dir, warn)
        seen = Seen.of(facts, [*system.memory.owners(), *system.lessons.owners()])
        return cls(system, runtime, answers, seen, folder, facts, digest_of(folder))

    def close(self) -> None:
        """Write what the priors' file still waits for."""
        self.system.prior.close()

    def contexts(self, tasks: Sequence[ArcTask]) -> list[Context]:
        """Return one context for each test input; tasks that were trained on have their slots."""
        return [context for context, _ in test_contexts(tasks, self.seen.slots(tasks))]

    def plan_priors(self, tasks: Sequence[ArcTask], with_trust: bool = False) -> BuildPlan:
        """Return what has to be computed of the demonstrations' priors before `solve`."""
        contexts = self.contexts(tasks)
        requests: list[tuple[Context, tuple[int, int] | None]] = [(context, None) for context in contexts]
        if with_trust or self.answers.refine in ("search", "train"):
            requests += [(context, answer.shape) for context, answer in leave_one_out(contexts)[0]]
        if with_trust:
            requests += [(context, None) for context, _ in leave_one_out(contexts)[0]]
        return self.system.prior.plan(requests)

    def solve(
        self, tasks: Sequence[ArcTask], progress: Progress | None = None, partial: Partial | None = None
    ) -> dict[str, list[Solved]]:
        """Return the answers of each task, one per test input; of fewer tasks when `stopping` ended the work.

        A task that fails gets a fallback answer and is told to `failed`. Answers that `partial` holds are not computed
        again; the chunks are the same in every call, so an interrupted call and its continuation answer as one would.
        """
        progress = progress or Progress()
        found: dict[str, list[Solved]] = dict(partial.answers) if partial else {}
        for chunk in self.chunks(tasks):
            if all(task.id in found for task in chunk):
                progress.tick(self.work(chunk))
                continue
            if progress.stopping():
                break
            answers, failures = self._solve_safely(chunk, progress)
            found |= answers
            if partial is not None:
                partial.add(answers, failures)
        for task_id, reason in (partial.failures if partial else {}).items():
            progress.failed(task_id, reason)
        return found

    def chunks(self, tasks: Sequence[ArcTask]) -> list[Sequence[ArcTask]]:
        """Return the tasks in the parts that are answered together."""
        return [tasks[i : i + CHUNK] for i in range(0, len(tasks), CHUNK)]

    def work(self, tasks: Sequence[ArcTask]) -> int:
        """Return how many views are planned for tasks."""
        return len(self.views) * sum(len(task.test) for task in tasks)

    def trust(self, task: ArcTask) -> Trust:
        """Return how well the demonstrations of a task are predicted from one another, in one view."""
        items, _ = leave_one_out(self.contexts([task])[:1])
        if not items:
            return Trust(0, 0, float("nan"))
        ballots = self._ballots([context for context, _ in items], choose_views(1, 0), Progress())
        grids = [self._decide(context, ballot)[0].grid for (context, _), ballot in zip(items, ballots, strict=True)]
        right = [np.array_equal(grid, answer) for grid, (_, answer) in zip(grids, items, strict=True)]
        cells = [
            float((grid == answer).mean()) if grid.shape == answer.shape else 0.0
            for grid, (_, answer) in zip(grids, items, strict=True)
        ]
        return Trust(sum(right), len(right), sum(cells) / len(cells))

    def _solve_safely(
        self, tasks: Sequence[ArcTask], progress: Progress
    ) -> tuple[dict[str, list[Solved]], dict[str, str]]:
        """Return the answers of a chunk, and the reasons of the tasks that got a fallback answer.

        When the chunk fails its tasks are answered one by one, so that one of them cannot spoil the others.
        """
        try:
            return self._solve(tasks, progress), {}
        except Exception as error:  # whatever a task does to us, the others are answered
            if len(tasks) == 1:
                reason = one_line(f"{type(error).__name__}: {error}", 200)
                return {tasks[0].id: self._fallback(tasks[0])}, {tasks[0].id: reason}
        answers: dict[str, list[Solved]] = {}
        failures: dict[str, str] = {}
        for task in tasks:
            found, failed = self._solve_safely([task], progress)
            answers, failures = answers | found, failures | failed
        return answers, failures

    def _solve(self, tasks: Sequence[ArcTask], progress: Progress) -> dict[str, list[Solved]]:
        """Return the answers of a chunk."""
        contexts = self.contexts(tasks)
        with self._fitted(contexts, progress) as fitted:
            ballots = self._ballots(fitted, self.views, progress)
        found: dict[str, list[Solved]] = {task.id: [] for task in tasks}
        for context, ballot in zip(contexts, ballots, strict=True):
            first, second = self._decide(context, ballot)[:2]
            solved = Solved((first.grid, second.grid), (first.probability, second.probability))
            found[context.task_id].append(solved)
        return found

    def _fitted(
        self, contexts: Sequence[Context], progress: Progress
    ) -> contextlib.AbstractContextManager[Sequence[Context]]:
        """Return a block in which the weights are fitted to the demonstrations under --refine train."""
        if self.answers.refine != "train":
            return contextlib.nullcontext(contexts)
        training = TaskTraining(steps=self.answers.refine_steps, weights=self.answers.refine_weights,
                                batch_cells=self.batch_cells, seed=self.system.config.run.seed)  # fmt: skip
        return trained_on_demonstrations(self.system, self.runtime, contexts, training)

    def _decide(self, context: Context, ballot: Ballot) -> list[Verdict]:
        return vote(ballot, lambda grids: agreements(self.system, self.runtime, context, grids))

    def _ballots(
        self, contexts: Sequence[Context], views: Sequence[Augmentation], progress: Progress
    ) -> list[Ballot]:
        """Return the ballots; while the memory does not suffice, begin anew with half the cells per batch."""
        while True:
            ticked = 0

            def tick(done: int) -> None:
                nonlocal ticked
                ticked += done
                progress.tick(done)

            try:
                return collect_ballots(self.system, self.runtime, contexts, views, self.batch_cells, tick)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.batch_cells <= 2:
                    raise
            progress.tick(-ticked)
            free_memory(self.runtime.device)
            self.batch_cells //= 2
            progress.warn(f"out of memory; going on with batches of {self.batch_cells} cells")

    def _fallback(self, task: ArcTask) -> list[Solved]:
        """Return an answer for each test input without the model: the input, and an empty grid."""
        return [fallback(pair.input) for pair in task.test]


def fallback(grid: Grid | None) -> Solved:
    """Return the answer where nothing better can be had: the input, if there is one, and an empty grid."""
    other = FALLBACK if grid is None or not np.array_equal(grid, FALLBACK) else FALLBACK[:1]
    return Solved((FALLBACK[:1] if grid is None else grid, other), (0.0, 0.0))


def attempts_of(answers: Mapping[str, Sequence[Solved]]) -> Attempts:
    """Return the attempts alone, as scores and submissions take them."""
    return {task_id: [list(solved.attempts) for solved in found] for task_id, found in answers.items()}


def digest_of(folder: Path) -> str:
    """Return a hex digest of the two files of the weights."""
    state = blake2b(digest_size=16)
    for name in ("model.safetensors", "config.json"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
    return state.hexdigest()


# 3. What is done is kept -------------------------------------------------------------------------------------------


class Partial:
    """Answers that a command has found so far, in a file of lines: a key, then one line for each chunk.

    `key` says what the answers are of: with another key the file is begun anew. A last line that was cut is dropped.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.answers: dict[str, list[Solved]] = {}
        self.failures: dict[str, str] = {}
        try:
            *lines, cut = read_regular(path, MAX_PARTIAL).split(b"\n")
            if lines and parse_json(lines[0]) == {"key": key}:
                for line in lines[1:]:
                    self._take(parse_json(line))
                if cut:
                    write_text_atomic(path, b"\n".join([*lines, b""]).decode())
                return
        except FileNotFoundError:
            pass
        except (OSError, LookupError, TypeError, ValueError):
            self.answers, self.failures = {}, {}
        write_text_atomic(path, json.dumps({"key": key}) + "\n")

    def add(self, answers: Mapping[str, Sequence[Solved]], failures: Mapping[str, str]) -> None:
        """Keep the answers of a chunk, on the disk when this returns."""
        value = {"answers": {k: [x.to_json() for x in v] for k, v in answers.items()}, "failures": dict(failures)}
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(json.dumps(value, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(value)

    def _take(self, value: dict[str, Any]) -> None:
        for task_id, found in value["answers"].items():
            self.answers[task_id] = [Solved.from_json(item, str(self.path)) for item in found]
        self.failures |= {str(task_id): str(reason) for task_id, reason in value["failures"].items()}
