"""What the README and the documents in docs/ name exists: tests, files, flags and defaults, commands, names in code.

A table is checked for more by its header: in a column `code` a cell names a `module.py` and then names in it; beside a
column `flag` a column `default` holds the default of that setting.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import trainloop_complete_with_fixes as driver
from config import (
    VERBS,
    ConfigError,
    LossConfig,
    all_settings,
    build_answer_parser,
    build_parser,
    flag_of,
    parse_command_line,
)
from health import RULES
from loss_function import TERM_NAMES, term_weights

ROOT = Path(__file__).resolve().parent.parent
DRIVER = "trainloop_complete_with_fixes.py"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROVED = ("EFE_LOSS_INTEGRATION.md", "ALL_7_FIXES_EXPLAINED.md", "AGENT_INTERFACE_FIX.md", "COLAB_RUNTIME_FIXES.md",
          "COMPLETE_SOLUTION_SUMMARY.md", "METRICS.md", "TRANSCRIPTS.md")  # fmt: skip
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


# What a text names ----------------------------------------------------------------------------------------------------


def spans(text: str) -> list[str]:
    """Return what stands in backticks, a line break inside read as a space."""
    outside_blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside_blocks)]


def code_lines(text: str) -> list[str]:
    """Return the lines of fenced and of indented code blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in fenced for line in block.splitlines()] + re.findall(r"^    (\S.*)$", text, re.M)


def commands(text: str) -> list[list[str]]:
    """Return the words after `python`, or after `torchrun` and its flags, of each command that calls it."""
    found = []
    for code in [*spans(text), *code_lines(text)]:
        for part in re.split(r"&&|\|", code):
            call = re.match(r"(?:!|\$ )?(?:\w+=\S+ )*(?:python|torchrun(?: --\S+(?: \d+)?)*) ([\w./-].*)", part.strip())
            if call:
                found.append(shlex.split(call[1].replace("[", " ").replace("]", " ")))
    return found


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield (header, rows) of every table, cells stripped."""
    for block in re.findall(r"(?:^[ \t]*\|.*\|\n)+", text + "\n", re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in block.splitlines()]
        if len(lines) > 2:
            yield lines[0], lines[2:]


@functools.cache
def defined_tests() -> frozenset[str]:
    """Return the names of all test functions."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests").glob("test_*.py")]
    return frozenset(node.name for tree in trees for node in tree.body
                     if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))  # fmt: skip


def flags_of_script(script: Path) -> set[str]:
    """Return the flags that a script's source declares; the driver's too where it passes on what it does not know."""
    source = script.read_text(encoding="utf-8")
    if script.suffix == ".sh":
        return set(re.findall(r"^ +(?:-\w \| )?(--[\w-]+)\)", source, re.MULTILINE))
    for other in re.findall(r"\b(\w+)\.parser_of\(", source):  # flags that another script declares for both
        shared = script.with_name(f"{other}.py").read_text(encoding="utf-8")
        source += re.search(r"^def parser_of\(.*?^    return parser$", shared, re.DOTALL | re.MULTILINE)[0]
    own = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source)) | {"--help"}
    own |= flags_of_script(script.with_name("ablation.py")) if "ablation.parse(" in source else set()
    return own | (flags_of_driver() if "parse_known_args" in source else set())


@functools.cache
def flags_of_driver() -> frozenset[str]:
    """Return every flag of the driver."""
    parsers = [build_parser(), *map(build_answer_parser, VERBS)]
    return frozenset(o for parser in parsers for action in parser._actions for o in action.option_strings)


@functools.cache
def flags_of_torchrun() -> frozenset[str]:
    """Return every flag of torchrun."""
    return frozenset(option for action in get_args_parser()._actions for option in action.option_strings)


# What is wrong with it ------------------------------------------------------------------------------------------------


def missing_tests(text: str) -> set[str]:
    """Return the tests that a text names and that nobody wrote."""
    return {span for span in spans(text) if re.fullmatch(r"test_\w+", span)} - defined_tests()


