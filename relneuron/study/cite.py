"""The papers behind a folder's methods, or behind all, as a list of references.

`relneuron cite` prints it, and figures for a paper come with it as references.bib. What goes back
to which paper is said by the stages, rankings, attributions and options themselves; what a folder
holds, by its manifest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relneuron.ablation import STAGES
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.options import Options, options_of
from relneuron.artifact.papers import SOFTWARE, Paper
from relneuron.artifact.stage import Attribution, Ranking, Stage, load
from relneuron.methods import attributions, formats, methods, rankings
from relneuron.texts.options import PromptsOptions

# What a stage's entry in a manifest goes back to: of what, as a command line says it, and papers.
Cited = Iterator[tuple[str, Paper]]


def citations(folder: Path | None = None) -> dict[Paper, list[str]]:
    """Each paper, and what goes back to it as a command line says it; without a folder, of all.

    In the order of the folder's stages. Raises RelneuronError for a folder without a manifest.
    """
    found: dict[Paper, list[str]] = {}
    for of, paper in _all() if folder is None else _of_folder(folder):
        known = found.setdefault(paper, [])
        if of not in known:
            known.append(of)
    return found


def bibtex(folder: Path | None = None) -> str:
    """The references as BibTeX, each below a line that says what goes back to it; ours is last."""
    cited = {**citations(folder), SOFTWARE: ["relneuron itself"]}
    return "\n\n".join(f"% {', '.join(of)}\n{paper.bibtex()}" for paper, of in cited.items()) + "\n"


def text(folder: Path | None = None) -> str:
    """The references in words, a line each, likewise."""
    cited = {**citations(folder), SOFTWARE: ["relneuron itself"]}
    return "\n".join(f"{paper.text()} [{', '.join(of)}]" for paper, of in cited.items()) + "\n"


def _of_folder(folder: Path) -> Cited:
    """What the stages of a folder go back to, by what their entries say they were made with."""
    if not (folder / "manifest.json").is_file():
        raise RelneuronError(
            f"{folder} holds no study: it has no manifest.json",
            "give a folder that relneuron wrote, or leave it out for the papers of all methods",
        )
    for name, entry in Manifest(folder).data["stages"].items():
        stage, _, kind = name.partition("_")
        yield from _of_stage(stage, kind, entry["inputs"])


def _of_stage(stage: str, kind: str, inputs: Mapping[str, Any]) -> Cited:
    """`kind` is what follows a stage's name where a folder may hold several of it."""
    # A later version may have others.
    if stage == "identify" and (ranking := rankings().get(str(inputs.get("method")))):
        yield from _of_way("identify", ranking, inputs)
    elif stage == "attribute" and (attribution := attributions().get(kind or "gain")):
        yield from _of_way("attribute", attribution, inputs)
    elif stage == "import" and (paper := formats().get(name := str(inputs.get("format", "lape")))):
        yield f"import --format {name}", paper
    elif stage == "prompts":
        yield from _of_options("prompts", PromptsOptions, inputs)
    elif stage in _stages():
        yield from _of_command(_stages()[stage], inputs)


def _all() -> Cited:
    """What every stage, ranking, attribution, format and option goes back to."""
    yield from _of_options("prompts", PromptsOptions, None)
    for stage in _stages().values():
        yield from _of_command(stage, None)
    for attribution in attributions().values():
        yield from _of_way("attribute", attribution, None)
    for ranking in rankings().values():
        yield from _of_way("identify", ranking, None)
    yield from ((f"import --format {name}", paper) for name, paper in formats().items())


def _stages() -> dict[str, Stage]:
    """The stages that go back to papers whichever method they are asked for, by name."""
    of_methods = (stage for method in methods() for stage in method.stages)
    return {stage.name: stage for stage in (*of_methods, *STAGES)}


def _of_way(command: str, way: Ranking | Attribution, inputs: Mapping[str, Any] | None) -> Cited:
    said = f"{command} --method {way.name}"
    yield from ((said, paper) for paper in way.papers)
    yield from _of_options(said, way.options, inputs)


def _of_command(stage: Stage, inputs: Mapping[str, Any] | None) -> Cited:
    yield from ((stage.name, paper) for paper in stage.papers)
    for parameter in inspect.signature(load(stage.run), eval_str=True).parameters.values():
        hint = parameter.annotation
        if isinstance(hint, type) and issubclass(hint, Options):
            yield from _of_options(stage.name, hint, inputs)


def _of_options(said: str, cls: type[Options], inputs: Mapping[str, Any] | None) -> Cited:
    """What the values of options go back to; of all values without `inputs`."""
    for name, (f, says, _) in options_of(cls).items():
        given = None if inputs is None else inputs.get(name)
        values = given if isinstance(given, list) else [given]
        for value, paper in says.papers.items():
            is_asked = value in values if value else given not in (f.default, None)
            if inputs is None or is_asked:
                yield f"{said} {says.flag} {value}".rstrip(), paper
