"""Kill a run again and again, resume it, and compare every bit with a run that was never stopped.

    python benchmarks/kill_resume.py [--kills 200] [--seed 0] [--tasks 8] [--keep DIR]

A small run (two epochs, a checkpoint after each batch) is killed with SIGKILL at random moments and inside every phase:
starting, training, copying, writing, syncing, renaming, rotating, validating, ending an epoch, resuming, backing up,
and bringing a run back whose folder was lost. After each kill the newest whole checkpoint has to be, bit by bit, the
one that the run that was never stopped wrote at that batch; at the end everything has to be equal: tensors, optimizers,
memory, random states, metrics, epochs, best weights. Prints a line per kill, and how many kills fell into each phase.
Exits with 1 at the first difference, and leaves that run's folder where --keep says.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before numpy: equal bits need the same number of threads

import argparse
import collections
import contextlib
import hashlib
import json
import mmap
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from overfit import small_tasks, write_folder
from torch import Tensor

import run_backup
import trainloop_complete_with_fixes as driver
from config import parse_command_line
from model_persistence import (
    CheckpointError,
    CheckpointStore,
    Saver,
    find_run,
    list_checkpoints,
    read_checkpoint,
)
from report import read_epochs, read_metrics

NAME = "run"
SMALL = ("--model", "tiny", "--preset", "tiny", "--width", "16", "--read-blocks", "1", "--num-steps", "2",
         "--prompt-dim", "16", "--batch-size", "4", "--device", "cpu", "--epochs", "2", "--rl-every", "2",
         "--log-every", "2", "--save-every", "1", "--save-share", "0", "--keep", "2", "--refine", "mean",
         "--name", NAME)  # fmt: skip
PHASES = ("starting", "training", "copying", "writing", "syncing", "renaming", "rotating", "validating",
          "ending an epoch", "resuming", "backing up", "bringing back")  # fmt: skip
PATIENCE = 300.0  # seconds after which a run counts as hanging


# What has to be equal -------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a hash of nested plain data and tensors, in which every bit counts."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode())
            found.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                         if item.numel() else b"")  # fmt: skip
        elif isinstance(item, dict):
            found.update(f"dict{len(item)}".encode())
            for key, part in item.items():
                add(key)
                add(part)
        elif isinstance(item, (list, tuple)):
            found.update(f"{type(item).__name__}{len(item)}".encode())
            for part in item:
                add(part)
        else:
            found.update(struct.pack("<d", item) if isinstance(item, float) else repr(item).encode())

    add(value)
    return found.hexdigest()[:16]


def state_of(payload: dict[str, Any]) -> dict[str, Any]:
    """Return all of a checkpoint that training depends on; without times and without where the run lies."""
    loop = {name: value for name, value in payload["loop"].items() if not name.endswith("_seconds")}
    return {**{k: v for k, v in payload.items() if k not in ("metrics_offset", "config")}, "loop": loop}


def state_digest(payload: dict[str, Any]) -> str:
    """Return the hash of `state_of`."""
    return digest(state_of(payload))


def result_of(run: Path) -> dict[str, str]:
    """Return a hash of each thing that a finished run leaves."""
    final = read_checkpoint(list_checkpoints(run)[0])
    records = [{k: v for k, v in r.items() if k not in ("t", "val_seconds", "flag")} for r in
               read_metrics(run / "metrics.jsonl") if r["event"] != "flag"]  # fmt: skip
    epochs = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in read_epochs(run / "epochs.csv")]
    status = json.loads((run / "run.json").read_text())
    return {
        "last checkpoint": state_digest(final.payload),
        "best_delta.pt": state_digest(read_checkpoint(run / "checkpoints" / "best_delta.pt").payload),
        "metrics.jsonl": digest(records),
        "epochs.csv": digest(epochs),
        "predictions": digest([(p.name, p.read_bytes()) for p in sorted((run / "predictions").glob("*.jsonl"))]),
        "best weights": digest([(run / "best" / name).read_bytes() for name in ("model.safetensors", "config.json")]),
        "run.json": digest({name: status.get(name) for name in ("status", "epoch", "batch", "step", "best")}),
    }


# A run in a process of its own ----------------------------------------------------------------------------------------


class Board:
    """What a child is doing, in memory that outlives it: how often each phase was entered, and how deep it is in it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16 * len(PHASES))

    def add(self, phase: str, entered: int, inside: int) -> None:
        place = 16 * PHASES.index(phase)
        old = struct.unpack_from("<qq", self.memory, place)
        struct.pack_into("<qq", self.memory, place, old[0] + entered, old[1] + inside)

    def entered(self, phase: str) -> int:
        return struct.unpack_from("<qq", self.memory, 16 * PHASES.index(phase))[0]

    def inside(self) -> list[str]:
        """Return the phases that some thread is in."""
        return [phase for i, phase in enumerate(PHASES) if struct.unpack_from("<qq", self.memory, 16 * i)[1] > 0]


