"""Keep a copy of a run in a second folder, such as a mounted Google Drive, and bring a run back from it.

A backup is never the end or a stall of training: it is made on a thread of its own, each file verified by reading it
again, and whatever goes wrong is a warning and a later retry. Imports config and model_persistence. Used by the driver.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from config import open_regular
from model_persistence import (
    BACKUP_MARKER,
    BEST_DELTA,
    CHECKPOINTS,
    CheckpointError,
    RunChoice,
    RunLock,
    list_checkpoints,
    remove_leftovers,
    run_id_of,
    step_of,
    sync_folder,
)
from report import PREDICTIONS

KEPT = 2  # checkpoints in a backup
RETRY_SECONDS = 60.0
HANGING_SECONDS = 300.0
CHUNK = 2**22
# In this order: best weights and logs before the checkpoint that they are at least as new as.
SMALL_FILES = ("config.json", "env.json", "run.log", "metrics.jsonl", "epochs.csv", "trackers.json", "run.json")
PAGES = ("report.html", "curves.png")
BEST_FILES = ("best/model.safetensors", "best/config.json", f"{CHECKPOINTS}/{BEST_DELTA}")


class Backup:
    """The copy of a run under `target`/NAME, made by one thread; a newer checkpoint replaces one that still waits.

    `say` receives whole lines; each reason for a failure is said once, until a copy succeeds again.
    """

    def __init__(self, run_dir: Path | str, target: Path | str, run_id: str, say: Callable[[str], None], *,
                 retry_seconds: float = RETRY_SECONDS, clock: Callable[[], float] = time.monotonic):
        self.run_dir, self.run_id = Path(run_dir), run_id
        self.folder = Path(target) / self.run_dir.name
        self.step = -1  # of the newest checkpoint that is in the backup
        self._say, self._retry, self._clock = say, retry_seconds, clock
        self._wake = threading.Condition()
        self._wanted = self._closing = False
        self._busy_since: float | None = None
        self._reason = ""
        self._is_hanging_said = False
        self._copied: dict[str, tuple[int, int, int]] = {}
        self._thread: threading.Thread | None = None

    def offer(self) -> None:
        """Ask for a copy of what the run folder holds now; returns at once."""
        with self._wake:
            self._wanted = True
            self._wake.notify()
        if self._thread is None:
            # A daemon, because a hanging network folder must not keep the process alive.
            self._thread = threading.Thread(target=self._serve, name="backup", daemon=True)
            self._thread.start()
        busy = self._busy_since
        if busy is not None and self._clock() - busy > HANGING_SECONDS and not self._is_hanging_said:
            self._is_hanging_said = True
            self._say(f"warning: backup to {self.folder} has not answered for {self._clock() - busy:.0f} s; "
                      "training goes on, will retry")

    def close(self, patience: float = 60.0) -> bool:
        """Return whether everything offered is in the backup; waits at most `patience` seconds, and says if not."""
        if self._thread is None:
            return True
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)
        is_done = not self._thread.is_alive() and not self._wanted
        if self._thread.is_alive():
            self._say(f"warning: backup to {self.folder} is not complete; the run itself is in {self.run_dir}")
        self._thread = None
        return is_done

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._wanted:
                    if self._closing:
                        return
                    self._wake.wait()
                self._wanted, self._busy_since = False, self._clock()
            is_copied = self._try()
            with self._wake:
                self._busy_since = None
                if is_copied:
                    continue
                self._wanted = True
                if self._closing:
                    return
                deadline = self._clock() + self._retry
                while not self._closing and (left := deadline - self._clock()) > 0:
                    self._wake.wait(left)

    def _try(self) -> bool:
        """Return whether the backup is as new as the run folder; a failure is said once."""
        try:
            self._copy_all()
        except OSError as error:
            reason = str(error.strerror or error)
            if reason != self._reason:
                number = f"[Errno {error.errno}] " if error.errno else ""
                self._say(f"warning: backup to {self.folder} failed ({number}{reason}); training goes on, will retry. "
                          f"Local copy: {self.run_dir}")
            self._reason = reason
            return False
        if self._reason or self._is_hanging_said:
            self._say(f"note: backup to {self.folder} works again")
        self._reason, self._is_hanging_said = "", False
        return True

    def _copy_all(self) -> None:
        """Copy what has changed. Raises: OSError, and what was copied before stays good."""
        for folder in (self.folder / CHECKPOINTS, self.folder / "best", self.folder / PREDICTIONS):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        remove_leftovers(self.folder)
        if not (self.folder / BACKUP_MARKER).is_file():
            marker = json.dumps({"run_id": self.run_id}) + "\n"
            (self.folder / BACKUP_MARKER).write_text(marker, encoding="utf-8")
        # The newest checkpoint is chosen first: logs copied after that reach at least as far as it does.
        newest = next(iter(list_checkpoints(self.run_dir)), None)
        predictions = prediction_files(self.run_dir)
        for name in (*BEST_FILES, *predictions, *PAGES, *SMALL_FILES):
            self._copy(name)
        for name in set(prediction_files(self.folder)) - set(predictions):  # of an attempt that was given up
            (self.folder / name).unlink(missing_ok=True)
        if newest is not None and self._copy(f"{CHECKPOINTS}/{newest.name}"):
            self.step = step_of(newest)
            self._forget_others(self.step)

    def _copy(self, name: str) -> bool:
        """Return whether the backup holds the file as it is now; False when the run has it no more."""
        source, target = self.run_dir / name, self.folder / name
        try:
            stat = source.stat()
            identity = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if self._copied.get(name) != identity or not target.exists():
                copy_verified(source, target)
        except FileNotFoundError:
            if source.exists():
                raise
            return False
        self._copied[name] = identity
        return True

    def _forget_others(self, step: int) -> None:
        """Delete the backup's checkpoints but the newest KEPT up to `step`; later ones belong to an abandoned attempt.

        A file is emptied first, because a deleted one stays in a Drive's bin and counts there.
        """
        found = list_checkpoints(self.folder)
        upto = [path for path in found if step_of(path) <= step]
        for path in [path for path in found if path not in upto[:KEPT]]:
            os.truncate(path, 0)
            path.unlink(missing_ok=True)


def prediction_files(run_dir: Path) -> list[str]:
    """Return the names of what validations have left in a run folder, relative to it."""
    return sorted(f"{PREDICTIONS}/{path.name}" for path in (run_dir / PREDICTIONS).glob("*.jsonl") if path.is_file())


def copy_verified(source: Path, target: Path) -> None:
    """Copy a file beside its final name, rename it, and read it again.

    Raises: OSError, also when it reads otherwise than what was written; then there is no such copy.
    """
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        with open(open_regular(source), "rb") as read, open(temporary, "wb") as write:
            written = hashlib.blake2b()
            while chunk := read.read(CHUNK):
                written.update(chunk)
                write.write(chunk)
            write.flush()
            with contextlib.suppress(OSError):  # some network folders cannot; reading again is what counts
                os.fsync(write.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with open(target, "rb") as read:
        found = hashlib.file_digest(read, hashlib.blake2b)
    if found.digest() != written.digest():
        target.unlink(missing_ok=True)
        raise OSError(errno.EIO, f"the copy of {source.name} reads otherwise than what was written")


def bring_back(choice: RunChoice, out: Path | str) -> RunChoice:
    """Return the run under `out` after copying it there from the backup that `choice` lies in.

    A run that is there already, with older checkpoints, gets the newer one and the logs.
    Raises: CheckpointError when another run has the name, another process trains it, or the copy fails.
    """
    source, target = choice.path, Path(out) / choice.path.name
    kept = (*BEST_FILES, *prediction_files(source), *PAGES, *SMALL_FILES)
    names = [*kept, str(choice.checkpoint.relative_to(source))]
    try:
        if target.exists():
            _require_same_run(target, choice)
            with RunLock(target):
                _copy_names(source, target, names)
        else:
            _copy_as_a_whole(source, target, names)
    except OSError as error:
        raise CheckpointError(f"cannot bring {source} back to {target} ({error.strerror or error})",
                              "is there space, and is the backup mounted? then the same command again",
                              exit_code=4) from error
    return choice.moved(target)


def _copy_as_a_whole(source: Path, target: Path, names: list[str]) -> None:
    """Copy under a temporary name first: a run folder that is only half there must not look like a run."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    building = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    _copy_names(source, building, names)
    os.replace(building, target)
    sync_folder(target.parent)


def _copy_names(source: Path, target: Path, names: list[str]) -> None:
    for folder in (target / CHECKPOINTS, target / "best", target / PREDICTIONS):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            copy_verified(source / name, target / name)


def _require_same_run(target: Path, choice: RunChoice) -> None:
    if run_id_of(target) not in (None, choice.run_id):
        raise CheckpointError(f"{target} is another run than the backup {choice.path}",
                              "move it away, or choose another folder with --out DIR")
