"""The checks of `check_backend` about sums: moments and responses, and all features in one call.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import gaps, pair, words
from relneuron.testing.checks_stats import empty_stats, record
from relneuron.testing.contract import Result, Subject, check
from relneuron.testing.oracle import (
    all_patterns,
    assert_h,
    assert_responses,
    assert_stats,
    integers,
    keep_mask,
    normal,
)

# --- moments ---------------------------------------------------------------------------------


@check("moments", elements=6000)
def moments_are_accurate(subject: Subject) -> None:
    """Sums and sums of squares are accurate to float32, maxima exact, over a few hundred tokens."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(400, 15, dtype)
        before = empty_stats(subject, 15, groups=3, moments=True)
        # More than 256 tokens are in group 1.
        record(subject, gate, up, before, integers(-1, 6, 400).clamp(max=1))


@check("moments")
def moments_add_to_what_is_there(subject: Subject) -> None:
    """A second call adds to the sums of the first and keeps the larger maximum."""
    before = empty_stats(subject, 40, groups=2, moments=True)
    for seed in range(3):
        gate, up = pair(11, 40, subject.claims.dtypes[0], seed)
        before = record(subject, gate, up, before, integers(-1, 2, 11)).stats


@check("moments")
def moments_leave_nonfinite_values_out(subject: Subject) -> None:
    """NaN and infinities are counted in n_nonfinite and are in no sum and no maximum."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(12, 40, dtype)
        for index, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            gate[index::5, index::7], up[index::4, 3 + index :: 9] = value, value
        record(subject, gate, up, empty_stats(subject, 40, moments=True))


@check("moments")
def maxima_start_at_minus_infinity(subject: Subject) -> None:
    """A maximum of negative values is negative, of no finite value -infinity, of -0 it is +0."""
    for dtype in subject.claims.dtypes:
        gate = torch.tensor([[-1.0, -0.0, torch.nan, -2.0], [-3.0, -0.0, -torch.inf, -1.5]])
        for rows in (gate, gate[:1]):
            before = empty_stats(subject, 4, groups=3, moments=True)
            ids = torch.full((len(rows),), 1, dtype=torch.int32)
            record(subject, rows.to(dtype), gate[: len(rows)].abs().to(dtype), before, ids)


@check("moments", "half", elements=65536)
def moments_of_all_half_patterns(subject: Subject) -> None:
    """The sum, square and maximum of each single 16-bit number, from subnormal to 3.4e38."""
    for dtype in subject.claims.half_dtypes:
        gate, up = all_patterns(dtype, seed=1), all_patterns(dtype, seed=2)
        record(subject, gate, up, empty_stats(subject, 65536, moments=True))


# --- responses -------------------------------------------------------------------------------


def respond(
    subject: Subject, gate: Tensor, up: Tensor, before: dict[str, Tensor], ids: Tensor
) -> Result:
    """One call whose responses are compared with the definition."""
    result = subject.run(gate, up, responses=before, prompt_ids=ids)
    activation = subject.claims.activations[0]
    assert_responses(result.responses, before, gate, up, ids, activation)
    return result


def zeros(subject: Subject, rows: int, columns: int) -> dict[str, Tensor]:
    """Empty responses at all the sites that are claimed."""
    return {site: torch.zeros(rows, columns) for site in subject.claims.sites}


@check("responses")
def responses_are_sums_per_prompt(subject: Subject) -> None:
    """A response is the float32 sum of a site over the tokens of its prompt, wherever they are."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(60, 33, dtype)
        ids = integers(0, 7, 60)
        respond(subject, gate, up, zeros(subject, 7, 33), ids)
        respond(subject, gate, up, zeros(subject, 9, 33), ids.sort().values)


@check("responses")
def responses_add_to_what_is_there(subject: Subject) -> None:
    """A second call adds to the responses of the first; rows without tokens stay."""
    before = {site: normal(4, 33, dtype=torch.float32) for site in subject.claims.sites}
    for seed in range(2):
        gate, up = pair(10, 33, subject.claims.dtypes[0], seed)
        before = respond(subject, gate, up, before, integers(0, 3, 10)).responses


@check("responses")
def prompt_minus_one_is_nowhere(subject: Subject) -> None:
    """A token of prompt -1 is added to no response, not to the last one either."""
    gate, up = pair(20, 33, subject.claims.dtypes[0])
    for ids in (integers(-1, 3, 20), torch.full((20,), -1, dtype=torch.int32)):
        respond(subject, gate, up, zeros(subject, 3, 33), ids)


