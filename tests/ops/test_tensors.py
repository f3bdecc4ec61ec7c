"""What every op refuses of its tensors: gradients it would lose, values not where the address says.

And of those that it writes: fields of a GroupStats that are not as they were made, memory that
another argument has, two threads at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from relneuron import ops
from relneuron.ops import GroupStats, available_backends

BACKENDS = ["reference", *(["cpu"] if available_backends()["cpu"].works else [])]
T, F, G, N, V, E = 6, 40, 2, 3, 11, 4
TARGETS = torch.arange(E)

Call = tuple[Callable[..., Any], dict[str, Any]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def gain(values: Tensor, x: Tensor, unembed: Tensor, scale: Tensor, **others: Any) -> Any:
    coefficients = others.pop("coefficients", None)
    if "vectors" in others:
        return ops.logprob_gain_vectors(x, others.pop("vectors"), unembed, scale, TARGETS, **others)
    return ops.logprob_gain(x, values, coefficients, unembed, scale, TARGETS, **others)


def calls() -> dict[str, Call]:
    """A good call of every op: the function, its arguments by name."""
    down = GroupStats(groups=G, width=F, sites=("down",), moments=True)
    stats = GroupStats(groups=G, width=F, sites=("act", "up"), moments=True)
    both = GroupStats(groups=G, width=F, sites=ops.PAIR_SITES, moments=True)
    recording = {"group_ids": zeros(T), "prompt_ids": zeros(T)}
    masks = {"keep": zeros(2, 2), "condition_ids": zeros(T)}
    gate_up = {"gate": drawn(T, F), "up": drawn(T, F)}
    rows = {"gate": torch.zeros(N, F), "up": torch.zeros(N, F)}
    gains = {
        "x": drawn(E, F),
        "values": drawn(T, F),
        "unembed": drawn(V, F),
        "scale": torch.ones(E),
        "coefficients": drawn(E, T),
        "offset": drawn(V),
        "scale_after": torch.ones(E, T),
    }
    vectors = {**gains, "vectors": drawn(E, T, F)}
    labels = torch.tensor([[1, 0, 0, 1, 0, -1]], dtype=torch.int8)
    return {
        "swiglu_stats": (
            ops.swiglu_stats,
            {**gate_up, **recording, **masks, "stats": stats, "responses": rows}
            | {"out": torch.zeros(T, F)},
        ),
        "swiglu_stats_only": (
            ops.swiglu_stats_only,
            {**gate_up, **recording, "stats": stats, "responses": rows},
        ),
        "residual_stats": (
            ops.residual_stats,
            {"x": drawn(T, F), "residual": drawn(T, F), **recording, **masks, "stats": down}
            | {"responses": {"down": torch.zeros(N, F)}, "out": torch.zeros(T, F)},
        ),
        "pair_stats": (
            ops.pair_stats,
            {"a": drawn(T, F), "b": drawn(T, F), "stats": both, "group_ids": zeros(T)},
        ),
        "average_precision": (
            ops.average_precision,
            {"values": drawn(T, F), "labels": labels, "weights": torch.ones_like(labels).byte()},
        ),
        "logprob_gain": (gain, gains),
        "logprob_gain certified": (gain, {**gains, "mode": "certified"}),
        "logprob_gain top": (gain, {**gains, "mode": "top", "top": 2}),
        "logprob_gain_vectors": (gain, {k: v for k, v in vectors.items() if k != "coefficients"}),
    }


def tensors(arguments: dict[str, Any]) -> dict[str, Callable[[Tensor], None]]:
    """Every tensor of a call by the name that the op gives it, and how to put another one there."""

    def field(stats: GroupStats, name: str) -> Callable[[Tensor], None]:
        return lambda tensor: setattr(stats, name, tensor)

    def item(where: dict[str, Any], name: str) -> Callable[[Tensor], None]:
        return lambda tensor: where.__setitem__(name, tensor)

    found = {}
    for name, value in arguments.items():
        if isinstance(value, GroupStats):
            for key in ("tokens", "_count", "_sum", "_sum_sq", "_max", "_n_nonfinite"):
                found[f"stats.{key.strip('_')}"] = field(value, key)
        elif isinstance(value, dict):
            for site in value:
                found[f"responses[{site!r}]"] = item(value, site)
        elif isinstance(value, Tensor):
            found[name] = item(arguments, name)
    return found


def current(arguments: dict[str, Any], name: str) -> Tensor:
    if name.startswith("stats."):
        stats = arguments["stats"]
        key = name.removeprefix("stats.")
        return getattr(stats, key if key == "tokens" else f"_{key}")  # type: ignore[no-any-return]
    if name.startswith("responses"):
        return arguments["responses"][name.split("'")[1]]  # type: ignore[no-any-return]
    return arguments[name]  # type: ignore[no-any-return]


PLACES = [
    (op, name)
    for op, (_, arguments) in calls().items()
    for name in tensors(arguments)
    # Left out of one of the two: `values` is not an argument of vectors, nor `scale_after` (E, M).
    if (op, name) != ("logprob_gain_vectors", "values")
]
FLOATS = [(op, name) for op, name in PLACES if current(calls()[op][1], name).is_floating_point()]
# tests/ops/swiglu_stats/test_gradient.py has these.
WITH_GRADIENT = [("swiglu_stats", "gate"), ("swiglu_stats", "up")]


def changed(op: str, name: str, change: Callable[[Tensor], Any]) -> Call:
    function, arguments = calls()[op]
    tensors(arguments)[name](change(current(arguments, name)))
    return function, arguments


def refused(call: Call, backend: str, op: str, name: str, match: str) -> None:
    function, arguments = call
    with pytest.raises(ValueError, match=match) as caught:
        function(**arguments, backend=backend)
    assert str(caught.value).startswith(f"{op.split()[0].removesuffix('_vectors')}: {name} must")


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), [x for x in FLOATS if x not in WITH_GRADIENT])
def test_a_gradient_that_would_be_lost_is_refused(op: str, name: str, backend: str) -> None:
    call = changed(op, name, lambda tensor: tensor.clone().requires_grad_())
    refused(call, backend, op, name, rf"{name.split('[')[0]}.*\.detach\(\).*torch\.no_grad\(\)")
    with torch.no_grad():
        found = call[0](**call[1], backend=backend)
    for tensor in found if isinstance(found, tuple) else [found]:
        assert tensor is None or not tensor.requires_grad or name == "out"


# What torch loads for it at first uses a part of torch that it calls old.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_a_tangent_is_refused(op: str, name: str) -> None:
    with forward_ad.dual_level():

        def dual(tensor: Tensor) -> Tensor:
            return forward_ad.make_dual(tensor.clone(), torch.ones_like(tensor))

        refused(changed(op, name, dual), "auto", op, name, "tangent")


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("op", ["swiglu_stats", "average_precision", "logprob_gain"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_inside_a_transform_of_torch_it_is_refused(op: str, transform: str) -> None:
    name = {"swiglu_stats": "gate", "average_precision": "values", "logprob_gain": "x"}[op]
    function, arguments = calls()[op]
    given = arguments.pop(name)

    def of(tensor: Tensor) -> Tensor:
        return function(**{name: tensor}, **arguments).sum()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=f"{op}: {name} must be a plain tensor.*torch.func"):
        if transform == "grad":
            torch.func.grad(of)(given)
        elif transform == "jvp":
            torch.func.jvp(of, (given,), (given,))
        else:
            torch.func.vmap(of)(torch.stack([given, given]))


def test_compiled_code_refuses_a_gradient() -> None:
    torch.compiler.reset()
    gate, up = drawn(T, F).requires_grad_(), drawn(T, F)
    compiled = torch.compile(lambda a, b: ops.residual_stats(a, b) + 1, backend="aot_eager")
    with pytest.raises(ValueError, match="residual_stats: x must not require grad"):
        compiled(gate, up)


# --- values that are not where the address says ----------------------------------------------


class Elsewhere(torch.Tensor):
    """A subclass that answers for itself, as a sharded tensor does."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("it was read")


