"""Two models compared on the same tokens: memory and time beside the bare forwards and a cache.

    PYTHONPATH=. python -m bench.contrast [--tokens N] [--rounds N] [-o FILE.csv]

A is a Llama of random weights; B the same moved a little, or A with an (IA)3 or LoRA adapter. The
prompts are equally long, and their own tokens are compared.

Memory: how much further a process's peak rises in a whole contrast, of one batch and of all
prompts, each in a process of its own with the models loaded. `cached_mb` is what both models'
activations take that the authors of arXiv 2406.14144 keep, in float32.

Time, in alternating rounds on the same batches: the bare forwards of both models without lm_head
(of an adapter peft's own); relneuron; and a cache: hooks keep what the down maps read, and S is
taken at the end. All that find S must find the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.counting import make_model
from bench.ranking import forget_peak
from bench.rows import add_rows
from relneuron.artifact.memory import peak_bytes
from relneuron.bench.machine import where
from relneuron.methods.contrast.contrast import contrast
from relneuron.methods.contrast.counter import PairCounter
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.adapters import load_adapter
from relneuron.model.pair import Pair, Rows, pair_of
from relneuron.testing import assert_accurate

KINDS = ("models", "ia3", "lora")
VOCABULARY, PROMPT = 4096, 200  # tokens of a prompt


class Numbers:
    """A tokenizer of texts such as "5 17 3"."""

    bos_token_id = eos_token_id = chat_template = None

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        lines = [texts] if isinstance(texts, str) else texts
        ids = [[int(word) for word in line.split() if word.isdigit()] for line in lines]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(VOCABULARY)}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return list(map(str, ids))


def moved(model: Any) -> Any:
    """The model with all its weights moved a little."""
    other = deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * 1e-3)
    return other


def save_adapter(kind: str, model: Any, folder: Path) -> None:
    """A folder of an adapter of drawn numbers."""
    from peft import IA3Config, LoraConfig, get_peft_model

    maps = ["k_proj", "v_proj", "down_proj"]
    config: Any = IA3Config(target_modules=maps, feedforward_modules=["down_proj"])
    if kind == "lora":
        maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(target_modules=maps, r=8)
    peft = get_peft_model(deepcopy(model), config)
    with torch.no_grad():
        for weight in (p for p in peft.parameters() if p.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.02)
    peft.save_pretrained(str(folder))


def make_pair(kind: str, sizes: argparse.Namespace, folder: Path) -> tuple[Pair, Any, Any]:
    """The pair, and A and B as two plain models."""
    a = make_model(VOCABULARY, sizes.hidden, sizes.width, sizes.layers, 2 * PROMPT)
    if kind == "models":
        b = moved(a)
        return pair_of(a, b, Numbers()), a, b
    from peft import PeftModel

    save_adapter(kind, a, folder)
    plain, b = deepcopy(a), PeftModel.from_pretrained(deepcopy(a), folder).eval()
    one = pair_of(a, a, Numbers())
    adapter = load_adapter(a, str(folder))
    return Pair(a, a, one.tokenizer, one.mlps, adapter, one.described), plain, b


def write_prompts(path: Path, n_tokens: int) -> None:
    draw = np.random.default_rng(0)
    lines = [
        {"prompt": " ".join(map(str, draw.integers(3, VOCABULARY, PROMPT)))}
        for _ in range(n_tokens // PROMPT)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- memory ----------------------------------------------------------------------------------


def rise(kind: str, sizes: argparse.Namespace, n_tokens: int) -> float:
    """MB that the peak of this process rises by in a contrast of so many tokens.

    The plain models stay, too, so that nothing that they leave free hides it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair, *kept = make_pair(kind, sizes, folder / "adapter")
        write_prompts(folder / "p.jsonl", n_tokens)
        before = forget_peak()
        options = ContrastOptions(tokens="prompt", batch_tokens=sizes.batch_tokens)
        contrast(pair, folder / "p.jsonl", folder / "o", options, quiet=True)
        assert len(kept) == 2, "both are still there"
        return ((peak_bytes() or 0) - before) / 1e6


