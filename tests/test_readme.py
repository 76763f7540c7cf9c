"""What the README and the docs name exists: tests, files, options, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from config import build_parser, parse_command_line

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_test_exists(path):
    defined = {
        name for file in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", path.read_text()))
    assert named <= defined, named - defined


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_file_exists(path):
    named = re.findall(r"`((?:[a-z]+/)?\w+\.(?:py|md|toml|txt))`", path.read_text())
    assert all((ROOT / name).is_file() for name in named), [n for n in named if not (ROOT / n).is_file()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_option_exists(path):
    known = {option for action in build_parser()._actions for option in action.option_strings}
    known |= {"--seconds", "--batches", "--effort"}  # of the benchmarks
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", path.read_text()))
    assert named <= known, named - known


def commands() -> list[str]:
    return re.findall(r"python (trainloop_complete_with_fixes\.py[^`\n&|]*)", README)


def test_readme_has_the_three_commands_of_a_user():
    found = [command.strip() for command in commands()]
    for arguments in ("--epochs 1", "--epochs 20 --device cuda", "--resume --epochs 20 --device cuda"):
        assert f"trainloop_complete_with_fixes.py {arguments}" in found


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_readme_is_accepted(command):
    words = shlex.split(command)[1:]
    if "--help" not in words:
        assert parse_command_line(words).verb == "train"


def test_readme_lists_every_module():
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}
