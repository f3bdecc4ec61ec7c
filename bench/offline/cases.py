"""What is compiled: targets, kinds of calls of each op, and their launches.

A kind of call becomes the launches that its op would make (the launcher's own plan, on tensors
without memory), and a launch becomes code for a GPU that is not here.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

from relneuron.ops import SITES, GroupStats
from relneuron.ops.average_precision import triton_launch as ranking
from relneuron.ops.logprob_gain import triton_launch as gains
from relneuron.ops.peaks import triton_launch as peaks
from relneuron.ops.peaks.best import BestPeaks
from relneuron.ops.peaks.reference import HistogramCall, MergeCall, PeaksCall
from relneuron.ops.swiglu_stats import triton_launch as launcher
from relneuron.ops.swiglu_stats.reference import Call
from relneuron.ops.swiglu_stats.triton_launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}

# What is asked of a call of swiglu_stats. The widths are Llama's: a multiple of every block, except
# "ragged".
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "count": {"sites": ("act",)},
    "count, one condition": {"sites": ("act",), "conditions": True},
    "all at act, conditions": {"sites": ("act",), "moments": True, "conditions": True},
    "one mask": {"mask": True},
    "all at gate, up, act": {"sites": ("gate", "up", "act"), "moments": True},
    "all at all sites": {"sites": SITES, "moments": True, "conditions": True},
    "threshold -0.1": {"sites": ("act",), "threshold": -0.1},
    "ragged width": {"sites": ("act",), "width": 11024, "conditions": True},
    "many groups": {"sites": ("act",), "moments": True, "groups": 40},
    "responses": {"responses": ("gate", "up", "product")},
    "gelu": {"activation": "gelu", "sites": ("act",)},
    "gelu_tanh": {"activation": "gelu_tanh", "sites": ("act",)},
    "relu": {"activation": "relu", "sites": ("act",)},
    # Without up, as most models have these activations.
    "ungated": {"gated": False, "sites": ("act",)},
    "ungated, all, conditions": {
        "gated": False,
        "sites": ("act",),
        "moments": True,
        "conditions": True,
    },
    "ungated, responses": {"gated": False, "responses": ("gate", "act")},
    "relu2": {"gated": False, "activation": "relu2", "sites": ("act",), "mask": True},
    "quick_gelu": {"gated": False, "activation": "quick_gelu", "sites": ("act",)},
    "tanh": {"gated": False, "activation": "tanh", "sites": ("act",)},
    # The op residual_stats, whose one site is the gate's.
    "residual": {"activation": "residual", "sites": ("gate",), "width": 4096, "conditions": True},
    # The op pair_stats, which writes no h.
    "pair": {"activation": "difference", "sites": ("gate", "up", "act"), "moments": True},
    "pair, many groups": {
        "activation": "difference",
        "sites": ("gate", "up", "act"),
        "moments": True,
        "groups": 40,
    },
}

# Of average_precision: rows to sort, then (relations, rows, with weights) to sum over.
SORTS = {f"rank {n} rows": n for n in (512, 1024, 2048, 4096, 8192)}
SUMS = {
    "rank for 1 relation": (1, 4096, False),
    "rank for 12 relations": (12, 4096, False),
    "rank with weights": (12, 4096, True),
    "rank 40000 rows": (12, 40000, False),
}
# Of logprob_gain: (kernel, sentences, with tilt). The kernels see float32, whatever the model has.
GAINS = {
    "gain": ("dense", 64, False),
    "gain with tilt": ("dense", 64, True),
    "gain for 1 sentence": ("dense", 1, False),
    "gain of a list": ("list", 64, False),
    "gain of a list with tilt": ("list", 64, True),
    "moments": ("moments", 128, False),
    "moments for 8 sentences": ("moments", 8, False),
}

# Of peaks (32 windows), histogram and merge_peaks: the site of the former two.
PEAKS = {
    "peaks at act": "act",
    "peaks at product": "product",
    "histogram at act": "act",
    "histogram at product": "product",
}
MERGES = {"merge 16 peaks": 16, "merge 128 peaks": 128}

# Each kernel of them once.
SOME_GAINS = ("gain with tilt", "gain of a list", "moments")

Case = tuple[str, str, str]


def cases() -> list[Case]:
    """(target, dtype, variant): all of them."""
    found = [
        (target, dtype, variant)
        for target in sorted(TARGETS, key=lambda name: name != "sm_90")
        for dtype in DTYPES
        for variant in VARIANTS
    ]
    # A sort takes seconds to compile: all of them for one target only, and of the two dtypes of 16
    # bits, which differ in one constant, one. The sums see no values.
    for dtype in ("fp32", "bf16"):
        found += [(target, dtype, f"rank {n} rows") for target in TARGETS for n in (512, 4096)]
        found += [("sm_90", dtype, variant) for variant in SORTS]
        found += [(target, dtype, variant) for target in TARGETS for variant in PEAKS]
    # What sees no values, or float32 alone.
    some = (*SUMS, *GAINS, *MERGES)
    found += [(target, "any", variant) for target in TARGETS for variant in some]
    return list(dict.fromkeys(found))


def cover() -> set[Case]:
    """Each kernel on sm_90, and on every other target the one that all calls of its op launch.

    The digest of a row is that of all that its code is made from, so these are samples.
    """
    found = {("sm_90", "bf16", variant) for variant in ("many groups", "responses")}
    found |= {("sm_90", "bf16", "rank 512 rows"), ("sm_90", "any", "rank for 12 relations")}
    found |= {("sm_90", "any", variant) for variant in (*SOME_GAINS, "merge 16 peaks")}
    found |= {("sm_90", "bf16", variant) for variant in ("peaks at act", "histogram at act")}
    for target, dtype in zip(TARGETS, (*DTYPES, "bf16"), strict=True):
        found |= {(target, dtype, "count"), (target, "any", "gain with tilt")}
    return found


# --------------------------------------------------------------------------------------------------
# From a kind of call to compiled kernels


def example_call(
    dtype: torch.dtype,
    *,
    sites: tuple[str, ...] = (),
    moments: bool = False,
    groups: int = 12,
    threshold: float = 0.0,
    responses: tuple[str, ...] = (),
    mask: bool = False,
    conditions: bool = False,
    activation: str = "silu",
    gated: bool = True,
    width: int = 11008,
    n_tokens: int = 8192,
) -> Call:
    """A call on tensors that have shapes and no memory."""

    def tensor(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    stats = None
    if sites:
        stats = GroupStats(
            groups=groups,
            width=width,
            sites=sites,
            moments=moments,
            threshold=threshold,
            device="meta",
        )
    return Call(
        gate=tensor(n_tokens, width, of=dtype),
        up=tensor(n_tokens, width, of=dtype) if gated else None,
        out=None if activation == "difference" else tensor(n_tokens, width, of=dtype),
        activation=activation,
        sites=sites,
        threshold_bits=0 if stats is None else stats._threshold_bits,
        count=None if stats is None else stats._count,
        tokens=None if stats is None else stats.tokens,
        sum=None if stats is None else stats._sum,
        sum_sq=None if stats is None else stats._sum_sq,
        max=None if stats is None else stats._max,
        n_nonfinite=None if stats is None else stats._n_nonfinite,
        group_ids=tensor(n_tokens) if stats is not None else None,
        responses={site: tensor(410, width, of=torch.float32) for site in responses},
        prompt_ids=tensor(n_tokens) if responses else None,
        keep=tensor(13, (width + 31) // 32) if mask or conditions else None,
        condition_ids=tensor(n_tokens) if conditions else None,
    )


def launches(target: str, dtype: str, variant: str) -> list[Launch]:
    """What the op would launch on the target."""
    if variant in SORTS or variant in SUMS:
        return [ranking_launch(target, dtype, variant)]
    if variant in GAINS:
        return [gain_launch(target, variant)]
    if variant in PEAKS or variant in MERGES:
        return peaks_launches(target, dtype, variant)
    call = example_call(DTYPES[dtype], **VARIANTS[variant])
    kind = TARGETS[target]
    is_nvidia = kind.backend == "cuda"
    capability = (int(kind.arch) // 10, int(kind.arch) % 10) if is_nvidia else (9, 4)
    config = launcher.LAUNCH_TABLE[capability]
    return launcher.plan(call, config, is_nvidia=is_nvidia)


def ranking_launch(target: str, dtype: str, variant: str) -> Launch:
    """What `average_precision` would launch on the target, for 64 of 11,008 columns."""
    is_nvidia = TARGETS[target].backend == "cuda"
    config = ranking.NVIDIA_LAUNCH if is_nvidia else ranking.HIP_LAUNCH
    relations, n, is_weighted = SUMS.get(variant) or (1, SORTS[variant], False)
    width = config.width(n)
    order = torch.empty(64, width, dtype=torch.int32, device="meta")
    if variant in SORTS:
        values = torch.empty(n, 11008, dtype=DTYPES[dtype], device="meta")
        return ranking.plan_sort(order, order, values[:, :64], config)
    labels = torch.ones(relations, n, dtype=torch.int8)
    weights = labels.to(torch.uint8) if is_weighted else None
    counts = ranking.Counts.of(labels, weights, width, labels.device)
    sums = torch.empty(relations, 11008, dtype=torch.int64, device="meta")
    return ranking.plan_sum(sums, sums, order, counts, 0, config)


def gain_launch(target: str, variant: str) -> Launch:
    """What `logprob_gain` would launch on the target for a tile of 1,024 neurons, 32,000 tokens."""
    kind = TARGETS[target]
    capability = (int(kind.arch) // 10, 0) if kind.backend == "cuda" else (9, 4)
    config = gains.LAUNCH_TABLE[capability]
    kernel, n_sentences, has_tilt = GAINS[variant]

    def tensor(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    tile, largest, p = tensor(1024, 32000), tensor(1024), tensor(n_sentences, 32000)
    if kernel == "moments":
        return gains.plan_moments(tensor(2, 63, 1024, n_sentences), tile, p, config)
    tokens = gains.Tokens(p, p if has_tilt else None, largest if has_tilt else None)
    if kernel == "dense":
        t = tensor(n_sentences, 11008)[:, :1024]
        sums = tensor(n_sentences, 11008, of=torch.float64)[:, :1024]
        return gains.plan_dense(sums, tile, largest, tokens, t, t if has_tilt else None, config)
    t, places = tensor(4096), tensor(1024, of=torch.int64)
    sums, sentence = tensor(4096, of=torch.float64), tensor(4096, of=torch.int32)
    tilt = t if has_tilt else None
    pairs = gains.Pairs(places, places, places, sentence, t, tilt, gains.LIST_SENTENCES)
    return gains.plan_list(sums, tile, largest, tokens, pairs, config)


def peaks_launches(target: str, dtype: str, variant: str) -> list[Launch]:
    """What `peaks`, `histogram` and `merge_peaks` would launch for 32 windows of 128 tokens."""
    config = peaks.NVIDIA_LAUNCH if TARGETS[target].backend == "cuda" else peaks.HIP_LAUNCH

    def tensor(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    width, segments = 11008, (tensor(32, 11008, of=torch.float32), tensor(32, 11008))
    if variant in MERGES:
        best = BestPeaks.none(12, width, MERGES[variant], device="meta")
        numbers = tensor(32, of=torch.int64)
        return peaks.plan_merge(MergeCall(best, *segments, tensor(32), numbers), config)
    site = PEAKS[variant]
    gate, ids = tensor(4096, width, of=DTYPES[dtype]), tensor(4096)
    inputs = (gate, gate if site == "product" else None, "silu", site, ids)
    if variant.startswith("peaks"):
        return peaks.plan_peaks(PeaksCall(*inputs, *segments, 0), config)
    counts = tensor(12, width, 64, of=torch.int64)
    return peaks.plan_histogram(
        HistogramCall(*inputs, counts, tensor(width), tensor(width)), config
    )


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    return triton.compile(_source(launch), target=target, options=launch.compiler_options())


def digest(launch: Launch, target: GPUTarget) -> str:
    """Of all that Triton compiles it from: kernel, constants, types, options, target, Triton."""
    backend = make_backend(target)
    options = backend.parse_options(launch.compiler_options())
    key = get_cache_key(_source(launch), backend, options, env_vars={})
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def code_digest(launch: Launch, target: GPUTarget) -> str:
    """Of what is compiled as far as it is ours: kernel, constants, types, options, target."""
    source = _source(launch)
    kernels: dict[str, str] = {}
    _collect(launch.kernel, kernels)
    constants = {name: str(value) for name, value in source.constants.items()}
    parts = (kernels, source.signature, constants, source.attrs, launch.compiler_options(), target)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _collect(kernel: Any, found: dict[str, str]) -> None:
    """Add the source of a kernel, of our functions that it calls, and their constants."""
    name = f"{kernel.__module__}.{kernel.__name__}"
    if name in found:
        return
    found[name] = kernel.src
    for used in kernel.fn.__code__.co_names:
        value = kernel.fn.__globals__.get(used)
        if isinstance(value, triton.language.constexpr):
            found[f"{name}: {used}"] = repr(value.value)
        elif getattr(value, "__module__", "").startswith("relneuron"):
            _collect(value, found)


def _source(launch: Launch) -> ASTSource:
    """As Triton's own launch would make it: the same types, constants and alignments."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = launch.constants[name] if parameter.is_constexpr else launch.args[name]
        is_fixed = parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and not is_fixed
        if parameter.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # torch aligns what it allocates; views start at an offset.
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not is_fixed:
                attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)
