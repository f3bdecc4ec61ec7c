"""The gradients of a folder as those who choose by them read them: fact by fact.

`rank.py` calls `read_study`. A fact is what its prompts have in common, relation and subject
(artifact.prompts.fact_name); one sentence's scores are read at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from relneuron.artifact.files import Json, RelneuronError, require, sha256
from relneuron.artifact.gradients import FILES, Gradients, made_by
from relneuron.artifact.journal import progress_bar
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import Shape
from relneuron.artifact.prompts import Prompt, fact_name, read_prompts
from relneuron.methods.gradients.clusters import Scores
from relneuron.methods.gradients.consistency import consistency
from relneuron.methods.gradients.facts import Array, Places

FACTS = "facts.csv"
FACT_COLUMNS = (
    *("relation", "fact", "n_prompts", "n_of_prompt", "n_union", "n_neurons"),
    *("cs1", "cs2", "consistent"),
)


@dataclass
class Fact:
    """A fact, the rows of its prompts, the set of each, and the neurons that were chosen."""

    name: str
    relation: str
    rows: list[int] = field(default_factory=list)
    sets: list[Places] = field(default_factory=list)
    chosen: Scores = field(default_factory=dict)
    consistent: bool | None = None

    def cells(self) -> tuple[object, ...]:
        """The row of facts.csv."""
        scores = ["" if np.isnan(score) else score for score in consistency(self.sets)]
        union = len({place for one in self.sets for place in one.tolist()})
        each = sum(map(len, self.sets)) / len(self.sets)
        is_so = "" if self.consistent is None else int(self.consistent)
        about = self.relation, self.name, len(self.rows), each, union, len(self.chosen)
        return (*about, *scores, is_so)


@dataclass(frozen=True)
class Study:
    """What there is to choose from: the scores, the facts, and the neurons that there are."""

    folder: Path
    model: Json
    gradients: Gradients
    facts: list[Fact]
    there: Places  # (N,) flat places l * F + i
    quiet: bool

    def scores(self, rows: Sequence[int], advance: Callable[[int], object]) -> Array:
        """(k, N) float64 of some sentences."""
        found = []
        for _, values in self.gradients.scores(rows):
            found.append(np.asarray(values, np.float64).reshape(-1)[self.there])
            if not np.isfinite(found[-1]).all():
                raise RelneuronError(
                    f"{self.gradients.path}: its scores are not all finite",
                    "attribute with --dtype float32",
                )
            advance(1)
        return np.stack(found)

    def each_fact(self, do: Callable[[Fact, Array], object]) -> None:
        """Call `do` with every fact and the scores (k, N) of its prompts."""
        n = sum(len(fact.rows) for fact in self.facts)
        with progress_bar(n, "identify", "sentence", self.quiet) as bar:
            for fact in self.facts:
                do(fact, self.scores(fact.rows, bar.update))


def read_study(folder: Path, kind: str, quiet: bool) -> Study:
    """What a folder of `attribute` holds; RelneuronError unless it fits together."""
    path = require(checked(folder / FILES[kind]), made_by(kind))
    gradients = Gradients.read(path, kind)
    prompts = {p.id: p for p in read_prompts(checked(folder / "prompts.jsonl"))}
    model = Manifest(folder).data.get("model")
    if model is None:
        raise RelneuronError(
            f"{folder} has no attribution in its manifest", f"make it: relneuron {made_by(kind)}"
        )
    is_of = gradients.about.get("model") in (None, model.get("digest"))
    shape = int(model["layers"]), int(model["width"])
    if not is_of or shape != (gradients.n_layers, gradients.width):
        raise RelneuronError(
            f"{path} is of another model than its folder",
            f"make it again: relneuron {made_by(kind)} --force",
        )
    strangers = [name for name in gradients.ids if name not in prompts]
    if strangers or gradients.about.get("prompts") != sha256(folder / "prompts.jsonl"):
        raise RelneuronError(
            f"the rows of {path} are of other prompts than those beside it",
            f"make it again: relneuron {made_by(kind)} --force",
        )
    facts = _facts([prompts[name] for name in gradients.ids])
    order = Shape.of(model)
    wide = np.zeros(shape, bool)
    for layer in range(shape[0]):
        wide[layer, : order.width(layer, "gate")] = True
    return Study(folder, model, gradients, facts, np.flatnonzero(wide), quiet)


def _facts(prompts: Sequence[Prompt]) -> list[Fact]:
    """The facts that the rows ask, in order of appearance."""
    found: dict[str, Fact] = {}
    for row, prompt in enumerate(prompts):
        name = fact_name(prompt)
        found.setdefault(name, Fact(name, prompt.relation)).rows.append(row)
    return list(found.values())
