"""The commands `contrast`, of two models and prompts, and `probe`, of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from relneuron.artifact.contrast import NAME
from relneuron.artifact.files import check_folder
from relneuron.artifact.options import Argument, LoadOptions, Model, Output
from relneuron.artifact.stage import Printed
from relneuron.methods.contrast.options import ContrastOptions, ProbeOptions


def contrast(
    model_a: Annotated[
        str,
        Argument("MODEL_A", "Model folder or hub name: the one to be patched, before training."),
    ],
    model_b: Annotated[
        str,
        Argument("MODEL_B", "Likewise, what it became; or the folder of a LoRA or (IA)3 adapter."),
    ],
    prompts: Annotated[
        Path,
        Argument("PROMPTS", "A prompts.jsonl, with a group to each line, or a .txt."),
    ],
    output: Output,
    options: ContrastOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """How far two models' neurons are apart on the same tokens: contrast.safetensors.

    One writes a completion of every prompt, both read it, and what every neuron gives is compared
    (arXiv 2406.14144). Goes on where it stopped. Under torchrun several processes share the
    prompts, each with both models.

    Examples:
      relneuron contrast Qwen/Qwen3-0.6B-Base Qwen/Qwen3-0.6B prompts.txt -o two
      relneuron contrast Qwen/Qwen3-0.6B my-adapter prompts.txt -o two-lora \\
          --tokens prompt
    """
    from relneuron.artifact.prompts import read_questions
    from relneuron.methods.contrast.contrast import contrast as contrast_stage
    from relneuron.model.pair import load_pair

    check_folder(output)
    # What is wrong with them is said before the models are loaded.
    read_questions(prompts, options.template)
    pair = load_pair(model_a, model_b, load_options)
    made = contrast_stage(
        pair,
        prompts,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    if made is None:
        yield f"{output} holds this contrast already"
        return
    found = made.contrast
    for name, n in zip(found.groups, found.tokens.tolist(), strict=True):
        yield f"{name}: {n:,} tokens compared"
    if found.tokens.any():  # a shard may have no prompt
        rms = found.rms()
        layer, index = divmod(int(rms.argmax()), rms.shape[1])
        most = f"{rms.max():.4g} of neuron {index} in layer {layer}"
        yield f"largest change: {most} (root mean square)"
    per_s = made.tokens / max(made.seconds, 1e-9)
    yield f"contrast: {made.seconds:.1f} s, {per_s:,.0f} tokens/s by each model"
    yield f"-> {output / NAME}"


def probe(
    model: Model,
    prompts: Annotated[Path, Argument("PROMPTS", "A prompts.jsonl, or a .txt of prompts.")],
    output: Output,
    options: ProbeOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """What neurons tell at the prompt's last token: a logistic regression of labels, probe.csv.

    Examples:
      relneuron probe Qwen/Qwen3-0.6B study/prompts.jsonl -o probe \\
          --neurons two/neurons.json --labels two/effect.costs.csv:cost
      relneuron probe Qwen/Qwen3-0.6B new.txt -o applied \\
          --apply probe/probe.safetensors
    """
    from relneuron.artifact.prompts import read_questions
    from relneuron.methods.contrast.probe import probe as probe_stage
    from relneuron.model.load import load

    check_folder(output)
    read_questions(prompts, options.template)
    loaded, tokenizer = load(model, load_options)
    rows = probe_stage(
        model,
        loaded,
        tokenizer,
        prompts,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    shown = []
    for row in rows:
        within = "" if row.low is None else f"[{row.low:.1%}, {row.high:.1%}]"
        within += "" if row.sd_sets is None else f"±{row.sd_sets:.1%}"
        shown.append([row.neurons, f"{row.accuracy:.1%}", within, f"{row.chance:.1%}"])
    if shown:
        yield Printed(("neurons", "accuracy", "", "chance"), shown)
    yield f"-> {output}"
