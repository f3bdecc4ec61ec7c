"""Compares what our launches launch with what Triton would; test_launches.py runs this file.

With the name of one of FAULTS that is put in first, and an assertion fails.

A driver that launches nothing (bench/host.py) sees both: the grid, the compiled kernel, the
arguments. Prints {what was seen: number} as JSON.
"""

# mypy: ignore-errors

from __future__ import annotations

import collections
import json
import random
import sys

import torch

from bench import host
from relneuron import ops
from relneuron.ops import launches
from relneuron.ops.logprob_gain import triton_launch as gain_launch
from relneuron.ops.swiglu_stats import repeat
from relneuron.ops.swiglu_stats import triton_launch as swiglu_launch

own_are_all_pairs = gain_launch._are_all_pairs
DRIVER = host.install()
host.take_cpu_tensors()
SEEN = collections.Counter()
KERNELS = collections.defaultdict(set)
DTYPES = {}


def seen() -> tuple:
    """Of the last launch what decides: kernel, grid, and the arguments that are not constants."""
    x, y, z, _, function, *_ = DRIVER.launched
    args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in DRIVER.launched[9:]]
    return function, (x, y, z), args


def run(launch: launches.Launch) -> None:
    own_run(launch)
    ours = seen()
    form = launch.form
    dtypes = [None if t is None else t.dtype for t in launch.tensors]
    known = DTYPES.setdefault(form, dtypes)
    assert all(a is b for a, b in zip(dtypes, known, strict=True) if a and b), "a form has dtypes"
    SEEN["launches"] += 1
    form.kernel[form.grid](**launch.args, **launch.constants, **launch.compiler_options())
    assert ours == seen(), (form.kernel, ours, seen())
    KERNELS[form.kernel.__name__].add(ours[0])
    before = SEEN["by triton"]
    own_run(launch)
    assert ours == seen() and SEEN["by triton"] == before, "the second time Triton is not asked"


def count_triton(kernel: object) -> None:
    own = kernel.run

    def counted(*args, **kwargs):
        SEEN["by triton"] += 1
        return own(*args, **kwargs)

    kernel.run = counted


def kept_forms(call, out, config, is_nvidia) -> swiglu_launch.Forms:
    """Those of a known call are those that its shapes would give."""
    SEEN["known calls"] += call.known is not None and call.known.kept is not None
    found = own_kept_forms(call, out, config, is_nvidia)
    assert found is swiglu_launch._forms(swiglu_launch.Shapes.of(call, out), config, is_nvidia)
    return found


own_run, launches.Launch.run = launches.Launch.run, run
own_kept_forms, swiglu_launch._kept_forms = swiglu_launch._kept_forms, kept_forms
dice, places = random.Random(0), random.Random(1)


def matrix(rows: int, width: int, dtype: torch.dtype, *, fill: float = 0.5) -> torch.Tensor:
    """Rows of some stride that begin somewhere: both decide what is compiled."""
    stride = width + dice.choice([0, 0, 3, 16])
    start = places.choice([0, 0, 1, 16])
    return torch.full((start + rows * stride,), fill, dtype=dtype).as_strided(
        (rows, width), (stride, 1), start
    )


