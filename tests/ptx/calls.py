"""A call of each op with a kernel, through PTX and through the reference; chosen.py says which.

Integers must be equal, floats obey the accuracy rule (`relneuron/testing/accuracy.py`). All of it
runs within `Stand.installed`; a call that is wrong raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.ops import (
    PAIR_SITES,
    BestPeaks,
    GroupStats,
    average_precision,
    backends,
    histogram_edges,
    logprob_gain,
    pair_stats,
    residual_stats,
    site_range,
)
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing import assert_accurate, assert_same_bits
from relneuron.testing.oracle import assert_h, integers, keep_mask, normal
from relneuron.testing.oracle_peaks import wild


def _ids(n_tokens: int, groups: int, order: str, seed: int) -> Tensor:
    ids = integers(-1, groups, n_tokens, seed=seed)
    if order == "sorted":
        return ids.sort().values
    return ids if order == "mixed" else torch.full_like(ids, groups - 1)


def _words(n: int, width: int, seed: int) -> Tensor:
    return integers(-(2**31), 2**31 - 1, n, (width + 31) // 32, seed=seed)


# --- swiglu_stats, residual_stats and pair_stats -------------------------------------------------


def swiglu(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (144, 512),
    *,
    sites: tuple[str, ...] = (),
    moments: bool = False,
    groups: int = 3,
    order: str = "sorted",
    threshold: float = 0.0,
    activation: str = "silu",
    gated: bool = True,
    responses: tuple[str, ...] = (),
    mask: bool = False,
    conditions: int = 0,
    bad: bool = False,
    seed: int = 0,
) -> None:
    """One call; `bad` puts values into gate and up that are not finite."""
    from tests.ops.swiglu_stats.runs import assert_same, run

    n_tokens, width = shape
    gate = normal(*shape, dtype=dtype, seed=seed + 1)
    up = normal(*shape, dtype=dtype, seed=seed + 2) if gated else None
    if bad:
        gate[n_tokens // 2, width // 3] = torch.nan
        (gate if up is None else up)[n_tokens // 3, width // 2] = torch.inf
    kwargs: dict[str, Any] = {"activation": activation}
    if sites:
        kwargs["stats"] = {
            "groups": groups,
            "sites": sites,
            "moments": moments,
            "threshold": threshold,
        }
        kwargs["group_ids"] = _ids(n_tokens, groups, order, seed + 3)
    if responses:
        kwargs |= {"response_sites": responses, "n_prompts": 5}
        kwargs["prompt_ids"] = _ids(n_tokens, 5, order, seed + 4)
    if mask or conditions:
        kwargs["keep"] = _words(max(1, conditions), width, seed + 5)
    if conditions:
        kwargs["condition_ids"] = _ids(n_tokens, conditions, order, seed + 6).clamp(min=0)
    result = run("triton", gate, up, **kwargs)
    assert_same(result, run("reference", gate, up, **kwargs))
    kept = None
    if "keep" in kwargs:
        kept = keep_mask(kwargs["keep"], kwargs.get("condition_ids"), *shape)
    if dtype == torch.float32:
        # One sequence of operations is the activation in all backends, to the last bit.
        site = "act" if up is None else "product"
        h = site_values(gate, up, activation, [site])[site]
        assert_same_bits(result.h, h if kept is None else h.where(kept, 0.0), "h")
    elif not bad:
        assert_h(result.h, gate, up, activation, kept)


def residual(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (144, 512),
    *,
    moments: bool = False,
    order: str = "sorted",
    conditions: int = 2,
    seed: int = 0,
) -> None:
    n_tokens, width = shape
    x, rest = (normal(*shape, dtype=dtype, seed=seed + at) for at in (1, 2))
    stats = GroupStats(groups=3, width=width, sites=("down",), threshold=0.1, moments=moments)
    ids = _ids(n_tokens, 3, order, seed + 3)
    masks: dict[str, Tensor] = {}
    expected = rest + x
    if conditions:
        masks["keep"] = _words(conditions, width, seed + 5)
        masks["condition_ids"] = _ids(n_tokens, conditions, order, seed + 6).clamp(min=0)
        kept = keep_mask(masks["keep"], masks["condition_ids"], *shape)
        expected = torch.where(kept, expected, rest)
    y = residual_stats(x, rest, stats=stats, group_ids=ids, backend="triton", **masks)
    assert_same_bits(y, expected, "y")
    wide = x.double()
    rows = [wide[ids == group] for group in range(3)]
    hits = torch.stack([(r > torch.tensor(0.1)).sum(0) for r in rows])
    assert_same_bits(stats.count["down"], hits, "count")
    assert stats.tokens.tolist() == [len(r) for r in rows]
    if moments:
        for name, terms in (("sum", rows), ("sum_sq", [r**2 for r in rows])):
            truth = torch.stack([r.sum(0) for r in terms])
            baseline = torch.stack([r.float().sum(0) for r in terms])
            scale = torch.stack([r.abs().sum(0) * max(1, len(r)) ** 0.5 for r in terms])
            assert_accurate(getattr(stats, name)["down"].float(), truth, baseline, scale)


def pair(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (144, 512),
    *,
    sites: tuple[str, ...] = PAIR_SITES,
    moments: bool = True,
    groups: int = 3,
    order: str = "sorted",
    bad: bool = False,
    seed: int = 0,
) -> None:
    """One call; `bad` puts values into both tensors that are not finite."""
    from tests.ops.swiglu_stats.runs import TritonTolerance, assert_same_stats

    n_tokens, width = shape
    a, b = (normal(*shape, dtype=dtype, seed=seed + at) for at in (1, 2))
    if bad:
        a[n_tokens // 2, width // 3], b[n_tokens // 3, width // 2] = torch.nan, torch.inf
    ids, found = _ids(n_tokens, groups, order, seed + 3), []
    for backend in ("triton", "reference"):
        stats = GroupStats(groups=groups, width=width, sites=sites, threshold=0.1, moments=moments)
        pair_stats(a, b, stats=stats, group_ids=ids, backend=backend)
        found.append(stats)
    assert_same_stats(*found, exact_sums=False, tolerance=TritonTolerance(0.0, {}))


# --- peaks and histogram -------------------------------------------------------------------------


def peaks(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (144, 512),
    *,
    site: str = "act",
    segments: int = 5,
    k: int = 4,
    order: str = "sorted",
    bad: bool = False,
    activation: str = "silu",
    seed: int = 0,
) -> None:
    """A call of peaks, and its peaks merged twice; `bad` puts special values into gate."""
    from tests.ops.peaks.runs import run_merge, run_peaks

    gate, up = _site_inputs(dtype, shape, bad, seed)
    ids = _ids(shape[0], segments, order, seed + 3)
    numbers = integers(0, 9, segments, seed=seed + 4).long()
    groups = integers(-1, 2, segments, seed=seed + 5)
    found = []
    for backend in ("triton", "reference"):
        options = {"site": site, "activation": activation, "first_row": seed}
        values, positions = run_peaks(backend, gate, up, ids, segments, **options)  # type: ignore[arg-type]
        best = BestPeaks.none(2, shape[1], k)
        for shift in (0, 4):
            best = run_merge(backend, best, values, positions, numbers + shift, groups)
        found.append((values, positions, best.value, best.number, best.position))
    for ours, expected in zip(*found, strict=True):
        assert_same_bits(ours, expected)


def bins(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (144, 512),
    *,
    site: str = "act",
    groups: int = 3,
    n_bins: int = 16,
    order: str = "sorted",
    bad: bool = False,
    seed: int = 0,
) -> None:
    """A call of histogram, with bins of its own values."""
    from tests.ops.peaks.runs import run_histogram

    gate, up = _site_inputs(dtype, shape, bad, seed)
    ids = _ids(shape[0], groups, order, seed + 3)
    edges = histogram_edges(*site_range(gate, up, site=site), n_bins)
    before = integers(0, 9, groups, shape[1], n_bins).long()
    ours, expected = (
        run_histogram(backend, gate, up, ids, before, *edges, site=site)
        for backend in ("triton", "reference")
    )
    assert_same_bits(ours, expected)


def _site_inputs(
    dtype: torch.dtype, shape: tuple[int, int], bad: bool, seed: int
) -> tuple[Tensor, Tensor]:
    gate = (wild if bad else normal)(*shape, dtype=dtype, seed=seed + 1)
    return gate, normal(*shape, dtype=dtype, seed=seed + 2)


# --- average_precision ---------------------------------------------------------------------------


def ranking(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (300, 3),
    *,
    relations: int = 12,
    most: int = 0,
    seed: int = 0,
) -> None:
    """With weights up to `most`; the result has the reference's bits."""
    n, m = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, m, generator=generator, dtype=torch.float64)
    # Columns without ties, with some, and with two values and zeros of both signs.
    values[:, 1::3] = (2 * values[:, 1::3]).round()
    values[:, 2::3] = torch.where(values[:, 2::3] > 0.5, 0.25, values[:, 2::3].sign() * 0.0)
    labels = torch.randint(-1, 2, (relations, n), generator=generator, dtype=torch.int8)
    labels[:, n // 2], labels[:, -1] = 1, 0
    weights = None
    if most:
        weights = torch.randint(0, most + 1, labels.shape, generator=generator, dtype=torch.uint8)
        weights[:, n // 2], weights[:, -1] = most, most
    results = [
        average_precision(values.to(dtype), labels, weights=weights, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert_same_bits(*results, "average precision")


def ranking_of_far_columns() -> None:
    """Columns 2^29 numbers apart: the last one is 2^31 from the first."""
    # numpy's zeros take no memory until something is written there.
    room = torch.from_numpy(np.zeros(5 << 29, np.int16)).view(torch.bfloat16)
    values = room.as_strided((40, 5), (1, 1 << 29))
    values.copy_(normal(40, 5, dtype=torch.bfloat16))
    labels = integers(0, 2, 2, 40).to(torch.int8)
    results = [
        average_precision(each, labels, backend="triton") for each in (values, values.clone())
    ]
    assert_same_bits(*results, "average precision")


# --- logprob_gain --------------------------------------------------------------------------------


def gain(
    shape: tuple[int, int, int, int] = (16, 600, 16, 12),
    dtype: torch.dtype = torch.float32,
    *,
    size: float = 0.3,
    is_tilted: bool = False,
    is_listed: bool = False,
    seed: int = 0,
) -> None:
    """Sums over the vocabulary of all pairs, or of a list: (neurons, tokens, sentences, hidden)."""
    n_neurons, n_tokens, n_sentences, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    values, unembed = draw(n_neurons, hidden).to(dtype), draw(n_tokens, hidden).to(dtype)
    p, z = draw(n_sentences, n_tokens).softmax(1), draw(n_sentences, n_tokens)
    t, tilt = size * draw(n_sentences, n_neurons), 0.1 * draw(n_sentences, n_neurons)
    launcher = backends.triton_module("logprob_gain")
    more: tuple[Tensor, ...] = (tilt, z) if is_tilted else ()
    if is_listed:
        counts = torch.randint(0, 4, (n_neurons,), generator=generator)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        of = torch.randint(n_sentences, (int(starts[-1]),), generator=generator)
        neuron = torch.repeat_interleave(counts)
        more = (tilt[of, neuron], z) if is_tilted else ()
        pairs = starts, of.int(), t[of, neuron]
        sums, _ = launcher.gain_sums(values, unembed, p, *pairs, *more)
    else:
        of, neuron = (
            each.flatten()
            for each in torch.meshgrid(
                torch.arange(n_sentences), torch.arange(n_neurons), indexing="ij"
            )
        )
        sums, _ = launcher.gain_sums_dense(values, unembed, p, t, *more)
        sums = sums.flatten()

    def terms(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        b = (values.to(kind) @ unembed.to(kind).T)[neuron]
        y = t.to(kind)[of, neuron][:, None] * b
        if is_tilted:
            y = y + tilt.to(kind)[of, neuron][:, None] * z.to(kind)[of]
        return p.to(kind)[of] * torch.expm1(y), y

    truth, y = terms(torch.float64)
    norms = values.double().norm(dim=1)[neuron][:, None] * unembed.double().norm(dim=1)
    reach = t.double()[of, neuron].abs()[:, None] * norms
    if is_tilted:
        reach = reach + (tilt.double()[of, neuron][:, None] * z.double()[of]).abs()
    # Inner products may be off by 8 units of 2^-24 times the product of norms, see the op.
    scale = truth.abs() + 4 * p.double()[of] * y.abs().exp() * reach
    baseline = terms(torch.float32)[0].sum(1)
    assert_accurate(sums.float(), truth.sum(1), baseline, scale.sum(1))


def moments(shape: tuple[int, int, int, int] = (20, 600, 9, 6), *, seed: int = 0) -> None:
    """The second and third moments; of integers, so that the products behind them are exact."""
    n_neurons, n_tokens, n_sentences, hidden = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (n_neurons, hidden), generator=generator).float()
    values[-1] *= 2**-9
    unembed = torch.randint(-3, 4, (n_tokens, hidden), generator=generator).float()
    p = torch.randn(n_sentences, n_tokens, generator=generator).softmax(1)
    b = values.double() @ unembed.double().T
    *found, _ = backends.triton_module("logprob_gain").moment_sums(values, unembed, p)
    for n, sums in zip((2, 3), found, strict=True):
        truth = b**n @ p.double().T
        baseline = b.float() ** n @ p.T
        # Three products of tf32 have two bits less than float32.
        scale = 4 * (b.abs() ** n @ p.double().T)
        assert_accurate(sums.float(), truth, baseline, scale)


def certified(shape: tuple[int, int, int, int, int], *, size: float, seed: int = 0) -> None:
    """The public op within its own tolerance of the definition in float64."""
    from tests.ops.gain_problems import naive, problem

    given = problem(shape, size=size, seed=seed)
    found = logprob_gain(**given, mode="certified", tolerance=1e-5, backend="triton")
    truth = naive(given)
    allowed = 1e-5 + 2.0**-24 * truth.abs()
    worst = float(((found.double() - truth).abs() - allowed).max())
    assert worst <= 0, f"{worst} above the tolerance"
