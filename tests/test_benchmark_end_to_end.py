"""The script that trains and scores protocols: one on few tasks, and what it does when a part fails."""

from __future__ import annotations

import json

import pytest

import verbs
from arc_data import ArcTask, select_tasks


@pytest.fixture
def few(benchmark, tmp_path, monkeypatch):
    """Return a command line on few tasks with grids of at most 6 x 6, whose priors take seconds, in an empty folder."""

    def select_small(tasks: list[ArcTask], count: int) -> list[ArcTask]:
        small = [t for t in tasks if max(max(p.input.shape + p.output.shape) for p in (*t.train, *t.test)) <= 6]
        return select_tasks(small, count)

    monkeypatch.setattr(benchmark.driver, "select_tasks", select_small)
    monkeypatch.setattr(verbs, "select_tasks", select_small)
    monkeypatch.chdir(tmp_path)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    return ["--protocols", "arc1-eval", "--max-tasks", "4", "--views", "1", "--", *cache]


def test_a_protocol_is_trained_scored_and_shown(benchmark, few, monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command)
        return main(command)

    main = benchmark.driver.main
    monkeypatch.setattr(benchmark.driver, "main", run)
    assert benchmark.main(few) == 0
    out = capsys.readouterr().out
    assert "arc1-eval: transductive" in out or "arc1-eval: inductive" in out
    lines = [line for line in out.splitlines() if line.startswith("| arc1-eval |")]
    result = json.loads(next(iter(benchmark.Path("runs/end-to-end/arc1-eval").glob("*.scores.json"))).read_text())
    one, two = result["scores"]["model"]["per_output"]
    assert [line.split(" | ")[1] for line in lines] == ["1", "2"]
    for line, share in zip(lines, (one, two), strict=True):
        assert f"{share['right']}/{share['of']} = {share['value']:.3f}" in line
    assert commands[0].config.data.protocol == "arc1-eval" and commands[1].verb == "eval"


def test_a_part_that_fails_is_said_and_the_others_go_on(benchmark, few, monkeypatch, capsys):
    codes = iter([3, 0, 1])
    monkeypatch.setattr(benchmark.driver, "main", lambda command: next(codes))
    monkeypatch.setattr(benchmark.Path, "read_text", lambda path: "demo")
    assert benchmark.main(["--protocols", "arc1-eval", "arc2-eval", *few[2:]]) == 1
    assert capsys.readouterr().err.splitlines() == ["training of arc1-eval ended with exit code 3",
                                                    "scoring of arc2-eval ended with exit code 1"]  # fmt: skip
