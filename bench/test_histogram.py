"""The op histogram against the plain torch computation.

One test per contestant and case; conftest.py measures, relneuron/bench/peaks.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "histogram"


@pytest.mark.benchmark(timer=CLOCK)
def test_histogram(replay) -> None:
    replay()
