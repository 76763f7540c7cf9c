"""Checkpoints under kills, damage, full disks and malice; the lock; finding runs; what may change on resume."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import threading
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import model_persistence
from config import TrainConfig, to_dict
from model_persistence import (
    FORMAT,
    CheckpointError,
    CheckpointStore,
    DamagedError,
    HostCopy,
    RunLock,
    Saver,
    all_finite,
    find_run,
    load_best_weights,
    plain,
    read_checkpoint,
    rng_state,
    save_best_weights,
    set_rng_state,
    snapshot,
)


def make_payload(step: int) -> dict:
    return {"model": {"w": torch.full((64,), float(step))}, "metrics": {"loss": np.float64(0.5), "n": np.int64(step)}}


def make_store(run_dir: Path, **options) -> tuple[CheckpointStore, list[str]]:
    said: list[str] = []
    store = CheckpointStore(run_dir, **({"run_id": "mine", "say": said.append, "sleep": lambda s: None} | options))
    return store, said


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(p.name[5:-3]) for p in (run_dir / "checkpoints").glob("step_*.pt"))


# Plain data


def test_snapshot_copies_keeps_ties_and_makes_views_compact():
    shared = torch.arange(6.0)
    view = torch.arange(1000.0)[::100]
    source = OrderedDict(a=shared, b=shared, c=[torch.nn.Parameter(torch.ones(2))], d=view, e=shared[:3])
    taken = snapshot(source)
    shared.zero_()
    assert type(taken) is dict and taken["a"] is taken["b"] and taken["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert type(taken["c"][0]) is torch.Tensor and not taken["c"][0].requires_grad
    assert taken["d"].untyped_storage().nbytes() == 40 and taken["d"].tolist() == list(range(0, 1000, 100))
    assert taken["e"].tolist() == [0, 1, 2]


def test_plain_converts_numpy_and_subclasses():
    converted = plain({np.int64(3): np.float32(0.5), "f": np.bool_(True), "s": np.str_("x"), "t": torch.Size([2, 3]),
                       "v": torch.__version__, "a": np.arange(3)})
    assert [type(value) for value in converted.values()] == [float, bool, str, tuple, str, torch.Tensor]
    assert converted[3] == 0.5 and type(next(iter(converted))) is int and converted["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, object(), np.array(["a"]), np.arange(3, dtype=np.uint32),
                                   signal.SIGTERM, torch.eye(2).to_sparse(), range(3), slice(1)])
def test_plain_refuses_other_types_naming_the_place(value):
    with pytest.raises(CheckpointError, match=r"state\['outer'\]\[1\]\['inner'\]"):
        plain({"outer": [0, {"inner": value}]})


def test_a_payload_that_is_not_plain_raises_at_save_and_leaves_no_file(tmp_path):
    store, _ = make_store(tmp_path)
    with pytest.raises(CheckpointError, match="PosixPath|WindowsPath"):
        store.save(1, {"where": tmp_path})
    assert list(store.folder.iterdir()) == []


def test_optimizer_state_survives_the_round_trip_and_loads_weights_only(tmp_path):
    def train(model, optimizer, steps):
        for k in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(k + 1))).square().sum().backward()
            optimizer.step()

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    store, _ = make_store(tmp_path)
    model, optimizer = build()
    train(model, optimizer, 3)
    store.save(3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = build()
    payload = store.latest().payload
    other.load_state_dict(payload["model"])
    other_optimizer.load_state_dict(payload["optimizer"])
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# Store


def test_save_names_prunes_and_latest_returns_the_newest(tmp_path):
    store, said = make_store(tmp_path, keep=3)
    for step in (50, 100, 150, 200, 250):
        assert store.save(step, make_payload(step)).name == f"step_{step:09d}.pt"
    found = store.latest()
    assert steps_in(tmp_path) == [150, 200, 250] and found.step == 250 and found.run_id == "mine"
    assert found.payload["model"]["w"].tolist() == [250.0] * 64 and found.payload["metrics"] == {"loss": 0.5, "n": 250}
    assert said == []


def test_newest_is_decided_by_step_not_by_file_time(tmp_path):
    store, _ = make_store(tmp_path)
    for step in (1, 2, 3):
        os.utime(store.save(step, make_payload(step)), (1e9 - step, 1e9 - step))
    assert store.latest().step == 3


def test_a_checkpoint_under_another_steps_name_is_not_believed(tmp_path):
    store, said = make_store(tmp_path)
    for step in (1, 2):
        store.save(step, make_payload(step))
    os.replace(store.path(1), store.path(9))
    assert find_run(tmp_path.parent, str(tmp_path)).step == 2
    assert store.latest().step == 2
    assert "step_000000009.pt is damaged (holds step 1, which is not that of its name)" in said[0]


def test_huge_checkpoints_are_kept_twice_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(model_persistence, "HUGE", 1000)
    store, said = make_store(tmp_path, keep=5)
    for step in range(1, 6):
        store.save(step, make_payload(step))
    assert steps_in(tmp_path) == [4, 5] and len(said) == 1 and "keeping the newest 2" in said[0]


def damage_truncate(data: bytes) -> bytes:
    return data[:len(data) * 2 // 3]


def damage_flip(data: bytes) -> bytes:
    at = data.index(b"\x00\x00\x40\x40" * 8) + 5  # inside the tensor full of 3.0
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


@pytest.mark.parametrize(("damage", "reason"), [
    (damage_truncate, "file ends early"), (damage_flip, "checksum mismatch"), (lambda data: b"", "file is empty"),
    (lambda data: b"<!DOCTYPE html><title>Quota</title>", "a web page"),
    (lambda data: b"\0" * 4096, "not a checkpoint"), (lambda data: data[:-1000] + b"\0" * 1000, "file ends early"),
])
def test_a_damaged_file_falls_back_to_the_older_one_and_is_named(tmp_path, damage, reason):
    store, said = make_store(tmp_path)
    for step in (1, 2, 3):
        path = store.save(step, make_payload(step))
    path.write_bytes(damage(path.read_bytes()))
    assert store.latest().step == 2
    assert len(said) == 1 and reason in said[0] and path.name in said[0] and "using step_000000002.pt" in said[0]
    assert steps_in(tmp_path) == [1, 2] and (store.folder / f"{path.name}.corrupt").exists()


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    store, _ = make_store(tmp_path)
    path = store.save(1, make_payload(1))
    whole, rng = path.read_bytes(), random.Random(0)
    detected = 0
    for _ in range(150):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        try:
            loaded = read_checkpoint(path)
        except CheckpointError:
            detected += 1
        else:  # a bit of padding, which holds nothing
            assert loaded.payload["metrics"] == {"loss": 0.5, "n": 1} and loaded.payload["model"]["w"].eq(1).all()
    assert detected > 50


def test_all_damaged_returns_none_and_deletes_nothing(tmp_path):
    store, said = make_store(tmp_path)
    for step in (1, 2):
        store.save(step, make_payload(step)).write_bytes(b"PK\x03\x04 cut")
    assert store.latest() is None and len(said) == 2
    assert len(list(store.folder.glob("*.corrupt"))) == 2


@pytest.mark.parametrize(("number", "hint"), [(FORMAT + 1, "git pull"), (FORMAT - 1, "start a new run with --fresh")])
def test_another_format_is_refused_and_left_in_place(tmp_path, number, hint):
    store, _ = make_store(tmp_path)
    torch.save({"format": number, "program": "1.4", "run_id": "mine"}, store.path(9))
    with pytest.raises(CheckpointError, match=f"format {number} was written by ARC-EFE 1.4") as caught:
        store.latest()
    assert caught.value.exit_code == 5 and caught.value.hint.startswith(hint) and store.path(9).exists()
    assert not isinstance(caught.value, DamagedError)


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"echo bad > {self.target}",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_pickle_is_refused_without_running(tmp_path, as_zip):
    store, said = make_store(tmp_path)
    store.save(1, make_payload(1))
    target = tmp_path / "touched"
    if as_zip:
        torch.save({"format": FORMAT, "payload": Malice(target)}, store.path(2))
        assert zipfile.is_zipfile(store.path(2))
    else:
        store.path(2).write_bytes(pickle.dumps(Malice(target)))
    assert store.latest().step == 1 and not target.exists() and len(said) == 1
    find_run(tmp_path.parent, str(tmp_path))
    assert not target.exists()


def test_another_runs_checkpoints_are_neither_used_nor_counted_nor_deleted(tmp_path):
    foreign, _ = make_store(tmp_path, run_id="theirs")
    for step in range(1000, 1006):
        foreign.save(step, make_payload(step))
    store, said = make_store(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, make_payload(step))
    assert steps_in(tmp_path) == [2, 3, 1001, 1002, 1003, 1004, 1005]
    assert store.latest().step == 3 and "theirs" in said[0]


def test_set_aside_after_lets_an_older_checkpoint_become_the_latest(tmp_path):
    store, _ = make_store(tmp_path)
    for step in (1, 2, 3, 4):
        store.save(step, make_payload(step))
    assert [path.name for path in store.set_aside_after(2)] == [
        "step_000000004.pt.superseded", "step_000000003.pt.superseded"]
    assert store.latest().step == 2


def test_best_delta_is_a_copy_with_its_own_bytes(tmp_path):
    store, _ = make_store(tmp_path)
    path = store.save(5, make_payload(5))
    best = store.save_best_delta(path)
    assert best.name == "best_delta.pt" and best.stat().st_ino != path.stat().st_ino and best.stat().st_nlink == 1
    path.write_bytes(b"gone")
    assert read_checkpoint(best).step == 5
    store.save_best_delta(make_payload(6), step=6)
    assert read_checkpoint(best).payload["metrics"]["n"] == 6
    assert store.latest() is None  # best_delta.pt is not a step


def test_files_are_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def record_fsync(descriptor):
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def record_unlink(path, missing_ok=False):
        if path.name.startswith("step_"):
            events.append("delete old")
        unlink(path, missing_ok=missing_ok)

    store, _ = make_store(tmp_path, keep=2)
    store.save(1, make_payload(1))
    store.save(2, make_payload(2))
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    monkeypatch.setattr(Path, "unlink", record_unlink)
    store.save(3, make_payload(3))
    assert events == ["sync file", "rename", "sync folder", "delete old"]


class FullDisk:
    """Stands in for torch.save: fails like torch on a full disk, the system's error hidden in the context."""

    def __init__(self, failures):
        self.failures, self.save = failures, torch.save

    def __call__(self, obj, file):
        if self.failures == 0:
            return self.save(obj, file)
        self.failures -= 1
        file.write(b"partial")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - the context, not the cause, is the point


