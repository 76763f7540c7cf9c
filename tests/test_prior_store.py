"""Priors as bytes: what names them, what they hold, the pool that computes them, and the file that keeps them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import prior_store
from answer_traits import NUM_MISFITS
from demo_prior import MAX_CANDIDATES, NO_MISFITS, Preference, demo_prior, size_prior
from prior_store import (
    PriorStore,
    Work,
    cache_folder,
    compute,
    compute_all,
    compute_preference,
    decode_preference,
    decode_sizes,
    encode_preference,
    encode_sizes,
    value_key,
)

ROOT = Path(prior_store.__file__).resolve().parent
PROC = Path("/proc/self/stat")


def grids(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 5, rng.integers(2, 6, 2), dtype=np.uint8) for _ in range(count)]


def case(seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    *shown, test_input = grids(seed, 5)
    return list(zip(shown[::2], shown[1::2], strict=True)), test_input


def some_rows(count: int) -> dict[bytes, bytes]:
    return {i.to_bytes(16, "big"): bytes([i % 256]) * (500 + i) for i in range(count)}


def run_script(text: str, *argv: object) -> subprocess.Popen:
    """Return a Python process that runs `text` with the repository on its path."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{text}", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path, warnings):
    opened = PriorStore(str(tmp_path), warnings.append)
    yield opened
    opened.close()


# Keys and bytes ------------------------------------------------------------------------------------------------------


def test_key_changes_with_every_cell_shape_order_effort_and_version(monkeypatch):
    shown, x = case(0)
    keys = {value_key("standard", shown, x, (3, 4)), value_key("standard", shown, x, (4, 3)),
            value_key("standard", shown, x, None), value_key("full", shown, x, (3, 4)),
            value_key("standard", shown[::-1], x, (3, 4)), value_key("standard", shown[:1], x, (3, 4)),
            value_key("standard", [pair[::-1] for pair in shown], x, (3, 4))}  # fmt: skip
    expected = 7
    flat = [*(g for pair in shown for g in pair), x]
    for i, grid in enumerate(flat):
        for cell in np.ndindex(grid.shape):
            other = grid.copy()
            other[cell] += 1
            *rest, y = [*flat[:i], other, *flat[i + 1 :]]
            keys.add(value_key("standard", list(zip(rest[::2], rest[1::2], strict=True)), y, (3, 4)))
            expected += 1
    keys.add(value_key("standard", shown, x.reshape(1, -1), (3, 4)))
    monkeypatch.setattr(prior_store, "PRIOR_VERSION", prior_store.PRIOR_VERSION + 1)
    keys.add(value_key("standard", shown, x, (3, 4)))
    monkeypatch.undo()
    monkeypatch.setattr(prior_store, "FORMAT", prior_store.FORMAT + 1)
    keys.add(value_key("standard", shown, x, (3, 4)))
    assert len(keys) == expected + 3 and {len(key) for key in keys} == {16}


def test_key_does_not_depend_on_type_layout_or_process_of_a_grid():
    shown, x = case(1)
    key = value_key("standard", shown, x, (3, 4))
    assert key == value_key("standard", tuple(shown), np.asfortranarray(x.astype(np.int64)), (3, 4))
    code = "from prior_store import value_key; import numpy as np; x = np.eye(3, dtype=np.uint8)\n" \
           "print(value_key('full', [(x, x)], x, (3, 3)).hex())"  # fmt: skip
    x = np.eye(3, dtype=np.uint8)
    assert run_script(code).communicate()[0].strip() == value_key("full", [(x, x)], x, (3, 3)).hex()


