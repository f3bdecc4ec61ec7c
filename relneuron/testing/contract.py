"""`check_backend`: holds someone's implementation of an op to the op's contract.

The checks register themselves here from `checks_*.py`; each promises one thing and is a test of
its own for a test runner (`backend_checks`), or one line of the report (`check_backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic
from relneuron.testing.ops import OPS

UNNAMED = {name for op in OPS.values() for name in op.inputs}

Backend = Callable[..., Any]


class ContractError(AssertionError):
    """Checks that failed: `failures` is {name of the check: reason}."""

    def __init__(self, failures: dict[str, str], n_checks: int) -> None:
        self.failures = failures
        reasons = "\n\n".join(f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{len(failures)} of {n_checks} checks failed\n\n{reasons}")


@dataclass(frozen=True)
class Report:
    """The names of the checks that passed, and of those left out by the options, with the cause."""

    passed: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Claims:
    """What an implementation says it can do; the options of `check_backend`."""

    op: str
    dtypes: Sequence[torch.dtype]
    features: Sequence[str]
    activations: Sequence[str]
    sites: Sequence[str]
    device: torch.device | str = "cpu"
    max_elements: int | None = None

    @staticmethod
    def of(op: str | Callable[..., Any], **options: Any) -> Claims:
        """Of an op or its name; what is not said, or None, is claimed whole."""
        name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
        if name not in OPS:
            raise ValueError(f"check_backend: op must be one of {tuple(OPS)}, got {name!r}")
        known = OPS[name]._asdict()
        del known["inputs"], known["written"]
        return Claims(name, **known | {n: v for n, v in options.items() if v is not None})

    def __post_init__(self) -> None:
        for name in ("dtypes", "activations", "sites", "features"):
            given, known = getattr(self, name), getattr(OPS[self.op], name)
            if given and not known:
                raise ValueError(f"check_backend: {self.op} has no {name}, got {given!r}")
            if isinstance(given, str) or not set(given) <= set(known):
                raise ValueError(f"check_backend: {name} must be some of {known}, got {given!r}")
            if known and not given and name != "features":
                raise ValueError(f"check_backend: {name} must not be empty")
        counts = {"counts"} & set(OPS[self.op].features)
        if "moments" in self.features and not counts <= set(self.features):
            raise ValueError("check_backend: the feature moments comes with counts")

    @property
    def half_dtypes(self) -> list[torch.dtype]:
        """The claimed types of 16 bits."""
        return [dtype for dtype in self.dtypes if dtype.itemsize == 2]

    def reason_to_skip(self, check: Check) -> str | None:
        """Why a check does not apply, or None."""
        if self.max_elements is not None and check.elements > self.max_elements:
            return f"a call has {check.elements} elements, max_elements is {self.max_elements}"
        if "double" in check.needs and torch.float64 not in self.dtypes:
            return "float64 is not claimed"
        if "half" in check.needs and not self.half_dtypes:
            return "no type of 16 bits is claimed"
        if "flush_to_zero" in check.needs and torch.device(self.device).type != "cpu":
            return "it is about the processor's mode"
        known = OPS[self.op].features
        missing = [name for name in check.needs if name in known and name not in self.features]
        return f"not claimed: {', '.join(missing)}" if missing else None


@dataclass
class Result:
    """What one call gave, on the CPU; every tensor with the strides it was passed with."""

    h: Tensor
    stats: GroupStats
    responses: dict[str, Tensor]
    inputs: dict[str, Tensor]


class Subject:
    """The implementation under test: calls it on its device and remembers the last call."""

    def __init__(self, fn: Backend, claims: Claims, elements: int) -> None:
        self.fn, self.claims, self.elements = fn, claims, elements
        self.n_threads = torch.get_num_threads()
        self.last_call = "none was made"
        self.last_results: tuple[GroupStats | None, dict[str, Tensor]] = (None, {})
        self.last_inputs: dict[str, Tensor] = {}
        self.last_written: dict[str, Tensor] = {}

    def call(self, **arguments: Any) -> Any:
        """Call with copies of the arguments, of any op; its result, or `stats`, on the CPU."""
        given = {name: value for name, value in arguments.items() if value is not None}
        self.last_call = describe_call(given)
        device = self.claims.device
        moved: dict[str, Any] = {
            n: _move(v, device) if isinstance(v, Tensor) else v for n, v in given.items()
        }
        updated = next((name for name in ("stats", "best") if name in moved), None)
        if updated is not None:
            moved[updated] = moved[updated].to(device)
        self.last_results = (moved.get("stats"), {})
        op = OPS[self.claims.op]
        self.last_written = {name: moved[name] for name in op.written}
        unnamed = [moved.get(name) for name in op.inputs]
        named = {n: v for n, v in moved.items() if n not in op.inputs}
        with _threads(self.n_threads):
            found = self.fn(*unnamed, **named)
        self.last_inputs = {n: _move(v, "cpu") for n, v in moved.items() if isinstance(v, Tensor)}
        if updated is not None or op.written:
            assert found is None, f"the result is a {type(found).__name__}, not None"
        if updated is not None:
            return moved[updated].to("cpu")
        if op.written:
            return tuple(self.last_inputs[name] for name in op.written)
        if isinstance(found, Tensor):
            return found.cpu()
        assert isinstance(found, tuple), f"the result is a {type(found).__name__}, not a tensor"
        return tuple(part.cpu() for part in found)

    def run(self, gate: Tensor, up: Tensor | None, **arguments: Any) -> Result:
        """Call with copies of the arguments on the device; arguments that are None stay out."""
        assert gate.numel() <= self.elements, "a check says how large its calls are"
        device = self.claims.device
        given: dict[str, Any] = {"activation": self.claims.activations[0]}
        given |= {name: value for name, value in arguments.items() if value is not None}
        self.last_call = describe_call({"gate": gate, "up": up, **given})
        stats = given.pop("stats", None)
        moved = {n: _move(v, device) for n, v in given.items() if isinstance(v, Tensor)}
        plain: dict[str, Any] = {"activation": given["activation"]}
        if stats is not None:
            plain["stats"] = stats.to(device)
        responses = {n: _move(v, device) for n, v in given.get("responses", {}).items()}
        if responses:
            plain["responses"] = responses
        self.last_results = (plain.get("stats"), responses)
        on_device = {"gate": _move(gate, device)}
        if up is not None:
            on_device["up"] = _move(up, device)
        with _threads(self.n_threads):
            h = self.fn(on_device["gate"], on_device.get("up"), **moved, **plain)
        assert isinstance(h, Tensor), f"the result is a {type(h).__name__}, not a tensor"
        if "out" in moved:
            assert h is moved["out"], "the result must be `out` itself when it is given"
        assert h.shape == gate.shape and h.dtype == gate.dtype, (
            f"h is {describe(h)} instead of {describe(gate)}"
        )
        return Result(
            _move(h, "cpu"),
            # A check that passed no statistics does not look at them.
            cast(GroupStats, None if stats is None else plain["stats"].to("cpu")),
            {name: _move(value, "cpu") for name, value in responses.items()},
            {name: _move(value, "cpu") for name, value in {**moved, **on_device}.items()},
        )


CheckFunction = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One promise of the contract. Call it with an implementation: it returns or it raises."""

    name: str
    promise: str
    needs: tuple[str, ...]
    elements: int
    _function: CheckFunction = field(repr=False)
    claims: Claims

    def __call__(self, fn: Backend) -> None:
        """Raise a ContractError unless `fn` holds the promise."""
        reason = self.failure(fn)
        if reason is not None:
            raise ContractError({self.name: reason}, 1)

    def failure(self, fn: Backend) -> str | None:
        """Why `fn` breaks the promise, with the call that shows it, or None."""
        subject = Subject(fn, self.claims, self.elements)
        try:
            # The oracle's tensors are small: on a busy machine torch's threads would mostly wait
            # for each other. The implementation runs with as many as the caller has set.
            with torch.no_grad(), ieee_arithmetic(), _threads(1):
                self._function(subject)
        except AssertionError as error:
            cause = str(error)
        # An implementation may raise whatever it likes; each check goes on with the next.
        except Exception as error:
            cause = f"it raised {type(error).__name__}: {error}"
        else:
            return None
        return f"{self.promise}\n    {cause}\n    call: {subject.last_call}"

    def __str__(self) -> str:
        return self.name


