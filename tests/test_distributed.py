"""Several processes: a step equals that of one process, states stay equal, runs survive kills and other numbers.

What a step computes is tested with threads for processes, which meet at a `Board`; whole runs are real processes.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, comparable, differences, run_main, write_tasks
from torch import Tensor

import arc_system
import model_persistence
import trainloop_complete_with_fixes as driver
from arc_data import PAD
from config import ConfigError, parse_command_line
from demo_prior import MAX_CANDIDATES
from distributed import ALONE, Ended, PeerError, Share, World, fingerprint, share_of
from model_persistence import find_launched, list_checkpoints, read_checkpoint
from prior_cache import PriorCache
from report import read_metrics
from run_record import RunRecord
from trainloop_complete_with_fixes import SMALLER_BATCHES

# Steps so small that rounding does not grow: at the usual rates a last bit becomes 1e-4 within two epochs, in one
# process as well. With thresholds so low, and `no_answers`, the memory admits and recalls.
CALM = ("--lr", "1e-5", "--muon-lr", "1e-5", "--rl-lr", "1e-5", "--llm-lr", "1e-5", "--threshold-low", "0.1",
        "--threshold-high", "0.1", "--kappa", "0", "--rl-every", "2")  # fmt: skip

candidates = PriorCache.candidates


def no_answers(prior, query, sizes, side, count=MAX_CANDIDATES):
    """Return candidates as `PriorCache.candidates` does, but an empty one where the best alone is asked for.

    That is what the memory compares with: it admits only what is better.
    """
    grids, weights = candidates(prior, query, sizes, side, count)
    return (grids.fill_(PAD), weights) if count == 1 else (grids, weights)


@pytest.fixture(autouse=True, scope="module")
def memory_that_admits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PriorCache, "candidates", no_answers)
        yield


# 1. Threads for processes --------------------------------------------------------------------------------------------


class Board:
    """Where threads leave a value for the others."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size, timeout=240), [None] * size

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Return what all threads brought, by rank."""
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threads(World):
    """A world whose processes are threads."""

    board: Board | None = None

    def add_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.board.swap(self.rank, tensor.clone())).sum(0))

    def tell(self, value: Any) -> Any:
        return self.board.swap(self.rank, value)[0]

    def gather(self, value: Any) -> list[Any]:
        return self.board.swap(self.rank, value)


def in_threads(size: int, action: Callable[[Threads], Any]) -> list[Any]:
    """Return what the action returned or raised in each of the threads."""
    board, found = Board(size), [None] * size

    def work(rank: int) -> None:
        try:
            found[rank] = action(Threads(rank=rank, size=size, board=board))
        except Exception as error:
            found[rank] = error
            if isinstance(error, threading.BrokenBarrierError):
                board.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def team(build) -> Callable[..., tuple[driver.Run, Callable[[Callable], list]]]:
    """Return a function that gives a run of one process, and what does something in `size` threads with such a run."""

    def refuse(warning: str) -> None:
        raise AssertionError(warning)

    def make(size: int, *flags: object, prepare: Callable[[driver.Run], None] = id) -> tuple[driver.Run, Callable]:
        alone, *others = (build(*flags) for _ in range(size + 1))
        for run in (alone, *others):
            prepare(run)
        for run in others:
            run.system.prior.close()

        def everywhere(action: Callable[[driver.Run], Any]) -> list[Any]:
            def one(world: Threads) -> Any:
                run = others[world.rank]
                run.world, run.console.process = world, world.rank
                run.system.prior.open_disk("", refuse)  # SQLite wants it to be opened in the thread that uses it
                try:
                    return action(run)
                finally:
                    run.system.prior.close()

            return in_threads(size, one)

        return alone, everywhere

    return make


def gaps(a: Any, b: Any, place: str = "") -> Iterator[tuple[float, str]]:
    """Yield (difference, place) of all numbers in two nested values, of those above 1 as a share of themselves."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from gaps(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from gaps(x, y, f"{place}/{i}")
    elif isinstance(a, (int, float, Tensor)) and isinstance(b, (int, float, Tensor)):
        x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        same = x.shape == y.shape and ((x == y) | (x.isnan() & y.isnan()))
        gap = torch.where(same, 0.0, (x - y).abs() / x.abs().clamp_min(1)) if x.shape == y.shape else x.new_tensor(9e9)
        if gap.numel():
            yield float(gap.nan_to_num(nan=9e9).max()), place
    elif a != b:
        yield 9e9, f"{place}: {a!r} and {b!r}"