def missing_files(text: str) -> list[str]:
    """Return the files that a text names or links and that are not there."""
    named = [span for span in spans(text) if re.fullmatch(r"(?:[a-z]+/)*\w+\.(?:py|md|toml|txt)", span)]
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    return [name for name in [*named, *linked] if not ((ROOT / name).is_file() or (ROOT / "docs" / name).is_file())]


def unknown_flags(text: str) -> set[str]:
    """Return the flags that neither the driver, a benchmark nor torchrun has, without those of commands of pytest."""
    text = re.sub(r"python -m pytest\b[^\n`]*", "", text)
    benchmarks = (flags_of_script(script) for script in (ROOT / "benchmarks").glob("*.[ps][yh]"))
    known = flags_of_driver().union(flags_of_torchrun(), *benchmarks)
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)) - known


def refusal(words: list[str]) -> str:
    """Return why a command is not one of ours; empty when it is."""
    script, arguments = words[0], words[1:]
    if script == "-m":
        return "" if arguments[0] in ("pytest", "ruff") else "no such module is installed by requirements-dev.txt"
    if not (ROOT / script).is_file():
        return "no such script"
    if script != DRIVER:
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        unknown = given - flags_of_script(ROOT / script)
        return f"no such flags: {sorted(unknown)}" if unknown else ""
    if {"--help", "-h", "--version"} & set(arguments):
        return ""
    try:
        parse_command_line(arguments)
    except ConfigError as problem:
        return str(problem)
    return ""


def refused_commands(text: str) -> list[str]:
    """Return the commands that would not be accepted, with the reason."""
    return [f"python {shlex.join(words)}: {why}" for words in commands(text) if (why := refusal(words))]


def exists(owner: Any, name: str) -> bool:
    """Return whether a dotted name leads from a module to something: a function, a class, a method, a field."""
    for part in name.split("."):
        fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
        if part in fields:
            return True
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def missing_names(text: str) -> list[str]:
    """Return the names in `code` columns that the module named before them does not have."""
    missing = []
    for header, rows in tables(text):
        for row in rows if "code" in header else ():
            module = None
            for span in re.findall(r"`([^`]+)`", row[header.index("code")]):
                if span.endswith(".py"):
                    module = importlib.import_module(span.removesuffix(".py"))
                elif module is None or not exists(module, span):
                    missing.append(f"{getattr(module, '__name__', 'no module')}: {span}")
    return missing


def wrong_defaults(text: str) -> list[str]:
    """Return what a table with columns `flag` and `default`, or "`--flag` (default NUMBER)", says falsely."""
    known = {flag_of(path): item.default for path, item, _ in all_settings()}
    wrong = []
    for header, rows in tables(text):
        for row in rows if {"flag", "default"} <= set(header) else ():
            flag, default = row[header.index("flag")].strip("`"), row[header.index("default")].strip("`")
            if flag.startswith("--") and (flag not in known or default != str(known[flag])):
                wrong.append(f"{flag}: {default}, not {known.get(flag)}")
    for flag, default in re.findall(r"`(--[\w-]+)` \(default ([-+.\de]+)\)", text):
        if default != str(known.get(flag)):
            wrong.append(f"{flag}: {default}, not {known.get(flag)}")
    return wrong


def unproved_sections(text: str) -> list[str]:
    """Return the headings of sections in which neither a test nor a command is named; an introduction is free."""
    parts = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)[1:]
    sections = list(zip(parts[::2], parts[1::2], strict=True))
    return [heading for heading, body in sections if body.strip() and not heading.startswith("# ")
            and not (commands(body) or re.search(r"`test_\w+`", body))]  # fmt: skip


# The documents --------------------------------------------------------------------------------------------------------


@each_document
def test_every_named_test_exists(path):
    assert missing_tests(path.read_text()) == set()


@each_document
def test_every_named_file_exists(path):
    assert missing_files(path.read_text()) == []


@each_document
def test_every_named_option_exists(path):
    assert unknown_flags(path.read_text()) == set()


@each_document
def test_every_command_is_accepted(path):
    assert refused_commands(path.read_text()) == []


