"""Train the ARC solver: the driver, and the only script that users start.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume --epochs 20 --device cuda

Reads top to bottom as the story of one training step: `train_step` computes, `finish_step` changes, `take_step` repeats
in smaller parts what does not fit the memory, `train` schedules. Started by torchrun, several processes do the same
on shares of each batch (`exchange` adds them up). Everything a run writes lies in runs/NAME/ (see
README). Where the seven problems of the first design are solved: 1 Qwen trains (`QwenHybridPrompt`, `train_step`), 2
and 6 reward and policy (`refine_prompt`), 3 hard cells and 4 size curriculum (`EFELoss`), 5 memory (`learn_from`), 7
stable numbers (`finish_step`).
"""

from __future__ import annotations

import os
import sys

import doctor
from config import ConfigError, DoctorCommand, parse_command_line
from report import Console

if __name__ == "__main__":  # --help, doctor, usage errors and missing packages answer before torch is loaded
    SPEAKS = os.environ.get("RANK", "0") == "0"  # the other processes of torchrun find the same
    try:
        COMMAND = parse_command_line(sys.argv[1:])
    except ConfigError as problem:
        if SPEAKS:
            Console(color="--no-color" not in sys.argv).error(str(problem), problem.hint)
        sys.exit(2)
    if getattr(COMMAND, "verb", "") == "report":
        import report_command

        sys.exit(report_command.answer(COMMAND, Console.of(COMMAND)))
    if isinstance(COMMAND, DoctorCommand):
        sys.exit(doctor.examine(COMMAND, Console.of(COMMAND)))
    for fault, hint in doctor.package_faults():
        if SPEAKS:
            Console.of(COMMAND).error(fault, hint)
        sys.exit(4)

import contextlib
import dataclasses
import functools
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor

import loss_function
import policy_refined
import verbs
from arc_data import (
    PAD,
    Answer,
    ArcTask,
    Context,
    DataError,
    Query,
    Segment,
    TaskSampler,
    collate,
    data_hash,
    evaluation_batches,
    leave_one_out,
    load_tasks,
    require_answers,
    segments_after,
    select_tasks,
)
from arc_data import test_contexts as test_items
from arc_system import (
    ARCSystem,
    DeviceError,
    Optimizers,
    Runtime,
    Scene,
    WeightAverage,
    build_optimizers,
    choose_device,
    choose_runtime,
    device_fault,
    keyed_generator,
    learning_rate_scale,
    on_canvas,
    score_refinements,
    set_learning_rate,
    to_host,
    update_ratio,
    use_compiled,
    use_deterministic,
)
from config import (
    VERSION,
    AnswerCommand,
    CommandLine,
    DataConfig,
    TrainConfig,
    changed_flags,
    check_resume,
    config_json,
    from_dict,
    is_folder_name,
    one_line,
    packing,
    read_regular,
    resolution_notes,
    resolve,
    resume_config,
    resume_notes,
    to_dict,
    with_values,
)
from distributed import ALONE, WHOLE, Ended, PeerError, Share, World, fingerprint, share_of
from evaluate import Item, baselines, plan_back, validate
from gallery import Gallery
from grid_accuracy_loss import Trajectory, cell_accuracy, exact_match, parameter_count
from health import Change, Health
from loss_function import EFETerms
from memory_ladder import (
    OutOfMemory,
    Rung,
    Shortage,
    advice,
    free_memory,
    is_out_of_memory,
    lower,
    shortage,
)
from model_persistence import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    RunChoice,
    RunLock,
    Saver,
    StopFlag,
    all_finite,
    count_bytes,
    find_launched,
    find_run,
    list_checkpoints,
    read_checkpoint,
    rng_state,
    seed_all,
    set_rng_state,
    snapshot,
)
from policy_refined import PolicyTerms
from prior_store import core_count
from protocols import (
    TRAINED,
    VALIDATED,
    LeakError,
    in_public_evaluation,
    load_protocol,
    pair_table,
    without_own_answers,
)
from qwen_hybrid_prompt import ModelError
from report import (
    MetricLog,
    NoMetrics,
    RunFolder,
    RunFolderError,
    banner_line,
    batch_line,
    check_writable,
    detail_line,
    duration,
    environment,
    file_size,
    full_summary,
    on_drive,
    packages_line,
    require_mounted,
    time_line,
    write_json_atomic,
)
from report_page import write_report
from run_backup import Backup, bring_back
from run_pictures import write_curves
from session_time import RESERVE, Costs, Pace
from solver2 import Candidates, Lessons
from trackers import Tracker, TrackerError, make_tracker, require_tracker
from voting import choose_views, validate_votes

SMALLER_BATCHES = "--resume with a smaller --batch-cells, or in one process, which goes on with smaller parts"
MAX_BAD_STEPS = 20
MAX_ROLLBACKS = 3
MAX_PAGE_SECONDS = 2.0  # a page that takes longer is written at the end of a session only
PAGE_SHARE = 0.05  # of the time that pages may take
SAMPLE = 24  # inputs on which the time of a validation is foretold
TOO_LITTLE = 0.1  # of an epoch is not worth another validation
MIN_RESERVE = 0.8  # of the time kept for the last validation must be left for it
FEW_TASKS = 20
EPOCHS_AHEAD = 20  # epochs whose batches are looked at before training when --max-batches leaves some out


class ValidationStopped(Exception):
    """A signal came while the run was validated; a resume validates anew."""


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite. Without a checkpoint left to go back to the driver exits with code 1."""

    hint = "--precision fp32, or a smaller --lr and --muon-lr"


# 1. One step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Where in the run a step stands: progress in epochs, fractional; part: its number where a batch has several.

    share: which pairs of the batch it is about, where several processes share it.
    """

    step: int
    progress: float
    scores_refinements: bool
    part: int | None = None
    share: Share = WHOLE


@dataclass
class StepNumbers:
    """The numbers of a batch: its loss, and what the policy earned."""

    total: Tensor
    terms: EFETerms
    policy: PolicyTerms | None
    reward: Tensor | None  # [B] of the mean move, which was trained on; None when none was scored


@dataclass
class StepResult(StepNumbers):
    """What one step computed; only `total`, `policy.total` and `judge` carry graphs."""

    gain: Tensor | None  # [B] what the memory added to the potential; None when not scored
    move: Tensor | None  # [B, Dp] the refinement that worked best, 0 where none did; None when none was scored
    scene: Scene
    refined: Tensor  # [B, Dp]
    trajectory: Trajectory
    judge: Tensor  # the judge's loss, which no other part learns from
    lessons: Lessons | None  # what its candidates teach, for the memory; None where the judge does not train
    share: Share = WHOLE


def train_step(system: ARCSystem, query: Query, answer: Answer, moment: Moment) -> StepResult:
    """Return the loss of one batch, and the policy's, without changing anything."""
    scene = system.observe(query)  # rule text -> Qwen -> prompt, and the memories it recalls
    reading, preference = system.read(query, scene, answer.target_size, answer.canvas, answer.shapes)  # size given
    mean_move = system.policy.propose(scene.prompt, scene.features, 1, deterministic=True)
    refined = system.policy.refine(scene.embedding, mean_move, 0)
    target, seen = torch.where(answer.mask, answer.target, PAD), on_canvas(query.input, answer.canvas)
    trajectory = system.plan_both_ways(query, scene, reading, refined, target, answer.target_size, answer.shapes)
    policy, reward, gain, move = None, None, None, None
    if moment.scores_refinements:
        part = () if moment.part is None else (moment.part,)
        generator = keyed_generator(query.input.device, system.config.run.seed, "refine", moment.step, *part)
        samples = system.config.policy.rl_samples
        proposal = system.policy.propose(scene.prompt, scene.features, samples, generator, share=moment.share)
        policy, reward, gain, move = score_refinements(
            system, query, answer, scene, reading, proposal, refined, trajectory, moment.progress, moment.share
        )
    terms = system.efe_loss(
        trajectory,
        query,
        answer,
        preference=preference,
        desirability=system.z_table.lookup(query.task_slot, seen, query.color_permutation),
        prompt=scene.prompt.embedding,
        reward=reward,
        progress=moment.progress,
        share=moment.share,
    )
    judge, lessons = system.judge_loss(query, answer)
    return StepResult(
        terms.total, terms, policy, reward, gain, move, scene, refined, trajectory, judge, lessons, moment.share
    )


# 2. One update -------------------------------------------------------------------------------------------------------


@dataclass
class Update:
    """What an update did: whether it was taken, the gradient norms, and the relative change of Qwen where asked for."""

    taken: bool
    norm: float
    qwen_norm: Tensor
    qwen_ratio: Tensor | None


def apply_gradients(
    result: StepResult, system: ARCSystem, optimizers: Optimizers, runtime: Runtime, watch_qwen: bool
) -> Update:
    """Backpropagate a whole batch and finish the step."""
    backpropagate(result, system, runtime)
    return finish_step(result, system, optimizers, runtime, watch_qwen)


def backpropagate(result: StepResult, system: ARCSystem, runtime: Runtime, share: float = 1.0) -> None:
    """Add the gradients of a part that is this share of its batch's pairs, the policy's too; nothing else changes.

    Over all parts the gradients add up to those of the whole batch for every term that is a mean over the samples. Not,
    for parts that one process computes one after the other, L_prompt, whose negatives are the other samples of the
    part; nor the policy's advantages, which each part divides by its own scale; nor L_reward where a sample has no
    finite reward. What several processes compute at once adds up for these as well.
    """
    total = result.total + result.judge
    runtime.scaler.scale(total if share == 1 else share * total).backward()
    if result.policy is not None:
        system.policy.backward(result.policy, share)


def finish_step(
    result: StepNumbers, system: ARCSystem, optimizers: Optimizers, runtime: Runtime, watch_qwen: bool
) -> Update:
    """Unscale, clip, and step if gradient and loss are finite; otherwise change nothing but the loss scale.

    The gradients are those of all parts of the batch, and so are the result's numbers; both are used up.
    """
    scaler, main = runtime.scaler, list(optimizers.main.values())
    for optimizer in main:
        scaler.unscale_(optimizer)
    owned = [p for o in main for group in o.param_groups for p in group["params"] if p.grad is not None]
    language = [p for _, p in system.language_parameters()]
    qwen_norm = gradient_norm(language, runtime.device)
    norm = torch.nn.utils.clip_grad_norm_(owned, system.config.optim.clip)
    policy_norm = norm if result.policy is None else system.policy.clip()
    # The one place where the host waits for the gradients.
    found, *others = torch.stack((norm, result.total.detach().to(norm.dtype), policy_norm)).tolist()
    taken, ratio = math.isfinite(found) and math.isfinite(others[0]), None
    if taken:
        before = [p.detach().clone() for p in language] if watch_qwen else None
        for optimizer in main:
            optimizer.step()
        if before:
            ratio = update_ratio(before, [p.detach() for p in language])
        if result.policy is not None and math.isfinite(others[1]):
            system.policy.apply_clipped(optimizers.policy, result.policy.averages)
    if scaler.is_enabled():
        scaler.update(None if taken else scaler.get_scale() * scaler.get_backoff_factor())
    drop_gradients(optimizers)
    return Update(taken, found, qwen_norm, ratio)


