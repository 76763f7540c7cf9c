"""The driver as its users meet it: command lines, bad input, the run folder, printed lines, signals, and resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, comparable, differences, small_config

import evaluate
import trainloop_complete_with_fixes as driver
from arc_data import Segment, TaskSampler, collate, test_contexts
from arc_system import ARCSystem, learning_rate_scale
from config import TrainConfig, from_dict, resolve
from model_persistence import list_checkpoints, load_best_weights, read_checkpoint, rng_state
from report import read_epochs, read_metrics

SCRIPT = ROOT / "trainloop_complete_with_fixes.py"
RUN = Path("runs/demo")


def status() -> dict:
    """Return run.json of the run named demo in the current folder."""
    return json.loads((RUN / "run.json").read_text())


def records(event: str) -> list[dict]:
    """Return the records of one kind that the run named demo has written."""
    return [record for record in read_metrics(RUN / "metrics.jsonl") if record["event"] == event]


@pytest.fixture
def finished(reference, drive, tmp_path) -> Path:
    """Return a copy of the finished run, in runs/ of the current folder."""
    shutil.copytree(reference.path.parent, tmp_path / "runs")
    return tmp_path / "runs" / "demo"


@pytest.fixture
def interrupt_at(monkeypatch):
    """Return a function that lets a signal come during the batch of a global step."""
    train_step = driver.train_step

    def at(step: int, number: int) -> None:
        def interrupted(system, query, answer, moment):
            if moment.step == step:
                os.kill(os.getpid(), number)
            return train_step(system, query, answer, moment)

        monkeypatch.setattr(driver, "train_step", interrupted)

    return at


# 1. The command line -------------------------------------------------------------------------------------------------

PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules, "transformers" in sys.modules)
"""


def probe(*argv: str) -> subprocess.CompletedProcess:
    """Return how the script ended; its last line says whether it has imported torch and transformers."""
    command = [sys.executable, "-c", PROBE, str(SCRIPT), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_help_answers_without_importing_torch():
    done = probe("--help")
    assert done.returncode == 0
    assert done.stdout.endswith("False False\n")
    for words in ("--resume [RUN]", "--epochs", "--device", "exit codes:", "130"):
        assert words in done.stdout


def test_unknown_option_is_refused_with_a_guess_before_torch_is_loaded():
    done = probe("--batch-sizes", "3")
    assert done.returncode == 2
    assert done.stderr == "error: unknown option --batch-sizes\nhint: did you mean --batch-size?\n"
    assert done.stdout == "False False\n"


# 2. A dry run (bad input is in test_messages.py) ---------------------------------------------------------------------


def test_dry_run_does_one_batch_and_one_save_and_keeps_nothing(drive, new_flags, capfd):
    assert drive(*new_flags("--dry-run", "--backup", "copy")) == 0
    said = r"dry run: one batch \(loss \d+\.\d{3}, step taken\) and one save \([\d.]+ [kM]B\) work; nothing is kept"
    out, err = capfd.readouterr()
    assert re.search(said, out) and err == "" and "pad_token" not in out
    assert list(Path("runs").iterdir()) == [] and not Path("copy").exists()
    assert drive("--resume") == 5
    assert "no run to resume" in capfd.readouterr().err


def test_a_run_that_cannot_compile_says_so_and_goes_on(drive, new_flags, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", refuse)
    assert drive(*new_flags("--compile", "--epochs", 1, "--max-batches", 1)) == 0
    note = "note: --compile does not work here, so nothing is compiled (RuntimeError: no compiler)"
    out, _ = capfd.readouterr()
    assert note in out and "compiled  " not in out


def test_signal_ends_a_validation_and_a_resume_validates_anew(drive, new_flags, monkeypatch, tmp_path):
    flags = new_flags("--epochs", 1, "--max-batches", 1)

    def interrupted(system, runtime, items, cells, tick, *rest):
        signal.raise_signal(signal.SIGINT)
        tick(1)
        raise AssertionError("the validation went on")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "validate", interrupted)
        assert drive(*flags) == 130
    status = json.loads((RUN / "run.json").read_text())
    assert (status["status"], status["epoch"], status["batch"]) == ("interrupted", 0, 1)
    assert not read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]["validated"]
    assert drive("--resume") == 0
    stopped = comparable(RUN)
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert drive(*flags) == 0
    assert differences(stopped, comparable(RUN)) == []


