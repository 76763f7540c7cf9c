"""Measure what a checkpoint costs: how long training waits, how many bytes, how long the writing takes beside it.

    python benchmarks/save_cost.py [--cases tiny small base qwen-lora qwen-full] [--saves 4] [--dir DIR]

Each case is a whole system with optimizer states as large as those of a run: the presets with the built-in tiny
language model, and preset small with a random model of the size of Qwen2.5-0.5B, with lora and with full training
(about 25 GB on the disk and 13 GB of memory; a smaller machine leaves it out with --cases). Everything is saved as the
driver does it, while this thread multiplies matrices as training would. Prints, for each case: bytes of a checkpoint;
the wait of the first save, which touches new memory, and the median of the others; the seconds of writing; and how much
slower the matrices were meanwhile. The wait stays below 1 % where 50 batches take a hundred times as long; the seconds
of 50 batches are measured for tiny and printed beside that. Exits with 1 when tiny exceeds 1 %.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import argparse
import shutil
import statistics
import tempfile
import time

import torch
from overfit import small_tasks, step_once, write_folder

import trainloop_complete_with_fixes as driver
from config import parse_command_line
from qwen_hybrid_prompt import build_tiny_qwen
from report import Console, file_size

CASES = {
    "tiny": ["--preset", "tiny", "--model", "tiny"],
    "small": ["--preset", "small", "--model", "tiny"],
    "base": ["--preset", "base", "--model", "tiny"],
    "qwen-lora": ["--preset", "small", "--train-llm", "lora"],
    "qwen-full": ["--preset", "small", "--train-llm", "full"],
}
CADENCE = 50  # batches between saves
LIMIT = 0.01


def write_large_qwen(folder: Path) -> None:
    """Write a random model with the shapes of Qwen2.5-0.5B beside the tokenizer of the tiny one."""
    from transformers import Qwen2Config, Qwen2Model

    build_tiny_qwen(folder)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    Qwen2Model(config).bfloat16().save_pretrained(folder)


def fill_optimizers(optimizers: driver.Optimizers) -> None:
    """Give every parameter the state that it has after a step, without taking one."""
    for optimizer in (*optimizers.main.values(), optimizers.policy):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            names = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
            state = {name: torch.zeros_like(parameter) for name in names}
            optimizer.state[parameter] = state if len(names) == 1 else {"step": torch.tensor(1.0), **state}


def matrix_seconds(busy, least: int = 5) -> float:
    """Return the median seconds of a product of matrices while `busy()` holds, at least a few times."""
    a, times = torch.randn(256, 256), []
    while len(times) < least or busy():
        began = time.perf_counter()
        for _ in range(20):
            a = torch.tanh(a @ a)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(name: str, folder: Path, saves: int) -> float:
    """Print the costs of one case; return the wait as a share of the time between two saves, 0 where not measured."""
    tasks = folder / "tasks"
    if not tasks.exists():
        tasks.mkdir(parents=True)
        write_folder(small_tasks(40, 1, 15), tasks)
    flags = [*CASES[name]]
    if name.startswith("qwen"):
        if not (folder / "qwen" / "model.safetensors").exists():
            write_large_qwen(folder / "qwen")
        flags += ["--model", str(folder / "qwen")]
    words = [*flags, "--data", str(tasks), "--out", str(folder / "runs"), "--name", name, "--device", "cpu", "--fresh"]
    run = driver.build_run(parse_command_line(words), Console(quiet=True), None)
    batches = 0.0
    if name == "tiny":
        batches = seconds_of_batches(run)
    fill_optimizers(run.optimizers)
    driver.require_space(run)
    waits, writes, slower = [], [], []
    for step in range(saves):
        run.state.step = step
        quiet = matrix_seconds(lambda: False, 40)
        began = time.perf_counter()
        driver.save(run)
        waits.append(time.perf_counter() - began)
        slower.append(matrix_seconds(run.saver.is_busy) / quiet)
        run.saver.wait()
        writes.append(run.store.seconds)
    size = run.store.path(run.state.step).stat().st_size
    wait = statistics.median(waits[1:])
    share = wait / (batches + wait) if batches else 0.0
    told = f"; 50 batches take {batches:.1f} s, so {share:.2%}" if batches else f"; below 1 % from {100 * wait:.1f} s"
    print(f"{name:10s} {file_size(size):>7s}  wait {waits[0] * 1000:.0f} ms first, then {wait * 1000:.0f} ms"
          f"  writing {statistics.median(writes):.2f} s, matrices then {statistics.median(slower):.2f}x{told}",
          flush=True)  # fmt: skip
    run.close()
    shutil.rmtree(folder / "runs" / name)
    return share


def seconds_of_batches(run: driver.Run) -> float:
    """Return the seconds of CADENCE training batches."""
    driver.prepare_priors(run)
    count = run.batches(0)
    step_once(run, 0, 0, 0.0)
    began = time.perf_counter()
    for k in range(CADENCE):
        step_once(run, 0, k % count, 0.0)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--dir", default="", help="folder on the disk to measure; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir or None) as place:
        shares = [measure(name, Path(place), args.saves) for name in args.cases]
    return 1 if max(shares) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