@dataclass(frozen=True)
class Kill:
    """When to kill: `delay` seconds after the `count`-th entry of a phase."""

    phase: str
    count: int
    delay: float


def kill_soon(delay: float) -> None:
    """Kill this process after `delay` seconds, whatever it is doing."""

    def strike() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    if delay < 1e-4:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=strike, daemon=True).start()


def watch(owner: Any, name: str, phase: str, board: Board, kill: Kill | None) -> None:
    """Note on the board when `owner.name` runs, and start the kill when its time has come."""
    inner = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        board.add(phase, 1, 1)
        if kill is not None and kill.phase == phase and board.entered(phase) == kill.count:
            kill_soon(kill.delay)
        try:
            return inner(*arguments, **options)
        finally:
            board.add(phase, 0, -1)

    setattr(owner, name, watched)


WATCHED = (
    (driver, "build_run", "starting"), (driver, "train_step", "training"), (Saver, "save", "copying"),
    (Saver, "_write", "writing"), (CheckpointStore, "_prune", "rotating"), (driver, "run_validation", "validating"),
    (driver, "finish_epoch", "ending an epoch"), (driver, "resume_from_checkpoint", "resuming"),
    (run_backup.Backup, "_copy_all", "backing up"), (driver, "bring_back", "bringing back"),
    (os, "fsync", "syncing"), (os, "replace", "renaming"),
)  # fmt: skip


def run_child(folder: Path, argv: list[str], board: Board, kill: Kill | None) -> int:
    """Return how a forked child that runs the driver in `folder` ended: its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            with open("console.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                for owner, name, phase in WATCHED:
                    watch(owner, name, phase, board, kill)
                code = driver.main(parse_command_line(argv))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + PATIENCE
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise RuntimeError(f"the run hangs; see {folder}/console.log")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


# The reference and the trials -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What a run that was never stopped wrote: a hash of each checkpoint, how often it entered each phase, its end."""

    states: set[tuple[int, str]]
    entered: dict[str, int]
    seconds: dict[str, float]
    result: dict[str, str]


def measure_reference(folder: Path, argv: list[str]) -> Reference:
    """Return the reference after running it once, all its checkpoints kept."""
    board, began = Board(), time.monotonic()
    seen = folder / "seen.jsonl"
    write = CheckpointStore.write

    def recorded(store: CheckpointStore, step: int, payload: dict[str, Any]) -> Path | None:
        with open(seen, "a") as file:
            file.write(json.dumps([step, state_digest(payload)]) + "\n")
        return write(store, step, payload)

    CheckpointStore.write = recorded
    try:
        code = run_child(folder, argv, board, None)
    finally:
        CheckpointStore.write = write
    if code:
        raise RuntimeError(f"the reference run failed:\n{(folder / 'console.log').read_text()[-3000:]}")
    states = {(step, found) for step, found in map(json.loads, seen.read_text().splitlines())}
    counts = {phase: board.entered(phase) for phase in PHASES}
    return Reference(states, counts, {"all": time.monotonic() - began}, result_of(folder / "runs" / NAME))


def draw_kill(rng: random.Random, reference: Reference, resuming: bool, has_backup: bool, lost: bool) -> Kill:
    """Return a kill for the next session, each phase that it can enter alike likely."""
    phases = [phase for phase in PHASES if phase not in ("resuming", "bringing back", "backing up")]
    phases += ["resuming"] * 2 * resuming + ["backing up"] * 2 * has_backup + ["bringing back"] * 12 * lost
    phase = rng.choice(phases)
    most = 1 if phase in ("starting", "resuming", "bringing back") else max(1, reference.entered[phase] or 8)
    # A resumed run has less before it, so small counts are likelier.
    count = 1 + int(most * rng.random() ** (2 if resuming else 1))
    longest = {"starting": 0.3, "training": 0.05, "validating": 0.3, "ending an epoch": 0.02}.get(phase, 0.01)
    return Kill(phase, min(count, most), rng.choice((0.0, longest * rng.random())))