def test_length_of_a_run_is_told_once_and_a_smoke_run_says_what_is_next(drive, new_flags, monkeypatch, capsys):
    monkeypatch.setattr(driver.Pace, "is_known", property(lambda pace: pace.count >= 2))
    monkeypatch.setattr(driver.Pace, "seconds", 0.5)
    flags = new_flags("--smoke", "--epochs", 2, "--max-batches", 3, "--eval-every", 2, "--refine", "none")
    assert drive(*flags) == 0
    printed = capsys.readouterr().out
    told = re.findall(r"^time      (\S+) s per batch: .* per epoch, about .* left, without validation$", printed, re.M)
    assert len(told) == 1 and float(told[0]) > 0
    line = f"python {SCRIPT.name} --epochs"
    assert f"next      {line} 20 --device cuda\nno GPU    {line} 1\n" in printed


# 3. The run folder and the printed lines -----------------------------------------------------------------------------


def test_run_folder_holds_every_file(reference):
    files = {"config.json", "env.json", "run.json", "run.log", "metrics.jsonl", "epochs.csv", "checkpoints", "best"}
    assert {path.name for path in reference.path.iterdir()} >= files
    assert {path.name for path in (reference.path / "best").iterdir()} == {"model.safetensors", "config.json"}
    assert (reference.path.parent / "LATEST").read_text() == "demo\n"
    steps = [f"step_{step:09d}.pt" for step in (0, 3, 6, 7, 10, 13, 14)]  # every third batch, each epoch's last
    assert sorted(path.name for path in (reference.path / "checkpoints").iterdir()) == ["best_delta.pt", *steps]
    assert all(path.stat().st_nlink == 1 for path in (reference.path / "checkpoints").iterdir())
    state = json.loads((reference.path / "run.json").read_text())
    assert (state["status"], state["epoch"], state["step"]) == ("finished", 1, 14)
    config = json.loads((reference.path / "config.json").read_text())
    settings = config["config"]
    assert settings["prompt"]["revision"] == "tiny-v1" and settings["agent"]["width"] == 32 and config["data_hash"]
    (session,) = json.loads((reference.path / "env.json").read_text())
    assert session["device"] == "cpu" and session["packages"]["torch"]
    rows = read_epochs(reference.path / "epochs.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"] and [row["step"] for row in rows] == ["7", "14"]
    compared = {f"val_{name}{end}" for name in ("exact", "unsure_exact", "two_exact") for end in ("", "_prior", "_low")}
    assert rows[0].keys() >= compared | {"val_at_once", "val_at_once_exact", "val_potential_prior", "val_skill"}


def test_metrics_records_say_where_they_stand(reference):
    records = read_metrics(reference.path / "metrics.jsonl")
    found = [(r["event"], r["epoch"], r.get("batch"), r["step"]) for r in records]
    expected = [(e, b) for e in (0, 1) for b in (2, 4, 6, 7, None)]
    assert found == [("batch" if b else "epoch", e, b, 7 * e + (b or 7)) for e, b in expected]
    assert all(r["skipped"] == 0 and r["qwen_grad"] > 0 for r in records if r["event"] == "batch")


def test_printed_lines_have_the_documents_shape(reference):
    lines = reference.printed.splitlines()
    assert "[OK] All models created" in lines
    number = r"\d+\.\d{3}"
    batch = (
        rf"\[Batch {{4}}(\d)\] EFE_Loss: {number} \| Reward: [+-]{number} \| Qwen_grad: \d\.\d\de[+-]\d\d"
        rf" \| Mask: {number}"
    )
    logged = [re.fullmatch(batch, line) for line in lines if line.startswith("[Batch")]
    assert [match[1] for match in logged] == list("24672467")
    for epoch in (0, 1):
        start = lines.index(f"Epoch {epoch} Summary:")
        shapes = (
            rf"  Average EFE Loss: {number}",
            r"  Average RL Reward: [+-]\d\.\d{4}",
            r"  Qwen Gradient Norm: \d\.\d\de[+-]\d\d \(FIX #1\)",
            r"  Val Accuracy: [01]\.\d{4} \(\d+/8\)",
            r"  Accuracy Delta: [+-]\d\.\d{4} \(FIX #2\)",
        )
        for shape, line in zip(shapes, lines[start + 1 : start + 6], strict=True):
            assert re.fullmatch(shape, line), line
        assert re.fullmatch(r"  Val Accuracy \(2 attempts\): [01]\.\d{4} \(\d+/8\), 1 view", lines[start + 6])
        assert lines[start + 7].startswith("  Terms: risk ")
        assert re.fullmatch(rf"  Cells \(true size\): {number} \| copy-input {number} \| one-colour {number}"
                            rf" \| demo prior {number}", lines[start + 8])  # fmt: skip
        gained = r"[+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]"
        assert re.fullmatch(rf"  Refinement: cells {gained} \| nats per cell {gained}", lines[start + 10])
        beside = r"(\d+) of (\d) \| demo prior (\d+) \| difference ([+-]\d) \[[+-]\d, [+-]\d\]"
        places = ("beside the prior", "where the prior is unsure", "at two attempts", "of the candidates, judged",
                  "of two candidates, judged")  # fmt: skip
        compared = [
            re.fullmatch(rf"  Exact {where}: {beside}", line)
            for where, line in zip(places, lines[start + 12 : start + 17], strict=True)
        ]
        assert all(int(m[1]) - int(m[3]) == int(m[4]) for m in compared)
        assert int(compared[0][1]) <= int(compared[2][1]) and compared[0][2] == compared[2][2] == "8"
        at_once = re.fullmatch(r"  Answered at once by the prior: (\d) of 8, \d right \| planner there \d",
                               lines[start + 17])  # fmt: skip
        assert int(at_once[1]) + int(compared[1][2]) == 8
        assert re.fullmatch(rf"  Potential: {number} \| demo prior {number} \| over the prior [+-]{number}"
                            rf" \| skill [+-]{number}", lines[start + 18])  # fmt: skip
    log = (reference.path / "run.log").read_text()
    assert all(line in log for line in lines if line.startswith(("[", "Epoch", "  ")))
    assert reference.printed.isascii()


