"""The `look` stage: cards of the best neurons of each set, or of those that are named, and a page.

`cli/look.py` calls it. The files are artifact/cards.py's; report/cards.py lays out the page.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.analyses.study import SIGNIFICANCE, read_significance
from relneuron.artifact.cards import NAME, SETS, cards_bytes, read_cards
from relneuron.artifact.chosen import read_name
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    real_path,
    refuse_output,
    require,
    sha256,
    writing,
)
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.manifest import MODEL_KEYS, Manifest, checked, locked, same_model, versions
from relneuron.artifact.neurons import ATTENTION, Neuron, NeuronFile, check_neurons
from relneuron.artifact.stage import command, loading, placed
from relneuron.methods.responses.places import Kept
from relneuron.model.batches import Budget
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import describe_model
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.ranks import Ranks, joined
from relneuron.report.look import page_of
from relneuron.report.page import render
from relneuron.study.cards import Cards
from relneuron.study.settings import LookOptions, names_file
from relneuron.study.strongest import find_strongest, short

JOURNAL = "look.journal"
COLUMNS = ("set", "rank", "layer", "site", "index", "score", *SIGNIFICANCE)
_CERTAIN = dict(zip(SIGNIFICANCE, ("p", "q", "low", "high"), strict=True))


class Sets(NamedTuple):
    """The sets of neurons that a card may name, and the files that say it."""

    file: NeuronFile | None
    rows: list[tuple[Any, ...]]  # as COLUMNS; NaN of what was not tested
    files: tuple[Path, ...] = ()

    def by_neuron(self) -> dict[Neuron, list[Json]]:
        """What each neuron's card says of them, the best place first."""
        found: dict[Neuron, list[Json]] = {}
        for name, rank, layer, site, index, score, *tested in self.rows:
            numbers = {
                key: None if value != value else short(value)
                for key, value in zip(_CERTAIN.values(), tested, strict=True)
            }
            one = {"set": name, "rank": rank, "score": short(score), **numbers}
            found.setdefault((layer, site, index), []).append(one)
        return {neuron: sorted(some, key=lambda one: one["rank"]) for neuron, some in found.items()}

    def best(self, n: int) -> list[Neuron]:
        """n neurons: the first of each set, then the second ones, and so on; each once."""
        rows = sorted(self.rows, key=lambda row: row[1])  # stable: sets keep their order
        return list(dict.fromkeys(row[2:5] for row in rows))[:n]

    def csv(self) -> bytes:
        """sets.csv."""
        rows = [["" if value != value else value for value in row] for row in self.rows]
        return csv_bytes(COLUMNS, rows)


def read_sets(folder: Path, asked: Sequence[str]) -> Sets:
    """The sets of the file that is asked for, else those of the folder, if it has any."""
    own = folder / "neurons.json"
    path = Path(asked[0]) if names_file(asked) else own
    if path == own and not path.exists():
        return Sets(None, [])
    file = NeuronFile.read(checked(path))
    # Beside a neurons.json stands how sure it is, of no file with another name.
    beside = path.with_name("significance.csv" if path.name == own.name else "no file")
    try:
        numbers = read_significance(checked(beside), file)
    except ValueError as error:
        raise RelneuronError(f"{beside}: {error}", "run identify again with --force") from error
    files = tuple(one for one in (path, beside) if one.exists())
    rows = [
        (name, rank, *neuron, *certain)
        for name, chosen in file.sets.items()
        for rank, (neuron, certain) in enumerate(
            zip(chosen, numbers[name].tolist(), strict=True), 1
        )
    ]
    return Sets(file, rows, files)


def chosen(
    sets: Sets, options: LookOptions, shape: Mapping[str, Any], folder: Path
) -> list[Neuron]:
    """The neurons that get a card; raises where there is none."""
    if options.neurons and not names_file(options.neurons):
        return list(dict.fromkeys(read_name(name, shape) for name in options.neurons))
    found = check_neurons(sets.best(options.cards), shape)
    if not found:
        what = "no set has a neuron" if sets.file else f"{folder} has no neurons.json"
        raise RelneuronError(what, "name neurons: --neurons 12.gate.345, say", 2)
    return found


def studied(folder: Path) -> Json:
    """What the manifest of a folder says of its model."""
    require(folder / "manifest.json", "run MODEL --facts FACTS -o DIR")
    model = Manifest(folder).data.get("model")
    if not (isinstance(model, dict) and isinstance(model.get("id"), str)):
        raise RelneuronError(
            f"{folder} is of no model",
            "give the folder of record, count, attribute or contrast",
            2,
        )
    return model


