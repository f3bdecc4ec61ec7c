"""Faults of `study`: whole studies, from Python as from the command line."""

from tests.mutants.mutant import Mutant

FAULTS = {
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
}
