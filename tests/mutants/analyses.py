"""Faults of `analyses`: from answers to tables."""

from tests.mutants.mutant import Mutant

FAULTS = {
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
        "share = shared / np.where(length, length, NAN)",
        "share = shared / np.where(size, size, NAN)",
        "analyses/test_analyses.py::test_overlap_by_hand",
    ),
    "analyses.sizes: what neurons do not break alone is affected": Mutant(
        "(broken & ~alone)",
        "(broken & alone)",
        "analyses/test_analyses.py::test_cumulativity_by_hand",
    ),
}
