"""Tests of ops.swiglu_stats: every backend and instruction set against the reference and the spec.

Counts, tokens, maxima and non-finite counts must be equal bit for bit; h is held to the accuracy
rule. Triton runs in its interpreter where there is no GPU (TRITON_INTERPRET=1, from conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.ops import SITES, GroupStats, backends, swiglu_stats
from relneuron.testing import assert_accurate, assert_same_bits
from relneuron.testing.oracle import normal
from tests.kit.interpreter import IS_INTERPRETED, quiet
from tests.ops.swiglu_stats.cases import CASES, DTYPES, all_patterns, busy, case, keep_mask, oracle
from tests.ops.swiglu_stats.runs import (
    BACKENDS,
    assert_same,
    assert_same_stats,
    device_of,
    run,
    tiles,
)

pytestmark = quiet


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend: str, name: str, dtype: torch.dtype) -> None:
    gate, up, kwargs = case(name, dtype)
    if name == "ragged" and backend == "triton" and IS_INTERPRETED:
        gate, up = gate[:67], up[:67]
        for key in ("group_ids", "prompt_ids", "condition_ids"):
            kwargs[key] = kwargs[key][:67]
    launch = None
    if backend == "triton" and name.startswith("tile"):
        launch = tiles(dtype, 8, 4, 256)
    elif backend == "triton" and name == "strided":  # as on a GPU
        launch = backends.triton_module("swiglu_stats").DEFAULT_LAUNCH
    result = run(backend, gate, up, launch=launch, **kwargs)
    assert_same(result, run("reference", gate, up, **kwargs))
    n_tokens, width = gate.shape
    ids = kwargs.get("group_ids", torch.zeros(n_tokens, dtype=torch.int32))
    if backend == "reference":
        oracle(result, gate, up, ids, "silu")
        for site, value in (("gate", gate), ("product", None)):
            if value is not None:
                expected = torch.zeros(4, width)
                for t in range(n_tokens):
                    if kwargs["prompt_ids"][t] >= 0:
                        expected[kwargs["prompt_ids"][t]] += value[t].float()
                assert_same_bits(result.responses[site], expected, site)

    # h: exactly +0 where dropped, accurate elsewhere.
    dropped = torch.zeros_like(gate)
    mask = keep_mask(kwargs, n_tokens, width)
    assert_same_bits(result.h[~mask], dropped[~mask], "dropped h")
    truth = torch.where(mask, nnf.silu(gate.double()) * up.double(), 0.0)
    baseline = torch.where(mask, nnf.silu(gate) * up, 0.0)
    assert_accurate(result.h, truth, baseline)


# --------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_worked_example_of_counts_and_moments(backend: str) -> None:
    gate = torch.tensor([[1, -1, 0, 2], [0.5, 3, -2, -0.1], [-4, 0.2, 1, 0]])
    expected = {
        "sum": [0.9703434, 2.6987478, 0.4926527, 1.7140921],
        "sum_sq": [0.6364866, 8.2509994, 0.5912840, 3.1054704],
        "max": [0.7310586, 2.8577224, 0.7310586, 1.7615942],
    }
    asked = {"groups": 1, "sites": ("act",), "moments": True}
    found = run(backend, gate, torch.ones_like(gate), stats=asked).stats
    assert found is not None and found.count["act"].tolist() == [[2, 2, 1, 1]]
    for name, values in expected.items():
        got = getattr(found, name)["act"][0].double().tolist()
        assert got == pytest.approx(values, rel=2e-7), name
    # A neuron whose gate is zeroed is never active.
    gate[:, 1] = 0
    found = run(backend, gate, torch.ones_like(gate), stats=asked).stats
    assert found is not None and found.count["act"].tolist() == [[2, 0, 1, 1]]
    assert float(found.sum["act"][0, 1]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_halves_merge(backend: str) -> None:
    gate, up, kwargs = busy()
    ids = kwargs.pop("group_ids")
    whole = run(backend, gate, up, group_ids=ids, **kwargs)
    first = run(backend, gate[:11], up[:11], group_ids=ids[:11], **kwargs)
    second = run(backend, gate[11:], up[11:], group_ids=ids[11:], **kwargs)
    assert whole.stats is not None and first.stats is not None and second.stats is not None
    merged = first.stats + second.stats
    assert_same_stats(merged, whole.stats, exact_sums=False)
    assert_same_bits(torch.cat([first.h, second.h]), whole.h, "h")


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_tokens_does_not_matter(backend: str) -> None:
    gate, up, kwargs = busy()
    ids = kwargs.pop("group_ids")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    one = run(backend, gate, up, group_ids=ids, **kwargs)
    other = run(backend, gate[order], up[order], group_ids=ids[order], **kwargs)
    assert one.stats is not None and other.stats is not None
    assert_same_stats(other.stats, one.stats, exact_sums=False)
    assert_same_bits(other.h, one.h[order], "h")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal(backend: str) -> None:
    gate, up, kwargs = case("strided", torch.float32)
    one, two = run(backend, gate, up, **kwargs), run(backend, gate, up, **kwargs)
    assert_same(one, two, exact_sums=True)
    assert_same_bits(one.h, two.h)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recording_happens_before_masking(backend: str) -> None:
    gate, up, kwargs = busy()
    keep = torch.zeros(1, 3, dtype=torch.int32)
    masked, free = run(backend, gate, up, keep=keep, **kwargs), run(backend, gate, up, **kwargs)
    assert_same(masked, free, exact_sums=True)
    assert_same_bits(masked.h, torch.zeros_like(gate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_neurons_are_plus_zero_whatever_their_value(backend: str) -> None:
    gate = torch.tensor([[torch.nan, torch.inf, -1.0, 1.0]])
    up = torch.tensor([[1.0, torch.inf, 1.0, -torch.inf]])
    h = run(backend, gate, up, keep=torch.zeros(1, 1, dtype=torch.int32)).h
    assert_same_bits(h, torch.zeros(1, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_accumulate_and_counters_are_64_bit(backend: str) -> None:
    gate = torch.ones(7, 3)
    device = device_of(backend)
    stats = GroupStats(groups=1, width=3, moments=True, device=device)
    stats.count["act"].fill_(2**31 - 3)
    stats.tokens.fill_(2**53)
    stats.n_nonfinite["act"].fill_(2**53)
    name = backend.partition("-")[0]
    swiglu_stats(gate.to(device), gate.to(device), stats=stats, backend=name)
    swiglu_stats(gate.to(device) * torch.nan, gate.to(device), stats=stats, backend=name)
    assert stats.count["act"].tolist() == [[2**31 + 4] * 3]
    assert stats.tokens.tolist() == [2**53 + 14]
    assert stats.n_nonfinite["act"].tolist() == [[2**53 + 7] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_infinity_and_zero(backend: str) -> None:
    nan, inf = torch.nan, torch.inf
    gate = torch.tensor([[nan, inf, -inf, -0.0], [1.0, 2.0, 3.0, 0.0], [0.5, -inf, 1.0, -0.0]])
    stats = {"groups": 1, "sites": ("gate",), "moments": True}
    result = run(backend, gate, gate, stats=stats).stats
    assert result is not None
    assert result.count["gate"].tolist() == [[2, 2, 2, 0]]
    assert result.n_nonfinite["gate"].tolist() == [[1, 2, 1, 0]]
    assert result.sum["gate"].tolist() == [[1.5, 2.0, 4.0, 0.0]]
    assert result.sum_sq["gate"].tolist() == [[1.25, 4.0, 10.0, 0.0]]
    assert_same_bits(result.max["gate"], torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    nothing = run(backend, gate[:1] * nan, gate[:1], stats=stats).stats
    assert nothing is not None and nothing.max["gate"].tolist() == [[-inf] * 4]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if device_of(b) == "cpu"])
def test_flush_to_zero_changes_nothing(backend: str) -> None:
    gate, up = all_patterns(torch.float32), all_patterns(torch.float32, seed=1)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 1, "sites": SITES, "moments": True, "threshold": 1e-42},
    }
    expected = run(backend, gate, up, **kwargs)
    n_threads = torch.get_num_threads()
    assert torch.set_flush_denormal(True)
    try:
        flushed = run(backend, gate, up, **kwargs)
        assert torch.get_num_threads() == n_threads
        assert float(torch.tensor(1e-38) * 0.1) == 0.0, "the caller's mode must come back"
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, expected, exact_sums=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_two_to_the_31(backend: str) -> None:
    device, stride = device_of(backend), 2**31 + 64

    def far_rows() -> Tensor:
        # Only the pages that are touched take memory on a CPU.
        storage = torch.empty(stride + 70, dtype=torch.bfloat16, device=device)
        return storage.as_strided((2, 70), (stride, 1))

    try:
        gate, out = far_rows(), far_rows()
    except RuntimeError:
        pytest.skip("2 x 4 GiB of address space are not to be had")
    values = normal(2, 70, dtype=torch.bfloat16)
    gate.copy_(values)
    stats = GroupStats(groups=2, width=70, moments=True, device=device)
    ids = torch.tensor([0, 1], dtype=torch.int32, device=device)
    prompts = {"gate": torch.zeros(2, 70, device=device)}
    swiglu_stats(
        gate,
        values.to(device),
        stats=stats,
        group_ids=ids,
        responses=prompts,
        prompt_ids=ids,
        out=out,
        backend=backend.partition("-")[0],
    )
    assert_same_bits(out.cpu(), nnf.silu(values) * values)
    assert_same_bits(prompts["gate"].cpu(), values.float())
    assert_same_bits(stats.count["act"].cpu(), (values > 0).long())
