"""What to do when the memory of a GPU does not suffice: the same work in smaller pieces, rung by rung, then an error.

Imports torch and config only; used by the driver, which repeats the batch one rung lower (see `take_step`).
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from config import DEFAULT_QWEN, TrainConfig

FEWEST_TOKENS = 48  # a shorter rule text says next to nothing
PHRASES = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory", "not enough memory")
GIB = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}


class OutOfMemory(RuntimeError):
    """The smallest work does not fit the memory. `hint` says what to type; the driver exits with code 1."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for what torch raises when an allocation fails, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, OutOfMemory):
        return False
    return any(phrase in str(error) for phrase in PHRASES)


# The rungs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """How far the work is cut down; the defaults are all of it at once. Part of every checkpoint.

    parts: in how many parts a batch is computed; recompute: whether the language model recomputes its activations;
    prompt_tokens: the longest rule text, 0 as set; validation_parts: by how much the cells of a validation batch are
    divided.
    """

    parts: int = 1
    recompute: bool = False
    prompt_tokens: int = 0
    validation_parts: int = 1

    def words(self) -> list[str]:
        """Return each cut in words that fit behind "computed"; empty on the top rung."""
        found = []
        if self.parts > 1:
            found.append(f"in {self.parts} parts")
        if self.recompute:
            found.append("with the language model's activations recomputed")
        if self.prompt_tokens:
            found.append(f"with prompts of at most {self.prompt_tokens} tokens")
        if self.validation_parts > 1:
            found.append(f"with validation batches of 1/{self.validation_parts} of the cells")
        return found


def lower(rung: Rung, pairs: int, can_recompute: bool, prompt_tokens: int) -> Rung | None:
    """Return the rung below for a batch of `pairs`, None below the last.

    Twice the parts until each is one pair, which changes the least; then recomputing, which costs time; then prompts of
    half the length, which cuts what the model is told. `prompt_tokens` is the length as it is now, 0 without text.
    """
    if min(rung.parts, pairs) < pairs:
        return replace(rung, parts=2 * rung.parts)
    if can_recompute and not rung.recompute:
        return replace(rung, recompute=True)
    if prompt_tokens > FEWEST_TOKENS:
        return replace(rung, prompt_tokens=max(prompt_tokens // 2, FEWEST_TOKENS))
    return None


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more; call it outside the `except` block, whose traceback refers to all."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What is said --------------------------------------------------------------------------------------------------------


class Shortage(NamedTuple):
    """What an allocation asked for and found, in GiB, None where not known; `of` is "GPU memory" or "memory"."""

    tried: float | None
    needs: float | None
    total: float | None
    of: str

    def __str__(self) -> str:
        """Return "out of GPU memory", with the sizes where they are known: ": needs ~15.9 of 14.7 GiB"."""
        sizes = f": needs ~{self.needs:.1f} of {self.total:.1f} GiB" if self.needs and self.total else ""
        return f"out of {self.of}{sizes}"

    def short(self) -> str:
        """Return "out of GPU memory", with the size of the allocation that failed where it is known."""
        return f"out of {self.of}" + (f" ({self.tried:.2f} GiB more)" if self.tried else "")


def shortage(error: BaseException, device: torch.device) -> Shortage:
    """Return what the error says; call it at once, what the error leaves out is asked of the GPU as it is now."""
    text = str(error)
    tried, total = _gib(r"[Tt]ried to allocate SIZE", text), _gib(r"total capacity of SIZE", text)
    free, idle = _gib(r"SIZE is free", text), _gib(r"SIZE is reserved by PyTorch but unallocated", text)
    if device.type == "cuda" and (total is None or free is None):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        idle = (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2**30
    needs = None if total is None or free is None or tried is None else total - free - (idle or 0.0) + tried
    on_gpu = device.type != "cpu" or isinstance(error, torch.OutOfMemoryError)
    return Shortage(tried, needs, total, "GPU memory" if on_gpu else "memory")


def _gib(pattern: str, text: str) -> float | None:
    """Return the size in GiB where the pattern has SIZE, None where it does not occur."""
    match = re.search(pattern.replace("SIZE", r"([\d.]+) (bytes|KiB|MiB|GiB)"), text)
    return float(match[1]) * GIB[match[2]] if match else None


def advice(config: TrainConfig) -> str:
    """Return which flags make the work smaller, of those that are not used yet."""
    prompt, found = config.prompt, []
    if prompt.use_text and prompt.train_llm not in ("lora", "none"):
        found.append("--train-llm lora")
    elif prompt.use_text and prompt.train_llm == "lora":
        found.append("--train-llm none")
    shorter = " with --max-prompt-tokens 512" if prompt.max_prompt_tokens > 512 else ""
    if prompt.use_text and prompt.model not in (DEFAULT_QWEN, "tiny", "auto"):
        found.append(f"--model {DEFAULT_QWEN}{shorter}")
    smaller = {"base": "--preset small", "small": "--preset tiny"}.get(config.agent.preset)
    if smaller and len(found) < 2:
        found.append(smaller)
    return f"a new run with {' or '.join(found)}" if found else "a device with more memory"
