"""The command `edit`: what it says."""

from __future__ import annotations

from collections.abc import Iterator

from relneuron.artifact.options import LoadOptions, Model, Neurons, Output, Prompts
from relneuron.artifact.stage import Printed
from relneuron.methods.gradients.options import EditOptions


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
    from relneuron.artifact.gradients import EDIT, EDIT_COLUMNS
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
        for row in read_csv(output / EDIT, EDIT_COLUMNS)
    ]
    yield Printed(("measure", "n", "before", "after"), shown)
    yield f"{n:,} value vectors {'erased' if options.to is None else 'moved'} -> {output}"


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.4g}"