def test_decoded_preference_is_normalised_near_the_original_and_the_same_each_time():
    shown, x = case(2)
    plain = demo_prior(shown, x, (5, 7))
    data = encode_preference(plain)
    loaded, again = decode_preference(data), decode_preference(bytes(bytearray(data)))
    assert loaded.log_prob.dtype == np.float32 and loaded.log_prob.shape == (5, 7, 10)
    assert np.abs(np.exp(loaded.log_prob.astype(np.float64)).sum(-1) - 1).max() < 1e-6
    assert np.allclose(np.exp(loaded.log_prob), np.exp(plain.log_prob), rtol=3e-3, atol=0)
    assert loaded.log_prob.tobytes() == again.log_prob.tobytes()
    assert loaded.confidence == again.confidence == pytest.approx(plain.confidence, abs=1e-6)
    assert [name for *_, name in loaded.candidates] == [name for *_, name in plain.candidates]
    for (a, w, _), (b, v, _) in zip(loaded.candidates, plain.candidates, strict=True):
        assert a.dtype == np.uint8 and np.array_equal(a, b) and w == pytest.approx(v, abs=1e-6)
    assert np.array_equal(loaded.misfits, plain.misfits) and loaded.misfits.shape[0] == len(loaded.candidates)
    assert encode_preference(demo_prior(shown, x, (5, 7))) == data


def test_all_candidates_survive_with_their_weights_and_misfits():
    log_prob = np.full((30, 30, 10), -np.log(10), np.float32)
    count = MAX_CANDIDATES
    many = [(np.full((30, 30), k % 10, np.uint8), 1 / count, "name " + "x" * 300) for k in range(count)]
    broken = np.arange(count)[:, None] * np.ones((count, NUM_MISFITS), np.float16)
    data = encode_preference(Preference(log_prob, 0.25, many, broken))
    loaded = decode_preference(data)
    assert np.array_equal(loaded.misfits, broken) and loaded.misfits.dtype == np.float16
    assert {(weight, name) for _, weight, name in loaded.candidates} == {(np.float32(1 / count), many[0][2][:255])}
    assert all(np.array_equal(a, b) for (a, _, _), (b, _, _) in zip(loaded.candidates, many, strict=True))
    assert len(zlib.decompress(data)) < 0.75 * prior_store.MAX_BYTES  # of the largest preference there can be
    none = decode_preference(encode_preference(Preference(log_prob, 0.25, [], NO_MISFITS)))
    assert none.candidates == [] and none.confidence == 0.25


def test_sizes_survive_exactly():
    sizes = [((1, 30), 0.9), ((30, 1), 1 / 30), ((7, 7), 1e-300)]
    assert decode_sizes(encode_sizes(sizes)) == sizes


# Computing -----------------------------------------------------------------------------------------------------------


def jobs(count: int) -> list[list[Work]]:
    """Return one job for each task of two inputs: one at its likeliest size and a fixed one, one at a fixed one."""
    return [[Work(*case(2 * i), (None, (3, 3)), True), Work(*case(2 * i + 1), ((2, 5),), False)] for i in range(count)]


def run_jobs(jobs, processes, notes=None, stopping=lambda: False, effort="standard"):
    found = compute_all(effort, jobs, processes, stopping, (notes if notes is not None else []).append)
    return {(i, k): values for i, k, values in found}


def test_compute_gives_sizes_then_each_shape_once():
    shown, x = case(3)
    likeliest = size_prior(shown, x)[0][0]
    values = compute("standard", Work(shown, x, (None, likeliest, (1, 1)), False))
    assert [value.shape for value in values] == [None, likeliest, (1, 1)]
    assert [value.key for value in values] == [value_key("standard", shown, x, value.shape) for value in values]
    assert decode_sizes(values[0].data) == size_prior(shown, x)
    assert values[1].data == compute_preference("standard", shown, x, likeliest)
    assert [value.shape for value in compute("standard", Work(shown, x, ((1, 1),), True))] == [None, (1, 1)]
    assert [value.shape for value in compute("standard", Work(shown, x, ((1, 1),), False))] == [(1, 1)]


def test_pool_gives_the_same_bytes_as_this_process():
    notes = []
    pooled = run_jobs(jobs(5), 2, notes)
    assert notes == [] and len(pooled) == 10
    assert pooled == run_jobs(jobs(5), 1)


