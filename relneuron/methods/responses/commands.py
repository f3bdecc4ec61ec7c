"""The command `record`, and what `identify` does with what it recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from relneuron.artifact.files import RelneuronError, require
from relneuron.artifact.memory import peak_bytes
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import Argument, LoadOptions, Model, Output
from relneuron.methods.responses.options import AtOnceOptions, RankOptions, RecordOptions


def record(
    model: Model,
    prompts: Annotated[
        Path,
        Argument("PROMPTS", "A prompts.jsonl; or concept files, as `prompts` takes them."),
    ],
    output: Output,
    options: RecordOptions,
    at_once: AtOnceOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """One instrumented pass: validated.csv and responses.safetensors.

    Examples:
      relneuron record Qwen/Qwen3-0.6B study/prompts.jsonl -o study
      relneuron record Qwen/Qwen3-0.6B study/prompts.jsonl -o last-token \\
          --pooling last
      # ranked at once: neurons.json, and no responses on the disk
      relneuron record Qwen/Qwen3-0.6B study/prompts.jsonl -o study \\
          --identify --top 500
    """
    from relneuron.methods.responses.at_once import identify_at_once
    from relneuron.methods.responses.record import record as record_stage
    from relneuron.model.load import load
    from relneuron.texts.prompts import concepts_beside

    check_whole(options, at_once)
    prompts = concepts_beside(prompts, output, force=force)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    loaded, tokenizer = load(model, load_options)
    given = model, loaded, tokenizer, prompts, output, options
    how: dict[str, Any] = {"backend": load_options.backend, "force": force, "quiet": quiet}
    if at_once.identify:
        chosen = identify_at_once(*given, at_once, **how)
        yield from chosen_lines(chosen)
        return
    accuracy = record_stage(*given, **how)
    said = "sentences read, nothing asked"
    if accuracy is not None:
        said = f"{accuracy:.1%} of the prompts answered correctly"
    yield f"{said} -> {output}"


def check_whole(options: RecordOptions, at_once: AtOnceOptions) -> None:
    """Refuse to rank by a part of the prompts."""
    if at_once.identify and options.shard != (1, 1):
        cause = "--identify ranks by all prompts, and a --shard has a part of them"
        raise RelneuronError(cause, "leave out one of them", 2)


def rank(
    folder: Path, output: Path, options: RankOptions, *, method: str, force: bool, quiet: bool
) -> Iterator[str]:
    """`identify --method ap`."""
    from relneuron.methods.responses.rank import identify

    yield from chosen_lines(identify(folder, output, options, force=force, quiet=quiet))


def chosen_lines(chosen: NeuronFile) -> Iterator[str]:
    """One line a relation on its neurons and the cut; what --fdr can resolve; the peak memory."""
    resolution = 1
    for relation, found in chosen.selection.items():
        resolution = max(resolution, found.get("fdr_resolution", 1))
        if "reason" in found:
            yield f"{relation}: no neurons, {found['reason']}"
            continue
        parts = [(found, "<=" if found.get("ends") == "bottom" else ">=")]
        parts += [(found["lowest"], "<=")] if "lowest" in found else []
        n_rest = len(chosen.sets[relation]) - found.get("lowest", {}).get("neurons", 0)
        for cut, sign in parts:
            q = f", q <= {cut['q_at_cut']:.2g}" if "q_at_cut" in cut else ""
            yield (
                f"{relation}: {cut.get('neurons', n_rest)} neurons, AP {sign} "
                f"{cut['score_at_cut']:.4f}{q}, {cut['ties_chosen']} of {cut['ties_at_cut']} "
                f"tied at the cut chosen, {cut['perfect']} with AP = 1"
            )
    if resolution > 1:
        yield (
            f"with so few columns of noise, --fdr finds {resolution} or more neurons of a "
            "relation, or none: a larger --noise resolves smaller sets"
        )
    peak = peak_bytes()
    if peak is not None:
        yield f"peak memory: {peak / 2**20:,.0f} MiB"