def all_predictions(system: ARCSystem, tasks) -> list[dict]:
    """Return what the system answers to every test pair, batch by batch."""
    system.eval()
    contexts = [context for context, _ in test_contexts(tasks, {task.id: i for i, task in enumerate(tasks)})]
    runtime = driver.choose_runtime(torch.device("cpu"), "auto")
    batches = [evaluate.predict(system, collate(contexts[i : i + 3])[0], runtime) for i in range(0, len(contexts), 3)]
    names = ("grid", "second", "unrefined", "planned", "embedding", "steps")
    return [{name: getattr(p, name) for name in names} for p in batches]


def test_best_weights_predict_what_the_averaged_weights_predict(reference, tasks):
    weights, facts = load_best_weights(reference.path / "best")
    settings = {name: value for name, value in facts["config"].items() if name != "seed"}
    loaded = ARCSystem(resolve(from_dict(TrainConfig, settings), "cpu"), facts["num_tasks"])
    loaded.import_state(weights, facts)

    epoch = json.loads((reference.path / "run.json").read_text())["best"]["epoch"]
    payload = read_checkpoint(reference.path / "checkpoints" / f"step_{7 * (epoch + 1):09d}.pt").payload
    trained = ARCSystem(small_config(), len(tasks))
    trained.load_checkpoint_state(payload["system"])
    trained.memory.load_state_dict(payload["memory"])
    trained.lessons.load_state_dict(payload["lessons"])
    live = all_predictions(trained, tasks)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(payload["average"]["shadow"][name])
    averaged = all_predictions(trained, tasks)
    assert differences(averaged, all_predictions(loaded, tasks)) == []
    assert differences(averaged, live)  # so the test would notice the wrong ones


def test_what_a_library_draws_at_its_first_import_leaves_no_trace(build, monkeypatch):
    """Of two processes only one may import it while the system is built; both have to go on from the same numbers."""
    build()
    plain, system = rng_state(), driver.ARCSystem

    def drawing(*args):
        random.getrandbits(24)
        return system(*args)

    monkeypatch.setattr(driver, "ARCSystem", drawing)
    build("--name", "other")
    assert rng_state()["python"] == plain["python"]


def test_best_weights_name_no_place_and_no_run(reference, task_folder):
    text = (reference.path / "best" / "config.json").read_text()
    assert str(task_folder.parent) not in text
    assert "demo" not in text and '"out"' not in text


def test_best_weights_are_those_of_the_best_validation_whatever_the_training_says(build):
    run, kept = build(), -1
    name, shadow = run.average.live[0][0], run.average.shadow[0]
    story = [  # exact, cells, loss and share of wrong cells in training, whether these weights are the best so far
        (3, 0.7, 2.0, 0.5, True),
        (2, 0.9, 0.1, 0.0, False),  # training has never been better
        (3, 0.7, 1.0, 0.2, False),  # as good as before: the earlier ones stay
        (3, 0.8, 9.0, 0.9, True),
        (4, 0.1, 99.0, 1.0, True),  # nor ever worse
        (0, 1.0, 0.0, 0.0, False),
    ]
    for epoch, (exact, cells, loss, wrong, is_best) in enumerate(story):
        run.state.epoch = epoch
        run.state.epoch_sums = {key: torch.tensor(x) for key, x in (("count", 1.0), ("loss", loss), ("mask", wrong))}
        with torch.no_grad():
            shadow.fill_(epoch)
        scores = {"outputs": 8, "exact": exact, "cells_predicted": cells, "accuracy_delta": 0.0}
        driver.save(run, *driver.keep_best(run, scores))
        run.saver.wait()
        kept = epoch if is_best else kept
        weights, _ = load_best_weights(run.folder.best)
        assert (weights[name] == kept).all() and run.state.best["epoch"] == kept, epoch
    run.close()


