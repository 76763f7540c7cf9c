"""What concerns the README alone: the user's commands and the list of modules. `test_docs.py` checks what it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from test_docs import DRIVER, commands

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_has_the_three_commands_of_a_user():
    found = [shlex.join(words) for words in commands(README)]
    for arguments in ("--epochs 1", "--epochs 20 --device cuda", "--resume --epochs 20 --device cuda"):
        assert f"{DRIVER} {arguments}" in found


def test_readme_lists_every_module():
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_readme_links_every_document():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
