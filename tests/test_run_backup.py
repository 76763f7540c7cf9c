"""The backup of a run: what is copied and when, targets that fail or hang, and the way back."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import run_backup
from model_persistence import CheckpointError, CheckpointStore, RunLock, find_run, list_checkpoints, read_checkpoint
from run_backup import Backup, bring_back, copy_verified


def make_run(runs: Path, *steps: int, name: str = "one") -> Path:
    """Return a run folder with these checkpoints and every file that a backup holds."""
    run = runs / name
    (run / "best").mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(run, run_id=name, say=lambda message: None)
    for step in steps:
        save_step(run, step)
    for file in ("config.json", "env.json", "run.log", "epochs.csv", "best/model.safetensors", "best/config.json"):
        (run / file).write_text(f"{file} of {steps}")
    (run / "metrics.jsonl").write_text("".join(f'{{"step":{step}}}\n' for step in steps))
    (run / "run.json").write_text(json.dumps({"run_id": name, "status": "running"}))
    store.save_best_delta(store.path(steps[0]))
    return run


def save_step(run: Path, step: int) -> None:
    CheckpointStore(run, run_id=run.name, say=lambda message: None).save(step, {"w": torch.full((50,), float(step))})


def make_backup(run: Path, target: Path, **options) -> tuple[Backup, list[str]]:
    said: list[str] = []
    return Backup(run, target, run.name, said.append, **({"retry_seconds": 0.02} | options)), said


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_in(run: Path) -> list[int]:
    return [read_checkpoint(path).step for path in list_checkpoints(run)]


def test_backup_holds_every_file_and_the_two_newest_checkpoints(tmp_path):
    run = make_run(tmp_path / "runs", 1, 2)
    backup, said = make_backup(run, tmp_path / "drive")
    for step in (3, 4, 5):
        save_step(run, step)
        backup.offer()
        wait_for(lambda step=step: backup.step == step)
    assert backup.close() and said == []
    copy = tmp_path / "drive" / "one"
    assert steps_in(copy) == [5, 4]
    files = ("config.json", "env.json", "run.log", "metrics.jsonl", "epochs.csv", "run.json", "best/model.safetensors",
             "best/config.json", "checkpoints/best_delta.pt")  # fmt: skip
    assert all((copy / name).read_bytes() == (run / name).read_bytes() for name in files)
    assert not list(copy.rglob(".tmp-*"))


def test_logs_are_copied_after_the_checkpoint_was_chosen_and_before_it_is_there(tmp_path, monkeypatch):
    run, order = make_run(tmp_path / "runs", 1), []
    copy = run_backup.copy_verified

    def record(source, target):
        order.append(source.name)
        if source.name == "metrics.jsonl":
            save_step(run, 2)  # training goes on meanwhile
        copy(source, target)

    monkeypatch.setattr(run_backup, "copy_verified", record)
    backup, _ = make_backup(run, tmp_path / "drive")
    backup.offer()
    backup.close()
    assert order[-1] == "step_000000001.pt" and order.index("metrics.jsonl") < len(order) - 1


def test_unchanged_files_are_not_copied_again(tmp_path, monkeypatch):
    run, copied = make_run(tmp_path / "runs", 1), []
    copy = run_backup.copy_verified
    monkeypatch.setattr(run_backup, "copy_verified", lambda a, b: (copied.append(a.name), copy(a, b)))
    backup, _ = make_backup(run, tmp_path / "drive")
    backup.offer()
    wait_for(lambda: backup.step == 1 and backup._busy_since is None)
    copied.clear()
    save_step(run, 2)
    backup.offer()
    backup.close()
    assert copied == ["step_000000002.pt"]


FAILURES = {
    "gone": OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "quota": OSError(errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_target_is_one_warning_and_a_later_retry(name, tmp_path, monkeypatch):
    run, left = make_run(tmp_path / "runs", 1), [4]
    copy = run_backup.copy_verified

    def fail(source, target):
        if left[0]:
            left[0] -= 1
            raise FAILURES[name]
        copy(source, target)

    monkeypatch.setattr(run_backup, "copy_verified", fail)
    backup, said = make_backup(run, tmp_path / "drive")
    backup.offer()
    wait_for(lambda: backup.step == 1)
    assert backup.close() and left == [0]
    warning, note = said
    assert warning == (f"warning: backup to {tmp_path}/drive/one failed ([Errno {FAILURES[name].errno}] "
                       f"{FAILURES[name].strerror}); training goes on, will retry. Local copy: {run}")  # fmt: skip
    assert note == f"note: backup to {tmp_path}/drive/one works again"


def test_a_missing_target_is_made_and_one_that_cannot_be_made_is_a_warning(tmp_path):
    run = make_run(tmp_path / "runs", 1)
    (tmp_path / "file").write_text("not a folder")
    backup, said = make_backup(run, tmp_path / "file" / "drive")
    backup.offer()
    wait_for(lambda: said)
    assert "Not a directory" in said[0] and said[0].startswith("warning: ")
    (tmp_path / "file").unlink()
    wait_for(lambda: backup.step == 1)
    assert backup.close()


def test_a_target_that_vanishes_is_written_anew(tmp_path):
    run = make_run(tmp_path / "runs", 1)
    backup, said = make_backup(run, tmp_path / "drive")
    backup.offer()
    wait_for(lambda: backup.step == 1 and backup._busy_since is None)
    os.rename(tmp_path / "drive", tmp_path / "unplugged")
    save_step(run, 2)
    backup.offer()
    wait_for(lambda: backup.step == 2)
    assert backup.close()
    copy = tmp_path / "drive" / "one"
    assert steps_in(copy) == [2] and (copy / "best" / "model.safetensors").exists() and said == []


def test_a_hanging_target_holds_up_neither_training_nor_the_end(tmp_path, monkeypatch):
    run, hang, now = make_run(tmp_path / "runs", 1), threading.Event(), [0.0]
    monkeypatch.setattr(run_backup, "copy_verified", lambda source, target: hang.wait(60))
    backup, said = make_backup(run, tmp_path / "drive", clock=lambda: now[0])
    backup.offer()
    wait_for(lambda: backup._busy_since is not None)
    now[0] = 301.0
    began = time.monotonic()
    for _ in range(1000):
        backup.offer()
    assert time.monotonic() - began < 1
    assert not backup.close(patience=0.05)
    hang.set()
    hanging, incomplete = said
    assert "has not answered for 301 s; training goes on" in hanging
    assert incomplete == f"warning: backup to {tmp_path}/drive/one is not complete; the run itself is in {run}"


def test_a_copy_that_reads_otherwise_is_refused(tmp_path, monkeypatch):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 100)
    replace = os.replace

    def spoil(a, b):
        replace(a, b)
        Path(b).write_bytes(b"x" * 99)  # a drive that cuts

    monkeypatch.setattr(os, "replace", spoil)
    with pytest.raises(OSError, match="reads otherwise"):
        copy_verified(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_checkpoints_of_an_abandoned_attempt_leave_the_backup_too(tmp_path):
    run = make_run(tmp_path / "runs", 1, 5, 9)
    backup, _ = make_backup(run, tmp_path / "drive")
    backup.offer()
    backup.close()
    store = CheckpointStore(run, run_id="one", say=lambda message: None)
    store.set_aside_after(1)
    save_step(run, 3)
    backup, _ = make_backup(run, tmp_path / "drive")
    backup.offer()
    backup.close()
    assert steps_in(tmp_path / "drive" / "one") == [3]


# The way back


@pytest.fixture
def backed_up(tmp_path) -> Path:
    """Return the folder of backups that holds the run one with step 2; the run itself is under runs/."""
    backup, _ = make_backup(make_run(tmp_path / "runs", 1, 2), tmp_path / "drive")
    backup.offer()
    assert backup.close()
    return tmp_path / "drive"


@pytest.mark.parametrize("word", ["latest", "the folder", "its run", "the name", "the file"])
def test_a_lost_run_comes_back_from_its_backup_alone(word, backed_up, tmp_path):
    runs = tmp_path / "runs"
    shutil.rmtree(runs)
    words = {"latest": "latest", "the folder": str(backed_up), "its run": str(backed_up / "one"), "the name": "one",
             "the file": str(backed_up / "one/checkpoints/step_000000002.pt")}  # fmt: skip
    choice = find_run(runs, words[word], backed_up if word in ("latest", "the name") else "")
    assert choice.is_backup and choice.step == 2
    found = bring_back(choice, runs)
    assert found.path == runs / "one" and found.checkpoint.exists() and not found.is_backup
    assert steps_in(runs / "one") == [2] and (runs / "one" / "metrics.jsonl").read_text().endswith('{"step":2}\n')
    assert find_run(runs).path == runs / "one"


def test_of_both_places_the_newer_whole_checkpoint_counts(backed_up, tmp_path):
    run = tmp_path / "runs" / "one"
    assert find_run(tmp_path / "runs", "latest", backed_up).path == run  # equal: the run itself
    save_step(run, 3)
    assert find_run(tmp_path / "runs", "latest", backed_up).step == 3
    for path in list_checkpoints(run)[:2]:
        path.write_bytes(b"PK damaged")
    choice = find_run(tmp_path / "runs", "latest", backed_up)
    assert choice.is_backup and choice.step == 2
    found = bring_back(choice, tmp_path / "runs")
    assert found.path == run and read_checkpoint(found.checkpoint).step == 2
    assert find_run(tmp_path / "runs", "latest", backed_up).path == run


def test_a_half_copied_backup_falls_back_to_the_checkpoint_before(backed_up, tmp_path):
    save_step(tmp_path / "runs" / "one", 3)
    cut = (tmp_path / "runs" / "one" / "checkpoints" / "step_000000003.pt").read_bytes()[:700]
    (backed_up / "one" / "checkpoints" / "step_000000003.pt").write_bytes(cut)
    shutil.rmtree(tmp_path / "runs")
    assert find_run(tmp_path / "runs", str(backed_up)).step == 2


def test_bring_back_refuses_another_run_of_that_name_and_one_that_is_trained(backed_up, tmp_path):
    choice = find_run(tmp_path / "nothing", str(backed_up))
    other = tmp_path / "others"
    make_run(other, 1)
    (other / "one" / "run.json").write_text('{"run_id": "two"}')
    for path in list_checkpoints(other / "one"):
        path.unlink()
    with pytest.raises(CheckpointError, match="is another run than the backup"):
        bring_back(choice, other)
    with RunLock(tmp_path / "runs" / "one"):
        def elsewhere(queue):
            try:
                bring_back(choice, tmp_path / "runs")
            except CheckpointError as error:
                queue.put((str(error), error.exit_code))

        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=elsewhere, args=(queue,))
        child.start()
        message, code = queue.get(timeout=30)
        child.join()
    assert "one is being trained by pid" in message and code == 4


def test_a_kill_while_bringing_back_leaves_nothing_that_looks_like_a_run(backed_up, tmp_path):
    runs, choice = tmp_path / "new", find_run(tmp_path / "nothing", str(backed_up))
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, []

        def kill(a, b):
            calls.append(b)
            if len(calls) == 5:
                os._exit(9)
            replace(a, b)

        os.replace = kill
        bring_back(choice, runs)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(CheckpointError, match="there are no runs"):
        find_run(runs)
    assert bring_back(choice, runs).path == runs / "one"
    assert [path.name for path in runs.iterdir()] == ["one"]


def test_a_copy_back_that_fails_says_what_to_do(backed_up, tmp_path, monkeypatch):
    choice = find_run(tmp_path / "nothing", str(backed_up))

    def full(source, target):
        raise FAILURES["full"]

    monkeypatch.setattr(run_backup, "copy_verified", full)
    with pytest.raises(CheckpointError, match=r"cannot bring .*one back to .*one \(No space left") as caught:
        bring_back(choice, tmp_path / "new")
    assert caught.value.exit_code == 4 and caught.value.hint.startswith("is there space")
    assert not (tmp_path / "new" / "one").exists()


def test_a_link_in_a_backup_is_not_followed(backed_up, tmp_path):
    (tmp_path / "secret").write_text("not part of any run")
    (backed_up / "one" / "run.log").unlink()
    (backed_up / "one" / "run.log").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="cannot bring"):
        bring_back(find_run(tmp_path / "nothing", str(backed_up)), tmp_path / "new")
    assert not (tmp_path / "new" / "one").exists()
