"""The benchmark of faults: its list cannot rot, and what it says of a tiny project is true."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "mutations.py"


@pytest.fixture
def project(tmp_path):
    """Return a project of one function and two tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests" / "test_double.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom double import double\n\n\n"
        "def test_of_zero():\n    assert double(0) == 0\n\n\ndef test_of_three():\n    assert double(3) == 6\n"
    )
    return tmp_path


def test_every_faults_text_occurs_once_and_every_named_test_exists(benchmark):
    assert benchmark.problems(benchmark.FAULTS) == []
    assert len(benchmark.FAULTS) >= 24
    for fault in benchmark.FAULTS:
        source = (SCRIPT.parent.parent / fault.file).read_text()
        compile(source.replace(fault.old, fault.new), fault.file, "exec")


def test_rotten_faults_are_refused(benchmark, project, capsys):
    tests = ("tests/test_double.py",)
    good = benchmark.Fault("good", "double.py", "2 * x", "3 * x", tests)
    rotten = [
        (good._replace(old="5 * x"), "occurs 0 times"),
        (good._replace(old="x"), "occurs 2 times"),
        (good._replace(new="2 * x"), "and a change"),
        (good._replace(tests=("tests/test_none.py",)), "no file tests/test_none.py"),
        (good._replace(tests=("tests/test_double.py::test_of_nine",)), "no test tests/test_double.py::test_of_nine"),
        (good._replace(tests=()), "no tests"),
    ]
    assert benchmark.problems([good], project) == []
    for fault, words in rotten:
        assert [words in problem for problem in benchmark.problems([fault], project)] == [True]
    assert benchmark.problems([good, good], project) == ["good: named twice"]
    assert benchmark.main(["--list"], [good]) == 1  # this project has no such file
    assert "good" in capsys.readouterr().err


def test_faults_are_killed_or_survive_and_the_copy_is_whole_afterwards(
    benchmark, project, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a quicker start
    folder = benchmark.copy_project(tmp_path_factory.mktemp("copy"), project)
    both, zero = ("tests/test_double.py",), ("tests/test_double.py::test_of_zero",)
    faults = [
        benchmark.Fault("triple", "double.py", "2 * x", "3 * x", both),
        benchmark.Fault("triple, looked at in zero", "double.py", "2 * x", "3 * x", zero),
        benchmark.Fault("no function", "double.py", "def double", "def treble", both),
        benchmark.Fault("no end", "double.py", "return 2 * x", "while True: pass", zero),
    ]
    assert benchmark.check_baseline(faults, folder)
    outcomes = [benchmark.try_fault(fault, folder, 3 if fault.name == "no end" else 60) for fault in faults]
    assert [o.status for o in outcomes] == ["killed", "survived", "broken", "timed out"]
    assert [o.killer for o in outcomes][:2] == ["tests/test_double.py::test_of_three", ""]
    assert (folder / "double.py").read_text() == (project / "double.py").read_text()
    assert "1 of 4 faults killed" in benchmark.report(outcomes)
    (folder / "double.py").write_text("def double(x):\n    return 3 * x\n")
    assert not benchmark.check_baseline(faults, folder)
    assert "1 failed" in capsys.readouterr().out
