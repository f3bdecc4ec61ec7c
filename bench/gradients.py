"""Integrated gradients of every neuron: the staircase against the authors' way, in one run.

    PYTHONPATH=. python -m bench.gradients [--tokens N] [--steps N] [--rounds N] [-o FILE.csv]

A Llama of random weights (`--layers`, `--width`, `--hidden`, `--vocabulary`) and prompts of random
tokens. Contestants, in alternating rounds, all in float32 on `--threads` threads:

- `layer by layer`: a forward and a backward for each layer, its steps in one batch, as the authors
  of knowledge neurons and QRNCA run it; written as well as can be: no gradient of a weight, no
  graph below the layer, logits of the last token only, the neurons from one forward for all layers;
- `staircase, one prompt`: ours, one prompt at a time;
- `staircase`: ours, `--prompts` of them in a batch, seconds of one.

All must give the same attributions, to 1e-5 of the largest, or the run ends. With one thread the
seconds are those of the processor, so that other work on the machine does not count; a ratio is
taken within a round. Memory is how far the peak of a process of its own rises, for one prompt, by
each contestant, by `forward`, one forward of as many rows as the staircase has at its top with
the graph that a backward needs, and by the same `without graph`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.attribution import make_model, peak_rise, peak_rises
from bench.rows import add_rows
from relneuron.bench.machine import where
from relneuron.model.gradients.reference import alphas
from relneuron.model.gradients.sites import Sites, acting, frozen, probability, read_sites
from relneuron.model.gradients.staircase import read_staircase

PEER, ONE, MANY = "layer by layer", "staircase, one prompt", "staircase"


class Race:
    """Prompts, and every way to integrate along each layer's neurons."""

    def __init__(self, model: Any, n_prompts: int, n_tokens: int, steps: int) -> None:
        self.model, self.sites = model, read_sites(model)
        self.staircase = read_staircase(self.sites)
        self.points = alphas("inclusive", steps)
        vocabulary = model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (n_prompts, n_tokens)
        self.ids = torch.randint(3, vocabulary, shape, generator=generator).tolist()
        self.targets = [line[0] for line in self.ids]

    def contestants(self) -> dict[str, Callable[[], Tensor]]:
        """What gives (prompts, L, F) each; the peer and `ONE` of the first prompt only."""
        return {
            PEER: lambda: layer_by_layer(self.sites, self.ids[0], self.targets[0], self.points),
            ONE: lambda: self.ours(1),
            MANY: lambda: self.ours(len(self.ids)),
        }

    def ours(self, n: int) -> Tensor:
        return self.staircase.integrate(self.ids[:n], self.targets[:n], self.points).ig

    def rows(self, graph: bool) -> None:
        """One forward of the rows at the staircase's top, with the logits of each."""
        n = len(self.sites.numbers) * len(self.points)
        tokens = torch.zeros(1, n, dtype=torch.int64)
        embedded = self.model.get_input_embeddings()(tokens).detach().requires_grad_(graph)
        with frozen(self.model), torch.set_grad_enabled(graph):
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits
            probability(logits, tokens).sum()


def layer_by_layer(
    sites: Sites, ids: Sequence[int], target: int, points: Sequence[float]
) -> Tensor:
    """(1, L, F) float32, the peer: hooks, a forward and a backward a layer."""
    model, tokens = sites.model, torch.tensor([list(ids)])
    neurons: dict[int, Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for number in sites.numbers:

            def keep(values: Tensor, number: int = number) -> None:
                neurons[number] = values[0, -1].clone()

            part: Any = sites.parts[number]
            stack.enter_context(acting(part, keep))
        model(tokens, logits_to_keep=1, use_cache=False)
    batch = tokens.expand(len(points), -1)
    at = torch.tensor(points)[:, None]
    found = []
    with frozen(model):
        for number in sites.numbers:
            leaf = (at * neurons[number]).requires_grad_()

            def put(values: Tensor, leaf: Tensor = leaf) -> Tensor:
                values = values.clone()
                values[:, -1] = leaf
                return values

            part = sites.parts[number]
            with acting(part, put):
                logits = model(batch, logits_to_keep=1, use_cache=False).logits[:, -1]
            p = probability(logits, torch.full((len(points),), target))
            (slopes,) = torch.autograd.grad(p.sum(), leaf)
            found.append(neurons[number] * slopes.sum(0) / len(points))
    return torch.stack(found)[None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=24)
    add("--steps", type=int, default=20)
    add("--prompts", type=int, default=8)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=2048)
    add("--hidden", type=int, default=512)
    add("--vocabulary", type=int, default=8000)
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=3)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    add("--memory", metavar="CONTESTANT", help="print its peak memory in bytes, and nothing else")
    arguments = sys.argv[1:] if arguments is None else arguments
    o = parser.parse_args(arguments)
    torch.set_num_threads(o.threads)
    model = make_model(o.vocabulary, o.hidden, o.width, o.layers, key_heads=4, positions=512)
    race = Race(model, o.prompts, o.tokens, o.steps)
    contestants = race.contestants()
    every: dict[str, Callable[[], object]] = {
        **{name: contestants[name] for name in (PEER, ONE)},
        "forward": lambda: race.rows(True),
        "forward without graph": lambda: race.rows(False),
    }
    if o.memory is not None:
        print(peak_rise(every[o.memory]))
        return 0
    memory = peak_rises(every, arguments, "bench.gradients")
    wanted = contestants[PEER]()
    for name, run in contestants.items():  # warms up, too
        off = float((run()[:1] - wanted).abs().max() / wanted.abs().max())
        if not off <= 1e-5:
            raise AssertionError(f"{name}: attributions differ by {off:.2g}")
        print(f"{name}: within {off:.1g} of {PEER}")
    clock = time.process_time if o.threads == 1 else time.perf_counter
    n_runs = {PEER: 1, ONE: 5, MANY: 1}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(o.rounds):
        for name, run in contestants.items():
            began = clock()
            for _ in range(n_runs[name]):
                run()
            n = n_runs[name] * (o.prompts if name == MANY else 1)
            seconds[name].append((clock() - began) / n)
    shape = {"prompts": o.prompts, "tokens": o.tokens, "steps": o.steps, "layers": o.layers}
    shape |= {"neurons": o.width, "hidden": o.hidden, "vocabulary": o.vocabulary}
    rows = []
    for name in dict.fromkeys((*contestants, *every)):
        times = seconds.get(name)
        ratios = [a / b for a, b in zip(seconds[PEER], times or [], strict=False)]
        rise = memory.get(name)
        row: dict[str, object] = {"contestant": name}
        row["median_s"] = round(median(times), 4) if times else None
        row["peer_over_it"] = round(median(ratios), 1) if ratios else None
        row["peak_mb"] = rise and round(rise / 1e6, 1)
        rows.append({**row, **shape, **where("cpu")})
        print(*(row[key] for key in ("contestant", "median_s", "peer_over_it", "peak_mb")))
    add_rows(o.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
