"""Cards of neurons: what one looks at to see what a neuron does, of a folder and its model.

`look` makes them of many neurons; `Cards.card` makes one of any neuron when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from relneuron.ablation.next_token import Asked, next_probabilities
from relneuron.artifact.cards import FORMAT
from relneuron.artifact.chosen import switched
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Neuron, Shape
from relneuron.model.batches import Budget, is_out_of_memory
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, check_sites, model_shape
from relneuron.model.ranks import Ranks, sharing
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.token_values import MADE, Values, token_values
from relneuron.model.written import nearest, promoted, value_of
from relneuron.study.strongest import AFTER, BEFORE, Found, Strongest, short
from relneuron.texts.tokens import token_pieces, token_text

TOKENS = 10  # at each end of a value vector
NEAREST = 5
AT_ONCE = 50  # neurons whose passes share batches

Ids = tuple[int, ...]


@dataclass
class Cards:
    """Makes the cards of a folder's neurons, of its model, which is loaded once.

    mlps       those of the model, with attention if neurons of it are asked for
    strongest  where examples come from; None: cards have none
    sets       by neuron the sets that it is in: set, rank, score, p, q, low, high
    ranks      processes that share what the model is asked, and wait to hear of it (`Ranks.serve`)
    journal    where what it said is noted, and what that depends on; None: nowhere
    """

    model: Any
    tokenizer: Any
    mlps: Sequence[Part]
    strongest: Strongest | None
    sets: Mapping[Neuron, Sequence[Json]]
    n_examples: int = 8
    budget: Budget = field(default_factory=lambda: Budget(4096))
    backend: str = "auto"
    ranks: Ranks = field(default_factory=Ranks)
    journal: tuple[Path, Json] | None = None
    notices: list[str] = field(default_factory=list)
    n_apart: int = 0  # examples whose token has another value when its window is read alone

    def __post_init__(self) -> None:
        self.order = Shape.of(model_shape(self.mlps))
        self._pieces: dict[Ids, list[str]] = {}

    @cached_property
    def residual(self) -> ResidualModel | None:
        """What neurons write; None, with a notice, for a model whose stream is no plain sum."""
        try:
            return read_residual_model(self.model)
        except RelneuronError as error:
            self.notices.append(f"no value vectors on the cards: {error.cause}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.notices.append("no value vectors on the cards: no memory for the unembedding")
        return None

    def all_notices(self) -> list[str]:
        """What a reader of the cards that were made must know."""
        apart = (
            f"{self.n_apart} examples have another value where their window is read by itself, and "
            "are shaded by that: the corpus was read in another way"
        )
        return [*self.notices, *([apart] if self.n_apart else []), *self.budget.notices]

    def card(self, neuron: Neuron) -> Json:
        """The card of one neuron, as artifact.cards.SCHEMA has it."""
        return self.cards([neuron])[0]

    def cards(
        self, neurons: Sequence[Neuron], advance: Callable[[int], object] = lambda _: None
    ) -> list[Json]:
        """The cards of neurons of the model, in their order."""
        found: list[Json] = []
        for start in range(0, len(neurons), AT_ONCE):
            some = neurons[start : start + AT_ONCE]
            found += self._some(some, str(start))
            advance(len(some))
        return found

    def _some(self, neurons: Sequence[Neuron], part: str) -> list[Json]:
        check_sites(self.mlps, {site for _, site, _ in neurons if site in MADE})
        read = [
            ([], None) if self.strongest is None else self.strongest.of(n, self.n_examples)
            for n in neurons
        ]
        asked = [(n, one) for n, (texts, _) in zip(neurons, read, strict=True) for one in texts]
        values = self._values(asked, part)
        peaks = [_peak(one, own) for (_, one), own in zip(asked, values, strict=True)]
        probs = self._probabilities(asked, peaks, part)
        examples = map(self._example, (one for _, one in asked), values, peaks, probs)
        written = self._written(neurons)
        return [
            {
                "format": FORMAT,
                **self._named(neuron),
                **dict(zip(("layer", "site", "index"), neuron, strict=True)),
                "sets": list(self.sets.get(_off(neuron), ())),
                "value_of": self.strongest.value_of if self.strongest else "",
                "values_at": self._site(neuron[1]),
                "examples": [next(examples) for _ in texts],
                "histogram": spread,
                **own,
            }
            for neuron, (texts, spread), own in zip(neurons, read, written, strict=True)
        ]

    def _named(self, neuron: Neuron) -> dict[str, str]:
        layer, site, index = neuron
        return {"neuron": f"{layer}.{site}.{index}", "name": self.order.name(*neuron)}

    def _site(self, site: str) -> str:
        return self.strongest.site(site) if self.strongest else site

    # --- examples

    def _ask(self, ask: Callable[..., Any], part: str, *asked: Any) -> Any:
        """What the model says of texts, of which each of the processes asks some."""
        how: dict[str, Any] = {"backend": self.backend, "part": part}
        if self.journal is None:
            first = (self.model, self.tokenizer) if ask is token_values else (self.model,)
            return ask(*first, self.mlps, *asked, self.budget, **how)
        how["attention"] = any(mlp.projections for mlp in self.mlps)
        how |= {"budget": self.budget, "journal": self.journal}
        return self.ranks.call(_share, "", self.model, self.tokenizer, ask, *asked, **how)

    def _values(self, asked: Sequence[tuple[Neuron, Found]], part: str) -> list[Values]:
        """(T,) of each: the neuron's values at the tokens of the text."""
        wanted: dict[Ids, dict[Neuron, None]] = {}
        named = [((n[0], self._site(n[1]), n[2]), one.text.ids) for n, one in asked]
        for neuron, ids in named:
            wanted.setdefault(ids, {})[neuron] = None
        listed = [list(some) for some in wanted.values()]
        found = self._ask(token_values, part, list(wanted), listed)
        rows = {
            (neuron, ids): row
            for (ids, some), values in zip(wanted.items(), found, strict=True)
            for neuron, row in zip(some, values, strict=True)
        }
        return [rows[one] for one in named]

    def _probabilities(
        self, asked: Sequence[tuple[Neuron, Found]], peaks: Sequence[int], part: str
    ) -> list[tuple[int, float, float] | None]:
        """The token that follows, its probability, and that with the neuron off."""
        rows: list[Asked] = []
        places: list[int | None] = []
        for (neuron, (text, _)), peak in zip(asked, peaks, strict=True):
            ids, target = text.ids, text.target
            if target is None:
                ids, target = ids[: peak + 1], next(iter(ids[peak + 1 : peak + 2]), None)
            places.append(None if target is None else len(rows))
            if target is not None:
                rows += [Asked(ids, target), Asked(ids, target, (_off(neuron),))]
        found = self._ask(next_probabilities, part, rows)
        return [
            None if place is None else (rows[place].target, found[place], found[place + 1])
            for place in places
        ]

    def _example(
        self,
        one: Found,
        values: Values,
        peak: int,
        prob: tuple[int, float, float] | None,
    ) -> Json:
        text = one.text
        if text.peak is not None and not math.isclose(values[peak], one.value, rel_tol=0.05):
            self.n_apart += 1
        if text.ids not in self._pieces:
            self._pieces[text.ids] = token_pieces(self.tokenizer, text.ids)
        shown = slice(max(0, peak - BEFORE), peak + AFTER + 1)
        target, before, after = prob or (None, None, None)
        return {
            "id": text.id,
            "group": text.group,
            "value": short(one.value),
            "first": shown.start,
            "tokens": self._pieces[text.ids][shown],
            "values": [_finite(value) for value in values[shown].tolist()],
            "peak": peak - shown.start,
            "next": None if target is None else token_text(self.tokenizer, target),
            "p": None if before is None else short(before),
            "p_off": None if after is None else short(after),
        }

    # --- value vectors

    def _written(self, neurons: Sequence[Neuron]) -> Iterator[Json]:
        """What each neuron promotes and suppresses, and which others write the most like it."""
        residual = self.residual
        values = [None if residual is None else value_of(residual, n) for n in neurons]
        known = [(n, v) for n, v in zip(neurons, values, strict=True) if v is not None]
        vectors, names = [v for _, v in known], [n for n, _ in known]
        near = iter(nearest(residual, vectors, names, NEAREST) if residual is not None else [])
        ends = iter(promoted(residual, vectors, TOKENS) if residual is not None else [])
        for value in values:
            if value is None:
                yield {"promotes": [], "suppresses": [], "nearest": []}
                continue
            end, likes = next(ends), next(near)
            yield {
                "promotes": self._tokens(end.largest),
                "suppresses": self._tokens(end.least),
                "nearest": [
                    {**self._named((layer, "gate", index)), "cosine": cosine}
                    for layer, index, cosine in likes
                ],
            }

    def _tokens(self, found: Sequence[tuple[int, float]]) -> list[Json]:
        return [
            {"token": token_text(self.tokenizer, token), "id": token, "logit": short(logit)}
            for token, logit in found
        ]


def _share(
    _name: str,
    model: Any,
    tokenizer: Any,
    ask: Callable[..., Any],
    *asked: Any,
    attention: bool,
    budget: Budget,
    journal: tuple[Path, Json],
    **how: Any,
) -> Any:
    """What `ask` says, in one of the processes that share its batches."""
    path, inputs = journal
    with sharing(model, path.parent) as ranks:
        with ranks.in_turn():
            noted = Journal(path, inputs, ranks=ranks)
        own = Budget(budget.planned, budget.oom, noted)
        first = (model, tokenizer) if ask is token_values else (model,)
        with noted:
            mlps = find_mlps(model, attention=attention)
            found = ask(*first, mlps, *asked, own, journal=noted, **how)
        budget.tokens = own.tokens
    return found


def _off(neuron: Neuron) -> Neuron:
    layer, site, index = neuron
    return layer, switched(site), index


def _peak(one: Found, values: Values) -> int:
    """The token of the largest value, the first of equal ones."""
    return one.text.peak if one.text.peak is not None else int(values.argmax())


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise RelneuronError("a neuron's value is not finite", "use --dtype float32")
    return short(value)