def drop_gradients(optimizers: Optimizers) -> None:
    """Forget all gradients, the policy's too."""
    for optimizer in (*optimizers.main.values(), optimizers.policy):
        optimizer.zero_grad(set_to_none=True)


def gradient_norm(parameters: list[Tensor], device: torch.device) -> Tensor:
    """Return the norm of the gradients, a scalar tensor; 0 without any."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)


@torch.no_grad()
def learn_from(system: ARCSystem, query: Query, answer: Answer, result: StepResult, step: int) -> int:
    """Return how many entries the memory admitted; also moves the threshold, the Z table and the prompt queue, and
    stores what the candidates taught.

    Called after a step that was taken. A sample's score is its cell accuracy, 0 when its size was predicted wrong; the
    memory compares it with the cell accuracy of the prior's best grid, which has the true size.
    Each of several processes learns from the rows of all, in the order of the batch.
    """
    share = result.share
    prediction = result.trajectory.decode()
    right, cells = cell_accuracy(prediction, answer.target)
    sizes = result.scene.sizes()
    score = torch.where((sizes == answer.target_size).all(1), right / cells.clamp(min=1), 0.0)
    exact = exact_match(prediction, sizes, answer.target, answer.target_size)
    visits = system.z_table.visits(
        on_canvas(query.input, answer.canvas), prediction, answer.target, answer.mask, query.color_permutation
    )
    slot, visits, embedding = share.rows(query.task_slot, visits, result.scene.prompt.embedding)
    system.z_table.learn(slot, visits)
    system.efe_loss.remember(embedding, slot)
    if not system.config.memory.use_memory:
        return 0
    best, _ = system.prior.candidates(query, answer.shapes, answer.canvas, count=1)
    prior_score = cell_accuracy(best[:, 0], answer.target)[0] / cells.clamp(min=1)
    move = torch.zeros_like(result.refined) if result.move is None else result.move
    recall, gain = result.scene.recall, result.gain
    seen = () if recall is None else (recall.index, recall.valid, recall.weights)
    others = (*(result.lessons or ()), *seen, *(() if gain is None else (gain,)))
    move, features, *rest = share.rows(move, result.scene.features, score, prior_score, exact, *others)
    floats = (x.float() for x in (embedding, move, features, *rest[:2]))
    prompt, delta, features, score, prior_score, exact, *others = to_host(*floats, *rest[2:])
    contexts = query.contexts if share.is_whole else share.contexts
    tasks, pairs = [c.task_id for c in contexts], [c.pair_id for c in contexts]
    candidates = Candidates(
        task_ids=tasks, pair_ids=pairs, size_rules=system.prior.size_rules(contexts), features=features, prompt=prompt,
        delta=delta, color_map=system.prior.color_maps(contexts), score=score, prior_score=prior_score, exact=exact,
    )  # fmt: skip
    if result.lessons is not None:
        key, direction, told, *others = others
        system.lessons.admit(Lessons(key, direction, told), tasks, pairs)
    if recall is not None:
        index, valid, weights, *gain = others
        system.memory.count_hits(index, valid)
        if gain:
            system.memory.update_gain(index, gain[0], weights)
    system.memory.refresh(tasks, pairs, prompt)
    system.memory.reevaluate(tasks, pairs, score)
    return system.memory.admit(candidates, step=step, version=step)


# 3. One step within the memory ----------------------------------------------------------------------------------------


@dataclass
class Part:
    """A part of a batch on the device, its share of the batch's pairs, and what a step computed on it."""

    query: Query
    answer: Answer
    share: float
    result: StepResult


@dataclass
class Step:
    """What became of a batch: its contexts and number of target cells, its numbers, the update, and how many entries
    the memory admitted."""

    contexts: Sequence[Context]
    cells: Tensor
    numbers: StepNumbers
    update: Update
    admitted: int


def take_step(run: Run, epoch: int, k: int, moment: Moment, watch_qwen: bool) -> Step:
    """Return what became of batch k of `epoch`, computed in as many parts as the memory and the processes ask for.

    Raises: OutOfMemory when even the smallest parts do not fit; then nothing has changed but the rung.
    """
    parts = compute_within_memory(run, epoch, k, moment)
    contexts, cells, numbers = parts[0].query.contexts, parts[0].answer.mask.sum(), parts[0].result
    share = numbers.share
    if not share.is_whole:
        contexts, cells, numbers = share.contexts, share.sum(cells), joined(parts, run.world)
        exchange(run)
    elif len(parts) > 1:
        query, answer = run.sampler.batch(epoch, k)
        contexts, cells, numbers = query.contexts, answer.mask.sum(), joined(parts)
    with unrepeatable(run):
        update = finish_step(numbers, run.system, run.optimizers, run.runtime, watch_qwen)
        admitted = 0
        if update.taken:
            run.average.update()
            admitted = sum(learn_from(run.system, p.query, p.answer, p.result, moment.step) for p in parts)
    return Step(contexts, cells, numbers, update, admitted)


def compute_within_memory(run: Run, epoch: int, k: int, moment: Moment) -> list[Part]:
    """Return the computed parts of a batch; while the memory does not suffice, repeat it one rung lower.

    Nothing has changed when a repetition begins: `train_step` fills caches only, and the gradients are dropped.
    Raises: OutOfMemory below the last rung, and at once with several processes, which would have to go down together.
    """
    emptied = False
    while True:
        try:
            return compute_parts(run, epoch, k, moment)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            short = shortage(error, run.runtime.device)
            if run.world.size > 1:
                where = f"epoch {epoch} batch {k} on process {run.world.rank}"
                raise OutOfMemory(f"{short} at {where}", SMALLER_BATCHES) from error
        drop_gradients(run.optimizers)  # here, where the traceback no longer holds on to the graph
        free_memory(run.runtime.device)
        how = "after emptying the cache"
        if emptied:
            how = go_down(run, short, len(run.sampler.batch(epoch, k)[0]))
        emptied = True
        run.console.warn(f"{short.short()} at epoch {epoch} batch {k}; repeating the batch {how}")


def compute_parts(run: Run, epoch: int, k: int, moment: Moment) -> list[Part]:
    """Return the parts of batch k of `epoch`, their gradients added up in the parameters."""
    if run.world.size > 1:
        return [compute_share(run, epoch, k, moment)]
    batches, parts = run.sampler.parts(epoch, k, run.state.rung.parts), []
    total = sum(len(query) for query, _ in batches)
    for index, batch in enumerate(batches):
        query, answer = (half.to(run.runtime.device) for half in batch)
        here = dataclasses.replace(moment, part=index) if len(batches) > 1 else moment
        with run.runtime.autocast():
            result = train_step(run.system, query, answer, here)
        parts.append(Part(query, answer, len(query) / total, result))
        backpropagate(result, run.system, run.runtime, parts[-1].share)
    return parts


def compute_share(run: Run, epoch: int, k: int, moment: Moment) -> Part:
    """Return what this process computes of batch k of `epoch`, its gradients in the parameters."""
    pieces = run.sampler.pieces(epoch, k, run.world.size)
    contexts = [context for piece, _ in pieces for context in piece]
    number, share = share_of(run.world, [len(piece) for piece, _ in pieces], contexts)
    query, answer = (half.to(run.runtime.device) for half in collate(*pieces[number]))
    with run.runtime.autocast():
        result = train_step(run.system, query, answer, dataclasses.replace(moment, share=share))
    backpropagate(result, run.system, run.runtime, share.weight)
    return Part(query, answer, share.weight, result)


def joined(parts: list[Part], world: World = ALONE) -> StepNumbers:
    """Return the numbers of a whole batch from those of its parts, here and in other processes, without graphs."""
    results, shares = [part.result for part in parts], [part.share for part in parts]
    cells = [part.answer.mask.sum() * (part.share > 0) for part in parts]
    terms = loss_function.joined_terms([result.terms for result in results], shares, cells, world)
    if results[0].policy is None:
        return StepNumbers(terms.total, terms, None, None)
    policy = policy_refined.joined_terms([result.policy for result in results], shares, world)
    reward = torch.cat([result.reward for result in results])
    return StepNumbers(terms.total, terms, policy, *results[0].share.rows(reward))


def exchange(run: Run) -> None:
    """Add up the gradients of all processes, and agree on whether to end or to save after this batch.

    A parameter without a gradient in any process keeps none, so that no optimizer touches it.
    """
    optimizers = (*run.optimizers.main.values(), run.optimizers.policy)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    there = [float(p.grad is not None) for p in parameters]
    head = torch.tensor([*wishes(run), *there], device=run.runtime.device)
    head, *gradients = run.world.sum([head, *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)])
    found = head.tolist()
    agree(run, found[: len(found) - len(there)])
    for parameter, gradient, count in zip(parameters, gradients, found[len(found) - len(there) :], strict=True):
        parameter.grad = gradient if count else None


