"""Faults of `artifact`: files, options, and how a study is resumed."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "artifact.neurons: a narrow layer is as wide as the others": Mutant(
        "if self.inner is None else self.inner[layer]",
        "",
        "model/test_mlps.py::test_layers_may_differ_in_width_or_have_no_mlp",
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
    "artifact.counts: a deviation is that of the population": Mutant(
        "variance = np.maximum(total_sq - total * (total / n), 0) / (n - 1)",
        "variance = np.maximum(total_sq - total * (total / n), 0) / n",
        "artifact/test_contrast.py::test_e3",
    ),
    "artifact.chosen: one set of several is taken": Mutant(
        "names is None and len(file.sets) != 1",
        "names is None and not file.sets",
        "artifact/test_chosen.py::test_one_set_needs_no_name_and_several_do",
    ),
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
}
