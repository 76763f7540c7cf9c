"""Tests of report: the run folder's files, the metrics log, the console, the bar, and the lines byte for byte."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
from datetime import datetime
from pathlib import Path

import pytest

import report
from report import Console, MetricLog, RunFolder, RunFolderError, read_epochs, read_metrics

ROOT = Path(report.__file__).resolve().parent
NOW = datetime(2026, 11, 22, 19, 30, 1)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "arc_a")


@pytest.fixture
def log(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl", clock=lambda: 12.3456)
    yield log
    log.close()


# The run folder.


def test_new_run_name_counts_up_when_taken(tmp_path):
    assert report.new_run_name(NOW, tmp_path) == "arc_complete_20261122_193001"
    names = [RunFolder.create(tmp_path, now=NOW).name for _ in range(3)]
    assert names == ["arc_complete_20261122_193001" + end for end in ("", "-2", "-3")]
    assert [RunFolder.create(tmp_path, "mine").name for _ in range(2)] == ["mine", "mine-2"]


def test_create_takes_the_next_name_when_another_process_was_faster(tmp_path, monkeypatch):
    names = iter(["taken", "free"])
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr(report, "new_run_name", lambda *_: next(names))
    assert RunFolder.create(tmp_path).name == "free"


def test_sessions_are_appended_everywhere(folder):
    assert folder.start_session({"python": "3.11"}, now=NOW) == 1
    folder.set_status("interrupted", epoch=3, batch=1850, best=math.nan)
    assert RunFolder(folder.path).start_session({"python": "3.13"}, "epoch 3, batch 1850", now=NOW) == 2
    entries = json.loads((folder.path / "env.json").read_text())
    assert [(entry["session"], entry["python"]) for entry in entries] == [(1, "3.11"), (2, "3.13")]
    assert folder.log_path.read_text().splitlines() == [
        "--- session 1, started at 2026-11-22 19:30:01",
        "--- session 2, resumed at 2026-11-22 19:30:01, epoch 3, batch 1850",
    ]
    state = folder.read_status()
    assert (state["status"], state["epoch"], state["batch"], state["best"]) == ("running", 3, 1850, "nan")
    assert [session["session"] for session in state["sessions"]] == [1, 2]
    assert state["pid"] == os.getpid() and state["host"]
    assert (folder.path.parent / "LATEST").read_text() == "arc_a\n"
    assert folder.checkpoints.is_dir()


def test_latest_names_the_run_started_last(tmp_path):
    for name in ("b", "a"):
        RunFolder(tmp_path / name).start_session({})
    assert (tmp_path / "LATEST").read_text() == "a\n"


def test_unknown_status_is_refused(folder):
    with pytest.raises(AssertionError):
        folder.set_status("done")


def test_config_holds_the_settings_and_facts(folder):
    assert folder.read_config() == {}
    folder.write_config({"run": {"epochs": 3}}, data_hash="ab", model_commit="cd")
    assert folder.read_config() == {"data_hash": "ab", "model_commit": "cd", "config": {"run": {"epochs": 3}}}


def test_status_survives_a_crash_while_it_is_replaced(folder, monkeypatch):
    folder.set_status("running", epoch=1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.set_status("finished", epoch=2)
    monkeypatch.undo()
    assert (folder.read_status()["status"], folder.read_status()["epoch"]) == ("running", 1)
    assert [path.name for path in folder.path.glob(".*")] == []


def test_status_is_never_seen_half_written(folder, monkeypatch):
    folder.set_status("running", epoch=1)
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(folder.read_status()["epoch"]), fsync(fd)))
    folder.set_status("running", epoch=2)
    assert seen == [1]
    assert folder.read_status()["epoch"] == 2


def test_damaged_status_is_set_aside(folder):
    (folder.path / "run.json").write_text('{"status": "runn')
    folder.set_status("finished")
    assert folder.read_status()["status"] == "finished"
    assert (folder.path / "run.json.damaged").read_text() == '{"status": "runn'


def test_unwritable_out_names_folder_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path / "file" / "runs")
    assert str(caught.value) == f"cannot write to {tmp_path / 'file' / 'runs'} (not a directory)"
    assert caught.value.hint == "choose another folder with --out DIR"
    assert caught.value.exit_code == 4


def test_full_disk_is_found_by_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"\(no space left on device\)"):
        report.check_writable(tmp_path)


def test_check_writable_leaves_nothing_behind(tmp_path):
    report.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_name_too_long_for_the_file_system_is_a_run_folder_error(tmp_path):
    with pytest.raises(RunFolderError, match="file name too long"):
        RunFolder.create(tmp_path, "x" * 300)


def test_drive_that_is_not_mounted_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DRIVE", tmp_path / "drive")
    with pytest.raises(RunFolderError, match="is not mounted"):
        report.check_writable(tmp_path / "drive" / "MyDrive" / "runs")
    assert not (tmp_path / "drive").exists()


def test_epochs_csv_replaces_rows_of_an_abandoned_attempt(folder):
    for epoch in range(3):
        folder.write_epoch({"epoch": epoch, "loss": 3.5 - epoch})
    folder.write_epoch({"epoch": 1, "loss": math.inf, "note": 'a, "b"'})
    assert folder.epochs_path.read_bytes() == b'epoch,loss,note\n0,3.5,\n1,inf,"a, ""b"""\n'
    assert [row["epoch"] for row in read_epochs(folder.epochs_path)] == ["0", "1"]
    assert read_epochs(folder.path / "none.csv") == []


