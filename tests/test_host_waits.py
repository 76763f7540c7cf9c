"""How often a training step waits for the device: once for its gradients, once for what the memory is offered.

A wait is a call that reads a tensor on the host. On a CPU nothing waits, so the calls are counted, by the function of
the project that makes them. What the memory does with tensors that have been copied to the host is no wait; that it is
given nothing else, but the colour maps that the prior makes there, is checked.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainloop_complete_with_fixes as driver
from arc_system import to_host
from solver2 import LessonBuffer, MemoryBuffer

ROOT = Path(driver.__file__).resolve().parent
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
ON_HOST = {MemoryBuffer: ("admit", "count_hits", "update_gain", "refresh", "reevaluate"), LessonBuffer: ("admit",)}


def reader() -> str:
    """Return the innermost function of the project on the stack as "module.function"; what it calls counts for it.

    Reads by the optimizers of torch count apart: those are of step counters, which torch keeps on the host.
    """
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "optim":
            return "torch.optim"
        if path.parent == ROOT:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


@pytest.fixture
def waits(monkeypatch) -> Counter:
    """Count the reads of tensors by function, but for the memory's on tensors that `to_host` returned."""
    found, storages, inside = Counter(), set(), []

    def counted(name):
        original = getattr(Tensor, name)

        def read(self, *args, **kwargs):
            if not inside:
                found[reader()] += 1
            return original(self, *args, **kwargs)

        return read

    def copied(*tensors):
        copies = to_host(*tensors)
        storages.update(x.untyped_storage().data_ptr() for x in copies)
        return copies

    def parts(value):
        return value if isinstance(value, tuple) else (value, *getattr(value, "__dict__", {}).values())

    def on_host(store, name):
        original = getattr(store, name)

        def call(self, *args, **kwargs):
            for value in (x for a in (*args, *kwargs.values()) for x in parts(a)):
                known = not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in storages
                assert known or value.shape[1:] == (10, 10), f"{name} got a tensor that is not on the host"
            inside.append(name)
            try:
                return original(self, *args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    for store, names in ON_HOST.items():
        for name in names:
            monkeypatch.setattr(store, name, on_host(store, name))
    monkeypatch.setattr(driver, "to_host", copied)
    return found


def steps(run, count: int, scores: bool):
    """Take steps of the driver with their accounting, no log line due."""
    for k in range(count):
        moment = driver.Moment(run.state.step, 0.0, scores)
        step = driver.take_step(run, 0, k, moment, watch_qwen=False)
        assert step.update.taken
        driver.count_step(run, step)
        run.state.step += 1


@pytest.mark.parametrize("scores", [False, True], ids=["plain", "refinements scored"])
def test_a_step_waits_for_its_gradients_and_for_what_the_memory_is_offered(build, waits, scores):
    run = build("--threshold-low", "0")
    run.system.train()
    steps(run, 2, scores)  # the memory fills, and caches
    waits.clear()
    steps(run, 3, scores)
    assert len(run.system.memory) > 0 and len(run.system.lessons) > 0
    del waits["torch.optim"]
    assert waits == {"trainloop_complete_with_fixes.finish_step": 3, "arc_system.to_host": 3}


def test_every_kind_of_read_is_counted(waits):
    ones = torch.ones(2)
    reads = [lambda: ones.cpu(), lambda: ones.tolist(), lambda: ones.numpy(), lambda: bool(ones[0]),
             lambda: float(ones[0]), lambda: int(ones[0]), lambda: ones[0].item(), lambda: [0, 0][ones.long()[0]],
             lambda: ones.nonzero()]  # fmt: skip
    for number, read in enumerate(reads, 1):
        read()
        assert waits.total() >= number


def test_copies_to_the_host_are_exact_whatever_their_kinds():
    given = [torch.randn(3, 4), torch.tensor([[True, False]]), torch.arange(5), torch.tensor(2.5), torch.zeros(0, 3),
             torch.randn(2, 2, dtype=torch.float64).T, torch.randn(3).half(),
             torch.ones(2, requires_grad=True) * 3]  # fmt: skip
    for one, two in zip(given, to_host(*given), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two) and not two.requires_grad
        assert two.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()
