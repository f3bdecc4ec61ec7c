"""The strongest examples of neurons, from what a folder holds of single texts; no value is new.

`study/cards.py` shows them. Of a study of relations they are the prompts with the largest
responses, of an attribution the sentences with the largest gains or gradients, of a corpus the
windows that `count --examples` kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relneuron.artifact.chosen import switched
from relneuron.artifact.examples import NAME as EXAMPLES
from relneuron.artifact.examples import Example, examples_of, sites_of
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.gains import GAIN_ROWS, GAINS, TARGETS, read_targets
from relneuron.artifact.gains import MADE_BY as ATTRIBUTE
from relneuron.artifact.gradients import FILES, IG, RELEVANCE, Gradients, made_by
from relneuron.artifact.histogram import NAME as HISTOGRAM
from relneuron.artifact.histogram import Histogram
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import RESPONSE_ROWS, open_tensors
from relneuron.methods.responses.places import Kept
from relneuron.model.questions import encode
from relneuron.study.tensors import RECORD, rows_of
from relneuron.texts.tokens import listed

BINS = 24
# Tokens of a text that a card shows, around the one with the largest value.
BEFORE, AFTER = 24, 8
PRODUCTS = ("gate", "up", "act", "product")  # sites whose neurons an attribution has a number of

Array = np.ndarray[Any, Any]


class Text(NamedTuple):
    """A text that a folder has a number of each neuron for.

    ids     its tokens
    target  the token that follows, whose probability is asked; None: none is known
    peak    the token that the number is of; None: it is of the whole text
    """

    id: str
    group: str
    ids: tuple[int, ...]
    target: int | None
    peak: int | None = None


class Found(NamedTuple):
    text: Text
    value: float


@dataclass(frozen=True)
class Strongest:
    """Where examples come from: a number of each text for every neuron.

    value_of  what the number is, in words
    files     what is read, in the folder
    site      where the neuron's value at a token is taken, by the site of its name
    of        (neuron, n): the n texts with the largest numbers, and all numbers as a histogram;
              [] and None where there is none of the neuron
    """

    value_of: str
    files: tuple[Path, ...]
    site: Callable[[str], str]
    of: Callable[[Neuron, int], tuple[list[Found], Json | None]]


def by_text(
    texts: Sequence[Text], column: Callable[[Neuron], Array | None], value_of: str
) -> Callable[[Neuron, int], tuple[list[Found], Json | None]]:
    """`Strongest.of` of N texts with a number (N,) float32 each; of equal ones the first."""
    groups = [text.group for text in texts]

    def of(neuron: Neuron, n: int) -> tuple[list[Found], Json | None]:
        values = column(neuron)
        if values is None:
            return [], None
        # NaN sorts behind all numbers.
        order = np.argsort(-values, kind="stable")[:n].tolist()
        found = [Found(texts[k], float(values[k])) for k in order if np.isfinite(values[k])]
        return found, histogram(values, groups, value_of)

    return of


def histogram(values: Array, groups: Sequence[str], of: str) -> Json | None:
    """How the finite values of each group are spread in `BINS` bins of one width; the last one
    holds its end, too."""
    is_there = np.isfinite(values)
    if not is_there.any():
        return None
    low, high = float(values[is_there].min()), float(values[is_there].max())
    edges = np.linspace(low, high, BINS + 1) if low < high else np.array([low, low])
    edges = edges.astype(np.float64)
    labels = np.array(groups, object)
    counts = {}
    for name in dict.fromkeys(groups):
        own = values[is_there & (labels == name)].astype(np.float64)
        # The edges are float64 of float32 ends: none of the values is outside.
        counts[name] = np.histogram(own, edges)[0].tolist()
    return {"of": of, "edges": [short(edge) for edge in edges.tolist()], "groups": counts}


def short(value: float, digits: int = 4) -> float:
    """A number as a card has it: so many significant digits."""
    return float(f"{value:.{digits}g}") + 0.0


def find_strongest(
    folder: Path, model: Any, tokenizer: Any, responses: Kept | None = None
) -> Strongest | None:
    """What a folder's examples come from: its examples, else responses, gains or gradients.

    None where the folder has no number of single texts. `responses` are those that it does not
    have, as `record` kept them.
    """
    if responses is not None:
        return _kept(responses, folder, model, tokenizer)
    for name, make in _SOURCES.items():
        if (folder / name).is_file():
            return make(folder, model, tokenizer)
    return None


def _texts(
    folder: Path, model: Any, tokenizer: Any, ids: Sequence[str], targets: Sequence[int] | None
) -> list[Text]:
    """The prompts of a folder by their ids, and what follows: the right answer, or the targets."""
    path = folder / "prompts.jsonl"
    by_id = {prompt.id: prompt for prompt in read_prompts(checked(path))}
    prompts = _of(ids, by_id, path)
    has_answers = all(prompt.object for prompt in prompts)
    questions = encode(tokenizer, model, prompts, answers=has_answers, n_tokens=0, options=False)
    found = []
    for row, prompt in enumerate(prompts):
        # The space in front of an answer, where the tokenizer makes a token of it alone.
        *spaces, answer = questions.starts_of(row)[0] if has_answers else (None,)
        target = answer if targets is None else targets[row]
        tokens = (*questions.ids[row], *(token for token in spaces if token is not None))
        found.append(Text(prompt.id, prompt.relation, tokens, target))
    return found


def _of(ids: Sequence[str], by_id: Mapping[str, Any], path: Path) -> list[Any]:
    """What a file says of each text that there is a number of."""
    if missing := [one for one in ids if one not in by_id]:
        raise RelneuronError(
            f"{path} lacks {listed(missing)}, of which there are numbers beside it",
            "make both again with the stage that writes them, with --force",
        )
    return [by_id[one] for one in ids]


def _responses(folder: Path, model: Any, tokenizer: Any) -> Strongest:
    path = checked(folder / "responses.safetensors")
    ids = rows_of(path, RECORD, RESPONSE_ROWS)
    with open_tensors(path, RECORD) as file:
        pooling = (file.about(RESPONSE_ROWS) or {}).get("pooling")

    def column(neuron: Neuron) -> Array | None:
        layer, site, index = neuron
        with open_tensors(path, RECORD) as file:
            name = f"{switched(site)}.{layer}"
            if name not in file.names:
                return None
            rows = (slice(None), slice(index, index + 1))
            found: Array = file.get(name, (len(ids), None), rows=rows)[:, 0]
            return found

    return _of_prompts(folder, model, tokenizer, ids, pooling, column, (path,))


def _kept(responses: Kept, folder: Path, model: Any, tokenizer: Any) -> Strongest:
    def column(neuron: Neuron) -> Array | None:
        layer, site, index = neuron
        return responses.column((layer, switched(site), index))

    pooling = responses.prompts.about["pooling"]
    return _of_prompts(folder, model, tokenizer, responses.ids, pooling, column)


def _of_prompts(
    folder: Path,
    model: Any,
    tokenizer: Any,
    ids: Sequence[str],
    pooling: str | None,
    column: Callable[[Neuron], Array | None],
    files: tuple[Path, ...] = (),
) -> Strongest:
    of = "output at the prompt's last token" if pooling == "last" else "mean output over the prompt"
    texts = _texts(folder, model, tokenizer, ids, None)
    files = (*files, folder / "prompts.jsonl")
    return Strongest(of, files, lambda site: site, by_text(texts, column, of))


def _at_product(site: str) -> str:
    """An attribution is of products; a neuron that is named by what it reads shows that."""
    return "product" if site in ("gate", "up") else site


def _gains(folder: Path, model: Any, tokenizer: Any) -> Strongest:
    path, table = checked(folder / GAINS), checked(folder / TARGETS)
    ids = rows_of(path, ATTRIBUTE, GAIN_ROWS)
    by_id = {target.id: target.target_id for target in read_targets(table)}

    def column(neuron: Neuron) -> Array | None:
        layer, site, index = neuron
        if site not in PRODUCTS:
            return None
        with open_tensors(path, ATTRIBUTE) as file:
            rows = (slice(None), slice(index, index + 1))
            found: Array = file.get(f"ffn.{layer}", (len(ids), None), rows=rows)[:, 0]
            return found

    texts = _texts(folder, model, tokenizer, ids, _of(ids, by_id, table))
    files = (path, table, folder / "prompts.jsonl")
    of = "gain of the answer, in nats"
    return Strongest(of, files, _at_product, by_text(texts, column, of))


def _gradients(method: str, of: str) -> Callable[[Path, Any, Any], Strongest]:
    def make(folder: Path, model: Any, tokenizer: Any) -> Strongest:
        path = checked(folder / FILES[method])
        found = Gradients.read(path, method)
        shape = (len(found.ids), found.n_layers, found.width)

        def column(neuron: Neuron) -> Array | None:
            layer, site, index = neuron
            if site not in PRODUCTS:
                return None
            with open_tensors(path, made_by(method)) as file:
                rows = (slice(None), slice(layer, layer + 1), slice(index, index + 1))
                values: Array = file.get(method, shape, rows=rows)[:, 0, 0]
                return values

        texts = _texts(folder, model, tokenizer, found.ids, [t[0] for t in found.targets])
        files = (path, folder / "prompts.jsonl")
        return Strongest(of, files, _at_product, by_text(texts, column, of))

    return make


# --- of a corpus --------------------------------------------------------------------------------


def _corpus(folder: Path, _model: Any, tokenizer: Any) -> Strongest:
    path, bins = (checked(folder / name) for name in (EXAMPLES, HISTOGRAM))
    counted: list[str] = []
    if path.exists():
        counted += sites_of(path)

    def at(site: str) -> str:
        """A set names the gate for whatever was counted of its product."""
        made = [one for one in counted if one in PRODUCTS] if site in PRODUCTS else []
        return site if site in counted or not made else made[0]

    def of(neuron: Neuron, n: int) -> tuple[list[Found], Json | None]:
        layer, site, index = neuron
        place = (layer, at(site), index)
        if place[1] not in counted:
            return [], None
        (every,) = examples_of(path, [place])
        best = sorted(every, key=lambda one: -one.value)[:n]
        spread = _spread(bins, place) if bins.exists() else None
        return [Found(_window(one), one.value) for one in best], spread

    files = tuple(one for one in (path, bins) if one.exists())
    return Strongest("largest value in a window", files, at, of)


def _window(one: Example) -> Text:
    """What a token reads of its window, and what a card shows behind it."""
    ids = tuple(one.ids[: one.position + 1 + AFTER].tolist())
    return Text(f"{one.group}, window {one.number}", one.group, ids, None, one.position)


def _spread(path: Path, neuron: Neuron) -> Json:
    """A neuron's bins as a card has them; the outer ones hold all that is beyond, too."""
    found, site = Histogram.read(path, neuron), neuron[1]
    n = int(found.last[site][0, 0]) + 1
    first, exponent = int(found.first[site][0, 0]), int(found.exponent[site][0, 0])
    edges = [math.ldexp(first + bin, exponent) for bin in range(n + 1)]
    counts = found.count[site][:, 0, 0, :n].tolist()
    of = "value at a token"
    return {"of": of, "edges": edges, "groups": dict(zip(found.groups, counts, strict=True))}


_SOURCES: dict[str, Callable[[Path, Any, Any], Strongest]] = {
    EXAMPLES: _corpus,
    "responses.safetensors": _responses,
    GAINS: _gains,
    FILES[IG]: _gradients(IG, "integrated gradient of the answer"),
    FILES[RELEVANCE]: _gradients(RELEVANCE, "gradient x activation of the answer"),
}
