"""Average precision against batched sorts in torch and numpy, and the loops of libraries.

One test per contestant and case; conftest.py measures, relneuron/bench/ranking.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "average_precision"


@pytest.mark.benchmark(timer=CLOCK)
def test_average_precision(replay) -> None:
    replay()
