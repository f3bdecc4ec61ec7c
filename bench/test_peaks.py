"""The op peaks against the plain torch computation.

One test per contestant and case; conftest.py measures, relneuron/bench/peaks.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "peaks"


@pytest.mark.benchmark(timer=CLOCK)
def test_peaks(replay) -> None:
    replay()
