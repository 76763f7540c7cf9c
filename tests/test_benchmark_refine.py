"""The benchmark of refinement at prediction: what counts as unseen, its groups and table, and one small measurement."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_config, write_tasks

from arc_data import ArcTask
from arc_data import test_contexts as test_items
from config import with_values
from task_training import TaskTraining


def test_tasks_that_share_a_pair_with_the_run_are_seen(benchmark, tasks, tmp_path):
    run, source = tmp_path / "run", tmp_path / "source"
    write_tasks(run, tasks[:3])
    renamed = ArcTask("other", (*tasks[0].test, *tasks[5].train), tasks[5].test)
    write_tasks(source, [*tasks[2:5], renamed])
    config = with_values(small_config(), {"data.data": str(run)})
    assert [t.id for t in benchmark.unseen_tasks(config, str(source), 0)] == [t.id for t in tasks[3:5]]
    first, rest = benchmark.unseen_tasks(config, str(source), 1), benchmark.unseen_tasks(config, str(source), 1, 1)
    assert sorted(t.id for t in (*first, *rest)) == [t.id for t in tasks[3:5]] and len(first) == 1
    assert benchmark.unseen_tasks(config, str(source), 0, 1)[0].id == rest[0].id


def test_tasks_held_out_are_not_those_of_the_prior(benchmark):
    assert len(benchmark.held_out(20)) == 20
    assert not any(benchmark.in_dev_half(task.id) for task in benchmark.held_out(20))


def test_groups_hold_whole_tasks_and_every_item_once(benchmark, tasks):
    items = [*test_items(tasks), *test_items(tasks[:2])]
    for together, count in ((1, 8), (3, 3), (0, 1)):
        groups = benchmark.groups_of(items, together)
        assert sorted(i for group in groups for i in group) == list(range(len(items))) and len(groups) == count
        names = [{items[i][0].task_id for i in group} for group in groups]
        assert sum(map(len, names)) == 8 and max(map(len, names)) == (together or 8)


def test_differences_are_paired_and_nats_are_turned_round(benchmark):
    def result(exact, nats):
        values = {"exact": exact, "two_exact": exact, "nats": nats, "cells_true": nats, "size": np.ones(4)}
        return benchmark.Result({name: np.array(x, float) for name, x in values.items()}, 1.25)

    base, ours = result([1, 0, 0, 1], [1.0, 1.0, 1.0, 1.0]), result([1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5])
    line = benchmark.row("arm", ours, base)
    assert line.startswith("| arm | 3: +1 [") and "| +0.5000 [+0.5000, +0.5000]* |" in line
    assert "| -0.5000 [-0.5000, -0.5000]* | 1.000 | 1.25 |" in line
    assert benchmark.row("none", base, base).startswith("| none | 2: +0 [+0, +0] | 2: +0 [+0, +0] | +0.0000 [")


@pytest.mark.parametrize("together", [0, 1])
def test_an_arm_gives_each_output_its_own_values(benchmark, make_lab, tasks, together):
    lab = make_lab("--refine", "none")
    lab.system.eval()
    items, config = test_items(tasks[:3]), lab.system.config
    base = benchmark.measure(lab.system, lab.runtime, items, benchmark.Arm("none", "none"), together)
    backwards = benchmark.measure(lab.system, lab.runtime, items[::-1], benchmark.Arm("none", "none"), together)
    assert np.allclose(base.values["nats"], backwards.values["nats"][::-1], atol=1e-5)
    arm = benchmark.Arm("full", "none", TaskTraining(steps=1, weights="full", lr=0.05))
    fitted = benchmark.measure(lab.system, lab.runtime, items, arm, together)
    assert (fitted.values["nats"] != base.values["nats"]).all() and fitted.seconds > 0
    assert lab.system.config is config


def test_arms_are_none_mean_search_and_each_training(benchmark):
    args = benchmark.parse(["--run", "x", "--modes", "slot", "full", "--steps", "2", "3", "--lr", "0.5"])
    arms = benchmark.make_arms(args)
    assert [arm.name for arm in arms[:3]] == ["none", "mean", "search"]
    assert [(a.training.weights, a.training.steps, a.training.lr) for a in arms[3:]] == [
        ("slot", 2, 0.5), ("slot", 3, 0.5), ("full", 2, 0.5), ("full", 3, 0.5)]  # fmt: skip
