"""Priors as bytes: computed by a pool of processes, kept in one file on the disk, found again by their content.

Imports the standard library, answer_traits and demo_prior only, so that a worker process starts fast. Used by
prior_cache.
What is computed and what is read from the disk pass through the same bytes, so both give the same numbers to the bit.
"""

from __future__ import annotations

import os
import pickle
import queue
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from answer_traits import NUM_MISFITS
from demo_prior import Demonstrations, Grid, Preference, Shape, demo_prior, size_prior

PRIOR_VERSION = 5  # of the numbers that demo_prior and size_prior give
FORMAT = 1  # of the bytes below
MAX_SIDE = 30
MAX_BYTES = 2**17  # of a preference, unpacked; the largest that is written has less than three quarters
TABLE = "CREATE TABLE prior (key BLOB PRIMARY KEY, value BLOB, checksum BLOB)"
UNREADABLE = (ValueError, IndexError, struct.error, zlib.error)  # bytes that encode nothing
SIZE = struct.Struct("<BBd")  # rows, columns, probability
HEAD = struct.Struct("<BBBf")  # rows, columns, number of candidates, confidence
CANDIDATE = struct.Struct("<fB")  # weight, length of the name

FILE_NAME = "priors.sqlite"
APPLICATION_ID = 0x41524350  # "ARCP", at byte 68 of the file
BUSY_SECONDS = 10.0  # wait for another run's transaction, which takes milliseconds
FLUSH_SECONDS = 2.0  # the most work that a kill can lose
FLUSH_ROWS = 512
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MIN_PARALLEL = 32  # inputs; fewer are computed before a pool would have started
POLL_SECONDS = 0.2
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)  # the latter: SQLite's message quotes a damaged name
TROUBLE = (sqlite3.Error, OSError, UnicodeDecodeError)  # with the disk; it costs a warning, never the run


# 1. Keys and bytes ---------------------------------------------------------------------------------------------------


def value_key(effort: str, demonstrations: Demonstrations, test_input: Grid, shape: Shape | None) -> bytes:
    """Return the 16 bytes that name the preference at `shape`, or the sizes (None), of an input: content alone decides.

    Grids are written with their sides and demonstrations with their number, so different inputs never look alike.
    """
    state = blake2b(f"{FORMAT}/{PRIOR_VERSION}/{effort}/{len(demonstrations)}/".encode(), digest_size=16)
    for grid in (*(grid for pair in demonstrations for grid in pair), test_input):
        state.update(bytes(grid.shape) + np.ascontiguousarray(grid, np.uint8).tobytes())
    state.update(b"sizes" if shape is None else bytes(shape))
    return state.digest()


def encode_preference(preference: Preference) -> bytes:
    """Return a preference as bytes: log-probabilities rounded to float16, the candidates with weights float32 and their
    misfits."""
    height, width, _ = preference.log_prob.shape
    kept = preference.candidates
    parts = [HEAD.pack(height, width, len(kept), preference.confidence), preference.log_prob.astype("<f2").tobytes()]
    for grid, weight, name in kept:
        label = name.encode()[:255]
        parts += [CANDIDATE.pack(weight, len(label)), label, grid.astype(np.uint8).tobytes()]
    assert preference.misfits.shape == (len(kept), NUM_MISFITS), preference.misfits.shape
    parts.append(preference.misfits.astype("<f2").tobytes())
    return zlib.compress(b"".join(parts), 6)


def decode_preference(data: bytes) -> Preference:
    """Return the preference that `encode_preference` wrote, float32 and normalised again.

    Raises: one of UNREADABLE for other bytes.
    """
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(data, MAX_BYTES)
    height, width, count, confidence = HEAD.unpack_from(data)
    if not (unpacker.eof and 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and 0 <= confidence <= 1):
        raise ValueError("no preference")
    cells, place = height * width, HEAD.size
    rounded = np.frombuffer(data, "<f2", cells * 10, place).astype(np.float64).reshape(height, width, 10)
    log_prob = rounded - np.log(np.exp(rounded).sum(-1, keepdims=True))
    place += cells * 20
    candidates = []
    for _ in range(count):
        weight, length = CANDIDATE.unpack_from(data, place)
        place += CANDIDATE.size
        name = data[place : place + length].decode(errors="replace")
        place += length
        candidates.append((np.frombuffer(data, np.uint8, cells, place).reshape(height, width), weight, name))
        place += cells
    broken = np.frombuffer(data, "<f2", count * NUM_MISFITS, place).reshape(count, NUM_MISFITS).astype(np.float16)
    are_candidates = all(0 <= weight <= 1.01 and grid.max() <= 9 for grid, weight, _ in candidates)
    if not (are_candidates and np.isfinite(log_prob).all() and np.isfinite(broken).all()):
        raise ValueError("no preference")
    return Preference(log_prob.astype(np.float32), confidence, candidates, broken)


