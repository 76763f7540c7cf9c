"""Kill a run again and again, resume it, and compare every bit with a run that was never stopped.

    python benchmarks/kill_resume.py [--kills 200] [--seed 0] [--tasks 8] [--processes 1] [--keep DIR]

A small run (two epochs, a checkpoint after each batch) is killed with SIGKILL at random moments and inside every phase:
starting, training, copying, writing, syncing, renaming, rotating, validating, ending an epoch, resuming, backing up,
and bringing a run back whose folder was lost. After each kill the newest whole checkpoint has to be, bit by bit, the
one that the run that was never stopped wrote at that batch; at the end everything has to be equal: tensors, optimizers,
memory, random states, metrics, epochs, best weights. Prints a line per kill, and how many kills fell into each phase.
Exits with 1 at the first difference, and leaves that run's folder where --keep says.
With --processes N torchrun starts N processes. Then a kill hits one of them, and torchrun has to start all anew, or all
of them and torchrun itself, and the next session resumes.
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
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
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
FIRST_ONLY = ("copying", "writing", "syncing", "renaming", "rotating", "backing up", "bringing back")  # of processes
PATIENCE = 300.0  # seconds after which a run counts as hanging
SESSION = "KILL_RESUME"  # environment variable that makes this script a process of a run under torchrun


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


# A run in processes of its own ----------------------------------------------------------------------------------------


class Board:
    """What the processes are doing, in memory that outlives them: how often each entered each phase, how deep it is in.

    path: a file for processes that are not forked. Each process has its page, with its id in front.
    """

    def __init__(self, path: Path | None = None, processes: int = 1, rank: int = 0):
        self.page = 8 + 16 * len(PHASES)
        self.processes, self.rank = processes, rank
        if path is None:
            self.memory = mmap.mmap(-1, self.page * processes)
            return
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.truncate(self.page * processes)
            self.memory = mmap.mmap(file.fileno(), self.page * processes)

    def _place(self, rank: int, phase: str) -> int:
        return rank * self.page + 8 + 16 * PHASES.index(phase)

    def add(self, phase: str, entered: int, inside: int) -> None:
        place = self._place(self.rank, phase)
        old = struct.unpack_from("<qq", self.memory, place)
        struct.pack_into("<qq", self.memory, place, old[0] + entered, old[1] + inside)

    def entered(self, phase: str) -> int:
        """Return how often this process entered a phase."""
        return struct.unpack_from("<qq", self.memory, self._place(self.rank, phase))[0]

    def inside(self) -> list[str]:
        """Return the phases that some thread of this process is in."""
        places = ((phase, self._place(self.rank, phase)) for phase in PHASES)
        return [phase for phase, place in places if struct.unpack_from("<qq", self.memory, place)[1] > 0]

    def sign(self) -> None:
        """Note the id of this process."""
        struct.pack_into("<q", self.memory, self.rank * self.page, os.getpid())

    def signed(self) -> list[int]:
        """Return the id of each process, 0 where it has not signed yet."""
        return [struct.unpack_from("<q", self.memory, rank * self.page)[0] for rank in range(self.processes)]

    def others(self) -> list[int]:
        """Return the ids of the other processes, after waiting until all have signed."""
        while not all(ids := self.signed()):
            time.sleep(0.01)
        return [number for number in ids if number != os.getpid()]


@dataclass(frozen=True)
class Kill:
    """When to kill: `delay` seconds after the `count`-th entry of a phase; which process, and whether all with it."""

    phase: str
    count: int
    delay: float
    rank: int = 0
    everyone: bool = False


def kill_soon(kill: Kill, board: Board) -> None:
    """Kill this process after `delay` seconds, whatever it is doing; with `everyone` torchrun and the others first."""

    def strike() -> None:
        time.sleep(kill.delay)
        if SESSION in os.environ:
            Path("struck.json").write_text(json.dumps(board.inside()))
        if kill.everyone:
            for number in [os.getppid(), *board.others()]:
                os.kill(number, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if kill.delay < 1e-4:
        strike()
    threading.Thread(target=strike, daemon=True).start()


def watch(owner: Any, name: str, phase: str, board: Board, kill: Kill | None) -> None:
    """Note on the board when `owner.name` runs, and start the kill when its time has come."""
    inner = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        board.add(phase, 1, 1)
        if kill is not None and kill.phase == phase and board.entered(phase) == kill.count:
            kill_soon(kill, board)
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


def run_watched(argv: list[str], board: Board, kill: Kill | None) -> int:
    """Return the exit code of the driver, run in this process and watched."""
    for owner, name, phase in WATCHED:
        watch(owner, name, phase, board, kill)
    return driver.main(parse_command_line(argv))


def run_child(folder: Path, argv: list[str], board: Board, kill: Kill | None) -> int:
    """Return how a forked child that runs the driver in `folder` ended: its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            with open("console.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                code = run_watched(argv, board, kill)
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


def run_torchrun(
    folder: Path, argv: list[str], processes: int, kill: Kill | None, records: bool = False
) -> tuple[int, list[str] | None]:
    """Return how torchrun with that many processes ended, and the phases that a kill hit (None: it hit nothing)."""
    for name in ("board", "struck.json"):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--max-restarts", "1", str(Path(__file__).resolve()), *argv]  # fmt: skip
    told = json.dumps({"kill": None if kill is None else vars(kill), "records": records})
    with open(folder / "console.log", "a") as log:
        try:
            ended = subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=os.environ | {SESSION: told},
                                   timeout=PATIENCE).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            for number in filter(None, Board(folder / "board", processes).signed()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            raise RuntimeError(f"the run hangs; see {folder}/console.log") from error
    struck = folder / "struck.json"
    return ended, json.loads(struck.read_text()) if struck.exists() else None


def run_as_one_of_several(argv: list[str]) -> int:
    """Return the exit code of the driver in one of the processes that torchrun started; only the first start is hit."""
    rank, told = int(os.environ["RANK"]), json.loads(os.environ[SESSION])
    board = Board(Path("board"), int(os.environ["WORLD_SIZE"]), rank)
    board.sign()
    kill = Kill(**told["kill"]) if told["kill"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None
    with recorded(Path("seen.jsonl")) if told["records"] else contextlib.nullcontext():
        return run_watched(argv, board, kill if kill and kill.rank == rank else None)


# The reference and the trials -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What a run that was never stopped wrote: a hash of each checkpoint, how often it entered each phase, its end."""

    states: set[tuple[int, str]]
    entered: dict[str, int]
    seconds: dict[str, float]
    result: dict[str, str]


@contextlib.contextmanager
def recorded(seen: Path) -> Iterator[None]:
    """Note the step and the hash of each checkpoint that is written."""
    write = CheckpointStore.write

    def noted(store: CheckpointStore, step: int, payload: dict[str, Any]) -> Path | None:
        with open(seen, "a") as file:
            file.write(json.dumps([step, state_digest(payload)]) + "\n")
        return write(store, step, payload)

    CheckpointStore.write = noted
    try:
        yield
    finally:
        CheckpointStore.write = write


def measure_reference(folder: Path, argv: list[str], processes: int = 1) -> Reference:
    """Return the reference after running it once, all its checkpoints kept."""
    began, seen = time.monotonic(), folder / "seen.jsonl"
    if processes > 1:
        code, _ = run_torchrun(folder, argv, processes, None, records=True)
        board = Board(folder / "board", processes)
    else:
        board = Board()
        with recorded(seen):
            code = run_child(folder, argv, board, None)
    if code:
        raise RuntimeError(f"the reference run failed:\n{(folder / 'console.log').read_text()[-3000:]}")
    states = {(step, found) for step, found in map(json.loads, seen.read_text().splitlines())}
    counts = {phase: board.entered(phase) for phase in PHASES}
    return Reference(states, counts, {"all": time.monotonic() - began}, result_of(folder / "runs" / NAME))


def draw_kill(
    rng: random.Random, reference: Reference, resuming: bool, has_backup: bool, lost: bool, processes: int
) -> Kill:
    """Return a kill for the next session, each phase that it can enter alike likely."""
    phases = [phase for phase in PHASES if phase not in ("resuming", "bringing back", "backing up")]
    phases += ["resuming"] * 2 * resuming + ["backing up"] * 2 * has_backup + ["bringing back"] * 12 * lost
    phase = rng.choice(phases)
    most = 1 if phase in ("starting", "resuming", "bringing back") else max(1, reference.entered[phase] or 8)
    # A resumed run has less before it, so small counts are likelier.
    count = 1 + int(most * rng.random() ** (2 if resuming else 1))
    longest = {"starting": 0.3, "training": 0.05, "validating": 0.3, "ending an epoch": 0.02}.get(phase, 0.01)
    delay = rng.choice((0.0, longest * rng.random()))
    if processes == 1:
        return Kill(phase, min(count, most), delay)
    rank = 0 if phase in FIRST_ONLY else rng.randrange(processes)
    return Kill(phase, min(count, most), delay, rank, everyone=rng.random() < 0.5)


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


def one_trial(
    folder: Path, argv: list[str], rng: random.Random, reference: Reference, most: int, processes: int = 1
) -> list[list[str]]:
    """Return, for each of at most `most` kills of one run, whom and which phases it hit and what was found afterwards.

    Raises: Difference.
    """
    run, backup, kills = folder / "runs" / NAME, folder / "drive", []
    has_backup = rng.random() < 0.5
    found, code = "no checkpoint yet", None

    def session(kill: Kill | None) -> tuple[int, list[str] | None]:
        """Return the exit code of the next session, a new run where nothing is left, and which phases a kill hit."""
        words, board = [*argv, *(["--backup", "drive"] if has_backup else [])], Board()
        if found == "no checkpoint yet":
            shutil.rmtree(folder / "runs", ignore_errors=True)
        else:
            words = ["--resume", *(["--backup", "drive"] if found.startswith("backup") else [])]
        if processes > 1:
            ended, phases = run_torchrun(folder, words, processes, kill)
        else:
            ended = run_child(folder, words, board, kill)
            phases = board.inside() if ended else None
        if ended not in (0, -signal.SIGKILL if kill else 0):
            raise Difference(f"a session ended with exit code {ended}; see {folder}/console.log")
        return ended, phases if phases is None else phases or ["between"]

    for _ in range(rng.randint(1, min(most, 5))):
        kill = draw_kill(rng, reference, found != "no checkpoint yet", has_backup, found.startswith("backup"),
                         processes)  # fmt: skip
        code, phases = session(kill)
        if phases is None:
            break
        whom = "" if processes == 1 else "all processes " if kill.everyone else f"process {kill.rank} "
        if code == 0:
            kills.append([whom, " + ".join(phases), "where torchrun started anew"])
            break
        found = check_after_kill(run, backup if has_backup else folder / "none", reference)
        if has_backup and list_checkpoints(backup / NAME) and rng.random() < 0.5:  # the machine is taken away
            shutil.rmtree(folder / "runs", ignore_errors=True)
            found = check_after_kill(run, backup, reference)
        kills.append([whom, " + ".join(phases), found])
    if code != 0:
        session(None)
    run = find_run(folder / "runs").path  # another one where torchrun started anew before the first checkpoint
    different = [name for name, value in result_of(run).items() if reference.result[name] != value]
    if different:
        raise Difference(f"{', '.join(different)} differ from the run that was never stopped")
    return kills


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", default="", help="folder that gets the run that differs")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    if SESSION in os.environ:
        return run_as_one_of_several(words)
    args = parse(words)
    rng, began, count, trial, hits = random.Random(args.seed), time.monotonic(), 0, 0, collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ["ARC_CACHE_DIR"] = f"{place}/cache"
        tasks = Path(place) / "tasks"
        tasks.mkdir()
        write_folder(small_tasks(args.tasks, 1, 8), tasks)
        argv = [*SMALL, "--data", str(tasks), "--seed", str(args.seed)]
        (Path(place) / "reference").mkdir()
        reference = measure_reference(Path(place) / "reference", argv, args.processes)
        print(f"reference: {len(reference.states)} checkpoints, {reference.seconds['all']:.1f} s with its priors",
              flush=True)  # fmt: skip
        while count < args.kills:
            folder, trial = Path(place) / f"trial{trial}", trial + 1
            folder.mkdir()
            try:
                kills = one_trial(folder, argv, rng, reference, args.kills - count, args.processes)
            except Difference as difference:
                print(f"DIFFERENT after kill {count}, in run {trial}: {difference}", flush=True)
                if args.keep:
                    shutil.copytree(folder, args.keep, dirs_exist_ok=True)
                return 1
            for whom, phases, found in kills:
                count += 1
                hits.update(phases.split(" + "))
                print(f"kill {count:3d}, run {trial}: {whom}while {phases}; resumed from {found}; equal", flush=True)
            shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    print(f"{count} kills in {trial} runs, {minutes:.1f} min: no difference in any checkpoint, metric or file")
    print("kills by phase: " + ", ".join(f"{phase} {hits[phase]}" for phase in (*PHASES, "between")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
