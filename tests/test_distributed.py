"""Several processes: a step equals that of one process, states stay equal, runs survive kills and other numbers.

What a step computes is tested with threads for processes, which meet at a `Board`; whole runs are real processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, comparable, differences, own_process, run_main
from torch import Tensor

import arc_system
import trainloop_complete_with_fixes as driver
from config import ConfigError, parse_command_line
from distributed import ALONE, Ended, PeerError, Share, World, fingerprint, share_of
from model_persistence import find_launched, list_checkpoints, read_checkpoint
from report import Console, read_metrics

# Steps so small that rounding does not grow: at the usual rates a last bit becomes 1e-4 within two epochs, in one
# process as well. Thresholds and kappa let the memory admit and recall.
CALM = ("--lr", "1e-5", "--muon-lr", "1e-5", "--rl-lr", "1e-5", "--llm-lr", "1e-5", "--threshold-low", "0.1",
        "--threshold-high", "0.1", "--kappa", "0", "--rl-every", "2")  # fmt: skip


# 1. Threads for processes --------------------------------------------------------------------------------------------


class Board:
    """Where threads leave a value for the others."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size, timeout=60), [None] * size

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

    def make(size: int, *flags: object) -> tuple[driver.Run, Callable[[Callable], list]]:
        alone, *others = (build(*flags) for _ in range(size + 1))

        def everywhere(action: Callable[[driver.Run], Any]) -> list[Any]:
            def one(world: Threads) -> Any:
                run = others[world.rank]
                run.world, run.console.process = world, world.rank
                return action(run)

            return in_threads(size, one)

        return alone, everywhere

    return make


