"""The benchmark that kills runs: twenty kills of it, and that it would notice what a resume forgets."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import kill_resume
import pytest
import torch
from conftest import ROOT
from overfit import small_tasks, write_folder

import trainloop_complete_with_fixes as driver


def test_twenty_kills_without_a_difference():
    script = str(ROOT / "benchmarks" / "kill_resume.py")
    done = subprocess.run([sys.executable, script, "--kills", "20", "--tasks", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    kills = [line for line in lines if line.startswith("kill ") and line.endswith("; equal")]
    assert len(kills) == 20 and lines[-2].startswith("20 kills in ")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Return the folder, the command line and the reference of a run to kill."""
    place = tmp_path_factory.mktemp("kills")
    (place / "tasks").mkdir()
    (place / "reference").mkdir()
    write_folder(small_tasks(4, 1, 6), place / "tasks")
    argv = [*kill_resume.SMALL, "--data", str(place / "tasks"), "--seed", "0"]
    return place, argv, kill_resume.measure_reference(place / "reference", argv)


@pytest.mark.parametrize("part", ["system", "optimizers", "average", "memory", "loop"])
def test_what_a_resume_forgets_is_noticed(part, trial, tmp_path, monkeypatch):
    place, argv, reference = trial
    restore = driver.restore

    def forgetful(run, payload):
        fresh = driver.snapshot(driver.checkpoint_payload(run))
        if part == "loop":  # the position is kept, the sums of the epoch are lost
            fresh["loop"] = {**payload["loop"], "epoch_sums": {}}
        restore(run, {**payload, part: fresh[part]})

    monkeypatch.setattr(driver, "restore", forgetful)
    kill = kill_resume.Kill("training", 4, 0.0)
    monkeypatch.setattr(kill_resume, "draw_kill", lambda *arguments: kill)
    with pytest.raises(kill_resume.Difference):
        kill_resume.one_trial(tmp_path, argv, random.Random(1), reference, 1)


def test_digest_sees_one_bit_kinds_and_order():
    value = {"a": [torch.zeros(3), 1, 1.0], "b": torch.tensor(True)}
    same = {"a": [torch.zeros(3), 1, 1.0], "b": torch.tensor(True)}
    assert kill_resume.digest(value) == kill_resume.digest(same)
    changed = torch.zeros(3)
    changed[1] = -0.0
    others = [{"a": [changed, 1, 1.0], "b": torch.tensor(True)}, {"a": [torch.zeros(3), 1.0, 1.0], "b": value["b"]},
              {"a": [torch.zeros(3), 1, 1.0], "b": torch.tensor(1)}, {"a": [torch.zeros(1, 3), 1, 1.0],
              "b": value["b"]}, {"b": value["b"], "a": value["a"]}]  # fmt: skip
    assert len({kill_resume.digest(item) for item in [value, *others]}) == 6


def test_a_kill_is_noted_in_the_phase_it_hits(trial, tmp_path):
    _, argv, _ = trial
    for phase in ("copying", "renaming", "validating"):
        folder, board = tmp_path / phase, kill_resume.Board()
        folder.mkdir()
        assert kill_resume.run_child(folder, argv, board, kill_resume.Kill(phase, 2 if phase != "validating" else 1,
                                                                           0.0)) == -9  # fmt: skip
        assert phase in board.inside()
        assert not Path(folder, "runs", "run", "report.html").exists()
