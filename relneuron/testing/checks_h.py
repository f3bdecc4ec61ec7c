"""The checks of `check_backend` about h: its values, its layout in memory, and the masks.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import (
    all_patterns,
    assert_h,
    assert_responses,
    assert_stats,
    eager_activation,
    exact_activation,
    integers,
    keep_mask,
    normal,
    ulps_apart,
)

# One row and column, and one below and above the powers of two that tiles are made of.
SHAPES = ((1, 1), (2, 7), (17, 31), (3, 33), (5, 255), (9, 257), (33, 64), (2, 1003), (2, 1025))
POISON = -77.0


def pair(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random gate and up."""
    return (
        normal(rows, columns, dtype=dtype, seed=seed),
        normal(rows, columns, dtype=dtype, seed=seed + 1000),
    )


def words(*shape: int, seed: int = 0) -> Tensor:
    """Random words of `keep`, the sign bit among them."""
    return integers(-(2**31), 2**31, *shape, seed=seed)


# --- values ----------------------------------------------------------------------------------


@check()
def h_is_accurate(subject: Subject) -> None:
    """h is activation(gate) * up, as near to its float64 value as torch's own result."""
    for dtype in subject.claims.dtypes:
        for activation in subject.claims.activations:
            gate, up = pair(19, 130, dtype)
            result = subject.run(gate, up, activation=activation)
            assert_h(result.h, gate, up, activation)


@check("half", elements=20_000)
def h_rounds_the_activation_and_the_product(subject: Subject) -> None:
    """In types of 16 bits the activation is rounded to nearest, then the product of it and up."""
    for dtype in subject.claims.half_dtypes:
        for activation in subject.claims.activations:
            gate, up = pair(19, 1000, dtype)
            h = subject.run(gate, up, activation=activation).h
            product = site_values(gate, up, activation, ["product"])["product"].to(dtype)
            same = (h == product) | (h == eager_activation(gate, activation) * up)
            share = float(same.float().mean())
            assert share >= 0.99, (
                f"only {share:.1%} of {h.numel()} elements ({dtype}, {activation}) are equal to "
                "round(round(activation) * up); a truncation, or an activation left in float32?"
            )


@check("half", elements=65536)
def h_of_all_half_patterns_is_within_one_ulp(subject: Subject) -> None:
    """For all 65,536 gates of a 16-bit type and up = 1, h is at most one number beside torch's."""
    for dtype in subject.claims.half_dtypes:
        for activation in subject.claims.activations:
            gate = all_patterns(dtype)
            h = subject.run(gate, torch.ones_like(gate), activation=activation).h
            # Where torch's gelu has lost its digits the fixed sequence or float64 is the truth.
            truths = (
                eager_activation(gate, activation),
                site_values(gate, gate, activation, ["act"])["act"].to(dtype),
                exact_activation(gate, activation).to(dtype),
            )
            wrong = torch.stack([ulps_apart(h, truth) > 1 for truth in truths]).all(0)
            if bool(wrong.any()):
                at = int(wrong.flatten().nonzero()[0])
                raise AssertionError(
                    f"{int(wrong.sum())} of 65536 elements ({dtype}, {activation}) are off, such "
                    f"as gate {float(gate[0, at])!r}: {float(h[0, at])!r} instead of "
                    f"{float(truths[0][0, at])!r}"
                )


@check()
def h_is_whole_in_any_shape(subject: Subject) -> None:
    """Every element of h is written, also at widths that no tile divides."""
    dtypes = subject.claims.dtypes
    for index, shape in enumerate(SHAPES):
        gate, up = pair(*shape, dtypes[index % len(dtypes)], seed=index)
        assert_h(subject.run(gate, up).h, gate, up, subject.claims.activations[0])


