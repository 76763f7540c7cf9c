"""The ablation: its arms are real settings, its differences are paired, and it goes on where it stopped."""

from __future__ import annotations

import json

import ablation
import numpy as np
import pytest
from conftest import own_process

from config import TrainConfig, from_dict, parse_command_line, resolve, to_dict


@pytest.mark.parametrize("name", ablation.ARMS)
def test_every_arm_changes_a_setting_of_the_resolved_default(name):
    flags = ablation.ARMS[name].flags.split()
    base, changed = (to_dict(resolve(parse_command_line(words).config, "cpu")) for words in ([], flags))
    assert base != changed and from_dict(TrainConfig, changed)


def test_prediction_arms_change_nothing_that_training_reads():
    for arm in ablation.ARMS.values():
        sections = {path.partition(".")[0] for path in parse_command_line(arm.flags.split()).explicit}
        assert not arm.predicts or sections <= {"evaluation", "memory"}


def test_a_prediction_arm_changes_its_own_settings_and_keeps_all_others():
    trained = resolve(parse_command_line(["--refine-samples", "3"]).config, "cpu")
    changed = ablation.with_flags(trained, "--memory-similarity 1")
    before, after = to_dict(trained), to_dict(changed)
    assert after["memory"]["memory_similarity"] == 1 and after["evaluation"] == before["evaluation"]
    after["memory"]["memory_similarity"] = before["memory"]["memory_similarity"]
    assert after == before and ablation.with_flags(trained, "") == trained


def write_result(args, arm, seed, *, tasks, predictions=None, **values):
    path = ablation.result_path(args, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {name: list(values.get(name, [0.0] * len(tasks))) for name in
            (*ablation.METRICS, "unrefined_nats", "prior_nats", "exact_prior")}  # fmt: skip
    own = {**full, "tasks": tasks, "seconds": 1.0, "steps": 2}
    path.write_text(json.dumps({"": own, **{k: {**own, **v} for k, v in (predictions or {}).items()}}))


def test_differences_are_paired_by_output_and_averaged_over_seeds(tmp_path):
    args = ablation.parse(["--out", str(tmp_path), "--seeds", "0", "1"])
    tasks = ["a", "a", "b", "c"]
    for seed, nats in ((0, [1.0, 2.0, 3.0, 4.0]), (1, [2.0, 2.0, 2.0, 2.0])):
        write_result(args, "", seed, tasks=tasks, nats=nats, predictions={"refine none": {"nats": [5.0] * 4}})
        write_result(args, "risk off", seed, tasks=tasks, nats=[x + seed + 1 for x in nats])
    change, found, seeds = ablation.differences(args, "risk off", [0, 1])
    assert seeds == 2 and found == tasks and change["nats"].tolist() == [-1.5] * 4
    assert ablation.differences(args, "refine none", [0])[0]["nats"].tolist() == [-4.0, -3.0, -2.0, -1.0]
    assert ablation.differences(args, "z off", [0, 1]) == ({}, [], 0)
    table = ablation.table(args, list(ablation.ARMS), [0, 1])
    assert "| risk off | `--lambda-risk 0` | 2 | -1.5000 [-1.5000, -1.5000] * | +0.0000 [+0.0000, +0.0000] |" in table
    assert "z off" not in table and len(table.splitlines()) == 4


def test_interval_resamples_tasks_not_outputs():
    rng = np.random.default_rng(0)
    effect = rng.normal(0.1, 1, 60)
    values, tasks = np.repeat(effect, 5), [f"t{i // 5}" for i in range(300)]
    low, high = ablation.interval(values, tasks)
    half = 1.96 * effect.std() / 60**0.5
    assert (low, high) == (pytest.approx(effect.mean() - half, abs=0.05), pytest.approx(effect.mean() + half, abs=0.05))


def test_runs_that_are_there_are_not_run_again_unless_settings_or_code_differ(tmp_path):
    arms = ["risk off", "z off", "refine none"]

    def open_jobs(*words):
        args = ablation.parse(["--out", str(tmp_path), *words])
        return args, ablation.plan(args, arms, [0])

    args, jobs = open_jobs()
    assert jobs == [("", 0), ("risk off", 0), ("z off", 0)]  # a prediction arm has no run of its own
    write_result(args, "z off", 0, tasks=["a"])
    assert open_jobs()[1] == [("", 0), ("risk off", 0)]
    for words in (["--epochs", "5"], ["--code", "other"], ["--side", "12"], ["--flags", "--lr 1e-3"]):
        assert len(open_jobs(*words)[1]) == 3, words


def test_the_largest_effects_are_confirmed_and_all_of_rl_and_memory(tmp_path):
    args = ablation.parse(["--out", str(tmp_path)])
    tasks = [f"t{i}" for i in range(50)]
    noise = np.random.default_rng(1).normal(0, 1, 50)
    write_result(args, "", 0, tasks=tasks, nats=np.zeros(50).tolist())
    loss = [name for name, arm in ablation.ARMS.items() if arm.group == "loss"]
    for k, name in enumerate(loss):
        write_result(args, name, 0, tasks=tasks, nats=(noise + 0.2 * k).tolist())
    chosen = ablation.largest(args, list(ablation.ARMS), 0)
    others = [name for name in chosen if ablation.ARMS[name].group not in ("RL", "memory")]
    assert others == loss[-ablation.LARGEST :]
    rest = [name for name in ablation.ARMS if ablation.ARMS[name].group in ("RL", "memory")]
    assert rest == [name for name in chosen if name not in others]


def test_one_run_gives_the_values_of_every_output_for_itself_and_the_prediction_arms(new_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with own_process():
        found = ablation.train_and_collect(
            new_flags("--epochs", 1, "--max-batches", 2, "--refine-samples", 2, "--answer-confidence", 2),
            {name: arm.flags for name, arm in ablation.ARMS.items() if arm.predicts},
        )
    own = found[""]
    assert own["steps"] == 2 and len(own["tasks"]) == len(own["nats"]) == 8
    assert all(len(values[metric]) == 8 for values in found.values() for metric in ablation.METRICS)
    assert found["refine none"]["nats"] == own["unrefined_nats"] != own["nats"]
    assert found["refine none"]["prior_nats"] == own["prior_nats"]


def test_every_prediction_arm_starts_from_the_settings_that_were_trained(new_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = {"changed": "--refine none", "again": "", "memory": "--memory-similarity 1"}
    with own_process():
        found = ablation.train_and_collect(
            new_flags("--epochs", 1, "--max-batches", 2, "--refine-samples", 2, "--answer-confidence", 2), arms
        )
    assert found["again"]["nats"] == found[""]["nats"] != found["changed"]["nats"]
    assert found["memory"]["nats"] != found["changed"]["nats"]  # it still searches