def furthest(a: Any, b: Any, place: str = "") -> list[tuple[float, str]]:
    """Return (difference, place) of every number in two nested values; infinity where the kind or the shape differs."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in furthest(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in furthest(x, y, f"{place}/{i}")]
    if isinstance(a, Tensor) and a.shape == b.shape:
        apart = (a.double() - b.double()).abs()
        return [(float(apart.nan_to_num(nan=0.0 if differences(a.isnan(), b.isnan()) == [] else 9e9).max()), place)] if (
            a.numel()) else []  # fmt: skip
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return [(abs(a - b) if a == a or b == b else 0.0, place)]
    return [] if a == b else [(float("inf"), f"{place}: {a!r} and {b!r}")]


def apart(a: Any, b: Any, most: float = 1e-5) -> list[tuple[float, str]]:
    """Return the numbers of two nested values that are further apart than `most`, the worst first."""
    return sorted((found for found in furthest(a, b) if not found[0] <= most), reverse=True)[:9]


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
    state = driver.shared_state(run)
    return [numbers_of(step) for step in steps], state, fingerprint(state)


@pytest.fixture
def one_reward_is_not_finite(monkeypatch) -> None:
    """Make the first pair of each task, under every prompt, one that cannot be scored."""
    rate = arc_system.rate

    def broken(system, query, *arguments):
        found = rate(system, query, *arguments)
        broken = torch.tensor([context.pair_id == "train:0" for context in query.contexts])
        return dataclasses.replace(found, total=found.total.masked_fill(broken, torch.nan))

    monkeypatch.setattr(arc_system, "rate", broken)


@pytest.mark.parametrize(("size", "pairs"), [(2, 5), (3, 2), (3, 7)])  # (3, 2): one process has nothing
def test_steps_of_several_processes_are_those_of_one(size, pairs, team, one_reward_is_not_finite):
    alone, everywhere = team(size, *CALM, "--batch-size", pairs)
    numbers, state, _ = take_steps(alone, 4)
    found = everywhere(lambda run: take_steps(run, 4))
    assert len({digest for _, _, digest in found}) == 1  # all processes hold the same bits
    assert apart(numbers, found[0][0]) == []
    assert apart(state, found[0][1]) == []
    rewards = torch.cat([step["reward"] for step in numbers if "reward" in step])
    assert rewards.isnan().any() and rewards.isfinite().any() and state["memory"]["rows"]["score"].numel()


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
        before[run.world.rank] = fingerprint(driver.shared_state(run))
        taken = driver.take_step(run, 0, 0, driver.Moment(0, 0.0, True), watch_qwen=False).update.taken
        after[run.world.rank] = fingerprint(driver.shared_state(run))
        return taken

    assert everywhere(attempt) == [False, False]
    assert before == after and before[0] == before[1]


@pytest.mark.parametrize("size", [2, 3])
def test_validation_of_several_processes_has_the_bits_of_one(size, team):
    alone, everywhere = team(size, "--batch-cells", 300, "--batch-size", 0)  # several batches of test pairs
    expected = driver.run_validation(alone)
    for scores in everywhere(driver.run_validation):
        del scores["seconds"]
        assert differences({k: v for k, v in expected.items() if k != "seconds"}, scores) == []
    assert len(driver.evaluation_batches(alone.items, 600)) >= size


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
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}  # fmt: skip
    assert World.of(told) == World(3, 4, 1, 2, "x", 2)
    for broken in ({"WORLD_SIZE": "2"}, {**told, "RANK": "first"}):
        with pytest.raises(ConfigError):
            World.of(broken)


def test_each_process_has_a_gpu_of_its_own_or_the_cpu(monkeypatch):
    world = World(rank=3, size=4, local_rank=1, local_size=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.process_device("auto", world) == torch.device("cpu") == driver.process_device("cpu", world)
    for name in ("cuda:0", "mps"):
        with pytest.raises(ConfigError, match=f"--device {name} with 4 processes"):
            driver.process_device(name, world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert driver.process_device("auto", world) == torch.device("cuda", 1) == driver.process_device("cuda", world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(driver.DeviceError, match="2 processes, but only 1 CUDA GPUs"):
        driver.process_device("cuda", world)


def test_only_training_may_be_shared_out(monkeypatch, drive, task_folder, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert drive("eval", "--weights", str(task_folder)) == 2
    assert capsys.readouterr().err.startswith("error: only training is shared out to several processes\nhint: ")


# 2. Real processes ---------------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import trainloop_complete_with_fixes as driver
from config import parse_command_line

train_step = driver.train_step
rank, step, number = map(int, os.environ.get("STRIKE", "-1 0 0").split())

def struck(system, query, answer, moment):
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if moment.step == step and int(os.environ["RANK"]) == rank and first_start:
        os.kill(os.getpid(), number)
    return train_step(system, query, answer, moment)

driver.train_step = struck
sys.exit(driver.main(parse_command_line(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Path:
    """Return a script that runs the driver, and in which process STRIKE[0] gets signal STRIKE[2] at step STRIKE[1]."""
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    return script


def torchrun(script: Path, folder: Path, *argv: str, restarts: int = 0, strike: str = "") -> str:
    """Return what two processes printed, stdout and stderr, that torchrun ran to a good end in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), str(script), *argv]  # fmt: skip
    environment = os.environ | ({"STRIKE": strike} if strike else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@dataclass
class Both:
    """The same two epochs, trained by one process and by two; each folder holds runs/demo."""

    one: Path
    two: Path
    argv: list[str]
    printed: str


@pytest.fixture(scope="module")
def both(worker, task_folder, tmp_path_factory) -> Both:
    """Return two finished runs. Batches of two pairs, of 27: each epoch's plan has one with a single pair."""
    argv = [*SMALL, *CALM, "--batch-size", "2", "--device", "cpu", "--data", str(task_folder), "--name", "demo",
            "--epochs", "2", "--log-every", "1", "--save-every", "5", "--save-share", "0", "--keep", "50",
            "--refine", "mean"]  # fmt: skip
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(one)
        assert run_main(*argv) == 0
    return Both(one, two, argv, torchrun(worker, two, *argv))


def states(a: Path, b: Path) -> tuple[Any, Any]:
    """Return the last checkpoints of two runs and their metrics, without what has to differ."""
    found = []
    for folder in (a, b):
        payload, records, _ = comparable(folder / "runs" / "demo")
        del payload["loop"]["processes"]
        found.append((payload, records))
    return tuple(found)


def test_run_of_two_processes_has_the_losses_and_the_weights_of_one(both):
    one, two = states(both.one, both.two)
    assert apart(one[1], two[1]) == []  # every logged number of every batch and epoch
    assert apart(one[0], two[0], 1e-4) == []
    batches = [record for record in two[1] if record["event"] == "batch"]
    assert len(batches) == 28 and len({record["efe_loss"] for record in batches}) == 28
    assert one[0]["memory"]["counters"] == two[0]["memory"]["counters"] and two[0]["memory"]["counters"]["admissions"]


def test_only_the_first_of_two_processes_speaks_and_writes(both):
    lines = both.printed.splitlines()
    assert sum(line.startswith("[Batch    1]") for line in lines) == 2  # one an epoch
    assert sum(line == "[OK] All models created" for line in lines) == 1
    assert sum(line.startswith("device    cpu, fp32") and line.endswith("in each of 2 processes") for line in lines) == 1
    names = [{path.name for path in (folder / "runs" / "demo").rglob("*")} for folder in (both.one, both.two)]
    assert names[0] == names[1]
    assert len(json.loads((both.two / "runs/demo/env.json").read_text())) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_anew_and_the_run_ends_with_the_same_bits(rank, both, worker, tmp_path):
    printed = torchrun(worker, tmp_path, *both.argv, restarts=1, strike=f"{rank} 17 {signal.SIGKILL.value}")
    assert "note: torchrun started the processes anew (1); going on with runs/demo" in printed
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["demo"]
    assert differences(comparable(both.two / "runs/demo"), comparable(tmp_path / "runs/demo")) == []


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


def test_a_run_goes_on_with_another_number_of_processes(both, worker, tmp_path, monkeypatch, capsys):
    more, fewer = tmp_path / "more", tmp_path / "fewer"
    printed = torchrun(worker, more, *cut(both.one, more, 10)) if more.mkdir() is None else ""
    assert "note: processes 1 -> 2 (the same batches, shared out otherwise)" in printed
    fewer.mkdir()
    monkeypatch.chdir(fewer)
    assert run_main(*cut(both.two, fewer, 10)) == 0
    assert "note: processes 2 -> 1 (the same batches, shared out otherwise)" in capsys.readouterr().out
    expected = states(both.one, both.one)[0]
    for folder in (more, fewer):
        payload, records = states(folder, folder)[0]
        assert apart(expected[1], records) == [] and apart(expected[0], payload, 1e-4) == []
    loops = [read_checkpoint(list_checkpoints(f / "runs/demo")[0]).payload["loop"] for f in (more, fewer)]
    assert [loop["processes"] for loop in loops] == [2, 1]


def test_a_signal_to_one_process_ends_both_after_the_batch_with_a_checkpoint(worker, both, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2",
            "STRIKE": f"1 3 {signal.SIGTERM.value}"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, str(worker), *both.argv], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                         env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    assert "saved     epoch 0, batch 4 -> step_000000004.pt" in printed[0] and printed[1] == ""
    assert list_checkpoints(tmp_path / "runs/demo")[0].name == "step_000000004.pt"
    assert json.loads((tmp_path / "runs/demo/run.json").read_text())["status"] == "interrupted"
    records = read_metrics(tmp_path / "runs/demo/metrics.jsonl")
    expected = read_metrics(both.two / "runs/demo/metrics.jsonl")[: len(records)]
    assert [r["efe_loss"] for r in records] == [r["efe_loss"] for r in expected] and len(records) == 4


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