@each_document
def test_every_name_in_a_code_column_exists(path):
    assert missing_names(path.read_text()) == []


@each_document
def test_every_default_in_a_table_is_that_of_the_settings(path):
    assert wrong_defaults(path.read_text()) == []


@pytest.mark.parametrize("name", PROVED)
def test_every_section_names_a_test_or_a_command(name):
    assert unproved_sections((ROOT / "docs" / name).read_text()) == []


def test_weights_in_the_document_are_those_of_the_code():
    (header, rows), *_ = (t for t in tables((ROOT / "docs" / PROVED[0]).read_text()) if t[0][0] == "term")
    assert tuple(row[0] for row in rows) == TERM_NAMES
    for column, name in enumerate(header):
        if name.startswith("e = "):
            weights = term_weights(LossConfig(), float(name.removeprefix("e = ")))
            assert {row[0]: float(row[column]) for row in rows} == pytest.approx(weights), name


def test_figure_names_files_that_exist():
    named = re.findall(r'class="file"[^>]*>([\w.]+)<', (ROOT / "docs" / "data_flow.svg").read_text())
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert len(named) == 9 and set(named) <= listed


def metric_names(section: str, *, in_trouble: bool = False) -> set[str]:
    """Return the names in the `metric` column below a heading of METRICS.md that begins so.

    With in_trouble only those that a loss scaler, a skipped step, a flag or a rollback writes, without it the others.
    """
    text = (ROOT / "docs" / "METRICS.md").read_text()
    names: set[str] = set()
    for header, rows in tables(re.split(r"^## ", text.split(f"## {section}")[1], flags=re.MULTILINE)[0]):
        for row in rows if header[0] == "metric" else ():
            troubled = row[1] in ("with a loss scaler (fp16)", "if a step was skipped", "flag", "rollback",
                                  "where several views vote")  # fmt: skip
            names |= set(re.findall(r"`(\w+)`", row[0])) if troubled == in_trouble else set()
    return names


