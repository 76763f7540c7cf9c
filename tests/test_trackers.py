"""Where --report-to sends the records of metrics.jsonl: what arrives, after a resume too, and what a failure costs.

The packages are stand-ins that keep what they get; the one real test needs tensorboard.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import trackers
import trainloop_complete_with_fixes as driver
from report import read_metrics
from trackers import Hosted, TensorBoard, Tracker, make_tracker, scalars, wandb_mode

RUN = Path("runs/demo")


@pytest.fixture
def stand_in(monkeypatch):
    """Return a function that puts a module of a name in the place of a package."""

    def put(name: str, **content: object) -> ModuleType:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="stand-in")
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


class KeepingRun:
    """A run of wandb or trackio that keeps all that is logged as (step, name) -> values."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], list[float]] = {}
        self.opened: list[dict] = []
        self.defined: list[tuple] = []
        self.finished = 0

    def init(self, **how):
        self.opened.append(how)
        return self

    def log(self, numbers, step=None):
        step = numbers.pop("step") if step is None else step
        for name, value in numbers.items():
            self.kept.setdefault((step, name), []).append(value)

    def define_metric(self, *words, **more):
        self.defined.append((*words, *more.values()))

    def finish(self):
        self.finished += 1


@pytest.fixture
def trackio(stand_in) -> KeepingRun:
    """Return what a stand-in for trackio gets."""
    run = KeepingRun()
    stand_in("trackio", init=run.init)
    return run