# The metrics log.


def test_metrics_are_one_object_per_line_written_at_once(log):
    log.append({"epoch": 0, "loss": math.nan, "terms": {"risk": -math.inf}, "list": [math.inf, 1]})
    log.append({"t": 5, "text": "two\nlines"})
    assert log.path.read_bytes() == (
        b'{"t":12.346,"epoch":0,"loss":"nan","terms":{"risk":"-inf"},"list":["inf",1]}\n{"t":5,"text":"two\\nlines"}\n'
    )
    first, second = read_metrics(log.path)
    assert math.isnan(first["loss"]) and second == {"t": 5, "text": "two\nlines"}


def test_truncate_brings_the_log_back_to_a_checkpoint(log):
    for step in range(3):
        log.append({"step": step})
    offset = log.offset()
    assert offset == log.path.stat().st_size
    log.append({"step": 3})
    log.close()
    reopened = MetricLog(log.path)
    assert reopened.truncate(offset) > 0
    reopened.append({"step": 30})
    reopened.close()
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1, 2, 30]


def test_truncate_keeps_a_log_that_is_shorter_than_the_checkpoint_says(log):
    log.append({"step": 0})
    before = log.path.read_bytes()
    assert log.truncate(10_000) == 0
    assert log.path.read_bytes() == before


def test_truncate_within_a_line_drops_the_whole_line(log):
    log.append({"step": 0})
    keep = log.offset()
    log.append({"step": 1})
    log.truncate(keep + 3)
    log.append({"step": 2})
    assert [record["step"] for record in read_metrics(log.path)] == [0, 2]


def test_line_cut_short_by_a_crash_is_ignored_and_removed(log):
    log.append({"step": 0})
    log.close()
    with open(log.path, "ab") as file:
        file.write(b'{"t":1,"st')
    assert [record["step"] for record in read_metrics(log.path)] == [0]
    again = MetricLog(log.path)
    again.append({"step": 1})
    again.close()
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1]


def test_damaged_line_is_named(log):
    log.append({"step": 0})
    log.close()
    with open(log.path, "ab") as file:
        file.write(b"garbage\n[]\n")
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(log.path)


# The console.


def test_console_keeps_streams_apart_and_logs_everything(tmp_path, capsys):
    console = Console()
    console.say("early")
    console.attach(tmp_path / "run.log")
    console.say("[OK] All models created")
    console.note("n")
    console.warn("careful", "do this")
    console.error("broken", "mend it")
    console.close()
    out, err = capsys.readouterr()
    assert out == "early\n[OK] All models created\nnote: n\n"
    assert err == "warning: careful\nhint: do this\nerror: broken\nhint: mend it\n"
    assert (tmp_path / "run.log").read_text() == (
        "early\n[OK] All models created\nnote: n\nwarning: careful\nhint: do this\nerror: broken\nhint: mend it\n"
    )


def test_quiet_console_logs_but_prints_only_complaints(tmp_path, capsys):
    console = Console(quiet=True)
    console.attach(tmp_path / "run.log")
    console.say("a")
    console.say("b", always=True)
    console.warn("c")
    console.close()
    assert capsys.readouterr() == ("b\n", "warning: c\n")
    assert (tmp_path / "run.log").read_text() == "a\nb\nwarning: c\n"