# 4. Limits -----------------------------------------------------------------------------------------------------------


def test_max_batches_limits_every_epoch(drive, new_flags, capsys):
    assert drive(*new_flags("--max-batches", 2, "--epochs", 2, "--batch-size", 1, "--rl-every", 0)) == 0
    assert status()["step"] == 4
    printed = capsys.readouterr().out
    assert printed.count("[Batch    2]") == 2 and printed.count("[Batch") == 2
    assert "Epoch 1 Summary:" in printed


def test_max_hours_pauses_after_the_batch(drive, new_flags, capsys):
    assert drive(*new_flags("--max-hours", "1e-9", "--epochs", 1)) == 0
    assert (status()["status"], status()["step"]) == ("paused", 1)
    printed = capsys.readouterr().out
    assert "saved     epoch 0, batch 1 -> step_000000001.pt" in printed
    assert "continue  python trainloop_complete_with_fixes.py --resume" in printed
    assert list_checkpoints(RUN)[0].name == "step_000000001.pt"


@pytest.fixture
def clock(monkeypatch):
    """Let a batch take ten seconds and a validation thirty, and let the pace be known after three batches."""
    validate, validations = driver.run_validation, []

    def run_validation(run, last=False):
        validations.append(last)
        scores = validate(run, last)
        run.validation_seconds = 30.0
        return scores

    def seconds_left(run):
        hours = run.config.run.max_hours
        return hours * 3600 - 10 * (run.state.step - run.began) - 30 * len(validations) if hours else math.inf

    resume = driver.resume_from_checkpoint

    def resumed(run, chosen):
        found = resume(run, chosen)
        run.began = run.state.step
        return found

    monkeypatch.setattr(driver.Run, "began", 0, raising=False)
    monkeypatch.setattr(driver.Run, "seconds_left", seconds_left)
    monkeypatch.setattr(driver.Pace, "is_known", property(lambda pace: pace.count >= 3))
    monkeypatch.setattr(driver.Pace, "seconds", 10.0)
    monkeypatch.setattr(driver, "foretell_validation", lambda run: (30.0, 0.0))
    monkeypatch.setattr(driver, "run_validation", run_validation)
    monkeypatch.setattr(driver, "resume_from_checkpoint", resumed)
    return validations


def test_max_hours_ends_with_a_low_learning_rate_and_a_validation_inside_the_time(drive, new_flags, clock, capsys):
    """180 seconds hold seven batches, a validation, five batches of the second epoch, and a last validation."""
    flags = ("--max-hours", 0.05, "--epochs", 10, "--log-every", 1, "--rl-every", 0)
    assert drive(*new_flags(*flags)) == 0
    printed = capsys.readouterr().out
    assert "time      10.00 s per batch: 1 min 10 s per epoch, 30 s per validation; 1.7 of 10 epochs in 3 min, and" \
        " the learning rate falls towards that end" in printed  # fmt: skip
    assert (status()["status"], status()["epoch"], status()["batch"]) == ("paused", 1, 5) and clock == [False, True]
    assert re.search(r"Epoch 1 Summary:\n(.*\n)+?  Val Accuracy \(2 attempts\): 0\.\d{4} \(\d/8\), 1 view\n", printed)
    assert "Time: 1 min 10 s training" not in printed.split("Epoch 1 Summary:")[1]  # it is not over
    rates = [record["lr"] for record in records("batch")]
    optim = small_config().optim
    expected = [optim.lr * learning_rate_scale(k, 12, optim.warmup, optim.decay) for k in range(12)]
    assert rates[4:] == pytest.approx(expected[4:]) and rates[-1] < 0.4 * max(rates)
    best = json.loads((RUN / "run.json").read_text())["best"]

    assert drive("--resume", "--max-hours", 0, "--epochs", 2) == 0
    printed = capsys.readouterr().out
    assert "note: the learning rate's factor is" in printed and "epoch 1, batch 5/7" in printed
    assert [record["epoch"] for record in records("epoch")] == [0, 1] and status()["step"] == 14
    assert (status()["best"]["exact"], status()["best"]["cells_predicted"]) >= (best["exact"], best["cells_predicted"])


def test_max_hours_ends_after_an_epoch_when_no_other_fits(drive, new_flags, clock, capsys):
    assert drive(*new_flags("--max-hours", 140 / 3600, "--epochs", 10, "--rl-every", 0)) == 0
    assert (status()["status"], status()["epoch"], status()["batch"]) == ("paused", 0, 7) and clock == [True]
    printed = capsys.readouterr().out
    assert "Epoch 0 Summary:" in printed and "Epoch 1" not in printed