def check_same(folder: Path, described: Json) -> None:
    """Refuse a model that is another one than the folder's study is of."""
    manifest = Manifest(folder)
    manifest.check_model(described)
    known = manifest.data.get("model") or {}
    if any(key in known and known[key] != described[key] for key in MODEL_KEYS):
        raise RelneuronError(
            f"{folder} is of {known.get('id', 'another model')}, which has other weights than "
            f"{described['id']}",
            "give the model of the study, with its --dtype",
            2,
        )


def check_page(output: Path, folder: Path, force: bool) -> None:
    """Refuse a page in place of a file of the study."""
    refuse_output(output, "look", force)
    manifest = Manifest(folder).data
    own = {*manifest["stages"].get("look", {}).get("files", ())}
    known = ({*manifest["files"]} - own) | {NAME, SETS}
    if real_path(output) in [real_path(folder / name) for name in known]:
        raise RelneuronError(f"{output} is a file of the study", "choose another output", 2)


def open_cards(
    model: Any,
    tokenizer: Any,
    folder: Path,
    options: LookOptions,
    *,
    responses: Kept | None = None,
    backend: str = "auto",
) -> tuple[Cards, Sets]:
    """What makes the cards of a folder's neurons with its model, and the sets they may be in."""
    sets = read_sets(folder, options.neurons)
    sites = {row[3] for row in sets.rows}
    sites |= {name.split(".")[1] for name in options.neurons if name.count(".") == 2}
    mlps = find_mlps(model, attention=bool(sites & {*ATTENTION}))
    if sets.file is not None:
        sets.file.check_model(model_shape(mlps))
    strongest = find_strongest(folder, model, tokenizer, responses)
    budget = Budget(options.batch_tokens, options.oom)
    cards = Cards(
        *(model, tokenizer, mlps, strongest, sets.by_neuron()),
        options.examples,
        budget,
        backend,
    )
    return cards, sets


