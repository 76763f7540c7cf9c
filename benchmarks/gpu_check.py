"""Check the system on a CUDA GPU: bf16, fp16 with a loss scaler, exact resume, and a resume on the CPU.

    python benchmarks/gpu_check.py [--batches 100] [--model tiny] [--preset small]

Runs the driver as users do. For each precision: N batches, then the state of the scaler, skipped steps and
seconds; then `--resume --device cpu` takes the bf16 run N + 2 batches far. With `--deterministic` a run
that is killed in its second epoch and resumed must end with the bits of one that was never stopped. Exits with 1 when a
run fails, a loss is not finite, a step was skipped in bf16, or a bit differs.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from kill_resume import result_of

from report import read_metrics


def drive(*flags: str) -> float:
    """Return the seconds of one run of the driver. Raises: CalledProcessError when it fails."""
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), *flags], check=True)
    return time.monotonic() - began


def kill_after(rows: int, run: Path, *flags: str) -> None:
    """Start the driver and kill it once it has logged so many batches. Raises: RuntimeError when it ends before."""
    process = subprocess.Popen([sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), *flags])
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or sum(row["event"] == "batch" for row in read_metrics(metrics)) < rows:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {process.returncode} before it was killed")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def differences_after_kill(folder: Path, batches: int, flags: list[str]) -> list[str]:
    """Return what a run of two epochs leaves otherwise when it is killed in its second epoch and resumed."""
    common = [*flags, "--deterministic", "--out", str(folder), "--epochs", "2", "--max-batches", str(batches),
              "--log-every", "1", "--save-every", "3", "--save-share", "0"]  # fmt: skip
    drive(*common, "--name", "whole")
    kill_after(batches + batches // 2, folder / "killed", *common, "--fresh", "--name", "killed")
    drive("--resume", str(folder / "killed"))
    whole, killed = (result_of(folder / name) for name in ("whole", "killed"))
    return [name for name in whole if whole[name] != killed[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--preset", default="small")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here, so there is nothing to check", file=sys.stderr)
        return 4
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        common = ["--model", args.model, "--preset", args.preset, "--eval-tasks", "20", "--log-every", "10",
                  "--out", folder, "--epochs", "1", "--batch-cells", "8192"]  # fmt: skip
        for precision in ("bf16", "fp16"):
            seconds = drive(*common, "--device", "cuda", "--precision", precision, "--name", precision,
                            "--max-batches", str(args.batches))  # fmt: skip
            rows = [r for r in read_metrics(Path(folder) / precision / "metrics.jsonl") if r["event"] == "batch"]
            losses = [row["efe_loss"] for row in rows]
            skipped = sum(row["skipped"] for row in rows)
            finite = all(math.isfinite(loss) for loss in losses)
            print(f"{precision}: {args.batches} batches in {seconds:.0f} s with start-up, loss {losses[0]:.3f} -> "
                  f"{losses[-1]:.3f}, skipped {skipped:.0f}, scale {rows[-1].get('scale', 'none')}")  # fmt: skip
            good &= finite and (precision == "fp16" or skipped == 0)
        drive("--resume", str(Path(folder) / "bf16"), "--device", "cpu", "--precision", "fp32", "--epochs", "2",
              "--max-batches", "2", "--eval-tasks", "4")  # fmt: skip
        print("cuda checkpoint resumed on the cpu: ok")
        exact = ["--model", args.model, "--preset", args.preset, "--eval-tasks", "8", "--device", "cuda"]
        differing = differences_after_kill(Path(folder) / "exact", 8, exact)
        print(f"killed and resumed with --deterministic: {', '.join(differing) or 'no bit'} differs")
        good &= not differing
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