def encode_sizes(sizes: Sequence[tuple[Shape, float]]) -> bytes:
    """Return the sizes and their probabilities as bytes, exactly."""
    return b"".join(SIZE.pack(*shape, probability) for shape, probability in sizes)


def decode_sizes(data: bytes) -> list[tuple[Shape, float]]:
    """Return the sizes that `encode_sizes` wrote. Raises: one of UNREADABLE for other bytes."""
    sizes = [((height, width), probability) for height, width, probability in SIZE.iter_unpack(data)]
    if not sizes or not all(1 <= min(shape) <= max(shape) <= MAX_SIDE and 0 <= p <= 1.01 for shape, p in sizes):
        raise ValueError("no sizes")
    return sizes


# 2. Computing --------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What to compute for one input: its sizes, and preferences at `shapes`; None there stands for the likeliest size.

    Each of `shapes` is unaugmented.
    """

    demonstrations: Demonstrations
    test_input: Grid
    shapes: tuple[Shape | None, ...]
    needs_sizes: bool


class Value(NamedTuple):
    """Something computed: the preference at `shape`, or the sizes (None), as bytes."""

    key: bytes
    shape: Shape | None
    data: bytes


Job = Sequence[Work]  # the inputs of one task, for one process, which so reuses what it found out about their grids
Done = tuple[int, int, list[Value]]  # number of the job, of the input within it, what was computed


def compute_preference(effort: str, demonstrations: Demonstrations, test_input: Grid, shape: Shape) -> bytes:
    """Return the encoded preference, computed."""
    options = {} if effort == "standard" else {"effort": effort}
    return encode_preference(demo_prior(demonstrations, test_input, shape, **options))


def compute_sizes(demonstrations: Demonstrations, test_input: Grid) -> bytes:
    """Return the encoded sizes, computed."""
    return encode_sizes(size_prior(demonstrations, test_input))


def compute(effort: str, work: Work) -> list[Value]:
    """Return everything that `work` asks for, the sizes first; a shape that comes twice is computed once."""
    demonstrations, test_input, shapes, needs_sizes = work
    values = []
    if needs_sizes or None in shapes:
        data = compute_sizes(demonstrations, test_input)
        likeliest = decode_sizes(data)[0][0]
        shapes = tuple(likeliest if shape is None else shape for shape in shapes)
        values.append(Value(value_key(effort, demonstrations, test_input, None), None, data))
    for shape in dict.fromkeys(shapes):
        data = compute_preference(effort, demonstrations, test_input, shape)
        values.append(Value(value_key(effort, demonstrations, test_input, shape), shape, data))
    return values


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_all(
    effort: str, jobs: Sequence[Job], processes: int, stopping: Callable[[], bool], note: Callable[[str], None]
) -> Iterator[Done]:
    """Yield the results of all jobs as they come, until `stopping` returns True.

    More than one process: a pool of them; what the pool cannot do is computed here, and `note` is told why.
    Raises: RuntimeError with a worker's traceback.
    """
    open_jobs = dict(enumerate(jobs))
    if processes > 1:
        finished: set[tuple[int, int]] = set()
        try:
            for result in _compute_in_pool(effort, jobs, processes, stopping):
                finished.add(result[:2])
                yield result
            reason = "worker processes ended early"
        except OSError as error:
            reason = f"no worker process can be started ({error.strerror or error})"
        open_jobs = {i: job for i, job in open_jobs.items() if any((i, k) not in finished for k in range(len(job)))}
        if not open_jobs or stopping():
            return
        note(f"{reason}; the priors are computed in one process")
    else:
        finished = set()
    for i, job in open_jobs.items():
        for k, work in enumerate(job):
            if stopping():
                return
            if (i, k) not in finished:
                yield i, k, compute(effort, work)


def _compute_in_pool(effort: str, jobs: Sequence[Job], processes: int, stopping: Callable[[], bool]) -> Iterator[Done]:
    """Yield results from `processes` workers until all have ended; the workers never outlive the generator.

    Raises: OSError when no worker starts, RuntimeError with a worker's traceback.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(jobs)):
        waiting.put(i)
    results: queue.SimpleQueue[Done | str | None] = queue.SimpleQueue()
    workers: list[subprocess.Popen] = []
    try:
        for _ in range(min(processes, len(jobs))):
            workers.append(_start_worker())
            feeder = threading.Thread(target=_feed, args=(workers[-1], effort, jobs, waiting, results), daemon=True)
            feeder.start()
        running = len(workers)
        while running and not stopping():
            try:
                result = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(result, str):
                raise RuntimeError(f"a worker process failed:\n{result}")
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start_worker() -> subprocess.Popen:
    """Return a new process that answers jobs on its standard input, out of reach of the terminal's Ctrl-C."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import prior_store; prior_store.serve()"
    own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).resolve().parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")},
        start_new_session=os.name != "nt",
        **own_group,
    )


def _feed(
    worker: subprocess.Popen, effort: str, jobs: Sequence[Job], waiting: queue.SimpleQueue, results: queue.SimpleQueue
) -> None:
    """Hand a worker one job after another and pass on what it answers; None at its end, also when it dies."""
    try:
        with suppress(queue.Empty, OSError, EOFError, ValueError, pickle.UnpicklingError):
            while True:
                i = waiting.get_nowait()
                pickle.dump((effort, list(jobs[i])), worker.stdin)
                worker.stdin.flush()
                while (answer := pickle.load(worker.stdout)) is not None:
                    results.put(answer if isinstance(answer, str) else (i, *answer))
    finally:
        results.put(None)


def serve() -> None:
    """Answer pickled jobs (effort, works) from standard input with (index, values) each, and None at a job's end.

    Ends with the process at the other end of the pipe, however that ends. Anything printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(EOFError, OSError):
        while True:
            effort, works = pickle.load(sys.stdin.buffer)
            for k, work in enumerate(works):
                try:
                    answer = (k, compute(effort, work))
                except Exception:
                    answer = traceback.format_exc()
                pickle.dump(answer, answers)
                answers.flush()
            pickle.dump(None, answers)
            answers.flush()
    os._exit(0)  # without a last flush into a pipe that nobody reads