def elsewhere(tensor: Tensor) -> Tensor:
    return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
        Elsewhere, tensor.shape, dtype=tensor.dtype
    )


STRANGE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "negative": (lambda t: t.clone()._neg_view(), r"\.resolve_neg\(\)"),
    "zero": (lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), r"\.clone\(\)"),
    "sparse": (lambda t: t.to_sparse(), r"torch\.sparse_coo.*\.to_dense\(\)"),
    "subclass": (elsewhere, "Elsewhere"),
}


@pytest.mark.parametrize("kind", sorted(STRANGE))
@pytest.mark.parametrize(("op", "name"), PLACES)
def test_a_tensor_that_no_kernel_can_read_is_refused(op: str, name: str, kind: str) -> None:
    make, match = STRANGE[kind]
    if kind == "negative" and current(calls()[op][1], name).dtype == torch.uint8:
        pytest.skip("there is none of it")
    refused(changed(op, name, make), "auto", op, name, match)


def test_resolved_and_parameters_and_plain_subclasses_are_read() -> None:
    class Named(torch.Tensor):
        pass

    gate, up = drawn(T, F), drawn(T, F)
    wanted = ops.swiglu_stats(gate, up)
    negative = (-gate)._neg_view()
    assert torch.equal(ops.swiglu_stats(negative.resolve_neg(), up), wanted)
    with torch.no_grad():
        assert torch.equal(ops.swiglu_stats(torch.nn.Parameter(gate), up), wanted)
    assert torch.equal(torch.Tensor(ops.swiglu_stats(gate.as_subclass(Named), up)), wanted)


