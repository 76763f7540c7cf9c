"""The Expected-Free-Energy loss: every term a pure function, and `EFELoss`, which weights and sums them.

May import config, distributed, arc_data and the agent's `Trajectory`; used by arc_system and the driver.
The loss is EFE-inspired: what holds exactly is risk + ambiguity == -(info_gain + E_Q log C), see `info_gain`.

Terms return nats (step: a share) per sample, [B]: a mean over the valid cells of each step, then over the steps;
`batch_mean` averages the samples that have a valid cell. Cells outside the mask change neither value nor gradient.
Suffixes: B batch, T steps, H rows, W columns, C colours, S latent codes, D width, Q queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LossConfig
from distributed import ALONE, WHOLE, Share, World

if TYPE_CHECKING:
    from arc_data import Answer, Query
    from grid_accuracy_loss import Trajectory

TERM_NAMES = ("risk", "ambiguity", "step", "consistency", "bidirectional", "z_learning", "prompt", "reward",
              "halt", "reverse", "size")
EMD_WEIGHT = 0.05  # of the squared distance between size distributions, beside their cross-entropy
PROMPT_TEMPERATURE = 0.1
PROMPT_PROJECTION = 64  # width in which trajectories and prompts are compared
PROMPT_QUEUE = 64  # past prompts kept as negatives
UNIT_EPSILON = 1e-6  # added to squared norms, so that a zero vector has a finite gradient


# 1. Log-probabilities and means -------------------------------------------------------------------------------------

def full_precision(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def as_batch(forward: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, int64 target and boolean mask with a batch dimension; one of size 1 is added where there is none.

    Shapes:  forward [B, T, H, W, C] or [T, H, W, C], target and mask [B, H, W] or [H, W]; mask None: target >= 0
    Raises:  ValueError when target is a float tensor with values that are no integers, or shapes disagree
    """
    target = integral_target(target)
    mask = target >= 0 if mask is None else mask.bool() & (target >= 0)
    if forward.dim() == 4:
        forward = forward[None]
    if target.dim() == 2:
        target, mask = target[None], mask.reshape(1, *target.shape)
    if forward.dim() != 5 or target.shape != forward.shape[:1] + forward.shape[2:4]:
        raise ValueError(f"expected logits [B, T, H, W, C] and target [B, H, W] with the same B, H, W, got "
                         f"{tuple(forward.shape)} and {tuple(target.shape)}")
    return forward, target, mask


def integral_target(target: Tensor) -> Tensor:
    """Return target as int64.

    Raises:  ValueError when it is a float tensor with values that are no integers
    """
    if target.is_floating_point() and not torch.equal(target, target.round()):
        raise ValueError("expected a target of colour indices, got a float tensor with fractions; pass int64 colours")
    return target.long()


def planar(x: Tensor) -> Tensor:
    """Return [..., H, W, C], the same values laid out plane by plane: a softmax over C is then ten times faster."""
    return x.movedim(-1, -3).contiguous().movedim(-3, -1)


def log_belief(logits: Tensor, mask: Tensor) -> Tensor:
    """Return normalised log-probabilities over the last dimension, uniform outside the mask.

    Padded logits are replaced before the softmax, because 0 * nan is nan in the gradient.
    Shapes:  logits [B, H, W, C] or [B, T, H, W, C], finite inside the mask; mask [B, H, W]
    """
    planes = planar(full_precision(logits)).movedim(-1, -3)
    cells = _over_steps(mask, logits.dim() - 1).unsqueeze(-3)
    return torch.log_softmax(torch.where(cells, planes, 0.0), -3).movedim(-3, -1)


def floored(log_prob: Tensor, floor: float) -> Tensor:
    """Return log((1 - floor) * p + floor / K) for log-probabilities over K outcomes in the last dimension."""
    uniform = -math.log(log_prob.shape[-1])
    if floor <= 0:
        return log_prob
    if floor >= 1:
        return torch.full_like(log_prob, uniform)
    return torch.logaddexp(log_prob + math.log1p(-floor), torch.full_like(log_prob[..., :1], math.log(floor) + uniform))