def test_max_hours_too_short_for_a_validation_says_so(drive, new_flags, clock, capsys):
    assert drive(*new_flags("--max-hours", 32 / 3600, "--epochs", 10, "--rl-every", 0)) == 0
    assert "too short for a validation at its end" in capsys.readouterr().out
    assert (status()["status"], status()["batch"]) == ("paused", 4) and clock == []


def test_the_last_validation_has_the_views_vote(drive, new_flags, capsys):
    """A vote of one view is what a validation does anyway; of four views every epoch but the last knows nothing."""
    flags = ("--views", 4, "--epochs", 2, "--max-batches", 1, "--rl-every", 0)
    assert drive(*new_flags(*flags)) == 0
    first, last = records("epoch")
    assert "val_voted_exact" not in first and last["val_views"] == 4
    assert 0 <= last["val_voted_exact"] <= last["val_voted_two_exact"] <= last["val_outputs"] == 8
    found = last["val_voted_two_exact"]
    assert f"Val Accuracy (2 attempts): {found / 8:.4f} ({found}/8), vote of 4 views" in capsys.readouterr().out


# 5. Resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_own_settings_and_says_so(drive, new_flags, tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"run": {"seed": 5}, "optim": {"lr": 0.01}}')
    assert drive(*new_flags("--config", "settings.json", "--epochs", 1, "--max-batches", 1)) == 0
    stored = json.loads(Path("runs/demo/config.json").read_text())["config"]
    assert stored["run"]["seed"] == 5 and stored["optim"]["lr"] == 0.01
    (tmp_path / "settings.json").write_text('{"run": {"seed": 6}}')
    assert drive("--resume", "--config", "settings.json", "--epochs", 2) == 0
    assert "note: going on with the run's own settings, not those of settings.json" in capsys.readouterr().out
    assert json.loads(Path("runs/demo/config.json").read_text())["config"]["run"]["seed"] == 5


def test_resume_auto_with_nothing_starts_a_new_run_and_says_so(drive, new_flags, capsys):
    assert drive("--resume", "auto", *new_flags("--epochs", 1, "--max-batches", 1)) == 0
    assert "note: --resume auto: no run under runs/, starting a new one" in capsys.readouterr().out
    assert status()["status"] == "finished"


