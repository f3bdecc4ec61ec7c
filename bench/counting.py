"""Counting a corpus against the bare forward of the same batches, and against hooks.

    PYTHONPATH=. python -m bench.counting [--tokens N] [--rounds N] [-o FILE.csv]

A Llama of random weights (`--layers`, `--hidden`, `--width`) reads windows of five groups in
alternating rounds of one run:

- `bare forward`: the model without its lm_head, nothing counted: the least that a pass over the
  corpus can cost; `with the lm_head` is the whole forward that a plain loop makes;
- `relneuron`: `Counter` of `relneuron count`, rows of all groups in one batch; `with examples` and
  `with histograms` also keep what `count --examples 16` and `--histogram 64` do;
- `hooks`: what the LAPE authors' code does per layer, written for this library: SiLU, a comparison
  in float32, a sum, one group's windows a batch; here without the lm_head, too.

All must give the same counters, or the run ends. `--documents` pads windows of different lengths;
`--experts N` is a mixture of N experts of `--width`, two a token, whose neurons no hook sees.
Then the stage itself counts text files, and says how much of its time it waited for tokens and what
a checkpoint costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench.rows import add_rows
from relneuron.bench.machine import where
from relneuron.demo import CHECKPOINT
from relneuron.methods.counts.batches import Batch, make_batch
from relneuron.methods.counts.count import count
from relneuron.methods.counts.counter import Counter
from relneuron.model.checkpoint import Checkpoint, Position, write_checkpoint
from relneuron.model.load import load_tokenizer
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.passes import plan_pool
from relneuron.model.peaks import Asked
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import parse_sources
from relneuron.texts.windows import Window

GROUPS = ("en", "zh", "fr", "es", "vi")
EVERY_S = 30.0  # between two checkpoints of `relneuron count`


def make_model(
    vocabulary: int, hidden: int, width: int, layers: int, context: int, experts: int = 0
) -> Any:
    """A Llama of random weights, or with experts a Qwen3-MoE."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": context,
    }
    config: Any = LlamaConfig(**sizes)
    if experts:
        own = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": width}
        config = Qwen3MoeConfig(**sizes, **own, head_dim=hidden // 4)
    return AutoModelForCausalLM.from_config(config).eval()


def make_batches(
    n_tokens: int, window: int, batch_tokens: int, vocabulary: int, *, documents: bool, mixed: bool
) -> list[Batch]:
    """Windows of the groups in turn; `mixed` batches hold several groups, others one."""
    random = np.random.default_rng(0)
    windows = []
    for i in range(n_tokens // window):
        length = int(random.integers(window // 8, window + 1)) if documents else window
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        windows.append(Window(i % len(GROUPS), ids, np.zeros(length, bool), i // len(GROUPS)))
    parts = [windows]
    if not mixed:
        parts = [[w for w in windows if w.group == group] for group in range(len(GROUPS))]
    return [
        make_batch([part[i] for i in members])
        for part in parts
        for members in plan_pool([len(w.ids) for w in part], [w.group for w in part], batch_tokens)
    ]


@contextmanager
def hooks(model: Any, over_zero: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Counts in (G, L, F) with forward hooks; the caller says which group and tokens come next."""
    now: dict[str, Any] = {}
    handles = []
    for layer, mlp in enumerate(find_mlps(model)):

        def hook(_module: Any, _inputs: Any, gate: Any, layer: int = layer) -> None:
            active = (F.silu(gate).float() > 0) & now["mask"].unsqueeze(-1)
            over_zero[now["group"], layer] += active.sum((0, 1))

        handles.append(mlp.module.gate_proj.register_forward_hook(hook))
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


class Race:
    """The contestants on the same tokens; each returns its counters, or None if it counts none."""

    def __init__(self, model: Any, mixed: list[Batch], apart: list[Batch]) -> None:
        self.model, self.mixed, self.apart = model, mixed, apart
        self.counter = Counter(model, find_mlps(model))
        self.all_of_it = Counter(model, self.counter.mlps)
        self.all_of_it.body = model
        self.keeping = {"with examples": Counter(model, self.counter.mlps, asked=Asked(k=16))}
        if not isinstance(self.counter.mlps[0], Experts):
            spread = Counter(model, self.counter.mlps, asked=Asked(bins=64))
            spread.set_edges(spread.sample(lambda: spread.look_at(mixed[0])))
            self.keeping["with histograms"] = spread
        self.shape = model_shape(self.counter.mlps)

    def contestants(self) -> dict[str, Callable[[], torch.Tensor | None]]:
        found: dict[str, Callable[[], torch.Tensor | None]] = {
            "bare forward": self.bare,
            "relneuron": self.ours,
            **{name: partial(self.ours, counter) for name, counter in self.keeping.items()},
            "with the lm_head": self.whole,
        }
        return found if "experts" in self.shape else found | {"hooks": self.hooked}

    def bare(self) -> None:
        for batch in self.mixed:
            self.counter.run(batch)

    def ours(self, counter: Counter | None = None) -> torch.Tensor:
        counter = counter or self.counter
        counter.clear()
        counter.grow(len(GROUPS))
        with counter:
            for batch in self.mixed:
                counter.count(batch)
        return torch.from_numpy(counter.result(GROUPS).arrays["count.act"])

    def whole(self) -> None:
        for batch in self.mixed:
            self.all_of_it.run(batch)

    def hooked(self) -> torch.Tensor:
        n, width = len(GROUPS), self.shape["width"]
        device = self.counter.device
        counts = torch.zeros(n, self.shape["layers"], width, dtype=torch.int64, device=device)
        with hooks(self.model, counts) as now:
            for batch in self.apart:
                now["group"] = int(batch.group_ids.max())
                now["mask"] = torch.from_numpy(batch.group_ids >= 0).to(device)
                self.counter.run(batch)
        return counts.cpu()


def race(race: Race, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in alternating rounds; other counters than ours raise."""
    seconds: dict[str, list[float]] = {name: [] for name in race.contestants()}
    wanted = None
    for number in range(rounds + 1):
        for name, run in race.contestants().items():
            began = time.perf_counter()
            found = run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            if found is None:
                continue
            wanted = found if wanted is None else wanted
            # The rows of a matrix product may be rounded in another way in another batch.
            n_other = int((found - wanted).abs().sum())
            if n_other > 1e-6 * int(wanted.sum()):
                raise AssertionError(f"{name} counts otherwise than relneuron: {n_other} hits")
            if n_other and not number:
                print(f"{name}: {n_other} hits of {int(wanted.sum()):,} differ")
    return seconds


def time_stage(model: Any, n_tokens: int, window: int) -> dict[str, float]:
    """`count` on text files: the shares of its time (of its tokens' time) that are not counting.

    And the whole of it with `--examples 16` by that without, by turns.
    """
    tokenizer = load_tokenizer(str(CHECKPOINT))
    words = sorted(tokenizer.get_vocab())
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for group in GROUPS:
            n_lines = n_tokens // len(GROUPS) // 20
            lines = (" ".join(random.choice(words, 20)) for _ in range(n_lines))
            (folder / f"{group}.txt").write_text("\n".join(lines), encoding="utf-8")
        sources = parse_sources([f"{group}={folder / group}.txt" for group in GROUPS])
        options = CountOptions(window=window)
        done = count("model", model, tokenizer, sources, folder / "out", options, quiet=True)
        assert done is not None, "a new folder is counted"
        seconds: dict[int | None, list[float]] = {None: [], 16: []}
        for turn in range(3):
            for k, times in seconds.items():
                began = time.perf_counter()
                asked = replace(options, examples=k)
                out = folder / f"{k} {turn}"
                count("model", model, tokenizer, sources, out, asked, quiet=True)
                times.append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(seconds[None], seconds[16], strict=True)]
        began = time.perf_counter()
        write_checkpoint(
            folder / "count.checkpoint", {}, Checkpoint(done.counts, Position(None, 0, 0))
        )
        checkpoint = time.perf_counter() - began
    return {
        "tokens_per_s": done.tokens / done.seconds,
        "waiting": done.waiting / done.seconds,
        "checkpoints": checkpoint / EVERY_S,
        "with examples": median(ratios),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=2**17)
    add("--window", type=int, default=512)
    add("--batch-tokens", type=int, default=8192)
    add("--documents", action="store_true", help="windows of different lengths, padded")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=256)
    add("--width", type=int, default=688)
    add("--experts", type=int, default=0)
    add("--vocabulary", type=int, default=4096)
    add("--rounds", type=int, default=5)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    o = parser.parse_args(arguments)
    model = make_model(o.vocabulary, o.hidden, o.width, o.layers, o.window, o.experts)
    batches = [
        make_batches(
            o.tokens, o.window, o.batch_tokens, o.vocabulary, documents=o.documents, mixed=mixed
        )
        for mixed in (True, False)
    ]
    runner = Race(model, *batches)
    seconds = race(runner, o.rounds)
    n_tokens = sum(batch.n_tokens for batch in batches[0])
    stage = time_stage(model, n_tokens, o.window)
    shape = {"tokens": n_tokens, "window": o.window, "documents": int(o.documents)}
    shape |= {"layers": o.layers, "width": o.width, "hidden": o.hidden}
    shape |= {"experts": o.experts} if o.experts else {}
    rows = []
    for name, times in seconds.items():
        ratios = [t / bare for t, bare in zip(times, seconds["bare forward"], strict=True)]
        row = {"contestant": name, "median_s": round(median(times), 4)}
        row |= {"ratio": round(median(ratios), 4), "tokens_per_s": round(n_tokens / median(times))}
        rows.append({**row, **shape, **where("cpu")})
        print(f"{name:<18} {median(times):8.3f} s  {median(ratios):6.3f} x the bare forward")
    for name, value in stage.items():
        row = {"contestant": f"stage: {name}", "median_s": "", "ratio": round(value, 5)}
        rows.append({**row, "tokens_per_s": "", **shape, **where("cpu")})
    print(
        f"count of text files: {stage['tokens_per_s']:,.0f} tokens/s, waiting for tokens "
        f"{stage['waiting']:.2%}, a checkpoint every {EVERY_S:.0f} s {stage['checkpoints']:.2%}; "
        f"with --examples 16 {stage['with examples']:.3f} x its time"
    )
    add_rows(o.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