@check()
def empty_calls_are_allowed(subject: Subject) -> None:
    """No tokens (T = 0) or no neurons (F = 0) give an empty h; tokens are counted all the same."""
    for shape in ((0, 40), (5, 0), (0, 0)):
        gate, up = pair(*shape, subject.claims.dtypes[0])
        subject.run(gate, up)
        if "counts" not in subject.claims.features:
            continue
        before = GroupStats(groups=2, width=shape[1], sites=subject.claims.sites)
        ids = torch.arange(shape[0], dtype=torch.int32) % 3 - 1
        after = subject.run(gate, up, stats=before, group_ids=ids).stats
        assert_stats(after, before, gate, up, ids, subject.claims.activations[0])


@check()
def inputs_stay_as_they_are(subject: Subject) -> None:
    """gate, up, the ids and keep are not modified."""
    features = subject.claims.features
    gate, up = pair(9, 70, subject.claims.dtypes[0])
    given: dict[str, Any] = {}
    if "masks" in features:
        given |= {"keep": words(2, 3), "condition_ids": integers(0, 2, 9)}
    if "counts" in features:
        stats = GroupStats(groups=3, width=70, sites=subject.claims.sites)
        given |= {"stats": stats, "group_ids": integers(-1, 3, 9)}
    if "responses" in features:
        responses = {site: torch.zeros(3, 70) for site in subject.claims.sites}
        given |= {"responses": responses, "prompt_ids": integers(-1, 3, 9)}
    inputs = subject.run(gate, up, **given).inputs
    for name, tensor in {**given, "gate": gate, "up": up}.items():
        if isinstance(tensor, Tensor):
            assert_same_bits(inputs[name], tensor, name)


# --- memory ----------------------------------------------------------------------------------


@check("strides")
def rows_of_gate_and_up_may_be_strided(subject: Subject) -> None:
    """gate and up may be halves of a packed tensor, slices with an odd start, or expanded rows."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(12, 200, dtype)
        for one, other in (
            (gate[:, :77], gate[:, 77:154]),
            (gate[2:, 3:80].contiguous(), up[2:, 40:117]),
            (gate[2:, 3:80], up[2:, 40:117].contiguous()),
            (gate[:1, 5:75].expand(9, 70), up[:9, :70]),
            (gate[:9, :70], up.as_strided((9, 70), (3, 1), 1)),
        ):
            assert_h(subject.run(one, other).h, one, other, subject.claims.activations[0])


def gaps(out: Tensor, width: int) -> Tensor:
    """What a matrix with gaps of 11 columns has there and in the row behind its end."""
    storage = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    return storage.view(-1, width + 11)[:, width:]


@check("out")
def out_is_written_and_returned(subject: Subject) -> None:
    """h is written into `out`, every element of it, and `out` is returned."""
    for dtype in subject.claims.dtypes:
        for poison in (POISON, torch.nan):
            gate, up = pair(9, 70, dtype)
            result = subject.run(gate, up, out=torch.full_like(gate, poison))
            assert_h(result.h, gate, up, subject.claims.activations[0])


@check("out", "strides")
def rows_of_out_may_be_strided(subject: Subject) -> None:
    """`out` may have gaps between its rows, and nothing is written into them."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(9, 70, dtype)
        out = torch.full((10, 81), POISON, dtype=dtype)[:9, :70]
        result = subject.run(gate, up, out=out)
        assert_h(result.h, gate, up, subject.claims.activations[0])
        assert bool((gaps(result.h, 70) == POISON).all()), "the gaps between the rows were written"


@check("out", "masks")
def dropped_elements_of_out_are_written(subject: Subject) -> None:
    """Where `keep` drops a neuron, a given `out` does not keep what was in it before."""
    gate, up = pair(9, 70, subject.claims.dtypes[0])
    keep = words(1, 3)
    out = torch.full_like(gate, POISON)
    mask = keep_mask(keep, None, 9, 70)
    assert_h(
        subject.run(gate, up, keep=keep, out=out).h, gate, up, subject.claims.activations[0], mask
    )


# --- masks -----------------------------------------------------------------------------------


