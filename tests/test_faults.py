"""Faults that concern the whole driver: signals at bad moments, changed precision, foreign states, edited data."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, comparable, differences

import model_persistence
import trainloop_complete_with_fixes as driver
from config import ConfigError
from model_persistence import list_checkpoints, read_checkpoint, rng_state, set_rng_state, snapshot

RUN = Path("runs/demo")
SCRIPT = ROOT / "trainloop_complete_with_fixes.py"


def status() -> dict:
    return json.loads((RUN / "run.json").read_text())


# Signals -------------------------------------------------------------------------------------------------------------

SLOW = """
import runpy, sys, time
sys.path.insert(0, sys.argv[1])
import trainloop_complete_with_fixes as driver
from config import parse_command_line
inner = driver.train_step
def slow(system, query, answer, moment):
    if moment.step == 2:
        print("in the batch", flush=True)
        time.sleep(60)
    return inner(system, query, answer, moment)
driver.train_step = slow
sys.exit(driver.main(parse_command_line(sys.argv[2:])))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(number, code, drive, new_flags):
    flags = new_flags("--epochs", 1, "--save-every", 1, "--save-share", 0, "--rl-every", 0)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(ROOT), *flags], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    lines = iter(process.stdout.readline, "")
    assert any("in the batch" in line for line in lines)
    process.send_signal(number)
    assert any("press again to stop at once" in line for line in lines)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code and time.monotonic() - began < 10
    process.stdout.close()
    assert read_checkpoint(list_checkpoints(RUN)[0]).step in (1, 2)  # the save of step 2 may have been cut off
    assert drive("--resume", "--max-hours", "1e-9") == 0


def test_a_signal_while_a_save_is_written_waits_for_it_and_saves_the_last_batch(drive, new_flags, monkeypatch, capsys):
    save, slow = torch.save, threading.Event()

    def slow_save(obj, file):
        if isinstance(obj, dict) and obj.get("step") == 0 and not slow.is_set():
            slow.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        save(obj, file)

    monkeypatch.setattr(torch, "save", slow_save)
    assert drive(*new_flags("--epochs", 1, "--save-every", 1, "--rl-every", 0)) == 143
    assert slow.is_set()
    saved = [read_checkpoint(path).step for path in list_checkpoints(RUN)]
    assert saved[-1] == 0 and saved[0] == status()["step"] >= 1
    assert f"-> step_{saved[0]:09d}.pt" in capsys.readouterr().out


# What must not disturb training --------------------------------------------------------------------------------------


def test_saving_logging_backing_up_and_validating_otherwise_changes_nothing_in_training(reference, drive):
    more = ("--save-every", "1", "--keep", "2", "--log-every", "5", "--eval-every", "2", "--backup", "drive")
    assert drive(*reference.argv, *more) == 0
    usual, _, _ = comparable(reference.path)
    found, _, _ = comparable(RUN)
    for part in ("system", "optimizers", "average", "memory", "rng", "step"):
        assert differences(usual[part], found[part]) == [], part


# Another precision, another device, other parameters -----------------------------------------------------------------


def with_scaler(run: driver.Run, scale: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.runtime = driver.dataclasses.replace(run.runtime, scaler=scaler)
    scaler.scale(torch.zeros(()))


def test_a_loss_scaler_goes_with_the_run_and_starts_afresh_where_there_was_none(build, capsys):
    run = build()
    run.console.quiet = False
    plain = snapshot(driver.checkpoint_payload(run))
    with_scaler(run, 64.0)
    scaled = snapshot(driver.checkpoint_payload(run))
    assert plain["scaler"] is None and scaled["scaler"]["scale"] == 64.0
    with_scaler(run, 1024.0)
    driver.restore(run, scaled)
    assert run.runtime.scaler.get_scale() == 64.0
    with_scaler(run, 1024.0)
    driver.restore(run, plain)
    assert run.runtime.scaler.get_scale() == 1024.0
    assert "the checkpoint was written without a loss scaler; it starts at its default scale" in capsys.readouterr().out
    run.runtime = driver.dataclasses.replace(run.runtime, scaler=torch.amp.GradScaler("cpu", enabled=False))
    driver.restore(run, scaled)
    run.close()


def test_random_states_of_gpus_that_are_not_here_are_left_out():
    state = rng_state()
    expected = torch.rand(3)
    set_rng_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 3})
    assert torch.equal(torch.rand(3), expected)


