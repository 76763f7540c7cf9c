"""The whole solver as one object: its parts, the device, the precision, the optimizers, the averaged weights.

May import everything below it (config, arc_data, the parts). Used by evaluate and by the driver.
Everything here that predicts takes a Query; answers enter only the loss and the judging functions above this layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_data import PAD, Answer, Query, canvas_shape, rows_of_own_input
from config import ConfigError, TrainConfig, one_line
from demo_prior import MAX_CANDIDATES
from distributed import WHOLE, Share
from grid_accuracy_loss import (
    ARCPromptGuidedAgent,
    Block,
    Cells,
    Pieces,
    Reading,
    Trajectory,
    cell_nats,
    compiled_pieces,
    with_backward,
)
from loss_function import EFELoss
from muon import Muon
from policy_refined import PolicyRefinedAgent, PolicyTerms, Proposal
from prior_cache import NUM_EVIDENCE, PriorCache
from qwen_hybrid_prompt import Prompt, QwenHybridPrompt
from reward_shaping import Potentials, cells_union, dense_reward, potentials, shaping_reward
from solver2 import LessonBuffer, Lessons, MemoryBuffer, MemoryReader, Recall, ZTable
from task_features import NUM_FEATURES

CONTROL_DIM = 32
NO_CANDIDATE = -1e4  # logit of a candidate that does not exist
MOST_GRAPHS = 64  # of one function, for torch.compile: with gradients and without, for batches of one, rows of one, ...


class DeviceError(RuntimeError):
    """The machine lacks what was asked for. `hint` says what to type; the driver exits with code 4."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


# Device and precision, decided once ----------------------------------------------------------------------------------


@dataclass
class Runtime:
    """Where and in which precision to compute. `scaler` is enabled for fp16 on CUDA only."""

    device: torch.device
    precision: str
    reason: str
    scaler: torch.amp.GradScaler

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of a forward pass; it does nothing in fp32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.amp.autocast(device_type=self.device.type, dtype=dtype)


def choose_device(name: str) -> torch.device:
    """Return the device called auto, cpu, cuda, cuda:N or mps. Raises: DeviceError when it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            _require_supported(torch.device("cuda", 0))
            return torch.device("cuda", 0)
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(*_no_cuda(name))
        device = torch.device("cuda", int(index or 0))
        if device.index >= torch.cuda.device_count():
            raise DeviceError(
                f"--device {name}, but there are only {torch.cuda.device_count()} CUDA GPUs", "--device cuda:0"
            )
        _require_supported(device)
        return device
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps, but this machine has no Metal GPU", "--device cpu")
    return torch.device(kind)


def _no_cuda(name: str) -> tuple[str, str]:
    import shutil

    smi = "found" if shutil.which("nvidia-smi") else "not found"
    message = f"--device {name}, but torch sees no CUDA GPU (torch {torch.__version__}, nvidia-smi: {smi})"
    if "COLAB_RELEASE_TAG" in os.environ:
        return message, "Runtime -> Change runtime type -> T4 GPU, then run again"
    if torch.version.cuda is None:
        return message, "this torch is the CPU build; see pytorch.org/get-started, or use --device cpu"
    return message, "--device cpu"


def _require_supported(device: torch.device) -> None:
    """Refuse a GPU that is older than all that this build of torch has code for. Raises: DeviceError.

    A newer one may still run what is compiled for it when it is first used.
    """
    found = (re.match(r"(?:sm|compute)_(\d+)", name) for name in torch.cuda.get_arch_list())
    built = [int(match[1]) for match in found if match]
    major, minor = torch.cuda.get_device_capability(device)
    if built and 10 * major + minor < min(built):
        name = torch.cuda.get_device_name(device)
        raise DeviceError(
            f"{name} (sm_{major}{minor}) is not supported by this torch build (needs sm_{min(built)}+)",
            "choose T4 x2 in Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "another GPU, or --device cpu")


def device_fault(error: BaseException) -> DeviceError | None:
    """Return what the user can do about an error that says that the device cannot compute this; None for any other."""
    text = str(error)
    if "no kernel image is available" in text:
        return DeviceError("this torch build has no code for the GPU (no kernel image)",
                           "another GPU, a torch built for this one (pytorch.org/get-started), or --device cpu")
    operation = re.search(r"The operator '([\w:.]+)' is not currently \w+ (?:for|on) the MPS", text)
    if operation:
        return DeviceError(f"the device mps has no operation {operation[1]}",
                           "PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu")  # fmt: skip
    return None


def choose_runtime(device: torch.device, precision: str) -> Runtime:
    """Return the runtime: bf16 from compute capability 8.0, fp16 with a scaler below, fp32 off CUDA."""
    if device.type != "cuda":
        if precision in ("bf16", "fp16"):
            raise ConfigError(f"--precision {precision} needs a CUDA GPU", "--precision fp32")
        chosen, reason = "fp32", f"{device.type} computes in fp32"
    elif precision != "auto":
        chosen, reason = precision, "as asked"
    else:
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        chosen = "bf16" if capability >= (8, 0) else "fp16"
        reason = f"{name} has compute capability {capability[0]}.{capability[1]}"
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and nearly every batch has another
    scaler = torch.amp.GradScaler(device.type, enabled=chosen == "fp16")
    return Runtime(device, chosen, reason, scaler)


def use_deterministic(on: bool) -> None:
    """Let torch use only algorithms that give the same bits each time, or any. Call it before the GPU computes."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(on)