def test_resume_epochs_device_in_this_order_goes_on_in_the_same_folder(drive, new_flags, interrupt_at, capsys):
    interrupt_at(1, signal.SIGINT)
    assert drive(*new_flags("--epochs", 1, "--max-batches", 3)) == 130
    first = json.loads((RUN / "config.json").read_text())
    capsys.readouterr()
    assert drive("--resume", "--epochs", "2", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "resume    demo, epoch 0, batch 2/3, from step_000000002.pt" in printed
    assert "Epoch 0 Summary:" in printed and "Epoch 1 Summary:" in printed
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["demo"]
    assert (status()["status"], status()["step"]) == ("finished", 6)
    assert len(json.loads((RUN / "env.json").read_text())) == len(status()["sessions"]) == 2
    assert "--- session 2, resumed at" in (RUN / "run.log").read_text()
    now = json.loads((RUN / "config.json").read_text())
    assert now["config"]["run"].pop("epochs") == 2 and first["config"]["run"].pop("epochs") == 1
    assert now == first


def test_larger_epochs_extend_a_finished_run(finished, reference, drive, capsys):
    assert drive("--resume", "--epochs", "3") == 0
    printed = capsys.readouterr().out
    assert "Epoch 2 Summary:" in printed and "Epoch 1 Summary:" not in printed
    assert (status()["status"], status()["epoch"], status()["step"]) == ("finished", 2, 21)
    rows = read_epochs(finished / "epochs.csv")
    assert [row["step"] for row in rows] == ["7", "14", "21"]
    assert rows[:2] == read_epochs(reference.path / "epochs.csv")


def test_too_few_epochs_are_refused_and_leave_the_run_as_it_was(finished, drive, capsys):
    config = (finished / "config.json").read_text()
    assert drive("--resume", "--epochs", "1") == 2
    assert "error: --epochs 1, but the run is already in epoch 1" in capsys.readouterr().err
    assert (finished / "config.json").read_text() == config
    assert drive("--resume") == 0


def test_resume_at_an_epochs_end_goes_on_with_the_next_one(finished, reference, drive):
    for path in list_checkpoints(finished)[:3]:
        path.unlink()  # as if the process had died right after the checkpoint of step 7
    (finished / "run.json").write_text(json.dumps({**status(), "status": "running"}))
    assert drive("--resume") == 0
    assert differences(comparable(reference.path), comparable(finished)) == []


@pytest.fixture
def trained_on(monkeypatch) -> list[tuple[int, list[tuple[str, str]]]]:
    """Return a list that receives (step, pairs) of each training step."""
    train_step, steps = driver.train_step, []

    def recorded(system, query, answer, moment):
        steps.append((moment.step, [context.key for context in query.contexts]))
        return train_step(system, query, answer, moment)

    monkeypatch.setattr(driver, "train_step", recorded)
    return steps


def expected_pairs(tasks) -> list[tuple[str, str]]:
    return sorted((task.id, f"train:{p}") for task in tasks for p in range(len(task.train)))


def test_resume_with_other_batch_sizes_trains_on_every_pair_once(
    drive, new_flags, trained_on, interrupt_at, tasks, capsys
):
    interrupt_at(1, signal.SIGINT)
    assert drive(*new_flags("--epochs", 2, "--rl-every", 0, "--warmup", 0.5)) == 130  # two batches of four pairs
    capsys.readouterr()
    interrupt_at(4, signal.SIGINT)
    assert drive("--resume", "--batch-size", "2") == 130  # three of two
    printed = capsys.readouterr().out
    assert "note: batch-size 4 -> 2 (no pair comes twice in this epoch)" in printed
    assert re.search(r"note: the learning rate's factor is \d\.\d{3} from here on, it was \d\.\d{3}: ", printed)
    left = len(expected_pairs(tasks)) - 8
    assert f"resume    demo, epoch 0, batch 2/{2 + (left + 1) // 2}, from step_000000002.pt" in printed
    assert drive("--resume", "--batch-size", "0", "--batch-cells", "400") == 0
    assert "note: batch-size 2 -> 0 (no pair comes twice in this epoch)" in capsys.readouterr().out
    assert [step for step, _ in trained_on] == list(range(len(trained_on)))
    split = [row["batch"] for row in read_metrics(RUN / "metrics.jsonl") if row["epoch"] == 0 and "batch" in row][-1]
    for steps in (trained_on[:split], trained_on[split:]):
        assert sorted(pair for _, pairs in steps for pair in pairs) == expected_pairs(tasks)
    assert [len(pairs) for _, pairs in trained_on[:2]] == [4, 4]
    assert all(len(pairs) <= 2 for _, pairs in trained_on[2:5])
    loop = read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]
    assert (loop["epoch"], loop["segments"]) == (1, [])


def test_batch_size_that_changes_within_an_epoch_survives_a_kill(drive, new_flags, trained_on, interrupt_at, tasks):
    interrupt_at(1, signal.SIGINT)
    assert drive(*new_flags("--epochs", 1, "--rl-every", 0)) == 130
    interrupt_at(2, signal.SIGINT)
    assert drive("--resume", "--batch-size", "1") == 130
    shutil.copytree("runs", "again/runs")
    assert drive("--resume") == 0
    whole = comparable(RUN)
    os.chdir("again")
    interrupt_at(4, signal.SIGINT)
    assert drive("--resume") == 130
    loop = read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]
    assert (loop["batch"], loop["segments"]) == (5, [((0, 4), 2)])
    assert drive("--resume") == 0
    assert differences(whole, comparable(RUN)) == []
    pairs = [pair for _, pairs in trained_on[: 2 + len(expected_pairs(tasks)) - 8] for pair in pairs]
    assert sorted(pairs) == expected_pairs(tasks)


def test_batch_size_may_change_when_an_epoch_is_just_finished(drive, new_flags, trained_on, interrupt_at, tasks):
    interrupt_at(6, signal.SIGINT)
    assert drive(*new_flags("--epochs", 2, "--rl-every", 0)) == 130
    count = len(trained_on)
    assert not read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]["validated"]
    assert drive("--resume", "--batch-size", "8") == 0
    assert count == 7 and [row["step"] for row in read_epochs(RUN / "epochs.csv")] == ["7", "11"]
    for steps in (trained_on[:count], trained_on[count:]):
        assert sorted(pair for _, pairs in steps for pair in pairs) == expected_pairs(tasks)


def test_max_batches_counts_the_batches_of_every_size(drive, new_flags, trained_on, interrupt_at):
    interrupt_at(1, signal.SIGINT)
    assert drive(*new_flags("--epochs", 2, "--rl-every", 0, "--max-batches", 5)) == 130
    assert drive("--resume", "--batch-size", "2") == 0
    sizes = [len(pairs) for _, pairs in trained_on]
    assert len(sizes) == 2 * 5 and sizes[:2] == [4, 4] and set(sizes[2:]) <= {1, 2}


