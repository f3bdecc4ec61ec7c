"""The section of `bench.gpu` that runs a whole model: a Llama-2-7B of random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import relneuron
from bench.counting import GROUPS as LANGUAGES
from bench.counting import hooks
from bench.gpu_run import GROUPS, Run, check, reference_stats
from relneuron.bench.case import Contestant
from relneuron.bench.timing import Effort, event_timer, measure, ratio, wall_timer
from relneuron.methods.counts.batches import make_batch
from relneuron.methods.counts.counter import Counter
from relneuron.model.mlps.find import find_mlps
from relneuron.texts.windows import Window

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
TINY = LLAMA_2_7B | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def time_model(run: Run) -> None:
    """A Llama-2-7B of random weights: plain, counting, with neurons off, and compiled."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = TINY if run.dry else LLAMA_2_7B
    n_rows, length = (2, 16) if run.dry else (4, 2048)
    with torch.device(run.device):
        config = LlamaConfig(**shape)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        tokens = torch.randint(0, shape["vocab_size"], (n_rows, length))
        mask = torch.ones_like(tokens)
        groups = torch.arange(n_rows * length).view(n_rows, length) * GROUPS // (n_rows * length)
        chosen = torch.randint(0, shape["intermediate_size"], (3000,)).tolist()
    neurons = [(i % shape["num_hidden_layers"], "gate", f) for i, f in enumerate(chosen)]

    probes: list[Any] = []  # a batch counts once, so each forward gets its own

    def forward(_: int) -> Tensor:
        for probe in probes:
            probe.batch(mask, groups)
        return model(tokens, use_cache=False).logits

    @contextmanager
    def counting() -> Iterator[Any]:
        with relneuron.instrument(model, groups=GROUPS) as probe:
            probes.append(probe)
            try:
                yield probe
            finally:
                probes.clear()

    check_model(run, model, forward, counting, groups)
    contexts: dict[str, Any] = {
        "instrumented": counting,
        "ablated": lambda: relneuron.ablate(model, neurons),
    }
    contestants = [
        _forward_contestant("plain eager", forward),
        *(replace(_forward_contestant(name, forward), around=c) for name, c in contexts.items()),
    ]
    run.json["model"] |= {"shape": shape, "tokens": n_rows * length, "peak_bytes": {}}
    if run.device != "cpu":
        for contestant in contestants:
            torch.cuda.reset_peak_memory_stats()
            with contestant.around(), torch.no_grad():
                contestant.run(0)
            peak = torch.cuda.max_memory_allocated()
            run.json["model"]["peak_bytes"][contestant.name] = peak
    times = _measure_models(run, contestants, n_rows * length)
    run.reached("P8a", 1 / ratio(times["plain eager"], times["instrumented"]))
    time_corpus(run, model, contestants[0], tokens)
    run.save()

    # Last, since compiling may fail or take long.
    if run.dry or run.left_s() < 150:
        run.json["goals"]["P8b"]["note"] = f"not measured: {run.left_s():.0f} s were left"
        return
    compiled = torch.compile(model, dynamic=False)
    plain = _forward_contestant(
        "plain compiled", lambda _: compiled(tokens, use_cache=False).logits
    )
    with torch.no_grad():
        plain.run(0)
    times = _measure_models(run, [contestants[0], plain, contestants[1]], n_rows * length)
    run.reached("P8b", 1 / ratio(times["plain compiled"], times["instrumented"]))


def time_corpus(run: Run, model: Any, plain: Contestant, tokens: Tensor) -> None:
    """A batch of `relneuron count`, five groups, against the bare forward and the LAPE hook."""
    n_rows, length = tokens.shape
    batch = make_batch(
        [
            Window(row * len(LANGUAGES) // n_rows, ids, np.zeros(length, bool))
            for row, ids in enumerate(tokens.cpu().numpy().astype(np.int32))
        ]
    )
    counter = Counter(model, find_mlps(model))
    counter.grow(len(LANGUAGES))
    shape = (len(LANGUAGES), len(counter.mlps), counter.mlps[0].width)
    counts = torch.zeros(shape, dtype=torch.int64, device=run.device)

    @contextmanager
    def lape() -> Iterator[None]:
        with hooks(model, counts) as now:
            # One language a batch, as the authors have it.
            now |= {"group": 0, "mask": torch.ones_like(tokens, dtype=torch.bool)}
            yield

    contestants = [
        plain,
        _forward_contestant("no lm_head", lambda _: counter.run(batch)),
        replace(
            _forward_contestant("count", lambda _: counter.count(batch)), around=lambda: counter
        ),
        replace(_forward_contestant("LAPE hook", lambda _: counter.run(batch)), around=lape),
    ]
    times = _measure_models(run, contestants, n_rows * length)
    run.reached("P8c", 1 / ratio(times["plain eager"], times["count"]))
    run.reached("P8d", ratio(times["count"], times["LAPE hook"]))


def _forward_contestant(name: str, forward: Callable[[int], object]) -> Contestant:
    return Contestant(name, "model", forward, lambda: None, 0, 0)


def _measure_models(
    run: Run, contestants: Sequence[Contestant], n_tokens: int
) -> dict[str, list[list[float]]]:
    timer = wall_timer if run.device == "cpu" else event_timer
    with torch.no_grad():
        samples = measure(contestants, timer, Effort(3, 1) if run.dry else Effort(9, 400))
    times = dict(zip([c.name for c in contestants], samples, strict=True))
    speeds = run.json["model"].setdefault("tokens_per_s", {})
    for name, rounds in times.items():
        speeds[name] = round(n_tokens / median(map(median, rounds)) * 1e3)
        print(f"  {name}: {speeds[name]:,} tokens/s")
    return times


def check_model(run: Run, model: Any, forward: Any, counting: Any, groups: Tensor) -> None:
    """Counts of the first layer against the reference on the gates that the plain model makes."""
    first = find_mlps(model)[0]
    seen: list[Tensor] = []
    hook = first.module.gate_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        plain = forward(0)
        hook.remove()
        with counting() as probe:
            counted = forward(0)
    gate = seen[0].reshape(-1, first.width)
    want = reference_stats(gate, gate, groups.reshape(-1).int())
    same = torch.equal(probe.stats[0].count["act"], want.count["act"])
    check(run, "counts of the model's first layer", same)
    tokens = all(int(s.tokens.sum()) == groups.numel() for s in probe.stats)
    check(run, "every layer counts every token", tokens)
    run.json["model"]["largest_logit"] = float(plain.abs().max())
    run.json["model"]["largest_logit_change"] = float((plain - counted).abs().max())