@pytest.mark.parametrize("debug", [False, True])
def test_traceback_goes_to_the_log_and_to_the_screen_only_when_debugging(tmp_path, capsys, debug):
    console = Console()
    console.attach(tmp_path / "run.log")
    try:
        raise RunFolderError("no", "try that")
    except RunFolderError as error:
        console.error(error, debug=debug)
    console.close()
    err = capsys.readouterr().err
    assert err.endswith("error: no\nhint: try that\n")
    assert ("Traceback" in err) == debug
    assert "Traceback" in (tmp_path / "run.log").read_text()


def test_characters_the_terminal_cannot_show_do_not_stop_the_run(tmp_path):
    code = (
        "import sys; from report import Console; console = Console()\n"
        "console.attach(sys.argv[1]); console.say('p\\u00e4th \\u2713'); console.close()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.log")], cwd=ROOT, env=environment, capture_output=True
    )
    assert (result.returncode, result.stdout) == (0, b"p?th ?\n")
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == "p\u00e4th \u2713\n"


def test_console_lines_appear_at_once_in_a_pipe():
    code = "import time; from report import Console; Console().say('first'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"first\n"
    finally:
        process.kill()
        process.communicate()


def test_no_bar_without_a_terminal(capsys):
    bar = report.progress(10, "Epoch 0 (All Fixes)")
    bar.update(3)
    bar.close()
    assert bar.disable
    assert capsys.readouterr() == ("", "")


BAR = """
import sys
from report import Console
console = Console(quiet="quiet" in sys.argv, progress="no-progress" not in sys.argv)
bar = console.progress(3232, "Epoch 0 (All Fixes)", initial=1600)
console.say("[Batch   50] line")
bar.update(16)
if not bar.disable:
    bar.refresh()
bar.close()
"""