def test_learning_rate_follows_the_step_where_all_epochs_are_alike(tasks):
    config = small_config("--epochs", "7")
    sampler = TaskSampler(tasks, config.data, config.run.seed, config.data.batch_cells)
    count, optim = sampler.num_batches(0), config.optim
    for epoch in range(7):
        for k in range(count):
            expected = learning_rate_scale(epoch * count + k, 7 * count, optim.warmup, optim.decay)
            assert driver.learning_rate_factor(config, sampler, epoch, k) == expected
            assert driver.epoch_progress(config, sampler, epoch, k) == epoch + k / count


def test_schedule_and_progress_go_on_where_they_were_when_the_batch_size_changes(tasks):
    config = small_config("--epochs", "2", "--warmup", "0.5", "--decay", "0.5")
    wide, narrow = (TaskSampler(tasks, dataclasses.replace(config.data, batch_size=n), 42, 0) for n in (4, 1))
    for taken in range(1, 7):
        narrow.continue_epoch(1, [Segment((0, 4), taken)])
        factor = driver.learning_rate_factor(config, narrow, 1, taken)
        assert factor == pytest.approx(driver.learning_rate_factor(config, wide, 1, taken), abs=0.1)
        progress = driver.epoch_progress(config, narrow, 1, taken)
        assert progress == pytest.approx(driver.epoch_progress(config, wide, 1, taken), abs=0.1)
        total = narrow.num_batches(1)
        assert driver.epoch_progress(config, narrow, 1, total) == 2
        assert driver.learning_rate_factor(config, narrow, 1, total) == pytest.approx(0.05)


def test_resume_with_another_learning_rate_uses_it(finished, drive, monkeypatch, capsys):
    seen = []
    step = driver.finish_step

    def watch(result, system, optimizers, *rest, **named):
        seen.append(({g["peak_lr"] for o in optimizers.main.values() for g in o.param_groups},
                     {g["lr"] for g in optimizers.policy.param_groups}))  # fmt: skip
        return step(result, system, optimizers, *rest, **named)

    monkeypatch.setattr(driver, "finish_step", watch)
    assert drive("--resume", "--epochs", "3", "--lr", "1e-3", "--rl-lr", "2e-3", "--max-batches", "1") == 0
    assert seen == [({1e-3, 5e-3}, {2e-3})]
    printed = capsys.readouterr().out
    for note in ("epochs 2 -> 3 (allowed)", "lr 0.004 -> 0.001 (allowed)", "rl-lr 0.003 -> 0.002 (allowed)"):
        assert f"note: {note}" in printed


def test_data_that_moved_resumes_bit_equal(reference, finished, task_folder, tmp_path, drive, capsys):
    for path in list_checkpoints(finished)[:3]:
        path.unlink()
    shutil.copytree(task_folder, tmp_path / "moved")
    assert drive("--resume", "--data", "moved") == 0
    assert f"note: data {task_folder} -> moved (the same tasks)" in capsys.readouterr().out
    expected, now = comparable(reference.path), comparable(finished)
    assert now[0]["config"]["data"].pop("data") == "moved" and expected[0]["config"]["data"].pop("data")
    assert differences(expected, now) == []
    (next((tmp_path / "moved").glob("*.json"))).unlink()
    assert drive("--resume", "--epochs", "3", "--data", str(tmp_path / "moved")) == 2
    assert "error: cannot resume demo with a different data (run: moved, now: " in capsys.readouterr().err


def test_run_is_locked_while_it_trains_and_free_once_it_is_killed(drive, new_flags, capsys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *new_flags("--epochs", 200, "--save-every", 1, "--rl-every", 0)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list_checkpoints(RUN) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert list_checkpoints(RUN) and process.poll() is None
        assert drive("--resume") == 4
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: demo is being trained by pid {process.pid} on this machine (heartbeat ")
        assert hint == "hint: stop it, or use another --name"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    saved = int(list_checkpoints(RUN)[0].stem.removeprefix("step_"))
    assert drive("--resume", "--max-hours", "1e-9") == 0  # at once: no heartbeat has to run out
    assert status()["step"] == saved + 1


# 6. Disks and backups ------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_the_first_batch(drive, new_flags, capsys, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    assert drive(*new_flags()) == 4
    printed = capsys.readouterr()
    needed = re.fullmatch(r"error: run needs ~([\d.]+) MB in runs, \d+ kB free", printed.err.splitlines()[0])
    assert printed.err.splitlines()[1].startswith("hint: free some; a new run may use another disk with --out DIR")
    assert "[Batch" not in printed.out and list_checkpoints(RUN) == []

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1e6 * float(needed[1]) * 1.2)))
    assert drive(*new_flags("--epochs", 1, "--max-batches", 1, "--keep", 50)) == 0
    assert "50 checkpoints need" in capsys.readouterr().out