def apart(a: Any, b: Any, most: float = 1e-5) -> list[tuple[float, str]]:
    """Return the numbers of two nested values that are further apart than `most`, the worst first."""
    return sorted((gap for gap in gaps(a, b) if gap[0] > most), reverse=True)[:9]


def numbers_of(step: driver.Step) -> dict[str, Any]:
    """Return all that is logged about a step."""
    numbers, terms = step.numbers, step.numbers.terms
    found = {"total": numbers.total.detach(), "terms": terms.terms, "weighted": terms.weighted, "cells": step.cells,
             "mask": terms.hard_fraction, "norm": step.update.norm, "qwen_norm": step.update.qwen_norm,
             "taken": step.update.taken, "admitted": step.admitted, "qwen_ratio": step.update.qwen_ratio,
             "pairs": [context.key for context in step.contexts]}  # fmt: skip
    if numbers.policy is not None:
        names = ("total", "policy", "value", "entropy", "curiosity", "tied", "bonus")
        found |= {f"policy/{name}": getattr(numbers.policy, name).detach() for name in names}
        found |= {"averages": numbers.policy.averages, "reward": numbers.reward}
    return found


def take_steps(run: driver.Run, count: int) -> tuple[list[dict], dict, int]:
    """Return the numbers of the first steps, the state after them, and its fingerprint."""
    run.system.train()
    steps = [driver.take_step(run, 0, k, driver.Moment(k, k / 8, k % 2 == 0), watch_qwen=True) for k in range(count)]
    state = driver.shared_part(driver.checkpoint_payload(run))
    return [numbers_of(step) for step in steps], state, fingerprint(state)


@pytest.fixture
def eventful(monkeypatch) -> Callable[[driver.Run], None]:
    """Return what makes the first steps of a run exercise everything: prompts matter, one reward is not finite.

    An untrained planner does not listen to its prompt.
    """
    rate, broken = arc_system.rate, set()

    def rated(system, query, *arguments):
        found = rate(system, query, *arguments)
        unscorable = torch.tensor([context.key in broken for context in query.contexts])
        return dataclasses.replace(found, total=found.total.masked_fill(unscorable, torch.nan))

    monkeypatch.setattr(arc_system, "rate", rated)

    def prepare(run: driver.Run) -> None:
        broken.add(run.sampler.batch(0, 0)[0].contexts[0].key)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in run.system.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)

    return prepare


@pytest.mark.parametrize(("size", "pairs"), [(2, 5), (3, 2)])  # (3, 2): one process has nothing
def test_steps_of_several_processes_are_those_of_one(size, pairs, team, eventful):
    alone, everywhere = team(size, *CALM, "--batch-size", pairs, prepare=eventful)
    numbers, state, _ = take_steps(alone, 4)
    found = everywhere(lambda run: take_steps(run, 4))
    assert len({digest for _, _, digest in found}) == 1  # all processes hold the same bits
    assert apart(numbers, found[0][0]) == []
    halves = {"/lessons/rows/direction": 2**-10}  # float16: a rounding error may become one of its steps
    assert [gap for gap in apart(state, found[0][1]) if gap[0] > halves.get(gap[1], 0)] == []
    rewards = torch.cat([step["reward"] for step in numbers if "reward" in step])
    assert rewards.isnan().sum() == 1 and rewards.nan_to_num().any()
    assert state["memory"]["counters"]["admissions"]
    assert pairs == 2 or state["memory"]["counters"]["answered"]