@check("responses", "strides")
def rows_of_responses_may_be_strided(subject: Subject) -> None:
    """Responses may have gaps between their rows, and nothing is written into them."""
    gate, up = pair(20, 33, subject.claims.dtypes[0])
    before = {site: torch.full((4, 44), -77.0)[:3, :33] for site in subject.claims.sites}
    after = respond(subject, gate, up, before, integers(-1, 3, 20)).responses
    for site, tensor in after.items():
        assert bool((gaps(tensor, 33) == -77.0).all()), f"gaps of responses[{site}] were written"


@check("responses")
def responses_take_nonfinite_values(subject: Subject) -> None:
    """NaN and infinities go into a response, where they make it NaN or infinite."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(6, 33, dtype)
        gate[0, 3], gate[1, 5], up[2, 7] = torch.nan, torch.inf, -torch.inf
        ids = torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.int32)
        respond(subject, gate, up, zeros(subject, 2, 33), ids)


# --- everything ------------------------------------------------------------------------------


def busy(subject: Subject, n_tokens: int, width: int) -> dict[str, Any]:
    """Arguments for all the features that are claimed, in one call."""
    features = subject.claims.features
    given: dict[str, Any] = {}
    if "counts" in features:
        stats = empty_stats(subject, width, groups=3, moments="moments" in features)
        given |= {"stats": stats, "group_ids": integers(-1, 3, n_tokens, seed=1)}
    if "responses" in features:
        given |= {"responses": zeros(subject, 4, width)}
        given |= {"prompt_ids": integers(-1, 4, n_tokens, seed=2)}
    if "masks" in features:
        given |= {"keep": words(5, (width + 31) // 32)}
        given |= {"condition_ids": integers(0, 5, n_tokens, seed=3)}
    return given


@check()
def all_features_work_in_one_call(subject: Subject) -> None:
    """Groups, prompts and conditions of a token are three different things."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(50, 70, dtype)
        given = busy(subject, 50, 70)
        result, activation = subject.run(gate, up, **given), subject.claims.activations[0]
        if "stats" in given:
            assert_stats(result.stats, given["stats"], gate, up, given["group_ids"], activation)
        if "responses" in given:
            ids = given["prompt_ids"]
            assert_responses(result.responses, given["responses"], gate, up, ids, activation)
        mask = None
        if "keep" in given:
            mask = keep_mask(given["keep"], given["condition_ids"], 50, 70)
        assert_h(result.h, gate, up, activation, mask)


@check(elements=6000)
def two_runs_give_the_same_bits(subject: Subject) -> None:
    """The same call gives the same bits, sums too: no order of adding that changes."""
    gate, up = pair(400, 15, subject.claims.dtypes[0])
    given = busy(subject, 400, 15)
    one, two = subject.run(gate, up, **given), subject.run(gate, up, **given)
    assert_same_bits(two.h, one.h, "h of a second run")
    if "moments" in subject.claims.features:
        for site in one.stats.sites:
            assert_same_bits(two.stats.sum[site], one.stats.sum[site], f"sum[{site}] again")
            assert_same_bits(
                two.stats.sum_sq[site], one.stats.sum_sq[site], f"sum_sq[{site}] again"
            )
    for site, response in one.responses.items():
        assert_same_bits(two.responses[site], response, f"responses[{site}] again")


@check("errors")
def ids_out_of_range_are_refused(subject: Subject) -> None:
    """An id outside its range raises a ValueError, and nothing has been counted by then."""
    gate, up = pair(6, 40, subject.claims.dtypes[0])
    given = busy(subject, 6, 40)
    for name, bad in (("group_ids", -2), ("group_ids", 3), ("prompt_ids", 4), ("prompt_ids", -2)):
        _assert_refused(subject, gate, up, given, name, bad)
    for bad in (-1, 5):
        _assert_refused(subject, gate, up, given, "condition_ids", bad)


def _assert_refused(
    subject: Subject, gate: Tensor, up: Tensor, given: dict[str, Any], name: str, bad: int
) -> None:
    if name not in given:
        return
    wrong = given[name].clone()
    wrong[4] = bad
    try:
        subject.run(gate, up, **{**given, name: wrong})
    except ValueError:
        pass
    else:
        raise AssertionError(f"{name} {bad} at token 4 was taken")
    stats, responses = subject.last_results
    counts = () if stats is None else (stats.tokens, *stats.count.values())
    for tensor in (*counts, *responses.values()):
        assert not bool(tensor.any()), f"something was recorded before {name} {bad} was refused"
