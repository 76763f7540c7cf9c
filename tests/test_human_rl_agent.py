"""Densities against torch.distributions, the score against a closed form, and who gets gradient from what."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import distributions as D

from config import PolicyConfig
from human_rl_agent import LOG_STD_HIGH, LOG_STD_INIT, LOG_STD_LOW, Curiosity, HumanRLAugmentor, RunningRMS

STATE, CHANGE, K = 6, 3, 4


def make(seed: int = 0, trained: bool = True, k: int = K, **kw) -> HumanRLAugmentor:
    """Return an augmentor; trained: with heads off zero, so that means differ between states."""
    torch.manual_seed(seed)
    augmentor = HumanRLAugmentor(PolicyConfig(action_dim=k, **kw), STATE, CHANGE)
    if trained:
        with torch.no_grad():
            augmentor.mean_head.weight.normal_(0, 0.3)
            augmentor.mean_head.bias.normal_(0, 0.3)
            augmentor.log_std.normal_(-0.5, 0.3)
    return augmentor


def gradients(value: torch.Tensor, augmentor: HumanRLAugmentor) -> dict[str, torch.Tensor | None]:
    names, parameters = zip(*augmentor.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True), strict=True))


def moved(grads: dict, prefix: str) -> list[bool]:
    return [g is not None and bool(g.abs().sum() > 0) for name, g in grads.items() if name.startswith(prefix)]


def test_mean_action_is_exactly_a_no_op_before_training():
    augmentor = make(trained=False)
    action = augmentor.sample(torch.randn(5, STATE), 3, deterministic=True)
    assert action.shape == (3, 5, K + 1)
    assert torch.equal(action, torch.zeros_like(action))
    assert torch.equal(augmentor.log_std, torch.full((K + 1,), LOG_STD_INIT))
    assert torch.equal(augmentor.value(torch.randn(5, STATE)), torch.zeros(5))


def test_log_prob_equals_the_normal_distribution():
    augmentor, state, action = make(), torch.randn(5, STATE), torch.randn(3, 5, K + 1)
    mean, log_std, _ = augmentor(state)
    expected = D.Independent(D.Normal(mean, log_std.exp()), 1).log_prob(action)
    assert torch.allclose(augmentor.log_prob(action, state), expected, atol=1e-5)
    assert augmentor.entropy().item() * (K + 1) == pytest.approx(
        D.Normal(0, log_std.exp()).entropy().sum().item(), abs=1e-5
    )


def test_squashed_log_prob_equals_the_transformed_distribution():
    augmentor, state = make(action_scale=0.2), torch.randn(5, STATE)
    action = augmentor.sample(state, 7)
    mean, log_std, _ = augmentor(state)
    move = D.TransformedDistribution(
        D.Normal(mean[:, :K], log_std[:K].exp()),
        [D.transforms.TanhTransform(cache_size=1), D.transforms.AffineTransform(0.0, 0.2)],
    )
    gate = D.TransformedDistribution(D.Normal(mean[:, K], log_std[K].exp()), [D.transforms.SigmoidTransform()])
    expected = move.log_prob(0.2 * action[..., :K].tanh()).sum(-1) + gate.log_prob(action[..., K].sigmoid())
    assert torch.allclose(augmentor.squashed_log_prob(action, state), expected, atol=1e-3)


@pytest.mark.parametrize("extreme", [40.0, -40.0])
def test_squashed_log_prob_and_its_gradient_are_finite_at_saturation(extreme):
    augmentor = make()
    value = augmentor.squashed_log_prob(torch.full((2, 5, K + 1), extreme), torch.randn(5, STATE))
    assert torch.isfinite(value).all()
    grads = gradients(value.sum(), augmentor)
    assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)


def test_score_gradient_does_not_depend_on_the_jacobian():
    augmentor, state = make(), torch.randn(5, STATE)
    action, advantage = augmentor.sample(state, 3), torch.randn(3, 5)
    plain = gradients((advantage * augmentor.log_prob(action, state)).sum(), augmentor)
    squashed = gradients((advantage * augmentor.squashed_log_prob(action, state)).sum(), augmentor)
    assert all(moved(plain, "mean_head") + moved(plain, "log_std") + moved(plain, "trunk"))
    for name, grad in plain.items():
        if grad is not None:
            assert torch.allclose(grad, squashed[name], atol=1e-6), name


def test_log_prob_detaches_the_sample_by_itself():
    augmentor, state = make(), torch.zeros(1, STATE)
    mean, log_std, _ = augmentor(state)
    attached = mean + log_std.exp() * torch.randn(1, K + 1)
    ours = gradients(augmentor.log_prob(attached, state).sum(), augmentor)
    detached = gradients(augmentor.log_prob(attached.detach(), state).sum(), augmentor)
    assert torch.equal(ours["mean_head.bias"], detached["mean_head.bias"])
    assert ours["mean_head.bias"].abs().min() > 0
    # what goes wrong otherwise: no gradient for the mean, -1 for each log standard deviation
    wrong = gradients(D.Normal(mean, log_std.exp()).log_prob(attached).sum(), augmentor)
    assert torch.allclose(wrong["mean_head.bias"], torch.zeros(K + 1), atol=1e-6)
    assert torch.allclose(wrong["log_std"], -torch.ones(K + 1), atol=1e-6)


@pytest.mark.parametrize(("mean", "goal"), [(0.0, 0.5), (1.0, 0.25), (-0.5, -1.0)])
def test_score_function_estimate_matches_the_closed_form(mean, goal):
    """R = -(u - goal)^2, u ~ N(mean, sigma): dJ/dmean = -2 (mean - goal), dJ/dlog sigma = -2 sigma^2."""
    augmentor, samples = make(trained=False, k=1), 100_000
    with torch.no_grad():
        augmentor.mean_head.bias[0] = mean
    state, generator = torch.zeros(1, STATE), torch.Generator().manual_seed(3)
    action = augmentor.sample(state, samples, generator)
    reward = -(action[..., 0] - goal).square()
    advantage = reward - reward.mean()
    grads = gradients((advantage * augmentor.log_prob(action, state)).mean(), augmentor)
    sigma = math.exp(LOG_STD_INIT)
    standard = (action[:, 0, 0] - mean) / sigma
    errors = [
        (advantage[:, 0] * score).std() / math.sqrt(samples) for score in (standard / sigma, standard.square() - 1)
    ]
    estimates = (grads["mean_head.bias"][0], grads["log_std"][0])
    for estimate, truth, error in zip(estimates, (-2 * (mean - goal), -2 * sigma**2), errors, strict=True):
        assert abs(float(estimate) - truth) < 4 * float(error)
        assert math.copysign(1, float(estimate)) == math.copysign(1, truth)


def test_samples_follow_the_generator_and_carry_no_graph():
    augmentor, state = make(), torch.randn(5, STATE)
    first, second, third = (augmentor.sample(state, 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert not first.requires_grad
    mean, log_std, _ = augmentor(state)
    many = augmentor.sample(state, 20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(many.mean(0), mean, atol=0.05)
    assert torch.allclose(many.std(0), log_std.exp().expand_as(mean), atol=0.03)
    assert torch.equal(augmentor.sample(state, 2, deterministic=True)[1], mean)
    shared = augmentor.sample(state, 4, torch.Generator().manual_seed(1), shared=True)
    alone = augmentor.sample(state[3:4], 4, torch.Generator().manual_seed(1), shared=True)
    assert torch.allclose(shared[:, 3:4], alone, atol=1e-6)


def test_log_std_stays_in_range_and_comes_back_from_its_edge():
    augmentor = make(trained=False)
    with torch.no_grad():
        augmentor.log_std.copy_(torch.linspace(-9, 3, K + 1))
    assert augmentor(torch.zeros(1, STATE))[1].min() == LOG_STD_LOW
    kept = augmentor.log_std.detach().clamp(LOG_STD_LOW, LOG_STD_HIGH)
    torch.testing.assert_close(augmentor.entropy(), D.Normal(0.0, kept.exp()).entropy().mean())
    augmentor.project_()
    assert augmentor.log_std.min() == LOG_STD_LOW and augmentor.log_std.max() == LOG_STD_HIGH
    grad = gradients(augmentor.entropy(), augmentor)["log_std"]
    assert (grad > 0).all()


def test_value_gradient_reaches_the_value_net_only_and_nothing_reaches_the_state():
    augmentor = make()
    torch.nn.init.normal_(augmentor.value_net[-1].weight)
    state = torch.randn(5, STATE, requires_grad=True)
    grads = gradients(augmentor.value(state).sum(), augmentor)
    assert all(moved(grads, "value_net"))
    assert all(g is None for name, g in grads.items() if not name.startswith("value_net"))
    augmentor.log_prob(torch.randn(2, 5, K + 1), state).sum().backward()
    assert state.grad is None


def test_curiosity_features_learn_from_the_inverse_model_alone():
    torch.manual_seed(0)
    curiosity = Curiosity(STATE, CHANGE, K + 1)
    state, action = torch.randn(5, STATE, requires_grad=True), torch.randn(3, 5, K + 1)
    next_state = torch.randn(3, 5, STATE + CHANGE, requires_grad=True)
    inverse, forward = curiosity(state, next_state, action)
    assert inverse.shape == forward.shape == (3, 5)
    parameters = dict(curiosity.named_parameters())

    def reached(value):
        grads = torch.autograd.grad(value.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
        return {name.split(".")[0] for name, g in zip(parameters, grads, strict=True) if g is not None}

    assert reached(inverse) == {"phi", "inverse"}
    assert reached(forward) == {"forecast"}
    assert torch.allclose(curiosity.loss(inverse, forward), 0.8 * inverse + 0.2 * forward)
    curiosity.loss(inverse, forward).sum().backward()
    assert state.grad is None and next_state.grad is None
    bonus = curiosity.bonus(forward, curiosity.surprise.advanced(forward, torch.ones(3, 5, dtype=torch.bool)))
    assert not bonus.requires_grad
    assert bonus.min() >= 0 and bonus.max() <= 1
    assert torch.allclose(bonus, (forward / forward.square().mean().sqrt()).clamp(max=1).detach(), atol=1e-5)


def test_curiosity_errors_are_those_of_the_inverse_and_of_the_forward_model():
    torch.manual_seed(1)
    curiosity = Curiosity(STATE, CHANGE, K + 1)
    state, action, after = torch.randn(5, STATE), torch.randn(3, 5, K + 1), torch.randn(3, 5, STATE + CHANGE)
    action.requires_grad_()
    inverse, forward = curiosity(state, after, action)
    for g, b in np.ndindex(3, 5):
        now, then = curiosity.phi(torch.cat([state[b], torch.zeros(CHANGE)])), curiosity.phi(after[g, b])
        guess = curiosity.inverse(torch.cat([now, then]))
        torch.testing.assert_close(inverse[g, b], ((guess - action[g, b]) ** 2).sum() / (K + 1))
        foreseen = curiosity.forecast(torch.cat([now, action[g, b]]))
        torch.testing.assert_close(forward[g, b], ((foreseen - then) ** 2).sum() / 2)
    curiosity.loss(inverse, forward).sum().backward()
    assert action.grad is None


def test_curiosity_learns_to_foresee_and_to_tell_actions_apart():
    torch.manual_seed(0)
    curiosity, mixing = Curiosity(STATE, CHANGE, K + 1), torch.randn(K + 1, CHANGE)
    optimizer, errors = torch.optim.Adam(curiosity.parameters(), lr=3e-3), []
    for _ in range(150):
        state, action = torch.randn(16, STATE), torch.randn(4, 16, K + 1)
        next_state = torch.cat([state.expand(4, -1, -1), (action @ mixing).tanh()], dim=-1)
        inverse, forward = curiosity(state, next_state, action)
        optimizer.zero_grad()
        curiosity.loss(inverse, forward).mean().backward()
        optimizer.step()
        errors.append((inverse.mean().item(), forward.mean().item()))
    early, late = np.mean(errors[:10], 0), np.mean(errors[-10:], 0)
    assert late[0] < 0.8 * early[0]
    assert late[1] < 0.8 * early[1]


def test_running_rms_equals_the_weighted_average_and_survives_a_restart():
    running, rng, history = RunningRMS(0.9), np.random.default_rng(0), []
    for _ in range(30):
        values, mask = torch.tensor(rng.normal(2, 3, (4, 5))), torch.tensor(rng.random((4, 5)) < 0.7)
        history.append(values[mask].numpy())
        running.commit_(running.advanced(torch.where(mask, values, torch.nan), mask))
    weights = 0.9 ** np.arange(29, -1, -1)
    weights /= weights.sum()
    square = sum(w * (h**2).mean() for w, h in zip(weights, history, strict=True))
    assert float(running.root(running.averages)) == pytest.approx(math.sqrt(square), rel=1e-4)
    before = running.averages.clone()
    assert torch.equal(running.advanced(torch.ones(3), torch.zeros(3, dtype=torch.bool)), before)
    running.advanced(torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert torch.equal(running.averages, before)
    buffer = io.BytesIO()
    torch.save(running.state_dict(), buffer)
    buffer.seek(0)
    restored = RunningRMS(0.9)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(restored.averages, before)