# 3. The disk ---------------------------------------------------------------------------------------------------------


def cache_folder(chosen: str = "") -> Path:
    """Return the folder of the cache: `chosen`, else $ARC_CACHE_DIR, else $XDG_CACHE_HOME/arc_efe or ~/.cache/arc_efe.

    Raises: OSError when there is no home folder to put it in.
    """
    named = chosen or os.environ.get("ARC_CACHE_DIR", "")
    try:
        if named:
            return Path(named).expanduser()
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "arc_efe"
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from error


class PriorStore:
    """Values by key in one SQLite file that several runs may share. Nothing here raises: without a disk it is empty.

    The file uses SQLite's rollback journal: the faster write-ahead log needs memory shared between processes, which
    network file systems such as a mounted Drive do not have. Every row carries a checksum. A file that is damaged, or
    something else, is kept as NAME.damaged. `warn` gets one line for each thing that goes wrong.
    """

    def __init__(self, folder: str, warn: Callable[[str], None]):
        self._warn = warn
        self._pending: dict[bytes, bytes] = {}
        self._flushed = time.monotonic()
        self._db: sqlite3.Connection | None = None
        self._is_writable, self._reopened, self._reported, self._bad_rows = True, False, False, 0
        self.path: Path | None = None
        try:
            self.path = cache_folder(folder) / FILE_NAME
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._do_without(error)
        else:
            self._open()

    @property
    def is_usable(self) -> bool:
        """Return whether what is put is kept."""
        return self._db is not None and self._is_writable

    def size(self) -> int:
        """Return the bytes that the file takes."""
        try:
            return self.path.stat().st_size if self.path else 0
        except OSError:
            return 0

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, None when it is not there or damaged."""
        if key in self._pending:
            return self._pending[key]
        rows = self._read("SELECT value, checksum FROM prior WHERE key = ?", (key,))
        if not rows:
            return None
        value, checksum = rows[0]
        if isinstance(value, bytes) and checksum == _checksum(key, value):
            return value
        self.forget(key)
        return None

    def have(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of `keys` that are there; values are not looked at."""
        keys = list(keys)
        found = {key for key in keys if key in self._pending}
        for i in range(0, len(keys), 500):
            part = keys[i : i + 500]
            marks = ",".join("?" * len(part))
            found |= {row[0] for row in self._read(f"SELECT key FROM prior WHERE key IN ({marks})", part)}
        return found

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value; it reaches the disk within FLUSH_SECONDS of work, or with `flush`."""
        if not self.is_usable:
            return
        self._pending[key] = value
        if len(self._pending) >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits, in one transaction."""
        rows = [(key, value, _checksum(key, value)) for key, value in self._pending.items()]
        if rows and self.is_usable:
            self._write("INSERT OR IGNORE INTO prior VALUES (?, ?, ?)", rows)
        self._pending.clear()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what waits and close the file."""
        self.flush()
        self._disconnect()

    def _open(self) -> None:
        for attempt in (1, 2):
            try:
                before = _identity(self.path)
                self._db = _connect(self.path)
                return
            except TROUBLE as error:
                if attempt == 2 or not _is_damage(error) or not self._set_aside(before, error):
                    self._do_without(error)
                    return

    def _set_aside(self, before: int | None, reason: Exception) -> bool:
        """Rename the file that cannot be used, unless another process has just replaced it; return False on failure.

        Its journal goes as well: it would be played back into the new file.
        """
        if _identity(self.path) != before:
            return True
        kept = self.path.with_name(FILE_NAME + ".damaged")
        try:
            os.replace(self.path, kept)
            self.path.with_name(FILE_NAME + "-journal").unlink(missing_ok=True)
        except OSError:
            return False
        self._warn(f"{self.path} is damaged or no cache of priors ({reason}): kept as {kept.name}, built anew")
        return True

    def _read(self, sql: str, values: Sequence[bytes]) -> list[tuple]:
        if self._db is None:
            return []
        try:
            return self._db.execute(sql, values).fetchall()
        except TROUBLE as error:
            self._recover(error)
            return []

    def _write(self, sql: str, rows: Sequence[tuple]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(sql, rows)
            self._db.execute("COMMIT")
        except TROUBLE as error:
            with suppress(*TROUBLE):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if _is_damage(error):
                self._recover(error)
            else:  # full, read-only, locked: what is there can still be read
                self._is_writable = False
                self._report(error)

    def forget(self, key: bytes) -> None:
        """Delete a row that is damaged, so that it can be written again."""
        self._pending.pop(key, None)
        self._bad_rows += 1
        if self._bad_rows == 1:
            self._warn(f"{self.path}: a row is damaged; such rows are computed again")
        if self.is_usable:
            self._write("DELETE FROM prior WHERE key = ?", [(key,)])

    def _recover(self, error: Exception) -> None:
        """Open the file once more, which sets a damaged one aside; after the second time do without."""
        self._disconnect()
        if _is_damage(error) and not self._reopened:
            self._reopened = True
            self._open()
        else:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        self._disconnect()
        self._pending.clear()
        self._report(error)

    def _report(self, error: Exception) -> None:
        if self._reported:
            return
        self._reported = True
        reason = getattr(error, "strerror", None) or str(error)
        place = f"in {self.path}" if self.path else "on the disk"
        self._warn(f"priors are not kept {place} ({reason}); --cache-dir or ARC_CACHE_DIR names another folder")

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(*TROUBLE):
                self._db.close()
            self._db = None


def _connect(path: Path) -> sqlite3.Connection:
    """Return an open file with the table in it, created where there is none.

    Raises: sqlite3.DatabaseError itself for a damaged or foreign file, its subclasses for other reasons.
    """
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    db.text_factory = lambda text: text.decode(errors="replace")  # such a value is then a damaged row
    try:
        db.execute("BEGIN")  # one view of the file, whatever another process is about to create
        marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        found = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 2").fetchall()
        is_empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        state = "ok" if is_empty else db.execute("PRAGMA quick_check(1)").fetchone()[0]
        db.execute("COMMIT")
        if is_empty and marks == [0, 0]:
            db.execute("BEGIN IMMEDIATE")
            db.execute(TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute("COMMIT")
        elif marks != [APPLICATION_ID, FORMAT] or found != [(TABLE,)]:  # no view, no trigger
            raise sqlite3.DatabaseError("it is another kind of database")
        elif state != "ok":
            raise sqlite3.DatabaseError(" ".join(state.split()))
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: Exception) -> bool:
    """Return whether SQLite says that the content is wrong, and not that it cannot be reached."""
    return type(error) in DAMAGE


def _identity(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(key + value, digest_size=8).digest()
