"""Faults of `report`: pages, figures and tables."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "report.tables: what was not measured counts as nothing": Mutant(
        "values[np.isfinite(values)]",
        "np.nan_to_num(values)",
        "analyses/test_analyses.py::test_accuracy_by_hand",
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
}
