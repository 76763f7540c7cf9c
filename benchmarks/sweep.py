"""Sweep the design in the cheap regime: one factor at a time, equal time for each, exact answers on unseen pairs.

    python benchmarks/sweep.py [--minutes 3] [--arms "width: 96" ...] [--stage screen|confirm] [--report]
    python benchmarks/sweep.py --flags="--kappa 0 --answer-confidence 2"      # the network without the prior
    python benchmarks/sweep.py --preset small --side 0 --device cuda --minutes 10

Every arm is the default with one setting at another level (FACTORS), trained for as long: on a CPU by the processor's
time, so that other work beside it does not count. An arm that is slower therefore sees fewer pairs. What is compared,
and how a run that was interrupted goes on, is as in benchmarks/ablation.py, whose runs and table these are.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ablation
from ablation import Arm

FACTORS = {
    "width": ("--width", (24, 48, 64)),
    "read blocks": ("--read-blocks", (1, 3)),
    "plan blocks": ("--plan-blocks", (2, 3)),
    "planning steps": ("--num-steps", (1, 3, 5)),
    "read heads": ("--read-heads", (1, 4)),
    "cells read": ("--read-cells", (256, 4096)),
    "attention": ("--attention", ("on",)),
    "latent codes": ("--num-codes", (10, 40)),
    "prompt width": ("--prompt-dim", (32, 128)),
    "trust in the prior": ("--kappa", (0, 0.5)),
    "augmentation": ("--augment", ("none", "full")),
    "cells per batch": ("--batch-cells", (4096, 6144, 16384)),
    "AdamW rate": ("--lr", (2e-3, 8e-3)),
    "Muon rate": ("--muon-lr", (2.5e-3, 1e-2)),
    "weight decay": ("--weight-decay", (0, 0.1)),
    "averaging": ("--ema", (0.9, 0.995)),
    "decay": ("--decay", (0.15, 0.6)),
    "hard cells": ("--hard-epsilon", (0.3, 1)),
    "backward share": ("--lambda-bidirectional", (0, 0.2)),
    "reverse share": ("--lambda-reverse", (0, 0.2)),
    "RL every": ("--rl-every", (1, 16)),
}
SWITCHES = {
    "stages: untied": "--no-tie-stages",
    "task slot: off": "--no-use-task-slot",
    "text: off": "--no-use-text",
    "memory: off": "--no-use-memory",
}
ARMS = {
    f"{factor}: {level}": Arm(f"{flag} {level}", f"{factor} at {level}", group=factor)
    for factor, (flag, levels) in FACTORS.items()
    for level in levels
} | {name: Arm(flags, name, group=name.partition(":")[0]) for name, flags in SWITCHES.items()}


def main(words: list[str]) -> int:
    return ablation.measure(ablation.parse(words, ARMS, __file__, __doc__, minutes=3.0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
