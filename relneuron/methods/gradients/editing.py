"""The command `edit`: what it takes, and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from relneuron.artifact.options import (
    LoadOptions,
    Model,
    Neurons,
    Only,
    OomOptions,
    Output,
    Prompts,
    option,
)
from relneuron.artifact.stage import Printed

MEASURES = "edit.csv"
COLUMNS = (
    "measure",
    "n",
    "before",
    "before_low",
    "before_high",
    "after",
    "after_low",
    "after_high",
)


@dataclass(frozen=True)
class EditOptions(OomOptions):
    """Which sets are edited, and how; the factors are those of arXiv 2104.08696, section 5.1."""

    PANEL = "The edit"

    sets: Sequence[str] | None = option(
        None,
        "Set of neurons to edit, of a relation or a fact; may be given several times. Default: "
        "all.",
        repeats=True,
    )
    to: str | None = option(
        None, "New answer of what the sets are about; without it their neurons are erased."
    )
    old_factor: float = option(
        1.0,
        "How much of the old answer's embedding is taken from each value vector.",
        only=Only("with --to", lambda o: o.to is not None),
    )
    new_factor: float = option(
        8.0,
        "How much of the new answer's embedding is added to each value vector.",
        only=Only("with --to", lambda o: o.to is not None),
    )
    embedding: str = option(
        "output",
        "Embedding of the answers, where a model has two: output (the unembedding) or input.",
        choices=("output", "input"),
        only=Only("with --to", lambda o: o.to is not None),
    )
    batch_tokens: int = option(4096, "Tokens of a batch, padding included.", least=1)


def edit(
    model: Model,
    neurons: Neurons,
    prompts: Prompts,
    output: Output,
    options: EditOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """Erase or change what sets of neurons write: a model folder, and what the edit did (edit.csv).

    The model itself stays as it is. Weights are written in the dtype that they are loaded in.

    Examples:
      relneuron edit Qwen/Qwen3-0.6B study/neurons.json study/prompts.jsonl \\
          -o erased
      relneuron edit Qwen/Qwen3-0.6B study/neurons.json study/prompts.jsonl \\
          -o edited --sets country_capital_city --to Rome
    """
    from relneuron.artifact.files import check_folder, require
    from relneuron.artifact.neurons import NeuronFile
    from relneuron.artifact.reading import read_csv
    from relneuron.methods.gradients.edit import check_output, edit_model
    from relneuron.model.load import load

    check_folder(output)
    check_output(model, output, force)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    NeuronFile.read(neurons)
    loaded, tokenizer = load(model, load_options)
    n = edit_model(
        model,
        loaded,
        tokenizer,
        neurons,
        prompts,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    shown = [
        [row["measure"], row["n"], *(_cell(row.real(name)) for name in ("before", "after"))]
        for row in read_csv(output / MEASURES, COLUMNS)
    ]
    yield Printed(("measure", "n", "before", "after"), shown)
    yield f"{n:,} value vectors {'erased' if options.to is None else 'moved'} -> {output}"


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.4g}"
