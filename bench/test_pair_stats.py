"""Two tensors and their difference, counted, against the plain torch computation.

One test per contestant and case; conftest.py measures, relneuron/bench/pair_stats.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "pair_stats"


@pytest.mark.benchmark(timer=CLOCK)
def test_pair_stats(replay) -> None:
    replay()
