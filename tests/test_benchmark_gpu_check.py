"""The check for GPUs, as far as it goes without one: the exact resume, on the CPU, and the refusal."""

from __future__ import annotations

import pytest
import torch
from conftest import SMALL

import trainloop_complete_with_fixes as driver


def test_a_run_killed_in_its_second_epoch_ends_with_the_same_bits(benchmark, task_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*SMALL, "--data", str(task_folder), "--eval-tasks", "2", "--device", "cpu"]
    assert benchmark.differences_after_kill(tmp_path, 4, flags) == []
    killed = tmp_path / "killed" / "run.log"
    assert "--- session 2, resumed at" in killed.read_text() and "--deterministic" in killed.read_text()
    weights = tmp_path / "killed" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert benchmark.result_of(tmp_path / "whole") != benchmark.result_of(tmp_path / "killed")


def test_without_a_gpu_there_is_nothing_to_check(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 4 and "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--deterministic", "--no-deterministic"])
def test_the_flag_reaches_torch(build, flag):
    run = build(flag)
    try:
        assert torch.are_deterministic_algorithms_enabled() is (flag == "--deterministic")
        moment = driver.Moment(0, 0.0, True)
        assert driver.take_step(run, 0, 0, moment, watch_qwen=False).update.taken
    finally:
        torch.use_deterministic_algorithms(False)
        run.close()