def use_compiled(agent: ARCPromptGuidedAgent, runtime: Runtime) -> str:
    """Let torch.compile fuse the agent's blocks. Return '', or in one line why that cannot be; then nothing changes.

    What a step needs is compiled now, on made-up cells. What is met later for the first time (a batch of one, say) is
    compiled then; should that fail, torch warns and computes it as it is.
    """
    import torch._dynamo as dynamo

    blocks = [block for block in agent.modules() if isinstance(block, Block)]
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MOST_GRAPHS)
    try:
        pieces = compiled_pieces()
        for block in blocks:
            block.pieces = pieces
            _rehearse(block, agent.forward_planner.head_dim, runtime)
    except Exception as error:  # whatever is missing: Triton, a compiler, support for this version of Python
        for block in blocks:
            block.pieces = Pieces()
        return one_line(f"{type(error).__name__}: {error}".splitlines()[0], 200)
    dynamo.config.suppress_errors = True
    return ""


def _rehearse(block: Block, head_dim: int, runtime: Runtime) -> None:
    """Compute a block on made-up cells with gradients and without; no gradient stays."""
    shape, device = (2, 3, 4), runtime.device
    cells = Cells(torch.ones(shape, dtype=torch.bool, device=device), head_dim)
    prompt = None if block.modulation is None else torch.zeros(2, block.modulation.in_features, device=device)
    x = torch.ones(*shape, len(block.norm.weight), device=device, requires_grad=True)
    with runtime.autocast():
        y = block(x, cells, prompt)
    torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)
    with torch.no_grad(), runtime.autocast():
        block(x.detach(), cells, prompt)


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """Return a generator that is a pure function of its key, so that a resumed run draws the same numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # manual_seed uses the low 32 bits on a CPU
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors on the host, bit for bit and without graphs, after a single copy from their device."""
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so each starts at a whole element
    raw = [tensors[i].detach().contiguous().view(-1).view(torch.uint8) for i in order]
    found: dict[int, Tensor] = {}
    for i, part in zip(order, torch.cat(raw).cpu().split([len(x) for x in raw]), strict=True):
        found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


# The system ----------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What the system makes of a Query before it plans.

    features [B, F]; size_log_prob [B, 2, 30]; size_logits: row and column logits [B, 30]; prompt: as written by Qwen;
    embedding [B, Dp]: the prompt after recall; recall: what the memory returned; canonical [B, 10]: colour -> rank.
    """

    features: Tensor
    size_log_prob: Tensor
    size_logits: tuple[Tensor, Tensor]
    prompt: Prompt
    embedding: Tensor
    recall: Recall | None
    canonical: Tensor

    def sizes(self) -> Tensor:
        """Return the predicted output sizes [B, 2]."""
        return torch.stack([logits.argmax(1) + 1 for logits in self.size_logits], 1)


STORES = ("memory", "lessons")  # what the system remembers, beside what it trains


class CandidateJudge(nn.Module):
    """Rank the prior's candidates by the rules of their task that they break; which rules matter is learned.

    Untrained it keeps the prior's order. The rules are those of answer_traits, the same for all tasks, so that what is
    learned from the demonstrations of one task serves every other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_EVIDENCE))
        self.place = nn.Parameter(torch.linspace(0.0, -0.1, MAX_CANDIDATES))
        with torch.no_grad():
            self.place[0] = 1.5

    def forward(self, evidence: Tensor, exists: Tensor, recalled: Tensor | None = None) -> Tensor:
        """Return logits [B, K] from evidence [B, K, NUM_EVIDENCE]; candidates that do not exist get a very low one.

        `recalled` [B, NUM_EVIDENCE] is added to the weights of each input: what lessons of similar ones ask for.
        """
        with torch.autocast(evidence.device.type, enabled=False):
            logits = evidence.float() @ self.weight + self.place
            if recalled is not None:
                logits = logits + torch.einsum("bke,be->bk", evidence.float(), recalled)
            return torch.where(exists, logits, NO_CANDIDATE)


