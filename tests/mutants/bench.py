"""Faults of `bench`: who is timed."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "bench.own: what breaks the contract is timed": Mutant(
        "assert reason is None, reason",
        "del reason",
        "bench/test_own.py::"
        "test_what_breaks_the_contract_has_no_time_though_the_bench_would_not_see_it",
    ),
}