@pytest.mark.parametrize("op", ["swiglu_stats", "average_precision", "logprob_gain"])
def test_tensors_without_data_are_refused(op: str) -> None:
    function, arguments = calls()[op]
    for name in list(arguments):
        if isinstance(arguments[name], Tensor):
            arguments[name] = arguments[name].to("meta")
    arguments.pop("stats", None)
    arguments.pop("responses", None)
    with pytest.raises(ValueError, match="meta"):
        function(**arguments)


# --- what is written -------------------------------------------------------------------------


def test_changed_fields_of_the_statistics_are_refused() -> None:
    gate, up = drawn(T, F), drawn(T, F)
    for moments in (False, True):
        for name, value in {
            "groups": 900,
            "width": F + 1,
            "sites": ("up", "act"),
            "threshold": 0.5,
            "moments": not moments,
        }.items():
            stats = GroupStats(groups=1, width=F, sites=("act", "up"), moments=moments)
            setattr(stats, name, value)
            with pytest.raises(ValueError, match=r"swiglu_stats: stats must have .*(900|0\.5|F|4)"):
                ops.swiglu_stats(gate, up, stats=stats)
            with pytest.raises(ValueError, match="GroupStats: stats must have"):
                stats.to("cpu")


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "smaller": lambda t: t.new_zeros(1),
    "larger": lambda t: t.new_zeros(*t.shape, 2),
    "another type": lambda t: t.short(),
    "expanded": lambda t: t.new_zeros(()).expand(t.shape),
    "resized": lambda t: t.resize_(1),
    "with a gap": lambda t: t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2],
    "None": lambda t: None,
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", ["tokens", "_count", "_sum", "_sum_sq", "_max", "_n_nonfinite"])
def test_changed_tensors_of_the_statistics_are_refused(name: str, change: str) -> None:
    for backend in BACKENDS:
        stats = GroupStats(groups=2, width=F, moments=True)
        setattr(stats, name, CHANGES[change](getattr(stats, name)))
        with pytest.raises((ValueError, TypeError), match=f"stats.{name.strip('_')} must be"):
            ops.swiglu_stats(
                drawn(T, F), drawn(T, F), stats=stats, group_ids=zeros(T), backend=backend
            )


def views(*offsets: int, rows: int = T, columns: int = F) -> list[Tensor]:
    """Matrices in one numpy array, each from_numpy by itself: to torch, storages of their own."""
    array = np.zeros(rows * columns + max(offsets), np.float32)
    size = rows * columns
    parts = [array[o : o + size].reshape(rows, columns) for o in offsets]
    return [torch.from_numpy(part) for part in parts]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 1, F, T * F - 1])