def swiglu() -> None:
    rows, width = dice.choice([1, 2, 16, 33]), dice.choice([16, 1, 48, 40])
    dtype = dice.choice([torch.bfloat16, torch.float16, torch.float32])
    gate, up = matrix(rows, width, dtype), matrix(rows, width, dtype)
    groups = dice.choice([0, 1, 3, 20])
    ids = torch.zeros(rows + 1, dtype=torch.int32)
    options = {}
    residual = dice.random() < 0.3
    if groups:
        sites = dice.choice([("act",), ("up", "gate"), ("product",)])
        stats = ops.GroupStats(
            groups=groups,
            width=width,
            sites=("down",) if residual else sites,
            moments=dice.random() < 0.5,
            threshold=dice.choice([0.0, -0.1]),
        )
        options |= {"stats": stats, "group_ids": ids[places.choice([0, 1]) :][:rows]}
    if dice.random() < 0.4:
        keep = torch.full((2, (width + 31) // 32), -1, dtype=torch.int32)
        options |= {"keep": keep, "condition_ids": ids[:rows] if dice.random() < 0.5 else None}
    if dice.random() < 0.3:
        site = "down" if residual else dice.choice(["gate", "act"])
        sums = {site: matrix(dice.choice([1, 4]), width, torch.float32)}
        options |= {"responses": sums, "prompt_ids": ids[:rows]}
    if not residual:
        options["activation"] = dice.choice(["silu", "silu", "relu"])
    run_op = ops.residual_stats if residual else ops.swiglu_stats
    run_op(gate, up, backend="triton", **options)
    if not residual and not (groups and stats.sites != ("act",)):
        run_op(gate, None, backend="triton", **options)
    if "keep" in options:  # the same numbers, with and without a tensor
        options["condition_ids"] = None if options["condition_ids"] is not None else ids[:rows]
        run_op(gate, up, backend="triton", **options)


def pair() -> None:
    rows, width = dice.choice([1, 2, 16, 33]), dice.choice([16, 1, 48, 40])
    dtype = dice.choice([torch.bfloat16, torch.float16, torch.float32])
    a, b = matrix(rows, width, dtype), matrix(rows, width, dtype)
    stats = ops.GroupStats(
        groups=dice.choice([1, 3, 20]),
        width=width,
        sites=dice.choice([ops.PAIR_SITES, ("difference",), ("a", "b")]),
        moments=dice.random() < 0.7,
    )
    ids = torch.zeros(rows + 1, dtype=torch.int32)[places.choice([0, 1]) :][:rows]
    ops.pair_stats(a, b, stats=stats, group_ids=ids, backend="triton")


def peaks() -> None:
    rows, width = dice.choice([1, 2, 16, 33]), dice.choice([16, 1, 48, 40])
    dtype = dice.choice([torch.bfloat16, torch.float16, torch.float32])
    gate, up = matrix(rows, width, dtype), matrix(rows, width, dtype)
    n, k = dice.choice([1, 3, 16]), dice.choice([1, 5, 16])
    ids = torch.zeros(rows + 1, dtype=torch.int32)[places.choice([0, 1]) :][:rows]
    values, positions = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.int32)
    options = {"site": dice.choice(["gate", "up", "act", "product"]), "backend": "triton"}
    own = {"values": values, "positions": positions, "first_row": dice.choice([0, 1, 16])}
    ops.peaks(gate, up, segment_ids=ids, **own, **options)
    if n == 1:
        ops.peaks(gate, up, **own, **options)
    numbers, groups = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    best = ops.BestPeaks.none(dice.choice([1, 2]), width, k)
    ops.merge_peaks(
        *(values, positions), best=best, numbers=numbers, group_ids=groups, backend="triton"
    )
    counts = torch.zeros(n, width, dice.choice([1, 16, 30]), dtype=torch.int64)
    edges = {name: torch.zeros(width, dtype=torch.int32) for name in ("exponent", "first")}
    ops.histogram(gate, up, counts=counts, **edges, group_ids=ids, **options)


def rank() -> None:
    rows, columns = dice.choice([1, 2, 16, 40]), dice.choice([1, 3, 16])
    dtype = dice.choice([torch.bfloat16, torch.float32])
    values = matrix(rows, columns, dtype)
    values = values if dice.random() < 0.5 else values.T.contiguous().T
    labels = torch.ones(dice.choice([1, 2, 16]), rows, dtype=torch.int8)
    weights = torch.ones_like(labels, dtype=torch.uint8) if dice.random() < 0.3 else None
    ops.average_precision(values, labels, weights=weights, backend="triton")


def gain() -> None:
    n_sentences, n_neurons, width = dice.choice([1, 2, 8]), dice.choice([1, 5, 16]), 4
    x, values, unembed = (torch.ones(n, width) for n in (n_sentences, n_neurons, 24))
    coefficients = torch.ones(n_sentences, n_neurons)
    after = torch.ones_like(coefficients) * 2 if dice.random() < 0.4 else None
    targets = torch.zeros(n_sentences, dtype=torch.int64)
    scale = torch.ones(n_sentences)
    given = (x, values, coefficients, unembed, scale, targets)
    mode = dice.choice(["exact", "certified"])
    # Which pairs are left hangs on sums that nobody computes here: some are listed in any case.
    is_listed = dice.random() < 0.3
    gain_launch._are_all_pairs = (lambda *_: False) if is_listed else own_are_all_pairs
    ops.logprob_gain(*given, mode=mode, scale_after=after, backend="triton", tolerance=1e-9)
    if after is None:
        ops.logprob_gain(*given, mode="top", top=1, backend="triton")


def without_strides(*given: object) -> object:
    """Two matrices of a shape are alike, whatever is between their rows."""
    key = own_likeness(*given)
    return key and tuple(part for part in key if type(part) is not tuple or len(part) != 2)


op = sys.modules["relneuron.ops.swiglu_stats.op"]
own_likeness = repeat.likeness
FAULTS = {
    "alignment": (launches, "_likeness", lambda tensors: tuple(t is None for t in tensors)),
    "None": (launches, "_likeness", lambda tensors: tuple(is_aligned(t) for t in tensors)),
    "strides": (op, "likeness", without_strides),
}


def is_aligned(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.data_ptr() % 16 == 0


def main(fault: str | None = None) -> None:
    if fault is not None:
        setattr(*FAULTS[fault])
    from relneuron.ops.average_precision import triton_launch as ranking
    from relneuron.ops.logprob_gain import triton_kernels as gains
    from relneuron.ops.peaks import triton_kernels as peaks_kernels
    from relneuron.ops.swiglu_stats import triton_kernels, triton_sums

    for module in (ranking, gains, peaks_kernels, triton_kernels, triton_sums):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                count_triton(kernel)
    for op, n in ((swiglu, 250), (pair, 60), (peaks, 40), (rank, 40), (gain, 20)):
        for _ in range(n):
            # The same call of tensors that begin elsewhere: one is checked, the next one keeps its
            # plan, the third one takes it.
            state = dice.getstate()
            for _ in range(3):
                dice.setstate(state)
                op()
    print(json.dumps({**SEEN, **{name: len(found) for name, found in KERNELS.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