def test_optimizer_states_of_other_parameters_are_refused_by_name_before_anything_changes(build):
    run = build()
    state = snapshot(run.optimizers.state_dict())
    before = snapshot(run.optimizers.state_dict())
    names = state["adamw"]["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(ConfigError) as caught:
        run.optimizers.load_state_dict(state)
    assert f"optimizer adamw belongs to other parameters (here {names[1]}, there {names[0]})" in str(caught.value)
    assert differences(before, snapshot(run.optimizers.state_dict())) == []
    run.close()


@pytest.mark.parametrize("train_llm", ["last:1", "lora"])
def test_a_base_model_that_changed_in_its_folder_is_refused(train_llm, drive, new_flags, capsys):
    from qwen_hybrid_prompt import build_tiny_qwen

    build_tiny_qwen("qwen")
    flags = new_flags("--model", "qwen", "--train-llm", train_llm, "--epochs", 1, "--max-batches", 2)
    assert drive(*flags) == 0
    build_tiny_qwen("qwen", seed=1)
    assert drive("--resume", "--epochs", 2) == 4
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: the frozen weights of ") and hint.startswith("hint: put back the model")
    build_tiny_qwen("qwen")
    assert drive("--resume", "--epochs", 2) == 0


# Data and places -----------------------------------------------------------------------------------------------------


def test_a_task_that_was_edited_is_refused(reference, drive, task_folder, capsys, tmp_path):
    edited = shutil.copytree(task_folder, tmp_path / "tasks")
    flags = [str(edited) if word == str(task_folder) else word for word in reference.argv]
    assert drive(*flags, "--epochs", 1, "--max-batches", 1) == 0
    path = next(edited.iterdir())
    task = json.loads(path.read_text())
    task["train"][0]["output"][0][0] = (task["train"][0]["output"][0][0] + 1) % 10
    path.write_text(json.dumps(task))
    capsys.readouterr()
    assert drive("--resume", "--epochs", 2) == 2
    assert "error: the tasks have changed since the run began" in capsys.readouterr().err


def test_a_run_folder_that_was_copied_elsewhere_goes_on_there_with_the_same_bits(reference, drive, tmp_path):
    copy = shutil.copytree(reference.path, tmp_path / "elsewhere" / "demo")
    for path in list_checkpoints(copy)[:4]:
        path.unlink()
    assert drive("--resume", str(copy)) == 0
    assert differences(comparable(reference.path), comparable(copy)) == []
    assert not Path("runs").exists()


def test_every_checkpoint_damaged_is_exit_5_and_deletes_nothing(reference, drive, tmp_path, capsys):
    copy = shutil.copytree(reference.path.parent, tmp_path / "runs") / "demo"
    for path in list_checkpoints(copy):
        path.write_bytes(path.read_bytes()[:-100])
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert drive("--resume") == 5
    assert "none has a loadable checkpoint" in capsys.readouterr().err
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == names


def test_a_run_folder_that_becomes_read_only_is_a_warning(build, monkeypatch, capsys):
    run = build("--save-every", "1")
    run.console.quiet = False
    driver.save(run)
    run.saver.wait()
    opened = io.open

    def refuse(file, mode="r", *more, **options):  # as the system does, also to root
        if "w" in mode and RUN.absolute() in Path(str(file)).absolute().parents:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(file, mode, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(model_persistence, "RETRY_SECONDS", (0.0, 0.0))
        run.state.step = 1
        driver.save(run)
        run.saver.wait()
    assert run.store.failed_saves == 1 and [path.name for path in list_checkpoints(RUN)] == ["step_000000000.pt"]
    assert "checkpoint of step 1 not saved (Read-only file system)" in capsys.readouterr().out
    driver.save(run)
    run.saver.wait()
    assert run.store.failed_saves == 0 and run.saver.saved_step == 1
    run.close()


def test_a_full_disk_costs_no_line_of_the_metrics_once_there_is_room_again(build, monkeypatch):
    run = build()
    run.log.append({"n": 0})

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:5])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    file = run.log._file
    run.log._file = Full(file)
    run.log.append({"n": 1})
    run.log.append({"n": 2})
    run.log._file = file
    run.log.append({"n": 3})
    lines = (RUN / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1, 2, 3]
    run.close()


def test_disk_full_while_notes_are_written_is_a_warning_and_training_goes_on(drive, new_flags, monkeypatch, capsys):
    written = []

    def full(path, text):
        written.append(path.name)
        raise OSError(28, "No space left on device")

    run_session = driver.run_session

    def session(run, *arguments):
        train = driver.train
        with monkeypatch.context() as patch:
            patch.setattr(driver, "train", lambda run: (patch.setattr("report.write_text_atomic", full), train(run))[1])
            return run_session(run, *arguments)

    monkeypatch.setattr(driver, "run_session", session)
    assert drive(*new_flags("--epochs", 1, "--max-batches", 2)) == 0
    assert {"run.json", "epochs.csv"} <= set(written)
    assert "warning: epochs.csv not written (No space left on device); training goes on" in capsys.readouterr().err
    assert read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]["validated"]
    assert model_persistence.list_checkpoints(RUN)[0].name == "step_000000002.pt"
