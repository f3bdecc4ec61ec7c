"""`logprob_gain` on a CPU against the plain torch computation: time and peak memory in one run.

    PYTHONPATH=. python -m bench.attribution [--sentences N] [--rounds N] [-o FILE.csv]

The neurons are those of a Llama of random weights (`--layers`, `--width`, `--hidden`,
`--vocabulary`), traced on random sentences; random weights write little, so `--gain` scales the
coefficients to gains of that size. Contestants, in alternating rounds, all in float32:

- `plain`: the vocabulary projection of a layer's value vectors once for all sentences, then for
  each sentence the logits of all neurons and their log_softmax;
- `plain, in place`: the same with one buffer, logsumexp and the target's logit only;
- `plain, in blocks`: that for a few neurons at a time, whose logits stay in the caches;
- `exact`, `certified`, `top`: ours.

All must give the same gains and the same sets, or the run ends. Memory is how far the peak of a
process of its own, which has made the inputs, rises during the call. Then `--interventions`
sentences, each with its own ten neurons off: `together`, in batches, every row its own mask, and
`one at a time`, their columns of W_down set to zero, the logits of the last token only.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.ranking import forget_peak
from bench.rows import add_rows
from relneuron import ops
from relneuron.ablation.rows import intervene, off
from relneuron.artifact.memory import peak_bytes
from relneuron.bench.gain import PEERS
from relneuron.bench.machine import where
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import trace


def make_model(
    vocabulary: int,
    hidden: int,
    width: int,
    layers: int,
    *,
    key_heads: int = 2,
    positions: int = 128,
) -> Any:
    """A Llama of random weights with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def make_sentences(n: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, 6 to 14 a sentence."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 15, (n,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (k,), generator=generator).tolist() for k in lengths]


class Race:
    """The neurons of a traced batch, and every way to score them."""

    def __init__(self, model: Any, n_sentences: int, gain: float, top: int) -> None:
        residual = read_residual_model(model)
        found = trace(residual, make_sentences(n_sentences, residual.vocabulary))
        self.unembed, self.scale, self.top = residual.unembed, found.scale.float(), top
        self.targets = found.logits.argsort(dim=1, descending=True)[:, 1]
        self.layers = [
            ops.GainLayer(found.r[i][:, -1], layer.ffn_values(), found.neurons[i][:, -1])
            for i, layer in enumerate(residual.layers)
        ]
        largest = max(float(gains.abs().max()) for gains in self.ours("exact"))
        self.layers = [
            layer._replace(coefficients=layer.coefficients * (gain / largest))
            for layer in self.layers
        ]

    @property
    def shape(self) -> dict[str, int]:
        n_neurons, hidden = self.layers[0].values.shape
        sizes = {"layers": len(self.layers), "neurons": n_neurons, "hidden": hidden}
        return {"sentences": len(self.scale), **sizes, "vocabulary": len(self.unembed)}

    def contestants(self) -> dict[str, Callable[[], list[Tensor]]]:
        return {
            **{name: partial(self.theirs, name) for name in PEERS},
            "exact": lambda: self.ours("exact"),
            "certified": lambda: self.ours("certified"),
            f"top {self.top}": self.best,
        }

    def ours(self, mode: str) -> list[Tensor]:
        shared = (self.unembed, self.scale, self.targets)
        found = [
            ops.logprob_gain(layer.x, layer.values, layer.coefficients, *shared, mode=mode)
            for layer in self.layers
        ]
        return [gains for gains in found if isinstance(gains, Tensor)]

    def best(self) -> list[Tensor]:
        found = ops.logprob_gain_top(
            self.layers, self.unembed, self.scale, self.targets, top=self.top
        )
        return [found.gain, found.layer * len(self.layers[0].values) + found.index]

    def theirs(self, name: str) -> list[Tensor]:
        shared = (self.unembed, self.scale, self.targets)
        peer = PEERS[name]
        return [peer(layer.x, layer.values, layer.coefficients, *shared) for layer in self.layers]

    def check(self, name: str, found: list[Tensor], wanted: list[Tensor]) -> None:
        """Raise where a contestant's gains are not the exact ones."""
        truth = torch.cat(wanted, 1)
        if name.startswith("top"):
            best = truth.topk(self.top, 1).values
            # A plain float32 gain may be off by this, and so may its place in the list.
            wrong = float((found[0] - best).abs().max())
            wrong = max(wrong, float((truth.gather(1, found[1]) - found[0]).abs().max()))
        else:
            wrong = float((torch.cat(found, 1) - truth).abs().max())
        if not wrong <= 1.5e-5:
            raise AssertionError(f"{name}: gains differ by {wrong:.2g}")
        print(f"{name}: gains within {wrong:.1g} of plain")


class Interventions:
    """Sentences, each with ten neurons of its own off."""

    def __init__(self, model: Any, n: int) -> None:
        self.residual = read_residual_model(model)
        self.ids = make_sentences(n, self.residual.vocabulary)
        self.targets = [line[0] for line in self.ids]
        total = len(self.residual.layers) * self.residual.width
        generator = torch.Generator().manual_seed(1)
        self.places = torch.randint(total, (n, 10), generator=generator).tolist()

    def contestants(self) -> dict[str, Callable[[], list[float]]]:
        return {"one at a time": self.apart, "together": self.together}

    def together(self) -> list[float]:
        sets = [off(places) for places in self.places]
        found = intervene(self.residual, self.ids, self.targets, [sets], batch_tokens=2048)
        logprobs: list[float] = found.logprob[0].tolist()
        return logprobs

    def apart(self) -> list[float]:
        model, width, logprobs = self.residual.model, self.residual.width, []
        for ids, target, places in zip(self.ids, self.targets, self.places, strict=True):
            saved = []
            for place in places:
                weight = self.residual.layers[place // width].down.weight
                saved.append((weight, place % width, weight[:, place % width].clone()))
                weight[:, place % width] = 0
            logits = model(torch.tensor([ids]), logits_to_keep=1, use_cache=False).logits[0, -1]
            logprobs.append(float(logits.log_softmax(0)[target]))
            for weight, column, old in reversed(saved):
                weight[:, column] = old
        return logprobs


def peak_rise(run: Callable[[], object]) -> int:
    """By how many bytes this process's peak memory rises during `run`, as Linux tells it."""
    ctypes.CDLL(None).malloc_trim(0)
    before = forget_peak()
    run()
    return (peak_bytes() or 0) - before


def peak_rises(
    names: Iterable[str], arguments: Sequence[str], module: str = "bench.attribution"
) -> dict[str, int | None]:
    """`peak_rise` of each contestant in a process of its own; None where the system is another."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(names)
    command = [sys.executable, "-m", module, *arguments, "--memory"]
    return {name: int(subprocess.check_output([*command, name])) for name in names}


def race(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in alternating rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sentences", type=int, default=32)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=2048)
    add("--hidden", type=int, default=256)
    add("--vocabulary", type=int, default=32000)
    add("--gain", type=float, default=0.5, help="largest gain, in nats")
    add("--top", type=int, default=300)
    add("--interventions", type=int, default=200, help="sentences")
    add("--rounds", type=int, default=3)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    add("--memory", metavar="CONTESTANT", help="print its peak memory in bytes, and nothing else")
    arguments = sys.argv[1:] if arguments is None else arguments
    o = parser.parse_args(arguments)
    model = make_model(o.vocabulary, o.hidden, o.width, o.layers)
    with torch.no_grad():
        runner = Race(model, o.sentences, o.gain, o.top)
        contestants = runner.contestants()
        if o.memory is not None:
            print(peak_rise(contestants[o.memory]))
            return 0
        memory = peak_rises(contestants, arguments)
        wanted: list[Tensor] = []
        for name, run in contestants.items():  # warms up, too
            found = run()
            wanted = wanted or found
            runner.check(name, found, wanted)
        seconds = race(contestants, o.rounds)
        answers = Interventions(model, o.interventions)
        pairs = answers.contestants()
        first, second = (run() for run in pairs.values())
        wrong = max(abs(a - b) for a, b in zip(first, second, strict=True))
        if not wrong <= 1e-5:
            raise AssertionError(f"answers together differ by {wrong:.2g}")
        print(f"together: log-probabilities within {wrong:.1g} of one at a time")
        apart = race(pairs, 3 * o.rounds)
    rows = []
    for name, times in seconds.items():
        ratios = [t / plain for t, plain in zip(seconds["plain"], times, strict=True)]
        rise = memory[name]
        row = {"contestant": name, "median_s": round(median(times), 4)}
        row |= {"plain_over_it": round(median(ratios), 2), "peak_mb": rise and round(rise / 1e6, 1)}
        rows.append({**row, "gain": o.gain, **runner.shape, **where("cpu")})
        print(f"{name:<18} {median(times):8.3f} s  {median(ratios):6.1f}  {rise or 0:>14,} bytes")
    for name, times in apart.items():
        ratios = [t / one for t, one in zip(apart["one at a time"], times, strict=True)]
        row = {"contestant": f"interventions {name}", "median_s": round(median(times), 4)}
        row |= {"plain_over_it": round(median(ratios), 2), "peak_mb": None, "gain": None}
        rows.append({**row, **runner.shape, "sentences": o.interventions, **where("cpu")})
        print(f"{name:<18} {median(times):8.3f} s  {median(ratios):6.1f}")
    add_rows(o.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
