"""The agent that refines prompts: proposes moves, applies them, and learns from the rewards they earn.

Imports torch, config, distributed and human_rl_agent; used by arc_system. Two parameter sets with two estimators and no
overlap: the policy (its own Adam, score function) and the directions `basis` (the main optimizer, path gradient through
p').

Shapes: B batch, G samples per group, k directions, Dp prompt, Dc control, F features, D planner features,
S = Dp + Dc + F state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import PolicyConfig
from distributed import ALONE, WHOLE, Share, World
from human_rl_agent import HumanRLAugmentor, RunningRMS

if TYPE_CHECKING:
    from qwen_hybrid_prompt import Prompt

GRADIENT_CLIP = 1.0
VALUE_WEIGHT = 0.5
CURIOSITY_EPOCHS = 3.0


@dataclass(frozen=True)
class Proposal:
    """Moves proposed for a batch of prompts: state [B, S] and raw action (u, v) [G, B, k + 1], both without a graph."""

    state: Tensor
    action: Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """Terms of the policy's loss, scalars unless said: total = policy + 0.5 value - entropy_weight entropy + curiosity.

    policy: score-function surrogate; value: smooth L1 of V(s) and the mean reward; entropy: nats per action dimension;
    curiosity: loss of the curiosity module (0 without next states); advantage [G, B]: what multiplies the score;
    tied: share of the groups with several scorable rewards in which all are equal; bonus: mean curiosity bonus, in
    [0, 1]; averages: running averages as they will be after `update`.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    curiosity: Tensor
    advantage: Tensor
    tied: Tensor
    bonus: Tensor
    averages: dict[str, Tensor]


def joined_terms(parts: Sequence[PolicyTerms], shares: Sequence[float], world: World = ALONE) -> PolicyTerms:
    """Return the terms of a batch that was computed in parts, here and in other processes, without graphs.

    Means weighted by the parts' shares. Of several parts of one process each divided its advantages by the scale that
    it alone would give, and the averages move by each part's share; between processes they agree already. The
    advantages are those of this process.
    """

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * value.detach() for share, value in zip(shares, values, strict=True)]).sum(0)

    names = ("total", "policy", "value", "entropy", "curiosity", "tied", "bonus")
    means = world.sum([mean([getattr(part, name) for part in parts]) for name in names])
    averages = parts[0].averages
    if len(parts) > 1:
        averages = {name: mean([part.averages[name] for part in parts]) for name in averages}
    return PolicyTerms(
        **dict(zip(names, means, strict=True)),
        advantage=torch.cat([part.advantage.detach() for part in parts], 1),
        averages=averages,
    )


def leave_one_out_advantage(rewards: Tensor, value: Tensor) -> Tensor:
    """Return each reward minus the mean of its group's other rewards, [G, B].

    Shapes:  rewards [G, B], not finite = unscorable; value [B], the baseline where a reward stands alone in its group
    Unscorable entries get 0 and enter no baseline. A group of equal rewards gets exactly 0.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; no division by the group's deviation,
    which would amplify near-ties.
    """
    valid_GB = torch.isfinite(rewards)
    count_B = valid_GB.sum(0)
    mean_B = torch.where(valid_GB, rewards, 0.0).sum(0) / count_B.clamp(min=1)
    others_GB = (rewards - mean_B) * (count_B / (count_B - 1).clamp(min=1))
    advantage_GB = torch.where(count_B > 1, others_GB, rewards - value.detach())
    return torch.where(valid_GB & ~_tied_groups(rewards), advantage_GB, 0.0)


