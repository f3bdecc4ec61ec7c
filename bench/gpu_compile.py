"""Compiles what `bench.gpu` launches for a GPU that is not here, into a cache that travels.

    PYTHONPATH=. python -m bench.gpu_compile CACHE            # here
    PYTHONPATH=. python -m bench.gpu --cache CACHE --out DIR  # on the machine with the GPU

Triton finds the code again if its version there is the one here (`pip install --no-deps --target
FOLDER triton==...`, FOLDER in front in PYTHONPATH). The sections' own calls are made on CPU
tensors, in the sizes that decide about the code; they go the real way through Triton to a driver
that launches nothing (bench/host.py), so nothing is computed. What is not foreseen here is compiled
there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

import relneuron
from bench import gpu_attribution
from bench.ablation import ask_together, make_plan
from bench.gpu import GOAL_CASE, OTHER_CASES
from bench.gpu_ablation import BATCH_TOKENS, LENGTH, Numbers
from bench.gpu_model import LLAMA_2_7B
from bench.gpu_ranking import ASKED
from bench.gpu_run import GROUPS
from bench.host import Driver
from relneuron import ops
from relneuron.artifact.prompts import Prompt
from relneuron.bench.ranking import draw_labels
from relneuron.bench.suite import CONTESTANTS
from relneuron.model.ask import Asker
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.questions import Questions
from relneuron.ops import backends
from relneuron.ops.average_precision import triton_launch as ranking
from relneuron.ops.logprob_gain import triton_launch as gains
from relneuron.ops.peaks import triton_launch as peaks
from relneuron.ops.swiglu_stats import op as swiglu
from relneuron.ops.swiglu_stats import triton_launch as stats

FEW_COLUMNS = 1024  # of average_precision: their number decides about nothing
# A Llama-2-7B as the kernels see it; what they do not see is small.
NARROW = LLAMA_2_7B | {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def install(capability: int) -> None:
    """A GPU of that capability which launches nothing, for CPU tensors and every backend."""
    active = Driver(capability)
    driver.set_active(active)

    def load(compiled: Any) -> None:
        compiled.function, compiled._run = object(), active.launch

    CompiledKernel._init_handles = load
    tables: tuple[tuple[Any, Any], ...] = (
        (stats, stats.LAUNCH_TABLE.get(divmod(capability, 10), stats.DEFAULT_LAUNCH)),
        (ranking, ranking.NVIDIA_LAUNCH),
        (peaks, peaks.NVIDIA_LAUNCH),
        (gains, gains.LAUNCH_TABLE.get(divmod(capability, 10), gains.DEFAULT_LAUNCH)),
    )
    for module, config in tables:
        module.IS_INTERPRETED, module.INTERPRETER_LAUNCH = True, config
    plan: Any = stats.plan
    stats.plan = lambda call, config, **_: plan(call, config, is_nvidia=True)  # type: ignore[assignment]
    backends.MADE_FOR["cpu"] = "triton"
    swiglu.ran_quickly = lambda *_: False  # type: ignore[assignment]
    gains.tiles._multiply = lambda values, unembed, out: out.zero_()
    gains.tiles.sample_is_right = lambda *_: torch.tensor(True)


def kernels() -> None:
    """What `relneuron bench` times of swiglu_stats, all cases."""
    references = swiglu.swiglu_stats_reference
    swiglu.swiglu_stats_reference = lambda call: None
    with torch.no_grad():
        for case in (GOAL_CASE, *OTHER_CASES):
            for contestant in CONTESTANTS[case.op](case, "cpu", 1, False):
                if contestant.name == "relneuron":
                    contestant.run(0)
    swiglu.swiglu_stats_reference = references


def average_precision() -> None:
    for n_prompts, n_relations, _ in ASKED:
        values = torch.zeros(n_prompts, FEW_COLUMNS)
        ops.average_precision(values, draw_labels(n_prompts, n_relations), backend="triton")


def attribution() -> None:
    sizes = gpu_attribution.LLAMA_2_7B
    sizes = replace(sizes, neurons=512, hidden=16, layers=1)
    for n_examples in (sizes.examples, 2 * sizes.examples):
        inputs = gpu_attribution.Inputs(sizes, n_examples, "cpu", torch.bfloat16)
        inputs.backend = "triton"
        for mode in ("exact", "certified"):
            inputs.gains(mode)
        inputs.top()
        p = inputs.logits(0).softmax(1)
        gains.moment_sums(inputs.layers[0].values, inputs.unembed, p)


def model() -> None:
    """A forward that counts, one with neurons off, and the batches of the ablation."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**NARROW)
    llama: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    llama.generation_config.eos_token_id = None
    tokens = torch.zeros(4, 2048, dtype=torch.int64)
    with torch.no_grad():
        with relneuron.instrument(llama, groups=GROUPS) as probe:
            probe.batch(torch.ones_like(tokens), torch.zeros_like(tokens))
            llama(tokens, use_cache=False)
        with relneuron.ablate(llama, [(0, "gate", 1)]):
            llama(tokens, use_cache=False)
    shape = model_shape(find_mlps(llama))
    for n_prompts in (1, BATCH_TOKENS // LENGTH):
        ids = [[1] * LENGTH] * n_prompts
        prompts = [Prompt(str(i), "", "eva", "en", "", "", "", "") for i in range(n_prompts)]
        questions = Questions(prompts, ids, [row[0] for row in ids])
        plan = make_plan(shape, 2, 20, n_prompts)
        ask_together(Asker(llama, Numbers()), plan, questions, BATCH_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_compile", description=__doc__)
    parser.add_argument("cache", type=Path, help="folder of the cache")
    parser.add_argument("--capability", type=int, default=90, help="90 for H100 and H200")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    install(options.capability)
    sections: tuple[Callable[[], None], ...] = (kernels, average_precision, attribution, model)
    for section in sections:
        begun = time.perf_counter()
        section()
        print(f"{section.__name__}: {time.perf_counter() - begun:.1f} s", flush=True)
    files = [path for path in options.cache.rglob("*") if path.is_file()]
    n_kernels = sum(path.suffix == ".cubin" for path in files)
    n_bytes = sum(path.stat().st_size for path in files)
    print(f"{n_kernels} kernels of Triton {triton.__version__}, {n_bytes >> 20} MiB")


if __name__ == "__main__":
    main()
