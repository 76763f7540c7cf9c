"""The sweep: its arms are real settings at other levels than the default's, and a budget of minutes ends training."""

from __future__ import annotations

import json

import ablation
import pytest
import sweep
from conftest import own_process

from config import parse_command_line, resolve, to_dict


@pytest.mark.parametrize("name", sweep.ARMS)
def test_every_arm_changes_one_setting_of_the_resolved_default(name):
    words = sweep.ARMS[name].flags.split()
    base, changed = (to_dict(resolve(parse_command_line(flags).config, "cpu")) for flags in ([], words))
    differing = [(part, key) for part, values in base.items() for key in values if changed[part][key] != values[key]]
    assert len(differing) == 1


def test_an_arm_is_trained_for_its_minutes_and_the_learning_rate_falls_within_them(tmp_path):
    words = ["--out", str(tmp_path), "--tasks", "6", "--side", "6", "--minutes", "0.05", "--one", "width: 24", "0"]
    words += ["--flags", "--batch-size 2 --model tiny --num-steps 1 --read-blocks 1 --rl-every 0 --refine none"]
    with own_process():
        assert sweep.main(words) == 0
    args = ablation.parse(words[:-5] + words[-2:], sweep.ARMS, sweep.__file__, sweep.__doc__, minutes=3.0)
    result = json.loads(ablation.result_path(args, "width: 24", 0).read_text())[""]
    assert 3.0 <= result["seconds"] < 4.5 and 0 < result["epochs"] < ablation.MOST_EPOCHS
    assert len(result["exact"]) == len(result["tasks"]) >= 6
