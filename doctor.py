"""Check all that a run needs, and print what a report of a fault should hold.

    python trainloop_complete_with_fixes.py doctor [RUN]

May import everything but the driver, most of it inside the checks: it has to work where a package is missing. Used by
the driver, which also asks `package_faults` before it loads torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import PROGRAM, VERSION, DoctorCommand, TrainConfig, one_line, resolve, with_values
from report import DRIVE, PACKAGES, Console, check_writable, environment, file_size, in_colab

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
LEAST_FREE = 2_000_000_000  # bytes: checkpoints of the real Qwen trained with lora, and the priors
OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check found; `hint` says what to do, and where the state is FAIL a run cannot do without it."""

    state: str
    text: str
    hint: str = ""


# 1. Packages: nothing but the standard library -----------------------------------------------------------------------


def package_faults() -> list[tuple[str, str]]:
    """Return (what is wrong, what to type) for each package of requirements.txt that is missing or out of range.

    The file itself counts where the modules were copied without it.
    """
    if not REQUIREMENTS.is_file():
        return [(f"{REQUIREMENTS.name} is not beside {Path(__file__).name}", "copy the whole repository")]
    faults = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", line.split("#")[0].strip())
        if match is None:
            continue
        name, bounds = match[1], match[2].replace(" ", "")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            faults.append((f"package {name} is not installed", "pip install -r requirements.txt"))
            continue
        wrong = [bound for bound in bounds.split(",") if bound and not _within(version, bound)]
        if wrong:
            old = any(bound.startswith(">") for bound in wrong)
            faults.append((f"{name} {version} is too {'old' if old else 'new'} (need {bounds})",
                           f'pip install -U "{name}{bounds}"'))  # fmt: skip
    return faults


def _within(version: str, bound: str) -> bool:
    """Return whether a version keeps to one bound of requirements.txt: >=, <= or <, by its numbers alone."""
    match = re.fullmatch(r"(>=|<=|<)([\d.]+)", bound)
    if match is None:
        raise ValueError(f"requirements.txt: cannot read the bound {bound}")
    here, there = (tuple(int(n) for n in re.match(r"[\d.]*", text)[0].strip(".").split(".")) for text in
                   (version, match[2]))  # fmt: skip
    length = max(len(here), len(there))
    here, there = (numbers + (0,) * (length - len(numbers)) for numbers in (here, there))
    return {">=": here >= there, "<=": here <= there, "<": here < there}[match[1]]


def packages(command: DoctorCommand) -> list[Finding]:
    """Check the packages of requirements.txt."""
    faults = [Finding(FAIL, text, hint) for text, hint in package_faults()]
    found = environment()["packages"]
    here = ", ".join(f"{name} {found[name]}" for name in PACKAGES if found[name])
    return [*faults, Finding(NOTE if faults else OK, here)]


# 2. The machine ------------------------------------------------------------------------------------------------------


def machine(command: DoctorCommand) -> list[Finding]:
    """Say which machine and which version of the program this is."""
    facts = environment()
    commit = f", commit {facts['git_commit'][:12]}" if facts["git_commit"] else ""
    colab = f", Colab {facts['colab']}" if facts["colab"] else ""
    return [Finding(OK, f"ARC-EFE {VERSION}{commit}, Python {facts['python']}, {facts['platform']}{colab}"),
            Finding(OK, f"{facts['cpus']} CPU cores, {platform.machine()}{_memory()}")]  # fmt: skip


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return ""
    return f", {file_size(pages * size)} of memory"


def device(command: DoctorCommand) -> list[Finding]:
    """Check the device that would train, and what would be chosen for it."""
    import torch

    from arc_system import choose_device, choose_runtime

    chosen = choose_device(command.device)
    runtime = choose_runtime(chosen, "auto")
    memory = 0.0
    found = []
    if chosen.type == "cuda":
        memory = torch.cuda.get_device_properties(chosen).total_memory / 2**30
        free, total = torch.cuda.mem_get_info(chosen)
        torch.ones(8, device=chosen).sum().item()  # a card that this build of torch does not know fails here
        found.append(Finding(OK, f"{torch.cuda.get_device_name(chosen)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB"
                                 f" free, CUDA {torch.version.cuda}"))  # fmt: skip
    config = resolve(TrainConfig(), chosen.type, memory)
    state = NOTE if chosen.type == "cpu" else OK
    hint = "a GPU trains the larger presets and the real Qwen" if state == NOTE else ""
    text = (f"{chosen}, {runtime.precision} ({runtime.reason}); defaults here: preset {config.agent.preset}, model"
            f" {config.prompt.model}, train-llm {config.prompt.train_llm}")  # fmt: skip
    return [*found, Finding(state, text, hint)]


# 3. Places -----------------------------------------------------------------------------------------------------------


