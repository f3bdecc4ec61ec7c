"""Faults of `ablation`: neurons that are off, and what becomes of answers and texts."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "ablation.continuer: every prompt has the same draw": Mutant(
        "relneuron.sample.{seed}.{name}",
        "relneuron.sample.{seed}.",
        "ablation/test_sampled.py::test_sampled_texts_are_those_of_a_plain_loop",
    ),
    "ablation.measures: an answer of which half is wrong counts": Mutant(
        "if distance < threshold",
        "if distance <= threshold",
        "ablation/test_measures.py::test_anls",
    ),
    "ablation.evaluate: small batches are made anew, with more padding": Mutant(
        "return int(found[0]) if is_same and len(found) >= LEAST_ROWS else 0",
        "return int(found[-1])",
        "model/test_spared.py::test_rows_by_prompt_are_the_same_rows_with_the_same_padding",
    ),
    "ablation.conditions: a range of ranks has the last of the one before": Mutant(
        "rankings[name][a:b]",
        "rankings[name][a - 1 : b]",
        "ablation/test_conditions.py::test_sizes_are_prefixes_of_the_ranking_and_ranges_the_differences",
    ),
    "ablation.how: neurons get the mean of all prompts, not their relation's": Mutant(
        'found.get(relation, found[""])',
        'found[""]',
        "ablation/test_modes.py::test_equal_sets_of_two_relations_have_the_means_of_each",
    ),
    "ablation.asking: a long answer is right if the object begins with it": Mutant(
        "if self.options.generate is not None:\n            return begins_with",
        "if False:\n            return begins_with",
        "ablation/test_modes.py::test_a_longer_answer_is_right_only_if_it_begins_with_the_object",
    ),
    "ablation.nll: the mean is over tokens, not over windows": Mutant(
        "mean = float(some.mean())",
        "mean = float(np.average(some, weights=n_tokens[inside]))",
        "ablation/test_nll.py::test_every_mask_and_window_is_the_edited_model_on_the_window_alone",
    ),
    "ablation.continuer: the penalty raises logits below zero": Mutant(
        "torch.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        "ablation/test_generate.py::test_a_penalty_lowers_logits_of_either_sign",
    ),
    "ablation.conditions: a random set has neurons of the set that it is beside": Mutant(
        "if i not in own]",
        "if True]",
        "ablation/test_patching.py::test_random_sets_have_as_many_other_neurons_of_each_layer",
    ),
    "ablation.how: a study does not depend on its donor": Mutant(
        "same_model(pair.described[1]) if pair else None",
        "None",
        "ablation/test_patching.py::test_ablate_answers_with_another_models_values",
    ),
    "ablation.noise: noise depends on what shares the batch": Mutant(
        'device) + given["position_ids"]',
        'device) + torch.arange(given["position_ids"].shape[1])',
        "ablation/test_noise.py::test_stored_values_are_put_by_plain_hooks",
    ),
    "ablation.harness.changes: the clean model is steered, too": Mutant(
        "self._steering() if run.set else nullcontext()",
        "self._steering()",
        "ablation/test_harness.py::test_steered_models_and_means_of_products_are_those_of_hooks",
    ),
    "ablation.harness.stage: what was finished before a kill is asked again": Mutant(
        "if journal.takes(_key(run, task)):",
        "if journal.takes(_key(run, task)) or True:",
        "ablation/test_harness.py::test_a_killed_run_goes_on_with_the_same_bits",
    ),
    "ablation.steer: a group's mean is over the tokens of all groups": Mutant(
        "np.maximum(counts.tokens_at()[row], 1)",
        "np.maximum(counts.tokens_at().sum(0), 1)",
        "ablation/test_generate.py::test_mean_activations_are_sums_by_tokens",
    ),
    "ablation.effect: numerator and denominator are of two draws": Mutant(
        "ratios = drawn[:, number] / drawn[:, 0]",
        "ratios = drawn[:, number] / np.roll(drawn[:, 0], 1)",
        "ablation/test_effect.py::test_the_interval_draws_prompts_with_all_that_is_theirs",
    ),
    "ablation.effect: a denominator that may be 0 is hidden": Mutant(
        "is_certain = not donor_low <= 0 <= donor_high",
        "is_certain = bool(whole)",
        "ablation/test_effect.py::test_what_may_be_divided_by_nothing_has_no_interval",
    ),
    "ablation.next_token: a row has the neuron of the row before it off": Mutant(
        "[place[one.off] for one in batch]",
        "[place[one.off] for one in (batch[0], *batch[:-1])]",
        "ablation/test_next_token.py::test_each_row_has_its_own_neuron_off",
    ),
    "ablation.costs: a cost is that of the other seed": Mutant(
        "if any(line.seed is not None for line in lines)",
        "if False",
        "ablation/test_effect.py::test_a_table_that_lacks_costs",
    ),
    "ablation.rows: equal logits stand before the target": Mutant(
        "rank = 1 + (logits > own).sum(1)",
        "rank = (logits >= own).sum(1)",
        "ablation/test_rows.py::test_equal_logits_share_the_better_rank",
    ),
    "ablation.expertise: positives and negatives are swapped": Mutant(
        'own.positive if name.startswith("on_") else own.negative',
        'own.negative if name.startswith("on_") else own.positive',
        "ablation/test_expertise.py::test_expertise_is_what_others_compute",
    ),
    "ablation.said: a prompt beyond the last one is one of the next condition": Mutant(
        "if row.prompt >= self._n_prompts or at",
        "if at",
        "ablation/test_said.py::test_every_row_has_what_was_said_of_it",
    ),
    "ablation.conditions: a set is asked nothing but its own prompts": Mutant(
        "min(n or 0, len(others))",
        "0",
        "ablation/test_facts.py::test_a_set_of_a_fact_is_asked_its_prompts_and_some_others",
    ),
}