def test_a_full_disk_is_a_warning_keeps_the_last_good_and_leaves_no_temporary(tmp_path, monkeypatch):
    slept = []
    store, said = make_store(tmp_path, sleep=slept.append)
    store.save(1, make_payload(1))
    monkeypatch.setattr(torch, "save", FullDisk(-1))
    for step in range(2, 12):
        assert store.save(step, make_payload(step)) is None
    assert slept == [0.5, 2.0] * 10 and store.failed_saves == 10 and len(said) == 10
    assert "No space left on device" in said[0] and "step_000000001.pt" in said[0] and "training goes on" in said[0]
    assert [path.name for path in store.folder.iterdir()] == ["step_000000001.pt"]
    monkeypatch.undo()
    assert store.save(12, make_payload(12)) and store.failed_saves == 0 and store.latest().step == 12


def test_an_error_that_passes_is_retried_silently(tmp_path, monkeypatch):
    store, said = make_store(tmp_path)
    monkeypatch.setattr(torch, "save", FullDisk(2))
    assert store.save(1, make_payload(1)) is not None and said == [] and store.latest().step == 1


def test_a_failing_sync_publishes_nothing(tmp_path, monkeypatch):
    store, said = make_store(tmp_path)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    assert store.save(1, make_payload(1)) is None and "Input/output error" in said[0]
    assert list(store.folder.iterdir()) == []


