"""What concerns the README alone: the user's commands and the list of modules. `test_docs.py` checks what it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from test_docs import DRIVER, commands

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_first_screen_of_the_readme_has_the_commands_of_a_user():
    found = [shlex.join(words) for words in commands("\n".join(README.splitlines()[:30]))]
    for arguments in ("--smoke", "--epochs 1", "report", "predict my_task.json", "--epochs 20 --device cuda",
                      "--resume --epochs 20 --device cuda"):  # fmt: skip
        assert f"{DRIVER} {arguments}" in found


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg")]
    assert len(pictures) == 2 and all(0 < path.stat().st_size < 200_000 for path in pictures)


def test_readme_lists_every_module():
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_readme_links_every_document():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
