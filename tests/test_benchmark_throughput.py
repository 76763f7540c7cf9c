"""The benchmark of a step's speed: what it compares is what it says, and it runs on a few tasks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

from arc_data import MAX_SIDE, PAD, DataConfig, TaskSampler


@pytest.fixture
def sampler(tasks):
    return TaskSampler(tasks, DataConfig(), 5, 2048)


def same_grids(one, two):
    """Compare grids [n, h, w], the first on the smaller canvas."""
    rows, cols = one.shape[1:]
    outside = two.clone()
    outside[:, :rows, :cols] = PAD
    return torch.equal(two[:, :rows, :cols], one) and bool((outside == PAD).all())


def test_all_ways_train_on_the_same_pairs(benchmark, sampler):
    query, answer = sampler.batch(0, 0)
    plain, wide = benchmark.Batches(sampler), benchmark.Batches(sampler, wide=True)
    alone = benchmark.Batches(sampler, wide=True, alone=100)
    assert plain.numbers(0) == wide.numbers(0) == [0] and len(alone.numbers(0)) == len(query)
    (found, target), = plain.parts(0, 0, 1)
    assert torch.equal(found.input, query.input) and torch.equal(target.target, answer.target)
    large, large_target = wide.batch(0, 0)
    for name in ("input", "demo_input", "demo_output"):
        assert getattr(large, name).shape[1:] == (MAX_SIDE, MAX_SIDE)
        assert same_grids(getattr(query, name), getattr(large, name))
    assert same_grids(answer.target, large_target.target) and large_target.canvas == (MAX_SIDE, MAX_SIDE)
    singles = [alone.batch(0, number) for number in alone.numbers(0)]
    assert [single.contexts[0].key for single, _ in singles] == [context.key for context in query.contexts]
    assert all(len(single) == 1 and target.canvas == (MAX_SIDE, MAX_SIDE) for single, target in singles)
    few = benchmark.Batches(sampler, wide=True, alone=2)
    found = [few.batch(0, number)[0].contexts[0].key for number in few.numbers(0)]
    assert found == [query.contexts[0].key, query.contexts[-1].key]


def test_cells_are_counted_as_by_hand(benchmark, sampler):
    query, answer = sampler.batch(0, 1)
    real = computed = 0
    for b, context in enumerate(query.contexts):
        (h, w), (i, j) = answer.shapes[b], context.augmentation.apply_shape(context.input.shape)
        real += h * w + len({(r, c) for r in range(h) for c in range(w)} | {(r, c) for r in range(i) for c in range(j)})
        rows, cols = (max(query.input.shape[k], answer.target.shape[k]) for k in (1, 2))
        computed += answer.canvas[0] * answer.canvas[1] + rows * cols
    for name in ("demo_input", "demo_output"):
        grids = getattr(query, name)
        real, computed = real + int((grids != PAD).sum()), computed + grids.numel()
    assert benchmark.cell_counts(query, answer) == (real, computed)
    assert benchmark.cell_counts(*benchmark.widened((query, answer)))[0] == real


def test_factors_are_ratios_of_the_times_per_pair(benchmark):
    ours, other = (benchmark.Arm(name, None, None) for name in ("as trained", "batch size 1"))
    ours.rows, other.rows = [(1.0, 2.0, 4), (3.0, 2.0, 4)], [(8.0, 1.0, 4), (6.0, 1.0, 2)]
    (factor, each) = benchmark.factors([ours, other])["batch size 1"]
    assert factor == pytest.approx((14 / 6) / (4 / 8)) and each == pytest.approx([8.0, 4.0])
    ours.real, ours.computed = 74, 100
    assert benchmark.judged([ours, other], False) == 0 and benchmark.judged([ours, other], True) == 1
    ours.real, other.rows[1] = 75, (30.0, 1.0, 2)
    assert benchmark.judged([ours, other], True) == 0


def test_it_runs_on_few_tasks(benchmark, task_folder, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "FLOP_BATCHES", 1)
    monkeypatch.setattr(benchmark, "PROFILED_BATCHES", 1)
    monkeypatch.setattr(benchmark, "judged", lambda arms, limits: int(not limits or len(arms) != 3))
    words = ["--steps", "1", "--warmup-batches", "0", "--alone", "1", "--threads", "1", "--data", str(task_folder)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words, *SMALL])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    assert "as trained" in printed and "counted FLOPs: " in printed and "reward and policy" in printed


def test_kernels_are_counted_on_the_gpu_alone(benchmark, monkeypatch, capsys):
    """Two batches of 10 ms, of which the GPU computed 3 and 1 ms in three kernels; the host's events do not count."""

    def event(name, device, milliseconds):
        return SimpleNamespace(name=name, device_type=device, device_time_total=1e3 * milliseconds)

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            gpu = torch.autograd.DeviceType.CUDA
            return [event("mm", gpu, 2), event("add", gpu, 1), event("mm", gpu, 1),
                    event("aten::mm", torch.autograd.DeviceType.CPU, 9)]  # fmt: skip

    stepped = []
    monkeypatch.setattr(benchmark, "profile", Profile)
    monkeypatch.setattr(benchmark, "step_once", lambda run, number, k: stepped.append((number, k)))
    run = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu")))
    arm = benchmark.Arm("as trained", run, None, rows=[(0.01, 0.01, 4)] * 2, measured=[5, 7])
    benchmark.print_kernels(arm, 8)
    assert stepped == [(5, 5), (7, 7)]
    assert capsys.readouterr().out.splitlines() == [
        "kernels: 2 a step, 2.0 ms of the 10.0 ms that one takes without the profiler, 20%",
        "  75.0%  mm",
        "  25.0%  add",
    ]