def records(path: Path, event: str) -> list[dict[str, Any]]:
    """Return the records of one kind in a run's metrics.jsonl."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


def test_metrics_of_a_run_are_those_of_the_document(reference):
    batches, epochs = records(reference.path, "batch"), records(reference.path, "epoch")
    assert len(batches) == 8 and len(epochs) == 2
    assert all(record.keys() == metric_names("Of a batch") for record in batches)
    common, validated = metric_names("Of an epoch"), metric_names("Of a validation")
    of_log = (common | validated | metric_names("Of the baselines")) - {"train_seconds"}
    assert all(record.keys() == of_log for record in epochs)
    table = list(csv.DictReader((reference.path / "epochs.csv").open()))
    assert all(row.keys() == (common | validated) - {"t", "event"} for row in table) and len(table) == 2


def test_metrics_of_trouble_are_those_of_the_document(build):
    run = build()
    driver.save(run)
    run.state.step += 1  # what is saved from here on leaves that checkpoint to go back to
    run.runtime.scaler = torch.amp.GradScaler("cpu", enabled=True)
    update = driver.Update(False, float("nan"), torch.zeros(()), None)
    bad = SimpleNamespace(terms=SimpleNamespace(terms={"risk": torch.tensor(float("nan"))}))
    driver.count_step(run, driver.Step((), torch.zeros(()), bad, update, 0))
    driver.log_batch(run, update)  # which raises LOSS_NAN
    driver.finish_epoch(run, None)
    (batch,), (epoch,), (flag, *_) = (records(run.folder.path, event) for event in ("batch", "epoch", "flag"))
    run.runtime.scaler = torch.amp.GradScaler("cpu", enabled=False)
    driver.roll_back(run, driver.TrainingDiverged("test"))
    (rollback,) = records(run.folder.path, "rollback")
    assert metric_names("Of a batch", in_trouble=True) == {"scale"} and "scale" in batch
    assert metric_names("Of a validation", in_trouble=True) == {"val_views", "val_voted_exact", "val_voted_two_exact"}
    assert metric_names("Of an epoch", in_trouble=True) == {"skipped", "nonfinite"} <= epoch.keys()
    place = {"t", "event", "epoch", "batch", "step"}
    assert metric_names("Of flags", in_trouble=True) == (flag.keys() | rollback.keys()) - place


def test_lines_of_the_summary_are_those_of_the_document(reference):
    block = reference.printed.split("Epoch 0 Summary:\n")[1].split("\n[")[0]
    printed = [line.strip().split(":")[0] for line in block.splitlines() if line.startswith("  ")]
    (listed,) = ([row[0] for row in rows] for header, rows in tables((ROOT / "docs" / "METRICS.md").read_text())
                 if header[0] == "line")  # fmt: skip
    assert listed == printed


def test_flags_of_the_document_are_the_rules():
    (found,) = (rows for header, rows in tables((ROOT / "docs" / "METRICS.md").read_text())
                if header == ["flag", "raised when", "what to do"])  # fmt: skip
    lasting = {name: f"; for {rule.lasting} batches" if rule.lasting else "" for name, rule in RULES.items()}
    assert found == [[f"`{name}`", rule.problem + lasting[name], rule.advice] for name, rule in RULES.items()]


# What the screen shows ------------------------------------------------------------------------------------------------

MASKS = (
    (r"; \d+ more epochs? in about .*", ""),  # of an epoch that is not the last
    (r"^(Setting pad_token_id|priors    |note: |  flag |curves ).*", ""),  # said only where there is reason to
    (r"^(settings |  Prior's answers by:).*", r"\1"),
    (r"^[\d ]+$", "GRID"),
    (r"\S*runs/[\w-]+|\barc_complete_\w+|\bdemo\b", "RUN"),
    (r"^data      \S+ [0-9a-f]{7},", "data      TASKS,"),
    (r"torch \S+|Python \S+", "VERSION"),
    (r"refine \w+", "refine HOW"),
    (r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?", "#"),
    (r"# min # s|# h # min|# min|# s\b", "TIME"),
    (r"# [kM]?B\b", "SIZE"),
    (r" {2,}", "  "),
)


def shape(text: str) -> list[str]:
    """Return the different lines of a text in their order, with numbers, names, paths and times masked."""
    lines = []
    for line in text.splitlines():
        for pattern, masked in MASKS:
            line = re.sub(pattern, masked, line)
        if line.strip() not in ("", "..."):
            lines.append(line.rstrip())
    return list(dict.fromkeys(lines))


def transcript(heading: str) -> list[str]:
    """Return the shape of what stands below a heading of TRANSCRIPTS.md, without the command."""
    text = (ROOT / "docs" / "TRANSCRIPTS.md").read_text().split(f"## {heading}\n")[1]
    return shape(re.search(r"^```text\n\$ [^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1])


def test_transcript_of_a_run_has_the_lines_that_the_program_prints(reference):
    *lines, following, without_gpu = transcript("On a laptop")
    assert lines == shape(reference.printed)
    assert (following.split()[0], without_gpu.split()[:2]) == ("next", ["no", "GPU"])  # see the test of --smoke


def test_transcript_of_a_stop_and_a_resume_has_the_lines_that_the_program_prints(
    reference, drive, tmp_path, monkeypatch, capsys
):
    shutil.copytree(reference.path.parent, tmp_path / "runs")
    step = driver.train_step
    monkeypatch.setattr(driver, "train_step", lambda *a: signal.raise_signal(signal.SIGINT) or step(*a))
    monkeypatch.setattr(driver.Pace, "is_known", True)
    monkeypatch.setattr(driver.Pace, "seconds", 1.0)
    assert drive("--resume", "--epochs", "3", "--log-every", "1") == 130
    said = capsys.readouterr()
    printed = shape(said.out + said.err)
    stopped, resumed = transcript("The stop button, Ctrl-C"), transcript("Going on")
    assert set(printed) == {*stopped, *resumed}
    assert [line for line in printed if line in resumed] == resumed
    assert shape(said.out)[-2:] == stopped[-2:]


def test_transcripts_of_the_other_commands_have_the_lines_that_the_program_prints(
    reference, drive, tmp_path, capsys
):
    shutil.copytree(reference.path.parent, tmp_path / "runs")
    row = {"input": [[1, 0], [0, 2]], "output": [[0, 1], [2, 0]]}
    task = {"train": [row, row, row], "test": [{"input": [[7, 0], [0, 8]]}]}
    Path("my_task.json").write_text(json.dumps(task))
    Path("challenges.json").write_text(json.dumps({"one": task, "two": task}))
    for heading, command in (
        ("Looking at the results", ["report"]),
        ("A task of your own", ["predict", "my_task.json", "--views", "2", "--device", "cpu", "--refine", "none"]),
        ("submission.json", ["submit", "--data", "challenges.json", "--views", "2", "--device", "cpu"]),
    ):
        assert drive(*command) == 0
        assert shape(capsys.readouterr().out) == transcript(heading), heading


def takers_of_an_answer(node: ast.AST, prefix: str) -> Iterator[str]:
    """Yield the dotted names of the functions in a module that have an Answer among their parameters."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from takers_of_an_answer(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            arguments = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            if any(a.annotation and re.search(r"\bAnswer\b", ast.unparse(a.annotation)) for a in arguments):
                yield prefix + child.name


