"""Faults of `texts`: what is asked and read."""

from tests.mutants.mutant import Mutant

FAULTS = {
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
    "texts.windows: empty documents are left out between joined ones": Mutant(
        'self.packing.join is not None and piece.content == ""',
        "False",
        "texts/test_windows.py::test_joined_documents_are_tokenised_as_one",
    ),
}
