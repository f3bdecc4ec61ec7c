"""The checks of `check_backend` about logprob_gain, and its definition in float64.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from relneuron.testing.accuracy import assert_accurate, assert_same_bits
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import integers, normal

OP = "logprob_gain"
Problem = dict[str, Any]


# --- the definition --------------------------------------------------------------------------


def by_definition(given: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gains like coefficients by two log-softmaxes in a dtype, and the sum of their |terms|.

    Those of an inner product count, too: of a state and the token for which they are the most.
    """
    x, values, c, unembed, scale = (
        given[name].to(dtype) for name in ("x", "values", "coefficients", "unembed", "scale")
    )
    offset, after, cap = (given.get(name) for name in ("offset", "scale_after", "cap"))
    rows = c.reshape(len(x), -1, len(values))
    scales = scale[:, None, None].expand_as(rows)
    if after is not None:
        scales = after.to(dtype).reshape(rows.shape)

    def logprob(state: Tensor, scale: Tensor, target: int) -> tuple[Tensor, Tensor]:
        logits = scale * (state @ unembed.T)
        terms = (scale * (state.abs() @ unembed.T.abs())).amax(-1)
        if offset is not None:
            logits = logits + offset.to(dtype)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        found: Tensor = logits.log_softmax(-1)[..., target]
        return found, terms + found.abs()

    gains, terms = torch.empty_like(rows), torch.empty_like(rows)
    for e, target in enumerate(given["targets"].tolist()):
        before, terms_before = logprob(x[e], scale[e], target)
        states = x[e] + rows[e][..., None] * values
        later, terms_later = logprob(states, scales[e][..., None], target)
        gains[e], terms[e] = later - before, terms_later + terms_before
    return gains.reshape(c.shape), terms.reshape(c.shape)


# --- data ------------------------------------------------------------------------------------