def places(command: DoctorCommand) -> list[Finding]:
    """Check that the folders of runs and of the priors' cache can be written to, and have room."""
    from prior_store import cache_folder

    found = []
    for folder in (Path(command.out).absolute(), cache_folder(command.cache_dir).absolute()):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        check_writable(there)
        free = shutil.disk_usage(there).free
        text = f"{folder}: can be {'written to' if there == folder else 'made'}, {file_size(free)} free"
        low = free < LEAST_FREE
        found.append(Finding(FAIL if low else OK, text, "free some space, or choose --out elsewhere" if low else ""))
    return found


def drive(command: DoctorCommand) -> list[Finding]:
    """Check Google Drive, where there is Colab."""
    if not in_colab():
        return []
    if os.path.ismount(DRIVE):
        return [Finding(OK, f"{DRIVE} is mounted: --backup {DRIVE}/MyDrive/arc keeps every checkpoint there")]
    return [Finding(NOTE, f"{DRIVE} is not mounted, so a run dies with this machine",
                    f"in a cell: from google.colab import drive; drive.mount('{DRIVE}')")]  # fmt: skip


# 4. Data, model, runs ------------------------------------------------------------------------------------------------


def data(command: DoctorCommand) -> list[Finding]:
    """Load the default tasks."""
    from arc_data import load_tasks

    source = TrainConfig().data.data
    return [Finding(OK, f"{source}: {len(load_tasks(source))} tasks")]


def language_model(command: DoctorCommand) -> list[Finding]:
    """Find the language model that would train, without loading it; needed on a GPU, where it is the default."""
    import torch

    from qwen_hybrid_prompt import ModelError, find_language_model

    kind = command.device if command.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"prompt.model": command.model, "prompt.offline": command.offline}
    config = resolve(with_values(TrainConfig(), chosen), kind).prompt
    try:
        return [Finding(OK, f"{config.model}: {find_language_model(config)}")]
    except ModelError as error:
        return [Finding(FAIL, str(error), error.hint)]


def runs(command: DoctorCommand) -> list[Finding]:
    """Say which run `--resume` would go on with; of a run that is named also whether its checkpoints are whole."""
    from model_persistence import CheckpointError, DamagedError, find_run, list_checkpoints, read_checkpoint
    from report import RunFolder

    try:
        choice = find_run(command.out, command.run or "auto")
    except CheckpointError as error:
        hint = error.hint.replace("--resume alone takes", "doctor alone looks at")
        return [Finding(FAIL if command.run else NOTE, str(error).removeprefix("--resume: "), hint)]
    if choice is None:
        return [Finding(OK, f"no runs in {command.out}/ yet")]
    status = RunFolder(choice.path, writes=False).read_status()
    found = [Finding(OK, f"{choice.path}: {status.get('status', 'no status')}, newest whole checkpoint"
                         f" {choice.checkpoint.name}")]  # fmt: skip
    flags = status.get("flags") if isinstance(status.get("flags"), dict) else {}
    for name, flag in flags.items():
        if isinstance(flag, dict) and flag.get("raised"):
            what, advice = (one_line(flag.get(key, ""), 150) for key in ("problem", "advice"))
            found.append(Finding(NOTE, f"health flag {one_line(name, 60)}: {what}", advice))
    for path in list_checkpoints(choice.path) if command.run else ():
        try:
            read_checkpoint(path)
            found.append(Finding(OK, f"{path.name} is whole, {file_size(path.stat().st_size)}"))
        except (DamagedError, CheckpointError, OSError) as error:
            found.append(Finding(FAIL, f"{path.name}: {error}", "--resume skips it and uses the one before"))
    return found


CHECKS: dict[str, Callable[[DoctorCommand], Sequence[Finding]]] = {
    "program": machine, "packages": packages, "device": device, "folders": places, "drive": drive, "data": data,
    "model": language_model, "runs": runs,
}  # fmt: skip


def examine(command: DoctorCommand, console: Console) -> int:
    """Print every finding; return 0, or 4 when something that a run needs is missing."""
    missing = 0
    for label, check in CHECKS.items():
        for finding in _findings(check, command, console):
            missing += finding.state == FAIL
            console.say(f"{finding.state:<5} {label:<9} {finding.text}", always=finding.state == FAIL)
            if finding.hint:
                console.say(f"      {'':<9} hint: {finding.hint}", always=finding.state == FAIL)
    if missing:
        things = "1 thing has" if missing == 1 else f"{missing} things have"
        console.say(f"{things} to be mended before training", always=True)
        return 4
    console.say(f"ready: python {PROGRAM}")
    return 0


def _findings(
    check: Callable[[DoctorCommand], Sequence[Finding]], command: DoctorCommand, console: Console
) -> Sequence[Finding]:
    """Return what a check finds; whatever stops it is a finding, so that the others are made too."""
    try:
        return check(command)
    except Exception as error:
        if command.debug:
            console.error(error, debug=True)
        reason = str(error) if hasattr(error, "hint") else f"{type(error).__name__}: {error}"
        return [Finding(FAIL, one_line(reason), getattr(error, "hint", ""))]
