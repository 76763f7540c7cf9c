"""Train and score each protocol from end to end, and print the scores beside the prior's and the time.

    python benchmarks/end_to_end.py                                      # tiny on the CPU: arc1-eval, arc2-eval, arc2
    python benchmarks/end_to_end.py --preset small --device cuda --epochs 20 --out runs/small

Each protocol is a new run, trained by the driver and scored by its command `eval`; what is behind `--` goes to both
(`-- --offline`). With --max-hours the training of each ends there. Exit code 1 when one of them fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import trainloop_complete_with_fixes as driver
from config import PROTOCOLS, parse_command_line

HEADER = ("| protocol | attempts | outputs exact | prior | mean of task fractions | strict | training | scoring |\n"
          "|---|---|---|---|---|---|---|---|")  # fmt: skip


def run_protocol(args: argparse.Namespace, protocol: str) -> tuple[dict, float, float]:
    """Return what `eval` wrote after training for a protocol, and the seconds of both. Raises: RuntimeError."""
    common = ["--device", args.device, *args.more]
    few = ["--max-tasks", str(args.max_tasks)] if args.max_tasks else []
    out, began = Path(args.out), time.monotonic()
    flags = ["--protocol", protocol, "--preset", args.preset, "--epochs", str(args.epochs), "--out", str(out),
             "--name", protocol, "--fresh", "--max-hours", str(args.max_hours),
             "--eval-every", str(args.epochs)]  # fmt: skip
    require_success(driver.main(parse_command_line([*flags, *few, *common])), "training", protocol)
    run = out / (out / "LATEST").read_text().strip()
    trained = time.monotonic()
    words = ["eval", "--protocol", protocol, "--weights", str(run), "--out", str(run), "--views", str(args.views)]
    require_success(driver.main(parse_command_line([*words, *few, *common])), "scoring", protocol)
    result = json.loads((run / f"{protocol}.scores.json").read_text())
    return result, trained - began, time.monotonic() - trained


def require_success(code: int, what: str, protocol: str) -> None:
    """Raise: RuntimeError unless a command ended with code 0."""
    if code:
        raise RuntimeError(f"{what} of {protocol} ended with exit code {code}")


def rows(protocol: str, result: dict, training: float, scoring: float) -> list[str]:
    """Return the lines of the table for one protocol, at one and at two attempts."""

    def shown(share: dict) -> str:
        return f"{share['right']:g}/{share['of']} = {share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"

    lines = []
    for place in (0, 1):
        model, prior = (result["scores"][label] for label in ("model", "prior"))
        cells = [protocol, str(place + 1), shown(model["per_output"][place]),
                 f"{prior['per_output'][place]['value']:.3f}", f"{model['task_fraction'][place]['value']:.3f}",
                 f"{model['strict'][place]['value']:.3f}",
                 f"{training / 60:.1f} min", f"{scoring / 60:.1f} min"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=["arc1-eval", "arc2-eval", "arc2"])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-hours", type=float, default=0.0, help="of each training; 0: no limit")
    parser.add_argument("--views", type=int, default=0, help="0: 16 on a GPU, else 8")
    parser.add_argument("--max-tasks", type=int, default=0, help="train on and score at most so many tasks; 0: all")
    parser.add_argument("--out", default="runs/end-to-end")
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(own)
    args.more = more
    return args


def main(words: list[str]) -> int:
    args = parse(words)
    table, failed = [], False
    for protocol in args.protocols:
        try:
            result, training, scoring = run_protocol(args, protocol)
            table += rows(protocol, result, training, scoring)
            print(f"{protocol}: {result['status']}")
        except RuntimeError as error:
            failed = True
            print(error, file=sys.stderr)
    print(f"\n`python benchmarks/end_to_end.py {shlex.join(words)}`: torch {torch.__version__}\n\n{HEADER}")
    print("\n".join(table))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