def test_without_a_pool_everything_is_computed_here_and_one_line_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    notes = []
    assert run_jobs(jobs(2), 2, notes) == run_jobs(jobs(2), 1)
    (note,) = notes
    assert note.startswith("no worker process can be started (No such file")


def test_work_of_workers_that_die_is_done_here(monkeypatch):
    start = prior_store._start_worker

    def start_and_kill():
        worker = start()
        worker.kill()
        return worker

    monkeypatch.setattr(prior_store, "_start_worker", start_and_kill)
    notes = []
    assert run_jobs(jobs(2), 2, notes) == run_jobs(jobs(2), 1)
    assert notes == ["worker processes ended early; the priors are computed in one process"]


def test_an_error_in_a_worker_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed.*Traceback.*in compute"):
        run_jobs([[Work([(None, None)], None, ((1, 1),), False)]], 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_stopping_ends_early_and_leaves_no_worker(processes, monkeypatch):
    start, workers = prior_store._start_worker, []
    monkeypatch.setattr(prior_store, "_start_worker", lambda: workers.append(start()) or workers[-1])
    done = []
    for result in compute_all("standard", jobs(200), processes, lambda: len(done) >= 3, [].append):
        done.append(result)
    assert len(done) == 3
    assert [worker.poll() is None for worker in workers] == [False] * (processes if processes > 1 else 0)


@pytest.mark.skipif(not PROC.exists(), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed():
    parent = run_script("import prior_store, time\nprint(prior_store._start_worker().pid, flush=True)\ntime.sleep(60)")
    worker = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    assert worker.exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"


# The folder ----------------------------------------------------------------------------------------------------------


def test_folder_is_the_flag_then_the_variable_then_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ARC_CACHE_DIR", "~/named")
    assert cache_folder("chosen") == Path("chosen")
    assert cache_folder("") == tmp_path / "named"
    monkeypatch.delenv("ARC_CACHE_DIR")
    assert cache_folder("") == tmp_path / "xdg" / "arc_efe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("") == tmp_path / ".cache" / "arc_efe"


# The file ------------------------------------------------------------------------------------------------------------


def test_rows_are_found_again_by_another_store(store, tmp_path, warnings):
    rows = some_rows(1200)
    for key, value in rows.items():
        store.put(key, value)
    other = PriorStore(str(tmp_path), warnings.append)
    unknown = b"x" * 16
    assert store.have([*rows, unknown]) == rows.keys()  # also those that wait in memory
    store.flush()
    assert other.have([*rows, unknown]) == rows.keys() and other.get(unknown) is None
    assert {key: other.get(key) for key in rows} == rows
    assert other.size() > 500 * 1200 and warnings == []
    other.close()


def test_values_reach_the_disk_while_work_goes_on(store, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(prior_store, "FLUSH_SECONDS", 0.05)
    rows = some_rows(2)
    for key, value in rows.items():
        time.sleep(0.06)
        store.put(key, value)
    other = PriorStore(str(tmp_path), warnings.append)
    assert other.have(rows) == rows.keys()
    other.close()


WRITER = """
import prior_store
prior_store.FLUSH_ROWS = 1
store = prior_store.PriorStore(sys.argv[1], print)
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    store.put(i.to_bytes(16, "big"), bytes([i % 256]) * (500 + i))
store.close()
"""


def test_two_processes_fill_one_file_at_once(tmp_path, warnings):
    writers = [run_script(WRITER, tmp_path / "cache", first, first + 200) for first in (0, 0, 150)]
    assert [writer.communicate() for writer in writers] == [("", "")] * 3
    store, rows = PriorStore(str(tmp_path / "cache"), warnings.append), some_rows(350)
    assert {key: store.get(key) for key in rows} == rows and warnings == []
    assert store._db.execute("SELECT count(*) FROM prior").fetchone() == (350,)
    store.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_file_is_whole_after_a_kill_in_the_middle_of_writing(tmp_path, warnings):
    for k in range(4):
        writer = run_script(WRITER, tmp_path, 1000 * k, 10**9)
        path = tmp_path / "priors.sqlite"
        before = path.stat().st_size if path.exists() else 0
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < before + 40_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.007 * k)
        writer.send_signal(signal.SIGKILL)
        assert writer.communicate() == ("", "")
        store = PriorStore(str(tmp_path), warnings.append)
        kept = store._db.execute("SELECT key, value FROM prior").fetchall()
        assert len(kept) >= 20 * (k + 1) and warnings == []
        assert all(store.get(key) == value for key, value in kept)
        store.close()


def overwrite(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def another_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2 + 100),
    "cut to a few bytes": lambda path: os.truncate(path, 50),
    "text": lambda path: path.write_text("these are my notes, not yours " * 1000),
    "head overwritten": lambda path: overwrite(path, 0, b"\xff" * 200),
    "pages overwritten": lambda path: overwrite(path, 8192, os.urandom(40_000)),
    "another database": another_database,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_or_foreign_file_is_named_once_kept_and_built_anew(name, tmp_path, warnings):
    rows, path = some_rows(100), tmp_path / "priors.sqlite"

    def filled() -> PriorStore:
        store = PriorStore(str(tmp_path), warnings.append)
        assert store.have(rows) == set()
        for key, value in rows.items():
            store.put(key, value)
        return store

    filled().close()
    DAMAGE[name](path)
    content = path.read_bytes()
    filled().close()
    (warning,) = warnings
    assert str(path) in warning and "\n" not in warning and "damaged" in warning
    assert (tmp_path / "priors.sqlite.damaged").read_bytes() == content
    again = PriorStore(str(tmp_path), warnings.append)
    assert {key: again.get(key) for key in rows} == rows and len(warnings) == 1
    again.close()


def test_empty_file_is_just_filled(tmp_path, warnings):
    (tmp_path / "priors.sqlite").touch()
    store = PriorStore(str(tmp_path), warnings.append)
    store.put(b"k" * 16, b"v")
    store.close()
    assert PriorStore(str(tmp_path), warnings.append).get(b"k" * 16) == b"v" and warnings == []


def test_file_that_is_damaged_while_it_is_open_is_replaced(store, tmp_path, warnings):
    for key, value in (rows := some_rows(300)).items():
        store.put(key, value)
    store.flush()
    store._db.execute("PRAGMA cache_size = 0")
    overwrite(tmp_path / "priors.sqlite", 4096, b"\xff" * 100_000)
    found = {key: store.get(key) for key in rows}
    assert all(found[key] in (None, rows[key]) for key in rows) and None in found.values()
    for key, value in rows.items():
        store.put(key, value)
    store.flush()
    assert {key: store.get(key) for key in rows} == rows
    assert 1 <= len(warnings) <= 2 and (tmp_path / "priors.sqlite.damaged").exists()


def test_row_with_a_flipped_bit_is_not_used_and_can_be_written_again(store, tmp_path, warnings):
    rows = some_rows(20)
    for key, value in rows.items():
        store.put(key, value)
    store.close()
    path = tmp_path / "priors.sqlite"
    content = path.read_bytes()
    bad, worse = list(rows)[7], list(rows)[8]
    for key in (bad, worse):
        place = content.index(rows[key])
        overwrite(path, place + 100, b"\x77")
    store = PriorStore(str(tmp_path), warnings.append)
    found = {key: store.get(key) for key in rows}
    assert found == {**rows, bad: None, worse: None}
    assert warnings == [f"{path}: a row is damaged; such rows are computed again"]
    store.put(bad, rows[bad])
    store.close()
    assert PriorStore(str(tmp_path), warnings.append).get(bad) == rows[bad] and len(warnings) == 1


# Without a disk ------------------------------------------------------------------------------------------------------


def assert_one_warning(warnings: list[str], reason: str) -> None:
    (warning,) = warnings
    assert reason in warning and warning.startswith("priors are not kept ") and "\n" not in warning
    assert warning.endswith("; --cache-dir or ARC_CACHE_DIR names another folder")


def test_folder_that_cannot_be_made_gives_one_warning_and_an_empty_store(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    store = PriorStore(str(tmp_path / "file" / "cache"), warnings.append)
    store.put(b"k" * 16, b"v")
    store.flush()
    assert store.get(b"k" * 16) is None and store.have([b"k" * 16]) == set() and store.size() == 0
    assert not store.is_usable
    store.close()
    assert_one_warning(warnings, "Not a directory")


def test_home_that_is_unknown_gives_one_warning(monkeypatch, warnings):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ARC_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert not PriorStore("", warnings.append).is_usable
    assert_one_warning(warnings, "Could not determine home directory")


@pytest.mark.parametrize(
    ("pragma", "reason"),
    [("max_page_count = 1", "database or disk is full"), ("query_only = 1", "attempt to write a readonly database")],
)
def test_disk_that_refuses_a_write_gives_one_warning_and_is_still_read(pragma, reason, store, warnings):
    rows = some_rows(40)
    first, *others = rows
    store.put(first, rows[first])
    store.flush()
    store._db.execute(f"PRAGMA {pragma}")
    for key in others:
        store.put(key, rows[key] * 100)
    store.flush()
    store.put(others[0], rows[others[0]])
    store.flush()
    assert_one_warning(warnings, reason)
    assert store.get(first) == rows[first] and store.get(others[0]) is None and not store.is_usable


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("disk I/O error"),
        sqlite3.OperationalError("database is locked"),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_any_trouble_with_the_disk_is_one_warning_and_never_an_exception(when, error, tmp_path, warnings, monkeypatch):
    class Broken:
        in_transaction = True

        def execute(self, *arguments):
            raise error

        def close(self):
            raise sqlite3.OperationalError("cannot close either")

    def refuse(path):
        raise error

    if when == "at the start":
        monkeypatch.setattr(prior_store, "_connect", refuse)
    store = PriorStore(str(tmp_path), warnings.append)
    if when == "later":
        store._db.close()
        store._db = Broken()
    for _ in range(2):
        store.put(b"k" * 16, b"v")
        store.flush()
    assert store.get(b"q" * 16) is None and store.have([b"q" * 16]) == set()
    store.close()
    assert_one_warning(warnings, str(error.strerror if isinstance(error, OSError) else error))


def test_file_system_without_locks_gives_one_warning(tmp_path, warnings, monkeypatch):
    PriorStore(str(tmp_path), warnings.append).close()
    monkeypatch.setattr(prior_store, "BUSY_SECONDS", 0.05)
    holder = sqlite3.connect(tmp_path / "priors.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    store = PriorStore(str(tmp_path), warnings.append)
    assert store.get(b"k" * 16) is None and not store.is_usable
    assert_one_warning(warnings, "database is locked")
    holder.close()


def without_rights(action: Callable[[], list[str]]) -> list[str]:
    """Return what the action returns, run in a fork that has given up the rights of root, which may write anywhere."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(theirs, json.dumps(action()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_folder_that_is_read_only_is_read_and_gives_one_warning():
    with tempfile.TemporaryDirectory() as name:  # not in pytest's folders, which only their owner may enter
        folder = Path(name)
        store = PriorStore(name, print)
        store.put(b"k" * 16, b"v")
        store.close()
        (folder / "priors.sqlite").chmod(0o444)
        folder.chmod(0o555)

        def read_and_put() -> list[str]:
            said: list[str] = []
            other = PriorStore(name, said.append)
            assert other.get(b"k" * 16) == b"v"
            other.put(b"q" * 16, b"v")
            other.close()
            return said

        try:
            said = without_rights(read_and_put)
        finally:
            folder.chmod(0o755)
    assert_one_warning(said, "readonly")


def test_cache_may_be_deleted_at_any_time(store, tmp_path, warnings):
    store.put(b"k" * 16, b"v")
    store.flush()
    shutil.rmtree(tmp_path)
    store.put(b"q" * 16, b"v")
    store.close()
    assert len(warnings) <= 1
