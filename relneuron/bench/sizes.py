"""The cases of `relneuron bench`: of every op, in suites of three sizes."""

from __future__ import annotations

from relneuron.bench import gain as bench_gain
from relneuron.bench import pair_stats as bench_pair
from relneuron.bench import peaks as bench_peaks
from relneuron.bench import ranking as bench_ranking
from relneuron.bench.case import Case

# quick: seconds, for tests; usual: what `relneuron bench` runs; full: every size and layout.
SUITES = {
    "quick": [
        *(Case(dtype=dtype, T=64, F=352) for dtype in ("float32", "bfloat16")),
        *bench_ranking.QUICK,
        *bench_gain.QUICK,
        *bench_pair.QUICK,
        *bench_peaks.QUICK,
    ],
    "usual": [
        # Decoding has a row or a few a call: there the inputs are in the caches.
        *(
            Case(dtype=dtype, T=T)
            for dtype in ("float32", "bfloat16")
            for T in (1, 8, 64, 2048, 8192)
        ),
        *bench_ranking.USUAL,
        *bench_gain.USUAL,
        *bench_pair.USUAL,
        *bench_peaks.USUAL,
    ],
    "full": [
        *(
            Case(dtype=dtype, T=T, layout=layout)
            for dtype in ("float32", "bfloat16", "float16")
            for layout in ("sorted", "mixed")
            for T in (64, 512, 2048, 8192)
        ),
        *bench_ranking.FULL,
        *bench_gain.FULL,
        *bench_pair.FULL,
        *bench_peaks.FULL,
    ],
}
