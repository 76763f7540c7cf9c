"""Tests of loss_function: closed forms, float64 references, invariances, gradient reach, schedules."""

from __future__ import annotations

import dataclasses
import io
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import loss_function as lf
from config import LossConfig
from loss_function import TERM_NAMES, EFELoss

PAD = -100
C = 10
CELL_FIELDS = ("forward", "backward", "state_logits", "preference_logits")
LEAVES = ("forward", "backward", "state_logits", "likelihood_logits", "preference_logits", "halt_logits", "row_logits",
          "col_logits", "features", "prompt", "preference", "desirability", "reward")
WARM = 10.0  # epochs after which every schedule has ended
LAMBDAS = {"risk": "lambda_risk", "ambiguity": "lambda_ambiguity", "step": "lambda_step",
           "consistency": "lambda_consistency", "bidirectional": "lambda_bidirectional", "z_learning": "lambda_z",
           "prompt": "lambda_prompt", "reward": "lambda_reward", "halt": "lambda_halt", "reverse": "lambda_reverse"}


def make_batch(seed=0, batch=3, steps=4, side=4, in_side=5, codes=6, sizes=None, in_sizes=None):
    """Return a random batch as one namespace of leaves and integer tensors."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    frame = max(side, in_side)
    sizes = sizes or [(side, side), (side - 1, side), (1, 2)][:batch]
    in_sizes = in_sizes or [(in_side, in_side), (2, 3), (in_side, 1)][:batch]

    def grid(canvas, shapes):
        out = torch.full((len(shapes), canvas, canvas), PAD)
        for row, (h, w) in zip(out, shapes, strict=True):
            row[:h, :w] = torch.randint(0, C, (h, w), generator=g)
        return out

    b = SimpleNamespace(
        forward=rand(batch, steps, side, side, C), backward=rand(batch, steps, frame, frame, C),
        state_logits=rand(batch, steps, side, side, codes), likelihood_logits=rand(codes, C),
        preference_logits=rand(batch, side, side, C), halt_logits=rand(batch, steps), row_logits=rand(batch, 30),
        col_logits=rand(batch, 30), features=rand(batch, 8), prompt=rand(batch, 12),
        preference=torch.log_softmax(rand(batch, side, side, C), -1), desirability=0.3 * rand(batch, side, side, C),
        reward=0.5 * rand(batch).tanh(), target=grid(side, sizes), input=grid(in_side, in_sizes),
        target_size=torch.tensor(sizes), task_slot=torch.arange(1, batch + 1))
    return b


def leaves(b):
    """Return the batch with fresh leaves that require a gradient."""
    new = SimpleNamespace(**vars(b))
    for name in LEAVES:
        if getattr(b, name) is not None:
            setattr(new, name, getattr(b, name).detach().clone().requires_grad_())
    return new


def run(loss, b, progress=WARM):
    trajectory = SimpleNamespace(mask=b.target >= 0, **{name: getattr(b, name) for name in LEAVES[:9]})
    query = SimpleNamespace(input=b.input, task_slot=b.task_slot)
    answer = SimpleNamespace(target=b.target, mask=b.target != PAD, target_size=b.target_size)
    return loss(trajectory, query, answer, preference=b.preference, desirability=b.desirability, prompt=b.prompt,
                reward=b.reward, progress=progress)


def make_loss(seed=0, **settings_):
    torch.manual_seed(seed)
    return EFELoss(LossConfig(**settings_), feature_dim=8, prompt_dim=12)


def only(term):
    """Return settings in which one lambda is 1 and all others are 0 (the size term keeps its schedule)."""
    return {flag: float(name == term) for name, flag in LAMBDAS.items()}


def numpy_log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def brute_force(cell_value, mask, steps):
    """Return the mean over steps of the mean over valid cells of cell_value(i, t, h, w), one number per sample."""
    out = []
    for i in range(len(mask)):
        cells = np.argwhere(mask[i])
        per_step = [np.mean([cell_value(i, t, h, w) for h, w in cells]) if len(cells) else 0.0 for t in range(steps)]
        out.append(np.mean(per_step))
    return np.array(out)


def peaked(colors, height=8.0):
    return height * F.one_hot(colors, C).float()


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum()


def js(log_p, log_q):
    log_m = np.log((np.exp(log_p) + np.exp(log_q)) / 2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def numpy_sample(b, config, i):
    """Return the terms of one sample, but L_prompt, cell by cell in float64 from the definitions; {} without a cell."""
    y, grid, steps, is_seed = b.target[i].numpy(), b.input[i].numpy(), b.forward.shape[1], config.mode == "seed"
    cells, halt = np.argwhere(y >= 0), b.halt_logits[i].detach().double().numpy()
    if not len(cells):
        return {}
    f, back, states, head = (numpy_log_softmax(getattr(b, name)[i].detach().double()) for name in CELL_FIELDS)
    codes = numpy_log_softmax(b.likelihood_logits.detach().double())
    log_c, log_z = (getattr(b, name)[i].detach().double().numpy() for name in ("preference", "desirability"))

    def floored(log_p):
        return np.log(0.95 * np.exp(log_p) + 0.05 / C)

    def mean(value):
        return np.mean([value(h, w) for h, w in cells])

    def over_time(value, times=range(steps)):
        total = sum(mean(partial(value, t)) for t in times)
        return total if is_seed else total / max(len(times), 1)

    right = np.array([[f[t, h, w].argmax() == y[h, w] for h, w in cells] for t in range(steps)])
    cross_entropy = np.array([[-f[t, h, w, y[h, w]] for h, w in cells] for t in range(steps)])
    weighted = np.average(cross_entropy, axis=1, weights=np.where(right[-1], LossConfig().hard_epsilon, 1.0))
    supervision = np.arange(1, steps + 1) / sum(range(1, steps + 1))
    stop = 1 / (1 + np.exp(-halt))
    reached = np.cumprod(np.append(1, 1 - stop[:-1]))
    sides = [(numpy_log_softmax(x[i].detach().double()), int(n))
             for x, n in zip((b.row_logits, b.col_logits), b.target_size[i], strict=True)]  # fmt: skip
    misses = [((np.exp(side).cumsum() - (np.arange(1, 31) >= n)) ** 2).sum() for side, n in sides]
    solved = right.all(1) & all(side.argmax() + 1 == n for side, n in sides)
    entropy = -(np.exp(codes) * codes).sum(-1)
    start = [-back[0, h, w, grid[h, w]] for h, w in np.argwhere(grid >= 0)]
    return {
        "risk": over_time(lambda t, h, w: kl(f[t, h, w], floored(head[h, w] if is_seed else log_c[h, w]))),
        "ambiguity": over_time(lambda *at: -(np.exp(f[at]) * f[at]).sum() if is_seed else np.exp(states[at]) @ entropy),
        "step": 1.0 if is_seed else reached.mean(),
        "consistency": weighted[-1] if is_seed else 0.5 * weighted[-1] + 0.5 * supervision @ weighted,
        "bidirectional": over_time(lambda t, h, w: js(f[t, h, w], f[steps - 1 - t, h, w])) if is_seed
        else over_time(lambda t, h, w: js(f[t - 1, h, w], back[t, h, w]), range(1, steps)),
        "z_learning": mean(lambda h, w: kl(head[h, w], floored(numpy_log_softmax(log_c[h, w] + log_z[h, w])))),
        "reward": -b.reward[i].item(),
        "halt": 0.0 if is_seed else -(np.log(np.where(solved, stop, 1 - stop))).sum(),
        "reverse": 0.0 if is_seed else np.mean(start),
        "size": np.mean([-side[n - 1] + 0.05 * miss for (side, n), miss in zip(sides, misses, strict=True)]),
    }  # fmt: skip


def numpy_prompt_term(b, loss, valid):
    """Return L_prompt with an empty queue: InfoNCE, samples of one task being positives, or the cosine of mode seed."""
    prompt = b.prompt.detach().double()[valid] @ loss.prompt_projection.weight.detach().double().T
    if loss.config.mode == "seed":
        belief = torch.softmax(b.forward.detach().double(), -1)
        pooled = torch.stack([belief[i][:, b.target[i] >= 0].mean((0, 1)) for i in valid])
        return (1 - F.cosine_similarity(pooled, prompt)).mean().item()
    features = b.features.detach().double()[valid] @ loss.feature_projection.weight.detach().double().T
    similarity = (F.normalize(features, dim=-1) @ F.normalize(prompt, dim=-1).T / 0.1).exp()
    slots = b.task_slot[valid]
    same = (slots[:, None] == slots) & (slots > 0) | torch.eye(len(valid), dtype=torch.bool)
    shares = [(torch.where(same, x, 0).sum(1) / x.sum(1)).log() for x in (similarity, similarity.T)]
    return (-sum(shares) / 2).mean().item()


def numpy_terms(b, loss):
    """Return the batch mean of every term in float64; 0 where no sample has a cell."""
    samples = [numpy_sample(b, loss.config, i) for i in range(len(b.target))]
    valid = [i for i, sample in enumerate(samples) if sample]
    if not valid:
        return dict.fromkeys(TERM_NAMES, 0.0)
    terms = {name: np.mean([samples[i][name] for i in valid]) for name in samples[valid[0]]}
    return terms | {"prompt": numpy_prompt_term(b, loss, valid)}


# 1. Terms against references ----------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_risk_js_entropy_and_cross_entropy_equal_float64_numpy(batch, steps, height, width, seed):
    g = torch.Generator().manual_seed(seed)
    f, b = (3 * torch.randn(batch, steps, height, width, C, generator=g) for _ in range(2))
    log_c = torch.log_softmax(3 * torch.randn(batch, height, width, C, generator=g), -1)
    y = torch.randint(0, C, (batch, height, width), generator=g)
    mask = torch.rand(batch, height, width, generator=g) < 0.7
    p, q, c, m = numpy_log_softmax(f), numpy_log_softmax(b), log_c.double().numpy(), mask.numpy()
    floor = np.log(0.95 * np.exp(c) + 0.05 / C)

    def js(*at):
        mid = (np.exp(p[at]) + np.exp(q[at])) / 2
        return 0.5 * (np.exp(p[at]) * (p[at] - np.log(mid)) + np.exp(q[at]) * (q[at] - np.log(mid))).sum()

    lp, lq = lf.log_belief(f, mask), lf.log_belief(b, mask)
    uniform_steps = torch.full((steps,), 1 / steps)
    for ours, reference in (
        (lf.risk(lp, log_c, mask), lambda i, t, h, w: (np.exp(p[i, t, h, w]) * (p[i, t, h, w] - floor[i, h, w])).sum()),
        (lf.bidirectional(lp, lq, mask), js),
        (lf.ambiguity(lp, None, mask), lambda *at: -(np.exp(p[at]) * p[at]).sum()),
        (lf.consistency(lf.target_log_prob(lp, y, mask), mask, None, uniform_steps),
         lambda i, t, h, w: -p[i, t, h, w, y[i, h, w]]),
    ):
        np.testing.assert_allclose(ours.numpy(), brute_force(reference, m, steps), atol=1e-5)


def test_consistency_equals_torch_cross_entropy_per_sample():
    b = make_batch()
    mask = b.target >= 0
    log_prob = lf.target_log_prob(lf.log_belief(b.forward, mask), b.target, mask)
    ours = lf.consistency(log_prob, mask, None, lf.step_weights(4, 0.0, log_prob))
    for i in range(3):
        expected = F.cross_entropy(b.forward[i, -1].movedim(-1, 0)[None], b.target[i][None], ignore_index=PAD)
        torch.testing.assert_close(ours[i], expected)


def test_js_is_symmetric_bounded_and_zero_with_zero_gradient_at_equality():
    f, b = (torch.randn(2, 3, 4, 4, C, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    lp, lq = lf.log_belief(f, mask), lf.log_belief(b, mask)
    torch.testing.assert_close(lf.bidirectional(lp, lq, mask), lf.bidirectional(lq, lp, mask))
    assert (lf.js_divergence(lp, lq) <= math.log(2)).all()
    same = lf.bidirectional(lp, lf.log_belief(f.detach(), mask), mask).sum()
    assert same.item() <= 1e-6
    assert torch.autograd.grad(same, f)[0].abs().max() < 1e-7
    one, two = (peaked(torch.full((1, 1, 1, 1), k), 1e4).requires_grad_() for k in (3, 7))
    cell = torch.ones(1, 1, 1, dtype=torch.bool)
    disjoint = lf.bidirectional(lf.log_belief(one, cell), lf.log_belief(two, cell), cell).sum()
    assert abs(disjoint.item() - math.log(2)) < 1e-6
    assert all(x.isfinite().all() for x in torch.autograd.grad(disjoint, (one, two)))


def test_js_of_exact_one_hot_log_probabilities_is_finite():
    log_p, log_q = F.one_hot(torch.tensor(1), C).float().log(), F.one_hot(torch.tensor(2), C).float().log()
    assert abs(lf.js_divergence(log_p, log_q).item() - math.log(2)) < 1e-6
    assert lf.js_divergence(log_p, log_p).item() == 0
    assert lf.kl_divergence(log_p, lf.floored(log_p, 0.0)).item() == 0


@pytest.mark.parametrize("side", ["none", "fwd", "bwd"])
def test_bidirectional_detach_stops_the_gradient_of_one_side(side):
    b = leaves(make_batch())
    mask = b.target >= 0
    lf.bidirectional(lf.log_belief(b.forward, mask), lf.log_belief(b.backward[:, :, :4, :4], mask), mask,
                     detach=side).sum().backward()
    assert (b.forward.grad is None) == (side == "fwd")
    assert (b.backward.grad is None) == (side == "bwd")


def test_risk_reaches_its_bound_is_zero_at_the_preference_and_is_information_for_uniform_c():
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    log_c = torch.full((1, 1, 2, C), -torch.inf)
    log_c[..., 0] = 0.0
    wrong = lf.log_belief(peaked(torch.full((1, 1, 1, 2), 4), 100.0), mask)
    assert abs(lf.risk(wrong, log_c, mask, 0.05).item() - math.log(C / 0.05)) < 1e-5
    at_c = lf.floored(log_c, 0.05)[:, None]
    torch.testing.assert_close(at_c.exp().sum(-1), torch.ones(1, 1, 1, 2))
    assert abs(lf.risk(at_c, log_c, mask, 0.05).item()) < 1e-6
    q = lf.log_belief(torch.randn(1, 1, 1, 2, C), mask)
    expected = math.log(C) - torch.distributions.Categorical(logits=q).entropy().mean()
    torch.testing.assert_close(lf.risk(q, torch.full_like(log_c, -math.log(C)), mask)[0], expected)


def test_risk_gradient_is_the_closed_form():
    b = make_batch(batch=1, steps=1)
    f = b.forward.double().requires_grad_()
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    (grad,) = torch.autograd.grad(lf.risk(lf.log_belief(f, mask), b.preference.double(), mask, 0.05).sum(), f)
    q, log_c = torch.softmax(f.detach(), -1), lf.floored(b.preference.double(), 0.05)[:, None]
    gap = q.log() - log_c
    torch.testing.assert_close(grad, q * (gap - (q * gap).sum(-1, keepdim=True)) / 16)


def test_preference_may_differ_between_steps():
    b = make_batch()
    mask, log_q = b.target >= 0, lf.log_belief(b.forward, b.target >= 0)
    repeated = b.preference[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(lf.risk(log_q, repeated, mask), lf.risk(log_q, b.preference, mask))


@pytest.mark.parametrize("form", ["codes", "ensemble"])
def test_risk_plus_ambiguity_equals_minus_information_gain_and_utility(form):
    b = make_batch(batch=2, steps=2)
    mask = b.target >= 0
    log_s = lf.log_belief(b.state_logits, mask)
    likelihood = torch.log_softmax(b.likelihood_logits if form == "codes" else torch.randn(2, 2, 4, 4, 6, C), -1)
    log_q = lf.log_predictive(log_s, likelihood)
    log_c = lf.floored(b.preference, 0.05)
    utility = lf.over_time(lf.cell_mean(lf.expectation(log_q.exp(), log_c[:, None]), mask))
    gain = lf.info_gain(log_s, likelihood, mask)
    left = lf.risk(log_q, b.preference, mask, 0.05) + lf.ambiguity(log_s, likelihood, mask)
    torch.testing.assert_close(left, -(gain + utility), atol=1e-5, rtol=0)
    assert (gain > 0.01).all()
    mixture = torch.distributions.Categorical(probs=(log_s.exp()[..., None] * likelihood.exp()).sum(-2))
    torch.testing.assert_close(mixture.logits.log_softmax(-1), log_q, atol=1e-5, rtol=1e-4)


def test_information_gain_is_zero_when_heads_agree_or_the_outcome_ignores_the_state():
    b = make_batch(batch=2, steps=2)
    mask, log_s = b.target >= 0, lf.log_belief(b.state_logits, b.target >= 0)
    same = torch.log_softmax(torch.randn(1, C), -1).expand(6, C)
    assert lf.info_gain(log_s, same, mask).abs().max() < 1e-6
    heads = torch.log_softmax(torch.randn(2, 2, 4, 4, 1, C), -1).expand(-1, -1, -1, -1, 6, -1)
    assert lf.info_gain(log_s, heads, mask).abs().max() < 1e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.1, 1.0, 10.0]), st.booleans())
def test_information_gain_is_the_mutual_information_of_state_and_outcome(seed, codes, scale, is_ensemble):
    g = torch.Generator().manual_seed(seed)
    shape = (1, 2, 2, 2, codes, C) if is_ensemble else (codes, C)
    state, outcome = scale * torch.randn(1, 2, 2, 2, codes, generator=g), scale * torch.randn(shape, generator=g)
    log_s, log_o, mask = numpy_log_softmax(state), numpy_log_softmax(outcome), torch.rand(1, 2, 2, generator=g) < 0.8

    def mutual_information(*at):
        likelihood = log_o[at] if is_ensemble else log_o
        predictive = np.log(np.exp(log_s[at]) @ np.exp(likelihood))
        return sum(np.exp(log_s[at])[k] * kl(likelihood[k], predictive) for k in range(codes))

    ours = lf.info_gain(lf.log_belief(state, mask), torch.log_softmax(outcome, -1), mask)
    assert (ours >= 0).all()
    np.testing.assert_allclose(ours, brute_force(mutual_information, mask.numpy(), 2), atol=1e-5)


def test_ambiguity_spans_zero_to_ln_c_and_reaches_states_and_likelihood():
    b = leaves(make_batch(batch=2))
    mask = b.target >= 0
    log_s = lf.log_belief(b.state_logits, mask)
    uniform = torch.full((6, C), -math.log(C))
    torch.testing.assert_close(lf.ambiguity(log_s, uniform, mask), torch.full((2,), math.log(C)))
    assert lf.ambiguity(log_s, torch.log_softmax(peaked(torch.arange(6), 100.0), -1), mask).abs().max() < 1e-6
    lf.ambiguity(log_s, torch.log_softmax(b.likelihood_logits, -1), mask).sum().backward()
    assert b.state_logits.grad.abs().sum() > 0 and b.likelihood_logits.grad.abs().sum() > 0


def test_ambiguity_of_codes_equals_the_brute_force_expectation():
    b = make_batch(batch=2)
    mask = b.target >= 0
    states, like = np.exp(numpy_log_softmax(b.state_logits)), numpy_log_softmax(b.likelihood_logits)
    rows = -(np.exp(like) * like).sum(-1)
    ours = lf.ambiguity(lf.log_belief(b.state_logits, mask), torch.log_softmax(b.likelihood_logits, -1), mask)
    np.testing.assert_allclose(ours, brute_force(lambda *at: (states[at] * rows).sum(), mask.numpy(), 4), atol=1e-5)


def test_halting_probabilities_sum_to_one_and_expected_steps_follow_the_closed_form():
    a = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    log_p, _ = lf.halting_log_probs(a)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5, dtype=torch.float64))
    expected_steps = (log_p.exp() * torch.arange(1, 7)).sum(1)
    torch.testing.assert_close(lf.step_cost(a) * 6, expected_steps)
    assert (expected_steps >= 1).all() and (expected_steps <= 6).all()
    (grad,) = torch.autograd.grad(lf.step_cost(a).sum() * 6, a)
    h = torch.sigmoid(a.detach())
    reached = F.pad((1 - h).cumprod(1)[:, :-1], (1, 0), value=1.0)
    for t in range(6):
        torch.testing.assert_close(grad[:, t], -h[:, t] * reached[:, t + 1:].sum(1))
    assert (grad[:, :-1] < 0).all() and (grad[:, -1] == 0).all()


def test_halting_limits_are_finite():
    for value, steps in ((60.0, 1.0), (-60.0, 6.0)):
        a = torch.full((1, 6), value, requires_grad=True)
        cost = 6 * lf.step_cost(a)
        cost.sum().backward()
        assert abs(cost.item() - steps) < 1e-5
        assert a.grad.isfinite().all() and lf.halting_log_probs(a)[0].isfinite().all()


def test_step_weights_sum_to_one_and_rho_zero_keeps_the_last_step_only():
    like = torch.zeros(())
    for rho in (0.0, 0.5, 1.0):
        torch.testing.assert_close(lf.step_weights(4, rho, like).sum(), torch.tensor(1.0))
    torch.testing.assert_close(lf.step_weights(3, 0.5, like), torch.tensor([1 / 12, 2 / 12, 9 / 12]))
    assert lf.step_weights(4, 0.0, like).tolist() == [0, 0, 0, 1]


def test_hard_weights_are_epsilon_or_one_and_never_change_a_constant_or_extreme_case():
    right = torch.tensor([[[True, False], [True, True]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    weight = lf.hard_weights(right, mask, 0.1)
    torch.testing.assert_close(weight, torch.tensor([[[0.1, 1.0], [0.1, 0.0]]]))
    values = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]])
    torch.testing.assert_close(lf.cell_mean(values, mask, weight), torch.tensor([(0.1 + 2.0 + 0.4) / 1.2]))
    plain = lf.cell_mean(values, mask)
    for same in (lf.hard_weights(right, mask, 1.0), lf.hard_weights(torch.ones_like(right), mask, 0.1),
                 lf.hard_weights(torch.zeros_like(right), mask, 0.1)):
        torch.testing.assert_close(lf.cell_mean(values, mask, same), plain)
    torch.testing.assert_close(lf.cell_mean(torch.full_like(values, 3.0), mask, weight), torch.tensor([3.0]))


def test_fix3_gradient_is_larger_on_wrong_cells():
    b = make_batch(batch=1, in_sizes=[(5, 5)])
    predicted = b.target.clone()
    predicted[0, 0, :3] = (predicted[0, 0, :3] + 1) % C  # three wrong cells of sixteen
    norms = {}
    for epsilon in (0.1, 1.0):
        x = leaves(SimpleNamespace(**{**vars(b), "forward": peaked(predicted, 1.0)[:, None].repeat(1, 4, 1, 1, 1)}))
        result = run(make_loss(**{**only("consistency"), "hard_epsilon": epsilon}), x)
        result.total.backward()
        wrong = predicted != b.target
        norm = x.forward.grad[:, -1].norm(dim=-1)
        assert norm[wrong].min() > norm[~wrong].max() > 0
        assert result.hard_fraction.item() == 3 / 16
        norms[epsilon] = (norm[wrong].mean() / norm[~wrong].mean()).item()
    assert abs(norms[0.1] / norms[1.0] - 10) < 1e-3


def test_desirable_preference_is_the_normalised_product_and_the_floor_keeps_it_positive():
    b = make_batch(batch=1)
    c, z = b.preference.exp().double(), b.desirability.exp().double()
    product = c * z / (c * z).sum(-1, keepdim=True)
    ours = lf.desirable_preference(b.preference, b.desirability, 0.0).exp()
    torch.testing.assert_close(ours, product.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lf.desirable_preference(b.preference, torch.full_like(b.preference, 0.7), 0.05),
                               lf.floored(b.preference, 0.05))
    floored = lf.desirable_preference(b.preference, b.desirability, 0.05).exp()
    torch.testing.assert_close(floored, (0.95 * product + 0.005).float())


def test_z_anchor_is_zero_at_its_target_and_equals_torch_kl_elsewhere():
    b = make_batch(batch=1)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    log_target = lf.desirable_preference(b.preference, b.desirability, 0.05)
    assert lf.z_anchor(log_target, b.preference, b.desirability, mask, 0.05).abs().item() < 1e-6
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=b.preference_logits),
                                           torch.distributions.Categorical(logits=log_target))
    torch.testing.assert_close(lf.z_anchor(b.preference_logits, b.preference, b.desirability, mask, 0.05)[0], kl.mean())


def test_desirability_solves_the_kl_control_problem():
    g = torch.Generator().manual_seed(5)
    log_c = torch.log_softmax(torch.randn(1, 1, 1, C, generator=g, dtype=torch.float64), -1)
    r = torch.randn(1, 1, 1, C, generator=g, dtype=torch.float64)
    mask, price = torch.ones(1, 1, 1, dtype=torch.bool), 0.7

    def cost(log_q):
        return price * lf.risk(log_q[:, None], log_c, mask, 0.0) - (log_q.exp() * r).sum(-1).flatten()

    best = lf.desirable_preference(log_c, r / price, 0.0)
    minimum = -price * torch.logsumexp(log_c + r / price, -1).flatten()
    torch.testing.assert_close(cost(best), minimum, atol=1e-5, rtol=0)
    for _ in range(20):
        other = torch.log_softmax(best + 0.3 * torch.randn(best.shape, generator=g), -1)
        assert cost(other) >= minimum - 1e-12


# 2. Prompt, reward, heads -------------------------------------------------------------------------------------------

def test_info_nce_is_ln_b_when_collapsed_zero_when_aligned_and_zero_for_one_sample():
    slots, valid = torch.arange(1, 5), torch.ones(4, dtype=torch.bool)
    same = torch.ones(4, 3)
    torch.testing.assert_close(lf.prompt_consistency(same, same, slots, valid), torch.full((4,), math.log(4)))
    aligned = torch.eye(4)
    assert lf.prompt_consistency(aligned, aligned, slots, valid).max() < 2e-4
    assert lf.prompt_consistency(same[:1], same[:1], slots[:1], valid[:1]).item() == 0


def test_info_nce_counts_same_task_pairs_as_positives_and_unknown_tasks_as_negatives():
    same, valid = torch.ones(4, 3), torch.ones(4, dtype=torch.bool)
    assert lf.prompt_consistency(same, same, torch.full((4,), 7), valid).abs().max() < 1e-6
    torch.testing.assert_close(lf.prompt_consistency(same, same, torch.tensor([7, 7, 8, 8]), valid),
                               torch.full((4,), math.log(2)))
    torch.testing.assert_close(lf.prompt_consistency(same, same, torch.zeros(4, dtype=torch.long), valid),
                               torch.full((4,), math.log(4)))


def test_info_nce_equals_two_cross_entropies_without_shared_tasks():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 6, generator=g), torch.randn(5, 6, generator=g)
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / 0.1
    own = torch.arange(5)
    expected = 0.5 * (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none"))
    ours = lf.prompt_consistency(x, y, own + 1, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_queue_gives_negatives_of_other_tasks_only_and_starts_empty():
    loss = make_loss(**only("prompt"))
    b = make_batch(batch=1)
    assert run(loss, b).terms["prompt"].item() == 0
    loss.remember(torch.randn(2, 12), b.task_slot.repeat(2))
    assert run(loss, b).terms["prompt"].item() == 0
    loss.remember(torch.randn(2, 12), torch.tensor([50, 51]))
    assert run(loss, b).terms["prompt"].item() > 0


def test_queue_overwrites_the_oldest_and_survives_a_state_dict():
    loss, size = make_loss(), lf.PROMPT_QUEUE
    prompts = torch.arange(size + 3.0)[:, None].expand(-1, 12)
    for start in range(0, size + 3, 5):
        chunk = prompts[start:start + 5]
        loss.remember(chunk.requires_grad_(), torch.arange(len(chunk)) + start)
    assert set(loss.queue_slot.tolist()) == set(range(3, size + 3))
    torch.testing.assert_close(loss.prompt_queue[:, 0], loss.queue_slot.float())
    assert not loss.prompt_queue.requires_grad
    stored = io.BytesIO()
    torch.save(loss.state_dict(), stored)
    stored.seek(0)
    other = make_loss(seed=1)
    other.load_state_dict(torch.load(stored, weights_only=True))
    b = make_batch()
    assert torch.equal(run(other, b).total, run(loss, b).total)


def test_remember_between_forward_and_backward_leaves_the_gradient_alone():
    grads = []
    for early in (True, False):
        loss, b = make_loss(**only("prompt")), leaves(make_batch())
        loss.remember(torch.ones(2, 12), torch.tensor([50, 51]))
        result = run(loss, b)
        if early:
            loss.remember(b.prompt, b.task_slot)
        result.total.backward()
        grads.append(b.prompt.grad)
    assert torch.equal(*grads)


def test_prompt_cosine_spans_zero_to_two():
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lf.prompt_cosine(x, 2 * x), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(lf.prompt_cosine(x, -x), torch.full((3,), 2.0), atol=1e-5, rtol=0)


def test_reward_term_has_the_value_of_the_reward_and_the_gradient_of_the_surrogate():
    b = leaves(make_batch())
    mask = b.target >= 0

    def surrogate():
        return lf.expected_accuracy(lf.target_log_prob(lf.log_belief(b.forward, mask), b.target, mask)[:, -1], mask)

    term = lf.reward_term(surrogate(), b.reward)
    assert torch.equal(term, -b.reward)
    (grad,) = torch.autograd.grad(term.sum(), b.forward)
    (expected,) = torch.autograd.grad(-surrogate().sum(), b.forward)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)
    log_q = lf.log_belief(b.forward, mask)
    cross_entropy = -lf.target_log_prob(log_q, b.target, mask)[:, -1]
    (ce_grad,) = torch.autograd.grad(torch.where(mask, cross_entropy, 0).sum(), b.forward)
    p_y = (-cross_entropy.detach()).exp()[..., None] / mask.sum((1, 2))[:, None, None, None]
    torch.testing.assert_close(expected[:, -1], p_y * ce_grad[:, -1], atol=1e-6, rtol=0)


def test_missing_or_unscorable_reward_counts_as_zero_or_is_left_out():
    b, loss = make_batch(), make_loss(**only("reward"))
    some = run(loss, SimpleNamespace(**{**vars(b), "reward": torch.tensor([0.5, torch.nan, 0.25])}))
    assert abs(some.terms["reward"].item() + 0.375) < 1e-6
    x = leaves(SimpleNamespace(**{**vars(b), "reward": None}))
    none = run(loss, x)
    none.total.backward()
    assert none.terms["reward"].item() == 0 and x.forward.grad[:, -1].abs().sum() > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.0, 1.0, 20.0]), st.integers(0, 999))
def test_size_loss_equals_float64_numpy_and_a_nearer_miss_costs_less(rows, cols, scale, seed):
    logits = scale * torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(seed))
    log_p, reached = numpy_log_softmax(logits[:, 0]), np.arange(1, 31) >= np.array([[rows], [cols]])
    expected = (-log_p[0, rows - 1] - log_p[1, cols - 1]) / 2
    expected += 0.05 * ((np.exp(log_p).cumsum(1) - reached) ** 2).sum() / 2
    size = torch.tensor([[rows, cols]])
    assert lf.size_loss(logits[0], logits[1], size).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    near = [lf.size_loss(50.0 * F.one_hot(torch.tensor([n - 1]), 30), logits[1], size).item() for n in range(1, 31)]
    order = sorted(range(1, 31), key=lambda n: abs(n - rows))
    assert all(near[a - 1] <= near[b - 1] + 1e-4 for a, b in zip(order, order[1:], strict=False))
    assert near[rows - 1] < near[order[1] - 1] < near[order[-1] - 1]


def test_size_loss_is_half_the_two_cross_entropies_and_its_distance_orders_misses():
    b = make_batch()
    plain = lf.size_loss(b.row_logits, b.col_logits, b.target_size, emd_weight=0.0)
    expected = 0.5 * (F.cross_entropy(b.row_logits, b.target_size[:, 0] - 1, reduction="none")
                      + F.cross_entropy(b.col_logits, b.target_size[:, 1] - 1, reduction="none"))
    torch.testing.assert_close(plain, expected)

    def guess(n):
        return 50 * F.one_hot(torch.tensor([n - 1]), 30).float()

    size = torch.tensor([[10, 10]])
    assert lf.size_loss(guess(10), guess(10), size).item() < 1e-6
    misses = [lf.size_loss(guess(n), guess(10), size).item() for n in (10, 11, 12, 15, 20, 30)]
    assert misses == sorted(misses) and len(set(misses)) == 6
    assert abs(misses[1] - (25 + 0.5 * lf.EMD_WEIGHT)) < 1e-4  # one wrong cumulative entry on one axis


@pytest.mark.parametrize("weight, is_safe", [(0.1, True), (0.3, True), (0.5, True), (0.7, False)])
def test_price_of_a_step_is_safe_below_its_bound(weight, is_safe):
    assert (weight < 0.5 * 6 / 5) == is_safe
    assert (descend_halting(None, halt_weight=0.5, step_weight=weight) > 5.9) == is_safe
    if is_safe:
        assert abs(descend_halting(3, halt_weight=0.5, step_weight=weight) - 3) < 0.1


def test_halting_target_needs_every_valid_cell_and_the_size():
    mask = torch.tensor([[[True, True], [False, False]]]).expand(2, 2, 2)
    right = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])[None].expand(2, 2, 2, 2)
    solved = lf.halt_target(right, mask, torch.tensor([True, False]))
    assert solved.tolist() == [[False, True], [False, False]]
    a = torch.randn(2, 2)
    expected = F.binary_cross_entropy(torch.sigmoid(a), solved.float(), reduction="none").sum(1)
    torch.testing.assert_close(lf.halt_loss(a, solved), expected)


def test_halt_term_uses_the_argmax_of_cells_and_of_both_size_heads():
    b = make_batch(batch=1)
    b.forward = peaked(b.target)[:, None].repeat(1, 4, 1, 1, 1)
    b.forward[:, 0] = 0.0
    b.row_logits, b.col_logits = (peaked_size(n) for n in b.target_size[0])
    right = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    loss = make_loss(**only("halt"))
    expected = F.binary_cross_entropy_with_logits(b.halt_logits, right, reduction="sum")
    torch.testing.assert_close(run(loss, b).terms["halt"], expected)
    b.col_logits = peaked_size(29)
    expected = F.binary_cross_entropy_with_logits(b.halt_logits, 0 * right, reduction="sum")
    torch.testing.assert_close(run(loss, b).terms["halt"], expected)


def peaked_size(n):
    return 9 * F.one_hot(torch.as_tensor(int(n) - 1), 30).float()[None]


@pytest.mark.parametrize("first_solved, expected_steps", [(None, 6.0), (3, 3.0), (1, 1.0)])
def test_halting_head_learns_to_stop_where_the_grid_is_solved(first_solved, expected_steps):
    steps = descend_halting(first_solved, halt_weight=0.5)
    assert abs(steps - expected_steps) < 0.1


def test_expected_steps_alone_collapse_to_one():
    assert abs(descend_halting(None, halt_weight=0.0) - 1) < 0.1


def descend_halting(first_solved, halt_weight, step_weight=0.1):
    a = torch.zeros(1, 6, requires_grad=True)
    solved = torch.tensor([[first_solved is not None and t >= first_solved for t in range(1, 7)]])
    optimizer = torch.optim.Adam([a], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (step_weight * lf.step_cost(a) + halt_weight * lf.halt_loss(a, solved)).sum().backward()
        optimizer.step()
    return 6 * lf.step_cost(a).item()


# 3. The whole loss: sums, reach, alignment ------------------------------------------------------------------------

SIZES = st.sampled_from([(0, 0), (1, 1), (1, 3), (2, 2), (3, 1), (3, 3)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(st.sampled_from(["full", "seed"]), st.lists(SIZES, min_size=1, max_size=3), st.integers(1, 4), DTYPES,
       st.booleans(), st.booleans(), st.integers(0, 999))
def test_every_term_equals_a_float64_reference_and_padding_may_hold_anything(mode, sizes, steps, dtype, one_colour,
                                                                             autocast, seed):
    batch = len(sizes)
    b = make_batch(seed, batch, steps, side=3, in_side=4, sizes=sizes, in_sizes=[(4, 2), (1, 1), (3, 4)][:batch])
    b.task_slot = torch.tensor([1, 1, 2])[:batch]
    if one_colour:
        b.target = torch.where(b.target >= 0, seed % C, PAD)
    outside, out_of_input = b.target < 0, b.input < 0
    for name in ("preference", "desirability", "preference_logits"):
        getattr(b, name)[outside] = torch.nan
    for name in ("forward", "state_logits"):
        getattr(b, name).movedim(1, 3)[outside] = torch.nan
    b.backward[:, 0][out_of_input] = torch.nan
    b.backward[:, 1:, :3, :3].movedim(1, 3)[outside] = torch.nan
    for name in LEAVES[:10]:
        setattr(b, name, getattr(b, name).to(dtype))
    b, loss = leaves(b), make_loss(mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = run(loss, b)
    result.total.backward()
    expected = numpy_terms(b, loss)
    for name in TERM_NAMES:
        assert result.terms[name].item() == pytest.approx(expected[name], abs=2e-5, rel=2e-5), name
    weights = lf.term_weights(loss.config, WARM)
    assert result.total.item() == pytest.approx(sum(weights[name] * expected[name] for name in TERM_NAMES), abs=1e-4)
    assert result.total.dtype == torch.float32
    for name in LEAVES:
        grad = getattr(b, name).grad
        assert grad is None or grad.isfinite().all(), name
    assert b.forward.grad is None or b.forward.grad.movedim(1, 3)[outside].count_nonzero() == 0


@pytest.mark.parametrize("mode", ["full", "seed"])
@pytest.mark.parametrize("progress", [0.0, 1.3, 3.4, WARM])
def test_total_is_the_sum_of_the_weighted_terms(mode, progress):
    loss, b = make_loss(mode=mode), leaves(make_batch())
    result = run(loss, b, progress)
    reported = (result.per_sample_consistency, result.per_sample_cross_entropy, result.hard_fraction)
    assert not any(x.requires_grad for x in (*result.terms.values(), *result.weighted.values(), *reported))
    assert tuple(result.terms) == tuple(result.weighted) == TERM_NAMES
    assert abs(result.total.item() - sum(x.item() for x in result.weighted.values())) < 1e-6 * result.total.item()
    for name, weight in lf.term_weights(loss.config, progress).items():
        torch.testing.assert_close(result.weighted[name], weight * result.terms[name])
        assert result.terms[name].shape == ()


@pytest.mark.parametrize("mode", ["full", "seed"])
@pytest.mark.parametrize("name", LAMBDAS)
def test_lambda_zero_removes_exactly_its_term(mode, name):
    b = make_batch()
    loss = make_loss(mode=mode)
    whole = run(loss, b)
    loss.config = dataclasses.replace(loss.config, **{LAMBDAS[name]: 0.0})
    less = run(loss, b)
    torch.testing.assert_close(whole.total - whole.weighted[name], less.total, atol=1e-5, rtol=0)
    assert less.terms[name].item() == 0
    assert all(torch.equal(less.terms[k], whole.terms[k]) for k in TERM_NAMES if k != name)
    if mode == "full":
        assert whole.terms[name].abs().item() > 0


def test_term_with_weight_zero_is_not_computed():
    b = make_batch()
    b.state_logits = b.likelihood_logits = b.features = b.prompt = None
    assert run(make_loss(lambda_ambiguity=0.0, lambda_prompt=0.0), b).total.isfinite()


@pytest.mark.parametrize("term, reached", [
    ("risk", {"forward"}), ("ambiguity", {"state_logits", "likelihood_logits"}), ("step", {"halt_logits"}),
    ("consistency", {"forward"}), ("bidirectional", {"forward", "backward"}), ("z_learning", {"preference_logits"}),
    ("prompt", {"features", "prompt"}), ("reward", {"forward"}), ("halt", {"halt_logits"}), ("reverse", {"backward"}),
])
def test_each_term_sends_gradient_to_its_own_inputs_only(term, reached):
    b = leaves(make_batch())
    run(make_loss(**only(term)), b).total.backward()
    got = {name for name in LEAVES if getattr(b, name).grad is not None and getattr(b, name).grad.abs().sum() > 0}
    assert got == reached | {"row_logits", "col_logits"}


def test_all_parameters_exist_at_construction_and_all_get_gradient():
    for mode in ("full", "seed"):
        loss, b = make_loss(mode=mode), make_batch()
        before = [id(p) for p in loss.parameters()]
        run(loss, b).total.backward()
        assert [id(p) for p in loss.parameters()] == before and before
        assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_backward_plan_is_aligned_one_step_behind_and_its_start_meets_the_input():
    b = leaves(make_batch())
    run(make_loss(**only("bidirectional")), b).total.backward()
    assert (b.backward.grad[:, 0] == 0).all() and (b.backward.grad[:, 1:].flatten(2).abs().sum((0, 2)) > 0).all()
    assert (b.forward.grad[:, -1] == 0).all() and (b.forward.grad[:, :-1].flatten(2).abs().sum((0, 2)) > 0).all()
    b = leaves(make_batch())
    run(make_loss(**only("reverse")), b).total.backward()
    assert (b.backward.grad[:, 1:] == 0).all()
    inside = b.input >= 0
    assert (b.backward.grad[:, 0].abs().sum(-1) > 0).equal(inside)


@pytest.mark.parametrize(("side", "forward", "backward"), [("none", 1, 1), ("fwd", 0, 1), ("bwd", 1, 0)])
def test_setting_detach_decides_which_planner_follows_the_other(side, forward, backward):
    b = leaves(make_batch())
    run(make_loss(detach=side, **only("bidirectional")), b).total.backward()
    reached = [x.grad is not None and bool((x.grad != 0).any()) for x in (b.forward, b.backward)]
    assert reached == [bool(forward), bool(backward)]


def test_bidirectional_is_zero_when_backward_equals_forward_one_step_earlier():
    b = make_batch()
    b.backward[:, 1:, :4, :4] = b.forward[:, :-1]
    assert run(make_loss(), b).terms["bidirectional"].item() < 1e-6
    b.backward[:, :, :4, :4] = b.forward
    assert run(make_loss(), b).terms["bidirectional"].item() > 0.01


def test_reverse_term_equals_cross_entropy_of_the_start_with_the_input():
    b = make_batch()
    expected = torch.stack([F.cross_entropy(b.backward[i, 0][b.input[i] >= 0], b.input[i][b.input[i] >= 0])
                            for i in range(3)])
    torch.testing.assert_close(run(make_loss(), b).terms["reverse"], expected.mean())


def test_no_backward_plan_and_a_single_step_give_zero():
    b = make_batch()
    b.backward = None
    result = run(make_loss(), b)
    assert result.terms["bidirectional"].item() == result.terms["reverse"].item() == 0
    single = leaves(make_batch(steps=1))
    result = run(make_loss(), single)
    result.total.backward()
    assert result.terms["bidirectional"].item() == 0 and result.terms["step"].item() == 1
    assert single.forward.grad.isfinite().all()


def test_reported_values_match_their_definitions():
    b = make_batch(sizes=[(4, 4), (3, 4), (1, 2)])
    b.forward = peaked(torch.where(b.target >= 0, b.target, 0))[:, None].repeat(1, 4, 1, 1, 1)
    b.forward[:, 0] = torch.randn(3, 4, 4, C, generator=torch.Generator().manual_seed(0))  # only the last step counts
    b.target[0, 0, 0] = (b.target[0, 0, 0] + 1) % C
    result = run(make_loss(), b)
    assert abs(result.hard_fraction.item() - 1 / 30) < 1e-7
    expected = [F.cross_entropy(b.forward[i, -1][b.target[i] >= 0], b.target[i][b.target[i] >= 0]) for i in range(3)]
    torch.testing.assert_close(result.per_sample_cross_entropy, torch.stack(expected))
    torch.testing.assert_close(result.terms["consistency"], result.per_sample_consistency.mean())
    assert result.per_sample_consistency[0] > result.per_sample_cross_entropy[0]


# 4. Invariances and numbers -----------------------------------------------------------------------------------------

def pad_canvas(b, extra, fill):
    """Return the batch on larger canvases; everything outside the old ones holds `fill`."""
    new = SimpleNamespace(**vars(b))
    for name in (*CELL_FIELDS, "preference", "desirability"):
        setattr(new, name, F.pad(getattr(b, name), (0, 0, 0, extra, 0, extra), value=fill))
    for name in ("target", "input"):
        setattr(new, name, F.pad(getattr(b, name), (0, extra, 0, extra), value=PAD))
    return new


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(["full", "seed"]), st.integers(1, 3), st.sampled_from([0.0, 7.0, math.nan, math.inf]),
       st.integers(0, 99))
def test_padding_does_not_change_loss(mode, extra, fill, seed):
    small = leaves(make_batch(seed))
    large = leaves(pad_canvas(small, extra, fill))
    loss = make_loss(mode=mode)
    one, two = run(loss, small), run(loss, large)
    one.total.backward()
    two.total.backward()
    torch.testing.assert_close(two.total, one.total, atol=1e-5, rtol=1e-6)
    for name in CELL_FIELDS:
        grad = getattr(large, name).grad
        if grad is None:
            continue
        side = getattr(small, name).shape[-2]
        torch.testing.assert_close(grad[..., :side, :side, :], getattr(small, name).grad, atol=1e-6, rtol=1e-4)
        assert grad[..., side:, :, :].count_nonzero() == 0 and grad[..., :, side:, :].count_nonzero() == 0


def test_values_outside_the_mask_never_matter():
    for fill in (math.nan, math.inf, -math.inf):
        b, dirty = leaves(make_batch()), make_batch()
        outside = dirty.target < 0
        for name in ("preference", "desirability", "preference_logits"):
            getattr(dirty, name)[outside] = fill
        for name in ("forward", "state_logits"):
            getattr(dirty, name).movedim(1, 3)[outside] = fill
        dirty.backward[:, 0, :5, :5][dirty.input < 0] = fill
        dirty.backward[:, 1:, :4, :4].movedim(1, 3)[outside] = fill
        dirty = leaves(dirty)
        one, two = run(make_loss(), b), run(make_loss(), dirty)
        two.total.backward()
        assert torch.equal(one.total, two.total)
        for name in CELL_FIELDS:
            assert getattr(dirty, name).grad.isfinite().all()
        assert dirty.forward.grad.movedim(1, 3)[outside].count_nonzero() == 0
        mask, ones = b.target >= 0, torch.where(outside, fill, 1.0)
        assert lf.cell_mean(ones, mask).tolist() == lf.cell_mean(ones, mask, ones).tolist() == [1, 1, 1]
        assert lf.batch_mean(torch.tensor([1.0, fill]), torch.tensor([True, False])).item() == 1


def test_upsampling_and_repeated_steps_change_nothing():
    b = make_batch(in_side=4, in_sizes=[(4, 4), (2, 3), (4, 1)])
    large = SimpleNamespace(**vars(b))
    for name in (*CELL_FIELDS, "preference", "desirability"):
        setattr(large, name, getattr(b, name).repeat_interleave(2, -3).repeat_interleave(2, -2))
    for name in ("target", "input"):
        setattr(large, name, getattr(b, name).repeat_interleave(2, -2).repeat_interleave(2, -1))
    loss = make_loss()
    one, two = run(loss, b), run(loss, large)
    for name in TERM_NAMES:
        torch.testing.assert_close(one.terms[name], two.terms[name], atol=1e-5, rtol=1e-5)
    mask = b.target >= 0
    log_q = lf.log_belief(b.forward[:, :1], mask)
    repeated, once = log_q.repeat(1, 5, 1, 1, 1), lf.risk(log_q, b.preference, mask)
    torch.testing.assert_close(lf.risk(repeated, b.preference, mask), once)
    torch.testing.assert_close(lf.risk(repeated, b.preference, mask, reduce="sum"), 5 * once)


@pytest.mark.parametrize("mode", ["full", "seed"])
def test_batch_order_and_colour_names_do_not_matter(mode):
    b, loss = make_batch(), make_loss(mode=mode)
    result = run(loss, b)
    order = torch.tensor([2, 0, 1])
    shuffled = SimpleNamespace(**{k: v if k == "likelihood_logits" else v[order] for k, v in vars(b).items()})
    other = run(loss, shuffled)
    torch.testing.assert_close(other.total, result.total)
    torch.testing.assert_close(other.per_sample_consistency, result.per_sample_consistency[order])
    colors = torch.randperm(C, generator=torch.Generator().manual_seed(4))
    renamed = SimpleNamespace(**vars(b))
    for name in ("forward", "backward", "preference_logits", "likelihood_logits", "preference", "desirability"):
        setattr(renamed, name, getattr(b, name)[..., colors])
    new_name = colors.argsort()
    for name in ("target", "input"):
        old = getattr(b, name)
        setattr(renamed, name, torch.where(old >= 0, new_name[old.clamp_min(0)], PAD))
    if mode == "seed":  # the projection of the prompt names colours too
        loss.prompt_projection.weight.data = loss.prompt_projection.weight.data[colors]
    torch.testing.assert_close(run(loss, renamed).total, result.total)


@pytest.mark.parametrize("mode", ["full", "seed"])
def test_batch_without_a_valid_cell_gives_zero_and_finite_zero_gradient(mode):
    b = make_batch()
    b.target = torch.full_like(b.target, PAD)
    b.target_size = torch.zeros_like(b.target_size)
    for name in ("features", "prompt", "halt_logits", "row_logits", "reward"):
        getattr(b, name)[:] = torch.nan
    b = leaves(b)
    result = run(make_loss(mode=mode), b)
    result.total.backward()
    assert result.total.item() == 0 and result.hard_fraction.item() == 0
    for name in LEAVES:
        grad = getattr(b, name).grad
        assert grad is None or (grad == 0).all()


@pytest.mark.parametrize("mode", ["full", "seed"])
def test_sample_without_a_valid_cell_is_left_out_of_the_mean(mode):
    b, loss = make_batch(), make_loss(mode=mode)
    two = SimpleNamespace(**{k: v if k == "likelihood_logits" else v[:2] for k, v in vars(b).items()})
    b.target[2] = PAD
    b.features[2], b.halt_logits[2], b.row_logits[2] = torch.nan, torch.nan, torch.nan
    torch.testing.assert_close(run(loss, b).total, run(loss, two).total)


def test_bf16_autocast_does_not_touch_the_loss():
    b, loss = make_batch(), make_loss()
    plain = run(loss, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(loss, b)
    assert cast.total.dtype == torch.float32
    assert torch.equal(cast.total, plain.total)
    half = SimpleNamespace(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in vars(b).items()})
    rounded = run(loss, half)
    assert rounded.total.dtype == torch.float32
    torch.testing.assert_close(rounded.total, plain.total, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("mode", ["full", "seed"])
def test_extreme_fp16_logits_stay_finite(mode):
    b = make_batch()
    for name in (*CELL_FIELDS, "halt_logits", "row_logits", "col_logits", "likelihood_logits"):
        setattr(b, name, (6e4 * getattr(b, name).sign()).half())
    single = SimpleNamespace(**{k: v.float() if v.is_floating_point() else v for k, v in vars(b).items()})
    b = leaves(b)
    result = run(make_loss(mode=mode), b)
    result.total.backward()
    assert result.total.isfinite() and torch.equal(result.total, run(make_loss(mode=mode), single).total)
    reached = {name: getattr(b, name).grad for name in LEAVES if getattr(b, name).grad is not None}
    assert reached.keys() >= {"forward", "preference_logits", "row_logits"}
    assert all(grad.isfinite().all() for grad in reached.values())


def test_gradients_equal_finite_differences():
    b = make_batch(batch=2, steps=2, side=2, in_side=2, codes=3, sizes=[(1, 2), (1, 1)], in_sizes=[(2, 2), (2, 1)])
    mask = b.target >= 0
    torch.manual_seed(0)
    f, bw, s, a, pref, c = (x.double().requires_grad_() for x in (
        b.forward, b.backward, b.state_logits, b.likelihood_logits, b.preference_logits, b.halt_logits))
    rows, features = b.row_logits.double().requires_grad_(), b.features.double().requires_grad_()
    log_c, z = b.preference.double(), b.desirability.double()
    like = torch.log_softmax(torch.randn(2, 2, 2, 2, 3, C, dtype=torch.float64), -1)
    valid, weights = torch.ones(2, dtype=torch.bool), torch.tensor([0.3, 0.7], dtype=torch.float64)
    weight, queue = torch.rand(2, 2, 2, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x: lf.risk(lf.log_belief(x, mask), log_c, mask), f)
    assert check(lambda x: lf.risk(lf.log_belief(f.detach(), mask), torch.log_softmax(x, -1), mask,
                                   learn_preference=True), pref)
    assert check(lambda x: lf.ambiguity(lf.log_belief(x, mask), None, mask), f)
    assert check(lambda x, y: lf.ambiguity(lf.log_belief(x, mask), torch.log_softmax(y, -1), mask), (s, a))
    assert check(lambda x: lf.ambiguity(lf.log_belief(x, mask), like, mask), s)
    assert check(lambda x, y: lf.bidirectional(lf.log_belief(x, mask), lf.log_belief(y, mask), mask), (f, bw))
    assert check(lambda x: lf.consistency(lf.target_log_prob(lf.log_belief(x, mask), b.target, mask), mask, weight,
                                          weights), f)
    assert check(lambda x: lf.z_anchor(x, log_c, z, mask), pref)
    assert check(lf.step_cost, c)
    assert check(lambda x: lf.halt_loss(x, torch.tensor([[False, True], [False, False]])), c)
    assert check(lambda x: lf.expected_accuracy(lf.target_log_prob(lf.log_belief(x, mask), b.target, mask), mask), f)
    assert check(lambda x: lf.reverse_loss(x[:, 0], b.input, b.input >= 0), bw)
    assert check(lambda x: lf.prompt_cosine(x, x.flip(0) + 1), features)
    assert check(lambda x: lf.size_loss(x, x.flip(0), b.target_size), rows)
    assert check(lambda x: lf.prompt_consistency(x, x.flip(0) + 1, torch.tensor([1, 2]), valid, queue,
                                                 torch.tensor([[True, False], [True, True]])), features)


# 5. Untrained values, schedules, mode seed, input forms -----------------------------------------------------------

def test_untrained_zero_heads_give_the_values_of_the_definitions():
    b = make_batch(batch=3, steps=6)
    for name in (*CELL_FIELDS, "likelihood_logits", "halt_logits", "row_logits", "col_logits", "features"):
        getattr(b, name).zero_()
    b.desirability, b.reward = torch.zeros_like(b.desirability), torch.zeros(3)
    b.target_size = torch.full((3, 2), 15)
    terms = run(make_loss(), b).terms
    log_c = np.log(0.95 * np.exp(b.preference.double().numpy()) + 0.005)
    mask = (b.target >= 0).numpy()
    leaving = brute_force(lambda i, t, h, w: -math.log(C) - log_c[i, h, w].mean(), mask, 1).mean()
    expected = {"risk": leaving, "ambiguity": math.log(C), "step": (2 - 2 ** -5) / 6, "consistency": math.log(C),
                "bidirectional": 0.0, "z_learning": leaving, "prompt": math.log(3), "reward": 0.0,
                "halt": 6 * math.log(2), "reverse": math.log(C), "size": math.log(30)}
    for name in TERM_NAMES:
        assert terms[name].item() == pytest.approx(expected[name], rel=0.05, abs=1e-5), name
    assert lf.step_cost(torch.full((1, 6), -5.0)).item() == pytest.approx(0.98, abs=0.005)


def test_size_schedule_is_exact_and_a_function_of_progress_alone():
    assert lf.size_weight(0.0, 3.0) == 1.0 and lf.size_weight(3.0, 3.0) == lf.size_weight(9.0, 3.0) == 0.5
    assert lf.content_weight(0.0, 3.0) == 0.5 and lf.content_weight(3.0, 3.0) == lf.content_weight(9.0, 3.0) == 1.0
    assert lf.size_weight(1.5, 3.0) == 0.75 and lf.content_weight(1.5, 3.0) == 0.75
    assert lf.size_weight(0.0, 0.0) == 0.5 and lf.content_weight(0.0, 0.0) == 1.0
    assert lf.size_weight(0.25, 0.5) == lf.content_weight(0.25, 0.5) == 0.75
    steps_per_epoch, step = 101, 137
    resumed = lf.term_weights(LossConfig(), step / steps_per_epoch)
    assert resumed == lf.term_weights(LossConfig(), step / steps_per_epoch)
    assert resumed["size"] == 0.5 + 0.5 * (1 - (step / steps_per_epoch) / 3.0)


@pytest.mark.parametrize("mode", ["full", "seed"])
def test_weights_are_those_of_the_settings_halved_at_first_but_for_the_heads(mode):
    config = LossConfig(mode=mode)
    expected = {name: getattr(config, flag) for name, flag in LAMBDAS.items()} | {"size": 0.5}
    expected |= {name: 0.0 for name in ("halt", "reverse") if mode == "seed"}
    assert lf.term_weights(config, WARM) == pytest.approx(expected)
    early = {name: x if name in ("halt", "reverse") else x / 2 for name, x in expected.items()}
    assert lf.term_weights(config, 0.0) == pytest.approx(early | {"size": 1.0, "ambiguity": 0.0})


def test_ambiguity_is_ramped_in_over_the_epoch_after_the_warm_up():
    weights = [lf.term_weights(LossConfig(), e)["ambiguity"] for e in (0.0, 3.0, 3.5, 4.0, 9.0)]
    assert weights == [0.0, 0.0, 0.025, 0.05, 0.05]


def test_fix4_size_loss_dominates_in_warmup_and_fades():
    ratios = []
    for progress in (0.0, 1.0, 2.0, 3.0):
        b = leaves(make_batch())
        result = run(make_loss(), b, progress)
        result.total.backward()
        ratios.append((b.row_logits.grad.norm() / b.forward.grad.norm()).item())
        weights = lf.term_weights(LossConfig(), progress)
        assert (weights["size"] > weights["consistency"]) == (progress < 1.5)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] / ratios[-1] == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_seed_mode_total_is_the_original_formula_with_exact_divergences(steps):
    original = {"lambda_risk": 1.0, "lambda_ambiguity": 0.0, "lambda_step": 0.1, "lambda_consistency": 1.0,
                "lambda_bidirectional": 0.5, "lambda_z": 0.2, "lambda_prompt": 0.3, "lambda_reward": 0.3}
    b, loss = make_batch(steps=steps), make_loss(mode="seed", **original)
    x = numpy_terms(b, loss)
    formula = (x["risk"] + 0.1 * 1 + x["consistency"] + 0.5 * x["bidirectional"] + 0.2 * x["z_learning"]
               + 0.3 * x["prompt"] - 0.3 * b.reward.mean().item())
    assert run(loss, b).total.item() == pytest.approx(formula + 0.5 * x["size"], abs=1e-4)
    assert run(loss, b, 0.0).total.item() == pytest.approx(0.5 * formula + x["size"], abs=1e-4)


def test_seed_mode_flip_is_blind_to_palindromes_and_to_the_middle_step():
    settings_ = {**only("bidirectional"), "mode": "seed"}
    b = leaves(make_batch(steps=5))
    result = run(make_loss(**settings_), b)
    result.total.backward()
    grads = b.forward.grad.abs().flatten(2).sum((0, 2))
    assert grads[2] == 0 and (grads[[0, 1, 3, 4]] > 0).all()
    mask, log_q = b.target >= 0, lf.log_belief(b.forward.detach(), b.target >= 0)
    whole = lf.bidirectional(log_q, log_q.flip(1), mask, reduce="sum")
    torch.testing.assert_close(result.terms["bidirectional"], whole.mean())
    step = torch.randn(3, 1, 4, 4, C)
    constant, other = step.repeat(1, 5, 1, 1, 1), torch.randn(3, 1, 4, 4, C)
    palindrome = torch.cat([step, other, constant[:, :1], other, step], 1)
    for forward in (constant, palindrome, step):
        flat = SimpleNamespace(**{**vars(make_batch(steps=forward.shape[1])), "forward": forward})
        assert run(make_loss(**settings_), flat).terms["bidirectional"].abs().item() < 1e-6


def test_seed_mode_learns_c_from_the_preference_head_and_sums_over_steps():
    b = leaves(make_batch())
    result = run(make_loss(**only("risk"), mode="seed"), b)
    result.total.backward()
    assert b.preference_logits.grad.abs().sum() > 0
    p, c = numpy_log_softmax(b.forward.detach()), numpy_log_softmax(b.preference_logits.detach())
    floor = np.log(0.95 * np.exp(c) + 0.005)
    expected = 4 * brute_force(lambda i, t, h, w: (np.exp(p[i, t, h, w]) * (p[i, t, h, w] - floor[i, h, w])).sum(),
                               (b.target >= 0).numpy(), 4)
    assert result.terms["risk"].item() == pytest.approx(expected.mean(), abs=1e-5)


def test_seed_mode_has_a_constant_step_a_reward_without_gradient_and_no_auxiliary_heads():
    b = leaves(make_batch())
    result = run(make_loss(mode="seed", lambda_consistency=0.0, lambda_risk=0.0, lambda_bidirectional=0.0,
                           lambda_prompt=0.0, lambda_ambiguity=0.0, lambda_reward=1.0), b)
    result.total.backward()
    assert result.terms["step"].item() == 1 and result.terms["halt"].item() == result.terms["reverse"].item() == 0
    assert result.terms["reward"].item() == pytest.approx(-b.reward.mean().item(), abs=1e-6)
    assert b.halt_logits.grad is None and b.backward.grad is None
    assert b.forward.grad is None or b.forward.grad.count_nonzero() == 0
    assert b.row_logits.grad.abs().sum() > 0


def test_seed_mode_prompt_term_is_the_cosine_with_the_pooled_belief():
    b, loss = make_batch(), make_loss(mode="seed")
    mask = b.target >= 0
    pooled = torch.stack([torch.softmax(b.forward[i], -1)[:, mask[i]].mean((0, 1)) for i in range(3)])
    expected = 1 - F.cosine_similarity(pooled, b.prompt @ loss.prompt_projection.weight.T)
    torch.testing.assert_close(run(loss, b).terms["prompt"], expected.mean(), atol=1e-4, rtol=1e-4)


def test_seed_mode_supervises_the_last_step_only():
    b = leaves(make_batch())
    run(make_loss(**only("consistency"), mode="seed"), b).total.backward()
    assert b.forward.grad[:, :-1].count_nonzero() == 0 and b.forward.grad[:, -1].count_nonzero() > 0


def test_unbatched_call_equals_a_batch_of_one():
    b = make_batch(batch=1)
    b.target[0, 0, 0] = 0  # a colour like any other
    mask = b.target >= 0
    forward, target, added = lf.as_batch(b.forward[0], b.target[0].float(), mask[0])
    assert torch.equal(forward, b.forward) and torch.equal(target, b.target) and torch.equal(added, mask)
    assert torch.equal(lf.as_batch(b.forward[0], b.target[0])[2], mask)
    one = lf.risk(lf.log_belief(forward, added), b.preference, added)
    assert torch.equal(one, lf.risk(lf.log_belief(b.forward, mask), b.preference, mask))
    floats = SimpleNamespace(**{**vars(b), "target": b.target.float()})
    assert torch.equal(run(make_loss(), floats).total, run(make_loss(), b).total)


def test_target_with_fractions_or_of_another_shape_is_refused():
    b = make_batch(batch=1)
    with pytest.raises(ValueError, match="fractions"):
        lf.as_batch(b.forward[0], b.target[0] + 0.5)
    with pytest.raises(ValueError, match="fractions"):
        run(make_loss(), SimpleNamespace(**{**vars(b), "target": b.target + 0.5}))
    with pytest.raises(ValueError, match="same B, H, W"):
        lf.as_batch(b.forward[0], b.target[0, :2])
