"""SwiGLU with statistics against eager torch, torch.compile, Liger and the triad.

One test per contestant and case; conftest.py measures, relneuron/bench/suite.py lists both.
"""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK

OP = "swiglu_stats"


@pytest.mark.benchmark(timer=CLOCK)
def test_swiglu_stats(replay) -> None:
    replay()
