"""Average precision against scikit-learn's loop and the torch reference.

One test per contestant and case; conftest.py measures, relneuron/bench_suite.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "average_precision"


@pytest.mark.benchmark(timer=CLOCK)
def test_average_precision(replay) -> None:
    replay()