def look(
    name: str,
    model: Any,
    tokenizer: Any,
    folder: Path,
    output: Path | None,
    options: LookOptions | None = None,
    *,
    responses: Kept | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    force: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> list[Json]:
    """Write the cards of a folder's neurons, its sets as csv, and the page (`output`).

    `folder` gets cards.jsonl and sets.csv. Cards that are there, of the same neurons, files and
    model, are kept: only the page is written then. So are others where neurons are named and the
    page is outside of the folder (without `force`). `resume` replaces files that others left there.
    `responses` are those that the folder does not have, as `record` kept them. `ranks` are
    processes that share what the model is asked, and wait to hear of it (`Ranks.serve`); by default
    those that torchrun started. look.journal lets a killed run go on.
    """
    how: dict[str, Any] = {"backend": backend, "force": force, "resume": resume, "quiet": quiet}
    asked = (name, model, tokenizer, folder, output, options or LookOptions(), responses)
    if ranks is not None:
        return _look(*asked, ranks, **how)
    with joined(model) as ranks:
        if ranks.rank:
            ranks.serve(model, tokenizer)
            found = []
        else:
            found = _look(*asked, ranks, **how)
            ranks.dismiss()
        told: list[Json] = ranks.told(found)
    return told


def _look(
    name: str,
    model: Any,
    tokenizer: Any,
    folder: Path,
    output: Path | None,
    options: LookOptions,
    responses: Kept | None,
    ranks: Ranks,
    *,
    backend: str,
    force: bool,
    resume: bool,
    quiet: bool,
) -> list[Json]:
    """`look` in the first process."""
    if output is not None:
        check_page(output, folder, force or resume)
    studied(folder)
    cards, sets = open_cards(
        model, tokenizer, folder, options, responses=responses, backend=backend
    )
    neurons = chosen(sets, options, model_shape(cards.mlps), folder)
    described = describe_model(name, model, cards.mlps, backend)
    check_same(folder, described)
    reads = [*sets.files, *(cards.strongest.files if cards.strongest else ())]
    recorded = options.recorded()
    del recorded["batch_tokens"]  # changes no digit that a card shows, but a rounding
    inputs = {
        "model": same_model(described),
        "tokenizer": tokenizer_digest(tokenizer),
        "files": {path.name: sha256(path) for path in reads},
        **recorded,
        "neurons": None if names_file(options.neurons) else list(options.neurons) or None,
    }
    made = [folder / NAME, folder / SETS]
    if output is not None and not force and _is_aside(folder, output, inputs, options):
        with progress_bar(len(neurons), "look", "neuron", quiet) as bar:
            found = cards.cards(neurons, bar.update)
        by = _command(name, described, folder, output, options)
        _show_aside(folder, output, found, {"inputs": inputs, "commands": by}, reads)
        for notice in cards.all_notices():
            warnings.warn(notice, stacklevel=2)
        return found
    with locked(folder):
        if not Manifest(folder).is_done("look", inputs, force=force):
            for path in made:
                refuse_output(path, "look", force or resume)
            cards.ranks, cards.journal = ranks, (folder / JOURNAL, inputs)
            with progress_bar(len(neurons), "look", "neuron", quiet) as bar:
                found = cards.cards(neurons, bar.update)
            notices = cards.all_notices()
            for notice in notices:
                warnings.warn(notice, stacklevel=2)
            with writing("look", folder, made):
                atomic_write(folder / NAME, cards_bytes(found))
                atomic_write(folder / SETS, sets.csv())
                Journal(folder / JOURNAL, inputs).remove()
                manifest = Manifest(folder)
                if "model" not in manifest.data:
                    manifest.describe(versions=versions(), model=described)
                manifest.finish(
                    "look",
                    inputs,
                    made,
                    reads=reads,
                    notices=notices,
                    commands=_command(name, described, folder, output, options),
                )
        if output is not None:
            show(folder, output)
    return read_cards(folder / NAME)


def show(folder: Path, output: Path) -> None:
    """Write the page of a folder's cards; the manifest knows one that is in the folder.

    The page says how the cards were made, and not how it was itself.
    """
    manifest, made = Manifest(folder), [folder / NAME, folder / SETS]
    entry = dict(manifest.data["stages"]["look"])
    page = page_of(read_cards(checked(folder / NAME)), made_from(manifest.data))
    is_inside = real_path(output.parent) == real_path(folder)
    with locked(folder), writing("look", folder, [output] if is_inside else []):
        atomic_write(output, render(page).encode())
        if is_inside:
            inputs, reads = entry.pop("inputs"), [folder / name for name in entry.pop("reads")]
            del entry["files"]
            manifest.finish("look", inputs, [*made, output], reads=reads, **entry)


def _is_aside(folder: Path, output: Path, inputs: Json, options: LookOptions) -> bool:
    """Whether named neurons are looked at beside the cards of a folder, which are of others."""
    entry = Manifest(folder).data["stages"].get("look")
    is_outside = not real_path(output).is_relative_to(real_path(folder))
    return bool(options.neurons) and is_outside and entry is not None and entry["inputs"] != inputs


def _show_aside(
    folder: Path, output: Path, cards: Sequence[Json], entry: Json, reads: Sequence[Path]
) -> None:
    """Write the page of cards that the folder does not keep."""
    manifest = Manifest(folder).data
    inside = {path.name: sha256(path) for path in reads if path.parent == folder}
    stages = {**manifest["stages"], "look": {**entry, "files": [], "reads": inside}}
    about = made_from({**manifest, "stages": stages}, ())
    atomic_write(output, render(page_of(cards, about)).encode())


def is_shown(folder: Path, output: Path) -> bool:
    """Whether a page in the folder is that of its cards."""
    return output.name in Manifest(folder).data["stages"]["look"]["files"]


def made_from(manifest: Json, made: Sequence[str] = (NAME, SETS)) -> Json:
    """What a manifest says of the cards: of the stages whose files they are made from, and theirs.

    `made` are the files of the cards. So that their page is the same whatever was made since.
    """
    files = manifest["stages"]["look"]["reads"].keys()
    stages = {
        name: entry
        for name, entry in manifest["stages"].items()
        if name == "look" or files & {*entry["files"]}
    }
    stages["look"] = {**stages["look"], "files": [*made]}
    known = {name: of for name, of in manifest["files"].items() if name in {*files, *made}}
    about: Json = {k: manifest[k] for k in ("schema", "versions", "model") if k in manifest}
    return {**about, "stages": stages, "files": known}


def _command(
    name: str, described: Json, folder: Path, output: Path | None, options: LookOptions
) -> list[list[str]]:
    """The command that makes the stage again."""
    page = folder / "look.html" if output is None else output
    if names_file(options.neurons):
        options = replace(options, neurons=(placed(options.neurons[0], folder),))
    known = Manifest(folder).data.get("model", {}).get("id")
    model = {"model": None if name == known else name}
    given = (placed(folder, folder), "-o", placed(page, folder), *options.words())
    return command("look", *given, **model, **loading(described))
