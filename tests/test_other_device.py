"""The whole system on a device that is not the CPU: nothing is mixed, and the results are the CPU's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_main
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="no devices in Python"
)

SCRIPT = Path(__file__).with_name("standin.py")
STRICT = """
import sys, torch
sys.path.insert(0, {folder!r})
from standin import MixedDevices, Standin, StandinTensor, install, leave
device = install()
with Standin() as standin:
    here, there = torch.arange(3.0), torch.arange(3.0, device=device)
    for mixed in (lambda: there + here, lambda: torch.where(there > 1, there, here), lambda: torch.cat((here, there)),
                  lambda: here[torch.tensor([0, 1], device=device)], lambda: here.add_(there)):
        try:
            mixed()
        except MixedDevices:
            continue
        sys.exit("not refused")
    assert not standin.waits
    assert (there + torch.tensor(1.0))[torch.tensor([0, 2])].tolist() == [1.0, 3.0]  # as on a GPU
    assert there.sum().item() == 3.0 and there[there > 1].cpu().tolist() == [2.0]
    assert len(standin.waits) == 4, standin.waits
    weight = torch.ones(3, device=device, requires_grad=True)
    (weight * there).sum().backward()
    assert isinstance(weight.grad, StandinTensor) and weight.grad.tolist() == [0.0, 1.0, 2.0]
leave(0)
"""


def on_standin(folder: Path, *words: object) -> tuple[str, list[list[str]]]:
    """Return what a command of the driver prints on the other device, and what each training step waited for."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, steps = done.stdout.splitlines()
    return "\n".join(printed), json.loads(steps)


def numbers(path: Path) -> list[dict[str, float]]:
    """Return the metrics of a run's records but for times and speeds."""
    timed = ("seconds", "per_second", "time")
    return [{k: v for k, v in record.items() if isinstance(v, float) and not k.endswith(timed)}
            for record in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]  # fmt: skip


def test_the_other_device_refuses_what_a_gpu_refuses():
    script = STRICT.format(folder=str(SCRIPT.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_on_another_device_is_that_of_the_cpu(reference, tmp_path):
    printed, steps = on_standin(tmp_path, *reference.argv)
    assert "device    standin:0" in printed
    assert [len(waits) for waits in steps] == [2] * 14  # whether it is finite, and what the memory is offered
    ours, theirs = numbers(tmp_path / "runs" / "demo"), numbers(reference.path)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_run_moves_between_devices(reference, task_folder, tmp_path, monkeypatch):
    """A checkpoint goes on where another device is; the weights answer there, adapted to the task, as on the CPU."""
    shutil.copytree(reference.path, tmp_path / "runs" / "demo")
    printed, steps = on_standin(tmp_path, "--resume", "runs/demo", "--epochs", "3")
    assert "cpu -> standin" in printed and len(steps) == 7
    task = sorted(task_folder.glob("*.json"))[0]
    asked = ("predict", task, "--refine", "train", "--refine-steps", "2", "--refine-weights", "full", "--json")
    there, _ = on_standin(tmp_path, *asked, "--weights", "runs/demo", "--views", "2", "--out", "there")
    monkeypatch.chdir(tmp_path)
    assert run_main(*asked, "--weights", "runs/demo", "--views", "2", "--out", "here", "--device", "cpu") == 0
    name = f"{task.stem}.prediction.json"
    assert (tmp_path / "there" / name).read_text() == (tmp_path / "here" / name).read_text()
    assert run_main("--resume", "runs/demo", "--epochs", "4", "--device", "cpu") == 0


def test_larger_presets_and_partly_trained_models_on_another_device(task_folder, tmp_path):
    flags = ("--preset", "small", "--width", "32", "--read-blocks", "1", "--read-heads", "2", "--num-steps", "2",
             "--model", "tiny", "--train-llm", "last:1", "--batch-size", "4", "--max-batches", "2", "--epochs", "1",
             "--rl-every", "1")  # fmt: skip
    _, steps = on_standin(tmp_path, *flags, "--data", task_folder, "--name", "demo")
    assert [len(waits) for waits in steps] == [2, 2]