CHECKS: list[Check] = []


def check(
    *needs: str, elements: int = 5000, op: str = "swiglu_stats"
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a check: the features it needs ("half": a 16-bit type, "double": float64), its op.

    `elements` of its largest call: T x F, of average_precision N x M, of logprob_gain all logits.
    """

    def register(function: CheckFunction) -> CheckFunction:
        promise = (function.__doc__ or "").strip()
        own = Check(function.__name__, promise, needs, elements, function, Claims.of(op))
        CHECKS.append(own)
        return function

    return register


def backend_checks(op: str | Callable[..., Any] = "swiglu_stats", **options: Any) -> list[Check]:
    """The checks that apply, for a test runner; the options are those of `check_backend`.

    @pytest.mark.parametrize("check", backend_checks(dtypes=[torch.float32]), ids=str)
    def test_contract(check):
        check(my_swiglu_stats)
    """
    claims = Claims.of(op, **options)
    checks = [c for c in CHECKS if c.claims.op == claims.op]
    return [replace(c, claims=claims) for c in checks if claims.reason_to_skip(c) is None]


def check_backend(
    fn: Backend,
    op: str | Callable[..., Any] = "swiglu_stats",
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    activations: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    max_elements: int | None = None,
) -> Report:
    """Hold an implementation of an op to the op's contract.

    fn            is called as the op is, without `backend` and `ids_checked`, and with no more than
                  a check is about: fn(gate, up, activation=...) plus those of stats, group_ids,
                  responses, prompt_ids, keep, condition_ids and out, of which it updates the
                  `GroupStats` and the responses in place; fn(values, labels) plus weights; or
                  fn(x, values, coefficients, unembed, scale, targets) plus options of
                  `logprob_gain`. It returns what the op returns
    op            a name of `OPS`, or the op itself
    device        where the tensors of the calls are
    dtypes, activations, sites
                  what it supports, if not everything (the last two are of what reads a site)
    features      what it supports of `OPS[op].features`
    max_elements  leave out checks with a call of more than this number of elements: gates, values,
                  or logits (a slow implementation, such as an interpreted kernel)

    Integers, maxima and the masking are compared exactly, h by `assert_accurate` and in half types
    by its distance in representable numbers, sums by `assert_accurate` with the rounding of float32
    and the sum of the absolute terms as scale, so any fixed order of adding is right. Average
    precision is compared bit by bit, as its sum is one of integers; gains by `assert_accurate`,
    with both log-probabilities as terms.

    Returns a Report. Raises one ContractError, an AssertionError, that lists every check that
    failed: the promise, the worst or first wrong element, and the call that shows it.
    """
    options: dict[str, Any] = {
        "device": device,
        "dtypes": dtypes,
        "activations": activations,
        "sites": sites,
        "features": features,
        "max_elements": max_elements,
    }
    claims, checks = Claims.of(op, **options), backend_checks(op, **options)
    failures = {c.name: reason for c in checks if (reason := c.failure(fn)) is not None}
    if failures:
        raise ContractError(failures, len(checks))
    mine = [c for c in CHECKS if c.claims.op == claims.op]
    skipped = {c.name: why for c in mine if (why := claims.reason_to_skip(c)) is not None}
    return Report(tuple(c.name for c in checks), skipped)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- tensors and their descriptions ----------------------------------------------------------


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device, with all of its storage, so that strides and gaps stay as they are."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = storage.set_(tensor.untyped_storage()).detach().clone().to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def describe(tensor: Tensor) -> str:
    """Shape and dtype, and the row stride if there are gaps or overlaps."""
    text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return text if tensor.is_contiguous() else f"{text} with strides {tensor.stride()}"


def describe_call(arguments: dict[str, Any]) -> str:
    """The call as a user would write it, with shapes for the values."""
    parts = []
    for name, value in arguments.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items())
            parts.append(f"{name}={{{inner}}}")
        elif isinstance(value, Tensor):
            short = value.dtype == torch.int32 and 0 < value.numel() <= 12
            text = str(value.tolist()) if short else describe(value)
            parts.append(f"{name}{': ' if name in UNNAMED else '='}{text}")
        else:
            parts.append(f"{name}{': ' if name in UNNAMED else '='}{value!r}")
    return f"fn({', '.join(parts)})"
