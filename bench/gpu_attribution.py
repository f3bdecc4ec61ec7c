"""The section of `bench.gpu` on attribution: all FFN neurons of a 7B-shaped model, by logprob_gain.

Layers have random weights, and a few stand for 32: times per example are those of a layer times
32, as the notes say. Logits are spread over a few units, and coefficients such that a neuron moves
them by 0.026 at most in the median and by 0.25 in one of a hundred; with other sizes more or fewer
neurons need their exact sums.

The naive way is what the published notebooks do, as batched as it can be: x + c v for every neuron,
a bfloat16 product with the unembedding, log_softmax, one example after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.gpu_run import Run, check
from relneuron.ops.backends import triton_module
from relneuron.ops.logprob_gain.op import GainLayer, TopGains, logprob_gain, logprob_gain_top

N_LAYERS = 32
LARGEST_MOVE = 0.026  # the median over neurons of the largest change of a logit
SPREAD = 0.97  # of its logarithm
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sizes:
    neurons: int
    hidden: int
    tokens: int
    examples: int  # of exact; certified and top have twice as many
    layers: int  # that are timed
    top: int
    checked: int  # neurons compared with float64
    naive_rows: int


LLAMA_2_7B = Sizes(11008, 4096, 32000, 64, 4, 300, 512, 2048)
TINY = Sizes(24, 16, 50, 3, 2, 5, 24, 10)


class Inputs:
    """A model's unembedding, and sentences at its layers."""

    def __init__(self, sizes: Sizes, n_examples: int, device: str, dtype: torch.dtype) -> None:
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=random)

        self.sizes = sizes
        self.backend = "reference" if device == "cpu" else "triton"
        self.unembed = normal(sizes.tokens, sizes.hidden).to(dtype)
        self.scale = torch.ones(n_examples, device=device)
        self.layers = [
            GainLayer(
                x=3 * normal(n_examples, sizes.hidden) / sizes.hidden**0.5,
                # As a down projection lies in memory.
                values=(normal(sizes.hidden, sizes.neurons) / sizes.hidden**0.5).to(dtype).T,
                coefficients=(SPREAD * normal(n_examples, sizes.neurons)).exp()
                * normal(n_examples, sizes.neurons).sign()
                * (LARGEST_MOVE / 4.2),  # the largest of 32,000 normal numbers
            )
            for _ in range(sizes.layers)
        ]
        self.targets = self.logits(0).topk(3, 1).indices[:, 1].contiguous()

    def logits(self, layer: int) -> Tensor:
        return self.layers[layer].x @ self.unembed.float().T

    def gains(self, mode: str, layer: int = 0) -> Tensor:
        """`logprob_gain` of a layer, all examples: (E, K)."""
        x, values, coefficients, _, _ = self.layers[layer]
        found = logprob_gain(
            x,
            values,
            coefficients,
            self.unembed,
            self.scale,
            self.targets,
            mode=mode,
            tolerance=TOLERANCE,
            backend=self.backend,
        )
        assert isinstance(found, Tensor)
        return found

    def top(self) -> TopGains:
        return logprob_gain_top(
            self.layers,
            self.unembed,
            self.scale,
            self.targets,
            top=self.sizes.top,
            backend=self.backend,
        )

    def naive(self, example: int) -> Tensor:
        """The gains of a layer for one example, (K,): products in the dtype of the model."""
        x, values, coefficients, _, _ = self.layers[0]
        target = self.targets[example]
        base = (x[example].to(values.dtype) @ self.unembed.T).float().log_softmax(0)[target]
        found = []
        for rows in torch.arange(self.sizes.neurons).split(self.sizes.naive_rows):
            chosen = slice(int(rows[0]), int(rows[-1]) + 1)
            moved = x[example] + coefficients[example, chosen, None] * values[chosen]
            logits = moved.to(values.dtype) @ self.unembed.T
            found.append(logits.float().log_softmax(1)[:, target] - base)
        return torch.cat(found)

    def exact(self, n_neurons: int) -> Tensor:
        """The gains of a layer's first neurons, (E, n) float64, as the definition says."""
        x, values, coefficients, _, _ = self.layers[0]
        unembed, found = self.unembed.double(), []
        for example, target in enumerate(self.targets.tolist()):
            moved = coefficients[example, :n_neurons, None].double() * values[:n_neurons].double()
            point = x[example].double()
            before = (point @ unembed.T).log_softmax(0)[target]
            found.append(((point + moved) @ unembed.T).log_softmax(1)[:, target] - before)
        return torch.stack(found)


