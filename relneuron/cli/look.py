"""The command `look`: neurons as one looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from relneuron.artifact.options import LoadOptions, Named, Output, Study
from relneuron.study.settings import DEMO, LookOptions


def look(
    folder: Study,
    output: Output,
    options: LookOptions,
    load_options: LoadOptions,
    model: Annotated[
        str | None, Named("Model folder or hub name; default: the one that DIR is of.")
    ] = None,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """A page of neurons: their strongest texts, what is lost without each, and what it writes.

    Writes the page, and beside the study's files cards.jsonl, a neuron a line, and sets.csv. Cards
    that are there are shown again without asking the model.
    """
    from relneuron.artifact.cards import NAME
    from relneuron.model.load import load
    from relneuron.study.look import check_page, read_sets, studied
    from relneuron.study.look import look as look_stage

    check_page(output, folder, force)
    described = studied(folder)
    # What is wrong with the neurons is said before the model is loaded.
    read_sets(folder, options.neurons)
    name = model or described["id"]
    if load_options.dtype is None:
        load_options = replace(load_options, dtype=described.get("dtype"))
    loaded, tokenizer = load(_place(name), load_options)
    found = look_stage(
        name,
        loaded,
        tokenizer,
        folder,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    yield f"{len(found):,} cards -> {folder / NAME}"
    yield f"-> {output}"


def _place(name: str) -> str:
    """Where a model is; the demo's is in the package."""
    from relneuron.demo import CHECKPOINT

    return str(CHECKPOINT) if name == DEMO else name