def problem(
    n_sentences: int = 3,
    n_neurons: int = 17,
    hidden: int = 24,
    vocabulary: int = 90,
    *,
    size: float = 0.3,
    n_positions: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Random arguments whose logits move by a few times `size`."""
    places = [n_sentences, *([] if n_positions is None else [n_positions]), n_neurons]
    wide = torch.float32
    values = normal(n_neurons, hidden, dtype=wide, seed=seed + 1, scale=size / hidden**0.5)
    return {
        "x": normal(n_sentences, hidden, dtype=wide, seed=seed, scale=3 / hidden**0.5).to(dtype),
        "values": values.to(dtype),
        "coefficients": normal(*places, dtype=wide, seed=seed + 2, scale=1.0).to(dtype),
        "unembed": normal(vocabulary, hidden, dtype=wide, seed=seed + 3, scale=1.0).to(dtype),
        "scale": normal(n_sentences, dtype=wide, seed=seed + 4, scale=0.2).exp(),
        "targets": integers(0, vocabulary, n_sentences, seed=seed + 5).long(),
    }


def gains(subject: Subject, given: Problem, **options: Any) -> Any:
    """One call; its arguments are those of the problem."""
    n_logits = given["coefficients"].numel() * len(given["unembed"])
    assert n_logits <= subject.elements, "a check says how large its calls are"
    return subject.call(**given, **options)


def assert_gains(subject: Subject, given: Problem) -> None:
    """The gains of one call by the accuracy rule; both log-probabilities are their terms."""
    found = gains(subject, given)
    truth, terms = by_definition(given, torch.float64)
    baseline, _ = by_definition(given, torch.float32)
    assert found.dtype == torch.float32, f"gains are {found.dtype}, not float32"
    assert_accurate(found, truth, baseline, terms)


# --- the checks ------------------------------------------------------------------------------


@check(op=OP)
def gains_are_the_definition(subject: Subject) -> None:
    """A gain is log p(target | x + c v) - log p(target | x), small and large ones."""
    for seed, size in enumerate((0.002, 0.3, 3.0)):
        assert_gains(subject, problem(size=size, seed=10 * seed))


@check(op=OP)
def large_moves_do_not_overflow(subject: Subject) -> None:
    """Logits may move by hundreds: gains are finite where the definition is."""
    assert_gains(subject, problem(size=100.0))


@check(elements=10000, op=OP)
def sentences_have_their_own_target_and_scale(subject: Subject) -> None:
    """Each sentence has its own state, scale and target."""
    given = problem(n_sentences=6)
    given["targets"] = torch.tensor([0, 89, 3, 3, 41, 7])
    given["scale"] = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 0.7])
    assert_gains(subject, given)


@check(elements=12000, op=OP)
def any_number_of_neurons_and_tokens(subject: Subject) -> None:
    """Any sizes: one of everything, and none that a tile divides."""
    for sizes in ((1, 1, 1, 1), (1, 1, 7, 2), (2, 33, 65, 129), (1, 5, 300, 1), (5, 3, 2, 700)):
        assert_gains(subject, problem(*sizes))


@check(op=OP)
def no_neurons_have_no_gains(subject: Subject) -> None:
    """Without neurons or sentences the result is empty."""
    assert gains(subject, problem(n_neurons=0)).shape == (3, 0)
    assert gains(subject, problem(n_sentences=0)).shape == (0, 17)


@check("half", op=OP)
def half_types_are_read_exactly(subject: Subject) -> None:
    """16-bit numbers are read as they are, and computed with as float32; gains are float32."""
    for dtype in subject.claims.half_dtypes:
        assert_gains(subject, problem(dtype=dtype))
        mixed = problem()
        mixed["unembed"] = mixed["unembed"].to(dtype)
        assert_gains(subject, mixed)


@check("positions", elements=14000, op=OP)
def positions_have_coefficients_of_their_own(subject: Subject) -> None:
    """Coefficients (E, P, K) give gains (E, P, K), on the same state and vectors."""
    assert_gains(subject, problem(n_positions=3))


@check("offset", op=OP)
def the_offset_is_in_the_logits(subject: Subject) -> None:
    """The offset is added to every logit, before and after."""
    assert_gains(subject, problem() | {"offset": normal(90, dtype=torch.float32, seed=8)})


@check("scale_after", op=OP)
def the_scale_after_is_that_of_the_changed_state(subject: Subject) -> None:
    """scale_after is the scale at x + c v, of each neuron its own; that at x stays."""
    given = problem()
    change = normal(3, 17, dtype=torch.float32, seed=8, scale=0.3).exp()
    assert_gains(subject, given | {"scale_after": given["scale"][:, None] * change})


@check("cap", op=OP)
def the_cap_is_on_the_logits(subject: Subject) -> None:
    """Logits are cap * tanh(logits / cap)."""
    assert_gains(subject, problem() | {"cap": 2.0})


@check("cap", "offset", op=OP)
def the_cap_is_put_on_the_offset_too(subject: Subject) -> None:
    """What is capped has the offset in it."""
    given = problem() | {"cap": 2.0, "offset": normal(90, dtype=torch.float32, seed=8)}
    assert_gains(subject, given)


@check("certified", op=OP)
def certified_gains_are_within_the_tolerance(subject: Subject) -> None:
    """With mode="certified" no gain is off by more than the tolerance and half its own ulp."""
    for size in (0.002, 0.3, 3.0):
        given = problem(size=size)
        truth, _ = by_definition(given, torch.float64)
        for tolerance in (1e-5, 1e-3):
            found = gains(subject, given, mode="certified", tolerance=tolerance)
            error = (found.double() - truth).abs() - 2.0**-24 * truth.abs()
            assert bool((error <= tolerance).all()), (
                f"a gain is off by {float(error.max()):.3g}, the tolerance is {tolerance}"
            )


@check("top", elements=6000, op=OP)
def top_gains_are_the_largest(subject: Subject) -> None:
    """With mode="top" each sentence's largest gains come, best first, with their flat places."""
    for size in (0.3, 3.0):
        given = problem(size=size, n_neurons=19)
        truth, _ = by_definition(given, torch.float64)
        for top in (1, 5, 19):
            gain, layer, index = gains(subject, given, mode="top", top=top)
            best = truth.topk(top, 1)
            wrong = (index.sort(1).values != best.indices.sort(1).values).nonzero()
            assert not len(wrong), f"of the {top} largest of sentence {int(wrong[0, 0])} one is not"
            assert not bool(layer.any()), "there is one layer, 0"
            assert bool((gain.diff(dim=1) <= 0).all()), "the best does not come first"
            near = (gain.double() - truth.gather(1, index)).abs()
            assert bool((near <= 1e-5 * (1 + best.values.abs())).all()), "a gain is another's"


@check("top", op=OP)
def of_equal_gains_the_later_comes_first(subject: Subject) -> None:
    """Among equal gains the later neuron comes first, and is the one that is chosen."""
    given = problem(n_neurons=8)
    given["values"] = given["values"][:1].repeat(8, 1)
    given["coefficients"] = torch.ones(3, 8)
    for top in (3, 8):
        _, _, index = gains(subject, given, mode="top", top=top)
        wanted = torch.arange(7, 7 - top, -1).expand(3, top)
        assert_same_bits(index, wanted, "the places of equal gains")


@check("strides", op=OP)
def value_vectors_may_be_transposed(subject: Subject) -> None:
    """The vectors may be a transposed weight or rows with gaps."""
    given = problem()
    given["values"] = given["values"].T.contiguous().T
    assert_gains(subject, given)
    wide = normal(17, 60, dtype=torch.float32, seed=1, scale=0.1)
    assert_gains(subject, given | {"values": wide[:, 5:29]})


@check(op=OP)
def gains_leave_their_arguments_alone(subject: Subject) -> None:
    """No argument is written."""
    given = problem()
    assert_gains(subject, given)
    for name, after in subject.last_inputs.items():
        assert_same_bits(after, given[name], f"{name} after the call")


@check("errors", op=OP)
def wrong_targets_and_values_are_refused(subject: Subject) -> None:
    """A target outside of the vocabulary, NaN and infinities raise a ValueError."""
    for name, bad in (("targets", 90), ("targets", -1), ("values", math.nan), ("x", math.inf)):
        given = problem()
        given[name].reshape(-1)[1] = bad
        try:
            gains(subject, given)
        except ValueError:
            continue
        raise AssertionError(f"{bad} in {name} was taken")