class Difference(AssertionError):
    """A resumed run is not the run that was never stopped."""


def check_after_kill(run: Path, backup: Path, reference: Reference) -> str:
    """Return which checkpoint a resume will find. Raises: Difference when it is not one of the reference's."""
    try:
        choice = find_run(run.parent, "latest", backup)
    except CheckpointError:
        return "no checkpoint yet"
    checkpoint = read_checkpoint(choice.checkpoint)
    if (checkpoint.step, state_digest(checkpoint.payload)) not in reference.states:
        raise Difference(f"{choice.checkpoint} is not what the run that was never stopped wrote at step {choice.step}")
    return f"{'backup ' if choice.is_backup else ''}step {checkpoint.step}"


def one_trial(folder: Path, argv: list[str], rng: random.Random, reference: Reference, most: int) -> list[list[str]]:
    """Return, for each of at most `most` kills of one run, the phases it hit and what was found afterwards.

    Raises: Difference.
    """
    run, backup, kills = folder / "runs" / NAME, folder / "drive", []
    has_backup = rng.random() < 0.5
    found, code = "no checkpoint yet", None

    def session(kill: Kill | None) -> tuple[int, list[str]]:
        """Return the exit code of the next session, and in which phases it was: a new run where nothing is left."""
        words, board = [*argv, *(["--backup", "drive"] if has_backup else [])], Board()
        if found == "no checkpoint yet":
            shutil.rmtree(folder / "runs", ignore_errors=True)
        else:
            words = ["--resume", *(["--backup", "drive"] if found.startswith("backup") else [])]
        ended = run_child(folder, words, board, kill)
        if ended not in (0, -signal.SIGKILL if kill else 0):
            raise Difference(f"a session ended with exit code {ended}; see {folder}/console.log")
        return ended, board.inside() or ["between"]

    for _ in range(rng.randint(1, min(most, 5))):
        kill = draw_kill(rng, reference, found != "no checkpoint yet", has_backup, found.startswith("backup"))
        code, phases = session(kill)
        if code == 0:
            break
        found = check_after_kill(run, backup if has_backup else folder / "none", reference)
        if has_backup and list_checkpoints(backup / NAME) and rng.random() < 0.5:  # the machine is taken away
            shutil.rmtree(folder / "runs", ignore_errors=True)
            found = check_after_kill(run, backup, reference)
        kills.append([" + ".join(phases), found])
    if code != 0:
        session(None)
    different = [name for name, value in result_of(run).items() if reference.result[name] != value]
    if different:
        raise Difference(f"{', '.join(different)} differ from the run that was never stopped")
    return kills


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--keep", default="", help="folder that gets the run that differs")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    torch.set_num_threads(1)
    rng, began, count, trial, hits = random.Random(args.seed), time.monotonic(), 0, 0, collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ["ARC_CACHE_DIR"] = f"{place}/cache"
        tasks = Path(place) / "tasks"
        tasks.mkdir()
        write_folder(small_tasks(args.tasks, 1, 8), tasks)
        argv = [*SMALL, "--data", str(tasks), "--seed", str(args.seed)]
        (Path(place) / "reference").mkdir()
        reference = measure_reference(Path(place) / "reference", argv)
        print(f"reference: {len(reference.states)} checkpoints, {reference.seconds['all']:.1f} s with its priors",
              flush=True)  # fmt: skip
        while count < args.kills:
            folder, trial = Path(place) / f"trial{trial}", trial + 1
            folder.mkdir()
            try:
                kills = one_trial(folder, argv, rng, reference, args.kills - count)
            except Difference as difference:
                print(f"DIFFERENT after kill {count}, in run {trial}: {difference}", flush=True)
                if args.keep:
                    shutil.copytree(folder, args.keep, dirs_exist_ok=True)
                return 1
            for phases, found in kills:
                count += 1
                hits.update(phases.split(" + "))
                print(f"kill {count:3d}, run {trial}: while {phases}; resumed from {found}; equal", flush=True)
            shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    print(f"{count} kills in {trial} runs, {minutes:.1f} min: no difference in any checkpoint, metric or file")
    print("kills by phase: " + ", ".join(f"{phase} {hits[phase]}" for phase in (*PHASES, "between")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