class PolicyRefinedAgent(nn.Module):
    """Policy, directions of movement, and the update from rewards."""

    def __init__(
        self, config: PolicyConfig, prompt_dim: int, control_dim: int, num_features: int = 32, feature_dim: int = 0
    ):
        super().__init__()
        self.config = config
        self.prompt_dim = prompt_dim
        self.feature_dim = feature_dim
        state_dim = prompt_dim + control_dim + num_features
        self.augmentor = HumanRLAugmentor(config, state_dim, feature_dim)
        self.basis = nn.Parameter(nn.init.orthogonal_(torch.empty(config.action_dim, prompt_dim)))
        self.advantage_scale = RunningRMS()

    @torch.no_grad()
    def propose(
        self,
        prompt: Prompt,
        features: Tensor,
        num_samples: int,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        shared: bool = False,
        share: Share = WHOLE,
    ) -> Proposal:
        """Return G moves for each of the prompts; deterministic: the mean move; shared: the same noise for all prompts.

        The prompts of a share of a batch get the moves that they have in the whole one.

        Shapes:  prompt.embedding [B, Dp], prompt.control [B, Dc], features [B, F], num_samples = G
        The prompt enters normalised and detached; its learned projection is the first layer of the policy.
        """
        with torch.autocast(prompt.embedding.device.type, enabled=False):
            embedding_BD = F.layer_norm(prompt.embedding.detach().float(), (self.prompt_dim,))
            state_BS = torch.cat([embedding_BD, prompt.control.detach().float(), features.detach().float()], dim=-1)
            place = None if share.is_whole else (share.start, share.total)
            action = self.augmentor.sample(state_BS, num_samples, generator, deterministic, shared, place)
            return Proposal(state_BS, action)

    def gate(self, proposal: Proposal) -> Tensor:
        """Return alpha = sigmoid(v) in [0, 1], [G, B]."""
        return proposal.action[..., -1].detach().sigmoid()

    def refine(self, embedding: Tensor, proposal: Proposal, member: int | None = None) -> Tensor:
        """Return p + alpha * scale * tanh(u) @ basis with unit rows, [B, Dp], or [G, B, Dp] for all members (None).

        The gradient reaches the prompt as the identity, and the basis; none reaches the policy, which learns from
        rewards. The move is at most scale * k long. Train the supervised loss on the mean move, which predictions use:
        under random moves the planner learns to ignore the prompt, and the basis to be harmless.
        """
        action = proposal.action if member is None else proposal.action[member]
        with torch.autocast(embedding.device.type, enabled=False):
            u, v = action.detach().float().split([self.config.action_dim, 1], dim=-1)
            step = v.sigmoid() * self.config.action_scale * u.tanh()
            move = step @ F.normalize(self.basis.float(), dim=-1)
        return embedding + move.to(embedding.dtype)

    @torch.no_grad()
    def next_state(self, proposal: Proposal, refined_embeddings: Tensor, feature_change: Tensor) -> Tensor:
        """Return s' = [s with p' in place of p; change of the planner's pooled features], [G, B, S + D], no graph.

        Shapes:  refined_embeddings [G, B, Dp], feature_change [G, B, D] (after - before)
        """
        embedding_GBD = F.layer_norm(refined_embeddings.detach().float(), (self.prompt_dim,))
        rest_GBS = proposal.state[:, self.prompt_dim :].expand(embedding_GBD.shape[0], -1, -1)
        return torch.cat([embedding_GBD, rest_GBS, feature_change.detach().float()], dim=-1)

    def curiosity_scale(self, progress: float) -> float:
        """Return the weight of the curiosity bonus after so many (fractional) epochs: falls to 0 over three.

        In a problem of a single step a bonus that depends on the action moves the optimum, so it has to vanish.
        """
        return self.config.curiosity_weight * max(0.0, 1.0 - progress / CURIOSITY_EPOCHS)

    def losses(
        self, proposal: Proposal, rewards: Tensor, curiosity_scale: float = 0.0, next_state: Tensor | None = None,
        share: Share = WHOLE,
    ) -> PolicyTerms:  # fmt: skip
        """Return the terms of the policy's loss.

        Shapes:  rewards [G, B], not finite = unscorable; next_state [G, B, S + D]
        The bonus, times curiosity_scale, enters the advantage only. Nothing in the module changes before `update`.
        Of a share of a batch the terms are those that, weighted and added up over all shares, are the batch's.
        """
        with torch.autocast(rewards.device.type, enabled=False):
            rewards_GB = rewards.detach().float()
            if not share.counts:
                rewards_GB = torch.full_like(rewards_GB, torch.nan)
            valid_GB = torch.isfinite(rewards_GB)
            value_B = self.augmentor.value(proposal.state)
            curiosity, bonus_GB, averages = self._curiosity(proposal, valid_GB, next_state, share)
            advantage_GB = leave_one_out_advantage(rewards_GB + curiosity_scale * bonus_GB, value_B)
            # Only informative entries set the scale: ties would shrink it and blow up what follows them.
            averages["advantage_scale"] = self.advantage_scale.advanced(advantage_GB, advantage_GB != 0, share.sum)
            advantage_GB = advantage_GB / (RunningRMS.root(averages["advantage_scale"]) + 1e-6)
            log_prob_GB = self.augmentor.log_prob(proposal.action, proposal.state)
            policy = -_masked_mean(advantage_GB * log_prob_GB, valid_GB, share)
            count_B = valid_GB.sum(0)
            mean_B = torch.where(valid_GB, rewards_GB, 0.0).sum(0) / count_B.clamp(min=1)
            value = _masked_mean(F.smooth_l1_loss(value_B, mean_B, reduction="none"), count_B > 0, share)
            entropy = self.augmentor.entropy()
            total = policy + VALUE_WEIGHT * value - self.config.entropy_weight * entropy + curiosity
            tied = _masked_mean(_tied_groups(rewards_GB).float(), count_B > 1, share)
            bonus = _masked_mean(bonus_GB, valid_GB, share)
        return PolicyTerms(total, policy, value, entropy, curiosity, advantage_GB, tied, bonus, averages)

    def _curiosity(
        self, proposal: Proposal, valid_GB: Tensor, next_state: Tensor | None, share: Share
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the curiosity loss (scalar), the bonus [G, B] and the advanced averages; zeros without next states."""
        zeros_GB = torch.zeros(valid_GB.shape, device=valid_GB.device)
        if next_state is None:
            return zeros_GB.sum(), zeros_GB, {}
        curiosity = self.augmentor.curiosity
        usable_GB = valid_GB & torch.isfinite(next_state).all(-1)
        next_state_GBS = torch.where(usable_GB[..., None], next_state.detach().float(), 0.0)
        inverse_GB, forward_GB = curiosity(proposal.state, next_state_GBS, proposal.action)
        averages = curiosity.surprise.advanced(forward_GB, usable_GB, share.sum)
        bonus_GB = torch.where(usable_GB, curiosity.bonus(forward_GB, averages), 0.0)
        loss = _masked_mean(curiosity.loss(inverse_GB, forward_GB), usable_GB, share)
        return loss, bonus_GB, {"surprise": averages}

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the policy's own optimizer; everything but `basis`."""
        return list(self.augmentor.parameters())

    def make_optimizer(self) -> torch.optim.Adam:
        """Return the policy's own optimizer."""
        ours = {id(parameter) for parameter in self.policy_parameters()}
        named = [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) in ours]
        return torch.optim.Adam(named, lr=self.config.rl_lr)

    def update(self, optimizer: torch.optim.Optimizer, terms: PolicyTerms) -> Tensor:
        """Return the gradient norm (scalar, before clipping) after one step of the policy on `terms`.

        Policy and curiosity are clipped apart, so that training the curiosity module does not slow the policy.
        When the norm is not finite nothing changes: no parameter, no optimizer state, no running average. Looking at it
        is the one place where the host waits for the device.
        """
        optimizer.zero_grad(set_to_none=True)
        self.backward(terms)
        return self.step(optimizer, terms.averages)

    def backward(self, terms: PolicyTerms, share: float = 1.0) -> None:
        """Add the gradients of the terms, of which the group has a share of this size; nothing else changes."""
        (terms.total if share == 1 else share * terms.total).backward()

    def step(self, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]) -> Tensor:
        """Return the gradient norm, as `update`, after one step on the gradients that are there; they are used up."""
        norm = self.clip()
        if torch.isfinite(norm):
            self.apply_clipped(optimizer, averages)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def clip(self) -> Tensor:
        """Return the gradient norm (scalar, before clipping) and clip the gradients, without waiting for the device."""
        curious = list(self.augmentor.curiosity.parameters())
        ours = {id(parameter) for parameter in curious}
        acting = [parameter for parameter in self.policy_parameters() if id(parameter) not in ours]
        norms = [nn.utils.clip_grad_norm_(group, GRADIENT_CLIP) for group in (acting, curious)]
        return torch.stack(norms).square().sum().sqrt()

    def apply_clipped(self, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]) -> None:
        """Take one step on clipped gradients of finite norm, and take over the running averages."""
        optimizer.step()
        self.augmentor.project_()
        self.advantage_scale.commit_(averages["advantage_scale"])
        if "surprise" in averages:
            self.augmentor.curiosity.surprise.commit_(averages["surprise"])


def _tied_groups(rewards_GB: Tensor) -> Tensor:
    """Return True for groups of at least two scorable rewards that are all equal, [B]."""
    valid_GB = torch.isfinite(rewards_GB)
    lowest_B = torch.where(valid_GB, rewards_GB, torch.inf).amin(0)
    highest_B = torch.where(valid_GB, rewards_GB, -torch.inf).amax(0)
    return (valid_GB.sum(0) > 1) & (lowest_B == highest_B)


def _masked_mean(values: Tensor, mask: Tensor, share: Share) -> Tensor:
    """Return the mean of the values where the mask is True, scalar; 0 when it nowhere is; of a share see `losses`."""
    return torch.where(mask, values, 0.0).sum() / share.divisor(mask.sum())