def ranking_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Return -log of the share of the right ones, [B, K], [B, K] bool -> [B]; 0 where none is right, or all are."""
    has_answer = right.any(1)
    among = torch.where(right, logits, NO_CANDIDATE).logsumexp(1)
    return torch.where(has_answer, logits.logsumexp(1) - among, 0.0)


def candidate_key(evidence: Tensor, exists: Tensor) -> Tensor:
    """Return the mean evidence [B, E] of the candidates [B, K, E] that exist [B, K]; 0 without any."""
    return (evidence * exists[..., None]).sum(1) / exists.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def lessons_of(evidence: Tensor, exists: Tensor, right: Tensor, logits: Tensor) -> Lessons:
    """Return what ranked candidates teach: evidence [B, K, E], exists and right [B, K] bool, logits [B, K].

    The direction is that in which the ranking loss falls, as a change of the judge's weights for this input.
    """
    told = right.any(1) & (exists & ~right).any(1)
    change = torch.where(right, logits, NO_CANDIDATE).softmax(1) - logits.softmax(1)
    with torch.autocast(evidence.device.type, enabled=False):
        direction = torch.einsum("bk,bke->be", torch.where(told[:, None], change.float(), 0.0), evidence)
    return Lessons(candidate_key(evidence, exists), direction, told)


class ARCSystem(nn.Module):
    """Own the parts: prompt_model, agent, policy, efe_loss, memory_reader, judge train; memory, lessons, z_table, prior
    are state."""

    def __init__(self, config: TrainConfig, num_tasks: int):
        super().__init__()
        self.config = config
        prompt_dim = config.prompt.prompt_dim
        self.prompt_model = QwenHybridPrompt(
            config.prompt, num_tasks=num_tasks, num_features=NUM_FEATURES, control_dim=CONTROL_DIM
        )
        self.agent = ARCPromptGuidedAgent(config.agent, prompt_dim=prompt_dim, num_features=NUM_FEATURES)
        width = config.agent.width
        self.policy = PolicyRefinedAgent(
            config.policy, prompt_dim, CONTROL_DIM, num_features=NUM_FEATURES, feature_dim=width
        )
        self.efe_loss = EFELoss(config.loss, feature_dim=width, prompt_dim=prompt_dim)
        self.memory_reader = MemoryReader(config.memory, prompt_dim) if config.memory.use_memory else None
        self.memory = MemoryBuffer(config.memory, feature_dim=NUM_FEATURES, prompt_dim=prompt_dim)
        self.lessons = LessonBuffer(config.memory, NUM_EVIDENCE)
        self.z_table = ZTable(num_tasks)
        self.judge = CandidateJudge()
        self.prior = PriorCache(config.agent.prior_effort)

    @property
    def device(self) -> torch.device:
        """Return the device of parameters and buffers."""
        return self.z_table.z.device

    def observe(self, query: Query) -> Scene:
        """Return features, size belief, prompt and memories of a batch of queries."""
        features = self.prior.features(query)
        size_log_prob = self.prior.size_log_prob(query)
        size_logits = self.agent.predict_size(query, features, size_log_prob)
        prompt = self.prompt_model(query, features)
        recall, embedding = None, prompt.embedding
        if self.memory_reader is not None:
            names = [context.task_id for context in query.contexts]
            recall = self.memory.recall(features, prompt.embedding, names)
            embedding = self.memory_reader.extend_prompt(embedding, recall)
        canonical = self.prior.canonical(query)
        return Scene(features, size_log_prob, size_logits, prompt, embedding, recall, canonical)

    def preference(
        self, query: Query, scene: Scene, size: Tensor | Sequence[tuple[int, int]], canvas: int | tuple[int, int]
    ) -> Tensor:
        """Return the preference C [B, H, W, 10] for outputs of the given size, with what the memory adds.

        Sizes given as plain numbers spare a wait for the device. `canvas` is (H, W), or the side of a square.
        """
        log_prob = self.prior.preferences(query, size, canvas)
        if self.memory_reader is None:
            return log_prob
        seen = on_canvas(query.input, canvas)
        return self.memory_reader.extend_preference(log_prob, scene.recall, scene.canonical, seen)

    def read(
        self, query: Query, scene: Scene, size: Tensor, canvas: int | tuple[int, int],
        shapes: Sequence[tuple[int, int]] = (),
    ) -> tuple[Reading, Tensor]:  # fmt: skip
        """Return the reading for outputs of `size` on a canvas (H, W), and the preference C it started from.

        `shapes`: the sizes as plain numbers, if the caller has them.
        """
        preference = self.preference(query, scene, shapes or size, canvas)
        own = rows_of_own_input(query.contexts, shapes) if shapes else ()
        return self.agent.read(query, size, canvas, preference=preference, own_rows=own), preference

    def plan(self, scene: Scene, reading: Reading, embedding: Tensor) -> Trajectory:
        """Return the forward trajectory under the prompt `embedding` [B, Dp]."""
        return self.agent.plan(reading, embedding, scene.size_logits)

    def plan_both_ways(
        self, query: Query, scene: Scene, reading: Reading, embedding: Tensor, grid: Tensor, size: Tensor,
        shapes: Sequence[tuple[int, int]] = (),
    ) -> Trajectory:  # fmt: skip
        """Return the forward trajectory with the backward beliefs that start at `grid` (the target while training).

        Without them where nothing weighs them. `shapes`: the sizes of the grids as plain numbers, if they are the
        targets; those that are demonstrations of other queries are then embedded once.
        """
        trajectory = self.plan(scene, reading, embedding)
        if not self.plans_backward:
            return trajectory
        own = rows_of_own_input(query.contexts, shapes, within_input=True) if shapes else ()
        return with_backward(trajectory, self.agent.plan_backward(query, grid, size, embedding, own))

    @property
    def plans_backward(self) -> bool:
        """Return True when a term of the loss or of the reward needs the backward planner."""
        loss, reward = self.config.loss, self.config.reward
        in_loss = loss.mode == "full" and (loss.lambda_bidirectional > 0 or loss.lambda_reverse > 0)
        return in_loss or reward.reward_reverse > 0

    def judge_loss(self, query: Query, answer: Answer) -> tuple[Tensor, Lessons | None]:
        """Return the judge's cross-entropy with which candidate is the answer, at its true size; a scalar, weighted.

        The mean over the batch; 0 for a pair whose answer is no candidate. And what the batch teaches, for the memory;
        None where the judge does not train.
        """
        weight = self.config.loss.lambda_judge
        if not weight:
            return answer.target.new_zeros((), dtype=torch.float32), None
        evidence, exists = self.prior.evidence(query, answer.shapes)
        grids, _ = self.prior.candidates(query, answer.shapes, answer.canvas)
        target = torch.where(answer.mask, answer.target, PAD)
        right = (grids == target[:, None]).flatten(2).all(2) & exists
        logits = self.judge(evidence, exists)
        return weight * ranking_loss(logits, right).mean(), lessons_of(evidence, exists, right, logits)

    def recalled_lessons(self, query: Query, evidence: Tensor, exists: Tensor) -> Tensor | None:
        """Return what lessons of other tasks add to the judge's weights, [B, E]; None where the memory is not used."""
        config = self.config.memory
        if not (config.use_memory and config.memory_lessons):
            return None
        names = [context.task_id for context in query.contexts]
        return config.memory_lessons * self.lessons.recall(candidate_key(evidence, exists), names)

    def judged(
        self, query: Query, shapes: Sequence[tuple[int, int]], canvas: int | tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the prior's candidates [B, K, H, W] and their probabilities [B, K] by the judge, best first.

        Where the prior is confident enough to answer at once, its own best stays first. Those that do not exist are
        empty, of probability 0, at the end.
        """
        evidence, exists = self.prior.evidence(query, shapes)
        grids, _ = self.prior.candidates(query, shapes, canvas)
        recalled = self.recalled_lessons(query, evidence, exists)
        probability = self.judge(evidence, exists, recalled).softmax(1) * exists
        rank = probability.clone()
        rank[:, 0] += self.prior.confidences(query, shapes) >= self.config.agent.answer_confidence
        order = rank.argsort(dim=1, descending=True, stable=True)
        return grids.take_along_dim(order[..., None, None], 1), probability.take_along_dim(order, 1)

    def language_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters of the language model, named within the system."""
        return [("prompt_model.language_model." + n, p) for n, p in self.prompt_model.language_parameters()]

    def checkpoint_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every part; of the language model only those that train."""
        state = {name: part.state_dict() for name, part in self.named_children() if name != "prompt_model"}
        return {**state, "prompt_model": self.prompt_model.checkpoint_state()}

    def load_checkpoint_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore every part. Raises: KeyError or RuntimeError when a tensor is missing or unexpected."""
        for name, part in self.named_children():
            load = self.prompt_model.load_checkpoint_state if name == "prompt_model" else part.load_state_dict
            load(state[name])

    def export_state(self) -> tuple[dict[str, Tensor], dict]:
        """Return (tensors, plain facts) that `import_state` needs: all that trained, the memory and its lessons."""
        tensors = {f"{part}.{name}": x for part, state in self.checkpoint_state().items() for name, x in state.items()}
        memory = self.memory.state_dict()
        tensors |= {f"memory.rows.{name}": rows for name, rows in memory.pop("rows").items()}
        tensors |= {f"memory.{name}": memory.pop(name) for name in ("mean", "squares")}
        lessons = self.lessons.state_dict()
        tensors |= {f"lessons.rows.{name}": rows for name, rows in lessons.pop("rows").items()}
        tasks = self.z_table.z.shape[0] - 1
        return tensors, {"num_tasks": tasks, "base": self.base(), "memory": memory, "lessons": lessons}

    def base(self) -> dict[str, str]:
        """Return which language model the weights belong to: its revision, and a hash of what is frozen of it."""
        return {"revision": self.prompt_model.revision, "frozen_digest": self.prompt_model.frozen_digest}

    def import_state(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Restore what `export_state` returned. Raises: ModelError when they belong to another language model."""
        self.prompt_model.require_base(**facts["base"])
        parts: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self.named_children()}
        stores: dict[str, dict] = {store: {**facts[store], "rows": {}} for store in STORES}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part not in stores:
                parts[part][name] = tensor
            elif name.startswith("rows."):
                stores[part]["rows"][name.removeprefix("rows.")] = tensor
            else:
                stores[part][name] = tensor
        self.load_checkpoint_state(parts)
        self.memory.load_state_dict(stores["memory"])
        self.lessons.load_state_dict(stores["lessons"])

    def policy_names(self) -> set[str]:
        """Return the names of the parameters that the policy's own optimizer owns."""
        owned = {id(p) for p in self.policy.policy_parameters()}
        return {name for name, p in self.named_parameters() if id(p) in owned}


# Judging refinements: the only functions here that see an answer ----------------------------------------------------


@torch.no_grad()
def rate(
    system: ARCSystem, query: Query, answer: Answer, grid: Tensor, prompt: Tensor, reliability: Tensor | None
) -> Potentials:
    """Return the potentials [B] of grids [B, S, S] that were planned at the true size.

    With a reliability [B] (how well the backward planner finds the input from the true output), the backward planner's
    way from each grid back to the input counts as well.
    """
    agreement = None
    if reliability is not None:
        agreement = agreement_with_input(query, system.agent.plan_backward(query, grid, answer.target_size, prompt))
    size = answer.target_size
    return potentials(grid, size, answer.target, size, query.input, query.input_size, system.config.reward,
                      agreement, reliability)  # fmt: skip


def agreement_with_input(query: Query, backward: Tensor) -> Tensor:
    """Return the share [B] of input cells that the backward beliefs [B, T, F, G, C] end at."""
    return cells_union(backward[:, 0].argmax(-1), query.input_size, query.input, query.input_size)


class Judgement(NamedTuple):
    """What refinements of a batch were worth: the policy's terms; reward [B] of the mean move; gain [B] by the memory,
    None without one; move [B, Dp]: the refinement with the highest reward, 0 where none is positive."""

    terms: PolicyTerms
    reward: Tensor
    gain: Tensor | None
    move: Tensor


def score_refinements(
    system: ARCSystem, query: Query, answer: Answer, scene: Scene, reading: Reading, proposal: Proposal,
    refined: Tensor, trajectory: Trajectory, progress: float, share: Share = WHOLE,
) -> Judgement:  # fmt: skip
    """Return what the proposed refinements are worth.

    The reward of a refinement is the change of the potential against the unrefined prompt, planned from the same
    reading. `trajectory` was planned under `refined` [B, Dp], the mean move, which is trained on; the proposal's
    members only explore. No gradient flows through any of it.
    """
    with torch.no_grad():
        members = system.policy.refine(scene.embedding, proposal)  # [G, B, Dp]
        plain = [scene.embedding] if scene.recall is None else [scene.embedding, scene.prompt.embedding]
        prompts = torch.stack([refined, *plain, *members])  # mean move, before, without memory, members
        planned = system.agent.plan(reading.repeat(len(prompts) - 1), prompts[1:].flatten(0, 1))
        logits = torch.cat((trajectory.final(), planned.final())).unflatten(0, prompts.shape[:2])
        features = torch.cat((trajectory.features, planned.features)).float().unflatten(0, prompts.shape[:2])
        judged = system.config.reward.reward_reverse > 0 and trajectory.backward is not None
        reliability = agreement_with_input(query, trajectory.backward) if judged else None
        grids = torch.where(trajectory.mask, logits.argmax(-1), PAD)
        rated = [rate(system, query, answer, *pair, reliability) for pair in zip(grids, prompts, strict=True)]
        nats = torch.stack([cell_nats(x, answer.target) for x in logits])
        first = 1 + len(plain)
        tried = [0, *range(first, len(prompts))]
        change = torch.stack([shaping_reward(rated[1], rated[m]) for m in tried])
        reward = change + torch.stack([dense_reward(nats[1], nats[m], system.config.reward) for m in tried])
        next_state = system.policy.next_state(proposal, members, features[first:] - features[1])
        highest, best = reward.nan_to_num(nan=-torch.inf).max(0)
        move = (prompts - scene.embedding)[tried][best, torch.arange(len(best), device=best.device)]
        move = torch.where(highest[:, None] > 0, move, 0.0)
    scale = system.policy.curiosity_scale(progress)
    terms = system.policy.losses(proposal, reward[1:], scale, next_state, share)
    gain = shaping_reward(rated[2], rated[1]) if len(plain) == 2 else None
    return Judgement(terms, change[0], gain, move)


def on_canvas(grid: Tensor, canvas: int | tuple[int, int]) -> Tensor:
    """Return grids [B, H, W] cut or padded with PAD to a canvas: (height, width), or the side of a square."""
    height, width = canvas_shape(canvas)
    grown = F.pad(grid, (0, max(width - grid.shape[-1], 0), 0, max(height - grid.shape[-2], 0)), value=PAD)
    return grown[:, :height, :width]


def canvas_for(sizes: Tensor) -> tuple[int, int]:
    """Return the canvas (height, width) that holds every size [B, 2]; reads the tensor on the host."""
    height, width = sizes.amax(0).tolist()
    return height, width


# Optimizers, schedule, averaged weights ------------------------------------------------------------------------------


@dataclass
class Optimizers:
    """The main optimizers (disjoint parameters, stepped together), and the policy's own."""

    main: dict[str, torch.optim.Optimizer]
    policy: torch.optim.Optimizer

    def state_dict(self) -> dict:
        """Return the states by name."""
        return {**{k: o.state_dict() for k, o in self.main.items()}, "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the states.

        Raises: KeyError when one is missing; ConfigError, before anything changes, when one belongs to other parameters
        or to the same in another order, which torch would accept.
        """
        optimizers = {**self.main, "policy": self.policy}
        for name, optimizer in optimizers.items():
            found, wanted = _parameter_names(state[name]), _parameter_names(optimizer.state_dict())
            if found != wanted:
                here, there = next(pair for pair in itertools.zip_longest(wanted, found) if pair[0] != pair[1])
                raise ConfigError(f"the state of the optimizer {name} belongs to other parameters (here {here},"
                                  f" there {there})", "resume with the version that began the run")  # fmt: skip
        for name, optimizer in optimizers.items():
            # What the settings say holds, not what they said when the state was saved: a resume may change them.
            own = [{key: group[key] for key in _set_by_settings(group)} for group in optimizer.param_groups]
            groups = [{**group, **now} for group, now in zip(state[name]["param_groups"], own, strict=True)]
            optimizer.load_state_dict({**state[name], "param_groups": groups})


def _set_by_settings(group: dict) -> tuple[str, ...]:
    """Return the keys of a parameter group that settings and device decide; the schedule makes "lr" from "peak_lr"."""
    settings = ("peak_lr", "weight_decay") if "peak_lr" in group else ("lr",)
    return *settings, *(key for key in ("foreach", "fused") if key in group)


def _parameter_names(state: dict) -> list[str]:
    return [name for group in state["param_groups"] for name in group["param_names"]]


def build_optimizers(system: ARCSystem) -> Optimizers:
    """Return Muon for weight matrices, AdamW for the rest and for the language model, and the policy's Adam.

    Source: Jordan 2024 (Muon); embeddings, heads that start at zero, and vectors go to AdamW, as is usual there.
    """
    config = system.config.optim
    owned, language = system.policy_names(), dict(system.language_parameters())
    tiny = system.prompt_model.revision.startswith("tiny")
    muon, matrices, vectors, llm = [], [], [], []
    for name, parameter in system.named_parameters():
        if not parameter.requires_grad or name in owned:
            continue
        if name in language:
            llm.append((name, parameter))
        elif parameter.ndim == 2 and not _is_table(name):
            muon.append((name, parameter))
        else:
            (matrices if parameter.ndim == 2 else vectors).append((name, parameter))
    llm_lr = config.lr if tiny else system.config.prompt.llm_lr
    fused = system.device.type == "cuda"  # on a CPU it rounds otherwise, and gains nothing
    small = {"foreach": not fused, "fused": fused}
    groups = [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay, **small},
        {"params": vectors, "lr": config.lr, "weight_decay": 0.0, **small},
        {"params": llm, "lr": llm_lr, "weight_decay": config.weight_decay, "fused": fused},
    ]
    main: dict[str, torch.optim.Optimizer] = {
        "muon": Muon(
            muon, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        "adamw": torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95)),
    }
    for optimizer in main.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return Optimizers(main, system.policy.make_optimizer())


TABLES = ("_embed.weight", "slot", "dihedral", "head.weight", "trust.weight", "output.weight", "likelihood", "basis",
          "copy_power", "null_key", "gate.weight", "modulation.weight", "view_embed", "geometry")  # fmt: skip


def _is_table(name: str) -> bool:
    """Return True for matrices that are look-up tables, zero-initialised heads or gates: AdamW's, not Muon's."""
    return any(part in name for part in TABLES)


def learning_rate_scale(step: float, total: int, warmup: float, decay: float) -> float:
    """Return the schedule's factor at `step` (it may lie between two) of `total`: rise, flat, fall to 5 % (WSD)."""
    rise, fall = max(int(total * warmup), 1), max(int(total * decay), 1)
    up = min((step + 1) / rise, 1.0)
    down = min(max((total - step) / fall, 0.0), 1.0)
    return up * (0.05 + 0.95 * down)


def set_learning_rate(optimizers: Optimizers, scale: float) -> None:
    """Scale every group's peak learning rate."""
    for optimizer in optimizers.main.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


class WeightAverage:
    """Exponential moving average of the trainable parameters, warmed up; evaluation swaps it in."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.live = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for _, p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.shadow, [p.detach() for _, p in self.live], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Evaluate inside with the averaged weights; the live ones come back bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for (_, p), average in zip(self.live, self.shadow, strict=True):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        """Return the count and the averaged tensors by parameter name."""
        return {"count": self.count, "shadow": {n: s for (n, _), s in zip(self.live, self.shadow, strict=True)}}

    def load_state_dict(self, state: dict) -> None:
        """Restore. Raises: KeyError when a parameter is missing."""
        self.count = state["count"]
        for (name, _), average in zip(self.live, self.shadow, strict=True):
            average.copy_(state["shadow"][name])


def update_ratio(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Return |dw| / |w| over lists of tensors, a scalar tensor."""
    moved = torch.stack([(b - a).square().sum() for a, b in zip(before, after, strict=True)]).sum()
    size = torch.stack([a.square().sum() for a in before]).sum()
    return (moved / size.clamp(min=1e-30)).sqrt()
