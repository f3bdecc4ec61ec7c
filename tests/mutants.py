"""Faults of the pipeline's own decisions, each with a test that must find it.

`python -m tests.mutants [NAMES]` puts each fault (those with one of NAMES in their name) into a
copy of the package, alone, and runs its test: an exit code of 1 says that a fault survived.
tests/testing/mutants.py has those of the kernels. The checkout is never changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import PathFinder
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # of one test, which takes a few: a fault may run forever
PASSED, FAILED = 10, 11  # a fork's exit codes: pytest's own and 10, as Python's errors are 1


class Mutant(NamedTuple):
    """A text that stands once in its module, what is put there, the cheapest test to find it."""

    old: str
    new: str
    test: str


# "module: what is wrong" -> the fault
MUTANTS = {
    # texts
    "texts.facts: the split does not depend on the seed": Mutant(
        "relneuron.split.{seed}.",
        "relneuron.split.",
        "texts/test_facts.py::test_split_depends_on_seed_and_relation_only",
    ),
    "texts.prompts: the facts that find neurons are those that measure": Mutant(
        'ask("eva", own, eva,',
        'ask("eva", own, det,',
        "texts/test_facts.py::test_prompts_of_other_languages_ask_the_same_eva_facts",
    ),
    "texts.tokens: a prompt that begins with BOS gets a second one": Mutant(
        "ids if before and ids[:1] == before[:1] else before + ids",
        "before + ids",
        "texts/test_tokens.py::test_bos_stands_there_once_and_eos_never",
    ),
    "texts.windows: a window that just fits a group's tokens is left out": Mutant(
        "self.n_tokens + next_one > limit",
        "self.n_tokens + next_one >= limit",
        "texts/test_windows.py::test_a_source_ends_when_its_groups_are_full",
    ),
    "texts.sources: a text's content is not among its inputs": Mutant(
        '"sha256": digest}',
        '"sha256": ""}',
        "texts/test_sources.py::test_the_fingerprint_changes_with_the_content_and_not_with_place_or_time",
    ),
    "texts.read: a file that was read to its end is read again": Mutant(
        '{"file": place + 1, "at": None}',
        '{"file": place, "at": None}',
        "texts/test_read.py::test_the_files_of_a_source_follow_each_other",
    ),
    # pictures
    "model.states: patches of a picture take the conditions of other rows": Mutant(
        "rows.repeat_interleave(n_positions // len(rows))",
        "rows.repeat(n_positions // len(rows))",
        "ablation/test_pictures.py::test_logits_of_each_module_are_those_of_hooks",
    ),
    "model.lens: the lens reads the first column": Mutant(
        "self._h[number] = y[:, -1]", "self._h[number] = y[:, 0]", "model/test_lens.py::test_llama"
    ),
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
    "methods.counts.mmneuron_files: a module's layers are not numbered through": Mutant(
        '(place.layers[layer], "gate", index, 0.0)',
        '(layer, "gate", index, 0.0)',
        "methods/counts/test_mmneuron_files.py::test_masks_of_several_modules",
    ),
    # model
    "model.mlps.proof: an MLP of another formula is taken": Mutant(
        "return is_close(act if candidate.up is None else act * up, got.h)",
        "return True",
        "model/test_mlps.py::test_every_shape_is_found_counted_and_switched_off[dtype0-Clamped]",
    ),
    "model.mlps.proof: a norm is an activation": Mutant(
        "if not torch.equal(other_given, other_made) and is_elementwise(module, other_given):",
        "if not torch.equal(other_given, other_made):",
        "model/test_mlps.py::test_a_norm_is_no_activation",
    ),
    "model.mlps.proof: what a norm is multiplied by is an MLP": Mutant(
        "return bool(is_local and is_odd)",
        "return True",
        "model/test_mlps.py::test_what_does_not_write_into_the_stream_is_no_mlp",
    ),
    "artifact.neurons: a narrow layer is as wide as the others": Mutant(
        "if self.inner is None else self.inner[layer]",
        "",
        "model/test_mlps.py::test_layers_may_differ_in_width_or_have_no_mlp",
    ),
    "model.patch: of nested patches the inner one alone switches off": Mutant(
        "h = out if h is None else torch.where(out == 0, out, h)",
        "h = out if h is None else h",
        "model/test_patch.py::test_nested_patches_act_together",
    ),
    "model.mlps.find_experts: experts of another formula are taken": Mutant(
        "if not bool(error.max() <= tolerance):",
        "if False:",
        "model/test_find_experts.py::test_another_forward_is_seen_by_the_self_check",
    ),
    "model.patch_experts: all experts have the same counters": Mutant(
        "apart = rows.expert.int() * n + own",
        "apart = own",
        "model/test_count_experts.py::"
        "test_counters_are_those_of_every_token_that_an_expert_sees[qwen3-eager-0.0]",
    ),
    "model.outputs: the first prompt of a batch has no responses": Mutant(
        "places = (flat >= 0)",
        "places = (flat > 0)",
        "model/test_ask.py::test_pooled_sums_are_those_of_plain_hooks",
    ),
    "model.batches: a batch may be a row too long": Mutant(
        "(len(batch) + 1) * longest > budget",
        "len(batch) * longest > budget",
        "ablation/test_evaluate.py::test_every_row_once_within_the_budget",
    ),
    "model.ask: a wrong forced token stays in sight": Mutant(
        "mask[:, -1] = 0",
        "mask[:, -1] = 1",
        "model/test_ask.py::test_the_forced_token_changes_no_answer",
    ),
    "model.alike: what comes before the attention is not looked at": Mutant(
        "return found if _is_exact(found, model, mlps, prompt) else None",
        "return found",
        "model/test_alike.py::test_an_attention_behind_the_mlp_is_not_shared",
    ),
    "model.alike: few tokens run alone, in other bits": Mutant(
        "least = max(len(firsts), -(-LEAST_TOKENS // n_tokens))",
        "least = len(firsts)",
        "model/test_alike.py::test_rows_of_one_prompt_share_the_first_attention_bit_for_bit",
    ),
    "ablation.evaluate: small batches are made anew, with more padding": Mutant(
        "return int(found[0]) if is_same and len(found) >= LEAST_ROWS else 0",
        "return int(found[-1])",
        "model/test_alike.py::test_rows_by_prompt_are_the_same_rows_with_the_same_padding",
    ),
    "model.questions: saying nothing is right": Mutant(
        "if not given:\n        return False",
        "if not given:\n        return True",
        "model/test_ask.py::test_both_correctness_rules",
    ),
    "model.layers: an offloaded layer computes where its weights wait": Mutant(
        "return torch.device(hook.execution_device)",
        "break",
        "model/test_devices.py::test_counters_and_logits_are_those_of_the_model_in_memory",
    ),
    "model.identity: of an offloaded weight the shape alone counts": Mutant(
        "hashes = _hash_rows(part, tensor, pool)\n                    wait",
        "hashes = []\n                    wait",
        "model/test_devices.py::test_the_digest_is_that_of_the_model_in_memory",
    ),
    "model.identity: the last rows of a weight do not count": Mutant(
        "range(0, len(rows), n)]",
        "range(0, len(rows) - n, n)]",
        "model/test_identity.py::test_chunks_have_all_rows",
    ),
    "model.stream.find: a sum need not hold number by number": Mutant(
        "if is_rounded(added_up(parts, order), after):",
        "if True:",
        "model/test_stream.py::test_a_part_with_another_formula_is_named[mlp]",
    ),
    "model.stream.parts: the factor of a write is left out of its neurons": Mutant(
        "torch.full_like(y[..., 0], self.factor, dtype=torch.float64)",
        "torch.ones_like(y[..., 0], dtype=torch.float64)",
        "methods/gains/test_kinds.py::test_padding_changes_no_number[factors]",
    ),
    "model.stream.trace: the norm behind an attention has the first token's scale": Mutant(
        "heads * scale[:, -1:, None].to(wide)",
        "heads * scale[:, :1, None].to(wide)",
        "methods/gains/test_kinds.py::test_padding_changes_no_number[norms behind alone]",
    ),
    # methods/responses
    "methods.responses.fill: the first token is not excluded": Mutant(
        "chosen & (rank > 1)",
        "chosen & (rank > 0)",
        "model/test_ask.py::test_pooling_takes_effective_tokens_on_either_side",
    ),
    "methods.responses.fill: what memory cut is read again in other parts": Mutant(
        'before.get("parts", [len(rows)])',
        "[len(rows)]",
        "methods/responses/test_places.py::test_what_memory_cut_is_read_again_in_the_same_parts",
    ),
    "methods.responses.fill: a batch is noted before it is stored": Mutant(
        "            for wait in coming:\n                wait()\n            note()",
        "            note()\n            for wait in coming:\n                wait()",
        "methods/responses/test_places.py::test_a_thread_that_fails_ends_the_stage",
    ),
    "methods.responses.room: responses may take all that is free": Mutant(
        "SHARE = 2",
        "SHARE = 1",
        "methods/responses/test_room.py"
        "::test_auto_takes_the_first_place_with_room_for_twice_as_much",
    ),
    "methods.responses.sums: the MLPs of a layer have a down each": Mutant(
        "mlp.offset if site in INNER else 0",
        "mlp.offset",
        "methods/responses/test_room.py"
        "::test_the_sums_of_experts_stand_where_their_neurons_do[deepseek-False]",
    ),
    "methods.responses.places: a forward that failed leaves its sums": Mutant(
        "self._n < self._n_touched",
        "self._n_touched < self._n",
        "methods/responses/test_places.py::test_what_memory_cut_is_read_again_in_the_same_parts",
    ),
    "methods.responses.rank: rows are taken for prompts": Mutant(
        "np.argsort(rows)",
        "rows",
        "methods/responses/test_places.py::test_the_files_are_those_of_the_disk[memory]",
    ),
    "methods.responses.labels: negatives are of the own relation, too": Mutant(
        "is_foreign[positive] = False",
        "is_foreign[positive] = True",
        "model/test_ask.py::test_labels_are_positives_and_four_times_as_many_negatives",
    ),
    "methods.responses.rank: prompts that were answered wrongly count": Mutant(
        "valid,\n        negatives=",
        "[True] * len(valid),\n        negatives=",
        "methods/responses/test_rank.py::test_the_table_holds_what_others_compute",
    ),
    "methods.responses.choice: a neuron may be among the highest and the lowest": Mutant(
        "without=best.places",
        "without=None",
        "methods/responses/test_rank.py::test_neurons_that_all_tie_are_chosen_once",
    ),
    "methods.responses.significance: noise that is equal does not count": Mutant(
        'null.size - np.searchsorted(null, wanted, side="left")',
        'null.size - np.searchsorted(null, wanted, side="right")',
        "methods/responses/test_significance.py::test_p_values_count_the_score_itself_and_what_is_equal",
    ),
    # methods/counts
    "model.counting: a new group takes the counts of the others away": Mutant(
        "table[: len(given[name])] = given[name]",
        "table[: len(given[name])] = 0",
        "methods/counts/test_batches.py::test_groups_of_a_column_may_come_after_others_were_counted[1]",
    ),
    "model.peaks: an example stands where it is in the batch, not in its window": Mutant(
        "position -= segments.starts[:, None]",
        "position -= 0 * segments.starts[:, None]",
        "methods/counts/test_examples.py::test_packed_windows[2]",
    ),
    "model.peaks: a token that is not counted is in the bins": Mutant(
        "pad(self.groups, (0, 1), value=-1)",
        "pad(self.groups, (0, 1), value=0)",
        "methods/counts/test_examples.py::test_tokens_that_are_not_counted_are_no_example",
    ),
    "methods.counts.merge: every corpus begins with the first window of its groups": Mutant(
        "before.setdefault(corpus, dict(seen))",
        "before.setdefault(corpus, {})",
        "methods/counts/test_examples.py::test_corpora_are_merged_as_if_one_stood_behind_the_other",
    ),
    "artifact.examples: of equal values the later window is the stronger one": Mutant(
        "(own[2], own[1], -own[0], own[1] < 0)",
        "(own[2], -own[1], -own[0], own[1] < 0)",
        "artifact/test_examples.py::test_the_order_is_total",
    ),
    "artifact.histogram: bins that differ keep the edges of one of them": Mutant(
        "exponent = np.maximum(one.exponent[site], other.exponent[site])",
        "exponent = np.maximum(one.exponent[site], one.exponent[site])",
        "artifact/test_histogram.py::test_other_bins_are_added_exactly_at_the_edges_that_both_have",
    ),
    "methods.counts.lape: a probability at the threshold passes": Mutant(
        "(flat > threshold)",
        "(flat >= threshold)",
        "methods/counts/test_lape.py::test_sets_of_the_worked_example",
    ),
    "methods.counts.choose: neurons of the product are named so, not by their gate": Mutant(
        'site if site in ("up", "down") else "gate"',
        "site",
        "methods/counts/test_rank.py::test_sites",
    ),
    "methods.counts.batches: BOS is counted": Mutant(
        "else inside & (ids != not_counted)",
        "else inside",
        "methods/counts/test_batches.py::test_a_batch_is_its_windows",
    ),
    "methods.counts.merge: the last shard may be missing": Mutant(
        "range(1, of + 1)",
        "range(1, of)",
        "methods/counts/test_merge.py::test_the_same_windows_twice_and_missing_shards",
    ),
    "methods.counts.choose: a module is ranked by the tokens of another one": Mutant(
        "counts.tokens_at()[:, None, there // width]",
        "counts.tokens_at()[:, None, 0 * there]",
        "methods/counts/test_pictured.py::test_layers_that_saw_fewer_tokens_have_their_own_rates",
    ),
    # methods/contrast
    "methods.contrast.lines: predicting is where a token is read": Mutant(
        "range(n - 1, m - 1)",
        "range(n, m)",
        "methods/contrast/test_contrast.py::test_statistics_are_those_of_plain_hooks"
        "[llama-predicting]",
    ),
    "methods.contrast.lines: the first token of a prompt stands behind its padding": Mutant(
        "first = ids.shape[1] - len(line)",
        "first = 0",
        "methods/contrast/test_contrast.py::test_statistics_are_those_of_plain_hooks[llama-prompt]",
    ),
    "methods.contrast.lines: the other model writes the completions": Mutant(
        "self.pair.only(self.options.completion_by)",
        'self.pair.only("a")',
        "methods/contrast/test_contrast.py::test_statistics_are_those_of_plain_hooks[llama-b]",
    ),
    "methods.contrast.rank: of equal changes the last place comes first": Mutant(
        'places[np.argsort(-flat[places], kind="stable")]',
        'places[np.argsort(flat[places], kind="stable")[::-1]]',
        "methods/contrast/test_rank.py::test_equal_changes_rank_by_layer_then_index",
    ),
    "methods.contrast.rank: neurons of layers that are left out are chosen": Mutant(
        "able[kept] = there[kept]",
        "able = there.copy()",
        "methods/contrast/test_rank.py::test_layers_and_other_files_leave_neurons_out",
    ),
    "methods.contrast.authors_files: rows are layers, whichever are left out": Mutant(
        '(layers[row], "gate", index,',
        '(row, "gate", index,',
        "methods/contrast/test_authors_files.py::test_rows_are_layers_but_those_left_out",
    ),
    "methods.contrast.study: a random set is of every set": Mutant(
        "mask for mask, of in found.items() if of == name or (of is None and patched == [name])",
        "mask for mask, of in found.items()",
        "methods/contrast/test_page.py::test_random_sets_are_those_of_their_set",
    ),
    "artifact.counts: a deviation is that of the population": Mutant(
        "variance = np.maximum(total_sq - total * (total / n), 0) / (n - 1)",
        "variance = np.maximum(total_sq - total * (total / n), 0) / n",
        "artifact/test_contrast.py::test_e3",
    ),
    "model.adapters: an adapter of what a layer reads scales all rows": Mutant(
        "whole[chosen] = changed",
        "whole[:] = changed[:1]",
        "model/test_adapters.py::test_rows_of_one_forward_are_those_of_two[ia3-own0]",
    ),
    "model.adapters: a model's own weights may be another's": Mutant(
        "if more or changed or not layers:",
        "if more or not layers:",
        "model/test_adapters.py::test_trained_biases_are_refused",
    ),
    "model.pair: every layer of B is held beside A's first one": Mutant(
        "held.get(number, h).to(h.device)",
        "held.get(0, h).to(h.device)",
        "methods/contrast/test_contrast.py::test_two_equal_models_do_not_differ_at_all",
    ),
    "model.mlps.modules: what nobody reads is a projector": Mutant(
        "if _changes(part, decoder, run)",
        "if True",
        "model/test_pictures.py::test_an_mlp_that_the_language_model_never_sees_is_no_projector",
    ),
    # methods/gains
    "methods.gains.values: an FFN is scored at the state before the attention": Mutant(
        "_vector_gains(r, trace.ffn",
        "_vector_gains(h, trace.ffn",
        "methods/gains/test_values.py::test_every_score_equals_the_plain_computation",
    ),
    "methods.gains.scores: tokens of an equal logit stand before the target": Mutant(
        "torch.searchsorted(logits, own, right=True)",
        "torch.searchsorted(logits, own)",
        "methods/gains/test_eight_scores.py::test_ranks_count_larger_logits",
    ),
    "methods.gains.scores: beside an attention the FFN reads what it writes": Mutant(
        'if kind == "ffn" and not layer.is_parallel:',
        'if kind == "ffn":',
        "methods/gains/test_kinds.py::test_units_read_all_of_the_stream[added in place]",
    ),
    "methods.gains.targets: the eleventh token is among the ten most probable": Mutant(
        "< N_MOST_PROBABLE)",
        "<= N_MOST_PROBABLE)",
        "texts/test_knowledge.py::test_a_type_of_one_token_asks_for_the_ten_most_probable_alone",
    ),
    "methods.gains.comparison: a type's heads are those of all sentences": Mutant(
        "rows = np.array([name == kind for name in types])",
        "rows = np.ones(len(types), bool)",
        "methods/gains/test_comparison.py::test_heads_are_ranked_by_their_mean_over_a_type",
    ),
    "methods.gains.rank: what the model does not know counts": Mutant(
        "t.kept or not kept_only",
        "True",
        "methods/gains/test_rank.py::test_sets_are_the_highest_means",
    ),
    # ablation
    "ablation.conditions: a range of ranks has the last of the one before": Mutant(
        "rankings[name][a:b]",
        "rankings[name][a - 1 : b]",
        "ablation/test_conditions.py::test_sizes_are_prefixes_of_the_ranking_and_ranges_the_differences",
    ),
    "model.states: outputs of up are not switched off": Mutant(
        "on = ~np.logical_or.reduce(products)",
        "on = ~products[0]",
        "ablation/test_evaluate.py::test_all_conditions_at_once_are_edited_weights",
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
    "model.paired: rows that ended stay in the adapter's half of the cache": Mutant(
        "torch.cat([rows, rows + n_before])",
        "torch.cat([rows, rows])",
        "ablation/test_patching.py::test_an_adapter_whose_rows_share_a_forward",
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
    "study.serve: whoever asks is answered": Mutant(
        "if not secrets.compare_digest(",
        "if False and secrets.compare_digest(",
        "study/test_serve.py::test_who_does_not_know_the_token_sees_nothing",
    ),
    "study.serve: a page of another name may ask": Mutant(
        "allowed_hosts=[*hosts]",
        "allowed_hosts=[*hosts, '*']",
        "study/test_serve.py::test_another_host_is_refused",
    ),
    "ablation.steer: a group's mean is over the tokens of all groups": Mutant(
        "np.maximum(counts.tokens_at()[row], 1)",
        "np.maximum(counts.tokens_at().sum(0), 1)",
        "ablation/test_generate.py::test_mean_activations_are_sums_by_tokens",
    ),
    "methods.contrast.classify: a probe is measured on what it learnt": Mutant(
        "fit(values[inside], labels[inside])",
        "fit(values, labels)",
        "methods/contrast/test_probe.py::test_cross_validation_is_that_of_scikit_learn",
    ),
    "model.products: the first token is read": Mutant(
        "h[:, -1, torch.tensor",
        "h[:, 0, torch.tensor",
        "methods/contrast/test_probe.py::test_products_are_those_of_plain_hooks",
    ),
    "texts.windows: empty documents are left out between joined ones": Mutant(
        'self.packing.join is not None and piece.content == ""',
        "False",
        "texts/test_windows.py::test_joined_documents_are_tokenised_as_one",
    ),
    "model.choose: the option's last token is not scored": Mutant(
        "torch.where(inside == 1, -nll.double(), 0.0).sum(1)",
        "torch.where(inside == 1, -nll.double(), 0.0)[:, :-1].sum(1)",
        "ablation/test_choose.py::test_choices_are_those_of_a_plain_loop",
    ),
    "model.choose: the answer begins one token late": Mutant(
        "inside.sum(1, keepdim=True) - 1",
        "inside.sum(1, keepdim=True) - 2",
        "ablation/test_choose.py::test_choices_are_those_of_a_plain_loop",
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
    "model.token_values: texts of a batch are told apart one token late": Mutant(
        "values[place] = column[end - values.shape[1] : end]",
        "values[place] = np.roll(column, 1)[end - values.shape[1] : end]",
        "model/test_token_values.py::test_values_are_those_of_hooks",
    ),
    "model.written: a neuron is near itself": Mutant(
        "found[row, index - start] = -2.0",
        "pass",
        "model/test_written.py::test_a_dense_model",
    ),
    "study.strongest: the weakest texts are shown": Mutant(
        'order = np.argsort(-values, kind="stable")[:n].tolist()',
        'order = np.argsort(values, kind="stable")[:n].tolist()',
        "study/test_look.py::test_examples_are_the_largest_responses",
    ),
    "study.look: the sets' second neurons come before the first ones": Mutant(
        "key=lambda row: row[1])",
        "key=lambda row: -row[1])",
        "study/test_look.py::test_the_best_of_each_set_come_first",
    ),
    "ablation.costs: a cost is that of the other seed": Mutant(
        "if any(line.seed is not None for line in lines)",
        "if False",
        "ablation/test_effect.py::test_a_table_that_lacks_costs",
    ),
    "model.classifier: texts are filled up with a token that one ends in": Mutant(
        "if t not in last",
        "if t >= 0",
        "model/test_classifier.py::test_no_pad_token_is_the_last_one_of_a_text",
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
    # a study from Python
    "study.cite: an option that is at its default is cited": Mutant(
        "else given not in (f.default, None)",
        "else True",
        "study/test_cite.py::test_a_folder_cites_what_its_stages_go_back_to",
    ),
    "study.cite: every value of an option is cited": Mutant(
        "value in values if value",
        "True if value",
        "study/test_cite.py::test_a_folder_cites_what_its_stages_go_back_to",
    ),
    "study.tensors: the neurons behind a narrow layer's are neurons": Mutant(
        "return min(width, order.width(layer, inner))",
        "return width",
        "study/test_folder.py::test_layers_of_different_width",
    ),
    "study.opened: a file that a killed run began is read": Mutant(
        "not is_known and any(",
        "is_known and any(",
        "study/test_folder.py::test_what_is_unfinished_is_said",
    ),
    "study.folder: gains of sentences that were not scored count": Mutant(
        'if kept or asked.get("keep") != "known"',
        'if kept or asked.get("keep") == "known"',
        "study/test_folder.py::test_an_attribution",
    ),
    "study.facts: a study of other facts is overwritten": Mutant(
        "before != written if is_made",
        "False if is_made",
        "study/test_memory.py::test_another_model_other_facts_and_other_options_are_refused",
    ),
    "study.run: a stage of a model in memory names a command": Mutant(
        "_name_commands(place, [], _OF_A_MODEL)",
        "pass",
        "study/test_memory.py::test_it_writes_what_the_command_writes",
    ),
    "artifact.chosen: one set of several is taken": Mutant(
        "names is None and len(file.sets) != 1",
        "names is None and not file.sets",
        "artifact/test_chosen.py::test_one_set_needs_no_name_and_several_do",
    ),
    "model.stream.linear: what an adapter adds is left out": Mutant(
        "if adapters is None or module.merged",
        "if True or module.merged",
        "methods/gains/test_adapted.py::test_gains_are_those_of_what_hooks_hear",
    ),
    # analyses
    "analyses.drops: own and other relations are swapped": Mutant(
        "spread(drop[own]), spread(drop[~own])",
        "spread(drop[~own]), spread(drop[own])",
        "report/test_results.py::test_headline_by_hand",
    ),
    "analyses.outcomes: a relation is among the others": Mutant(
        "enumerate(grid.relations) if name != relation]",
        "enumerate(grid.relations)]",
        "analyses/test_analyses.py::test_sizes_by_hand",
    ),
    "analyses.uncertainty: what is as far from zero is not as extreme": Mutant(
        "np.abs(sums) >= total",
        "np.abs(sums) > total",
        "analyses/test_uncertainty.py::test_sign_flips_of_single_prompts_are_mcnemar_s_exact_test",
    ),
    "analyses.overlap: the share is of the other set": Mutant(
        "Share(n[j] / length if length else NAN)",
        "Share(n[j] / size[j] if size[j] else NAN)",
        "analyses/test_analyses.py::test_overlap_by_hand",
    ),
    "analyses.sizes: what neurons do not break alone is affected": Mutant(
        "(broken & ~alone)",
        "(broken & alone)",
        "analyses/test_analyses.py::test_cumulativity_by_hand",
    ),
    # artifact
    "artifact.neurons: equal scores go to the highest index": Mutant(
        'places = np.argsort(keys, kind="stable")[:k]',
        'places = keys.size - 1 - np.argsort(keys[::-1], kind="stable")[:k]',
        "model/test_ask.py::test_top_k_breaks_ties_by_layer_site_and_index",
    ),
    "artifact.neurons: every seed draws the same neurons": Mutant(
        "relneuron.random.{seed}",
        "relneuron.random.",
        "study/test_run.py::test_random_sets_are_as_large_and_all_differ",
    ),
    "artifact.manifest: a stage stays done when a file it read is another": Mutant(
        'name not in files or known.get(name, {}).get("sha256") != digest',
        "name not in files",
        "artifact/test_files.py::test_a_stage_is_forgotten_when_what_it_read_is_another",
    ),
    "artifact.manifest: a file of the same size is the same": Mutant(
        ' and sha256(path) == known["sha256"]',
        "",
        "artifact/test_files.py::test_a_file_of_the_same_size_is_another",
    ),
    "artifact.journal: a block that another process has taken is done, too": Mutant(
        "return self._taken == number",
        "return self._taken >= number",
        "artifact/test_journal.py::test_each_block_is_done_once_and_known_to_all[2]",
    ),
    "artifact.journal: what the others of a killed run have done is forgotten": Mutant(
        "self.done.read(part, self._head)",
        "pass",
        "artifact/test_journal.py::test_another_number_goes_on[3-2]",
    ),
    "artifact.parts: the first part says how many tokens memory had room for": Mutant(
        "min(budgets)",
        "budgets[0]",
        "artifact/test_parts.py::test_the_smallest_budget_stays",
    ),
    "artifact.blocks: the digest of a line is not compared": Mutant(
        'chained(self.last, text) != digest.decode(errors="replace")',
        "not digest",
        "artifact/test_files.py::test_a_flipped_bit_of_a_journal_is_found_and_what_follows_done_again[0]",
    ),
    "artifact.journal: lines that were replaced stay": Mutant(
        "return 2 * self.done.stale_bytes > self._end",
        "return False",
        "artifact/test_blocks.py::test_lines_that_were_replaced_are_left_out_when_they_outweigh_the_others",
    ),
    "artifact.journal: a budget takes the pieces of the block that it comes before": Mutant(
        "if key != BUDGET:\n            self._kept.clear()",
        "self._kept.clear()",
        "artifact/test_blocks.py::test_pieces_belong_to_the_block_that_is_added_next",
    ),
    "artifact.blocks: pieces whose block was cut are those of the next one": Mutant(
        "if lines.waiting_of != key:",
        "if False:",
        "artifact/test_blocks.py::test_pieces_of_a_block_that_never_ended_are_no_others",
    ),
    "ablation.said: a prompt beyond the last one is one of the next condition": Mutant(
        "if row.prompt >= self._n_prompts or at",
        "if at",
        "ablation/test_said.py::test_every_row_has_what_was_said_of_it",
    ),
    "artifact.effects: another language comes before other templates": Mutant(
        '"." in name, name',
        '"." not in name, name',
        "report/test_results.py::test_splits_share_their_rows_and_eva_comes_first",
    ),
    "artifact.options: what an option says counts where it does nothing": Mutant(
        "None if self.does_nothing(says) else getattr(self, name)",
        "getattr(self, name)",
        "artifact/test_options.py::test_what_is_recorded_and_printed",
    ),
    "artifact.stage: a path within the study is named as it was given": Mutant(
        "if not whole.is_relative_to(root):",
        "if whole != root:",
        "artifact/test_stage.py::test_paths_within_the_study_are_named_from_there",
    ),
    # report
    "report.tables: what was not measured counts as nothing": Mutant(
        "values[np.isfinite(values)]",
        "np.nan_to_num(values)",
        "analyses/test_analyses.py::test_accuracy_by_hand",
    ),
    "methods.gradients.facts: half of a fact's prompts is more than half": Mutant(
        "if n > bar)",
        "if n >= bar)",
        "methods/gradients/test_selections.py::"
        "test_a_neuron_of_half_of_the_prompts_is_not_of_more_than_half",
    ),
    "methods.gradients.clusters: common neurons stay": Mutant(
        "if not (remove and p in shared)",
        "if not (False and p in shared)",
        "methods/gradients/test_selections.py::test_query_neurons_of_the_vector",
    ),
    "methods.gradients.edit: an old answer is added, too": Mutant(
        "- options.old_factor * vectors[0]",
        "+ options.old_factor * vectors[0]",
        "methods/gradients/test_edit.py::"
        "test_moved_vectors_take_the_old_answer_off_and_add_the_new_one[output]",
    ),
    "ablation.conditions: a set is asked nothing but its own prompts": Mutant(
        "min(n or 0, len(others))",
        "0",
        "ablation/test_facts.py::test_a_set_of_a_fact_is_asked_its_prompts_and_some_others",
    ),
    "report.save: figures go over the files of a study": Mutant(
        'if is_of_study or (folder / "manifest.json").exists():',
        "if is_of_study:",
        "report/test_save.py::test_files_of_a_study_are_never_overwritten[study]",
    ),
    "report.paper: numbers stay in cells that are too small for them": Mutant(
        "if shrink * least >= SMALLEST or shrink == 1:",
        "if True:",
        "report/test_paper.py::test_numbers_that_do_not_fit_their_cells_become_dots_and_lines",
    ),
    "report.page: a hint of a kind of study is as good as a mark": Mutant(
        "([kind.marks for kind in ordered], [kind.hints for kind in ordered])",
        "([(*kind.marks, *kind.hints) for kind in ordered],)",
        "report/test_pages.py::test_the_folder_says_what_it_is",
    ),
    # ops, and whoever writes one
    "ops.swiglu_stats.gradient: a neuron that is off has a gradient": Mutant(
        "return [d.masked_fill(off, 0.0) for d in found]",
        "return found",
        "ops/swiglu_stats/test_gradient.py::test_a_dropped_neuron_has_none_whatever_its_values",
    ),
    "ops.swiglu_stats.gradient: compiled code with a gradient records nothing": Mutant(
        "            launch(None)\n",
        "            pass\n",
        "ops/swiglu_stats/test_gradient.py::test_compiled_code_gives_the_same",
    ),
    "bench.own: what breaks the contract is timed": Mutant(
        "assert reason is None, reason",
        "del reason",
        "bench/test_own.py::"
        "test_what_breaks_the_contract_has_no_time_though_the_bench_would_not_see_it",
    ),
}


def module_of(name: str) -> Path:
    """Where the module of a fault stands, from the package on."""
    return Path("relneuron", *name.partition(":")[0].split(".")).with_suffix(".py")


def run(folder: Path, tests: Sequence[str], module: Path | None = None) -> tuple[int, str]:
    """The end of a fork that runs tests with the package of `folder`, and what pytest said."""
    said = folder / "said"
    process = get_context("fork").Process(target=_become, args=(folder, tests, module, said))
    process.start()
    try:
        process.join(SECONDS * len(tests))
    finally:  # also on Ctrl-C
        process.kill()
        process.join()
    return process.exitcode or 0, said.read_text(encoding="utf-8", errors="replace")


def _become(folder: Path, tests: Sequence[str], module: Path | None, said: Path) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Before the finder of an editable install, which knows the checkout's modules.
    sys.meta_path.insert(0, PathFinder)
    sys.path.insert(0, str(folder))
    import pytest

    import relneuron  # noqa: F401  (now all of its modules are found beside it)

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/tmp"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    code = int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))
    files = {getattr(found, "__file__", None) for found in list(sys.modules.values())}
    if str(folder / (module or "relneuron/__init__.py")) not in files:
        sys.exit("the tests import another package than the copy")
    sys.exit(PASSED + code)


def copy_package(folder: Path) -> None:
    """The checkout's package, with the C++ extension from where it is installed."""
    shutil.copytree(
        ROOT / "relneuron", folder / "relneuron", ignore=shutil.ignore_patterns("__pycache__")
    )
    found = importlib.util.find_spec("relneuron._cpu")
    if found is not None and found.origin is not None:
        shutil.copy2(found.origin, folder / "relneuron")
    for name in [name for name in sys.modules if name.partition(".")[0] == "relneuron"]:
        del sys.modules[name]


