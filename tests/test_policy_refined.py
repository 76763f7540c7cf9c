"""The refining agent: advantages, gradient reach, and a bandit in which the policy must climb a known reward."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import reward_shaping as rs
from config import PolicyConfig, RewardConfig
from human_rl_agent import LOG_STD_HIGH
from policy_refined import PolicyRefinedAgent, joined_terms, leave_one_out_advantage

DP, DC, NF, D = 6, 3, 5, 4
NAN = float("nan")


@dataclass
class ToyPrompt:
    embedding: Tensor
    control: Tensor


def make(seed: int = 0, k: int = 4, **kw) -> PolicyRefinedAgent:
    torch.manual_seed(seed)
    return PolicyRefinedAgent(PolicyConfig(action_dim=k, **kw), DP, DC, NF, feature_dim=D)


def toy_prompt(batch: int = 5, seed: int = 1) -> tuple[ToyPrompt, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(batch, n, generator=generator) for n in (DP, DC, NF))
    embedding, control, features = draw
    return ToyPrompt(embedding, control), features


def propose(agent: PolicyRefinedAgent, num_samples: int = 4, seed: int = 2, batch: int = 5, **kw):
    prompt, features = toy_prompt(batch)
    return prompt, agent.propose(prompt, features, num_samples, torch.Generator().manual_seed(seed), **kw)


def toy_next_state(agent, prompt, proposal) -> Tensor:
    refined = agent.refine(prompt.embedding, proposal)
    generator = torch.Generator().manual_seed(9)
    change = (refined - prompt.embedding) @ torch.randn(DP, D, generator=generator)
    return agent.next_state(proposal, refined, change)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# 1. Advantages


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=6), st.floats(-1, 1, width=32))
def test_advantage_is_the_reward_minus_the_mean_of_the_others(rewards, shift):
    column = torch.tensor(rewards)[:, None]
    got = leave_one_out_advantage(column, torch.full((1,), 0.3))[:, 0]
    others = [sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i in range(len(rewards))]
    expected = torch.tensor([r - o for r, o in zip(rewards, others, strict=True)])
    assert torch.allclose(got, expected, atol=1e-5)
    assert abs(float(got.sum())) < 1e-5
    assert torch.allclose(leave_one_out_advantage(column + shift, torch.zeros(1))[:, 0], got, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([NAN, float("inf"), -float("inf")]), st.floats(0, 1),
       st.integers(0, 999))  # fmt: skip
def test_advantage_equals_loops_whatever_is_scorable(groups, batch, unscorable, share, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, value = torch.rand(groups, batch, generator=generator), torch.rand(batch, generator=generator)
    rewards = (4 * rewards).round() / 4  # ties happen
    rewards[torch.rand(groups, batch, generator=generator) < share] = unscorable
    got = leave_one_out_advantage(rewards, value)
    for b in range(batch):
        known = [g for g in range(groups) if rewards[g, b].isfinite()]
        for g in range(groups):
            others = [float(rewards[k, b]) for k in known if k != g]
            baseline = sum(others) / len(others) if others else float(value[b])
            expected = float(rewards[g, b]) - baseline if g in known else 0.0
            assert float(got[g, b]) == pytest.approx(expected, abs=1e-6)
        if len({float(rewards[g, b]) for g in known}) == 1 < len(known):
            assert torch.equal(got[:, b], torch.zeros(groups))


@pytest.mark.parametrize("constant", [0.0, 0.3, -1 / 3, 1e-4])
def test_equal_rewards_have_advantage_exactly_0(constant):
    got = leave_one_out_advantage(torch.full((7, 3), constant), torch.ones(3))
    assert torch.equal(got, torch.zeros(7, 3))


def test_unscorable_rewards_get_0_and_enter_no_baseline():
    rewards = torch.tensor([[1.0, NAN, 0.5, 0.7], [NAN, NAN, 0.25, 0.7], [0.4, NAN, float("inf"), 0.7]])
    got = leave_one_out_advantage(rewards, torch.tensor([9.0, 9.0, 9.0, 9.0]))
    assert torch.allclose(got[:, 0], torch.tensor([0.6, 0.0, -0.6]))
    assert torch.equal(got[:, 1], torch.zeros(3))
    assert torch.allclose(got[:, 2], torch.tensor([0.25, -0.25, 0.0]))
    assert torch.equal(got[:, 3], torch.zeros(3))


def test_reward_alone_in_its_group_is_compared_with_the_value():
    value = torch.tensor([0.25, -0.5], requires_grad=True)
    got = leave_one_out_advantage(torch.tensor([[1.0, 0.5]]), value)
    assert torch.allclose(got, torch.tensor([[0.75, 1.0]])) and not got.requires_grad
    lonely = leave_one_out_advantage(torch.tensor([[1.0, 0.5], [NAN, 0.1]]), value)
    assert torch.allclose(lonely, torch.tensor([[0.75, 0.4], [0.0, -0.4]]))


# 2. Refinement


def test_refine_equals_the_written_formula_and_its_member():
    agent = make(action_scale=0.3)
    prompt, proposal = propose(agent)
    with torch.no_grad():
        agent.basis.mul_(torch.rand(4, 1) + 0.5)
        refined = agent.refine(prompt.embedding, proposal)
    for g in range(4):
        for b in range(5):
            u, alpha = proposal.action[g, b, :4], torch.sigmoid(proposal.action[g, b, 4])
            rows = agent.basis / agent.basis.norm(dim=1, keepdim=True)
            delta = sum(0.3 * torch.tanh(u[j]) * rows[j] for j in range(4))
            p = prompt.embedding[b]
            assert torch.allclose(refined[g, b], (1 - alpha) * p + alpha * (p + delta), atol=1e-6)
    assert torch.equal(agent.refine(prompt.embedding, proposal, 2), refined[2])
    assert torch.equal(agent.gate(proposal), proposal.action[..., 4].sigmoid())


def test_mean_move_of_an_untrained_policy_leaves_the_prompt_bit_equal():
    agent = make()
    prompt, proposal = propose(agent, num_samples=2, deterministic=True)
    assert torch.equal(agent.refine(prompt.embedding, proposal), prompt.embedding.expand(2, -1, -1))


def test_move_and_gate_are_bounded_at_any_action():
    agent = make(action_scale=0.2)
    prompt, proposal = propose(agent, num_samples=64)
    wild = dataclasses.replace(proposal, action=100 * proposal.action)
    with torch.no_grad():
        length = (agent.refine(prompt.embedding, wild) - prompt.embedding).norm(dim=-1)
        assert length.max() <= 0.2 * 2 + 1e-5  # orthonormal rows: scale * sqrt(k)
        agent.basis.copy_(agent.basis[:1].expand(4, -1))
        length = (agent.refine(prompt.embedding, wild) - prompt.embedding).norm(dim=-1)
        assert 0.4 < length.max() <= 0.2 * 4 + 1e-5
    assert agent.gate(wild).min() >= 0 and agent.gate(wild).max() <= 1


def test_refine_passes_the_gradient_to_the_prompt_unchanged_and_to_the_basis_but_not_to_the_policy():
    agent = make()
    prompt, proposal = propose(agent)
    embedding = prompt.embedding.clone().requires_grad_()
    weight = torch.randn(5, DP)
    (agent.refine(embedding, proposal, 0) * weight).sum().backward()
    assert torch.equal(embedding.grad, weight)
    assert agent.basis.grad.abs().sum(1).min() > 0
    assert all(p.grad is None for p in agent.policy_parameters())


def test_refine_cuts_the_graph_of_an_action_that_has_one():
    agent = make()
    prompt, proposal = propose(agent)
    mean, log_std, _ = agent.augmentor(proposal.state)
    attached = dataclasses.replace(proposal, action=mean + log_std.exp() * torch.randn(4, 5, 5))
    embedding = prompt.embedding.clone().requires_grad_()
    agent.refine(embedding, attached).sum().backward()
    assert torch.equal(embedding.grad, torch.full_like(embedding, 4.0))
    assert agent.basis.grad.abs().sum(1).min() > 0
    assert all(p.grad is None for p in agent.policy_parameters())
    assert not agent.gate(attached).requires_grad


def test_refine_keeps_the_type_of_a_half_precision_prompt():
    agent = make()
    prompt, proposal = propose(agent)
    assert agent.refine(prompt.embedding.bfloat16(), proposal).dtype == torch.bfloat16


def test_state_is_the_normalised_prompt_control_and_features_without_a_graph():
    agent = make()
    prompt, features = toy_prompt()
    prompt.embedding.requires_grad_()
    proposal = agent.propose(prompt, features, 2)
    centred = prompt.embedding - prompt.embedding.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(proposal.state, torch.cat([expected, prompt.control, features], 1), atol=1e-5)
    assert not proposal.state.requires_grad and not proposal.action.requires_grad
    refined = agent.refine(prompt.embedding, proposal)
    after = agent.next_state(proposal, refined, torch.full((2, 5, D), 0.5))
    assert after.shape == (2, 5, DP + DC + NF + D) and not after.requires_grad
    assert torch.allclose(after[1, :, :DP], F.layer_norm(refined[1], (DP,)), atol=1e-6)
    assert torch.equal(after[1, :, DP : DP + DC + NF], proposal.state[:, DP:])
    assert torch.equal(after[..., -D:], torch.full((2, 5, D), 0.5))


# 3. Losses and update


def test_policy_loss_is_minus_scaled_advantage_times_log_density():
    agent = make(entropy_weight=0.01)
    _, proposal = propose(agent)
    rewards = torch.rand(4, 5)
    terms = agent.losses(proposal, rewards)
    raw = leave_one_out_advantage(rewards, torch.zeros(5))
    assert torch.allclose(terms.advantage, raw / raw.square().mean().sqrt(), atol=1e-4)
    density = torch.distributions.Normal(0.0, agent.augmentor.log_std.exp()).log_prob(proposal.action).sum(-1)
    assert torch.allclose(terms.policy, -(terms.advantage * density).mean(), atol=1e-5)
    assert torch.allclose(terms.value, F.smooth_l1_loss(torch.zeros(5), rewards.mean(0)))
    expected = terms.policy + 0.5 * terms.value - 0.01 * terms.entropy
    assert torch.allclose(terms.total, expected, atol=1e-6)
    assert not terms.advantage.requires_grad


def test_each_policy_tensor_moves_within_three_updates_and_nothing_else_gets_gradient():
    agent, planner, qwen = make(), nn.Linear(DP, 3), nn.Linear(7, DP)
    optimizer, before = agent.make_optimizer(), snapshot(agent)
    for k in range(3):
        embedding = qwen(torch.randn(5, 7))
        _, features = toy_prompt()
        proposal = agent.propose(ToyPrompt(embedding, torch.randn(5, DC)), features, 4)
        refined = agent.refine(embedding, proposal)
        after = agent.next_state(proposal, refined, torch.randn(4, 5, D))
        rewards = planner(refined).softmax(-1)[..., 0]
        agent.update(optimizer, agent.losses(proposal, rewards, agent.curiosity_scale(k / 3), after))
    names = {name for name, _ in agent.augmentor.named_parameters(prefix="augmentor")}
    assert len(names) == len(agent.policy_parameters()) > 20
    assert [name for name in names if torch.equal(before[name], agent.state_dict()[name])] == []
    assert torch.equal(before["basis"], agent.basis)
    others = [agent.basis, *planner.parameters(), *qwen.parameters()]
    assert all(p.grad is None for p in others)


def test_language_model_learns_through_the_refined_prompt_even_after_the_policy_stepped():
    agent, planner, qwen = make(), nn.Linear(DP, 3), nn.Linear(7, DP)
    frozen = nn.Linear(7, 7).requires_grad_(False)
    embedding = qwen(frozen(torch.randn(5, 7)))
    _, features = toy_prompt()
    proposal = agent.propose(ToyPrompt(embedding, torch.randn(5, DC)), features, 4)
    refined = agent.refine(embedding, proposal, 0)
    agent.update(agent.make_optimizer(), agent.losses(proposal, torch.rand(4, 5)))
    F.cross_entropy(planner(refined), torch.arange(5) % 3).backward()
    assert qwen.weight.grad.abs().sum() > 0 and agent.basis.grad.abs().sum() > 0
    assert planner.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*frozen.parameters(), *agent.policy_parameters()])


def test_refinement_with_the_higher_reward_becomes_more_likely():
    agent = make()
    _, proposal = propose(agent, num_samples=2, batch=1)
    rewards, optimizer = torch.tensor([[0.4], [-0.1]]), agent.make_optimizer()

    def margin() -> float:
        density = agent.augmentor.log_prob(proposal.action, proposal.state)
        return (density[0] - density[1]).item()

    for sign in (1.0, -1.0):
        before = margin()
        for _ in range(2):
            agent.update(optimizer, agent.losses(proposal, sign * rewards))
        if sign > 0:
            assert margin() > before
            optimizer = agent.make_optimizer()
    assert margin() < before


def test_unscorable_row_changes_neither_losses_nor_gradient():
    agent = make()
    prompt, proposal = propose(agent)
    rewards, after = torch.rand(4, 5), toy_next_state(agent, prompt, proposal)
    rewards[:, 3] = NAN
    after[:, 3] = NAN
    terms = agent.losses(proposal, rewards, 0.1, after)
    keep = [0, 1, 2, 4]
    shorter = dataclasses.replace(proposal, state=proposal.state[keep], action=proposal.action[:, keep])
    expected = agent.losses(shorter, rewards[:, keep], 0.1, after[:, keep])
    assert torch.equal(terms.advantage[:, 3], torch.zeros(4))
    for name in ("total", "policy", "value", "curiosity", "tied", "bonus"):
        assert torch.allclose(getattr(terms, name), getattr(expected, name), atol=1e-6), name
    grads, references = (torch.autograd.grad(t.total, agent.policy_parameters()) for t in (terms, expected))
    for grad, reference in zip(grads, references, strict=True):
        assert torch.allclose(grad, reference, atol=1e-6)


def test_batch_without_a_scorable_reward_is_finite_and_moves_the_entropy_only():
    agent = make()
    _, proposal = propose(agent)
    terms = agent.losses(proposal, torch.full((4, 5), NAN))
    assert terms.policy == 0 and terms.value == 0 and terms.tied == 0
    before = snapshot(agent)
    assert torch.isfinite(agent.update(agent.make_optimizer(), terms))
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"augmentor.log_std"}


def test_non_finite_gradient_skips_the_step_and_changes_nothing():
    agent = make()
    prompt, proposal = propose(agent)
    optimizer = agent.make_optimizer()
    terms = agent.losses(proposal, torch.rand(4, 5), 0.1, toy_next_state(agent, prompt, proposal))
    before = snapshot(agent)
    norm = agent.update(optimizer, dataclasses.replace(terms, total=terms.total * torch.inf))
    assert not torch.isfinite(norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    assert optimizer.state_dict()["state"] == {}
    assert all(p.grad is None for p in agent.parameters())


def test_update_returns_the_whole_norm_and_clips_policy_and_curiosity_apart():
    agent = make()
    prompt, proposal = propose(agent)
    terms = agent.losses(proposal, torch.rand(4, 5), 0.1, toy_next_state(agent, prompt, proposal))
    terms = dataclasses.replace(terms, total=1000 * terms.total)
    grads = torch.autograd.grad(terms.total, agent.policy_parameters(), retain_graph=True)
    before = snapshot(agent.augmentor)
    norm = agent.update(torch.optim.SGD(agent.policy_parameters(), lr=1e-2), terms)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in grads]).norm())
    assert norm > 100
    moved = {name: p.detach() - before[name] for name, p in agent.augmentor.named_parameters()}
    for is_curious in (False, True):
        steps = [step.norm() for name, step in moved.items() if name.startswith("curiosity.") == is_curious]
        assert float(torch.stack(steps).norm()) == pytest.approx(1e-2, rel=1e-3)


def test_one_step_on_the_weighted_gradients_of_parts():
    agent = make()
    prompt, proposal = propose(agent)
    rewards, after = torch.rand(4, 5), toy_next_state(agent, prompt, proposal)
    parts = []
    for rows in (slice(0, 3), slice(3, 5)):
        part = dataclasses.replace(proposal, state=proposal.state[rows], action=proposal.action[:, rows])
        parts.append(agent.losses(part, rewards[:, rows], 0.1, after[:, rows]))
    shares = (0.6, 0.4)
    own = [torch.autograd.grad(p.total, agent.policy_parameters(), retain_graph=True) for p in parts]
    before = snapshot(agent)
    for part, share in zip(parts, shares, strict=True):
        agent.backward(part, share)
    for parameter, *grads in zip(agent.policy_parameters(), *own, strict=True):
        torch.testing.assert_close(parameter.grad, 0.6 * grads[0] + 0.4 * grads[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())  # until the step
    joined = joined_terms(parts, shares)
    assert joined.advantage.shape == (4, 5) and not joined.total.requires_grad
    torch.testing.assert_close(joined.value, 0.6 * parts[0].value + 0.4 * parts[1].value)
    assert torch.isfinite(agent.step(agent.make_optimizer(), joined.averages))
    for name, buffer in (("advantage_scale", agent.advantage_scale), ("surprise", agent.augmentor.curiosity.surprise)):
        mean = 0.6 * parts[0].averages[name] + 0.4 * parts[1].averages[name]
        torch.testing.assert_close(buffer.averages, mean)
    assert all(p.grad is None for p in agent.parameters())


def test_losses_are_pure_until_update_commits_the_running_averages():
    agent = make()
    prompt, proposal = propose(agent)
    rewards, after = torch.rand(4, 5), toy_next_state(agent, prompt, proposal)
    before = snapshot(agent)
    first, second = (agent.losses(proposal, rewards, 0.1, after) for _ in range(2))
    assert torch.equal(first.total, second.total)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    agent.update(agent.make_optimizer(), first)
    for name in ("advantage_scale.averages", "augmentor.curiosity.surprise.averages"):
        assert not torch.equal(agent.state_dict()[name], before[name]), name


def test_ties_do_not_shrink_the_scale_of_advantages():
    agent = make()
    optimizer = agent.make_optimizer()
    _, proposal = propose(agent)
    agent.update(optimizer, agent.losses(proposal, torch.rand(4, 5)))
    scale = agent.advantage_scale.averages.clone()
    for _ in range(5):
        terms = agent.losses(proposal, torch.full((4, 5), 0.25))
        assert terms.tied == 1 and terms.policy == 0
        agent.update(optimizer, terms)
    assert torch.equal(agent.advantage_scale.averages, scale)


def test_tied_counts_the_groups_of_two_or_more_equal_rewards():
    agent = make()
    _, proposal = propose(agent, num_samples=2, batch=4)
    rewards = torch.tensor([[0.5, 0.5, 0.5, NAN], [0.5, 0.25, NAN, NAN]])  # tied, not tied, alone, unscorable
    assert agent.losses(proposal, rewards).tied == 0.5


def test_update_keeps_the_spread_of_actions_in_range():
    agent = make(rl_lr=0.5, entropy_weight=10.0)
    optimizer = agent.make_optimizer()
    for _ in range(3):
        _, proposal = propose(agent)
        agent.update(optimizer, agent.losses(proposal, torch.zeros(4, 5)))
    assert torch.equal(agent.augmentor.log_std, torch.full((5,), LOG_STD_HIGH))


def test_curiosity_enters_the_advantage_only_and_fades_over_three_epochs():
    agent = make(curiosity_weight=0.1)
    prompt, proposal = propose(agent)
    rewards, after = torch.rand(4, 5), toy_next_state(agent, prompt, proposal)
    off, on = agent.losses(proposal, rewards, 0.0, after), agent.losses(proposal, rewards, 0.5, after)
    assert torch.equal(off.value, on.value) and torch.equal(off.curiosity, on.curiosity)
    assert not torch.allclose(off.advantage, on.advantage)
    assert torch.allclose(off.advantage, agent.losses(proposal, rewards).advantage)
    scales = [agent.curiosity_scale(e) for e in (0.0, 1.5, 3.0, 30.0)]
    assert scales == pytest.approx([0.1, 0.05, 0.0, 0.0])


def test_training_the_curiosity_module_does_not_disturb_the_policy():
    results = []
    for watched in (False, True):
        agent = make()
        optimizer = agent.make_optimizer()
        for k in range(3):
            prompt, proposal = propose(agent, seed=k)
            rewards = proposal.action[..., 0].tanh()
            after = toy_next_state(agent, prompt, proposal) if watched else None
            agent.update(optimizer, agent.losses(proposal, rewards, 0.0, after))
        results.append(snapshot(agent))
    for name in results[0]:
        if ".curiosity." not in name:
            assert torch.equal(results[0][name], results[1][name]), name


def test_losses_are_single_precision_under_autocast():
    agent = make()
    nn.init.normal_(agent.augmentor.mean_head.weight)
    prompt, proposal = propose(agent)
    rewards, after = torch.rand(4, 5), toy_next_state(agent, prompt, proposal)
    expected = agent.losses(proposal, rewards, 0.1, after)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = agent.losses(proposal, rewards, 0.1, after)
        refined = agent.refine(prompt.embedding, proposal)
        assert torch.equal(propose(agent)[1].action, proposal.action)
    assert got.total.dtype == refined.dtype == torch.float32
    assert torch.equal(got.total, expected.total)
    assert torch.equal(refined, agent.refine(prompt.embedding, proposal))


def test_interrupted_training_continues_bit_equal():
    def advance(agent, optimizer, seeds):
        for seed in seeds:
            prompt, proposal = propose(agent, seed=seed)
            rewards = proposal.action[..., 0].tanh()
            after = toy_next_state(agent, prompt, proposal)
            agent.update(optimizer, agent.losses(proposal, rewards, 0.1, after))

    straight = make()
    optimizer = straight.make_optimizer()
    advance(straight, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    advance(straight, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make(seed=77)
    resumed.load_state_dict(saved["model"])
    optimizer = resumed.make_optimizer()
    optimizer.load_state_dict(saved["optimizer"])
    advance(resumed, optimizer, range(3, 6))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_no_op_reward_is_exactly_0_for_a_planner_with_dropout():
    torch.manual_seed(0)
    agent = make()
    planner = nn.Sequential(nn.Linear(DP, 64), nn.Dropout(0.5), nn.Linear(64, 9 * 10)).eval()
    prompt, proposal = propose(agent, num_samples=1, deterministic=True)
    size, target = torch.full((5, 2), 3), torch.randint(0, 10, (5, 3, 3))

    def potential(embedding):
        grid = planner(embedding).view(-1, 3, 3, 10).argmax(-1)
        return rs.potentials(grid, size, target, size, target, size, RewardConfig())

    with torch.no_grad():
        before, after = potential(prompt.embedding), potential(agent.refine(prompt.embedding, proposal, 0))
    assert torch.equal(rs.shaping_reward(before, after), torch.zeros(5))


# 4. Bandit: prompts must move towards the colour that the features name


class Bandit:
    """A differentiable planner: softmax over 8 answers of 20 * p' @ E; the reward is the gain of the right one."""

    def __init__(self, seed: int, num_samples: int):
        torch.manual_seed(seed)
        self.agent = PolicyRefinedAgent(PolicyConfig(action_dim=4, rl_lr=1e-2, rl_samples=num_samples), 4, 1, 8)
        self.answers = F.normalize(torch.randn(8, 4), dim=-1)
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, label: Tensor, embedding: Tensor, **kw):
        prompt = ToyPrompt(embedding, torch.zeros(len(label), 1))
        return self.agent.propose(prompt, F.one_hot(label, 8).float(), self.agent.config.rl_samples, **kw)

    def reward(self, label: Tensor, embedding: Tensor, proposal) -> Tensor:
        def right(p):
            return (20 * p @ self.answers.T).softmax(-1).gather(-1, label.expand(p.shape[:-1])[..., None])[..., 0]

        with torch.no_grad():
            return right(self.agent.refine(embedding, proposal)) - right(embedding)

    def train(self, updates: int, reshape=lambda r: r) -> float:
        """Return the mean gain of the mean move after training on reshaped rewards."""
        optimizer = self.agent.make_optimizer()
        for _ in range(updates):
            label = torch.randint(8, (16,), generator=self.generator)
            embedding = 0.05 * torch.randn(16, 4, generator=self.generator)
            proposal = self.propose(label, embedding, generator=self.generator)
            rewards = reshape(self.reward(label, embedding, proposal))
            self.agent.update(optimizer, self.agent.losses(proposal, rewards))
        label = torch.arange(8)
        embedding = torch.zeros(8, 4)
        proposal = self.propose(label, embedding, deterministic=True)
        return float(self.reward(label, embedding, proposal).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_policy_climbs_a_known_reward_and_descends_its_negative(seed):
    assert Bandit(seed, 8).train(0) == 0
    assert Bandit(seed, 8).train(200) >= 0.45
    assert Bandit(seed, 8).train(100, lambda r: -r) < -0.05


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_constant_reward_leaves_the_mean_move_where_it_was(constant):
    assert Bandit(0, 8).train(50, lambda r: torch.full_like(r, constant)) == 0


def test_value_baseline_lets_a_single_sample_learn():
    assert Bandit(0, 1).train(200) > 0.25


def test_unscorable_rewards_do_not_stop_the_climb():
    def drop(rewards: Tensor) -> Tensor:
        rewards = rewards.clone()
        rewards[::3, ::2] = NAN
        return rewards

    assert Bandit(0, 8).train(100, drop) > 0.3