def test_expected_size_is_that_of_the_checkpoints(reference, build):
    run = build()
    size, weights = driver.expected_sizes(run)
    newest = list_checkpoints(reference.path)[0].stat().st_size
    assert 0.6 * newest < size < 1.05 * newest  # the rest is the file's own table and the memory's growth
    assert weights <= (reference.path / "best" / "model.safetensors").stat().st_size * 1.05
    run.close()


def test_backup_alone_brings_back_the_run_and_it_ends_with_the_same_bits(reference, drive, new_flags, interrupt_at,
                                                                         capsys):  # fmt: skip
    interrupt_at(8, signal.SIGTERM)
    assert drive(*reference.argv, "--backup", "drive") == 143
    assert steps(Path("drive/demo")) == [9, 7] and Path("drive/demo/best/model.safetensors").exists()
    shutil.rmtree("runs")
    capsys.readouterr()
    assert drive("--resume", "drive") == 0
    printed = capsys.readouterr().out
    assert "note: brought runs/demo back from the backup drive/demo, step_000000009.pt" in printed
    assert "resume    demo, epoch 1, batch 2/7" in printed
    assert differences(forget_backup(comparable(reference.path)), forget_backup(comparable(RUN))) == []
    assert steps(Path("drive/demo")) == [14, 13]  # the backup goes on, without being named again
    assert status()["status"] == json.loads(Path("drive/demo/run.json").read_text())["status"] == "finished"


def steps(run: Path) -> list[int]:
    return [read_checkpoint(path).step for path in list_checkpoints(run)]


def forget_backup(found: tuple) -> tuple:
    found[0]["config"]["run"].pop("backup")
    return found


def test_rollbacks_halve_the_learning_rate_and_training_goes_on(reference, drive, capsys, monkeypatch):
    train_step, bad = driver.train_step, iter(range(1000))

    def poisoned(system, query, answer, moment):
        result = train_step(system, query, answer, moment)
        if moment.step >= 5 and next(bad) < 40:
            result.total = result.total * float("nan")
        return result

    monkeypatch.setattr(driver, "train_step", poisoned)
    flags = [*reference.argv, "--batch-size", "1", "--epochs", "1"]
    assert drive(*flags) == 0
    printed = capsys.readouterr().err
    assert printed.count("back to step_000000003.pt with 0.5 of the learning rate (1/3)") == 1
    assert printed.count("back to step_000000003.pt with 0.25 of the learning rate (2/3)") == 1
    loop = read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]
    assert (loop["rollbacks"], loop["lr_factor"], loop["bad_steps"]) == (2, 0.25, 0)
    records = read_metrics(RUN / "metrics.jsonl")
    assert [r["rollbacks"] for r in records if r["event"] == "rollback"] == [1, 2]
    optim = resolve(TrainConfig(), "cpu").optim
    batches = [record for record in records if record["event"] == "batch"]
    for record in batches:
        usual = optim.lr * driver.learning_rate_scale(record["step"] - 1, 27, optim.warmup, optim.decay)
        assert record["lr"] == pytest.approx(usual * (0.25 if record["step"] > 3 else 1.0))
    assert [r["step"] for r in batches] == [*range(2, 27, 2), 27]


def test_weights_that_are_not_finite_are_not_saved(build):
    run, said = build(), []
    run.store.say = said.append
    with torch.no_grad():
        next(run.system.parameters()).fill_(float("nan"))
    driver.save(run)
    run.saver.wait()
    fault = "weights of prompt_model are not finite"
    assert said == [f"warning: checkpoint of step 0 not saved ({fault}); training goes on"]
    assert list_checkpoints(RUN) == [] and run.saver.saved_step == -1
    run.close()


def test_policy_does_not_step_on_a_nonfinite_gradient(build):
    run = build()
    run.system.train()
    policy = run.system.policy
    kept = [p.detach().clone() for p in (*policy.policy_parameters(), policy.advantage_scale.averages)]
    hook = policy.augmentor.log_std.register_hook(lambda gradient: gradient * float("nan"))
    step = driver.take_step(run, 0, 0, driver.Moment(0, 0.0, True), watch_qwen=False)
    assert step.update.taken and step.numbers.policy is not None
    now = (*policy.policy_parameters(), policy.advantage_scale.averages)
    assert all(torch.equal(one, two) for one, two in zip(kept, now, strict=True))
    hook.remove()
    driver.take_step(run, 0, 1, driver.Moment(1, 0.0, True), watch_qwen=False)
    assert not torch.equal(policy.advantage_scale.averages, kept[-1])