def wishes(run: Run) -> list[float]:
    """Return 1 for each thing that this process asks for: to end by SIGINT, by SIGTERM, as time is over; to save.

    Time is the first process's, which also saves.
    """
    signals = [float(run.stop.signal == number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = run.world.is_first
    return [*signals, float(first and run.out_of_time()), float(first and run.saver.is_due(run.state.batch + 1))]


def agree(run: Run, asked: list[float]) -> None:
    """Take over what the processes ask for together: `wishes`, summed."""
    interrupted, terminated, late, run.saves = map(bool, asked)
    run.ends = interrupted or terminated or late
    if interrupted or terminated:
        run.stop.signal = signal.SIGTERM if terminated else signal.SIGINT


def go_down(run: Run, short: Shortage, pairs: int) -> str:
    """Move the run one rung down for a batch of `pairs`; return in words what that changes.

    Raises: OutOfMemory when there is no rung below.
    """
    model, rung = run.system.prompt_model, run.state.rung
    tokens = model.max_tokens if run.config.prompt.use_text else 0
    below = lower(rung, pairs, model.can_recompute, tokens)
    if below is None:
        raise OutOfMemory(f"{short} at batch 1", advice(run.config))
    run.state.rung = below
    use_rung(run)
    if below.parts != rung.parts:
        return f"in {min(below.parts, pairs)} parts"
    return next(words for words in below.words() if words not in rung.words())


def use_rung(run: Run) -> None:
    """Let the language model compute as the rung says."""
    model, rung = run.system.prompt_model, run.state.rung
    if rung.recompute and model.can_recompute:
        model.recompute_activations()
    tokens = rung.prompt_tokens or run.config.prompt.max_prompt_tokens
    if tokens != model.max_tokens:
        model.limit_tokens(tokens)


@contextlib.contextmanager
def unrepeatable(run: Run) -> Iterator[None]:
    """Turn an allocation that fails while weights and memory change into OutOfMemory: the step may be half done."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        short = shortage(error, run.runtime.device)
        raise OutOfMemory(f"{short} while the weights were changed; the last checkpoint is whole",
                          advice(run.config)) from error  # fmt: skip


# 4. The run ----------------------------------------------------------------------------------------------------------


@dataclass
class LoopState:
    """Where the run stands; all of it is in every checkpoint.

    batch is the next batch of `epoch`; step counts batches of all epochs; window and epoch_sums are sums since the last
    log line and since the epoch's start, kept on the device; memory_before holds what the memory had counted at the
    epoch's start; best holds the best validation figures so far; lr_factor is halved by each of the rollbacks; segments
    holds the batches of `epoch` that were taken under other batch sizes, before a resume changed them; device and
    precision say on what the last session computed, processes how many shared its batches, and rung what it had to do
    to fit its memory; ends: where --max-hours ends the schedule of the learning rate, in epochs; 0: after the last one.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    bad_steps: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0
    validated: bool = False
    epoch_seconds: float = 0.0
    save_seconds: float = 0.0
    memory_before: dict[str, float] = field(default_factory=dict)
    window: dict[str, Tensor] = field(default_factory=dict)
    epoch_sums: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    device: str = ""
    precision: str = ""
    processes: int = 1
    rung: Rung = field(default_factory=Rung)
    ends: float = 0.0

    def __post_init__(self) -> None:
        # A checkpoint holds plain data.
        self.segments = [Segment(tuple(packed), taken) for packed, taken in self.segments]
        self.rung = Rung(**self.rung) if isinstance(self.rung, dict) else self.rung

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add one batch's values to the sums, without waiting for the device."""
        for sums in (self.window, self.epoch_sums):
            for name, value in values.items():
                value = torch.as_tensor(value, dtype=torch.float32).detach()
                sums[name] = sums[name] + value if name in sums else value


@dataclass
class Run:
    """Everything that a session of training holds."""

    config: TrainConfig
    console: Console
    folder: RunFolder
    log: MetricLog
    tracker: Tracker  # gets what the log gets
    store: CheckpointStore
    saver: Saver
    backup: Backup | None
    lock: RunLock
    runtime: Runtime
    system: ARCSystem
    optimizers: Optimizers
    average: WeightAverage
    sampler: TaskSampler
    items: list
    state: LoopState
    stop: StopFlag
    data_hash: str
    seen: dict[str, dict[str, Any]]  # what the weights see, for whoever scores them
    world: World = ALONE
    ends: bool = False  # the processes have agreed to end after this batch
    saves: bool = False  # and to save after it
    health: Health = field(default_factory=Health)
    baselines: dict[str, float | str] | None = None
    page_seconds: float = 0.0  # of computing that the last report.html took
    page_written: float = 0.0  # when
    clock: Callable[[], float] = time.monotonic  # by which --max-hours counts
    started: float = 0.0
    pace: Pace = field(default_factory=Pace)
    validation_seconds: float = 0.0  # of the last validation, or as foretold
    vote_seconds: float = 0.0  # that the last one takes longer, as foretold
    foretold: bool = False

    def __post_init__(self) -> None:
        self.started = self.clock()

    def batches(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""
        return limited(self.sampler.num_batches(epoch), self.config.run.max_batches)

    def close(self) -> None:
        """Finish what is being written, and free the run folder, the priors' file and the signals."""
        try:
            self.saver.wait()
            self.tracker.close()  # so that the backup knows all that was sent
            if self.backup is not None:
                self.backup.offer()
                self.backup.close()
        finally:
            self.tracker.close()
            self.system.prior.close()
            self.log.close()
            self.lock.release()
            self.stop.release()

    def note(self, what: str, write: Callable[[], object]) -> None:
        """Write something that training can go on without, on the first process; a failure is a warning."""
        if not self.world.is_first:
            return
        try:
            write()
        except OSError as error:
            self.console.warn(f"{what} not written ({error.strerror or error}); training goes on")

    def seconds_left(self) -> float:
        """Return the seconds until --max-hours is over, less than 0 after that; infinity without it."""
        hours = self.config.run.max_hours
        return hours * 3600 - (self.clock() - self.started) if hours else math.inf

    def reserve(self) -> float:
        """Return the seconds that the session's last validation needs; 0 where none fits into its time."""
        wanted = RESERVE * (self.validation_seconds + self.vote_seconds)
        return wanted if wanted < self.config.run.max_hours * 3600 else 0.0

    def out_of_time(self) -> bool:
        """Return True when of --max-hours no more is left than the last validation needs."""
        return self.seconds_left() < self.reserve()

    def is_last_validation(self) -> bool:
        """Return True when a validation now leaves of --max-hours too little to train on and validate again."""
        training = TOO_LITTLE * self.batches(self.state.epoch) * self.pace.seconds if self.reserve() else 0.0
        return self.seconds_left() < 2 * self.reserve() + training

    def can_validate(self) -> bool:
        """Return True when --max-hours has time for a validation."""
        return 0 < self.reserve() * MIN_RESERVE < self.seconds_left() < math.inf

    def is_over(self) -> bool:
        """Return True when this process would end the session: a signal came, or the time is over."""
        return self.stop.signal is not None or self.out_of_time()

    def is_ending(self) -> bool:
        """Return True when the session ends after this batch; several processes have agreed on that within it."""
        return self.is_over() if self.world.size == 1 else self.ends

    def save_is_due(self) -> bool:
        """Return True when a checkpoint is due after this batch."""
        return self.saver.is_due(self.state.batch) if self.world.size == 1 else self.saves


def limited(count: int, limit: int) -> int:
    """Return the count, at most the limit; 0: no limit."""
    return min(count, limit) if limit else count


def learning_rate_factor(
    config: TrainConfig, sampler: TaskSampler, epoch: int, batch: int, ends: float = 0.0
) -> float:
    """Return the schedule's factor at a batch: a function of the position in epochs, so a batch size may change.

    The position is counted in batches as epoch 0 has them; where all epochs have as many, it is the step. The schedule
    ends after `ends` epochs; 0: with the last one.
    """
    whole = limited(sampler.num_fresh_batches(0), config.run.max_batches)
    taken, share, left = earlier_part(config, sampler, epoch)
    position = epoch * whole + share * whole + (batch - taken) * ((1 - share) * whole / left)
    total = round((ends or config.run.epochs) * whole)
    return learning_rate_scale(position, total, config.optim.warmup, config.optim.decay)


def epoch_progress(config: TrainConfig, sampler: TaskSampler, epoch: int, batch: int) -> float:
    """Return where in the run a batch stands, in epochs, fractional."""
    taken, share, left = earlier_part(config, sampler, epoch)
    return epoch + (share + (1 - share) * ((batch - taken) / left))


def earlier_part(config: TrainConfig, sampler: TaskSampler, epoch: int) -> tuple[int, float, int]:
    """Return (batches of an epoch taken under other sizes, their share of the epoch, batches that are left).

    The share is that of the pairs, so that progress goes on where it was; with --max-batches it is that of the batches.
    """
    total = limited(sampler.num_batches(epoch), config.run.max_batches)
    taken, pairs = sampler.taken(epoch)
    share = pairs / sampler.num_pairs if total == sampler.num_batches(epoch) else min(taken / total, 1.0)
    return taken, share, max(total - taken, 1)


def due(count: int, every: int, last: bool) -> bool:
    """Return True at every multiple and at the last batch of an epoch."""
    return last or count % every == 0


def train(run: Run) -> int:
    """Train until the last epoch, a signal, or the end of the time; return the exit code."""
    if run.state.step == 0 and not run.world.first(lambda: run.store.path(0).exists()):
        save(run)  # so that --resume works from the first batch on, and a full disk shows now
    while True:
        try:
            code = train_epochs(run)
            break
        except TrainingDiverged as problem:
            run.console.end_progress()
            roll_back(run, problem)
    if code is not None:
        return code
    run.saver.wait()
    note_finished(run)
    require_saved(run)
    return 0


def note_finished(run: Run) -> None:
    """Note in run.json that the last epoch is over."""
    state = run.state
    run.note("run.json", lambda: run.folder.set_status("finished", epoch=state.epoch, batch=0, step=state.step,
                                                       best=state.best, flags=run.health.summary()))  # fmt: skip


def train_epochs(run: Run) -> int | None:
    """Train and validate the epochs that are left; return an exit code when the session has to end before."""
    state, config = run.state, run.config
    for epoch in range(state.epoch + state.validated, config.run.epochs):
        code = train_epoch(run, epoch)
        if code is not None:
            return code
        late = run.world.tell(run.is_last_validation())
        last = late or epoch + 1 == config.run.epochs
        if not state.validated:
            try:
                scores = run_validation(run, last) if due(epoch + 1, config.run.eval_every, last) else None
            except ValidationStopped:
                return end_session(run)
            finish_epoch(run, scores)
        if late and epoch + 1 < config.run.epochs:
            return end_session(run)
    return None


def roll_back(run: Run, problem: TrainingDiverged) -> None:
    """Go back to the newest checkpoint from before the bad steps, and on with half the learning rate.

    The checkpoint is written again at once, so that the rollback counts after a kill as well.
    Raises: problem, when that was done MAX_ROLLBACKS times, or when there is no such checkpoint.
    """
    rollbacks, rung = run.state.rollbacks + 1, run.state.rung
    flags = run.health.state_dict()
    run.saver.wait()
    checkpoint = newest_checkpoint(run, lambda found: found.payload["loop"]["bad_steps"] == 0)
    if rollbacks > MAX_ROLLBACKS or checkpoint is None:
        raise problem
    if run.world.is_first:
        run.store.set_aside_after(checkpoint.step)
    restore(run, checkpoint.payload)
    adapt(run, from_dict(TrainConfig, checkpoint.payload["config"]))
    state = run.state
    state.rung = rung  # what this session has learned about its memory still holds
    run.health.load_state_dict(flags)  # and what it has said needs no repeating
    state.rollbacks, state.lr_factor = rollbacks, 0.5**rollbacks
    run.console.warn(f"{problem}; back to {checkpoint.path.name} with {state.lr_factor:g} of the learning rate"
                     f" ({rollbacks}/{MAX_ROLLBACKS})")  # fmt: skip
    run.log.append({"event": "rollback", "epoch": state.epoch, "batch": state.batch, "step": state.step,
                    "rollbacks": rollbacks, "lr_factor": state.lr_factor})  # fmt: skip
    save(run)


def train_epoch(run: Run, epoch: int) -> int | None:
    """Train on the batches of an epoch that are left; return an exit code when the session has to end."""
    state, config = run.state, run.config
    if state.epoch != epoch or state.validated:
        state.epoch, state.batch, state.validated, state.segments = epoch, 0, False, []
        state.epoch_sums, state.window, state.epoch_seconds, state.save_seconds = {}, {}, 0.0, 0.0
        state.memory_before = memory_counts(run)
    run.sampler.continue_epoch(epoch, state.segments)
    total = run.batches(epoch)
    run.system.train()
    bar = run.console.progress(total, f"Epoch {epoch} (All Fixes)", initial=state.batch, every=config.run.log_every)
    while state.batch < total:
        began, clocked = time.monotonic(), run.clock()
        rl_every = config.policy.rl_every
        progress = epoch_progress(config, run.sampler, epoch, state.batch)
        moment = Moment(state.step, progress, bool(rl_every) and state.step % rl_every == 0)
        last = state.batch + 1 == total
        logs = due(state.batch + 1, config.run.log_every, last)
        factor = learning_rate_factor(config, run.sampler, epoch, state.batch, state.ends)
        set_learning_rate(run.optimizers, state.lr_factor * factor)
        step = take_step(run, epoch, state.batch, moment, watch_qwen=logs)
        count_step(run, step)
        state.batch, state.step = state.batch + 1, state.step + 1
        state.epoch_seconds += time.monotonic() - began
        bar.update()
        if logs:
            log_batch(run, step.update)
        if logs or not run.foretold:
            fit_to_time(run)
        stopping = run.is_ending()
        if last or stopping or (not state.bad_steps and run.save_is_due()):
            save(run)
        run.pace.add(run.clock() - clocked)
        if stopping:
            bar.close()
            return end_session(run)
    bar.close()
    return None


def fit_to_time(run: Run) -> None:
    """Let the learning rate fall towards the end of --max-hours, and say once what the run, or the session, will take.

    Called at each log line, as the pace may change; where the schedule ends is in the checkpoints.
    """
    state, config = run.state, run.config
    if not run.pace.is_known:
        return
    if not run.foretold and config.run.max_hours:
        try:
            run.validation_seconds, run.vote_seconds = run.world.tell(foretell_validation(run))
        except ValidationStopped:
            return  # the session ends after the next batch
    batches = run.batches(state.epoch)
    costs = Costs(batches * run.pace.seconds, run.validation_seconds, config.run.eval_every, config.run.epochs)
    progress = state.epoch + state.batch / batches
    if config.run.max_hours:
        reached = costs.reached_after(progress, run.seconds_left() - run.reserve())
        state.ends = run.world.tell(reached if reached < config.run.epochs else 0.0)
    if not run.foretold:
        foretell(run, costs, progress)
    run.foretold = True


def foretell(run: Run, costs: Costs, progress: float) -> None:
    """Say how long a batch and an epoch take, and all that is left, or how far --max-hours gets."""
    config, ends = run.config.run, run.state.ends
    text = f"{run.pace.seconds:.2f} s per batch: {duration(costs.epoch)} per epoch"
    if not config.max_hours:
        left = dataclasses.replace(costs, validation=0.0).seconds_from(progress)
        text += f", about {duration(left)} left, without validation"
    else:
        text += f", {duration(costs.validation)} per validation"
        reached = f"{ends:.1f} of {config.epochs} epochs" if ends else f"all {config.epochs} epochs"
        text += f"; {reached} in {duration(config.max_hours * 3600)}"
        if ends:
            text += ", and the learning rate falls towards that end"
        if not run.reserve():
            text += ", too short for a validation at its end"
    run.console.say(banner_line("time", text))


def foretell_validation(run: Run) -> tuple[float, float]:
    """Return the seconds that a validation of all items will take, and the vote of the last one, by those of some."""
    sample = run.items[:: max(len(run.items) // SAMPLE, 1)][:SAMPLE]
    began = time.monotonic()
    bar = run.console.progress(2 * len(sample), "Timing a validation", leave=False, unit="pair")
    with run.average.swapped():
        validate_within_memory(run, sample, bar, ALONE)
        between = time.monotonic()
        vote_within_memory(run, sample, bar, ALONE)
    bar.close()
    whole = len(run.items) / len(sample) / run.world.size
    return (between - began) * whole, (time.monotonic() - between) * whole


def count_step(run: Run, step: Step) -> None:
    """Add a step to the sums, and end the run when too many steps in a row were not finite."""
    state, result, update = run.state, step.numbers, step.update
    if not update.taken:
        state.bad_steps += 1
        bad = [name for name, value in result.terms.terms.items() if not torch.isfinite(value)]
        expected = run.runtime.scaler.is_enabled() and not bad  # a loss scaler finds its scale by overflows
        state.add({"skipped": 1.0, "nonfinite": float(not expected)})
        where = ", ".join(sorted({c.task_id for c in step.contexts})[:4])
        run.console.warn(
            f"non-finite loss or gradient at epoch {state.epoch} batch {state.batch} (tasks {where}; "
            f"terms: {', '.join(bad) or 'gradient only'}); step skipped ({state.bad_steps}/{MAX_BAD_STEPS})"
        )
        if state.bad_steps >= MAX_BAD_STEPS:
            tell_health(run, run.health.judge_window(window_numbers(run, means(state.window)), state.step))
            describe_divergence(run, step)
            raise TrainingDiverged(f"training diverged: {MAX_BAD_STEPS} steps in a row were not finite")
        return
    state.bad_steps = 0
    values: dict[str, Tensor | float] = {f"term/{name}": value for name, value in result.terms.weighted.items()}
    values |= {"count": 1.0, "loss": result.total, "mask": result.terms.hard_fraction, "qwen_grad": update.qwen_norm,
               "norm": update.norm, "admitted": step.admitted, "cells": step.cells}  # fmt: skip
    if run.config.prompt.use_text and run.config.prompt.train_llm != "none":
        values["qwen_zero"] = update.qwen_norm == 0
    if update.qwen_ratio is not None:
        values |= {"qwen_upd": update.qwen_ratio, "qwen_upds": 1.0}
    if result.reward is not None:
        values |= {"reward": result.reward.mean(), "rewards": 1.0, "tied": result.policy.tied}
    state.add(values)


def describe_divergence(run: Run, step: Step) -> None:
    """Write diverged.json: all that is needed to compute the batch again that was not finite, and its terms."""
    state, path = run.state, run.folder.path / "diverged.json"
    pairs = [{"task": c.task_id, "pair": c.pair_id, **dataclasses.asdict(c.augmentation)} for c in step.contexts]
    facts = {"epoch": state.epoch, "batch": state.batch, "step": state.step, "seed": run.config.run.seed,
             "precision": run.runtime.precision, "loss": float(step.numbers.total.detach()),
             "terms": {name: float(value) for name, value in step.numbers.terms.terms.items()}}  # fmt: skip
    run.note(path.name, lambda: write_json_atomic(path, {**facts, "gradient_norm": step.update.norm, "pairs": pairs}))
    run.console.note(f"the batch is described in {path}")


OWN_COUNT = {"reward": "rewards", "tied": "rewards", "qwen_upd": "qwen_upds"}
TOTALS = ("count", "cells", "admitted", "skipped", "nonfinite", "rewards", "qwen_upds", "qwen_zero")


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return each sum divided by its own count, on the host; TOTALS stay sums."""
    if not sums:
        return {}
    host = dict(zip(sums, torch.stack([value.cpu() for value in sums.values()]).tolist(), strict=True))
    return {
        name: value if name in TOTALS else value / max(host.get(OWN_COUNT.get(name, "count"), 0.0), 1.0)
        for name, value in host.items()
    }


def log_batch(run: Run, update: Update) -> None:
    """Print the log line of the window since the last one, and write it to metrics.jsonl."""
    state, values = run.state, means(run.state.window)
    reward = values.get("reward")
    memory = run.system.memory.statistics()
    run.console.say(batch_line(state.batch, values.get("loss", float("nan")), reward or 0.0, values.get("qwen_grad"),
                               values.get("mask")))  # fmt: skip
    ratio = None if update.qwen_ratio is None else float(update.qwen_ratio)
    record = {name.replace("term/", "efe_"): v for name, v in values.items() if name.startswith("term/")}
    record |= {"event": "batch", "epoch": state.epoch, "batch": state.batch, "step": state.step}
    record |= {"efe_loss": values.get("loss"), "reward": reward, "qwen_grad": values.get("qwen_grad"),
               "qwen_upd": ratio, "mask": values.get("mask"), "grad_norm": values.get("norm"),
               "skipped": values.get("skipped", 0.0), "memory": memory["size"], "threshold": memory["theta"],
               "lr": run.optimizers.main["adamw"].param_groups[0]["lr"]}  # fmt: skip
    if run.runtime.scaler.is_enabled():
        record["scale"] = run.runtime.scaler.get_scale()
    run.log.append(record)
    if run.console.verbose:
        device = run.runtime.device
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        run.console.detail(detail_line(record, state.epoch_seconds / state.batch, peak))
    tell_health(run, run.health.judge_window(window_numbers(run, values), state.step))
    state.window = {}
    run.lock.heartbeat()


def window_numbers(run: Run, values: dict[str, float]) -> dict[str, float]:
    """Return the numbers that health judges a window by; `values` are its means."""
    count, skipped = values.get("count", 0.0), values.get("skipped", 0.0)
    numbers = {"nonfinite": 0.0, **values, "count": count, "skipped": skipped, "batches": count + skipped}
    if run.runtime.scaler.is_enabled():
        numbers["scale"] = run.runtime.scaler.get_scale()
    return numbers


def epoch_numbers(run: Run, values: dict[str, float], scores: dict[str, float] | None) -> dict[str, float]:
    """Return the numbers that health judges an epoch by; `values` are its means."""
    state = run.state
    numbers = {"rewards": 0.0, **values, **(scores or {}), "epoch": state.epoch, "save_seconds": state.save_seconds}
    numbers["wall_seconds"] = state.epoch_seconds + state.save_seconds
    if scores and run.baselines:
        numbers["color_cells"] = run.baselines["color_cells"]
    if run.config.memory.use_memory:
        numbers |= {name: count - state.memory_before.get(name, 0) for name, count in memory_counts(run).items()}
    return numbers


def memory_counts(run: Run) -> dict[str, float]:
    """Return how many samples the memory was offered in the whole run, and how many it has written."""
    counts = run.system.memory.statistics()
    return {"offered": counts["offered"], "written": counts["admissions"] + counts["replaced"]}


def tell_health(run: Run, changes: list[Change]) -> None:
    """Say which flags were raised and cleared, and keep that in metrics.jsonl and run.json."""
    state = run.state
    for rule, raised in changes:
        if raised:
            run.console.warn(f"{rule.flag}: {rule.problem}", rule.advice)
        else:
            run.console.note(f"{rule.flag} is over")
        run.log.append({"event": "flag", "epoch": state.epoch, "batch": state.batch, "step": state.step,
                        "flag": rule.flag, "raised": raised})  # fmt: skip
    if changes:
        run.note("run.json", lambda: run.folder.set_status("running", flags=run.health.summary()))


def run_validation(run: Run, last: bool = False) -> dict[str, float]:
    """Return the scores of the averaged weights on the unseen test pairs, beside the baselines.

    The run's or the session's last validation has more than one view vote, as --views says.
    Raises: ValidationStopped when a signal comes.
    """
    began = time.monotonic()
    if run.baselines is None:
        run.baselines = run.world.first(lambda: baselines(run.items, run.system.prior))
    bar = run.console.progress(-(-len(run.items) // run.world.size), "Validation", leave=False, unit="pair")
    back = functools.partial(plan_back, run.system, run.runtime) if run.system.plans_backward else None
    gallery = Gallery(run.items, run.system.memory, run.sampler.tasks, back)
    try:
        with run.average.swapped():
            scores = validate_within_memory(run, run.items, bar, run.world, gallery)
            if last:
                bar.close()
                bar = run.console.progress(-(-len(run.items) // run.world.size), "Voting", leave=False, unit="pair")
                scores |= vote_within_memory(run, run.items, bar, run.world)
    finally:
        bar.close()
    run.note("predictions", lambda: gallery.write(run.folder.path, run.state.epoch, run.state.step))
    seconds = run.world.tell(time.monotonic() - began)
    if not last:
        run.validation_seconds = seconds
    return {**scores, "seconds": seconds}


def validate_within_memory(
    run: Run, items: Sequence[Item], bar: Any, world: World, gallery: Gallery | None = None
) -> dict[str, float]:
    """Return the scores of the weights as they are, within the memory."""
    return within_memory(run, items, bar, lambda cells, tick: validate(run.system, run.runtime, items, cells, tick,
                                                                       world, gallery))  # fmt: skip


def vote_within_memory(run: Run, items: Sequence[Item], bar: Any, world: World) -> dict[str, float]:
    """Return the scores of the vote over the views of --views, within the memory; nothing where one view is enough."""
    views = run.config.evaluation.views or (1 if run.runtime.device.type == "cpu" else 16)
    if views == 1:
        return {}
    seen = choose_views(views, run.config.run.seed)
    return within_memory(run, items, bar, lambda cells, tick: validate_votes(run.system, run.runtime, items, seen,
                                                                             cells, tick, world))  # fmt: skip


def within_memory(
    run: Run, items: Sequence[Item], bar: Any, look: Callable[[int, Callable[[int], None]], dict[str, float]]
) -> dict[str, float]:
    """Return what `look` finds with batches of so many cells; while the memory does not suffice, again with half.

    Raises: OutOfMemory when batches of one pair do not fit, and at once with several processes; ValidationStopped
    after a signal, but not with several processes, which would have to stop together.
    """

    def tick(done: int) -> None:
        bar.update(done)
        if run.stop.signal is not None and run.world.size == 1:
            raise ValidationStopped

    while True:
        rung = run.state.rung
        cells = max(run.config.data.batch_cells * 2 // rung.validation_parts, 1)
        try:
            return look(cells, tick)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            short = shortage(error, run.runtime.device)
            if run.world.size > 1:
                where = f"the validation on process {run.world.rank}"
                raise OutOfMemory(f"{short} in {where}", SMALLER_BATCHES) from error
        free_memory(run.runtime.device)
        bar.reset()
        if max(map(len, evaluation_batches(items, cells))) == 1:
            raise OutOfMemory(f"{short} in the validation at batch 1", "--resume with --refine mean or --refine none")
        run.state.rung = dataclasses.replace(rung, validation_parts=2 * rung.validation_parts)
        run.console.warn(f"{short.short()} in the validation; repeating it with batches of {max(cells // 2, 1)} cells")


def finish_epoch(run: Run, scores: dict[str, float] | None) -> None:
    """Print and store the epoch's summary, keep the best weights, and save the state as validated."""
    state = run.state
    values = report_epoch(run, scores)
    tell_health(run, run.health.judge_epoch(epoch_numbers(run, values, scores), state.step))
    state.validated = True
    weights, is_best_delta = keep_best(run, scores) if scores is not None else (None, False)
    save(run, weights, is_best_delta)
    write_page(run)


def finish_session(run: Run) -> None:
    """Validate at the end of --max-hours within an epoch, and keep the best weights.

    The checkpoint is written before the summary is recorded, so that a resume takes the record back: the epoch goes on.
    """
    scores = run_validation(run, last=True)
    save(run, *keep_best(run, scores))
    report_epoch(run, scores)


def report_epoch(run: Run, scores: dict[str, float] | None) -> dict[str, float]:
    """Print and store the summary of the epoch so far; return its means."""
    state, values = run.state, means(run.state.epoch_sums)
    state.epoch_seconds, state.save_seconds = run.world.tell((state.epoch_seconds, state.save_seconds))
    memory = run.system.memory.statistics() | {"lessons": len(run.system.lessons)}
    speed = values.get("cells", 0.0) / max(state.epoch_seconds, 1e-9)
    run.console.say(full_summary(state.epoch, values, scores, run.baselines, memory, speed))
    training, every, epochs = state.epoch_seconds + state.save_seconds, run.config.run.eval_every, run.config.run.epochs
    costs, done = Costs(training, run.validation_seconds, every, epochs), state.epoch + 1
    if state.batch == run.batches(state.epoch):
        left = costs.seconds_from(done)
        run.console.say(time_line(training, scores and scores["seconds"], epochs - done, left))
    row = {"epoch": state.epoch, "step": state.step, "memory": memory["size"], "threshold": memory["theta"],
           "lessons": memory["lessons"]}  # fmt: skip
    row |= {name.replace("term/", "train_"): value for name, value in values.items()}
    row |= {f"val_{name}": value for name, value in (scores or {}).items()}
    run.note("epochs.csv", lambda: run.folder.write_epoch({**row, "train_seconds": state.epoch_seconds}))
    run.log.append({"event": "epoch", **row, **{f"base_{k}": v for k, v in (run.baselines or {}).items()}})
    return values


def write_page(run: Run, last: bool = False) -> None:
    """Write report.html, and with `last` curves.png; without it only while that costs little.

    That is at most MAX_PAGE_SECONDS, and PAGE_SHARE of the time since the last page. Whatever goes wrong with a page is
    a warning: training does not depend on it, and the command report makes it again.
    """
    now = time.monotonic()
    if not run.world.is_first:
        return
    if not last and run.page_seconds > min(MAX_PAGE_SECONDS, PAGE_SHARE * (now - run.page_written)):
        return
    run.page_written = now
    began = time.thread_time()  # a busy machine is no reason to go without the page
    try:
        write_report(run.folder.path)
        if last:
            write_curves(run.folder.path)
    except Exception as problem:
        run.console.warn(f"report.html not written ({type(problem).__name__}: {problem}); training goes on")
    run.page_seconds = time.thread_time() - began


Weights = tuple[dict[str, Tensor], dict[str, Any]]


def keep_best(run: Run, scores: dict[str, float]) -> tuple[Weights | None, bool]:
    """Return (averaged weights, facts) if they are the best so far (exact, then cells, then the earlier), else None.

    The second value is True for the best Accuracy_Delta.
    """
    best, weights = run.state.best, None
    rank = (scores["exact"], scores["cells_predicted"])
    if rank > (best.get("exact", -1), best.get("cells_predicted", -1.0)):
        best |= {"exact": scores["exact"], "cells_predicted": scores["cells_predicted"], "epoch": run.state.epoch}
        if run.world.is_first:
            weights = best_weights(run)
    improved = scores["accuracy_delta"] > best.get("accuracy_delta", float("-inf"))
    if improved:
        best |= {"accuracy_delta": scores["accuracy_delta"], "delta_epoch": run.state.epoch}
    return weights, improved


def best_weights(run: Run) -> Weights:
    """Return a copy of the averaged weights, and what one has to know to use and to judge them."""
    with run.average.swapped():
        tensors, facts = run.system.export_state()
        origin = {"protocol": run.config.data.protocol, "tasks": [task.id for task in run.sampler.tasks]}
        return snapshot(tensors), {**facts, **origin, "seen": run.seen, "config": portable_config(run)}


def portable_config(run: Run) -> dict[str, Any]:
    """Return the settings that decide what the weights mean: nothing of where, when and how long the run was."""
    tokens = run.system.prompt_model.max_tokens  # fewer than was set where the memory did not suffice
    settings = to_dict(with_values(run.config, {"prompt.max_prompt_tokens": tokens}))
    del settings["run"], settings["data"]
    return {**settings, "seed": run.config.run.seed}


def prior_requests(run: Run) -> Iterator[tuple[Context, tuple[int, int] | None]]:
    """Yield each input that training and validation will ask the prior about, with an output size (None: likeliest).

    Without --max-batches an epoch holds every pair; with it epochs differ, and the next EPOCHS_AHEAD are looked at.
    """
    first, limit = run.state.epoch, run.config.run.max_batches
    for epoch in range(first, min(first + EPOCHS_AHEAD, run.config.run.epochs) if limit else first + 1):
        for k in range(run.batches(epoch)):
            query, answer = run.sampler.batch(epoch, k)
            yield from zip(query.contexts, answer.shapes, strict=True)
    for context, answer in run.items:
        yield context, None
        yield context, answer.shape
    if run.config.evaluation.refine in ("search", "isotropic", "random"):
        for context, answer in leave_one_out([context for context, _ in run.items])[0]:
            yield context, answer.shape


def prepare_priors(run: Run) -> None:
    """Compute the priors that the run will use and that are not on the disk yet; a signal or --max-hours ends it.

    Of several processes the first one fills the disk, and the others read there; without a disk each computes all of
    them, on its part of the cores.
    """
    if run.world.tell(bool(run.system.prior.folder)):
        run.world.first(lambda: compute_priors(run))
    else:
        compute_priors(run, processes=max(core_count() // run.world.size, 1) if run.world.size > 1 else 0)
    if run.world.size > 1:
        agree(run, run.world.sum([torch.tensor(wishes(run), device=run.runtime.device)])[0].tolist())


def compute_priors(run: Run, processes: int = 0) -> None:
    """Compute the priors that are missing, with so many processes (0: as many as make sense)."""
    prior, console = run.system.prior, run.console
    plan = prior.plan(prior_requests(run))
    if not plan.missing:
        return
    began, place = time.monotonic(), f" in {prior.folder}" if prior.folder else ""
    console.say(banner_line("priors", f"computing {plan.missing} inputs, {plan.found} found{place}"))
    bar = console.progress(plan.missing, "Priors", leave=False, unit="pair")
    count = prior.build(plan, processes, tick=bar.update, stopping=run.is_over, note=console.note)
    bar.close()
    kept = f"{file_size(prior.store.size())}{place}" if prior.folder else "kept in memory only"
    console.say(banner_line("priors", f"{count} inputs computed in {duration(time.monotonic() - began)}; {kept}"))


# 5. Saving and resuming ----------------------------------------------------------------------------------------------


def save(run: Run, best: Weights | None = None, is_best_delta: bool = False) -> None:
    """Start to write a checkpoint of everything that the next batch depends on, and the best weights where given.

    The first process writes what all of them agree on. Raises: PeerError when they do not.
    """
    state, payload = run.state, checkpoint_payload(run)
    if run.world.size > 1:
        run.world.require_equal(fingerprint(shared_part(payload)), f"step {state.step}")
    if not run.world.is_first:
        return
    facts = {"epoch": state.epoch, "batch": state.batch, "step": state.step, "best": dict(state.best)}

    def written() -> None:
        if run.console.verbose:
            path = run.store.path(facts["step"])
            size, seconds = file_size(path.stat().st_size), run.store.seconds
            run.console.detail(banner_line("saved", f"{path.name}, {size} in {seconds:.1f} s"))
        run.note("run.json", lambda: run.folder.set_status("running", **facts, flags=run.health.summary()))
        if run.backup is not None:
            run.backup.offer()

    run.saver.save(state.step, payload, best=best, is_best_delta=is_best_delta, then=written)
    state.save_seconds += run.saver.stall


def fault_of(payload: dict[str, Any]) -> str:
    """Return why a payload must not be saved: nothing could go on from weights that are not finite."""
    broken = [part for part, tensors in payload["system"].items() if not all_finite(tensors.values())]
    return f"weights of {', '.join(broken)} are not finite" if broken else ""


def checkpoint_payload(run: Run) -> dict[str, Any]:
    """Return references to everything that `restore` needs."""
    return {
        "system": run.system.checkpoint_state(),
        "base": run.system.base(),
        "optimizers": run.optimizers.state_dict(),
        "scaler": run.runtime.scaler.state_dict() if run.runtime.scaler.is_enabled() else None,
        "average": run.average.state_dict(),
        "memory": run.system.memory.state_dict(),
        "lessons": run.system.lessons.state_dict(),
        "loop": {**dataclasses.asdict(run.state), "health": run.health.state_dict()},
        "rng": rng_state(),
        "metrics_offset": run.log.offset(),
        "data_hash": run.data_hash,
        "config": to_dict(run.config),
    }


def shared_part(payload: dict[str, Any]) -> dict[str, Any]:
    """Return what of a payload has to be the same on all processes: all but times, and what one of them alone has."""
    loop = {k: v for k, v in payload["loop"].items() if k != "device" and not k.endswith("_seconds")}
    return {**{k: payload[k] for k in ("system", "optimizers", "scaler", "average", "memory", "lessons")}, "loop": loop}


def require_saved(run: Run) -> None:
    """Raise: CheckpointError unless the newest checkpoint on the disk is where the run stands; on every process."""
    run.world.first(lambda: require_written(run), exit_code)


def require_written(run: Run) -> None:
    """Raise: CheckpointError unless this process has written the newest checkpoint where the run stands."""
    if run.saver.saved_step != run.state.step:
        newest = next(iter(list_checkpoints(run.folder.path)), None)
        raise CheckpointError(
            f"the last checkpoint could not be written; the newest one is {newest.name if newest else 'none'}",
            "mend what the warning above names, then --resume", exit_code=4)  # fmt: skip


def require_space(run: Run) -> None:
    """Refuse to start when the disk cannot hold what a run keeps; say so when it holds fewer checkpoints than asked.

    Raises: CheckpointError with exit code 4 and both sizes.
    """
    size, weights = expected_sizes(run)
    keep = run.store.kept(size)
    already = sum(path.stat().st_size for path in run.folder.path.rglob("*") if path.is_file())
    free = shutil.disk_usage(run.folder.path).free + already
    # Besides what is kept: best_delta.pt, and the file that is being written.
    most, least = (keep + 2) * size + weights, 3 * size + weights
    if free < least:
        raise CheckpointError(
            f"run needs ~{file_size(least)} in {run.folder.path.parent}, {file_size(free)} free",
            "free some; a new run may use another disk with --out DIR, or --train-llm lora", exit_code=4)  # fmt: skip
    if free < most:
        run.console.note(f"{file_size(free)} free, {keep} checkpoints need {file_size(most)}: fewer will be kept")


OPTIMIZER_TENSORS = {"Muon": 1, "AdamW": 2, "Adam": 2}  # as large as the parameter itself


def expected_sizes(run: Run) -> tuple[int, int]:
    """Return the bytes of a checkpoint once the optimizers have taken a step, and of the best weights."""
    lessons = run.system.lessons.bytes_of(run.sampler.num_pairs)
    weights = count_bytes(run.system.checkpoint_state()) + count_bytes(run.system.memory.state_dict()) + lessons
    size = weights + count_bytes(run.average.state_dict())
    for optimizer in (*run.optimizers.main.values(), run.optimizers.policy):
        tensors = OPTIMIZER_TENSORS[type(optimizer).__name__]
        size += tensors * sum(count_bytes(group["params"]) for group in optimizer.param_groups)
    return size, weights


def newest_checkpoint(run: Run, accept: Callable[[Checkpoint], bool] = lambda found: True) -> Checkpoint | None:
    """Return the newest whole checkpoint that `accept` takes, None without one; the first process chooses for all."""
    found: list[Checkpoint | None] = []

    def choose() -> Path | None:
        found.append(run.store.latest(accept))
        return found[0].path if found[0] else None

    path = run.world.first(choose, exit_code)
    return found[0] if found else read_checkpoint(path) if path else None


def restore(run: Run, payload: dict[str, Any]) -> None:
    """Bring every part of the run to the state of a checkpoint."""
    run.system.prompt_model.require_base(**payload["base"])
    run.system.load_checkpoint_state(payload["system"])
    run.optimizers.load_state_dict(payload["optimizers"])
    scaler = run.runtime.scaler
    if scaler.is_enabled() and payload["scaler"] is not None:
        scaler.load_state_dict(payload["scaler"])
    elif scaler.is_enabled():
        run.console.note("the checkpoint was written without a loss scaler; it starts at its default scale")
    run.average.load_state_dict(payload["average"])
    run.system.memory.load_state_dict(payload["memory"])
    run.system.lessons.load_state_dict(payload["lessons"])
    loop = dict(payload["loop"])
    run.health.load_state_dict(loop.pop("health"))
    for name in ("window", "epoch_sums"):
        loop[name] = {key: value.to(run.runtime.device) for key, value in loop[name].items()}
    run.state = LoopState(**loop)
    set_rng_state(payload["rng"])
    run.log.truncate(payload["metrics_offset"])
    run.tracker.go_back(run.state.step, run.folder.metrics_path)


def end_session(run: Run) -> int:
    """Wait for the checkpoint and say how to go on after a signal or the end of the time; return the exit code.

    Raises: CheckpointError when it could not be written.
    """
    state = run.state
    if run.stop.signal is None and not state.validated and run.world.tell(run.can_validate()):
        with contextlib.suppress(ValidationStopped):
            finish_session(run)
    number = run.stop.signal
    run.saver.wait()
    status = "interrupted" if number else "paused"
    run.note("run.json", lambda: run.folder.set_status(status, epoch=state.epoch, batch=state.batch))
    require_saved(run)
    where = f"epoch {state.epoch}, batch {state.batch} -> {run.store.path(state.step).name}"
    run.console.say(banner_line("saved", where), always=True)
    out = "" if run.config.run.out == "runs" else f" --out {run.config.run.out}"
    run.console.say(banner_line("continue", f"python {Path(__file__).name} --resume{out}"), always=True)
    return 128 + number if number else 0


def end_before_training(run: Run) -> int:
    """Save where the run stands, so that --resume goes on; return the exit code."""
    save(run)
    return end_session(run)


# 6. The command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunData:
    """The tasks to train on, those whose test pairs choose the best weights, the hash of all grids, and how many
    training pairs were left out because they are test answers of another task."""

    tasks: list[ArcTask]
    validation: list[ArcTask]
    hash: str
    left_out: int


def prepare_data(config: TrainConfig) -> RunData:
    """Return what to train and validate on. Raises: DataError when there are too few tasks to train on."""
    data = config.data
    if data.protocol in ("", "arc2"):
        tasks, left_out = without_own_answers(select_tasks(load_tasks(data.data, data.solutions), data.max_tasks))
        validation = tasks
    else:
        protocol = load_protocol(data.protocol, data.holdout)
        tasks, left_out = select_tasks(protocol.training, data.max_tasks), protocol.dropped
        validation = list(protocol.validation)
    require_answers(validation)
    if len(tasks) < 4:
        raise DataError(f"{len(tasks)} tasks left after filtering; training needs at least 4", "use --smoke for a demo")
    hashed = data_hash(tasks) if validation is tasks else data_hash([*tasks, *validation])
    return RunData(tasks, validation, hashed, len(left_out))


def process_device(name: str, world: World) -> torch.device:
    """Return the device of this process: of several each has a GPU of its own, or all compute on the CPU.

    Raises: DeviceError when there are fewer GPUs than processes; ConfigError for what cannot be shared.
    """
    if world.size == 1:
        return choose_device(name)
    kind, _, index = name.partition(":")
    if kind == "mps" or index:
        raise ConfigError(f"--device {name} with {world.size} processes", "--device cuda gives each a GPU of its own")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    choose_device("cuda")
    if torch.cuda.device_count() < world.size:
        raise DeviceError(f"{world.size} processes, but only {torch.cuda.device_count()} CUDA GPUs",
                          f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu")  # fmt: skip
    device = torch.device("cuda", world.rank)
    torch.cuda.set_device(device)
    return device


def settle(
    command: CommandLine, chosen: RunChoice | None, console: Console, world: World = ALONE
) -> tuple[TrainConfig, Runtime]:
    """Return the complete settings and the runtime. Raises: ConfigError when a resumed run may not go on with them."""
    config = command.config
    if chosen is not None:
        saved = read_settings(chosen.path)
        config = resume_config(saved, config, command.explicit)
        if command.file:
            console.note(f"going on with the run's own settings, not those of {command.file}")
    device = process_device(config.run.device, world)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
    resolved = resolve(config, device.type, memory)
    if chosen is not None:
        check_resume(same_data(from_dict(TrainConfig, saved), resolved, chosen.path), resolved, chosen.path.name)
    require_tracker(resolved.run.report_to)
    use_deterministic(resolved.run.deterministic)
    runtime = choose_runtime(device, resolved.run.precision)
    console.say(f"ARC-EFE {VERSION} | Python {sys.version.split()[0]} | torch {torch.__version__}")
    shared = f" in each of {world.size} processes" if world.size > 1 else ""
    console.say(banner_line("device", f"{device}, {runtime.precision} ({runtime.reason}){shared}"))
    for note in resolution_notes(config, resolved, device.type):
        console.note(note)
    changed = changed_flags(command.config)
    if changed:
        console.say(banner_line("settings", " ".join(changed)))
    return resolved, runtime


def same_data(saved: TrainConfig, now: TrainConfig, path: Path) -> TrainConfig:
    """Return the saved settings with the data's place as it is now where the same tasks lie there.

    Raises: DataError when another place is given and nothing can be read there.
    """
    places = {"data.data": now.data.data, "data.solutions": now.data.solutions}
    moved = with_values(saved, places)
    if moved == saved:
        return saved
    hashed = prepare_data(with_values(now, {"data.max_tasks": saved.data.max_tasks})).hash
    return moved if hashed == RunFolder(path, writes=False).read_config()["data_hash"] else saved


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings stored in a run folder. Raises: CheckpointError when they or the data's hash are missing."""
    saved = RunFolder(path, writes=False).read_config()
    if not (isinstance(saved.get("config"), dict) and isinstance(saved.get("data_hash"), str)):
        raise CheckpointError(f"{path / 'config.json'} is missing or damaged, so the run cannot be resumed",
                              "start a new run with --fresh")  # fmt: skip
    return saved["config"]


def build_run(command: CommandLine, console: Console, chosen: RunChoice | None, world: World = ALONE) -> Run:
    """Return the run that the command line asks for: `chosen` is the run to resume, None for a new one."""
    setup = world.together(lambda: set_up(command, console, chosen, world), exit_code)
    if command.dry_run:  # in a folder of its own, which `start` deletes, so that no command takes it for a run
        hidden = Path(setup.config.run.out) / f".dry-run-{os.getpid()}"
        config = with_values(setup.config, {"run.out": str(hidden), "run.backup": ""})
        setup = dataclasses.replace(setup, config=config)
    path = world.first(lambda: run_folder(setup, chosen), exit_code)
    run_id = path.name if chosen is None else chosen.run_id
    return world.together(lambda: open_run(setup, path, run_id, console, world), exit_code)


@dataclass(frozen=True)
class Setup:
    """What a run is made of before it has a folder."""

    config: TrainConfig
    runtime: Runtime
    data: RunData
    sampler: TaskSampler
    items: list
    system: ARCSystem


def set_up(command: CommandLine, console: Console, chosen: RunChoice | None, world: World) -> Setup:
    """Return the settings, the data and the system of a run."""
    config, runtime = settle(command, chosen, console, world)
    require_mounted(config.run.backup)
    if chosen is None and world.is_first:
        check_writable(config.run.out)
    data = prepare_data(config)
    tasks, hashed = data.tasks, data.hash
    seed_all(config.run.seed)
    sampler = TaskSampler(tasks, config.data, config.run.seed, config.data.batch_cells)
    table = {task.id: index for index, task in enumerate(tasks)}
    items = test_items(select_tasks(data.validation, config.run.eval_tasks), table)
    whose = "the same tasks" if data.validation is tasks else f"{len(data.validation)} tasks held back"
    counts = f"{len(tasks)} tasks, {sampler.num_pairs} training pairs, {len(items)} unseen test pairs of {whose}"
    named = f"protocol {config.data.protocol}" if config.data.protocol else config.data.data
    console.say(banner_line("data", f"{named} {hashed[:7]}, {counts}"))
    if data.left_out:
        pairs = f"{data.left_out} pair{'s' * (data.left_out > 1)}"
        console.note(f"{pairs} left out of training: by content a test answer of another task")
    system = ARCSystem(config, len(tasks)).to(runtime.device)
    random.seed(config.run.seed)  # some libraries draw when they are first imported: only once in a process
    system.prior.open_disk(config.run.cache_dir, console.warn)
    revision = system.prompt_model.revision
    config = with_values(config, {"prompt.revision": revision})
    llm = sum(p.numel() for _, p in system.language_parameters())
    planner = f"planner {config.agent.preset} ({parameter_count(system.agent):,} parameters)"
    written = f"{config.prompt.model}@{revision[:12]} ({config.prompt.train_llm}, {llm:,} parameters train)"
    console.say(banner_line("model", f"{written}, {planner}"))
    if config.run.compile:
        began, fault = time.monotonic(), use_compiled(system.agent, runtime)
        if fault:
            console.note(f"--compile does not work here, so nothing is compiled ({fault})")
        else:
            console.say(banner_line("compiled", f"the planner's blocks, in {duration(time.monotonic() - began)}"))
    return Setup(config, runtime, data, sampler, items, system)


def run_folder(setup: Setup, chosen: RunChoice | None) -> Path:
    """Return the folder of a new run, made now, or of the chosen one. Raises: ConfigError when its tasks are others."""
    if chosen is None:
        return RunFolder.create(setup.config.run.out, setup.config.run.name).path
    if RunFolder(chosen.path).read_config().get("data_hash") != setup.data.hash:
        raise ConfigError("the tasks have changed since the run began", "restore them, or start anew with --fresh")
    return chosen.path


def open_run(setup: Setup, path: Path, run_id: str, console: Console, world: World) -> Run:
    """Return the run in a folder, which the first process locks and writes."""
    config, runtime, system, first = setup.config, setup.runtime, setup.system, world.is_first
    folder, lock = RunFolder(path, writes=first), RunLock(path)
    if first:
        lock.acquire()
    tracker = make_tracker(config.run.report_to if first else "none", path, to_dict(config), console.warn)
    log = MetricLog(folder.metrics_path, also=tracker.send) if first else NoMetrics()
    store = CheckpointStore(path, keep=config.run.keep, run_id=run_id, writes=first, say=console.relay)
    saver = Saver(store, folder.best, config.run.save_every, share=config.run.save_share,
                  minutes=config.run.save_minutes, fault=fault_of)  # fmt: skip
    target = Path(config.run.backup).expanduser()
    backup = Backup(path, target, store.run_id, console.relay) if config.run.backup and first else None
    seen = {TRAINED: pair_table(setup.data.tasks, "train"), VALIDATED: pair_table(setup.data.validation, "test")}
    return Run(
        config=config, console=console, folder=folder, log=log, tracker=tracker, lock=lock, runtime=runtime,
        store=store, saver=saver, backup=backup, system=system, optimizers=build_optimizers(system),
        average=WeightAverage(system, config.optim.ema), sampler=setup.sampler, items=setup.items,
        state=LoopState(**computed_on(runtime), processes=world.size), stop=StopFlag(console.say),
        data_hash=setup.data.hash, seen=seen, world=world,
    )  # fmt: skip


def main(command: CommandLine | AnswerCommand) -> int:
    """Run a command line; return the exit code."""
    console = Console.of(command)
    try:
        world = World.of(os.environ)
        console = Console.of(command, world.rank)
        if not world.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends): of what libraries print
        if console.verbose:
            console.detail(packages_line())
        if isinstance(command, AnswerCommand):
            require_alone(world)
            return verbs.run(command, console)
        if command.print_config:
            device = choose_device(command.config.run.device)
            console.say(config_json(resolve(command.config, device.type)), always=True)
            return 0
        world.join()
        code = start(command, console, world)
        world.leave()
        return code
    except Ended as end:
        return end.code
    except KeyboardInterrupt:
        trains = isinstance(command, CommandLine)
        console.error("interrupted before the first batch; nothing was trained" if trains else
                      "interrupted; answers found so far are kept, the same command goes on")  # fmt: skip
        return 128 + signal.SIGINT
    except Exception as problem:
        error = problem
        if isinstance(command, CommandLine) and is_out_of_memory(problem):  # while the model was built, for example
            device = choose_device(command.config.run.device)
            error = OutOfMemory(str(shortage(problem, device)), advice(command.config)).with_traceback(
                problem.__traceback__
            )
        elif fault := device_fault(problem):
            error = fault.with_traceback(problem.__traceback__)
        known = exit_code(error)
        hint = "" if known else "this is a bug: run again with --debug for the traceback"
        console.error(error, hint, debug=command.debug)
        return known or 1
    finally:
        console.close()


def exit_code(error: Exception) -> int:
    """Return the documented exit code of an error that we raise, 0 for one that only a bug raises."""
    if isinstance(error, CheckpointError):
        return error.exit_code
    codes = {ConfigError: 2, DataError: 3, DeviceError: 4, ModelError: 4, RunFolderError: 4, TrackerError: 4,
             LeakError: 2, TrainingDiverged: 1, OutOfMemory: 1, PeerError: 1}  # fmt: skip
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 0)


def require_alone(world: World) -> None:
    """Refuse several processes. Raises: ConfigError."""
    if world.size > 1:
        raise ConfigError("only training is shared out to several processes", "start this with python, not torchrun")


def choose_run(command: CommandLine, console: Console, world: World) -> RunChoice | None:
    """Return the run to go on with, brought back from its backup where it lies there; None for a new one.

    Processes that torchrun started anew go on with the run that they had begun.
    """
    out, resume = command.config.run.out, command.resume
    launched = find_launched(out, world.launch) if world.restarts else None
    if launched is not None:
        console.note(f"torchrun started the processes anew ({world.restarts}); going on with {launched}")
        resume = str(launched)
    elif resume is None and not command.fresh:
        suggest_resume(Path(out), console)
    require_mounted(command.config.run.backup)
    chosen = find_run(out, resume, command.config.run.backup) if resume is not None else None
    if resume is not None and chosen is None:
        console.note(f"--resume auto: no run under {out}/, starting a new one")
    if chosen is not None and chosen.is_backup:
        check_writable(out)
        source, chosen = chosen.path, bring_back(chosen, out)
        console.note(f"brought {chosen.path} back from the backup {source}, {chosen.checkpoint.name}")
    return chosen


def start(command: CommandLine, console: Console, world: World = ALONE) -> int:
    """Start or resume the run; return the exit code."""
    chosen = world.first(lambda: choose_run(command, console, world), exit_code)
    run = build_run(command, console, chosen, world)
    try:
        resumed_at = resume_from_checkpoint(run, chosen) if chosen is not None else ""
        state, epochs = run.state, run.config.run.epochs
        if chosen is not None and state.validated and state.epoch + 1 >= epochs:
            note_finished(run)
            done = f"{state.epoch + 1}/{epochs} epochs"
            console.say(f"run {run.folder.name} already finished {done}; raise --epochs to go on", always=True)
            return 0
        return run_session(run, command, resumed_at)
    except BaseException:
        if world.is_first:  # the traceback belongs into run.log also when the session has not begun
            with contextlib.suppress(RunFolderError):  # a log that cannot be written must not hide the error itself
                console.attach(run.folder.log_path)
        raise
    finally:
        run.close()
        if command.dry_run and world.is_first:
            shutil.rmtree(run.config.run.out)


def run_session(run: Run, command: CommandLine, resumed_at: str) -> int:
    """Note the session in the run folder, train, and say where the results lie; return the exit code."""
    console, folder, config = run.console, run.folder, run.config
    folder.write_config(to_dict(config), data_hash=run.data_hash, version=VERSION)
    facts = {**environment(), "device": str(run.runtime.device), "precision": run.runtime.precision}
    folder.start_session(facts, resumed_at)
    launch = {"launch": run.world.launch} if run.world.launch else {}
    folder.set_status("running", run_id=run.store.run_id, flags=run.health.summary(), **launch)
    if run.world.is_first:
        console.attach(folder.log_path)
    console.say(banner_line("run", f"{folder.path}   (seed {config.run.seed})"))
    console.say("[OK] All models created")
    run.world.first(lambda: require_space(run), exit_code)
    if run.world.is_first and not command.smoke:
        warn_of_data(run)
    if on_drive(folder.path):
        console.note("--out is on Google Drive, which may drop out in the middle of a run; a folder of this machine,"
                     " with --backup on the Drive, survives that")  # fmt: skip
    if run.backup is not None:
        run.backup.offer()
    if command.dry_run:
        return dry_run(run)
    began = time.monotonic()
    try:
        prepare_priors(run)
        ends = run.stop.signal is not None if run.world.size == 1 else run.ends
        code = end_before_training(run) if ends else train(run)
    except BaseException:
        folder.set_status("failed")
        raise
    write_page(run, last=True)
    if run.world.is_first and folder.read_status()["status"] == "finished":
        took = duration(time.monotonic() - began)
        console.say(f"done in {took}. Best weights: {folder.best}; report: {folder.path / 'report.html'}")
        if command.smoke:
            for word, flags in (("next", "--epochs 20 --device cuda"), ("no GPU", "--epochs 1")):
                console.say(banner_line(word, f"python {Path(__file__).name} {flags}"))
    return code


def warn_of_data(run: Run) -> None:
    """Warn of tasks that are too few to learn from, and of those that a score should be kept for."""
    tasks, data = run.sampler.tasks, run.config.data
    if len(tasks) < FEW_TASKS:
        run.console.warn(f"{len(tasks)} tasks are few to train on; what a score on them says holds for them alone",
                         f"take {FEW_TASKS} or more")  # fmt: skip
    if data.protocol or data.data == DataConfig.data:  # the first sees to it, the second holds none
        return
    count = in_public_evaluation(tasks)
    if count:
        run.console.warn(f"{count} of the training tasks are in the public evaluation set; the evaluation score will"
                         " not be honest", "--protocol arc2-eval trains on all that may be trained on")  # fmt: skip


def suggest_resume(out: Path, console: Console) -> None:
    """Say that the newest run could be continued, when it is unfinished."""
    try:
        name = read_regular(out / "LATEST", 4096).decode().strip()
    except (OSError, UnicodeDecodeError):  # there is none, or it is not ours
        return
    path = out / name
    unfinished = is_folder_name(name) and any((path / "checkpoints").glob("step_*.pt"))
    if unfinished and RunFolder(path).read_status().get("status") != "finished":
        console.note(f"{path} is unfinished; --resume continues it. This starts a new run.")


def resume_from_checkpoint(run: Run, chosen: RunChoice) -> str:
    """Restore the newest whole checkpoint, or the named one; return a line that says where the run goes on."""
    checkpoint = read_checkpoint(chosen.checkpoint) if chosen.explicit else newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"--resume: {run.folder.path} has no loadable checkpoint", "start one without --resume")
    if run.world.is_first:
        run.store.set_aside_after(checkpoint.step)
    try:
        restore(run, checkpoint.payload)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if exit_code(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"--resume: {checkpoint.path} does not fit this run ({one_line(reason, 150)})",
                              "start a new run with --fresh") from error
    state = run.state
    if run.config.run.epochs < state.epoch + 1:
        raise ConfigError(f"--epochs {run.config.run.epochs}, but the run is already in epoch {state.epoch}",
                          f"--epochs {state.epoch + 1} or more")  # fmt: skip
    adapt(run, from_dict(TrainConfig, checkpoint.payload["config"]))
    where = f"epoch {state.epoch}, batch {state.batch}/{run.batches(state.epoch)}"
    if chosen.status == "running":
        note_sudden_end(run, checkpoint)
    saved = f"{datetime.fromtimestamp(checkpoint.saved_at):%Y-%m-%d %H:%M:%S}"
    run.console.say(banner_line("resume", f"{run.folder.name}, {where}, from {checkpoint.path.name} of {saved}"))
    if state.best:
        exact = f"{state.best['exact']:.0f} of {len(run.items)} exact"
        run.console.say(banner_line("best", f"{exact} after epoch {state.best['epoch']:.0f}"))
    return where


def note_sudden_end(run: Run, checkpoint: Checkpoint) -> None:
    """Say that the last session was killed, and how much of its work is lost where its lock tells."""
    after = (run.lock.left or 0.0) - checkpoint.saved_at
    when = f", {duration(after)} or more after its last checkpoint" if after >= 1 else ""
    run.console.note(f"the previous session of {run.folder.name} ended without saying goodbye (likely a disconnect or"
                     f" out of RAM){when}")  # fmt: skip


def computed_on(runtime: Runtime) -> dict[str, str]:
    """Return the device and the precision of a session, as its checkpoints name them."""
    device = runtime.device
    if device.type != "cuda":
        return {"device": device.type, "precision": runtime.precision}
    facts = torch.cuda.get_device_properties(device)
    return {"device": f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB", "precision": runtime.precision}


def adapt(run: Run, saved: TrainConfig) -> None:
    """Go on under settings that differ from those of the restored checkpoint, and note each difference that counts.

    With another batch size the pairs of this epoch that are not trained on yet are packed anew.
    """
    state, config = run.state, run.config
    before = TaskSampler(run.sampler.tasks, saved.data, saved.run.seed, saved.data.batch_cells)
    before.continue_epoch(state.epoch, state.segments)
    state.segments = segments_after(state.segments, state.batch, packing(saved.data), packing(config.data))
    run.sampler.continue_epoch(state.epoch, state.segments)
    here = computed_on(run.runtime)
    there = {"device": state.device or here["device"], "precision": state.precision or here["precision"]}
    old, new = (with_values(c, {f"run.{k}": v for k, v in f.items()}) for c, f in ((saved, there), (config, here)))
    for note in resume_notes(old, new):
        run.console.note(note)
    if state.processes != run.world.size:
        run.console.note(f"processes {state.processes} -> {run.world.size} (the same batches, shared out otherwise)")
    state.processes = run.world.size
    go_on_from_rung(run, there["device"], here["device"])
    state.device, state.precision = here["device"], here["precision"]
    was = learning_rate_factor(saved, before, state.epoch, state.batch, state.ends)
    state.ends = 0.0  # until this session knows its pace
    now = learning_rate_factor(config, run.sampler, state.epoch, state.batch)
    if was != now:
        run.console.note(f"the learning rate's factor is {now:.3f} from here on, it was {was:.3f}: the schedule follows"
                         " the whole run")  # fmt: skip


def go_on_from_rung(run: Run, before: str, now: str) -> None:
    """Go on from the rung of the last session, or from the top on another device, and say so."""
    if run.world.size > 1:  # each computes its share of a batch at once
        run.state.rung = dataclasses.replace(run.state.rung, parts=1)
    words = ", ".join(run.state.rung.words())
    if words and before != now:
        run.console.note(f"{now} may hold more than {before}: no longer computing {words}")
        run.state.rung = Rung()
    elif words:
        run.console.note(f"computing {words}, as the last session had to on this device")
    use_rung(run)


def dry_run(run: Run) -> int:
    """Run one batch and one save, to see that everything works; return 0, 1 when the step was not taken."""
    done = take_step(run, 0, 0, Moment(0, 0.0, bool(run.config.policy.rl_every)), watch_qwen=True)
    save(run)
    run.saver.wait()
    require_saved(run)
    loss, step = float(done.numbers.total.detach()), "taken" if done.update.taken else "skipped"
    size = file_size(run.store.path(run.state.step).stat().st_size) if run.world.is_first else ""
    run.console.say(f"dry run: one batch (loss {loss:.3f}, step {step}) and one save ({size}) work; nothing is kept")
    return 0 if done.update.taken else 1


if __name__ == "__main__":
    sys.exit(main(COMMAND))
