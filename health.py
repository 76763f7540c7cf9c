"""What can silently go wrong in a run: rules on the numbers of a log window or of an epoch, and which of them hold now.

Imports the standard library only; plain numbers in, flags out. Used by the driver, which says what changed, lists the
flags in run.json and keeps their state in every checkpoint. Nothing here looks at a tensor, so no rule costs a wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

FIRST_JUDGED_EPOCH = 3  # epochs count from 0; before it a model may be worse than one colour
JUDGED_SECONDS = 60.0  # shares of a shorter time say nothing
FEWEST = 50  # outputs of a validation or samples of an epoch that say something about all of them

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """One thing that can go wrong.

    is_broken gets numbers that hold every one of `needs`, none of them nan, and returns None where they decide nothing.
    The flag is raised once windows in which it is broken, one after the other, hold `lasting` batches; the number named
    `counted` says how many batches a window has. An epoch is judged at once.
    """

    flag: str
    needs: tuple[str, ...]
    is_broken: Callable[[Numbers], bool | None]
    problem: str
    advice: str
    lasting: int = 0
    counted: str = "batches"


def _no_gradient(n: Numbers) -> bool | None:
    return n["qwen_zero"] >= n["count"] if n["count"] else None


def _no_update(n: Numbers) -> bool | None:
    return n["qwen_grad"] > 0 and n["qwen_upd"] < 1e-9 if n["count"] else None


def _scaler_collapse(n: Numbers) -> bool | None:
    return n.get("scale", math.inf) < 1 or 10 * n["skipped"] > 3 * n["batches"]


def _no_progress(n: Numbers) -> bool | None:
    planned = n["outputs"] - n["at_once"]  # an answer without planning is the same under every prompt
    return n["accuracy_delta"] == 0.0 if n["rewards"] and planned >= FEWEST else None


def _below_baseline(n: Numbers) -> bool | None:
    return n["cells_true"] < n["color_cells"] if n["epoch"] >= FIRST_JUDGED_EPOCH else None


def _copying(n: Numbers) -> bool | None:
    return n["copied"] > 0.9 if n["outputs"] >= FEWEST else None


def _constant(n: Numbers) -> bool | None:
    return n["constant"] > 0.5 if n["outputs"] >= FEWEST else None


def _memory_idle(n: Numbers) -> bool | None:
    return n["written"] == 0 if n["offered"] >= FEWEST else None


def _memory_full(n: Numbers) -> bool | None:
    return n["written"] >= n["offered"] if n["offered"] >= FEWEST else None


def _slow_save(n: Numbers) -> bool | None:
    return n["save_seconds"] > 0.05 * n["wall_seconds"] if n["wall_seconds"] >= JUDGED_SECONDS else None


# Numbers of a window, sums and means over the batches since the last log line: batches; count and skipped (steps taken
# and not), nonfinite (steps skipped for more than an overflow that a loss scaler expects); scale of an enabled loss
# scaler; where the language model trains, qwen_grad, qwen_zero (batches without gradient) and qwen_upd.
WINDOW_RULES = (
    Rule(
        "QWEN_NO_GRAD", ("count", "qwen_zero"), _no_gradient,
        "Qwen receives no gradient",
        "check --use-text and --train-llm; --precision fp32 if fp16 underflows",
        lasting=20, counted="count",
    ),
    Rule(
        "QWEN_NO_UPDATE", ("count", "qwen_grad", "qwen_upd"), _no_update,
        "Qwen has a gradient, but its weights do not move",
        "are they bf16 or fp16 (they must be fp32)? is --llm-lr (--lr for tiny) too small?",
        lasting=50, counted="count",
    ),
    Rule(
        "LOSS_NAN", ("nonfinite",), lambda n: n["nonfinite"] > 0,
        "the loss or its gradient was not finite; those steps were skipped",
        "if it lasts: --precision fp32, or a smaller --lr and --muon-lr",
    ),
    Rule(
        "SCALER_COLLAPSE", ("batches", "skipped"), _scaler_collapse,
        "the loss scale fell below 1, or more than 30 % of the steps are skipped",
        "switch to --precision fp32",
        lasting=10,
    ),
)  # fmt: skip

# Numbers of an epoch: epoch, rewards (batches in which refinements were scored), reward; offered to the memory and
# written to it; save_seconds of wall_seconds; and what validation found, beside color_cells.
EPOCH_RULES = (
    Rule(
        "REWARD_LOW", ("reward",), lambda n: n["reward"] < -0.1,
        "refining the prompt makes predictions worse (mean reward below -0.1)",
        "lower --action-scale or --rl-lr",
    ),
    Rule(
        "NO_PROGRESS", ("accuracy_delta", "rewards", "outputs", "at_once"), _no_progress,
        "the refined prompt changes no answer (Accuracy Delta is exactly 0)",
        "train longer, or raise --rl-lr or --action-scale; --rl-every 0 saves the time",
    ),
    Rule(
        "BELOW_BASELINE", ("epoch", "cells_true", "color_cells"), _below_baseline,
        "fewer cells are right than in one colour all over",
        "check the learning rates (--lr, --muon-lr) and --kappa (1 starts from the prior)",
    ),
    Rule(
        "COPYING", ("copied", "outputs"), _copying,
        "the answer is the input in more than 90 % of the pairs whose size stays",
        "train longer; lower --kappa if the prior copies as well",
    ),
    Rule(
        "CONSTANT", ("constant", "outputs"), _constant,
        "more than half of the answers are of one colour",
        "train longer, or lower the learning rates (--lr, --muon-lr)",
    ),
    Rule(
        "MEM_IDLE", ("offered", "written"), _memory_idle,
        "the memory kept nothing of this epoch",
        "lower --threshold-low or --threshold-kappa; nothing to mend where the prior answers everything",
    ),
    Rule(
        "MEM_FULL", ("offered", "written"), _memory_full,
        "the memory kept everything of this epoch, so it does not choose",
        "raise --threshold-low or --threshold-kappa",
    ),
    Rule(
        "SLOW_SAVE", ("save_seconds", "wall_seconds"), _slow_save,
        "saving takes more than 5 % of the time",
        "raise --save-every, or put --out on a faster disk",
    ),
)  # fmt: skip

RULES = {rule.flag: rule for rule in (*WINDOW_RULES, *EPOCH_RULES)}


@dataclass
class Flag:
    """When a rule was broken: raised now or not, how often it was raised, and the first and last step that showed it.

    Steps are batches done so far over all epochs.
    """

    raised: bool
    times: int
    first: int
    last: int


class Change(NamedTuple):
    """A flag that was raised, or cleared."""

    rule: Rule
    raised: bool


class Health:
    """Which flags are raised, and since when; all of it survives a restart.

    A rule whose numbers are missing is not judged: its flag stays as it is.
    """

    def __init__(self) -> None:
        self.flags: dict[str, Flag] = {}
        self._lasted: dict[str, int] = {}  # batches of the broken windows so far, by flag

    def judge_window(self, numbers: Numbers, step: int) -> list[Change]:
        """Return the flags that the window which ends at `step` raises and clears."""
        return self._judge(WINDOW_RULES, numbers, step)

    def judge_epoch(self, numbers: Numbers, step: int) -> list[Change]:
        """Return the flags that the epoch which ends at `step` raises and clears."""
        return self._judge(EPOCH_RULES, numbers, step)

    def raised(self) -> list[str]:
        """Return the names of the flags that are raised now."""
        return [name for name, flag in self.flags.items() if flag.raised]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return every flag that was ever raised, with what is wrong and what to do, for run.json."""
        texts = {name: {"problem": RULES[name].problem, "advice": RULES[name].advice} for name in self.flags}
        return {name: {**asdict(flag), **texts[name]} for name, flag in self.flags.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"flags": {name: asdict(flag) for name, flag in self.flags.items()}, "lasted": dict(self._lasted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; flags that are no rule any more are left out."""
        self.flags = {name: Flag(**values) for name, values in state["flags"].items() if name in RULES}
        self._lasted = {name: int(count) for name, count in state["lasted"].items() if name in RULES}

    def _judge(self, rules: Iterable[Rule], numbers: Numbers, step: int) -> list[Change]:
        changes = []
        for rule in rules:
            known = all(not math.isnan(numbers.get(name, math.nan)) for name in rule.needs)
            is_broken = rule.is_broken(numbers) if known else None
            if is_broken is None:
                continue
            flag = self.flags.get(rule.flag)
            was_raised = flag is not None and flag.raised
            if is_broken and self._lasts(rule, numbers):
                if flag is None:
                    flag = self.flags[rule.flag] = Flag(raised=False, times=0, first=step, last=step)
                flag.raised, flag.last, flag.times = True, step, flag.times + (not was_raised)
            elif not is_broken:
                self._lasted.pop(rule.flag, None)
                if was_raised:
                    flag.raised = False
            if (now := flag is not None and flag.raised) != was_raised:
                changes.append(Change(rule, now))
        return changes

    def _lasts(self, rule: Rule, numbers: Numbers) -> bool:
        """Return whether a rule that is broken in this window, too, has been so for long enough."""
        if not rule.lasting:
            return True
        self._lasted[rule.flag] = self._lasted.get(rule.flag, 0) + int(numbers[rule.counted])
        return self._lasted[rule.flag] >= rule.lasting
