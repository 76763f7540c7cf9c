"""The fuzzer of the loaders: a short run finds nothing, and loaders that fail in each way are found out."""

from __future__ import annotations

import os
import random
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from arc_data import DataError


@pytest.fixture
def try_loader(benchmark, capsys, monkeypatch, tmp_path):
    """Return a function that fuzzes a loader for ten inputs and returns (exit code, what was printed)."""
    monkeypatch.setattr(benchmark, "SECONDS", 0.5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the inputs of violations are kept

    def run(loader, *argv: str) -> tuple[int, str]:
        def target(folder: Path, rng: random.Random) -> list:
            (folder / "input").write_bytes(rng.randbytes(4))
            return [lambda: loader(folder / "input")]

        code = benchmark.main(["--inputs", "10", *argv], {"fake": (target, 1.0)})
        return code, capsys.readouterr().out

    return run


def test_a_short_run_finds_no_violation(benchmark, monkeypatch, capsys):
    monkeypatch.setenv("FUZZ_CANARY", "")  # the command sets it: undone at the end
    code = benchmark.main(["--inputs", "2000"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["checkpoint", "metadata", "task", "challenges", "submission",
                                                        "weights", "priors"]  # fmt: skip
    assert lines[-1].startswith("2000 inputs in ") and "refused: DataError" in lines[2]


def test_inputs_that_are_refused_by_our_errors_are_counted(try_loader):
    def load(path: Path) -> None:
        if path.read_bytes()[0] % 2:
            raise DataError("odd")

    code, printed = try_loader(load)
    accepted = int(printed.split("accepted ")[1].split()[0])
    assert code == 0 and 0 < accepted < 10 and f"refused: DataError {10 - accepted} " in printed


def allocate(path: Path) -> None:
    bytearray(3 * 10**9)


def hide_the_allocation(path: Path) -> None:
    try:
        bytearray(3 * 10**9)
    except MemoryError as error:
        raise DataError("damaged") from error


def raise_foreign(path: Path) -> None:
    raise KeyError("x")


def wait(path: Path) -> None:
    time.sleep(60)


def wait_deafly(path: Path) -> None:
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


def die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(path: Path) -> None:
    sys.exit(0)


def recurse(path: Path) -> None:
    recurse(path)


def say_much(path: Path) -> None:
    raise DataError("fine", place="x\n" * 10)


def steer(path: Path) -> None:
    raise DataError("fine", place="\x1b[31m")


def run_code(path: Path) -> None:
    Path(os.environ["FUZZ_CANARY"]).touch()


@pytest.mark.parametrize(("loader", "words"), [
    (raise_foreign, "KeyError: 'x'"), (wait, "no end within 0.5 s"), (allocate, "more than 1 GB"),
    (die, "the process died"), (hide_the_allocation, "more than 1 GB"), (leave, "SystemExit"),
    (recurse, "RecursionError"),
    (say_much, "a message of 11 lines"), (steer, "a message of 1 lines"), (run_code, "code of the input ran"),
])  # fmt: skip
def test_a_loader_that_fails_is_found_and_its_input_kept(try_loader, loader, words):
    code, printed = try_loader(loader, "--first", "5")
    assert code == 1 and "VIOLATION: " in printed and words in printed
    kept = Path(printed.split("its input: ")[1].strip())
    with tarfile.open(kept) as archive:
        content = archive.extractfile("./input").read()
    assert kept.name == "fake_0_5.tar" and content == random.Random("0/fake/5").randbytes(4)


def test_a_worker_that_hears_no_signal_is_ended(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.2)
    monkeypatch.setenv("FUZZ_CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    result = benchmark.run_target("deaf", lambda folder, rng: [lambda: wait_deafly(folder)], 0, range(1), patience=1.0)
    assert "no signal is heard" in result.violation and time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_changes_are_the_same_for_the_same_seed_and_mostly_change(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_CANARY", str(tmp_path / "canary"))
    content = benchmark.seeds("checkpoint")[0]
    made = [benchmark.change_checkpoint(content, random.Random(f"{i}")) for i in range(40)]
    assert made == [benchmark.change_checkpoint(content, random.Random(f"{i}")) for i in range(40)]
    assert len(set(made)) > 30 and content not in made[:5]
