"""Show that the tests notice faults: put one at a time into a copy of the project and run the tests that guard it.

    python benchmarks/mutations.py [--only NAME ...] [--list] [--skip-baseline] [--seconds 300]

Each fault replaces a text that occurs exactly once in its file; the tests named with it must then fail. First all of
these tests have to pass on the untouched copy. Exits with 1 when a fault survives, when none of its tests failed within
--seconds, when its tests could not even be collected, or when its text is not found exactly once. The project itself
is not touched: the copy lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.py", "tests/*.py", "benchmarks/*.py", "docs/*.md", "*.md", "*.toml", "*.txt")


class Fault(NamedTuple):
    """A deliberate fault: in `file` the text `old`, which occurs once, becomes `new`; `tests` have to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a fault: killed (by the test named), survived, timed out, or broken (no test could run)."""

    fault: Fault
    status: str
    killer: str
    seconds: float


LOSS = ("tests/test_loss_function.py",)
REWARD = ("tests/test_reward_shaping.py",)
POLICY = ("tests/test_human_rl_agent.py",)
REFINE = ("tests/test_policy_refined.py",)
MEMORY = ("tests/test_solver2.py",)
QUERY = ("tests/test_arc_data.py::test_a_query_never_reads_its_own_pair",
         "tests/test_arc_data.py::test_changing_a_pairs_output_changes_nothing_that_its_own_query_reads")  # fmt: skip
STEP = ("tests/test_driver.py::test_policy_does_not_step_on_a_nonfinite_gradient",)
LEAK = ("tests/test_evaluate.py::test_predict_takes_a_query_only_and_is_deterministic",)
REPAIR = ("tests/test_demo_prior.py::test_repairs_change_one_region_of_the_first_candidate",
          "tests/test_demo_prior.py::test_repairs_are_bounded_new_and_likeliest_first")  # fmt: skip
EVIDENCE = ("tests/test_candidate_judge.py::test_evidence_is_the_same_under_every_augmentation",)
VIEW = ("tests/test_prior_cache.py::test_cached_values_equal_the_transformed_ones_under_every_view",
        "tests/test_prior_cache.py::test_batched_preferences_hold_each_prior_and_are_uniform_outside",
        "tests/test_prior_cache.py::test_batched_confidences_and_candidates_are_those_of_each_context")  # fmt: skip
PRIOR = ("tests/test_demo_prior.py::test_evidence_of_a_demonstration_comes_from_the_others_alone",
         "tests/test_demo_prior.py::test_a_table_equals_counts_by_hand")  # fmt: skip
OWN_WEIGHTS = ("tests/test_grid_accuracy_loss.py::test_backward_planner_sends_gradient_to_itself_and_the_prompt_only",)
BACKWARD = ("tests/test_grid_accuracy_loss.py::test_backward_plan_covers_both_canvases_and_ends_at_the_input",)
JUDGE = ("tests/test_arc_system.py::test_agreement_is_that_of_the_backward_plans_last_belief_inside_the_input",
         "tests/test_arc_system.py::test_reverse_component_counts_the_backward_planners_way_to_the_input",
         "tests/test_arc_system.py::test_reward_of_the_trained_refinement_is_the_change_of_its_potential")  # fmt: skip
FORWARD = ("tests/test_arc_system.py::test_target_reaches_the_backward_beliefs_and_nothing_else",)
ATTEMPTS = ("tests/test_evaluate.py::test_two_attempts_by_hand",)
FINITE = ("tests/test_claims.py::test_fix7_nonfinite_step_is_skipped_and_parameters_stay_finite",)
RESUME = ("tests/test_claims.py::test_resumed_run_equals_uninterrupted_run",)
SIZES = ("tests/test_arc_data.py::test_pairs_come_once_per_epoch_whatever_the_size_changes_to",)
SIZE_RESUME = ("tests/test_driver.py::test_resume_with_other_batch_sizes_trains_on_every_pair_once",
               "tests/test_driver.py::test_batch_size_that_changes_within_an_epoch_survives_a_kill")  # fmt: skip
OPTIMIZERS = ("tests/test_arc_system.py::test_the_device_decides_how_an_optimizer_computes",)
LARGE_BATCHES = ("tests/test_arc_data.py::test_large_batches_are_filled",)
COMPILED = ("tests/test_grid_accuracy_loss.py::test_compiled_blocks_compute_the_same_with_few_graphs",)
RATE_RESUME = ("tests/test_driver.py::test_resume_with_another_learning_rate_uses_it",)
PARTS = ("tests/test_memory_ladder.py::test_gradients_of_parts_add_up_to_those_of_the_batch",)
RANKING = ("tests/test_candidate_judge.py",)
DRAWS = ("tests/test_memory_ladder.py::test_parts_draw_numbers_of_their_own",)
NO_TRACE = ("tests/test_memory_ladder.py::test_step_that_does_not_fit_leaves_no_trace",)
RUNG = ("tests/test_memory_ladder.py::test_resume_on_a_rung_is_exact",)
BEST = ("tests/test_driver.py::test_best_weights_are_those_of_the_best_validation_whatever_the_training_says",)

FAULTS = (
    # The loss: masks
    Fault("mask multiplies logits", "loss_function.py",
          "torch.log_softmax(torch.where(cells, planes, 0.0), -3)",
          "torch.log_softmax(planes * cells, -3)", LOSS),
    Fault("mask multiplies values", "loss_function.py",
          "(torch.where(mask, value, 0.0) * weight)",
          "(value * mask * weight)", LOSS),
    Fault("mask multiplies weights", "loss_function.py",
          "if weight is None else torch.where(mask, weight, 0.0)",
          "if weight is None else weight * mask", LOSS),
    Fault("mask adds -1e9", "loss_function.py",
          "torch.log_softmax(torch.where(cells, planes, 0.0), -3)",
          "torch.log_softmax(planes - 1e9 * ~cells, -3)", LOSS),
    Fault("mask fills half precision with -1e9", "loss_function.py",
          "planes = planar(full_precision(logits)).movedim(-1, -3)",
          "planes = planar(full_precision(logits.masked_fill(~_over_steps(mask, logits.dim() - 1)[..., None], -1e9)))"
          ".movedim(-1, -3)", LOSS),
    Fault("mean over the whole canvas", "loss_function.py",
          "/ weight.sum((-2, -1)).clamp_min(1e-12)",
          "/ (value.shape[-2] * value.shape[-1])", LOSS),
    # The loss: terms
    Fault("preference C chases the belief", "loss_function.py",
          "preference if learn_preference else preference.detach()",
          "preference", LOSS),
    Fault("desirability target not detached", "loss_function.py",
          "full_precision(preference.detach()) + full_precision(desirability.detach())",
          "full_precision(preference) + full_precision(desirability)", LOSS),
    Fault("KL arguments swapped", "loss_function.py",
          "cell_mean(kl_divergence(log_q, log_c), mask)",
          "cell_mean(kl_divergence(log_c, log_q), mask)", LOSS),
    Fault("entropy of the mixture for JS", "loss_function.py",
          "return (0.5 * (expectation(p, excess_p) + expectation(q, excess_q))).clamp_min(0)",
          "return entropy(torch.logaddexp(log_p, log_q) - math.log(2))", LOSS),
    Fault("halting shifted by one", "loss_function.py",
          "log_reached = F.pad(F.logsigmoid(-halt_logits).cumsum(1)[:, :-1], (1, 0))",
          "log_reached = F.logsigmoid(-halt_logits).cumsum(1)", LOSS),
    Fault("halting ignores the size", "loss_function.py",
          ".flatten(2).all(-1) & size_right[:, None]",
          ".flatten(2).all(-1)", LOSS),
    Fault("backward plan off by one", "loss_function.py",
          "trajectory.backward[:, 1:, :height, :width]",
          "trajectory.backward[:, :-1, :height, :width]", LOSS),
    Fault("wrong end of the backward plan meets the input", "loss_function.py",
          "start = trajectory.backward[:, 0, :rows, :cols]",
          "start = trajectory.backward[:, -1, :rows, :cols]", LOSS),
    Fault("hard cells not weighted", "loss_function.py",
          "weight = hard_weights(cells.right[:, -1], cells.mask, self.config.hard_epsilon)",
          "weight = None", LOSS),
    Fault("size schedule inverted", "loss_function.py",
          "return 0.5 + 0.5 * _remaining(progress, warmup)",
          "return 1.0 - 0.5 * _remaining(progress, warmup)", LOSS),
    Fault("queue holds negatives of the own task", "loss_function.py",
          "past, kept & ~same)",
          "past, kept.expand_as(same))", LOSS),
    Fault("same task in the batch is a negative", "loss_function.py",
          "positive = own | ((task_slot[:, None] == task_slot[None]) & (task_slot[:, None] > 0) & valid[None])",
          "positive = own", LOSS),
    Fault("reward term reversed", "loss_function.py",
          "return -(reward.detach() + (surrogate - surrogate.detach()))",
          "return reward.detach() + (surrogate - surrogate.detach())", LOSS),
    # The reward
    Fault("reward reversed", "reward_shaping.py",
          "return after.total - before.total",
          "return before.total - after.total", REWARD),
    Fault("accuracy over the target's area alone", "reward_shaping.py",
          "either_BHW = (prediction_BHW != PAD) | (target_BHW != PAD)",
          "either_BHW = target_BHW != PAD", REWARD),
    Fault("backward agreement not gated", "reward_shaping.py",
          "reverse_B = reverse_agreement.float() * accuracy_B",
          "reverse_B = reverse_agreement.float()", REWARD),
    # The policy
    Fault("sample not detached in its density", "human_rl_agent.py",
          "standard = (action.detach().float() - mean_BA)",
          "standard = (action.float() - mean_BA)", POLICY),
    Fault("density at the squashed action", "human_rl_agent.py",
          "standard = (action.detach().float() - mean_BA)",
          "standard = (torch.cat([self.action_scale * action[..., :-1].tanh(), action[..., -1:].sigmoid()], -1)"
          ".detach() - mean_BA)", POLICY),
    Fault("curiosity may choose easy features", "human_rl_agent.py",
          "(forecast_GBF - next_phi_GBF.detach())",
          "(forecast_GBF - next_phi_GBF)", POLICY),
    Fault("move not detached in the refined prompt", "policy_refined.py",
          "u, v = action.detach().float().split([self.config.action_dim, 1], dim=-1)",
          "u, v = action.float().split([self.config.action_dim, 1], dim=-1)", REFINE),
    Fault("baseline includes the reward itself", "policy_refined.py",
          "others_GB = (rewards - mean_B) * (count_B / (count_B - 1).clamp(min=1))",
          "others_GB = rewards - mean_B", REFINE),
    Fault("policy descends", "policy_refined.py",
          "policy = -_masked_mean(advantage_GB * log_prob_GB, valid_GB, share)",
          "policy = _masked_mean(advantage_GB * log_prob_GB, valid_GB, share)", REFINE),
    Fault("value baseline not detached", "policy_refined.py",
          "torch.where(count_B > 1, others_GB, rewards - value.detach())",
          "torch.where(count_B > 1, others_GB, rewards - value)", REFINE),
    Fault("policy steps on a non-finite gradient", "policy_refined.py",
          "if torch.isfinite(norm):",
          "if norm is not None:", REFINE),
    Fault("policy steps on a non-finite gradient in training", "trainloop_complete_with_fixes.py",
          "if result.policy is not None and math.isfinite(others[1]):",
          "if result.policy is not None:", STEP),
    # The memory
    Fault("own task recalled", "solver2.py",
          'usable = mirror["task"] != to_device(self._identify("task", task_ids), features.device)[:, None]',
          "usable = torch.ones_like(similarity, dtype=torch.bool)", MEMORY),
    Fault("threshold never updated", "solver2.py",
          "if seen.size:",
          "if seen.size < 0:", MEMORY),
    Fault("admission by the new statistics", "solver2.py",
          "        return accepted\n\n    def keep(",
          "        return finite & (np.asarray(exact, dtype=bool) | (np.where(finite, score, -np.inf) >= self.theta))"
          "\n\n    def keep(", MEMORY),
    Fault("threshold out of reach", "solver2.py",
          "return min(max(mean + self.kappa * variance**0.5, self.low), self.high)",
          "return max(mean + self.kappa * variance**0.5, self.low) * 1.1", MEMORY),
    Fault("Z decay reversed", "solver2.py",
          "(1.0 - rate) * z + rate * total / count.clamp_min(1)",
          "rate * z + (1.0 - rate) * total / count.clamp_min(1)", MEMORY),
    Fault("Z reward reversed", "solver2.py",
          "total = right_count * unit.exp() + wrong_count * (-unit).exp()",
          "total = right_count * (-unit).exp() + wrong_count * unit.exp()", MEMORY),
    Fault("Z colours in and out swapped", "solver2.py",
          "return table[batch[:, None, None], self._translate(c_in, original)]",
          "return table[:, :-1].mT[batch[:, None, None], self._translate(c_in, original).clamp_max(9)]", MEMORY),
    Fault("Z table outside the checkpoint", "solver2.py",
          'self.register_buffer("z", torch.ones(num_tasks + 1, NUM_COLORS + 1, NUM_COLORS))',
          'self.register_buffer("z", torch.ones(num_tasks + 1, NUM_COLORS + 1, NUM_COLORS), persistent=False)', MEMORY),
    Fault("running averages outside the checkpoint", "human_rl_agent.py",
          'self.register_buffer("averages", torch.zeros(2))',
          'self.register_buffer("averages", torch.zeros(2), persistent=False)', POLICY),
    Fault("memory not restored by a resume", "trainloop_complete_with_fixes.py",
          '    run.system.memory.load_state_dict(payload["memory"])\n',
          "", RESUME),
    Fault("lessons not restored by a resume", "trainloop_complete_with_fixes.py",
          '    run.system.lessons.load_state_dict(payload["lessons"])\n',
          "", RESUME),
    Fault("a task recalls its own lessons", "solver2.py",
          'usable = mirror["task"] != to_device(self._identify("task", task_ids), key.device)[:, None]',
          'usable = mirror["task"] != torch.full((len(key), 1), -1, device=key.device)', MEMORY),
    Fault("pairs come again after another batch size", "arc_data.py",
          "gone = {pair for batch in done for pair in batch}",
          "gone = set()", SIZES),
    Fault("batches under another size forgotten by a resume", "trainloop_complete_with_fixes.py",
          "self.segments = [Segment(tuple(packed), taken) for packed, taken in self.segments]",
          "self.segments = []", SIZE_RESUME),
    Fault("learning rate of a resume undone by the checkpoint", "arc_system.py",
          "groups = [{**group, **now} for",
          "groups = [{**now, **group} for", RATE_RESUME),
    Fault("a checkpoint decides how an optimizer computes", "arc_system.py",
          'return *settings, *(key for key in ("foreach", "fused") if key in group)',
          "return settings", OPTIMIZERS),
    # Batches and blocks
    Fault("large batches are left half empty", "arc_data.py",
          "spare = max(batch_cells - _SMALL_BATCH, 0) // 24",
          "spare = 0", LARGE_BATCHES),
    Fault("compiled blocks leave out what the prompt shifts", "grid_accuracy_loss.py",
          "flat = (y.flatten(1, -2) for y in (inside, scale, shift))",
          "flat = (y.flatten(1, -2) for y in (inside, scale, 0 * shift))", COMPILED),
    # Too little memory
    Fault("parts of a batch count as whole batches", "trainloop_complete_with_fixes.py",
          "total if share == 1 else share * total",
          "total", PARTS),
    Fault("the judge learns that every candidate is right", "arc_system.py",
          "ranking_loss(logits, right)",
          "ranking_loss(logits, exists)", RANKING),
    Fault("lessons point away from the right candidate", "arc_system.py",
          "torch.where(told[:, None], change.float(), 0.0)",
          "torch.where(told[:, None], -change.float(), 0.0)", RANKING),
    Fault("gradients of a part that failed stay", "trainloop_complete_with_fixes.py",
          "        drop_gradients(run.optimizers)  # here,",
          "        # here,", NO_TRACE),
    Fault("parts draw the same numbers", "trainloop_complete_with_fixes.py",
          "part = () if moment.part is None else (moment.part,)",
          "part = ()", DRAWS),
    Fault("rung forgotten by a resume", "trainloop_complete_with_fixes.py",
          "self.rung = Rung(**self.rung) if isinstance(self.rung, dict) else self.rung",
          "self.rung = Rung()", RUNG),
    # What may be seen
    Fault("pair among its own demonstrations", "arc_data.py",
          "for i, pair in enumerate(task.train) if i != p)",
          "for i, pair in enumerate(task.train))", QUERY),
    Fault("answer shown to the prompt", "arc_data.py",
          "query = Query(tuple(contexts), *map(torch.from_numpy, arrays))",
          "shown = zip(contexts, answers or (), strict=bool(answers))\n"
          "    query = Query(tuple(dataclasses.replace(c, demonstrations=(*c.demonstrations, (c.input, a)))"
          " for c, a in shown) or tuple(contexts), *map(torch.from_numpy, arrays))", LEAK),
    Fault("target reaches the forward plan", "arc_system.py",
          "trajectory = self.plan(scene, reading, embedding)",
          "hidden = reading.hidden + (grid[..., None] == 1)\n"
          "        told = Reading(hidden, reading.prior_logits, reading.read_logits, reading.mask)\n"
          "        trajectory = self.plan(scene, told, embedding)", FORWARD),
    Fault("prior judges itself on what it has counted", "demo_prior.py",
          "counts = np.concatenate([total - own, total], 1).astype(np.float64)",
          "counts = np.concatenate([total + 0 * own, total], 1).astype(np.float64)", PRIOR),
    Fault("repair may be a candidate already", "demo_prior.py",
          "        if grid.tobytes() not in known:", "        if grid.tobytes() != first.tobytes():", REPAIR),
    Fault("repair changes all that differs", "demo_prior.py",
          "np.where(labels == number, other, first)", "np.where(labels > 0, other, first)", REPAIR),
    Fault("judge cannot tell repaired candidates", "prior_cache.py",
          "name.startswith(REPAIRED)", "not name", EVIDENCE),
    Fault("preference keeps its colours in a view", "prior_cache.py",
          "cells[: int(shape[0]), : int(shape[1])] = context.augmentation.apply_scores(plain.log_prob)",
          "cells[: int(shape[0]), : int(shape[1])] = context.augmentation.apply_spatial(plain.log_prob)", VIEW),
    Fault("candidates keep their colours in a view", "prior_cache.py",
          "seen = context.augmentation.apply(np.stack(", "seen = context.augmentation.apply_spatial(np.stack(", VIEW),
    # Planning, judging, choosing
    Fault("backward plan not turned round", "grid_accuracy_loss.py",
          "return self.backward_planner(reading, prompt)[0].flip(1)",
          "return self.backward_planner(reading, prompt)[0]", BACKWARD),
    Fault("way back trains what the forward planner reads with", "grid_accuracy_loss.py",
          "        with torch.no_grad():\n            back = query.reversed(",
          "        if True:\n            back = query.reversed(", OWN_WEIGHTS),
    Fault("wrong end of the backward plan is judged", "arc_system.py",
          "return cells_union(backward[:, 0].argmax(-1)",
          "return cells_union(backward[:, -1].argmax(-1)", JUDGE),
    Fault("reward compares with the plan without memory", "arc_system.py",
          "change = torch.stack([shaping_reward(rated[1], rated[m]) for m in tried])",
          "change = torch.stack([shaping_reward(rated[2], rated[m]) for m in tried])", JUDGE),
    Fault("second attempt repeats the first", "evaluate.py",
          "    second = torch.where(alike[:, None, None], next_best, second)\n",
          "", ATTEMPTS),
    Fault("step taken on a non-finite gradient", "trainloop_complete_with_fixes.py",
          "taken, ratio = math.isfinite(found) and math.isfinite(others[0]), None",
          "taken, ratio = True, None", FINITE),
    Fault("skipped step leaves traces", "trainloop_complete_with_fixes.py",
          "        if update.taken:\n            run.average.update()",
          "        if update is not None:\n            run.average.update()", FINITE),
    Fault("best weights by training accuracy", "trainloop_complete_with_fixes.py",
          'rank = (scores["exact"], scores["cells_predicted"])',
          'rank = (scores["outputs"] * (1 - means(run.state.epoch_sums)["mask"]), scores["cells_predicted"])', BEST),
    Fault("best weights by training loss", "trainloop_complete_with_fixes.py",
          'rank = (scores["exact"], scores["cells_predicted"])',
          'rank = (scores["outputs"] / (1 + means(run.state.epoch_sums)["loss"]), scores["cells_predicted"])', BEST),
)  # fmt: skip


# 1. The list and the copy --------------------------------------------------------------------------------------------


def problems(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """Return what is wrong with a list: names that come twice, texts not found exactly once, tests not there."""
    found = [f"{name}: named twice" for name in {f.name for f in faults} if sum(f.name == name for f in faults) > 1]
    for fault in faults:
        path = root / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1 or fault.old == fault.new:
            found.append(f"{fault.name}: its text occurs {count} times in {fault.file}, expected once, and a change")
        for test in fault.tests:
            file, _, name = test.partition("::")
            if not (root / file).is_file():
                found.append(f"{fault.name}: no file {file}")
            elif name and not re.search(rf"^def {name}\(", (root / file).read_text(encoding="utf-8"), re.MULTILINE):
                found.append(f"{fault.name}: no test {test}")
        if not fault.tests:
            found.append(f"{fault.name}: no tests")
    return found


def copy_project(folder: Path, root: Path = ROOT) -> Path:
    """Copy what the tests need to `folder` and return it."""
    for pattern in COPIED:
        for path in root.glob(pattern):
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    # By hash: a changed file must not be taken for the compiled one because its size and second are the same.
    compileall.compile_dir(folder, maxlevels=0, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


# 2. Running ----------------------------------------------------------------------------------------------------------


def run_tests(folder: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Return pytest's exit code, None when it took longer than `seconds`, and what it printed; stops at a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=seconds)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
        process.wait()


def failed_test(printed: str) -> str:
    """Return the first test that pytest reports as failed, or whose fixtures failed; '' when there is none."""
    match = re.search(r"^(?:FAILED|ERROR) (\S+?::\S.*?)(?: - .*)?$", printed, re.MULTILINE)
    return match[1] if match else ""


def try_fault(fault: Fault, folder: Path, seconds: float) -> Outcome:
    """Return what becomes of a fault in the copy, which is whole again afterwards."""
    path = folder / fault.file
    original, began = path.read_text(encoding="utf-8"), time.monotonic()
    path.write_text(original.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, printed = run_tests(folder, fault.tests, seconds)
    finally:
        path.write_text(original, encoding="utf-8")
    killer = failed_test(printed)
    status = "timed out" if code is None else "survived" if code == 0 else "killed" if killer else "broken"
    if status == "broken":
        print(printed[-2000:])
    return Outcome(fault, status, killer, time.monotonic() - began)


def check_baseline(faults: Sequence[Fault], folder: Path) -> bool:
    """Return whether the untouched copy passes all tests that the faults name; print how it went."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    whole = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in whole or test.partition("::")[0] not in whole]
    began = time.monotonic()
    code, printed = run_tests(folder, tests, 1800)
    last = printed.strip().splitlines()[-1] if printed.strip() else "no output"
    print(f"without a fault: {last} ({time.monotonic() - began:.0f} s)", flush=True)
    if code != 0:
        print(printed[-2000:])
    return code == 0


