"""For those who write a backend of an op, or test with our rule; needs torch and numpy only.

`check_backend(fn)` holds an implementation to the op's contract, `backend_checks()` gives the same
checks one by one for a test runner; docs/backend.md shows both. `assert_accurate` is the one
tolerance rule of this project.
"""

from relneuron.testing import (  # noqa: F401  they register
    checks_gain,
    checks_h,
    checks_histogram,
    checks_pair,
    checks_peaks,
    checks_ranking,
    checks_stats,
    checks_sums,
    checks_ungated,
)
from relneuron.testing.accuracy import assert_accurate, assert_same_bits
from relneuron.testing.contract import (
    Check,
    ContractError,
    Report,
    backend_checks,
    check_backend,
)
from relneuron.testing.ops import FEATURES, OPS

__all__ = [
    "FEATURES",
    "OPS",
    "Check",
    "ContractError",
    "Report",
    "assert_accurate",
    "assert_same_bits",
    "backend_checks",
    "check_backend",
]
