"""Faults of `model`: what a model computes, and what is read and changed in it."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "model.states: patches of a picture take the conditions of other rows": Mutant(
        "rows.repeat_interleave(n_positions // len(rows))",
        "rows.repeat(n_positions // len(rows))",
        "ablation/test_pictures.py::test_logits_of_each_module_are_those_of_hooks",
    ),
    "model.lens: the lens reads the first column": Mutant(
        "self._h[number] = y[:, -1]", "self._h[number] = y[:, 0]", "model/test_lens.py::test_llama"
    ),
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
    "model.spared: what comes before the attention is not looked at": Mutant(
        "next((one for one in tried if _is_exact(one, model, mlps, prompt)), None)",
        "tried[0]",
        "model/test_spared.py::test_an_attention_behind_the_mlp_is_not_shared",
    ),
    "model.spared: few tokens run alone, in other bits": Mutant(
        "least = max(len(firsts), -(-LEAST_TOKENS // n_tokens), N_AXES + 1)",
        "least = max(len(firsts), N_AXES + 1)",
        "model/test_spared.py::test_what_is_spared_changes_no_bit[llama-]",
    ),
    "model.spared: few columns are multiplied alone, in other bits": Mutant(
        "is_cut = n_asked < n_tokens and len(prompts) * n_asked >= LEAST_TOKENS",
        "is_cut = n_asked < n_tokens",
        "model/test_spared.py::test_few_rows_and_tokens_are_computed_as_ever",
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
    "model.states: outputs of up are not switched off": Mutant(
        "on = ~np.logical_or.reduce(products)",
        "on = ~products[0]",
        "ablation/test_evaluate.py::test_all_conditions_at_once_are_edited_weights",
    ),
    "model.paired: rows that ended stay in the adapter's half of the cache": Mutant(
        "torch.cat([rows, rows + n_before])",
        "torch.cat([rows, rows])",
        "ablation/test_patching.py::test_an_adapter_whose_rows_share_a_forward",
    ),
    "model.products: the first token is read": Mutant(
        "h[:, -1, torch.tensor",
        "h[:, 0, torch.tensor",
        "methods/contrast/test_probe.py::test_products_are_those_of_plain_hooks",
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
    "model.classifier: texts are filled up with a token that one ends in": Mutant(
        "if t not in last",
        "if t >= 0",
        "model/test_classifier.py::test_no_pad_token_is_the_last_one_of_a_text",
    ),
    "model.stream.linear: what an adapter adds is left out": Mutant(
        "if adapters is None or module.merged",
        "if True or module.merged",
        "methods/gains/test_adapted.py::test_gains_are_those_of_what_hooks_hear",
    ),
}