# 3. The command ------------------------------------------------------------------------------------------------------


def report(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table of all outcomes, and a line that counts them."""
    rows = ["| fault | file | outcome | by | seconds |", "|---|---|---|---|---|"]
    rows += [f"| {o.fault.name} | {o.fault.file} | {o.status} | {o.killer} | {o.seconds:.0f} |" for o in outcomes]
    killed = sum(o.status == "killed" for o in outcomes)
    total = sum(o.seconds for o in outcomes)
    return "\n".join([*rows, "", f"{killed} of {len(outcomes)} faults killed in {total:.0f} s"])


def main(argv: Sequence[str] | None = None, faults: Sequence[Fault] = FAULTS) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone (a part of the name will do)")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--seconds", type=float, default=300.0, help="longest time for one fault")
    args = parser.parse_args(argv)
    wrong = problems(faults)
    chosen = [f for f in faults if not args.only or any(word in f.name for word in args.only)]
    if not chosen:
        wrong.append(f"no fault is called {' or '.join(args.only)}")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{fault.name} ({fault.file}): {' '.join(fault.tests)}" for fault in chosen))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = copy_project(Path(name).resolve())
        if not args.skip_baseline and not check_baseline(chosen, folder):
            return 1
        outcomes = []
        for fault in chosen:
            outcome = try_fault(fault, folder, args.seconds)
            by = f" by {outcome.killer}" if outcome.killer else ""
            print(f"{outcome.status}{by}: {fault.name} ({outcome.seconds:.0f} s)", flush=True)
            outcomes.append(outcome)
    print(f"\n{report(outcomes)}")
    return 0 if all(outcome.status == "killed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