def check_mask(
    subject: Subject, gate: Tensor, up: Tensor, keep: Tensor, ids: Tensor | None
) -> None:
    """Call with a mask and compare h."""
    h = subject.run(gate, up, keep=keep, condition_ids=ids).h
    assert_h(h, gate, up, subject.claims.activations[0], keep_mask(keep, ids, *gate.shape))


@check("masks")
def bit_f_of_keep_is_neuron_f(subject: Subject) -> None:
    """Bit f % 32 of word f // 32 of `keep`, counted from the lowest, keeps neuron f alone."""
    width = 70
    keep = torch.zeros(width, 3, dtype=torch.int64)
    neuron = torch.arange(width)
    keep[neuron, neuron // 32] = torch.tensor(1) << (neuron % 32)
    gate, up = pair(width, width, subject.claims.dtypes[0])
    check_mask(subject, gate, up, keep.to(torch.int32), neuron.to(torch.int32))


@check("masks")
def the_last_partial_word_of_keep_counts(subject: Subject) -> None:
    """The bits of the last word are read also where the width is no multiple of 32."""
    for width in (1, 31, 32, 33, 63, 100, 257):
        gate, up = pair(4, width, subject.claims.dtypes[0], seed=width)
        check_mask(subject, gate, up, words(1, (width + 31) // 32, seed=width), None)


@check("masks")
def without_conditions_row_zero_of_keep_is_taken(subject: Subject) -> None:
    """Without `condition_ids` every token takes row 0 of `keep`, whatever other rows there are."""
    gate, up = pair(9, 70, subject.claims.dtypes[0])
    check_mask(subject, gate, up, words(4, 3), None)


@check("masks")
def every_token_takes_the_row_of_its_condition(subject: Subject) -> None:
    """`condition_ids` names the row of `keep` for each token, in any order."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(41, 100, dtype)
        ids = integers(0, 5, 41)
        for order in (ids, ids.sort().values):
            check_mask(subject, gate, up, words(5, 4), order)


@check("masks")
def dropped_neurons_are_plus_zero(subject: Subject) -> None:
    """A dropped neuron is exactly +0 whatever its value was (NaN, infinity, negative); a kept NaN
    stays."""
    inf = torch.inf
    for dtype in subject.claims.dtypes:
        gate = torch.tensor([[torch.nan, inf, -inf, -1.0, 1.0, -0.0, 2.0]], dtype=dtype)
        up = torch.tensor([[1.0, inf, 1.0, 1.0, -inf, 1.0, torch.nan]], dtype=dtype)
        h = subject.run(gate, up, keep=torch.zeros(1, 1, dtype=torch.int32)).h
        assert_same_bits(h, torch.zeros_like(h), "h of dropped neurons")
        h = subject.run(gate, up, keep=torch.tensor([[-1]], dtype=torch.int32)).h
        assert bool(h[0, [0, 6]].isnan().all()), "a kept NaN is gone"


@check("counts", "masks")
def statistics_are_taken_before_masking(subject: Subject) -> None:
    """Neurons that `keep` drops are counted as if they were there."""
    gate, up = pair(9, 70, subject.claims.dtypes[0])
    before = GroupStats(groups=1, width=70, sites=subject.claims.sites)
    after = subject.run(gate, up, stats=before, keep=torch.zeros(1, 3, dtype=torch.int32)).stats
    assert_stats(after, before, gate, up, None, subject.claims.activations[0])


@check("responses", "masks")
def responses_are_taken_before_masking(subject: Subject) -> None:
    """Neurons that `keep` drops are added to `responses` as if they were there."""
    gate, up = pair(9, 70, subject.claims.dtypes[0])
    before = {site: torch.zeros(2, 70) for site in subject.claims.sites}
    ids = integers(0, 2, 9)
    keep = torch.zeros(1, 3, dtype=torch.int32)
    after = subject.run(gate, up, responses=before, prompt_ids=ids, keep=keep).responses
    assert_responses(after, before, gate, up, ids, subject.claims.activations[0])