def test_a_prompt_meets_the_prompts_of_the_whole_batch_and_the_refinements_are_the_same(team, monkeypatch):
    alone, everywhere = team(2, *CALM, "--batch-size", 6)
    numbers, _, _ = take_steps(alone, 1)
    monkeypatch.setattr(Share, "rows", lambda share, *tensors: tensors)  # each process only its own
    monkeypatch.setattr(Share, "own", lambda share, rows: rows)
    monkeypatch.setattr(driver, "learn_from", lambda *_: 0)
    (lonely, _, _), _ = everywhere(lambda run: take_steps(run, 1))
    assert abs(lonely[0]["terms"]["prompt"] - numbers[0]["terms"]["prompt"]) > 1e-2
    assert abs(lonely[0]["policy/policy"] - numbers[0]["policy/policy"]) < 1e-5


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(team, monkeypatch):
    _, everywhere = team(2, *CALM, "--batch-size", 4)
    backpropagate = driver.backpropagate

    def broken(result, system, runtime, share=1.0):
        backpropagate(result, system, runtime, share)
        if result.share.start:
            next(p for p in system.agent.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf

    monkeypatch.setattr(driver, "backpropagate", broken)
    before, after = {}, {}

    def attempt(run: driver.Run) -> bool:
        before[run.world.rank] = fingerprint(driver.shared_part(driver.checkpoint_payload(run)))
        taken = driver.take_step(run, 0, 0, driver.Moment(0, 0.0, True), watch_qwen=False).update.taken
        after[run.world.rank] = fingerprint(driver.shared_part(driver.checkpoint_payload(run)))
        return taken

    assert everywhere(attempt) == [False, False]
    assert before == after and before[0] == before[1]


def test_validation_of_several_processes_has_the_bits_of_one(team):
    alone, everywhere = team(3, "--batch-cells", 110, "--batch-size", 0)
    assert len(driver.evaluation_batches(alone.items, 220)) == 4  # the first process has two of them
    expected = driver.run_validation(alone)
    for scores in everywhere(driver.run_validation):
        del scores["seconds"]
        assert differences({k: v for k, v in expected.items() if k != "seconds"}, scores) == []


def test_only_the_first_process_writes_and_a_drift_ends_the_run(team):
    _, everywhere = team(2)
    assert everywhere(driver.save) == [None, None]
    everywhere(lambda run: run.saver.wait())
    assert everywhere(lambda run: run.saver.saved_step) == [0, -1]

    def drift(run: driver.Run) -> None:
        if run.world.rank:
            weight = next(run.system.parameters())
            weight.data.view(-1).view(torch.int32)[3] ^= 1  # the last bit
        driver.save(run)

    for error in everywhere(drift):
        assert isinstance(error, PeerError) and driver.exit_code(error) == 1
        assert "step 0: process 1 no longer agrees with process 0" in str(error)


def test_a_failure_of_one_process_ends_all_with_its_exit_code():
    def fail(rank: int) -> Callable[[], None]:
        def action() -> None:
            raise ConfigError(f"from {rank}")

        return action

    first, *others = in_threads(3, lambda world: world.first(fail(world.rank), driver.exit_code))
    assert isinstance(first, ConfigError) and [type(e) for e in others] == [Ended] * 2
    assert [e.code for e in others] == [2, 2]
    found = in_threads(3, lambda world: world.together(fail(1) if world.rank == 1 else dict, driver.exit_code))
    assert [type(e) for e in found] == [Ended, ConfigError, Ended] and found[2].code == 2


def test_shares_cover_the_batch_once():
    for sizes in ([3, 2], [1], [2, 2, 1]):
        for size in (2, 3, 5):
            if len(sizes) <= size:
                shares = [share_of(World(rank=rank, size=size), sizes, range(sum(sizes)))[1] for rank in range(size)]
                rows = [i for share in shares for i in range(share.start, share.start + share.count)]
                assert rows == list(range(sum(sizes))) and sum(share.weight for share in shares) == pytest.approx(1)
                assert [share.counts for share in shares] == [rank < len(sizes) for rank in range(size)]


def test_world_is_what_torchrun_says_or_refused():
    assert World.of({}) == World.of({"WORLD_SIZE": "1"}) == ALONE
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_RESTART_COUNT": "2"}  # fmt: skip
    assert World.of(told) == World(3, 4, "x", 2)
    for broken in ({"WORLD_SIZE": "2"}, {**told, "RANK": "first"}, {**told, "LOCAL_WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError):
            World.of(broken)


def test_each_process_has_a_gpu_of_its_own_or_the_cpu(monkeypatch):
    world = World(rank=1, size=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.process_device("auto", world) == torch.device("cpu") == driver.process_device("cpu", world)
    for name in ("cuda:0", "mps"):
        with pytest.raises(ConfigError, match=f"--device {name} with 4 processes"):
            driver.process_device(name, world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert driver.process_device("auto", world) == torch.device("cuda", 1) == driver.process_device("cuda", world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(driver.DeviceError, match="4 processes, but only 1 CUDA GPUs"):
        driver.process_device("cuda", world)


def test_only_training_may_be_shared_out(monkeypatch, drive, task_folder, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(name, value)
    assert drive("eval", "--weights", str(task_folder)) == 2
    assert capsys.readouterr().err.startswith("error: only training is shared out to several processes\nhint: ")


# 2. Real processes ---------------------------------------------------------------------------------------------------

PATIENCE = 240.0  # seconds after which processes count as hanging


def train_together(
    folder: Path, argv: Sequence[str], arrange: Callable[[int], None] = id, restarts: int = 0
) -> list[tuple[int, str]]:
    """Return the exit codes of two processes that train together in `folder`, and what each printed.

    They are forked, so nothing has to be loaded; `arrange` is called in each with its rank, and may change the driver.
    restarts: how often torchrun would have started them anew.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(probe.getsockname()[1]), "TORCHELASTIC_RUN_ID": "one launch",
                "TORCHELASTIC_RESTART_COUNT": str(restarts)}  # fmt: skip
    children = [fork(folder, argv, rank, told, arrange) for rank in (0, 1)]
    found: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < 2 and time.monotonic() < deadline:
        found |= {c: status for c in children if c not in found for done, status in [os.waitpid(c, os.WNOHANG)] if done}
        time.sleep(0.01)
    for child in set(children) - found.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    printed = [(folder / f"printed{rank}").read_text() for rank in (0, 1)]
    assert len(found) == 2, f"hanging: {printed}"
    return [(os.waitstatus_to_exitcode(found[c]), text) for c, text in zip(children, printed, strict=True)]


def fork(folder: Path, argv: Sequence[str], rank: int, told: dict[str, str], arrange: Callable[[int], None]) -> int:
    """Return the id of a new process that runs the driver."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        os.environ.update(told | {"RANK": str(rank)})
        with open(f"printed{rank}", "w") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                arrange(rank)
                code = driver.main(parse_command_line([str(word) for word in argv]))
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def at_step(number: int, act: Callable[[], None]) -> None:
    """Let this process do something when it comes to step `number`."""
    train_step = driver.train_step

    def reached(system, query, answer, moment):
        if moment.step == number:
            act()
        return train_step(system, query, answer, moment)

    driver.train_step = reached


@dataclass
class Both:
    """The same two epochs, trained by one process and by two; each folder holds runs/demo."""

    one: Path
    two: Path
    argv: list[str]
    printed: list[str]


@pytest.fixture(scope="module")
def both(tasks, tmp_path_factory) -> Both:
    """Return two finished runs of 13 pairs in batches of 4, so one batch of each epoch has a single pair."""
    by_size = sorted(tasks, key=lambda task: len(task.train))
    folder = write_tasks(tmp_path_factory.mktemp("four") / "tasks", [*by_size[:3], by_size[-1]])
    argv = [*SMALL, *CALM, "--batch-size", "4", "--device", "cpu", "--data", str(folder), "--name", "demo",
            "--epochs", "2", "--log-every", "1", "--save-every", "3", "--save-share", "0", "--keep", "50",
            "--refine", "mean"]  # fmt: skip
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(one)
        assert run_main(*argv) == 0
    ended = train_together(two, argv)
    assert [code for code, _ in ended] == [0, 0], ended
    return Both(one, two, argv, [printed for _, printed in ended])


def result_of(folder: Path) -> tuple[dict, list[dict]]:
    """Return the last checkpoint of a run and its metrics, without what another number of processes changes."""
    payload, records, _ = comparable(folder / "runs" / "demo")
    del payload["loop"]["processes"]
    return payload, records


def test_run_of_two_processes_has_the_losses_and_the_weights_of_one(both):
    (payload, records), (shared_payload, shared_records) = result_of(both.one), result_of(both.two)
    assert apart(records, shared_records) == []  # every logged number of every batch and epoch
    assert apart(payload, shared_payload) == []
    losses = [record["efe_loss"] for record in shared_records if record["event"] == "batch"]
    assert len(losses) == len(set(losses)) == 8
    assert shared_payload["memory"]["counters"]["admissions"]


def test_only_the_first_of_two_processes_speaks_and_writes(both):
    first, second = both.printed
    assert second == ""
    lines = first.splitlines()
    assert sum(line.startswith("[Batch    1]") for line in lines) == 2  # one an epoch
    assert sum(line.startswith("device    cpu, fp32") and line.endswith(" in each of 2 processes") for line in lines)
    names = [sorted(path.name for path in (folder / "runs").rglob("*")) for folder in (both.one, both.two)]
    assert names[0] == names[1]
    assert len(json.loads((both.two / "runs/demo/env.json").read_text())) == 1


def test_two_processes_leave_what_one_leaves_for_the_report(both):
    """Every output with its attempts, and the sample with its planning steps, whichever process has answered it."""
    one, two = (RunRecord.read(folder / "runs" / "demo") for folder in (both.one, both.two))
    for epoch in (0, 1):
        found, shared = one.validation(epoch).outputs, two.validation(epoch).outputs
        assert len(found) == len(shared) == 4
        for output, other in zip(found, shared, strict=True):
            assert output.record.keys() == other.record.keys() and output.key == other.key
            for name in ("first", "second", "exact"):
                assert output.record[name] == other.record[name]
            assert [step[0] for step in output.record["planning"]] == [step[0] for step in other.record["planning"]]
    assert two.problems == [] and (two.path / "report.html").is_file()


def cut(folder: Path, target: Path, step: int) -> list[str]:
    """Copy runs/demo without its checkpoints after a step; return the flags that continue it."""
    shutil.copytree(folder / "runs", target / "runs")
    run = target / "runs" / "demo"
    for path in list_checkpoints(run):
        if int(path.stem[-9:]) > step:
            path.unlink()
    status = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**status, "status": "running"}))
    return ["--resume"]


def test_a_run_goes_on_with_another_number_of_processes(both, tmp_path, monkeypatch, capsys):
    more, fewer = tmp_path / "more", tmp_path / "fewer"
    for folder in (more, fewer):
        folder.mkdir()
    (code, printed), (other, _) = train_together(more, cut(both.one, more, 3))
    assert (code, other) == (0, 0), printed
    assert "note: processes 1 -> 2 (the same batches, shared out otherwise)" in printed
    monkeypatch.chdir(fewer)
    assert run_main(*cut(both.two, fewer, 3)) == 0
    assert "note: processes 2 -> 1 (the same batches, shared out otherwise)" in capsys.readouterr().out
    for folder in (more, fewer):
        assert apart(result_of(both.one), result_of(folder)) == []
    loops = [read_checkpoint(list_checkpoints(f / "runs/demo")[0]).payload["loop"] for f in (more, fewer)]
    assert [loop["processes"] for loop in loops] == [2, 1]


def test_a_signal_to_one_process_ends_both_after_the_batch_with_a_checkpoint(both, tmp_path):
    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def arrange(rank: int) -> None:
        agree = driver.agree

        def agreed(run, asked):
            agree(run, asked)
            if run.ends:
                end()  # the same signal, which comes here later, is not a second one

        if rank == 0:
            driver.agree = agreed
        else:
            at_step(1, end)

    (code, printed), (other, _) = train_together(tmp_path, both.argv, arrange)
    assert (code, other) == (143, 143)
    assert "saved     epoch 0, batch 2 -> step_000000002.pt" in printed
    assert json.loads((tmp_path / "runs/demo/run.json").read_text())["status"] == "interrupted"
    records = read_metrics(tmp_path / "runs/demo/metrics.jsonl")
    expected = read_metrics(both.two / "runs/demo/metrics.jsonl")[: len(records)]
    assert [r["efe_loss"] for r in records] == [r["efe_loss"] for r in expected] and len(records) == 2


def test_the_first_process_ends_all_when_the_time_is_over(both, tmp_path):
    def arrange(rank: int) -> None:
        if rank == 0:
            driver.Run.out_of_time = lambda run: run.state.step >= 1

    (code, printed), (other, _) = train_together(tmp_path, both.argv, arrange)
    assert (code, other) == (0, 0) and "saved     epoch 0, batch 2 -> step_000000002.pt" in printed
    assert json.loads((tmp_path / "runs/demo/run.json").read_text())["status"] == "paused"


def test_a_full_disk_ends_all_processes_with_4(both, tmp_path):
    def arrange(rank: int) -> None:
        write = model_persistence.write_atomic

        def full(path, action):
            if path.name > "step_000000003.pt":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, action)

        model_persistence.write_atomic, model_persistence.RETRY_SECONDS = full, (0.0, 0.0)

    (code, printed), (other, silent) = train_together(tmp_path, [*both.argv, "--epochs", "1"], arrange)
    assert (code, other) == (4, 4) and silent == ""
    assert "error: the last checkpoint could not be written; the newest one is step_000000003.pt" in printed


def test_steps_that_are_not_finite_in_one_process_roll_all_back_and_end_all(both, tmp_path):
    def arrange(rank: int) -> None:
        driver.MAX_BAD_STEPS, driver.MAX_ROLLBACKS, train_step = 2, 2, driver.train_step

        def poisoned(system, query, answer, moment):
            result = train_step(system, query, answer, moment)
            if rank == 1 and moment.step > 1:
                result.total = result.total * float("nan")
            return result

        driver.train_step = poisoned

    (code, printed), (other, _) = train_together(tmp_path, both.argv, arrange)
    assert (code, other) == (1, 1)
    assert printed.count("back to step_000000000.pt with 0.25 of the learning rate (2/2)") == 1
    assert "error: training diverged: 2 steps in a row were not finite" in printed


def raise_a_bug() -> None:
    raise ValueError("a bug")


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("rank", "act", "said"),
    [(1, raise_a_bug, "error: process 1: a bug\n"), (0, raise_out_of_memory, SMALLER_BATCHES)],
    ids=["bug", "out of memory"],
)
def test_a_process_that_fails_ends_the_other(rank, act, said, both, tmp_path):
    ended = train_together(tmp_path, both.argv, lambda here: at_step(1, act) if here == rank else None)
    assert [code for code, _ in ended] == [1, 1] and said in ended[rank][1]
    assert "another process is gone" in ended[1 - rank][1]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_other_and_both_go_on_when_they_are_started_anew(both, tmp_path):
    (code, printed), (other, _) = train_together(tmp_path, both.argv, lambda rank: at_step(6, kill) if rank else None)
    assert (code, other) == (1, -9) and "error: another process is gone" in printed
    (code, printed), (other, _) = train_together(tmp_path, both.argv, restarts=1)
    assert (code, other) == (0, 0)
    assert "note: torchrun started the processes anew (1); going on with runs/demo" in printed
    assert differences(comparable(both.two / "runs/demo"), comparable(tmp_path / "runs/demo")) == []


WORKER = """
import os, sys
sys.path[:0] = {paths!r}
import test_distributed as tests
from test_distributed import PriorCache, driver

PriorCache.candidates = tests.no_answers
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    tests.at_step(6, tests.kill)
sys.exit(driver.main(driver.parse_command_line(sys.argv[1:])))
"""


def test_torchrun_starts_killed_processes_anew_and_the_run_ends_with_the_same_bits(both, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(paths=[str(ROOT), str(ROOT / "tests")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", str(script), *both.argv]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "note: torchrun started the processes anew (1); going on with runs/demo" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["demo"]
    assert differences(comparable(both.two / "runs/demo"), comparable(tmp_path / "runs/demo")) == []


def test_launch_finds_its_newest_run_with_a_checkpoint(both, tmp_path):
    cut(both.one, tmp_path, 10)
    run = tmp_path / "runs" / "demo"
    status = json.loads((run / "run.json").read_text())
    assert "launch" not in status and find_launched(tmp_path / "runs", "") is None
    (run / "run.json").write_text(json.dumps({**status, "launch": "a"}))
    assert find_launched(tmp_path / "runs", "a") == run and find_launched(tmp_path / "runs", "b") is None
    for path in list_checkpoints(run):
        path.unlink()
    assert find_launched(tmp_path / "runs", "a") is None