def expectation(probability: Tensor, value: Tensor) -> Tensor:
    """Return the sum of probability * value over the last dimension, with 0 * inf = 0."""
    return (probability * torch.where(probability > 0, value, 0.0)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Return H(p) over the last dimension, in nats."""
    return -expectation(log_p.exp(), log_p)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, in nats."""
    return expectation(log_p.exp(), log_p - log_q)


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence over the last dimension, in nats, within 0..ln 2."""
    p, q = log_p.exp(), log_q.exp()
    # The derivatives through the three logarithms cancel: p dlog_p + q dlog_q - (p + q) dlog_m = 0 in every entry.
    with torch.no_grad():
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        excess_p, excess_q = log_p - log_m, log_q - log_m
    return (0.5 * (expectation(p, excess_p) + expectation(q, excess_q))).clamp_min(0)


def cell_mean(value: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the (weighted) mean over the valid cells, 0 where there is none.

    Shapes:  value [B, H, W] or [B, T, H, W], mask and weight [B, H, W] -> [B] or [B, T]
    """
    weight = mask.to(value.dtype) if weight is None else torch.where(mask, weight, 0.0)
    mask, weight = _over_steps(mask, value.dim()), _over_steps(weight, value.dim())
    return (torch.where(mask, value, 0.0) * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp_min(1e-12)


def over_time(value: Tensor, reduce: str = "mean") -> Tensor:
    """Return the mean (or "sum") over the steps [B, T] -> [B]; 0 where there is no step."""
    return value.sum(1) if reduce == "sum" else value.sum(1) / max(value.shape[1], 1)


def batch_mean(per_sample: Tensor, valid: Tensor, share: Share = WHOLE) -> Tensor:
    """Return the mean over the valid samples [B] -> scalar; 0 where there is none.

    Of a share of a batch: what, weighted and added up over the shares, is the mean over the valid ones of the batch.
    """
    return torch.where(valid, per_sample, 0.0).sum() / share.divisor(valid.sum())


def _over_steps(per_cell: Tensor, dims: int) -> Tensor:
    return per_cell[:, None] if dims == 4 else per_cell


# 2. The seven terms -------------------------------------------------------------------------------------------------

def risk(log_q: Tensor, preference: Tensor, mask: Tensor, floor: float = 0.05, *, reduce: str = "mean",
         learn_preference: bool = False) -> Tensor:
    """Return L_risk = KL(Q || C), what the belief pays to leave the preference.

    C gets no gradient: it would chase Q, and the term would vanish without anything learned.
    Shapes:  log_q [B, T, H, W, C], preference (log C) [B, H, W, C] or [B, T, H, W, C], mask [B, H, W] -> [B]
    Units:   nats per valid cell, within 0..ln(C / floor)
    """
    preference = preference if learn_preference else preference.detach()
    cells = _over_steps(mask, preference.dim() - 1)[..., None]
    log_c = floored(torch.where(cells, planar(full_precision(preference)), 0.0), floor)
    log_c = log_c[:, None] if log_c.dim() == 4 else log_c
    return over_time(cell_mean(kl_divergence(log_q, log_c), mask), reduce)


def ambiguity(log_state: Tensor, log_likelihood: Tensor | None, mask: Tensor, *, reduce: str = "mean") -> Tensor:
    """Return L_ambiguity = E_Q(s) H[P(o|s)].

    Shapes:  log_state [B, T, H, W, S], mask [B, H, W] -> [B]; log_likelihood one of
             None: the observation is the state, so this is the predictive entropy H(Q);
             [S, C]: one likelihood per latent code; [B, T, H, W, S, C]: ensemble members
    Units:   nats per valid cell, within 0..ln C
    """
    return over_time(cell_mean(_cell_ambiguity(log_state, log_likelihood, mask), mask), reduce)


def log_predictive(log_state: Tensor, log_likelihood: Tensor) -> Tensor:
    """Return log Q(o) = logsumexp_s(log Q(s) + log P(o|s)) [B, T, H, W, C]; builds a tensor [B, T, H, W, S, C]."""
    return torch.logsumexp(log_state[..., None] + log_likelihood, -2)


@torch.no_grad()
def expected_free_energy(trajectory: Trajectory, preference: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return (L_risk, L_ambiguity) of each sample as they are, without weights, to be looked at; both [B].

    Shapes:  preference (log C) [B, H, W, C]
    Units:   nats per valid cell; their sum is the expected free energy
    """
    mask = trajectory.mask
    log_likelihood = torch.log_softmax(full_precision(trajectory.likelihood_logits), -1)
    doubt = ambiguity(log_belief(trajectory.state_logits, mask), log_likelihood, mask)
    return risk(log_belief(trajectory.forward, mask), preference, mask, floor), doubt


def info_gain(log_state: Tensor, log_likelihood: Tensor, mask: Tensor) -> Tensor:
    """Return H(Q(o)) - L_ambiguity >= 0 [B], what an observation tells about the state; logged, not part of the loss.

    With Q = `log_predictive`: risk + ambiguity == -(info_gain + E_Q log C) exactly.
    """
    if log_likelihood.dim() == 6:
        log_likelihood = _uniform_outside(log_likelihood, mask)
    gain = entropy(log_predictive(log_state, log_likelihood)) - _cell_ambiguity(log_state, log_likelihood, mask)
    return over_time(cell_mean(gain.clamp_min(0), mask))


def _cell_ambiguity(log_state: Tensor, log_likelihood: Tensor | None, mask: Tensor) -> Tensor:
    if log_likelihood is None:
        return entropy(log_state)
    if log_likelihood.dim() == 2:
        return (log_state.exp() * entropy(log_likelihood)).sum(-1)
    return expectation(log_state.exp(), entropy(_uniform_outside(log_likelihood, mask)))


def _uniform_outside(log_likelihood: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None, :, :, None, None], log_likelihood, -math.log(log_likelihood.shape[-1]))


def halting_log_probs(halt_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p_t, the chance to stop after step t (the last takes the remainder), and log P(step t is reached).

    Shapes:  halt_logits [B, T] -> [B, T], [B, T]
    """
    halt_logits = full_precision(halt_logits)
    log_reached = F.pad(F.logsigmoid(-halt_logits).cumsum(1)[:, :-1], (1, 0))
    log_stop = torch.cat([F.logsigmoid(halt_logits[:, :-1]), torch.zeros_like(halt_logits[:, :1])], 1)
    return log_stop + log_reached, log_reached


def step_cost(halt_logits: Tensor) -> Tensor:
    """Return L_step = E[N] / T, the expected share of the planning steps [B, T] -> [B], within 1/T..1."""
    _, log_reached = halting_log_probs(halt_logits)
    return log_reached.exp().mean(1)


def step_weights(num_steps: int, deep_supervision: float, like: Tensor) -> Tensor:
    """Return [T] weights that sum to 1: a share spread over all steps in proportion to t, the rest on the last."""
    steps = torch.arange(1, num_steps + 1, device=like.device, dtype=like.dtype)
    last = (steps == num_steps).to(like.dtype)
    return (1 - deep_supervision) * last + deep_supervision * steps / steps.sum()


def hard_weights(right: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Return cell weights: 1 where the prediction is wrong, epsilon where it is right, 0 outside the mask; no gradient.

    Shapes:  right, mask bool [B, H, W] -> float32 [B, H, W]
    """
    return mask * (1 - (1 - epsilon) * right.float())


def target_log_prob(log_q: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return log Q(y) of every cell, with colour 0 for y outside the mask.

    Shapes:  log_q [B, H, W, C] or [B, T, H, W, C], target and mask [B, H, W] -> log_q's without C
    """
    index = _over_steps(torch.where(mask, target, 0), log_q.dim() - 1)[..., None]
    return log_q.gather(-1, index.expand(*log_q.shape[:-1], 1))[..., 0]


def consistency(log_prob_target: Tensor, mask: Tensor, cell_weight: Tensor | None, step_weight: Tensor) -> Tensor:
    """Return L_consistency, the cross-entropy with the target under cell weights and step weights.

    Shapes:  log_prob_target [B, T, H, W], mask and cell_weight [B, H, W], step_weight [T] -> [B]
    Units:   nats per valid cell
    """
    return cell_mean(-log_prob_target, mask, cell_weight) @ step_weight


def bidirectional(log_forward: Tensor, log_backward: Tensor, mask: Tensor, *, reduce: str = "mean",
                  detach: str = "none") -> Tensor:
    """Return L_bidirectional = JS(forward || backward) of beliefs about the same moment; 0 where there is no step.

    Shapes:  log_forward, log_backward [B, I, H, W, C], mask [B, H, W] -> [B]; detach: none, fwd or bwd
    Units:   nats per valid cell, within 0..ln 2
    """
    log_forward = log_forward.detach() if detach == "fwd" else log_forward
    log_backward = log_backward.detach() if detach == "bwd" else log_backward
    return over_time(cell_mean(js_divergence(log_forward, log_backward), mask), reduce)


def desirable_preference(preference: Tensor, desirability: Tensor, floor: float) -> Tensor:
    """Return log C-hat, proportional to C * z-hat and floored; detached; both arguments are logs [B, H, W, C]."""
    log_c = planar(full_precision(preference.detach()) + full_precision(desirability.detach()))
    return floored(torch.log_softmax(log_c.movedim(-1, -3), -3).movedim(-3, -1), floor)


def z_anchor(preference_logits: Tensor, preference: Tensor, desirability: Tensor, mask: Tensor,
             floor: float = 0.05) -> Tensor:
    """Return L_z = KL(softmax(preference head) || C-hat), see `desirable_preference`; gradient to the head only.

    Shapes:  preference_logits, preference (log C), desirability (log z-hat) [B, H, W, C], mask [B, H, W] -> [B]
    Units:   nats per valid cell, within 0..ln(C / floor)
    """
    cells = mask[..., None]
    log_target = desirable_preference(torch.where(cells, preference, 0.0), torch.where(cells, desirability, 0.0), floor)
    return cell_mean(kl_divergence(log_belief(preference_logits, mask), log_target), mask)


def prompt_consistency(features: Tensor, prompt: Tensor, task_slot: Tensor, valid: Tensor, queue: Tensor | None = None,
                       queue_allowed: Tensor | None = None, temperature: float = PROMPT_TEMPERATURE) -> Tensor:
    """Return L_prompt, symmetric InfoNCE of projected trajectories and prompts; 0 for one sample and no queue.

    Samples of one task (equal slot > 0) are each other's positives: -log of the positives' total share.
    Shapes:  features, prompt [B, D], task_slot [B], valid [B], queue [Q, D] more prompts, queue_allowed [B, Q] -> [B]
    Units:   nats, within 0..; ln B where all are alike, of different tasks, and there is no queue
    """
    features, prompt = (_unit(torch.where(valid[:, None], x, 0.0)) for x in (features, prompt))
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    positive = own | ((task_slot[:, None] == task_slot[None]) & (task_slot[:, None] > 0) & valid[None])
    similarity = features @ prompt.T / temperature
    candidates = torch.stack([similarity, similarity.T]).masked_fill(~(valid[None] | own), -torch.inf)
    share = torch.logsumexp(candidates.masked_fill(~positive, -torch.inf), -1)
    to_prompts, to_features = candidates
    if queue is not None:
        past = (features @ _unit(queue).T / temperature).masked_fill(~queue_allowed, -torch.inf)
        to_prompts = torch.cat([to_prompts, past], 1)
    return 0.5 * (torch.logsumexp(to_prompts, 1) + torch.logsumexp(to_features, 1) - share.sum(0))


def prompt_cosine(pooled: Tensor, projected: Tensor) -> Tensor:
    """Return 1 - cos of two vectors [B, D], [B, D] -> [B], within 0..2; the prompt term of mode "seed"."""
    return 1 - (_unit(pooled) * _unit(projected)).sum(-1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPSILON)


# 3. Reward and heads ------------------------------------------------------------------------------------------------

def expected_accuracy(log_prob_target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean probability of the right colour, the differentiable surrogate S; [B, H, W] -> [B]."""
    return cell_mean(log_prob_target.exp(), mask)


def reward_term(surrogate: Tensor, reward: Tensor) -> Tensor:
    """Return L_R [B]: its value is exactly -reward, its gradient is that of -surrogate."""
    return -(reward.detach() + (surrogate - surrogate.detach()))


def size_loss(row_logits: Tensor, col_logits: Tensor, size: Tensor, emd_weight: float = EMD_WEIGHT) -> Tensor:
    """Return L_size: mean cross-entropy of rows and columns plus a squared distance that orders near and far misses.

    Shapes:  row_logits, col_logits [B, 30] for sizes 1..30, size [B, 2] -> [B]
    Units:   nats; ln 30 plus the distance for uniform logits
    """
    log_p = torch.log_softmax(full_precision(torch.stack([row_logits, col_logits], 1)), -1)
    index = (size - 1).clamp(0, log_p.shape[-1] - 1)[..., None]
    cross_entropy = -log_p.gather(-1, index)[..., 0]
    reached = torch.arange(log_p.shape[-1], device=size.device) >= index
    distance = (log_p.exp().cumsum(-1) - reached.to(log_p.dtype)).square().sum(-1)
    return (cross_entropy + emd_weight * distance).mean(1)


def halt_target(right: Tensor, mask: Tensor, size_right: Tensor) -> Tensor:
    """Return c_t [B, T]: True where every valid cell is right at step t and so is the size.

    Shapes:  right [B, T, H, W] bool, mask [B, H, W], size_right [B]
    """
    return (right | ~mask[:, None]).flatten(2).all(-1) & size_right[:, None]


def halt_loss(halt_logits: Tensor, solved: Tensor) -> Tensor:
    """Return L_halt, the sum over the steps of the halting head's cross-entropy with `halt_target`; [B, T] -> [B].

    A sum, because with a mean L_step outweighs it and every plan stops at once.
    Safe is lambda_step < lambda_halt * T / (T - 1).
    """
    halt_logits = full_precision(halt_logits)
    return F.binary_cross_entropy_with_logits(halt_logits, solved.to(halt_logits.dtype), reduction="none").sum(1)


def reverse_loss(backward_start: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
    """Return L_rev, the cross-entropy of the backward plan's last belief b_0 with the input grid.

    Shapes:  backward_start logits [B, Hi, Wi, C], grid and mask [B, Hi, Wi] -> [B]
    Units:   nats per valid cell
    """
    return cell_mean(-target_log_prob(log_belief(backward_start, mask), grid, mask), mask)


# 4. Weights and the whole loss --------------------------------------------------------------------------------------

def size_weight(progress: float, warmup: float) -> float:
    """Return the weight of L_size after `progress` epochs: 1 at the start, 0.5 from `warmup` epochs on."""
    return 0.5 + 0.5 * _remaining(progress, warmup)


def content_weight(progress: float, warmup: float) -> float:
    """Return the weight of the seven terms and the reward after `progress` epochs: 0.5 at the start, then 1."""
    return 1.0 - 0.5 * _remaining(progress, warmup)


def _remaining(progress: float, warmup: float) -> float:
    return max(0.0, 1.0 - progress / warmup) if warmup > 0 else 0.0


def term_weights(config: LossConfig, progress: float) -> dict[str, float]:
    """Return the effective weight of every term after `progress` epochs (fractional, derived from the step)."""
    content = content_weight(progress, config.size_warmup)
    heads = 0.0 if config.mode == "seed" else 1.0
    return {
        "risk": content * config.lambda_risk,
        "ambiguity": content * config.lambda_ambiguity * min(max(progress - config.size_warmup, 0.0), 1.0),
        "step": content * config.lambda_step,
        "consistency": content * config.lambda_consistency,
        "bidirectional": content * config.lambda_bidirectional,
        "z_learning": content * config.lambda_z,
        "prompt": content * config.lambda_prompt,
        "reward": content * config.lambda_reward,
        "halt": heads * config.lambda_halt,
        "reverse": heads * config.lambda_reverse,
        "size": size_weight(progress, config.size_warmup),
    }


@dataclass
class EFETerms:
    """The loss of one batch. Only `total` carries gradient; everything else is detached and may be kept.

    total: scalar, the sum of `weighted`. terms, weighted: a scalar per name in TERM_NAMES, batch means without and with
    their effective weight (0 for a term whose weight is 0). per_sample_consistency [B]: L_consistency of each sample.
    per_sample_cross_entropy [B]: plain cross-entropy of the last step. hard_fraction: share of valid cells that are
    wrong at the last step.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    per_sample_consistency: Tensor
    per_sample_cross_entropy: Tensor
    hard_fraction: Tensor


def joined_terms(
    parts: Sequence[EFETerms], shares: Sequence[float], cells: Sequence[Tensor], world: World = ALONE
) -> EFETerms:
    """Return the terms of a batch that was computed in parts, here and in other processes, without graphs.

    shares: of the samples, sum 1 over all processes; cells: number of valid cells of each part. Equal to the terms of
    the whole batch but, for several parts of one process, for L_prompt, whose negatives are the other samples of the
    part, and for the reward where samples have none. The values per sample are those of this process.
    """

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * value.detach() for share, value in zip(shares, values, strict=True)]).sum()

    count = torch.stack(list(cells))
    wrong = torch.stack([part.hard_fraction for part in parts]) * count
    total, wrong, count, *means = world.sum(
        [mean([part.total for part in parts]), wrong.sum(), count.sum()]
        + [mean([part.terms[name] for part in parts]) for name in TERM_NAMES]
        + [mean([part.weighted[name] for part in parts]) for name in TERM_NAMES]
    )
    return EFETerms(
        total=total,
        terms=dict(zip(TERM_NAMES, means[: len(TERM_NAMES)], strict=True)),
        weighted=dict(zip(TERM_NAMES, means[len(TERM_NAMES) :], strict=True)),
        per_sample_consistency=torch.cat([part.per_sample_consistency for part in parts]),
        per_sample_cross_entropy=torch.cat([part.per_sample_cross_entropy for part in parts]),
        hard_fraction=wrong / count.clamp_min(1),
    )


@dataclass
class _Cells:
    """What several terms share: beliefs, masks, and which cells are right."""

    log_q: Tensor  # [B, T, H, W, C]
    log_prob_target: Tensor  # [B, T, H, W]
    right: Tensor  # [B, T, H, W]
    mask: Tensor  # [B, H, W]
    valid: Tensor  # [B]

    @classmethod
    def of(cls, trajectory: Trajectory, answer: Answer) -> _Cells:
        logits, target, mask = as_batch(trajectory.forward, answer.target, answer.mask)
        log_q = log_belief(logits, mask)
        right = logits.detach().argmax(-1) == target[:, None]
        return cls(log_q, target_log_prob(log_q, target, mask), right, mask, mask.flatten(1).any(1))


class EFELoss(nn.Module):
    """Return the weighted sum of all terms of one batch, with the projections of L_prompt and a queue of past prompts.

    The queue is state: buffers, changed only by `remember`.
    In mode "full" the bidirectional and reverse terms are 0 where the trajectory has no backward plan.
    In mode "seed" the backward path is the flipped forward path (the term is 0 for a constant or palindromic one), the
    observation is the state (ambiguity is predictive entropy), the step term is the constant 1, C is the preference
    head and learns, L_prompt is a cosine, the reward has no surrogate, steps are summed, supervision is on the last
    step only, and there is no halting and no reverse term.
    """

    prompt_queue: Tensor
    queue_slot: Tensor
    queue_seen: Tensor

    def __init__(self, config: LossConfig, feature_dim: int, prompt_dim: int, num_colors: int = 10):
        super().__init__()
        self.config = config
        width = num_colors if config.mode == "seed" else PROMPT_PROJECTION
        self.prompt_projection = nn.Linear(prompt_dim, width, bias=False)
        self.feature_projection = nn.Identity() if config.mode == "seed" else nn.Linear(feature_dim, width, bias=False)
        self.register_buffer("prompt_queue", torch.zeros(PROMPT_QUEUE, prompt_dim))
        self.register_buffer("queue_slot", torch.zeros(PROMPT_QUEUE, dtype=torch.long))
        self.register_buffer("queue_seen", torch.zeros((), dtype=torch.long))

    def forward(self, trajectory: Trajectory, query: Query, answer: Answer, *, preference: Tensor, desirability: Tensor,
                prompt: Tensor, reward: Tensor | None, progress: float, share: Share = WHOLE) -> EFETerms:
        """Return the terms, their weighted sum and the per-sample values of one batch, or of a share of it.

        Shapes:  preference (log C) and desirability (log z-hat, 0 neutral) [B, H, W, C], prompt [B, Dp],
                 reward [B] (None: 0; samples with nan are left out of its term)
        progress: epochs done, fractional
        share: its terms are those that, weighted and added up over all shares, are the terms of the batch; the
                 negatives of L_prompt are all other samples of the batch
        Raises:  ValueError when the target holds fractions or does not lie on the canvas of the forward logits
        """
        with torch.autocast(trajectory.forward.device.type, enabled=False):
            weights = term_weights(self.config, progress)
            cells = _Cells.of(trajectory, answer)
            compute = self._seed_terms if self.config.mode == "seed" else self._full_terms
            evaluate = compute(cells, trajectory, preference, prompt, query.task_slot, share)
            evaluate |= self._common_terms(cells, trajectory, query, answer, preference, desirability)
            per_sample = self._consistency(cells)
            evaluate["consistency"] = lambda: batch_mean(per_sample, cells.valid)
            evaluate["reward"] = lambda: self._reward(cells, reward, share)
            zero = cells.log_q.new_zeros(())
            terms = {name: evaluate[name]() if weights[name] > 0 else zero for name in TERM_NAMES}
            weighted = {name: weights[name] * terms[name] for name in TERM_NAMES}
            total = torch.stack([weighted[name].to(zero.dtype) for name in TERM_NAMES]).sum()
            wrong = (~cells.right[:, -1] & cells.mask).sum()
            return EFETerms(
                total=total,
                terms={name: value.detach() for name, value in terms.items()},
                weighted={name: value.detach() for name, value in weighted.items()},
                per_sample_consistency=per_sample.detach(),
                per_sample_cross_entropy=cell_mean(-cells.log_prob_target[:, -1].detach(), cells.mask),
                hard_fraction=wrong / cells.mask.sum().clamp_min(1),
            )

    @torch.no_grad()
    def remember(self, prompt: Tensor, task_slot: Tensor) -> None:
        """Put a batch's prompts [B, Dp] and slots [B] into the queue, over the oldest; call after a successful step."""
        prompt, task_slot = prompt[-PROMPT_QUEUE:], task_slot[-PROMPT_QUEUE:]
        position = (self.queue_seen + torch.arange(len(prompt), device=prompt.device)) % PROMPT_QUEUE
        # New tensors, not writes into the old ones: a graph that is still to be run backward may hold those.
        self.prompt_queue = self.prompt_queue.index_copy(0, position, prompt.to(self.prompt_queue.dtype))
        self.queue_slot = self.queue_slot.index_copy(0, position, task_slot)
        self.queue_seen = self.queue_seen + len(prompt)

    def _consistency(self, cells: _Cells) -> Tensor:
        rho = 0.0 if self.config.mode == "seed" else self.config.deep_supervision
        weight = hard_weights(cells.right[:, -1], cells.mask, self.config.hard_epsilon)
        steps = step_weights(cells.log_q.shape[1], rho, cells.log_q)
        return consistency(cells.log_prob_target, cells.mask, weight, steps)

    def _reward(self, cells: _Cells, reward: Tensor | None, share: Share) -> Tensor:
        surrogate = expected_accuracy(cells.log_prob_target[:, -1], cells.mask)
        if self.config.mode == "seed":
            surrogate = torch.zeros_like(surrogate)
        reward = torch.zeros_like(surrogate) if reward is None else reward.to(surrogate.dtype)
        return batch_mean(reward_term(surrogate, reward), cells.valid & reward.isfinite(), share)

    def _common_terms(self, cells: _Cells, trajectory: Trajectory, query: Query, answer: Answer, preference: Tensor,
                      desirability: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Return what computes the terms that both modes define alike."""
        mask, valid, floor = cells.mask, cells.valid, self.config.preference_floor
        sized = valid & (answer.target_size > 0).all(1)

        def halt() -> Tensor:
            size = torch.stack([trajectory.row_logits.argmax(-1), trajectory.col_logits.argmax(-1)], 1) + 1
            solved = halt_target(cells.right, mask, (size == answer.target_size).all(1))
            return batch_mean(halt_loss(_rows(trajectory.halt_logits, valid), solved), valid)

        def reverse() -> Tensor:
            if trajectory.backward is None:
                return cells.log_q.new_zeros(())
            rows, cols = query.input.shape[1:]
            in_mask = query.input >= 0
            start = trajectory.backward[:, 0, :rows, :cols]
            return batch_mean(reverse_loss(start, query.input.long(), in_mask), valid & in_mask.flatten(1).any(1))

        def size() -> Tensor:
            rows, cols = _rows(trajectory.row_logits, sized), _rows(trajectory.col_logits, sized)
            return batch_mean(size_loss(rows, cols, answer.target_size), sized)

        def z_learning() -> Tensor:
            return batch_mean(z_anchor(trajectory.preference_logits, preference, desirability, mask, floor), valid)

        return {"halt": halt, "reverse": reverse, "size": size, "z_learning": z_learning}

    def _full_terms(self, cells: _Cells, trajectory: Trajectory, preference: Tensor, prompt: Tensor,
                    task_slot: Tensor, share: Share) -> dict[str, Callable[[], Tensor]]:
        """Return what computes the terms of mode "full"."""
        mask, valid = cells.mask, cells.valid
        height, width = mask.shape[1:]

        def state_ambiguity() -> Tensor:
            log_likelihood = torch.log_softmax(full_precision(trajectory.likelihood_logits), -1)
            return batch_mean(ambiguity(log_belief(trajectory.state_logits, mask), log_likelihood, mask), valid)

        def agreement() -> Tensor:
            if trajectory.backward is None:
                return cells.log_q.new_zeros(())
            # f_t stands at index t - 1, b_t at index t; the ends are anchored by the consistency and reverse terms.
            log_backward = log_belief(trajectory.backward[:, 1:, :height, :width], mask)
            return batch_mean(bidirectional(cells.log_q[:, :-1], log_backward, mask, detach=self.config.detach), valid)

        def contrast() -> Tensor:
            features = self.feature_projection(_rows(trajectory.features, valid).to(self.prompt_queue.dtype))
            projected = self.prompt_projection(_rows(prompt, valid).to(self.prompt_queue.dtype))
            features, projected, slot, counted = share.rows(features, projected, task_slot, valid)
            kept = torch.arange(PROMPT_QUEUE, device=task_slot.device) < self.queue_seen
            same = (slot[:, None] == self.queue_slot) & (slot[:, None] > 0)
            past = self.prompt_projection(self.prompt_queue)
            per_sample = prompt_consistency(features, projected, slot, counted, past, kept & ~same)
            return batch_mean(share.own(per_sample), share.own(counted))

        return {
            "risk": lambda: batch_mean(risk(cells.log_q, preference, mask, self.config.preference_floor), valid),
            "ambiguity": state_ambiguity,
            "step": lambda: batch_mean(step_cost(_rows(trajectory.halt_logits, valid)), valid),
            "bidirectional": agreement,
            "prompt": contrast,
        }

    def _seed_terms(self, cells: _Cells, trajectory: Trajectory, preference: Tensor, prompt: Tensor,
                    task_slot: Tensor, share: Share) -> dict[str, Callable[[], Tensor]]:
        """Return what computes the terms of mode "seed", which needs no `preference`, `task_slot` and `share`."""
        log_q, mask, valid = cells.log_q, cells.mask, cells.valid

        def learned_risk() -> Tensor:
            log_c = log_belief(trajectory.preference_logits, mask)
            return batch_mean(risk(log_q, log_c, mask, self.config.preference_floor, reduce="sum",
                                   learn_preference=True), valid)

        def symmetry() -> Tensor:
            # JS is symmetric: twice the first half is the sum over all steps, and the middle step meets itself.
            half = log_q.shape[1] // 2
            return 2 * batch_mean(bidirectional(log_q[:, :half], log_q.flip(1)[:, :half], mask, reduce="sum"), valid)

        def cosine() -> Tensor:
            pooled = (torch.where(mask[:, None, ..., None], log_q.exp(), 0.0).sum((1, 2, 3))
                      / (log_q.shape[1] * mask.sum((1, 2)).clamp_min(1))[:, None])
            projected = self.prompt_projection(_rows(prompt, valid).to(self.prompt_queue.dtype))
            return batch_mean(prompt_cosine(pooled, projected), valid)

        return {
            "risk": learned_risk,
            "ambiguity": lambda: batch_mean(ambiguity(log_q, None, mask, reduce="sum"), valid),
            "step": lambda: batch_mean(log_q.new_ones(len(valid)), valid),
            "bidirectional": symmetry,
            "prompt": cosine,
        }


def _rows(x: Tensor, valid: Tensor) -> Tensor:
    """Return x [B, D] in full precision with zeros in the rows that are not valid, so that nan there stays there."""
    return torch.where(valid[:, None], full_precision(x), 0.0)
