"""The command `look`: neurons as one looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.options import LoadOptions, Named, Study, refuse_stray
from relneuron.cli.flags import given
from relneuron.study.settings import DEMO, LookOptions, ServeOptions, names_file


def look(
    folder: Study,
    options: LookOptions,
    serve_options: ServeOptions,
    load_options: LoadOptions,
    model: Annotated[
        str | None, Named("Model folder or hub name; default: the one that DIR is of.")
    ] = None,
    output: Annotated[Path | None, Named("Where to write the page.", ("-o", "--output"))] = None,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """A page of neurons: their strongest texts, what is lost without each, and what it writes.

    Writes the page, and beside the study's files cards.jsonl, a neuron a line, and sets.csv. Cards
    that are there are shown again without asking the model. With --serve nothing is written: the
    cards of all neurons of the model are made as a browser asks for them, until Ctrl-C.

    Examples:
      relneuron look study -o study/look.html
      relneuron look study -o look.html --neurons 12.gate.345,3.up.7
      relneuron look study -o look.html --neurons other.json --cards 50
      relneuron look study --serve
    """
    from relneuron.model.load import load
    from relneuron.model.ranks import joined
    from relneuron.study.look import check_page, read_sets, studied
    from relneuron.study.look import look as look_stage

    check_asked(output, options, serve_options)
    if output is not None:
        check_page(output, folder, force)
    described = studied(folder)
    # What is wrong with the neurons is said before the model is loaded.
    read_sets(folder, options.neurons)
    name = model or described["id"]
    if load_options.dtype is None:
        load_options = replace(load_options, dtype=described.get("dtype"))
    loaded, tokenizer = load(_place(name), load_options)
    if output is None:
        with joined(loaded) as ranks:  # one process serves, for which the others wait
            if ranks.rank == 0:
                how = (options, serve_options, load_options)
                yield from _serve(name, loaded, tokenizer, folder, *how)
        return
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
    yield f"{len(found):,} cards -> {output}"


def _place(name: str) -> str:
    """Where a model is; the demo's is in the package."""
    from relneuron.demo import CHECKPOINT

    return str(CHECKPOINT) if name == DEMO else name


def check_asked(output: Path | None, options: LookOptions, serving: ServeOptions) -> None:
    """Refuse a page and a server at once, neither of them, and what a server has no use for."""
    if not serving.serve:
        if output is None:
            raise RelneuronError(
                "neither a page nor a server is asked for", "add -o look.html, or --serve", 2
            )
        return
    need("look --serve", "starlette", "uvicorn")
    if options.neurons and not names_file(options.neurons):
        raise RelneuronError(
            "--serve shows all neurons, and --neurons names some",
            "leave it out, or give a neurons.json, whose sets the cards name",
            2,
        )
    asked = {"output": "-o", "force": "--force", "cards": "--cards", "quiet": "--quiet"}
    for name in [name for name in given() if name in asked]:
        refuse_stray(asked[name], "without --serve")


def _serve(
    name: str,
    model: Any,
    tokenizer: Any,
    folder: Path,
    options: LookOptions,
    serving: ServeOptions,
    load_options: LoadOptions,
) -> Iterator[str]:
    """Says where to look, then answers until Ctrl-C."""
    import secrets

    from relneuron.model.load import describe_model
    from relneuron.study.browse import Pages
    from relneuron.study.look import check_same, open_cards
    from relneuron.study.ranked import Ranked
    from relneuron.study.serve import address, app_of, hosts_of, listening, serve

    backend = load_options.backend
    cards, sets = open_cards(model, tokenizer, folder, options, backend=backend)
    check_same(folder, describe_model(name, model, cards.mlps, backend))
    token = secrets.token_urlsafe(32)
    with listening(serving.host, serving.port) as found:
        ranked = Ranked(folder, cards.order)
        app = app_of(Pages(cards, sets, ranked, name), token, hosts_of(serving.host))
        yield f"{cards.order.total:,} neurons: {address(found, token)}"
        yield "Whoever has this address may look, at nothing else. Ctrl-C ends it."
        serve(app, found)
