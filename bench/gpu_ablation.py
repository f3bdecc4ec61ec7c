"""The section of `bench.gpu` on ablation: many conditions in one batch of a 7B model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.ablation import ask_apart, ask_together, make_plan
from bench.gpu_model import LLAMA_2_7B, TINY
from bench.gpu_run import Run, check
from relneuron.ablation.conditions import Ablation
from relneuron.artifact.prompts import Prompt
from relneuron.model.ask import Asker
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.questions import Questions

LENGTH = 20  # tokens of a prompt, as those of the method's relations
BATCH_TOKENS = 16384


class Numbers:
    """In place of a tokenizer: a text is its tokens' numbers."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def time_ablation(run: Run) -> None:
    """Twelve sets and the clean model on 600 prompts; one set per prompt on 256 (P9, P10)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = TINY if run.dry else LLAMA_2_7B
    n_prompts, size, n_alone = (6, 20, 2) if run.dry else (600, 3000, 8)
    with torch.device(run.device):
        config = LlamaConfig(**shape)
        dtype = torch.float32 if run.dry else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    asker = Asker(model, Numbers())
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(shape["vocab_size"], (n_prompts, LENGTH), generator=random).tolist()
    prompts = [Prompt(str(i), "", "eva", "en", "", "", "", "") for i in range(n_prompts)]
    questions = Questions(prompts, ids, [row[0] for row in ids])
    plan = make_plan(model_shape(find_mlps(model)), 12, size, n_prompts)
    few = Questions(prompts[:n_alone], ids[:n_alone], questions.answers[:n_alone])
    few_plan = [Ablation(a.condition, a.places, range(n_alone)) for a in plan]

    ask_together(asker, few_plan, few, BATCH_TOKENS)  # compiles the kernels
    seconds, found = _timed(run, lambda: ask_together(asker, plan, questions, BATCH_TOKENS))
    loop, alone = _timed(run, lambda: ask_apart(asker, few_plan, few, 0))
    n_rows = len(plan) * n_prompts
    loop *= n_rows / (len(plan) * n_alone)
    same = sum(
        a == b
        for ours, one in zip(found, alone, strict=True)
        for a, b in zip(ours, one, strict=False)
    )
    run.json["model"]["ablation"] = {
        "answers": n_rows,
        "seconds": seconds,
        "loop_seconds": loop,
        "loop_measured_on": len(plan) * n_alone,
        "same_predictions": same,
    }
    # Half precision rounds otherwise in another batch, so near ties may fall to another token.
    check(
        run,
        "predictions of the batch are mostly those of prompts alone",
        same >= 0.8 * len(plan) * n_alone,
    )
    run.reached("P9a", seconds, f"({n_rows} answers)")
    run.reached("P9b", loop / seconds, f"(the loop on {len(plan) * n_alone} of them)")

    n_own = 4 if run.dry else 256
    own = make_plan(model_shape(find_mlps(model)), n_own, size // 10, n_prompts)[1:]
    own = [Ablation(a.condition, a.places, [i]) for i, a in enumerate(own)]
    texts = Questions(prompts[:n_own], ids[:n_own], questions.answers[:n_own])
    together, _ = _timed(run, lambda: ask_together(asker, own, texts, BATCH_TOKENS))

    def one_by_one() -> None:
        for i, ablation in enumerate(own[:32]):
            single = Questions(prompts[i : i + 1], ids[i : i + 1], questions.answers[i : i + 1])
            ask_together(
                asker, [Ablation(ablation.condition, ablation.places, [0])], single, BATCH_TOKENS
            )

    apart, _ = _timed(run, one_by_one)
    apart *= n_own / min(32, n_own)
    run.reached("P10", apart / together, f"({n_own} prompts, each with its own set)")


def _timed(run: Run, work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if run.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