def rise_elsewhere(kind: str, arguments: Sequence[str], n_tokens: int) -> float:
    """Likewise of a process of its own."""
    words = [sys.executable, "-m", "bench.contrast", *arguments, "--rise", kind, str(n_tokens)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


# --- time ------------------------------------------------------------------------------------


def batches(sizes: argparse.Namespace) -> list[Rows]:
    draw = torch.Generator().manual_seed(0)
    n_rows = sizes.batch_tokens // PROMPT
    found = []
    for _ in range(max(1, sizes.timed // sizes.batch_tokens)):
        ids = torch.randint(3, VOCABULARY, (n_rows, PROMPT), generator=draw)
        found.append((ids, torch.ones_like(ids), torch.arange(PROMPT).expand_as(ids)))
    return found


def forward(model: Any, rows: Rows) -> None:
    """Without the lm_head, as relneuron runs it; of peft's model what it wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask, positions = rows
    with torch.no_grad():
        inner.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


def cached(models: Sequence[Any], given: Sequence[Rows]) -> Tensor:
    """S (L, F) float64 of activations that are all kept, in float32."""
    kept: list[dict[str, list[Tensor]]] = [{}, {}]
    for model, own in zip(models, kept, strict=True):
        maps = {
            n: getattr(m, "base_layer", m)
            for n, m in model.named_modules()
            if n.endswith("mlp.down_proj")
        }
        handles = [
            module.register_forward_pre_hook(
                lambda _, x, own=own, name=name: own.setdefault(name, []).append(
                    x[0].reshape(-1, x[0].shape[-1]).float().clone()
                )
            )
            for name, module in maps.items()
        ]
        for rows in given:
            forward(model, rows)
        for handle in handles:
            handle.remove()
    pairs = zip(*(own.values() for own in kept), strict=True)
    return torch.stack([(torch.cat(a) - torch.cat(b)).double().square().mean(0) for a, b in pairs])


def contestants(
    pair: Pair, models: Sequence[Any], given: Sequence[Rows]
) -> dict[str, Callable[[], Tensor | None]]:
    counter = PairCounter(pair, 1)
    groups = torch.zeros(given[0][0].shape, dtype=torch.int32)

    def bare() -> None:
        for rows in given:
            for model in models:
                forward(model, rows)

    def ours() -> Tensor:
        counter.clear()
        for rows in given:
            counter.count(rows, groups)
        return torch.from_numpy(counter.result(["all"]).rms() ** 2)

    return {"bare forwards": bare, "relneuron": ours, "cache": lambda: cached(models, given)}


def race(pair: Pair, models: Sequence[Any], given: Sequence[Rows], rounds: int) -> dict[str, Any]:
    """Seconds of each contestant in alternating rounds; another S than that of the cache raises."""
    runs = contestants(pair, models, given)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        found: dict[str, Tensor] = {}
        for name, run in runs.items():
            began = time.perf_counter()
            made = run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            if made is not None:
                found[name] = made.sqrt()
        ours, truth = found["relneuron"].float(), found["cache"]
        # Of twice the rows a product of an adapter's model is rounded in another way.
        scale = truth + truth.square().mean().sqrt() * (len(truth) if pair.adapter else 1)
        assert_accurate(ours, truth, truth.float(), scale)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=40_000, help="of the memory")
    add("--timed", type=int, default=8000, help="tokens of the race")
    add("--batch-tokens", type=int, default=8000)
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=512)
    add("--width", type=int, default=1376)
    add("--kinds", nargs="*", default=KINDS, choices=KINDS)
    add("--rounds", type=int, default=3)
    add("--rise", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    o = parser.parse_args(words)
    warnings.simplefilter("ignore", FutureWarning)  # of peft
    if o.rise:
        print(rise(o.rise[0], o, int(o.rise[1])))
        return 0
    sizes = {"batch_tokens": o.batch_tokens}
    sizes |= {"layers": o.layers, "width": o.width, "hidden": o.hidden}
    given = [word for key, value in sizes.items() for word in (f"--{key}".replace("_", "-"), value)]
    for kind in o.kinds:
        rows = []
        with tempfile.TemporaryDirectory() as name:
            pair, *models = make_pair(kind, o, Path(name) / "adapter")
            seconds = race(pair, models, batches(o), o.rounds)
        one, whole = (
            rise_elsewhere(kind, list(map(str, given)), n) for n in (o.batch_tokens, o.tokens)
        )
        for contestant, times in seconds.items():
            bare = seconds["bare forwards"]
            ratio = median(t / b for t, b in zip(times, bare, strict=True))
            row: dict[str, Any] = {"pair": kind, "contestant": contestant}
            row |= {"median_s": round(median(times), 4), "ratio": round(ratio, 4)}
            row |= {"timed_tokens": o.timed, "tokens": o.tokens}
            is_ours = contestant == "relneuron"
            row |= {"batch_peak_mb": round(one, 1) if is_ours else None}
            row |= {"peak_mb": round(whole, 1) if is_ours else None}
            row |= {"cached_mb": round(2 * o.tokens * o.layers * o.width * 4 / 1e6, 1)}
            rows.append({**row, **sizes, **where("cpu")})
            print(*(row[key] for key in ("pair", "contestant", "median_s", "ratio")), flush=True)
        print(
            f"{kind}: the peak rises by {one:.0f} MB for one batch of {o.batch_tokens} tokens and "
            f"by {whole:.0f} MB for {o.tokens}; a cache would take {row['cached_mb']:.0f} MB",
            flush=True,
        )
        add_rows(o.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
