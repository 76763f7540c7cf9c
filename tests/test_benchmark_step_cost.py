"""The benchmark of a step's cost: ranges count without the ranges inside them, and keepers count for what they call."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile, record_function


def event(name: str, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(name=lambda: name, start_ns=lambda: start, duration_ns=lambda: end - start)


def test_ranges_count_without_the_ranges_inside_them(benchmark):
    events = [event("step_cost/step", 0, 100), event("aten::add", 1, 90), event("step_cost/reading", 10, 60),
              event("step_cost/prior", 20, 30), event("step_cost/prior", 30, 35), event("step_cost/loss", 60, 70),
              event("step_cost/step", 200, 210)]  # fmt: skip
    results = SimpleNamespace(events=lambda: events[::-1])
    times = benchmark.own_times(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    assert times == {"step": 40 + 10, "reading": 35, "prior": 15, "loss": 10}


def test_wrapped_functions_are_timed_by_the_real_profiler(benchmark):
    parts = SimpleNamespace(reading=lambda: parts.prior() + 1, prior=lambda: torch.ones(50, 50) @ torch.ones(50, 50),
                            loss=lambda: parts.prior().sum())  # fmt: skip
    ranges = benchmark.Ranges()
    for part in ("reading", "prior", "loss"):
        ranges.wrap(parts, part, part)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(benchmark.PREFIX + "step"):
        assert float(parts.loss()) == 50**3 and parts.reading().shape == (50, 50)
    times = benchmark.own_times(profiler)
    assert times.keys() == {"step", "reading", "prior", "loss"} and min(times.values()) > 0
    named = [e.name for e in profiler.events() if e.name.startswith(benchmark.PREFIX)]
    assert sorted(named) == [benchmark.PREFIX + part for part in ("loss", "prior", "reading", "step")]  # one prior


def test_loss_goes_back_alone_and_leaves_no_gradient(benchmark, make_lab):
    lab, calls = make_lab(), []
    forward = lab.system.efe_loss.forward
    lab.system.efe_loss.forward = lambda *args, **kwargs: (calls.append((args, kwargs)), forward(*args, **kwargs))[1]
    lab.step(0, rewarded=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        benchmark.go_back_through_loss(lab.system.efe_loss, *calls[0])
    assert benchmark.own_times(profiler)[benchmark.OWN_BACKWARD] > 0
    assert all(p.grad is None for p in lab.system.efe_loss.parameters())
