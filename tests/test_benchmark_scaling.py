"""The benchmark of how a step's time grows: the fit, the made-up tasks, and a sweep of two settings."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SMALL

from arc_data import load_tasks


def test_exponent_is_that_of_a_power_law(benchmark):
    values = [5, 10, 30]
    assert benchmark.exponent(values, [7 * x**1.5 for x in values]) == pytest.approx(1.5)
    assert benchmark.exponent(values, [7.0, 7.0, 7.0]) == pytest.approx(0.0, abs=1e-9)


def test_made_up_tasks_rename_colours_on_squares(benchmark, tmp_path):
    folder = benchmark.data_of(tmp_path, 3, 5)
    tasks = load_tasks(str(folder))
    assert len(tasks) == 3 and folder == benchmark.data_of(tmp_path, 3, 5)
    for task in tasks:
        names = {}
        for pair in task.train:
            assert pair.input.shape == pair.output.shape == (5, 5)
            for a, b in zip(pair.input.flat, pair.output.flat, strict=True):
                assert names.setdefault(int(a), int(b)) == int(b)
        assert len(set(names.values())) == len(names)
    assert len({np.concatenate([p.output.ravel() for p in t.train]).tobytes() for t in tasks}) == 3


@pytest.mark.parametrize("sweep, value", [("steps", 1), ("memory", 70)])
def test_a_sweep_varies_one_thing(benchmark, tmp_path, sweep, value):
    (setting,) = benchmark.settings_of(sweep, tmp_path, [*SMALL, "--device", "cpu"], (value,))
    assert setting.run.config.agent.num_steps == (1 if sweep == "steps" else 2)
    assert (len(setting.run.system.memory) >= 70) == (sweep == "memory")
    setting.run.close()
