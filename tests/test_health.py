"""The health rules at their bounds, what they remember, and runs of the real driver that are made to fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import comparable, differences

import evaluate
import health
import loss_function
import trainloop_complete_with_fixes as driver
from arc_data import PAD
from arc_system import ARCSystem
from config import build_parser
from demo_prior import MAX_CANDIDATES
from health import EPOCH_RULES, RULES, WINDOW_RULES, Health
from model_persistence import CheckpointStore, plain
from policy_refined import PolicyRefinedAgent
from prior_cache import PriorCache
from report import read_metrics
from solver2 import EmaThreshold

RUN = Path("runs/demo")

# 1. The rules --------------------------------------------------------------------------------------------------------

WELL = {"batches": 50, "count": 50, "skipped": 0, "nonfinite": 0, "qwen_grad": 0.1, "qwen_zero": 0, "qwen_upd": 1e-4}
GOOD = {
    "epoch": 7, "reward": 0.01, "rewards": 12, "accuracy_delta": 0.01, "outputs": 100, "at_once": 30, "cells_true": 0.9,
    "color_cells": 0.6, "copied": 0.1, "constant": 0.1, "offered": 3000, "written": 80, "save_seconds": 1,
    "wall_seconds": 600,
}  # fmt: skip
BELOW, ABOVE = math.nextafter, lambda x: math.nextafter(x, math.inf)
BOUNDS = {  # flag: (numbers that are just fine, numbers that are just broken)
    "QWEN_NO_GRAD": (
        [{"count": 19, "qwen_zero": 19}, {"qwen_zero": 49}],
        [{"count": 20, "qwen_zero": 20}, {"count": 21, "qwen_zero": 21}, {"batches": 70, "qwen_zero": 50}],
    ),
    "QWEN_NO_UPDATE": (
        [{"qwen_upd": 1e-9}, {"qwen_upd": ABOVE(1e-9)}, {"qwen_upd": 0.0, "count": 49},
         {"qwen_upd": 0.0, "qwen_grad": 0.0}],
        [{"qwen_upd": BELOW(1e-9, 0)}, {"qwen_upd": 0.0}, {"qwen_upd": 0.0, "qwen_grad": 1e-30}],
    ),
    "LOSS_NAN": ([{"nonfinite": 0, "skipped": 3}], [{"nonfinite": 1}, {"nonfinite": 2}]),
    "SCALER_COLLAPSE": (
        [{"skipped": 15}, {"skipped": 14}, {"scale": 1.0}, {"batches": 9, "skipped": 9}, {"batches": 9, "scale": 0.5}],
        [{"skipped": 16}, {"scale": BELOW(1.0, 0)}, {"batches": 10, "skipped": 4}],
    ),
    "REWARD_LOW": ([{"reward": -0.1}, {"reward": ABOVE(-0.1)}], [{"reward": BELOW(-0.1, -1)}]),
    "NO_PROGRESS": (
        [{"accuracy_delta": 5e-324}, {"accuracy_delta": -5e-324}],
        [{"accuracy_delta": 0.0}, {"accuracy_delta": -0.0, "at_once": 50}],
    ),
    "BELOW_BASELINE": (
        [{"cells_true": 0.6}, {"cells_true": ABOVE(0.6)}],
        [{"cells_true": BELOW(0.6, 0)}, {"cells_true": BELOW(0.6, 0), "epoch": 3}],
    ),
    "COPYING": ([{"copied": 0.9}, {"copied": BELOW(0.9, 0)}], [{"copied": ABOVE(0.9)}]),
    "CONSTANT": ([{"constant": 0.5}, {"constant": BELOW(0.5, 0)}], [{"constant": ABOVE(0.5)}]),
    "MEM_IDLE": ([{"written": 1}], [{"written": 0}, {"written": 0, "offered": 50}]),
    "MEM_FULL": ([{"written": 2999}], [{"written": 3000}]),
    "SLOW_SAVE": (
        [{"save_seconds": 30}, {"save_seconds": BELOW(30, 0)}, {"save_seconds": 50, "wall_seconds": BELOW(60, 0)}],
        [{"save_seconds": ABOVE(30)}, {"save_seconds": 4, "wall_seconds": 60}],
    ),
}  # fmt: skip
UNDECIDED = {  # numbers that say nothing about the flag, whatever it is
    "QWEN_NO_GRAD": [{"count": 0, "qwen_zero": 0}, {"qwen_zero": None}],
    "QWEN_NO_UPDATE": [{"count": 0, "qwen_upd": 0.0}, {"qwen_upd": None}, {"qwen_upd": math.nan}],
    "REWARD_LOW": [{"reward": None}],
    "NO_PROGRESS": [{"accuracy_delta": 0.0, "rewards": 0}, {"accuracy_delta": 0.0, "at_once": 51},
                    {"accuracy_delta": None}],
    "BELOW_BASELINE": [{"cells_true": 0.0, "epoch": 2}, {"cells_true": None}],
    "COPYING": [{"copied": math.nan}, {"copied": 1.0, "outputs": 49}],
    "CONSTANT": [{"constant": 1.0, "outputs": 49}],
    "MEM_IDLE": [{"offered": 49, "written": 0}, {"written": None}],
    "MEM_FULL": [{"offered": 49, "written": 49}],
    "SLOW_SAVE": [{"save_seconds": 5, "wall_seconds": 5}],
}  # fmt: skip


def judge(watch: Health, changes: dict[str, float | None], step: int = 1) -> list[tuple[str, bool]]:
    """Return what changes when one window and one epoch are judged; None leaves a number out."""
    numbers = {name: value for name, value in {**WELL, **GOOD, **changes}.items() if value is not None}
    found = [*watch.judge_window(numbers, step), *watch.judge_epoch(numbers, step)]
    return [(change.rule.flag, change.raised) for change in found]


def broken(flag: str) -> dict[str, float]:
    """Return numbers that break a rule at once."""
    return BOUNDS[flag][1][0]


def test_every_rule_has_its_bounds_tested():
    assert list(BOUNDS) == list(RULES) and len(RULES) == len(WINDOW_RULES) + len(EPOCH_RULES) == 12


def test_good_numbers_raise_nothing():
    watch = Health()
    assert judge(watch, {}) == [] and watch.flags == {} and watch.summary() == {}


@pytest.mark.parametrize(("flag", "numbers"), [(f, n) for f, (fine, _) in BOUNDS.items() for n in fine])
def test_rule_is_not_broken_at_its_bound(flag, numbers):
    assert flag not in [name for name, _ in judge(Health(), numbers)]


@pytest.mark.parametrize(("flag", "numbers"), [(f, n) for f, (_, wrong) in BOUNDS.items() for n in wrong])
def test_rule_is_broken_just_beyond_its_bound(flag, numbers):
    watch = Health()
    assert (flag, True) in judge(watch, numbers) and flag in watch.raised()


@pytest.mark.parametrize(("flag", "numbers"), [(f, n) for f, cases in UNDECIDED.items() for n in cases])
def test_numbers_that_say_nothing_change_nothing(flag, numbers):
    fresh, ill = Health(), Health()
    judge(ill, broken(flag))
    assert flag not in [name for name, _ in judge(fresh, numbers)] and flag not in fresh.flags
    assert flag not in [name for name, _ in judge(ill, numbers)] and flag in ill.raised()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_texts_say_what_is_wrong_and_name_existing_options(rule):
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", rule.advice)) <= known
    assert rule.problem.isascii() and rule.advice.isascii() and rule.problem and rule.advice


# 2. What is remembered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", RULES)
def test_flag_is_raised_once_and_cleared_once(flag):
    watch = Health()
    seen = [judge(watch, numbers, step)
            for step, numbers in enumerate([{}, broken(flag), broken(flag), {}, {}, broken(flag)], 1)]  # fmt: skip
    mine = [[raised for name, raised in changes if name == flag] for changes in seen]
    assert mine == [[], [True], [], [False], [], [True]]
    assert watch.flags[flag] == health.Flag(raised=True, times=2, first=2, last=6)
    assert watch.summary()[flag] == {"raised": True, "times": 2, "first": 2, "last": 6,
                                     "problem": RULES[flag].problem, "advice": RULES[flag].advice}  # fmt: skip


def test_short_windows_add_up_until_one_is_fine():
    ill = {"count": 7, "qwen_zero": 7}
    for middle, expected in (({}, None), (ill, 4), ({"count": 0}, 5), ({"qwen_zero": None}, 5)):
        watch = Health()
        windows = [ill, ill, middle, ill, ill]
        raised = [step for step, numbers in enumerate(windows, 1) if ("QWEN_NO_GRAD", True) in judge(watch, numbers)]
        assert raised == ([] if expected is None else [3 if middle is ill else 4]), middle


def test_state_is_plain_and_goes_on_where_it_was():
    watch, again = Health(), Health()
    for step, numbers in enumerate([broken("COPYING"), broken("LOSS_NAN"), {"count": 15, "qwen_zero": 15}], 1):
        judge(watch, numbers, step)
    state = watch.state_dict()
    assert plain(state) == json.loads(json.dumps(state)) == state
    again.load_state_dict(json.loads(json.dumps(state)))
    assert (again.state_dict(), again.summary(), again.raised()) == (state, watch.summary(), watch.raised())
    for numbers in ({"count": 5, "qwen_zero": 5}, {"copied": 1.0}, {}):  # 15 + 5 batches without gradient
        assert judge(again, numbers, 4) == judge(watch, numbers, 4)
    assert again.flags["QWEN_NO_GRAD"].times == 1 and again.state_dict() == watch.state_dict()


def test_flag_that_is_no_rule_any_more_is_left_out():
    watch = Health()
    old = {"raised": True, "times": 1, "first": 1, "last": 2}
    watch.load_state_dict({"flags": {"GONE": old, "COPYING": old}, "lasted": {"GONE": 3}})
    assert watch.raised() == ["COPYING"] and watch.state_dict()["lasted"] == {}


# 3. Runs of the driver -----------------------------------------------------------------------------------------------


def no_qwen_gradient(patch: pytest.MonkeyPatch) -> None:
    class Deaf(ARCSystem):
        def __init__(self, *args):
            super().__init__(*args)
            for _, p in self.language_parameters():
                p.register_hook(torch.zeros_like)

    patch.setattr(driver, "ARCSystem", Deaf)


def qwen_in_bf16(patch: pytest.MonkeyPatch) -> None:
    class Stiff(ARCSystem):
        def __init__(self, *args):
            super().__init__(*args)
            with torch.no_grad():
                for _, p in self.language_parameters():  # as trained weights are: none so small that it could move
                    p.copy_(torch.where(p < 0, p - 0.01, p + 0.01))
                    p.data = p.data.bfloat16()

    patch.setattr(driver, "ARCSystem", Stiff)


def low_reward(patch: pytest.MonkeyPatch) -> None:
    score = driver.score_refinements

    def score_low(*args):
        judged = score(*args)
        return judged._replace(reward=torch.full_like(judged.reward, -0.11))

    patch.setattr(driver, "score_refinements", score_low)


def nan_loss(patch: pytest.MonkeyPatch) -> None:
    step_cost = loss_function.step_cost
    patch.setattr(loss_function, "step_cost", lambda logits: step_cost(logits) * math.nan)


def lazy_policy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PolicyRefinedAgent, "update", lambda self, optimizer, terms: None)


def answers(change: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what makes `change(query, first attempt)` the first attempt of every prediction."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        predict = evaluate.predict

        def predict_badly(system, query, runtime):
            found = predict(system, query, runtime)
            return dataclasses.replace(found, grid=change(query, found.grid))

        patch.setattr(evaluate, "predict", predict_badly)

    return spoil


def high_baseline(patch: pytest.MonkeyPatch) -> None:
    real = driver.baselines
    patch.setattr(health, "FIRST_JUDGED_EPOCH", 0)
    patch.setattr(driver, "baselines", lambda *args: {**real(*args), "color_cells": 1.01})


def idle_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmaThreshold, "admit_batch", lambda self, score, exact: np.zeros(len(score), bool))


def slow_disk(patch: pytest.MonkeyPatch) -> None:
    save = CheckpointStore.save
    patch.setattr(health, "JUDGED_SECONDS", 0.0)
    patch.setattr(CheckpointStore, "save", lambda self, *args: (time.sleep(0.5), save(self, *args))[1])


SHORT = ("--epochs", 1, "--max-batches", 1, "--rl-every", 0, "--eval-tasks", 2)
FAILURES = {  # flag: (what spoils the run, command line)
    "QWEN_NO_GRAD": (no_qwen_gradient, ("--epochs", 1, "--batch-size", 1, "--max-batches", 21, "--log-every", 7,
                                        "--rl-every", 0, "--eval-tasks", 1)),
    "QWEN_NO_UPDATE": (qwen_in_bf16, ("--epochs", 3, "--batch-size", 1, "--max-batches", 17, "--lr", "1e-7",
                                      "--rl-every", 0, "--eval-tasks", 1, "--eval-every", 3)),
    "REWARD_LOW": (low_reward, (*SHORT, "--rl-every", 1)),
    "NO_PROGRESS": (lazy_policy, (*SHORT, "--rl-every", 1, "--answer-confidence", 2)),
    "BELOW_BASELINE": (high_baseline, SHORT),
    "COPYING": (answers(lambda query, grid: query.input), (*SHORT, "--eval-tasks", 0)),
    "CONSTANT": (answers(lambda query, grid: torch.where(grid == PAD, PAD, 3)), SHORT),
    "MEM_IDLE": (idle_memory, SHORT),
    "SLOW_SAVE": (slow_disk, SHORT),
}  # fmt: skip


def flags_of_run() -> dict:
    """Return the flags that run.json of the run named demo lists."""
    return json.loads((RUN / "run.json").read_text())["flags"]


def flag_events() -> list[tuple[str, bool]]:
    """Return the flags raised and cleared in metrics.jsonl."""
    records = read_metrics(RUN / "metrics.jsonl")
    return [(r["flag"], r["raised"]) for r in records if r["event"] == "flag"]


@pytest.mark.parametrize("flag", FAILURES)
def test_driver_says_and_lists_what_is_wrong(flag, drive, new_flags, monkeypatch, capsys):
    spoil, flags = FAILURES[flag]
    monkeypatch.setattr(health, "FEWEST", 1)
    spoil(monkeypatch)
    assert drive(*new_flags(*flags)) == 0
    printed, rule = capsys.readouterr(), RULES[flag]
    assert f"warning: {flag}: {rule.problem}\nhint: {rule.advice}\n" in printed.err
    assert printed.err.count(f"{flag}:") == 1 and flag not in printed.out
    listed = flags_of_run()[flag]
    assert (listed["raised"], listed["times"], listed["advice"]) == (True, 1, rule.advice)
    assert flag_events().count((flag, True)) == 1 and (flag, False) not in flag_events()
    lines = printed.out.splitlines()
    start = lines.index("Epoch 0 Summary:")
    judged = any(line.startswith("  Val Accuracy (2 attempts): ") for line in lines[start + 6 : start + 7])
    assert lines[start + 6 + judged].startswith("  Terms: ") and judged == ("Val Accuracy: n/a" not in printed.out)
    assert "Cells per second" in printed.out


def test_diverging_run_says_so_before_its_log_line_is_due(drive, new_flags, monkeypatch, capsys):
    nan_loss(monkeypatch)
    assert drive(*new_flags("--epochs", 1, "--batch-size", 1, "--rl-every", 0)) == 1
    printed = capsys.readouterr().err
    assert printed.count("warning: LOSS_NAN: ") == printed.count("warning: SCALER_COLLAPSE: ") == 1
    assert printed.index("LOSS_NAN") < printed.index("error: training diverged")
    assert flags_of_run().keys() == {"LOSS_NAN", "SCALER_COLLAPSE"}
    assert json.loads((RUN / "run.json").read_text())["status"] == "failed"


def test_nonfinite_step_raises_a_flag_that_the_next_window_clears(drive, new_flags, monkeypatch, capsys):
    step_cost, calls = loss_function.step_cost, []

    def second_is_nan(logits):
        calls.append(None)
        return step_cost(logits) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(loss_function, "step_cost", second_is_nan)
    flags = ("--epochs", 1, "--max-batches", 4, "--log-every", 1, "--rl-every", 0, "--eval-tasks", 2)
    assert drive(*new_flags(*flags)) == 0
    printed = capsys.readouterr()
    assert printed.err.count("warning: LOSS_NAN: ") == 1 and printed.out.count("note: LOSS_NAN is over\n") == 1
    assert [event for event in flag_events() if event[0] == "LOSS_NAN"] == [("LOSS_NAN", True), ("LOSS_NAN", False)]
    listed = flags_of_run()["LOSS_NAN"]
    assert (listed["raised"], listed["first"], listed["last"]) == (False, 2, 2)
    assert printed.out.index("[Batch    3]") < printed.out.index("LOSS_NAN is over") < printed.out.index("[Batch    4]")


def test_resumed_run_does_not_repeat_itself(drive, new_flags, monkeypatch, capsys):
    idle_memory(monkeypatch)
    monkeypatch.setattr(health, "FEWEST", 1)
    assert drive(*new_flags(*SHORT)) == 0
    first = flags_of_run()["MEM_IDLE"]
    assert capsys.readouterr().err.count("warning: MEM_IDLE: ") == 1
    assert drive("--resume", "--epochs", 2) == 0
    assert "MEM_IDLE" not in capsys.readouterr().err
    assert flag_events().count(("MEM_IDLE", True)) == 1
    assert flags_of_run()["MEM_IDLE"] == {**first, "last": 2}


def test_run_resumed_while_a_flag_is_raised_ends_with_the_same_bits(drive, new_flags, monkeypatch, capsys):
    train_step, stop_at = driver.train_step, [None]

    def spoil_two_steps(system, query, answer, moment):
        result = train_step(system, query, answer, moment)
        result.total = result.total * (math.nan if moment.step < 2 else 1.0)
        if moment.step == stop_at[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(driver, "train_step", spoil_two_steps)
    flags = ("--epochs", 1, "--max-batches", 4, "--log-every", 1, "--rl-every", 0, "--eval-tasks", 2)
    assert drive(*new_flags(*flags, "--out", "whole")) == 0
    stop_at[0] = 1
    assert drive(*new_flags(*flags)) == 143
    assert flags_of_run()["LOSS_NAN"]["raised"]
    capsys.readouterr()
    assert drive("--resume") == 0
    printed = capsys.readouterr()
    assert "LOSS_NAN" not in printed.err and printed.out.count("note: LOSS_NAN is over\n") == 1
    (expected, *rest), (found, *more) = comparable(Path("whole/demo")), comparable(RUN)
    for payload in (expected, found):
        del payload["config"]["run"]["out"]
    assert found["loop"]["health"]["flags"].keys() == {"LOSS_NAN"}
    assert differences([expected, *rest], [found, *more]) == []


def enough_to_judge(patch: pytest.MonkeyPatch) -> None:
    """Let eight tasks be enough: nothing is known already, and some answer depends on the refinement."""
    patch.setattr(health, "FEWEST", 1)
    patch.setattr(health, "FIRST_JUDGED_EPOCH", 0)
    validate = driver.validate

    def validate_many(*args):
        scores = validate(*args)
        return {**scores, "accuracy_delta": scores["accuracy_delta"] or -1e-3}

    patch.setattr(driver, "validate", validate_many)

    def no_candidates(self, query, sizes, canvas, count=MAX_CANDIDATES):
        return torch.full((len(query), count, *canvas), PAD), torch.zeros(len(query), count)

    patch.setattr(PriorCache, "candidates", no_candidates)


def test_healthy_run_raises_no_flag(drive, new_flags, monkeypatch, capsys):
    """Though every rule is judged."""
    judged = Counter()
    for name in ("WINDOW_RULES", "EPOCH_RULES"):
        watched = [dataclasses.replace(rule, is_broken=lambda n, rule=rule: note_verdict(judged, rule, n))
                   for rule in getattr(health, name)]  # fmt: skip
        monkeypatch.setattr(health, name, watched)
    enough_to_judge(monkeypatch)
    assert drive(*new_flags("--epochs", 1, "--answer-confidence", 2, "--log-every", 3)) == 0
    printed = capsys.readouterr()
    assert (flags_of_run(), flag_events()) == ({}, [])
    assert "warning" not in printed.err and "is over" not in printed.out
    assert {flag for flag, count in judged.items() if count} == RULES.keys() - {"SLOW_SAVE"}  # too short for that
    assert judged["QWEN_NO_GRAD"] == judged["LOSS_NAN"] == 3 and judged["MEM_IDLE"] == judged["COPYING"] == 1


def note_verdict(judged: Counter, rule: health.Rule, numbers: health.Numbers) -> bool | None:
    """Return what the rule says, and count it when it is a verdict."""
    verdict = rule.is_broken(numbers)
    judged[rule.flag] += verdict is not None
    return verdict


def test_small_run_raises_no_flag(reference):
    assert json.loads((reference.path / "run.json").read_text())["flags"] == {}
    assert "warning" not in (reference.path / "run.log").read_text()
