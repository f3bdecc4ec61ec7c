"""Faults of `methods`: the ways to find neurons, a part each."""

from tests.mutants.mutant import Mutant

FAULTS = {
    # counts
    "methods.counts.mmneuron_files: a module's layers are not numbered through": Mutant(
        '(place.layers[layer], "gate", index, 0.0)',
        '(layer, "gate", index, 0.0)',
        "methods/counts/test_mmneuron_files.py::test_masks_of_several_modules",
    ),
    "methods.counts.merge: every corpus begins with the first window of its groups": Mutant(
        "before.setdefault(corpus, dict(seen))",
        "before.setdefault(corpus, {})",
        "methods/counts/test_examples.py::test_corpora_are_merged_as_if_one_stood_behind_the_other",
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
    # responses
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
    # contrast
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
    "methods.contrast.classify: a probe is measured on what it learnt": Mutant(
        "fit(values[inside], labels[inside])",
        "fit(values, labels)",
        "methods/contrast/test_probe.py::test_cross_validation_is_that_of_scikit_learn",
    ),
    # gains
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
    # gradients
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
}