def run_in_terminal(*argv: str, rows: int = 0, columns: int = 0) -> str:
    """Return what a pty of a size (default: 0x0, as Colab's) shows of the script above."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", BAR, *argv], cwd=ROOT, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux reports the closed other end as an input/output error
        pass
    finally:
        os.close(ours)
        process.wait(timeout=20)
    return shown.decode()


@pytest.mark.parametrize(("rows", "columns", "width"), [(0, 0, 100), (24, 80, 79), (50, 132, 131)])
def test_bar_is_visible_in_terminals_of_any_size_and_goes_on_at_the_count_of_a_resume(rows, columns, width):
    shown = run_in_terminal(rows=rows, columns=columns)
    assert "Epoch 0 (All Fixes):  50%|" in shown and "| 1616/3232 [" in shown
    bars = [frame for frame in re.split(r"[\r\n]+", shown) if frame.startswith("Epoch 0")]
    assert all(len(bar) == width for bar in bars) and "| 1600/3232 [" in bars[0]
    assert "\r\n\r\n" not in shown.replace("\r\n[", "[").rstrip()  # no empty lines in place of bars
    assert "\n[Batch   50] line\r\n" in shown.replace("\r[", "\n[")


@pytest.mark.parametrize(("word", "rest"), [("quiet", ""), ("no-progress", "[Batch   50] line\r\n")])
def test_quiet_and_no_progress_hide_the_bar(word, rest):
    assert run_in_terminal(word) == rest


def test_a_pipe_gets_lines_without_control_characters(monkeypatch, capfd):
    monkeypatch.setattr(report, "PROGRESS_SECONDS", 0.0)
    names: dict = {}
    exec(BAR, names)
    out, err = capfd.readouterr()
    assert out == "[Batch   50] line\n"
    assert re.fullmatch(r"Epoch 0 \(All Fixes\): batch 1616/3232 \(50 %\), about \d+ s left\n", err)


def test_bar_refreshes_slowly_in_colab(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("COLAB_RELEASE_TAG", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = report.progress(3, "x")
    assert (bar.mininterval, bar.ncols, bar.nrows) == (0.5, 100, 24)
    monkeypatch.setenv("COLAB_GPU", "1")
    assert report.progress(3, "x").mininterval == 5


# The lines.


def test_batch_line_has_the_documented_shape():
    assert report.batch_line(50, 3.456, 0.045, 2.34e-4, 0.234) == (
        "[Batch   50] EFE_Loss: 3.456 | Reward: +0.045 | Qwen_grad: 2.34e-04 | Mask: 0.234"
    )
    assert report.batch_line(100, 3.345, 0.052, 2.51e-4, 0.198) == (
        "[Batch  100] EFE_Loss: 3.345 | Reward: +0.052 | Qwen_grad: 2.51e-04 | Mask: 0.198"
    )
    assert report.batch_line(3232, math.nan, -0.0001, 0.0, 0.0) == (
        "[Batch 3232] EFE_Loss: nan | Reward: +0.000 | Qwen_grad: 0.00e+00 | Mask: 0.000"
    )
    assert "Reward: -0.104 " in report.batch_line(1, 1.0, -0.1041, 0.0, 0.0)
    assert "Reward: n/a " in report.batch_line(1, 1.0, None, 0.0, 0.0)


def test_epoch_summary_has_the_documented_shape():
    assert report.epoch_summary(0, 3.234, 0.0234, 2.38e-4, 71, 1076, 0.0245) == (
        "Epoch 0 Summary:\n"
        "  Average EFE Loss: 3.234\n"
        "  Average RL Reward: +0.0234\n"
        "  Qwen Gradient Norm: 2.38e-04 (FIX #1)\n"
        "  Val Accuracy: 0.0660 (71/1076)\n"
        "  Accuracy Delta: +0.0245 (FIX #2)"
    )


def test_epoch_summary_without_validation_or_outputs():
    lines = report.epoch_summary(2, 3.2, None, None, None, None, None).splitlines()
    assert lines[2:] == [
        "  Average RL Reward: n/a",
        "  Qwen Gradient Norm: n/a (FIX #1)",
        "  Val Accuracy: n/a",
        "  Accuracy Delta: n/a (FIX #2)",
    ]
    assert "  Val Accuracy: 0.0000 (0/0)" in report.epoch_summary(2, 3.2, 0.0, 0.0, 0, 0, 0.0)


def test_further_lines():
    assert report.terms_line({"risk": 0.5, "step": 0.25, "reward": -0.125}) == (
        "  Terms: risk 0.500 | step 0.250 | reward -0.125 | sum 0.625"
    )
    assert report.cells_line(0.712, 0.511, 0.638, 0.683) == (
        "  Cells (true size): 0.712 | copy-input 0.511 | one-colour 0.638 | demo prior 0.683"
    )
    assert report.predicted_cells_line(0.65) == "  Cells (predicted size): 0.650"
    assert report.predicted_cells_line(0.65, 0.64) == "  Cells (predicted size): 0.650 | unrefined prompt 0.640"
    assert report.size_line(0.873, 0.852) == "  Size accuracy: 0.873 (rule 0.852)"
    assert report.gain_line(0.21) == "  Nats gained over the prior: +0.21 per cell"
    assert report.prompt_gap_line(0.012) == "  Prompt gap: +0.012 nats"
    assert report.update_ratio_line(1.1e-5) == "  Qwen update ratio: 1.1e-05"
    assert report.speed_line(12345.4) == "  Cells per second: 12345"
    assert report.banner_line("device", "cpu") == "device    cpu"
    assert report.beside_prior_line("Exact at two attempts", 290, 1076, 275, 4, 26) == (
        "  Exact at two attempts: 290 of 1076 | demo prior 275 | difference +15 [+4, +26]"
    )
    assert report.beside_prior_line("Exact", 3, 8, 4, -3, 0).endswith("difference -1 [-3, +0]")
    assert report.at_once_line(231, 1076, 220, 210) == (
        "  Answered at once by the prior: 231 of 1076, 220 right | planner there 210"
    )
    assert report.potential_line(0.731, 0.719, 0.0427) == (
        "  Potential: 0.731 | demo prior 0.719 | over the prior +0.012 | skill +0.043"
    )


TRAIN = {"loss": 2.0, "reward": 0.0, "qwen_grad": 0.1, "qwen_upd": 1e-4, "term/risk": 0.5, "term/step": 0.25}
BASE = {"copy_cells": 0.5, "color_cells": 0.6, "prior_cells": 0.8, "copy_exact": 0, "color_exact": 21,
        "prior_exact": 275, "rule_size": 0.9,
        "prior_names": "tile, then colour map (7); identity, then colour map (2)"}  # fmt: skip
SCORES = {
    "exact": 290, "outputs": 1076, "accuracy_delta": 0.0, "cells_true": 0.81, "cells_predicted": 0.79,
    "cells_unrefined": 0.79, "size_accuracy": 0.91, "nats_gained": 0.1, "prompt_gap": 0.0,
    "exact_of": 1076, "exact_prior": 275, "exact_low": 4, "exact_high": 26,
    "unsure_exact": 40, "unsure_exact_of": 800, "unsure_exact_prior": 25,
    "unsure_exact_low": 5, "unsure_exact_high": 27,
    "two_exact": 320, "two_exact_of": 1076, "two_exact_prior": 290, "two_exact_low": 18, "two_exact_high": 42,
    "judged_exact": 295, "judged_exact_of": 1076, "judged_exact_prior": 275, "judged_exact_low": 9,
    "judged_exact_high": 31, "judged_two_exact": 318, "judged_two_exact_of": 1076, "judged_two_exact_prior": 290,
    "judged_two_exact_low": 16, "judged_two_exact_high": 40,
    "at_once": 276, "at_once_exact": 250, "at_once_planned": 240,
    "potential": 0.73, "potential_prior": 0.72, "skill": 0.036,
    "accuracy_delta_low": -0.001, "accuracy_delta_high": 0.001,
    "refinement_nats": 0.0021, "refinement_nats_low": -0.00004, "refinement_nats_high": 0.0042,
}  # fmt: skip


def test_summary_of_an_epoch_compares_with_the_prior_below_the_trivial_answers():
    memory = {"size": 3, "theta": 0.5, "lessons": 7}
    lines = report.full_summary(0, TRAIN, SCORES, BASE, memory, 100.0).splitlines()
    start = lines.index("  Exact: 290 | copy-input 0 | one-colour 21 | demo prior 275")
    assert lines[start + 1 : start + 10] == [
        "  Exact beside the prior: 290 of 1076 | demo prior 275 | difference +15 [+4, +26]",
        "  Exact where the prior is unsure: 40 of 800 | demo prior 25 | difference +15 [+5, +27]",
        "  Exact at two attempts: 320 of 1076 | demo prior 290 | difference +30 [+18, +42]",
        "  Exact of the candidates, judged: 295 of 1076 | demo prior 275 | difference +20 [+9, +31]",
        "  Exact of two candidates, judged: 318 of 1076 | demo prior 290 | difference +28 [+16, +40]",
        "  Answered at once by the prior: 276 of 1076, 250 right | planner there 240",
        "  Potential: 0.730 | demo prior 0.720 | over the prior +0.010 | skill +0.036",
        "  Prior's answers by: tile, then colour map (7); identity, then colour map (2)",
        "  Size accuracy: 0.910 (rule 0.900)",
    ]
    assert "  Val Accuracy: 0.2695 (290/1076)" in lines
    assert "  Val Accuracy (2 attempts): 0.2974 (320/1076), 1 view" in lines
    assert "  Refinement: cells +0.0000 [-0.0010, +0.0010] | nats per cell +0.0021 [+0.0000, +0.0042]" in lines
    unjudged = report.full_summary(0, TRAIN, None, None, memory, 100.0)
    assert "demo prior" not in unjudged and "at once" not in unjudged


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (41, "41 s"), (59.7, "1 min"), (725, "12 min 5 s"), (7799, "2 h 10 min"), (7199.9, "2 h 0 min")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(812, "812 B"), (13_100_000, "13 MB"), (999_600, "1.0 MB"), (1_400_000_000, "1.4 GB"), (9_960, "10 kB")],
)
def test_file_size(count, text):
    assert report.file_size(count) == text


# The environment.


def test_environment_is_json_and_imports_no_package():
    code = (
        "import json, sys, report\n"
        "facts = report.environment(['x.py', '--epochs', '3'])\n"
        "assert not {'torch', 'numpy', 'transformers', 'tqdm'} & set(sys.modules)\n"
        "print(json.dumps(facts))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    facts = json.loads(result.stdout)
    import numpy

    assert facts["argv"] == ["x.py", "--epochs", "3"]
    assert facts["packages"]["numpy"] == numpy.__version__
    assert facts["python"] == sys.version.split()[0]


def test_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("no-such-package-at-all",))
    assert report.environment()["packages"] == {"no-such-package-at-all": None}


def test_git_commit_marks_changed_files(tmp_path):
    assert report.git_commit(tmp_path) is None

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    assert report.git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert report.git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert report.git_commit(tmp_path) == commit + "+"
