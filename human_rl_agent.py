"""The policy that proposes moves of the prompt, its value estimate, and the curiosity module that watches them.

Imports torch and config only. Used by policy_refined, which builds the state, applies the moves and turns rewards
into a loss. Every tensor that enters is a constant: nothing here sends a gradient into the prompt or the planner.

Shapes: B batch, G samples per group, k directions, S state, D planner features, A = k + 1 action.
An action is the raw sample (u_1..u_k, v); the move is scale * tanh(u), the gate sigmoid(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import PolicyConfig

LOG_STD_LOW, LOG_STD_HIGH, LOG_STD_INIT = -5.0, 0.5, -0.5
HIDDEN = 64
CURIOSITY_DIM = 32


class RunningRMS(nn.Module):
    """Root mean square of a stream by exponential averages, bias-corrected; a buffer, so that it survives a restart.

    `advanced` returns what the averages would become and changes nothing; `commit_` takes that over. A step that is
    skipped for non-finite gradients thus leaves no trace.
    """

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))  # of x^2 and of 1

    def advanced(
        self, values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> Tensor:
        """Return the averages [2] after seeing the values where the mask is True; unchanged when it nowhere is.

        `total` adds up what other processes have seen of the same batch.
        """
        kept = torch.where(mask, values.detach().float(), 0.0)
        squares, count = total(torch.stack([kept.square().sum(), mask.sum()]))
        square = squares / count.clamp(min=1)
        seen = torch.stack([square, torch.ones_like(square)])
        return torch.where(count > 0, self.decay * self.averages + (1 - self.decay) * seen, self.averages)

    @staticmethod
    def root(averages: Tensor) -> Tensor:
        """Return the root mean square, scalar, that the averages [2] stand for; 0 before the first value."""
        return (averages[0] / averages[1].clamp(min=1e-12)).sqrt()

    @torch.no_grad()
    def commit_(self, averages: Tensor) -> None:
        """Take over averages that `advanced` returned."""
        self.averages.copy_(averages)


class Curiosity(nn.Module):
    """Intrinsic curiosity: how badly the effect of an action on learned features is foreseen.

    The features phi are trained by the inverse model alone (which action led from s to s'); the forward model sees them
    detached, since otherwise a constant phi would be a perfect forecast.
    Source: Pathak et al. 2017, arXiv 1705.05363
    """

    def __init__(self, state_dim: int, change_dim: int, action_dim: int, beta: float = 0.2):
        super().__init__()
        self.beta = beta
        self.change_dim = change_dim
        self.phi = _mlp(state_dim + change_dim, CURIOSITY_DIM)
        self.inverse = _mlp(2 * CURIOSITY_DIM, action_dim)
        self.forecast = _mlp(CURIOSITY_DIM + action_dim, CURIOSITY_DIM)
        self.surprise = RunningRMS()

    def forward(self, state: Tensor, next_state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of the inverse and of the forward model, both [G, B].

        Shapes:  state [B, S], next_state [G, B, S + D], action [G, B, k + 1]
        The state is completed by D zeros: nothing has changed yet.
        """
        state, next_state, action = state.detach(), next_state.detach(), action.detach()
        phi_BF = self.phi(F.pad(state, (0, self.change_dim)))
        phi_GBF = phi_BF.expand(next_state.shape[0], -1, -1)
        next_phi_GBF = self.phi(next_state)
        guess_GBA = self.inverse(torch.cat([phi_GBF, next_phi_GBF], dim=-1))
        inverse_GB = (guess_GBA - action).square().mean(-1)
        forecast_GBF = self.forecast(torch.cat([phi_GBF.detach(), action], dim=-1))
        forward_GB = 0.5 * (forecast_GBF - next_phi_GBF.detach()).square().sum(-1)
        return inverse_GB, forward_GB

    def loss(self, inverse_error: Tensor, forward_error: Tensor) -> Tensor:
        """Return (1 - beta) * inverse error + beta * forward error, elementwise."""
        return (1 - self.beta) * inverse_error + self.beta * forward_error

    def bonus(self, forward_error: Tensor, averages: Tensor) -> Tensor:
        """Return the surprise divided by its running root mean square, clipped to [0, 1] and detached, [G, B].

        Divided by the standard deviation about the mean, as is usual, 88 to 99 % of the values are clipped in the first
        20 updates and the bonus tells no two actions apart; here it is 10 to 16 %.
        """
        return (forward_error.detach() / self.surprise.root(averages).clamp(min=1e-8)).clamp(0.0, 1.0)


class HumanRLAugmentor(nn.Module):
    """Gaussian policy over raw actions (u, v), value estimate and curiosity.

    The last layer of the mean starts at zero, so that the mean action is exactly a no-op: tanh(0) = 0 along every
    direction. The value estimate has its own network, so that its loss moves nothing else.
    """

    def __init__(self, config: PolicyConfig, state_dim: int, change_dim: int = 0):
        super().__init__()
        self.action_scale = config.action_scale
        self.action_dim = config.action_dim + 1
        self.trunk = nn.Sequential(nn.Linear(state_dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.mean_head = _zero(nn.Linear(HIDDEN, self.action_dim))
        self.log_std = nn.Parameter(torch.full((self.action_dim,), LOG_STD_INIT))
        self.value_net = _mlp(state_dim, 1)
        _zero(self.value_net[-1])
        self.curiosity = Curiosity(state_dim, change_dim, self.action_dim)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy at the states [B, S]: mean [B, k + 1], log standard deviation [k + 1], value [B]."""
        state = state.detach().float()
        mean_BA = self.mean_head(self.trunk(state))
        log_std_A = self.log_std.clamp(LOG_STD_LOW, LOG_STD_HIGH)
        return mean_BA, log_std_A, self.value(state)

    def value(self, state: Tensor) -> Tensor:
        """Return the expected reward at the states [B, S], [B]."""
        return self.value_net(state.detach().float()).squeeze(-1)

    @torch.no_grad()
    def sample(
        self,
        state: Tensor,
        num_samples: int,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        shared: bool = False,
        place: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return raw actions [G, B, k + 1] without a graph; deterministic: G copies of the mean.

        shared: every state gets the same noise, so that a row's actions do not depend on the batch it is in.
        place: (first row, rows) of a larger batch that the states are part of; each gets the noise that it has there.
        """
        mean_BA, log_std_A, _ = self(state)
        mean_GBA = mean_BA.expand(num_samples, -1, -1)
        if deterministic:
            return mean_GBA.clone()
        device = state.device if generator is None else generator.device
        first, rows = place or (0, mean_BA.shape[0])
        shape = (num_samples, 1 if shared else rows, mean_BA.shape[1])
        noise_GBA = torch.randn(shape, generator=generator, device=device).to(mean_BA.device)
        if not shared:
            noise_GBA = noise_GBA[:, first : first + mean_BA.shape[0]]
        return mean_GBA + log_std_A.exp() * noise_GBA

    def log_prob(self, action: Tensor, state: Tensor) -> Tensor:
        """Return the log density of raw actions, [..., B, k + 1] at states [B, S] -> [..., B], nats.

        The action is detached here: with the graph of a reparameterised sample the gradient for the mean would vanish.
        The squashing is left out, since its Jacobian does not depend on the parameters and drops out of the score.
        """
        mean_BA, log_std_A, _ = self(state)
        standard = (action.detach().float() - mean_BA) * torch.exp(-log_std_A)
        return (-0.5 * standard.square() - log_std_A - 0.5 * math.log(2 * math.pi)).sum(-1)

    def squashed_log_prob(self, action: Tensor, state: Tensor) -> Tensor:
        """Return the log density of (scale * tanh(u), sigmoid(v)) given the raw action, [..., B], nats.

        Finite for any u, v, since the moves themselves are never inverted.
        Source: Haarnoja et al. 2018, arXiv 1812.05905, appendix C
        """
        u, v = action.detach().float().split([self.action_dim - 1, 1], dim=-1)
        log_tanh_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_gate_slope = F.logsigmoid(v) + F.logsigmoid(-v)
        jacobian = (log_tanh_slope + math.log(self.action_scale)).sum(-1) + log_gate_slope.sum(-1)
        return self.log_prob(action, state) - jacobian

    def entropy(self) -> Tensor:
        """Return the entropy of the unsquashed Gaussian per dimension, scalar, nats; the same in every state."""
        log_std_A = self.log_std.clamp(LOG_STD_LOW, LOG_STD_HIGH)
        return log_std_A.mean() + 0.5 * math.log(2 * math.pi * math.e)

    @torch.no_grad()
    def project_(self) -> None:
        """Move the log standard deviation back into its range, since outside the clamp would stop its gradient."""
        self.log_std.clamp_(LOG_STD_LOW, LOG_STD_HIGH)


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Return a network with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def _zero(layer: nn.Linear) -> nn.Linear:
    """Return the layer with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
