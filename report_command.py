"""The command report: build the page of a run, or the comparison of two, and say in a few lines what stands in it.

Imports the modules of the pages, no torch, so that it answers at once. Used by the driver and by verbs.
"""

from __future__ import annotations

import math
import signal
from pathlib import Path

from config import AnswerCommand, ConfigError
from page_compare import Difference, verdict_of, write_comparison
from page_facts import Facts
from page_parts import as_dict, numeric
from report import Console, RunFolderError, banner_line, check_writable, file_size
from report_page import write_report
from run_pictures import can_draw, write_curves
from run_record import RunRecord, find_run_folder

EPOCHS_SHOWN = 8


def answer(command: AnswerCommand, console: Console) -> int:
    """Run the command; return the exit code. Every error becomes two lines on stderr, as in the other commands."""
    try:
        return report(command, console)
    except (ConfigError, RunFolderError) as error:
        console.error(error, debug=command.debug)
        return error.exit_code
    except OSError as error:
        console.error(f"{error.filename or 'a file'}: {error.strerror or error}", "--out DIR writes to another folder")
        return RunFolderError.exit_code
    except KeyboardInterrupt:
        console.error("interrupted; the same command makes the page")
        return 128 + signal.SIGINT
    except Exception as error:
        console.error(error, "this is a bug: run again with --debug for the traceback", debug=command.debug)
        return 1


def report(command: AnswerCommand, console: Console) -> int:
    """Write the page. Raises: NoRunError, RunFolderError, ConfigError, OSError."""
    folders = [find_run_folder(name) for name in command.sources or ("",)]
    target = Path(command.config.out) if "out" in command.explicit else folders[0]
    check_writable(target)
    if len(folders) == 2:
        path, found = write_comparison(*folders, target)
        for difference in found:
            if difference.outputs:
                console.say(difference_line(difference))
    else:
        path = write_report(folders[0], target)
        for line in summary_lines(RunRecord.read(folders[0])):
            console.say(line)
        picture = write_curves(folders[0], target)
        if picture is not None:
            console.say(banner_line("curves", str(picture)), always=True)
        elif not can_draw():
            console.say("note: no curves.png without matplotlib; the page has its own curves")
    console.say(banner_line("page", f"{path} ({file_size(path.stat().st_size)})"), always=True)
    return 0


def difference_line(d: Difference) -> str:
    """Return one score of two runs and its difference."""
    return (
        f"  {d.label}: A {d.first:.4f} | B {d.second:.4f} | B - A {d.value:+z.4f} [{d.low:+z.4f}, {d.high:+z.4f}]"
        f" {verdict_of(d)} ({d.outputs} outputs)"
    )


def summary_lines(run: RunRecord) -> list[str]:
    """Return what a run has come to: its status, its last epochs, the flags that are raised, and what is damaged."""
    facts = Facts(run)
    lines = [banner_line("run", f"{run.path}, {run.status.get('status', 'status unknown')}")]
    if not facts.epochs:
        lines.append("no epoch is finished yet")
    for record in facts.epochs[-EPOCHS_SHOWN:]:
        epoch, loss, exact, of, cells, delta = (
            _number(record.get(name)) for name in ("epoch", "loss", "val_exact", "val_outputs", "val_cells_predicted",
                                                   "val_accuracy_delta"))  # fmt: skip
        scored = "not validated"
        if not math.isnan(exact):
            scored = f"exact {exact:.0f}/{of:.0f} | cells {cells:.3f} | accuracy delta {delta:+z.4f}"
        lines.append(f"  epoch {epoch:3.0f} | loss {loss:.3f} | {scored}")
    for name, flag in as_dict(run.status.get("flags")).items():
        if as_dict(flag).get("raised"):
            lines.append(f"  flag {name}: {as_dict(flag).get('problem', '')}")
    return lines + [f"note: {problem}" for problem in run.problems]


def _number(value: object) -> float:
    found = numeric(value)
    return math.nan if found is None else found