@pytest.fixture
def wandb(stand_in, monkeypatch) -> KeepingRun:
    """Return what a stand-in for wandb gets."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    run = KeepingRun()
    stand_in("wandb", init=run.init, Settings=SimpleNamespace)
    return run


@pytest.fixture
def events(stand_in) -> dict[tuple[int, str], list[float]]:
    """Return what TensorBoard shows of the files that a stand-in for its writer has written."""
    shown: dict[tuple[int, str], list[float]] = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step, flush_secs):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / f"events.{len(list(Path(folder).iterdir()))}").touch()
            for key in [key for key in shown if purge_step is not None and key[0] >= purge_step]:
                del shown[key]

        def add_scalar(self, name, value, step, walltime):
            shown.setdefault((step, name), []).append(value)

        def close(self):
            pass

    stand_in("tensorboard")
    stand_in("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return shown


def expected(path: Path) -> dict[tuple[int, str], list[float]]:
    """Return all numbers of a metrics.jsonl by (step, name)."""
    found: dict[tuple[int, str], list[float]] = {}
    for record in read_metrics(path):
        for name, value in scalars(record).items():
            found.setdefault((record["step"], name), []).append(value)
    return found


def batch(step: int, loss: float = 1.0) -> dict:
    return {"t": float(step), "event": "batch", "epoch": 0, "batch": step, "step": step, "efe_loss": loss}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# What arrives ---------------------------------------------------------------------------------------------------------


def test_numbers_of_each_kind_of_record():
    assert scalars({**batch(3), "reward": None, "qwen_grad": float("inf")}) == {
        "batch/efe_loss": 1.0, "batch/qwen_grad": float("inf")}  # fmt: skip
    assert scalars({"event": "epoch", "step": 3, "epoch": 0, "val_exact": 2, "base_prior_names": "a (1)"}) == {
        "epoch/val_exact": 2.0}  # fmt: skip
    assert scalars({"event": "flag", "step": 3, "flag": "COPYING", "raised": True}) == {"flag/COPYING": 1.0}


def test_no_step_comes_twice_after_a_resume(trackio, build):
    run = build("--report-to", "trackio")
    run.log.append(batch(1))
    payload = driver.checkpoint_payload(run)
    payload["loop"]["step"] = 1
    run.log.append(batch(2))
    run.log.append({"event": "epoch", "epoch": 0, "step": 2, "val_exact": 3})
    driver.restore(run, payload)
    assert expected(RUN / "metrics.jsonl").keys() == {(1, "batch/efe_loss")}
    for step in (2, 3):
        run.log.append(batch(step))
    run.close()
    assert trackio.finished == 1 and len(trackio.opened) == 1
    assert trackio.kept == {**expected(RUN / "metrics.jsonl"), (2, "epoch/val_exact"): [3.0]}
    assert trackio.opened[0]["config"]["run"]["report_to"] == "trackio"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_was_cut_and_what_never_arrived_comes_once(name, events, wandb, trackio, tmp_path):
    shown = {"tensorboard": events, "wandb": wandb.kept, "trackio": trackio.kept}[name]
    old = [batch(1), batch(2), {"event": "epoch", "step": 2, "epoch": 0, "val_exact": 1}, batch(3), batch(4)]
    tracker = make_tracker(name, tmp_path, {"lr": 1.0}, pytest.fail)
    for record in old[:-1]:  # the last one was lost in a kill
        tracker.send(record)
    tracker.close()
    metrics = write(tmp_path / "metrics.jsonl", old[:2])  # cut before the validation of step 2
    tracker = make_tracker(name, tmp_path, {"lr": 1.0}, pytest.fail)
    tracker.go_back(2, metrics)
    for record in (old[2], batch(3), batch(4), {"event": "flag", "step": 4, "flag": "COPYING", "raised": True}):
        tracker.send(record)
    tracker.close()
    assert sorted(shown) == [(1, "batch/efe_loss"), (2, "batch/efe_loss"), (2, "epoch/val_exact"),
                             (3, "batch/efe_loss"), (4, "batch/efe_loss"), (4, "flag/COPYING")]  # fmt: skip
    assert all(len(values) == 1 for values in shown.values())


def test_tensorboard_shows_the_numbers_of_the_second_try_and_the_others_keep_the_first(events, trackio, tmp_path):
    for name, shown, kept in (("tensorboard", events, 9.0), ("trackio", trackio.kept, 1.0)):
        tracker = make_tracker(name, tmp_path, {}, pytest.fail)
        for step in (1, 2):
            tracker.send(batch(step))
        tracker.go_back(1, write(tmp_path / "metrics.jsonl", [batch(1)]))  # a rollback within the session
        tracker.send(batch(2, 9.0))
        tracker.close()
        assert shown == {(1, "batch/efe_loss"): [1.0], (2, "batch/efe_loss"): [kept]}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_named_at_a_resume_gets_the_whole_history(name, events, wandb, tmp_path):
    tracker = make_tracker(name, tmp_path, {}, pytest.fail)
    tracker.go_back(2, write(tmp_path / "metrics.jsonl", [batch(1), batch(2)]))
    tracker.send(batch(3))
    tracker.close()
    shown = events if name == "tensorboard" else wandb.kept
    assert Counter(step for step, _ in shown) == {1: 1, 2: 1, 3: 1}


def test_two_folders_of_one_name_are_two_runs_and_a_damaged_state_is_a_third(wandb, tmp_path):
    for place in ("a", "b", "b"):
        folder = tmp_path / place / "de:mo"
        folder.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(Hosted("wandb", folder, {}), "wandb", pytest.fail)
        tracker.send(batch(1))
        tracker.close()
        (folder / "trackers.json").write_text('{"wandb": {"id": 3}}')
    ids = [how["id"] for how in wandb.opened]
    assert len(set(ids)) == 3 and all(name.startswith("de-mo-") for name in ids)
    assert ("*", "step") in wandb.defined and wandb.opened[0]["name"] == "de:mo"


def test_wandb_never_asks_for_a_key(wandb, monkeypatch, tmp_path):
    assert wandb_mode() == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password none\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "none")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


# What a failure costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_refused_before_anything_is_written(name, drive, new_flags, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert drive(*new_flags("--report-to", name)) == 4
    assert capsys.readouterr().err == (
        f"error: --report-to {name} needs the package {name}\nhint: pip install {name}, or --report-to none\n"
    )
    assert not Path("runs").exists()


def test_a_folder_named_as_the_package_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(trackers.TrackerError, match="needs the package trackio"):
        trackers.require_tracker("trackio")


def test_a_tracker_that_fails_warns_once_and_is_off(trackio, tmp_path, monkeypatch):
    calls, warnings = [], []

    def fail(*_, **__):
        calls.append(1)
        raise ConnectionError("gone")

    monkeypatch.setattr(trackio, "log", fail)
    tracker = make_tracker("trackio", tmp_path, {}, warnings.append)
    for step in (1, 2, 3):
        tracker.send(batch(step))
    tracker.close()
    tracker.send(batch(4))
    assert len(calls) == 1
    assert warnings == ["--report-to trackio failed (ConnectionError: gone); it is off until the next session,"
                        " training goes on"]  # fmt: skip


def test_a_tracker_that_hangs_holds_nothing_up(trackio, tmp_path, monkeypatch):
    released, warnings = threading.Event(), []
    monkeypatch.setattr(trackio, "log", lambda *_, **__: released.wait(10))
    tracker = make_tracker("trackio", tmp_path, {}, warnings.append)
    began = time.monotonic()
    for step in range(1000):
        tracker.send(batch(step))
    tracker.close(patience=0.05)
    released.set()
    assert time.monotonic() - began < 5
    assert warnings == ["--report-to trackio has not finished in 0.05 s; it may lack the last records"]


def test_a_damaged_log_costs_the_history_only(trackio, tmp_path):
    warnings = []
    (tmp_path / "metrics.jsonl").write_text("{\n")
    tracker = make_tracker("trackio", tmp_path, {}, warnings.append)
    tracker.go_back(5, tmp_path / "metrics.jsonl")
    tracker.send(batch(6))
    tracker.close()
    assert list(trackio.kept) == [(6, "batch/efe_loss")]
    assert len(warnings) == 1 and "is damaged" in warnings[0] and "before step 5" in warnings[0]


def test_without_the_flag_nothing_is_started(tmp_path):
    tracker = make_tracker("none", tmp_path, {}, pytest.fail)
    before = threading.active_count()
    tracker.send(batch(1))
    tracker.go_back(1, tmp_path / "none")
    tracker.close()
    assert threading.active_count() == before and not list(tmp_path.iterdir())


# The real one ---------------------------------------------------------------------------------------------------------


def test_files_of_the_real_tensorboard_hold_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = tmp_path / "metrics.jsonl"
    for session, steps in enumerate([(1, 2, 3), (3, 4)]):
        tracker = Tracker(TensorBoard(tmp_path), "tensorboard", pytest.fail)
        if session:
            tracker.go_back(2, write(metrics, [batch(1), batch(2)]))
        for step in steps:
            tracker.send(batch(step, 10.0 * session + step))
        tracker.close()
    shown = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("batch/efe_loss")
    assert [(event.step, event.value) for event in shown] == [(1, 1.0), (2, 1.0), (3, 13.0), (4, 14.0)]