@pytest.mark.parametrize("other", ["gate", "up"])
def test_out_in_the_memory_of_an_input_is_refused(other: str, offset: int, backend: str) -> None:
    out, shared = views(0, offset)
    inputs = {"gate": drawn(T, F), "up": drawn(T, F), other: shared}
    with pytest.raises(ValueError, match=f"swiglu_stats: out must not share memory with {other}"):
        ops.swiglu_stats(inputs["gate"], inputs["up"], out=out, backend=backend)
    with pytest.raises(ValueError, match="residual_stats: out must not share memory with x"):
        ops.residual_stats(shared, drawn(T, F), out=out, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_in_one_array_are_not_one_memory(backend: str) -> None:
    gate, up = drawn(T, F), drawn(T, F)
    wanted = ops.swiglu_stats(gate, up, backend=backend)
    out, beside = views(0, T * F)
    beside.copy_(gate)
    assert torch.equal(ops.swiglu_stats(beside, up, out=out, backend=backend), wanted)
    packed = torch.cat([gate, up, torch.zeros(T, F)], 1)
    parts = packed.split(F, 1)
    h = ops.swiglu_stats(*parts[:2], out=parts[2], backend=backend)
    assert torch.allclose(h, wanted, rtol=1e-6)  # torch's silu depends on strides in the last bit
    both = torch.zeros(N, 2 * F)
    responses = {"gate": both[:, :F], "up": both[:, F:]}
    ops.swiglu_stats(gate, up, responses=responses, prompt_ids=zeros(T), backend=backend)
    assert torch.allclose(both[0], torch.cat([gate, up], 1).sum(0), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_memory_for_two_results_is_refused(backend: str) -> None:
    def refuse(match: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ops.swiglu_stats_only(drawn(T, F), drawn(T, F), backend=backend, **arguments)

    one = torch.zeros(N, F)
    two = torch.zeros(N + 1, F)
    match = r"responses\['gate'\] must not share memory with responses\['up'\]"
    refuse(match, responses={"gate": one, "up": one}, prompt_ids=zeros(T))
    refuse(match, responses={"gate": two[1:], "up": two[:-1]}, prompt_ids=zeros(T))
    wide = torch.zeros(N, F + 1)
    refuse(match, responses={"gate": wide[:, 1:], "up": wide[:, :-1]}, prompt_ids=zeros(T))
    stats = GroupStats(groups=1, width=F, moments=True)
    stats._sum_sq = stats._sum
    refuse("stats.sum must not share memory with stats.sum_sq", stats=stats)
    stats = GroupStats(groups=1, width=F)
    stats.tokens = stats._count.view(-1)[3:4]
    refuse("stats.count must not share memory with stats.tokens", stats=stats)
    ids = zeros(T)
    stats = GroupStats(groups=1, width=F)
    stats.tokens = ids.view(torch.int64)[:1]
    refuse("stats.tokens must not share memory with group_ids", stats=stats, group_ids=ids)


def test_compiled_code_refuses_views_that_it_cannot_see() -> None:
    torch.compiler.reset()
    (out, gate), up = views(0, 3), drawn(T, F)
    compiled = torch.compile(
        lambda a, b, c: ops.swiglu_stats(a, b, out=c), backend="aot_eager", fullgraph=True
    )
    try:
        h = compiled(gate, up, out)
    except ValueError as error:
        assert "out must not share memory with gate" in str(error)
    else:  # the compiler gave the op a copy
        assert torch.equal(h, ops.swiglu_stats(views(0, 3)[1], up))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_that_share_the_statistics_lose_nothing(backend: str) -> None:
    n_threads, n_calls = 4, 60
    gate = torch.ones(8, 512)
    stats = GroupStats(groups=1, width=512, moments=True)
    responses = {"gate": torch.zeros(1, 512)}
    start = threading.Barrier(n_threads)

    def count() -> None:
        start.wait()
        for _ in range(n_calls):
            ops.swiglu_stats_only(
                gate, gate, stats=stats, responses=responses, prompt_ids=zeros(8), backend=backend
            )

    threads = [threading.Thread(target=count) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    n = 8 * n_threads * n_calls
    assert stats.tokens.tolist() == [n]
    assert (stats.count["act"] == n).all() and (responses["gate"] == n).all()
