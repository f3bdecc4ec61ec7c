"""Log-probability gains against the plain torch computation.

One test per contestant and case; conftest.py measures, relneuron/bench/gain.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "logprob_gain"


@pytest.mark.benchmark(timer=CLOCK)
def test_logprob_gain(replay) -> None:
    replay()