def test_too_little_space_gives_up_old_checkpoints_but_never_the_newest_whole_one(tmp_path, monkeypatch):
    store, said = make_store(tmp_path)
    for step in (1, 2, 3, 4):
        store.save(step, make_payload(step))
    store.path(4).write_bytes(b"PK damaged")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert store.save(5, make_payload(5)) is None and "No space left" in said[0]
    assert 3 in steps_in(tmp_path) and 1 not in steps_in(tmp_path)
    assert store.latest().step == 3


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for pid in (child, os.getppid(), os.getpid()):
        (folder / f".tmp-{pid}-step_000000001.pt").write_bytes(b"x")
    make_store(tmp_path)
    assert [path.name for path in folder.iterdir()] == [f".tmp-{os.getppid()}-step_000000001.pt"]


def in_child(action) -> int:
    """Return the pid of a forked child that runs the action and never returns to pytest."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


def save_forever(run_dir: Path, start: int) -> None:
    store = CheckpointStore(run_dir, keep=2, run_id="mine", say=lambda message: None)
    for step in range(start, start + 100_000):
        store.save(step, {"w": torch.full((200_000,), float(step))})


def test_killed_at_any_time_while_saving_a_whole_checkpoint_remains(tmp_path):
    rng, reached = random.Random(1), 0
    make_store(tmp_path)[0].save(0, {"w": torch.zeros(200_000)})
    for _ in range(10):
        child = in_child(lambda start=reached + 1: save_forever(tmp_path, start))
        time.sleep(0.05 + 0.15 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store, said = make_store(tmp_path)
        found = store.latest()
        assert said == [] and found.step >= reached and found.payload["w"].eq(float(found.step)).all()
        assert not list(store.folder.glob(".tmp-*"))
        reached = found.step
    assert reached > 0  # the children did save


@pytest.mark.parametrize("point", ["before rename", "after rename", "before delete"])
def test_killed_at_the_worst_instant_a_whole_checkpoint_remains(tmp_path, point):
    make_store(tmp_path, keep=2)[0].save(1, make_payload(1))
    make_store(tmp_path, keep=2)[0].save(2, make_payload(2))
    replace = os.replace

    def kill(*arguments, **options):
        if point == "after rename":
            replace(*arguments)
        os._exit(9)

    def action():
        if point == "before delete":
            Path.unlink = lambda path, missing_ok=False: os._exit(9) if path.name.startswith("step_") else None
        else:
            os.replace = kill
        make_store(tmp_path, keep=2)[0].save(3, make_payload(3))

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(action), 0)[1]) == 9
    store, said = make_store(tmp_path, keep=2)
    assert store.latest().step == (2 if point == "before rename" else 3) and said == []
    assert not list(store.folder.glob(".tmp-*"))
    store.save(4, make_payload(4))
    assert len(steps_in(tmp_path)) == 2


def test_a_mutated_tensor_does_not_change_its_snapshot_when_written_later(tmp_path):
    store, _ = make_store(tmp_path)
    weight = torch.ones(3)
    taken = snapshot({"w": weight})
    weight.fill_(7)
    store.write(1, taken)
    assert store.latest().payload["w"].tolist() == [1, 1, 1]


# Saving beside training


def make_saver(run_dir: Path, every: int = 2, **options) -> tuple[Saver, list[str]]:
    store, said = make_store(run_dir)
    return Saver(store, run_dir / "best", every, **options), said


def test_saver_writes_what_was_there_when_save_returned(tmp_path):
    saver, said = make_saver(tmp_path)
    weight, tied = torch.ones(1000), {"w": torch.zeros(3)}
    for step in range(1, 6):
        weight.fill_(step)
        saver.save(step, {"a": weight, "b": weight, **tied})
        weight.fill_(-1)
    saver.wait()
    found = {step: read_checkpoint(saver.store.path(step)).payload for step in range(1, 6)}
    assert all(payload["a"].eq(step).all() and payload["b"].eq(step).all() for step, payload in found.items())
    assert all(payload["a"].data_ptr() == payload["b"].data_ptr() for payload in found.values())  # ties stay
    assert said == [] and saver.saved_step == 5


def test_host_copy_uses_its_buffers_again_and_follows_a_tensor_that_grows():
    copy, weight = HostCopy(), torch.arange(4.0)
    first = copy.take({"w": weight, "view": weight[::2]})
    assert first["w"].tolist() == [0, 1, 2, 3] and first["view"].tolist() == [0, 2] and first["view"].is_contiguous()
    weight += 1
    second = copy.take({"w": weight, "view": weight[1:]})
    assert second["w"] is first["w"] and second["w"].tolist() == [1, 2, 3, 4]
    assert second["view"].tolist() == [2, 3, 4]
    assert copy.take({"w": torch.ones(2, dtype=torch.int8)})["w"].dtype == torch.int8


class Gate:
    """Stands in for torch.save: waits until it is opened, then saves."""

    def __init__(self):
        self.save, self.is_open, self.reached = torch.save, threading.Event(), threading.Event()

    def __call__(self, obj, file):
        self.reached.set()
        assert self.is_open.wait(30)
        self.save(obj, file)


def test_a_slow_disk_makes_saves_rarer_and_is_said_once(tmp_path, monkeypatch):
    gate = Gate()
    monkeypatch.setattr(torch, "save", gate)
    saver, said = make_saver(tmp_path, share=0.05)
    assert [saver.is_due(batch) for batch in (1, 2)] == [False, True]
    saver.save(2, make_payload(2))
    assert gate.reached.wait(30) and saver.is_busy()
    assert not any(saver.is_due(batch) for batch in (3, 4, 5, 6))  # one slot: nothing piles up
    gate.is_open.set()
    saver._thread.join()
    saver._last -= 1000  # a long time has gone by since
    assert saver.is_due(7)  # what was put off is made up for
    saver.save(7, make_payload(7))
    saver.wait()
    assert not saver.is_due(9)
    assert len(said) == 1 and said[0].startswith("note: a save takes ") and "--save-share 0" in said[0]


def test_saves_cost_at_most_the_share_and_share_0_keeps_to_the_batches(tmp_path):
    now = [0.0]
    saver, _ = make_saver(tmp_path, share=0.05, clock=lambda: now[0])
    saver.stall = 1.0  # the last one cost a second
    now[0] = 19.9
    assert not saver.is_due(2)
    now[0] = 20.0
    assert saver.is_due(3)  # it was due before, and is 5 % now
    saver.share = 0.0
    now[0] = 0.0
    assert [saver.is_due(batch) for batch in (3, 4, 5, 6)] == [False, True, False, True]


def test_a_save_is_due_when_the_last_one_is_old(tmp_path):
    now = [0.0]
    saver, _ = make_saver(tmp_path, every=1000, minutes=10, clock=lambda: now[0])
    now[0] = 599.0
    assert not saver.is_due(7)
    now[0] = 600.0
    assert saver.is_due(8)


def test_an_unexpected_error_of_the_writer_is_raised_once_on_the_callers_thread(tmp_path, monkeypatch):
    saver, said = make_saver(tmp_path)

    def fail(obj, file):
        raise TypeError("a bug")

    monkeypatch.setattr(torch, "save", fail)
    saver.save(1, make_payload(1))
    with pytest.raises(TypeError, match="a bug"):
        saver.wait()
    saver.wait()
    with pytest.raises(CheckpointError, match="is not plain data"):  # at once, while the caller can name it
        saver.save(2, {"x": object()})
    assert said == [] and steps_in(tmp_path) == []


def test_a_full_disk_in_the_background_is_a_warning_and_best_weights_are_made_up_for(tmp_path, monkeypatch):
    saver, said = make_saver(tmp_path)
    saver.save(1, make_payload(1))
    saver.wait()
    write = model_persistence.write_atomic

    def full(path, action):
        raise OSError(errno.ENOSPC, "No space left on device")

    done = []
    monkeypatch.setattr(model_persistence, "write_atomic", full)
    weights = {"w": torch.full((4,), 7.0)}
    saver.save(2, make_payload(2), best=(weights, {"epoch": 1}), is_best_delta=True, then=lambda: done.append(2))
    weights["w"].fill_(-1)
    saver.wait()
    assert saver.store.failed_saves == 1 and saver.saved_step == 1 and done == []
    assert [line.split(" not saved")[0] for line in said] == ["warning: best weights", "warning: checkpoint of step 2"]
    monkeypatch.setattr(model_persistence, "write_atomic", write)
    saver.save(3, make_payload(3), then=lambda: done.append(3))
    saver.wait()
    assert done == [3] and saver.store.failed_saves == 0 and saver.saved_step == 3
    assert load_best_weights(tmp_path / "best")[0]["w"].tolist() == [7.0] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_finds_one_bad_value_anywhere(value):
    good = [torch.randn(5), torch.full((3,), 3e38), torch.empty(0), torch.tensor([1, 2]), torch.ones(2).bfloat16()]
    assert all_finite(good) and all_finite([])
    for index in (0, 1, 4):
        bad = [tensor.clone() for tensor in good]
        bad[index][-1] = value
        assert not all_finite(bad)


# Best weights


def test_best_weights_round_trip_and_same_bytes_whatever_the_place_and_time(tmp_path):
    tied = torch.randn(3, 2)
    tensors = {"b": tied, "a": tied, "view": torch.arange(10.0)[::2], "half": torch.ones(2, dtype=torch.bfloat16)}
    config = to_dict(TrainConfig())
    elsewhere = {**config, "run": {**config["run"], "name": "other", "out": "far"},
                 "data": {**config["data"], "solutions": str(tmp_path)}}
    for name, settings in (("one", config), ("two", elsewhere)):
        save_best_weights(tmp_path / name, tensors, settings)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    loaded, settings = load_best_weights(tmp_path / "two")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items()) and loaded.keys() == tensors.keys()
    assert settings["agent"] == config["agent"] and str(tmp_path) not in json.dumps(settings)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_best_weights_damaged_or_missing_are_a_clear_error(tmp_path, file):
    save_best_weights(tmp_path, {"w": torch.ones(100)}, {"agent": {"width": 3}})
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_best_weights(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        load_best_weights(tmp_path)


# Lock


def hold_lock(run_dir: Path, ready) -> None:
    RunLock(run_dir).acquire()
    ready.set()
    time.sleep(60)


def test_a_second_process_is_refused_and_a_killed_owner_frees_the_run_at_once(tmp_path):
    run, ready = tmp_path / "arc_complete_x", multiprocessing.get_context("fork").Event()
    child = in_child(lambda: hold_lock(run, ready))
    try:
        assert ready.wait(20)
        with pytest.raises(CheckpointError) as caught:
            RunLock(run).acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert caught.value.exit_code == 4 and caught.value.hint == "stop it, or use another --name"
    assert f"arc_complete_x is being trained by pid {child} on this machine (heartbeat " in str(caught.value)
    with RunLock(run) as lock:  # the heartbeat is a second old, but its process is gone
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_the_lock_is_free_after_release_and_can_be_taken_again(tmp_path):
    lock = RunLock(tmp_path).acquire()
    with pytest.raises(CheckpointError):
        RunLock(tmp_path).acquire()
    lock.release()
    lock.release()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(("age", "refused"), [(0, True), (119, True), (121, False), (1e6, False)])
def test_another_hosts_heartbeat_counts_for_two_minutes(tmp_path, age, refused):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 812, "host": "elsewhere", "heartbeat": 5e6 - age}))
    lock = RunLock(tmp_path, clock=lambda: 5e6)
    if refused:
        with pytest.raises(CheckpointError, match=f"pid 812 on elsewhere \\(heartbeat {age} s ago\\)"):
            lock.acquire()
    else:
        lock.acquire().release()


def test_without_file_locks_a_living_pid_with_a_fresh_heartbeat_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(model_persistence, "fcntl", None)
    dead = in_child(lambda: os._exit(0))
    os.waitpid(dead, 0)
    for pid, refused in ((os.getppid(), True), (dead, False)):
        state = {"pid": pid, "host": socket.gethostname(), "heartbeat": time.time()}
        (tmp_path / ".lock").write_text(json.dumps(state))
        if refused:
            with pytest.raises(CheckpointError):
                RunLock(tmp_path).acquire()
        else:
            RunLock(tmp_path).acquire().release()


def test_heartbeat_moves_on_and_is_written_seldom(tmp_path, monkeypatch):
    now = [1000.0]
    lock = RunLock(tmp_path, clock=lambda: now[0]).acquire()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lock._beaten = 1000.0
    seen = []
    for second in (1001, 1004, 1006, 1008, 1012):
        now[0] = float(second)
        lock.heartbeat()
        seen.append(json.loads(lock.path.read_text())["heartbeat"])
    lock.release()
    assert seen == [1000, 1000, 1006, 1006, 1012]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"heartbeat": "x"}', "null"])
def test_an_unreadable_lock_file_does_not_block(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    RunLock(tmp_path).acquire().release()


# Finding runs


def make_run(out: Path, name: str, status: str | None, steps: tuple[int, ...], saved_at: float, monkeypatch) -> Path:
    store, _ = make_store(out / name, run_id=name)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: saved_at)
        for step in steps:
            store.save(step, make_payload(step))
    if status:
        (out / name / "run.json").write_text(json.dumps({"status": status}))
    return out / name


@pytest.mark.parametrize("word", ["True", "true", "1", "yes", "latest", "auto", True])
def test_find_run_takes_the_newest_unfinished_run_with_a_loadable_checkpoint(tmp_path, monkeypatch, word):
    make_run(tmp_path, "a_old", "interrupted", (5,), 100, monkeypatch)
    wanted = make_run(tmp_path, "b_new", "running", (7, 9), 200, monkeypatch)
    broken = make_run(tmp_path, "c_broken", "running", (3,), 300, monkeypatch)
    for path in (broken / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    make_run(tmp_path, "d_done", "finished", (20,), 400, monkeypatch)
    (tmp_path / "e_empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "LATEST").write_text("e_empty")
    choice = find_run(tmp_path, word)
    assert (choice.path, choice.status, choice.step, choice.run_id) == (wanted, "running", 9, "b_new")
    assert not choice.explicit
    assert steps_in(broken) == [3]  # looking does not rename


def test_find_run_falls_back_to_a_finished_run_and_to_an_older_checkpoint(tmp_path, monkeypatch):
    run = make_run(tmp_path, "done", "finished", (1, 2), 1, monkeypatch)
    (run / "checkpoints" / "step_000000002.pt").write_bytes(b"")
    choice = find_run(tmp_path, "latest")
    assert (choice.status, choice.step) == ("finished", 1)


def test_find_run_accepts_a_folder_a_name_and_a_file(tmp_path, monkeypatch):
    run = make_run(tmp_path, "named", None, (1, 2), 1, monkeypatch)
    make_run(tmp_path, "other", None, (9,), 2, monkeypatch)
    assert find_run(tmp_path, str(run)).step == 2 and find_run(tmp_path, "named").step == 2
    choice = find_run(tmp_path, str(run / "checkpoints" / "step_000000001.pt"))
    assert (choice.path, choice.step, choice.explicit, choice.status) == (run, 1, True, "unknown")


def test_find_run_with_nothing_is_exit_5_but_auto_starts_fresh(tmp_path):
    with pytest.raises(CheckpointError, match="--resume: no run to resume under") as caught:
        find_run(tmp_path, "True")
    assert caught.value.exit_code == 5 and "start one without --resume" in caught.value.hint
    assert find_run(tmp_path, "auto") is None and find_run(tmp_path / "missing", "auto") is None
    for name in "abc":
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"looked at 3: none has a loadable checkpoint"):
        find_run(tmp_path, "latest")
    assert find_run(tmp_path, "auto") is None
    (tmp_path / "a" / "checkpoints" / "step_000000001.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="none has a loadable checkpoint"):
        find_run(tmp_path, "auto")


def test_find_run_explains_a_wrong_name_and_a_damaged_file(tmp_path, monkeypatch):
    run = make_run(tmp_path, "arc_complete_20260101_000000", None, (1,), 1, monkeypatch)
    with pytest.raises(CheckpointError, match="no such run") as caught:
        find_run(tmp_path, "arc_complete_20260101_00000")
    assert "did you mean" in caught.value.hint and caught.value.exit_code == 5
    path = run / "checkpoints" / "step_000000001.pt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged \\(file is empty\\)"):
        find_run(tmp_path, str(path))
    with pytest.raises(CheckpointError, match="has no loadable checkpoint"):
        find_run(tmp_path, str(run))


# Random state


def test_random_state_continues_equally_after_the_round_trip(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()

    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    draw()
    store, _ = make_store(tmp_path)
    store.save(1, {"rng": rng_state()})
    first = draw()
    draw()
    set_rng_state(store.latest().payload["rng"])
    assert draw() == first