def main(names: Sequence[str]) -> int:
    chosen = {n: m for n, m in MUTANTS.items() if not names or any(part in n for part in names)}
    if not chosen:
        print(f"no fault is named so; they are:\n{chr(10).join(MUTANTS)}")
        return 2
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest  # noqa: F401  (what every fork needs is imported once)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    survived = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        copy_package(folder)
        code, said = run(folder, list(dict.fromkeys(m.test for m in chosen.values())))
        if code != PASSED:
            print(f"{said}\nthe tests fail without a fault: {code}")
            return 2
        for number, (name, mutant) in enumerate(chosen.items()):
            module, began = module_of(name), time.monotonic()
            path = folder / module
            whole = path.read_text(encoding="utf-8")
            assert whole.count(mutant.old) == 1, f"{name}: its text does not stand there once"
            path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
            os.utime(path, (number, number))  # its bytecode is told from another one's by the time
            code, said = run(folder, [mutant.test], module)
            path.write_text(whole, encoding="utf-8")
            what = {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"BROKEN ({code})")
            print(f"{what:9}{time.monotonic() - began:5.1f} s  {name}", flush=True)
            if code != FAILED:
                survived += 1
                print(f"{said[-2000:]}\n{mutant.test}", flush=True)
    n_seconds = sum(os.times()[:4])
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught, {n_seconds:.0f} CPU-seconds")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