def test_functions_that_take_an_answer_are_those_of_the_document():
    found = {f"{path.name}: {name}" for path in ROOT.glob("*.py")
             for name in takers_of_an_answer(ast.parse(path.read_text(encoding="utf-8")), "")}  # fmt: skip
    listed = set()
    for header, rows in tables((ROOT / "docs" / PROVED[2]).read_text()):
        for row in rows if header == ["code", "sees an answer for"] else ():
            module, *names = re.findall(r"`([^`]+)`", row[0])
            listed |= {f"{module}: {name}" for name in names}
    assert listed == found


def test_false_statements_are_found():
    assert missing_tests("`test_that_nobody_wrote` and `test_false_statements_are_found`") == {"test_that_nobody_wrote"}
    assert missing_files("`config.py` `docs/NONE.md` [a](README.md) [b](gone.md) [c](https://a.b/c.md)") == [
        "docs/NONE.md", "gone.md"]  # fmt: skip
    assert unknown_flags("`--epochs 3 --no-use-memory --half dev --made-up`") == {"--made-up"}
    assert refused_commands(f"`python {DRIVER} --epochs 1`, `python -m pytest -q`, `python benchmarks/prior.py`") == []
    torchrun = f"`torchrun --standalone --nproc-per-node 2 {DRIVER} --epochs"
    assert refused_commands(f"{torchrun} 2`") == [] and len(refused_commands(f"{torchrun} none`")) == 1
    assert refused_commands("`python\nbenchmarks/overfit.py [--tasks 8] [--seed 1]`") == []
    block = f"    !python {DRIVER} --epochs 0\n\n```\npip install -q x && python benchmarks/prior.py --fast 1\n```\n"
    assert len(refused_commands(f"{block}`python nothing.py`")) == 3
    names = "`config.py`: `LossConfig.mode`, `flag_of`, `LossConfig.made_up`"
    assert missing_names(f"Words.\n\n| a | code |\n|---|---|\n| b | {names} |\n") == ["config: LossConfig.made_up"]
    assert missing_names(f"| code |\n|---|\n| {names} |\n") == ["config: LossConfig.made_up"]
    assert missing_names(f"| names |\n|---|\n| {names} |\n") == []
    assert wrong_defaults("`--keep` (default 4), `--keep` (default 5)") == ["--keep: 4, not 5"]
    assert wrong_defaults("| flag | default |\n|---|---|\n| `--lambda-risk` | 0.1 |\n| `--keep` | 6 |\n") == [
        "--keep: 6, not 5"]  # fmt: skip
    assert unproved_sections("# A\ntext\n## B\ntext\n### C\n`test_x`\n## D\n### E\n`python -m pytest`\n") == ["## B"]
