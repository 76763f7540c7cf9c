"""Where each property that the mathematics rests on is tested; the names are held to tests that exist.

The numbers are only for citing a property; 01 to 72 belong to a module, P1 to P17 to the whole.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REFERENCE = "loss_function::test_every_term_equals_a_float64_reference_and_padding_may_hold_anything"
NUMPY = "loss_function::test_risk_js_entropy_and_cross_entropy_equal_float64_numpy"
SHARED_JS = "loss_function::test_js_is_symmetric_bounded_and_zero_with_zero_gradient_at_equality"
RISK = "loss_function::test_risk_reaches_its_bound_is_zero_at_the_preference_and_is_information_for_uniform_c"
REACH = "loss_function::test_each_term_sends_gradient_to_its_own_inputs_only"
OUTSIDE = "loss_function::test_values_outside_the_mask_never_matter"
SCALE = "loss_function::test_upsampling_and_repeated_steps_change_nothing"
ORDER = "loss_function::test_batch_order_and_colour_names_do_not_matter"
HARD = "loss_function::test_hard_weights_are_epsilon_or_one_and_never_change_a_constant_or_extreme_case"
HALTING = "loss_function::test_halting_probabilities_sum_to_one_and_expected_steps_follow_the_closed_form"
PRODUCT = "loss_function::test_desirable_preference_is_the_normalised_product_and_the_floor_keeps_it_positive"
SURROGATE = "loss_function::test_reward_term_has_the_value_of_the_reward_and_the_gradient_of_the_surrogate"
MUTUAL = "loss_function::test_information_gain_is_the_mutual_information_of_state_and_outcome"
SIZE = "loss_function::test_size_loss_is_half_the_two_cross_entropies_and_its_distance_orders_misses"
SIZE_NUMPY = "loss_function::test_size_loss_equals_float64_numpy_and_a_nearer_miss_costs_less"
FLIP = "loss_function::test_seed_mode_flip_is_blind_to_palindromes_and_to_the_middle_step"
BANDIT = "policy_refined::test_policy_climbs_a_known_reward_and_descends_its_negative"
ADVANTAGE = "policy_refined::test_advantage_is_the_reward_minus_the_mean_of_the_others"
ANY_ADVANTAGE = "policy_refined::test_advantage_equals_loops_whatever_is_scorable"
ALONE = "policy_refined::test_reward_alone_in_its_group_is_compared_with_the_value"
UNSCORABLE = "policy_refined::test_unscorable_rewards_get_0_and_enter_no_baseline"
DETACHED = "human_rl_agent::test_log_prob_detaches_the_sample_by_itself"
PHI = "reward_shaping::test_potential_is_1_only_for_the_exact_grid_and_all_components_lie_in_0_1"
TELESCOPE = "reward_shaping::test_reward_telescopes_is_0_for_a_no_op_and_stays_within_1"
OWN_TASK = "solver2::test_recall_never_returns_the_querys_own_task_nor_its_pair"
RESUMED = "claims::test_resumed_run_equals_uninterrupted_run"
SCRAMBLED = "claims::test_scrambled_answers_do_not_change_predictions"

# number: (property, tests as module::name)
PROPERTIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "01": ("risk is KL(Q || C) in float64", (NUMPY, REFERENCE)),
    "02": ("bidirectional is JS in float64", (NUMPY, REFERENCE)),
    "03": ("JS is symmetric", (SHARED_JS,)),
    "04": ("JS is 0 at equality", (SHARED_JS, "loss_function::test_js_of_exact_one_hot_log_probabilities_is_finite")),
    "05": ("JS is at most ln 2, reached by disjoint beliefs", (SHARED_JS,)),
    "06": ("gradient of JS is 0 at equality and finite at one-hot", (SHARED_JS,)),
    "07": ("risk is at most ln(K / floor), and reaches it", (RISK,)),
    "08": ("risk is 0 at the floored preference", (RISK,)),
    "09": ("risk under a uniform preference is ln K - H(Q)", (RISK,)),
    "10": ("risk sends no gradient to the preference", (REACH,)),
    "11": ("nan and inf in padded logits change nothing", (OUTSIDE, REFERENCE)),
    "12": ("a larger canvas changes nothing", ("loss_function::test_padding_does_not_change_loss",)),
    "13": ("doubling rows and columns changes nothing", (SCALE,)),
    "14": ("the order of the batch does not matter", (ORDER,)),
    "15": ("no valid cell, no valid sample: 0 and a zero gradient", (
        "loss_function::test_batch_without_a_valid_cell_gives_zero_and_finite_zero_gradient",
        "loss_function::test_sample_without_a_valid_cell_is_left_out_of_the_mean", REFERENCE)),
    "16": ("the names of the colours do not matter", (ORDER,)),
    "17": ("consistency is torch's cross-entropy", (
        "loss_function::test_consistency_equals_torch_cross_entropy_per_sample", NUMPY, REFERENCE)),
    "18": ("weights of the steps sum to 1", (
        "loss_function::test_step_weights_sum_to_one_and_rho_zero_keeps_the_last_step_only",)),
    "19": ("cell weights are epsilon or 1", (HARD,)),
    "20": ("epsilon 1, all right or all wrong: the plain mean", (HARD,)),
    "21": ("wrong cells have the largest gradient, right ones keep some", (
        "loss_function::test_fix3_gradient_is_larger_on_wrong_cells",)),
    "22": ("risk + ambiguity = -(information gain + utility)", (
        "loss_function::test_risk_plus_ambiguity_equals_minus_information_gain_and_utility",)),
    "23": ("information gain is at least 0", (MUTUAL,)),
    "24": ("ambiguity lies within 0..ln C", (
        "loss_function::test_ambiguity_spans_zero_to_ln_c_and_reaches_states_and_likelihood",
        "loss_function::test_ambiguity_of_codes_equals_the_brute_force_expectation")),
    "25": ("ambiguity trains states and likelihood", (
        "loss_function::test_ambiguity_spans_zero_to_ln_c_and_reaches_states_and_likelihood", REACH)),
    "26": ("information gain is 0 where heads agree or the outcome ignores the state", (
        "loss_function::test_information_gain_is_zero_when_heads_agree_or_the_outcome_ignores_the_state",)),
    "27": ("halting probabilities sum to 1", (HALTING,)),
    "28": ("expected steps lie within 1..T, and finite at logits of +-60", (
        HALTING, "loss_function::test_halting_limits_are_finite")),
    "29": ("a higher halting logit means fewer steps; the last one means nothing", (HALTING,)),
    "30": ("a constant step term has no gradient", (
        "loss_function::test_seed_mode_has_a_constant_step_a_reward_without_gradient_and_no_auxiliary_heads",)),
    "31": ("desirability goes to exp(r / tau), unvisited entries stay 1", (
        "solver2::test_z_goes_to_the_exponential_of_a_constant_reward_and_unvisited_entries_stay_one",
        "solver2::test_z_table_update_and_lookup_equal_loops_over_cells")),
    "32": ("the anchored target is the normalised product of prior and desirability", (
        PRODUCT, "solver2::test_z_stays_within_its_bounds_and_weighs_the_prior")),
    "33": ("Z-learning finds the linear solution on a chain", (
        "solver2::test_z_learning_converges_to_the_linear_solution_on_a_chain",)),
    "34": ("the anchor trains the preference head and not its target", (
        REACH, "loss_function::test_z_anchor_is_zero_at_its_target_and_equals_torch_kl_elsewhere")),
    "35": ("contrast: ln B collapsed, 0 aligned, 0 alone, one task positive", (
        "loss_function::test_info_nce_is_ln_b_when_collapsed_zero_when_aligned_and_zero_for_one_sample",
        "loss_function::test_info_nce_counts_same_task_pairs_as_positives_and_unknown_tasks_as_negatives",
        "loss_function::test_info_nce_equals_two_cross_entropies_without_shared_tasks",
        "loss_function::test_queue_gives_negatives_of_other_tasks_only_and_starts_empty")),
    "36": ("the cosine term lies within 0..2", ("loss_function::test_prompt_cosine_spans_zero_to_two",)),
    "37": ("the reward term is exactly -R and moves along the surrogate", (SURROGATE,)),
    "38": ("gradient of expected accuracy is p(y) times that of cross-entropy", (SURROGATE,)),
    "39": ("size loss is half of two cross-entropies, 0 when perfect", (SIZE, SIZE_NUMPY)),
    "40": ("a farther size costs more", (SIZE, SIZE_NUMPY)),
    "41": ("bf16 autocast leaves single precision", (
        "loss_function::test_bf16_autocast_does_not_touch_the_loss", REFERENCE,
        "policy_refined::test_losses_are_single_precision_under_autocast",
        "solver2::test_recall_stays_in_single_precision_under_autocast")),
    "42": ("half precision logits of +-6e4 give the same value and finite gradients", (
        "loss_function::test_extreme_fp16_logits_stay_finite",)),
    "43": ("gradients equal finite differences", ("loss_function::test_gradients_equal_finite_differences",)),
    "44": ("the score does not depend on the squashing's Jacobian", (
        "human_rl_agent::test_score_gradient_does_not_depend_on_the_jacobian",)),
    "45": ("densities equal torch.distributions", (
        "human_rl_agent::test_log_prob_equals_the_normal_distribution",
        "human_rl_agent::test_squashed_log_prob_equals_the_transformed_distribution")),
    "46": ("what an attached sample would do to the score", (DETACHED,)),
    "47": ("densities are finite at saturation", (
        "human_rl_agent::test_squashed_log_prob_and_its_gradient_are_finite_at_saturation",)),
    "48": ("move and gate are bounded", ("policy_refined::test_move_and_gate_are_bounded_at_any_action",)),
    "49": ("the score-function estimate matches the closed form", (
        "human_rl_agent::test_score_function_estimate_matches_the_closed_form",)),
    "50": ("advantages: others' mean, sum 0, ties 0, no shift", (
        ADVANTAGE, ANY_ADVANTAGE, "policy_refined::test_equal_rewards_have_advantage_exactly_0")),
    "51": ("a refined prompt passes the gradient on unchanged, none to the policy", (
        "policy_refined::test_refine_passes_the_gradient_to_the_prompt_unchanged_and_to_the_basis_but_not_to_the_policy",
        "policy_refined::test_refine_cuts_the_graph_of_an_action_that_has_one")),
    "52": ("the value's loss moves the value network alone", (
        "human_rl_agent::test_value_gradient_reaches_the_value_net_only_and_nothing_reaches_the_state",)),
    "53": ("the potential is 1 for the exact grid only", (
        PHI, "reward_shaping::test_target_is_the_unique_maximum_for_any_weights")),
    "54": ("components lie within 0..1 and equal a brute force", (
        PHI, "reward_shaping::test_components_equal_the_brute_force")),
    "55": ("background and copy are worth less than one wrong cell", (
        "reward_shaping::test_trivial_answers_rank_below_nearly_right_ones",
        "reward_shaping::test_mean_potential_of_adversaries_on_real_tasks")),
    "56": ("rewards telescope", (TELESCOPE,)),
    "57": ("joint recolouring and transposition change no potential", (
        "reward_shaping::test_potential_is_invariant_to_joint_recolouring_and_transposition",)),
    "58": ("a no-op earns 0", (TELESCOPE,)),
    "59": ("the way back counts only as far as the grid is right", (
        "reward_shaping::test_reverse_component_is_omitted_gated_and_weighted_by_its_reliability",)),
    "60": ("the threshold stays reachable and ignores what is not finite", (
        "solver2::test_threshold_stays_reachable_when_every_score_is_one_and_admits_exact_below_it",
        "solver2::test_threshold_ignores_a_score_that_is_not_finite",
        "solver2::test_threshold_is_the_same_for_every_cut_into_batches_and_stays_in_its_bounds")),
    "61": ("keeping is easier than admitting", (
        "solver2::test_keep_is_weaker_than_admit_by_the_hysteresis_and_changes_nothing",)),
    "62": ("capacity holds, the least useful entry leaves", (
        "solver2::test_capacity_holds_and_the_least_useful_entry_leaves",)),
    "63": ("similarity is half the cosine of features and half that of prompts", (
        "solver2::test_recall_equals_brute_force_over_all_entries",)),
    "64": ("neither the own task nor the own pair is recalled", (
        OWN_TASK, "arc_system::test_memory_speaks_of_other_tasks_only")),
    "65": ("duplicates merge", (
        "solver2::test_duplicate_keeps_the_better_score_with_its_history",
        "solver2::test_nearly_equal_key_of_the_same_task_is_a_duplicate_but_not_of_another_task",
        "solver2::test_at_most_two_entries_per_task_and_the_better_ones")),
    "66": ("an empty memory and nan are answered", (
        "solver2::test_recall_of_an_empty_memory_is_the_null_entry_alone",
        "solver2::test_recall_with_nan_query_returns_nothing", "solver2::test_admit_leaves_out_what_is_not_finite")),
    "67": ("the memory survives a weights-only file", (
        "solver2::test_memory_state_round_trip_recalls_identically_and_continues_equally",)),
    "68": ("the demonstrations' prior is normalised, floored, and follows the colours", (
        "demo_prior::test_any_valid_grids_give_a_normalised_floored_preference",
        "demo_prior::test_renaming_colours_renames_the_answer")),
    "69": ("demonstrations of copying copy; none at all are fine", (
        "demo_prior::test_one_demonstration_is_enough_to_copy",
        "demo_prior::test_a_simple_rule_is_found_and_trusted",
        "demo_prior::test_the_smallest_and_the_largest_grids_are_answered")),
    "70": ("preference times exp(reward) solves the KL-control problem", (
        "loss_function::test_desirability_solves_the_kl_control_problem",)),
    "71": ("the density detaches its sample", (DETACHED,)),
    "72": ("nan and inf in padded values and weights change no mean", (OUTSIDE,)),
    "P1": ("the total is the sum of weighted terms; a weight of 0 removes its term alone", (
        "loss_function::test_total_is_the_sum_of_the_weighted_terms",
        "loss_function::test_lambda_zero_removes_exactly_its_term", REFERENCE)),
    "P2": ("mode seed: its flipped JS is trivial for constant or palindromic paths and at the middle step", (
        FLIP, "loss_function::test_seed_mode_total_is_the_original_formula_with_exact_divergences")),
    "P3": ("an unbatched call is a batch of one; targets with fractions are refused", (
        "loss_function::test_unbatched_call_equals_a_batch_of_one",
        "loss_function::test_target_with_fractions_or_of_another_shape_is_refused")),
    "P4": ("all parameters of the loss exist at construction", (
        "loss_function::test_all_parameters_exist_at_construction_and_all_get_gradient",)),
    "P5": ("heads at zero give the values of the definitions", (
        "loss_function::test_untrained_zero_heads_give_the_values_of_the_definitions",)),
    "P6": ("a step lowers a task's loss, two hundred answer it exactly", (
        "claims::test_one_step_lowers_the_loss_of_a_task_and_two_hundred_answer_it_exactly",)),
    "P7": ("a garbled answer changes nothing that predicts", (
        SCRAMBLED, "evaluate::test_predict_takes_a_query_only_and_is_deterministic",
        "prior_cache::test_the_prior_of_a_training_query_does_not_depend_on_its_answer")),
    "P8": ("halting: all steps unsolved, the first solved one, one alone; the price has a bound", (
        "loss_function::test_halting_head_learns_to_stop_where_the_grid_is_solved",
        "loss_function::test_expected_steps_alone_collapse_to_one",
        "loss_function::test_price_of_a_step_is_safe_below_its_bound")),
    "P9": ("a bandit's reward rises, its negative falls, a constant teaches nothing", (
        BANDIT, "policy_refined::test_constant_reward_leaves_the_mean_move_where_it_was",
        "claims::test_fix6_policy_gradient_climbs_a_known_reward")),
    "P10": ("doing nothing earns exactly 0, dropout or not", (
        "arc_system::test_refinement_that_does_nothing_earns_exactly_nothing",
        "policy_refined::test_no_op_reward_is_exactly_0_for_a_planner_with_dropout")),
    "P11": ("the language model learns through the refined prompt, the policy from its own loss alone", (
        "claims::test_loss_and_policy_train_disjoint_parameters",
        "policy_refined::test_language_model_learns_through_the_refined_prompt_even_after_the_policy_stepped",
        "qwen_hybrid_prompt::test_exactly_the_parameters_of_the_mode_get_gradients")),
    "P12": ("the size schedule is exact and a function of progress", (
        "loss_function::test_size_schedule_is_exact_and_a_function_of_progress_alone", RESUMED)),
    "P13": ("threshold, Z table, memory and running averages survive a resume", (
        RESUMED, "policy_refined::test_interrupted_training_continues_bit_equal",
        "arc_system::test_checkpoint_state_round_trip")),
    "P14": ("a step skipped by the loss scaler leaves no trace", (
        "claims::test_loss_scaler_backs_off_at_an_infinite_gradient_and_nothing_else_changes",
        "claims::test_fix7_nonfinite_step_is_skipped_and_parameters_stay_finite")),
    "P15": ("a score around the threshold is admitted once and never evicted", (
        "solver2::test_score_around_the_threshold_is_admitted_once_and_never_evicted",)),
    "P16": ("the backward plan ends at the input; the target never reaches the forward plan", (
        "loss_function::test_backward_plan_is_aligned_one_step_behind_and_its_start_meets_the_input",
        "grid_accuracy_loss::test_backward_plan_covers_both_canvases_and_ends_at_the_input",
        "arc_system::test_target_reaches_the_backward_beliefs_and_nothing_else")),
    "P17": ("one sample learns from the value, several from each other, unscorable ones not at all", (
        ALONE, UNSCORABLE, "policy_refined::test_value_baseline_lets_a_single_sample_learn",
        "policy_refined::test_unscorable_row_changes_neither_losses_nor_gradient")),
}  # fmt: skip


def defined_in(module: str) -> set[str]:
    """Return the names of the test functions of tests/test_MODULE.py."""
    tree = ast.parse((TESTS / f"test_{module}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_property_has_a_number_and_a_description():
    assert list(PROPERTIES) == [f"{n:02d}" for n in range(1, 73)] + [f"P{n}" for n in range(1, 18)]
    described = [text for text, _ in PROPERTIES.values()]
    assert len(set(described)) == len(described) and all(re.fullmatch(r"[ -~]{8,110}", text) for text in described)


@pytest.mark.parametrize("number", PROPERTIES)
def test_tests_of_a_property_exist(number):
    _, names = PROPERTIES[number]
    assert names and len(set(names)) == len(names)
    missing = [name for name in names if name.partition("::")[2] not in defined_in(name.partition("::")[0])]
    assert missing == []