def time_attribution(run: Run) -> None:
    """P14 to P17: all gains, all within a tolerance, the largest; and their errors."""
    sizes = TINY if run.dry else LLAMA_2_7B
    inputs = Inputs(sizes, sizes.examples, run.device, torch.float32 if run.dry else torch.bfloat16)
    naive_ms = 1e3 * N_LAYERS * timed(run, lambda: inputs.naive(0), 3)
    times = run.json["model"]["attribution"] = {"naive_ms": naive_ms}
    times["exact_ms"] = compare(run, inputs, "P14", naive_ms, lambda: inputs.gains("exact"))
    times["naive_median_error"] = check_errors(run, inputs)
    if not run.dry:
        times |= kernel_times(run, inputs)

    many = Inputs(sizes, 2 * sizes.examples, run.device, inputs.unembed.dtype)
    times["certified_ms"] = compare(run, many, "P15", naive_ms, lambda: many.gains("certified"))
    times["top_ms"] = compare(run, many, "P16", naive_ms, many.top, sizes.layers)
    check_top(run, many)
    if not run.dry:
        many.unembed = many.unembed.float()  # as a model's is folded: b takes three products
        found = timed(run, lambda: many.gains("certified"), 2)
        times["certified_float32_unembed_ms"] = 1e3 * N_LAYERS * found / len(many.targets)


def compare(
    run: Run,
    inputs: Inputs,
    goal: str,
    naive_ms: float,
    work: Callable[[], object],
    n_layers: int = 1,
) -> float:
    """ms per example and 32 layers of a call on `n_layers`; writes down both goals."""
    n_examples = len(inputs.targets)
    ms = 1e3 * N_LAYERS * timed(run, work, 3) / n_layers / n_examples
    note = f"({n_examples} examples, {n_layers} layers of {inputs.sizes.neurons} at once; for 32)"
    run.reached(f"{goal}a", ms, note)
    run.reached(f"{goal}b", naive_ms / ms, note)
    return ms


def check_errors(run: Run, inputs: Inputs) -> float:
    """P17, on a layer's first neurons; the naive way's median error for comparison."""
    n = inputs.sizes.checked
    exact = inputs.exact(n)
    errors = {
        mode: float((inputs.gains(mode)[:, :n] - exact).abs().max())
        for mode in ("exact", "certified")
    }
    check(run, "certified gains are within the tolerance", errors["certified"] <= TOLERANCE)
    run.reached("P17", max(errors.values()), f"({exact.numel():,} pairs, exact and certified)")
    return float((inputs.naive(0)[:n] - exact[0]).abs().median())


def check_top(run: Run, inputs: Inputs) -> None:
    """The largest gains are those of all gains, but for neurons that float32 cannot order."""
    found = inputs.top()
    gains = [inputs.gains("exact", layer) for layer in range(len(inputs.layers))]
    wanted = torch.cat(gains, 1).topk(inputs.sizes.top, 1).values
    error = float((found.gain.sort(1, descending=True).values - wanted).abs().max())
    check(run, "the largest gains are the largest of all gains", error <= TOLERANCE)


def kernel_times(run: Run, inputs: Inputs) -> dict[str, float]:
    """ms per example and 32 layers of what the op launches: sums, moments, and b alone."""
    kernels = triton_module("logprob_gain")
    p, layer = inputs.logits(0).softmax(1), inputs.layers[0]
    width = p.shape[1]
    calls: dict[str, Callable[[], object]] = {
        "sums": lambda: kernels.gain_sums_dense(
            layer.values, inputs.unembed, p, layer.coefficients
        ),
        "sums_of_large_y": lambda: kernels.gain_sums_dense(
            layer.values, inputs.unembed, p, 100 * layer.coefficients
        ),
        "moments": lambda: kernels.moment_sums(layer.values, inputs.unembed, p),
        "b": lambda: list(kernels.tiles.tiles(layer.values, inputs.unembed, width)),
    }
    factor = 1e3 * N_LAYERS / len(p)
    return {f"kernel_{name}_ms": factor * timed(run, call, 5) for name, call in calls.items()}


def timed(run: Run, work: Callable[[], object], rounds: int) -> float:
    """Median seconds; the first call, which compiles kernels, does not count."""
    work()
    found = []
    for _ in range(1 if run.dry else rounds):
        _wait(run)
        began = time.perf_counter()
        work()
        _wait(run)
        found.append(time.perf_counter() - began)
    return median(found)


def _wait(run: Run) -> None:
    if run.device != "cpu":
        torch.cuda.synchronize()
