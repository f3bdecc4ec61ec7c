"""A study directory as the report needs it: its files read, held to each other, and analysed.

`report` calls `read_study`; nothing here needs a model.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from relneuron.analyses import NO_GAINS, Gains, SentenceRow, read_perplexity, run_all
from relneuron.analyses.outcomes import filled_sets
from relneuron.analyses.uncertainty import spearman
from relneuron.artifact.effects import (
    NOT_ASKED,
    Condition,
    Grid,
    fact_numbers,
    read_conditions,
    read_effects,
    split_order,
)
from relneuron.artifact.files import Json, RelneuronError, require, sha256
from relneuron.artifact.neurons import Neuron, NeuronFile, Shape, check_neurons
from relneuron.artifact.prompts import Prompt, read_prompts
from relneuron.artifact.reading import open_tensors, read_csv
from relneuron.report.page import Answer, Example, PageKind, opened
from relneuron.report.tables import Array, Table

_RUN, _ABLATE = "run MODEL --facts DIR -o DIR", "ablate MODEL neurons.json prompts.jsonl -o"
PAGE = PageKind(
    "study",
    reads={
        "manifest.json": _RUN,
        "prompts.jsonl": "prompts FACTS_DIR -o prompts.jsonl",
        "neurons.json": "identify DIR -o neurons.json",
        "significance.csv": "identify DIR -o neurons.json",
        "effects.csv": f"{_ABLATE} effects.csv",
        "effects.parquet": f"{_ABLATE} effects.parquet",
        "accuracy.csv": f"{_ABLATE} effects.csv",
        "conditions.csv": f"{_ABLATE} effects.csv",
        "perplexity.csv": f"{_ABLATE} effects.csv",
        "frequency.csv": "no command, but by counting documents: id, documents",
        "concepts/neurons.json": f"{_RUN} --analyses concepts",
        "attribution/neurons.json": f"{_RUN} --analyses gain",
        "attribution/scores.safetensors": f"{_RUN} --analyses gain",
        "scores.safetensors": "identify DIR -o neurons.json",
    },
    needs=("manifest.json", "prompts.jsonl", "neurons.json", "accuracy.csv"),
    marks=("effects.csv", "effects.parquet"),
    hints=("prompts.jsonl",),
    again="run the stages from identify on again",
    build="relneuron.analyses.page:build",
)
ACCURACY = ("condition", "relation", "split", "n_prompts", "n_correct")
GAIN_SCORES = "logprob_gain.gate"
SIGNIFICANCE = ("p_permutation", "q_value", "ap_low", "ap_high")


@dataclass(frozen=True)
class Study:
    manifest: Json
    prompts: dict[str, Prompt]
    neurons: NeuronFile
    sets: dict[str, list[Neuron]]  # each neuron once
    significance: dict[str, Array]  # p, q, low, high of each row of neurons.sets: (K, 4)
    grids: dict[str, Grid]  # by split, the main one first
    concept_sets: dict[str, list[Neuron]]
    gains: Gains
    sentences: list[SentenceRow]
    frequency: dict[str, float]  # by prompt id: documents that name its fact

    @property
    def n_neurons(self) -> int:
        return Shape.of(self.neurons.model).total

    @property
    def main(self) -> Grid:
        """The split that all analyses are of but `accuracy`."""
        return next(iter(self.grids.values()))

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Every analysis that the study has data for."""
        return run_all(
            self.grids,
            self.sets,
            self.prompts,
            self.n_neurons,
            concept_sets=self.concept_sets,
            gains=self.gains,
            sentences=self.sentences,
            frequency=self.frequency,
        )


def read_study(folder: Path) -> Study:
    """Read a study directory; a file whose digest is not the manifest's raises."""
    with opened(folder, PAGE) as manifest:
        effects = effects_file(folder, manifest)
        require(effects, PAGE.reads[effects.name])
        check_neurons_of(effects, manifest)
        prompts = {prompt.id: prompt for prompt in read_prompts(folder / "prompts.jsonl")}
        neurons = NeuronFile.read(folder / "neurons.json")
        sentences = folder / "perplexity.csv"
        sets = _neurons_once(neurons)
        significance = read_significance(folder / "significance.csv", neurons)
        grids = read_effects(effects, _conditions(folder, sets))
        grids = {split: grids[split] for split in sorted(grids, key=split_order)}
        check_effects(folder / "accuracy.csv", grids, prompts)
        for grid in grids.values():
            grid.facts = fact_numbers(grid.ids, prompts)
        return Study(
            manifest,
            prompts,
            neurons,
            sets,
            significance,
            grids,
            _sets_beside(effects, manifest, grids, "concept", "concepts/neurons.json"),
            _gains(effects, manifest, grids, neurons),
            read_perplexity(sentences) if sentences.exists() else [],
            _frequency(folder / "frequency.csv"),
        )


def _neurons_once(neurons: NeuronFile) -> dict[str, list[Neuron]]:
    return {name: check_neurons(found, neurons.model) for name, found in neurons.sets.items()}


def effects_file(folder: Path, manifest: Json) -> Path:
    """What the last `ablate` wrote: effects.csv or effects.parquet; the first if nobody says."""
    made = manifest["stages"].get("ablate", {}).get("files", ())
    names = ("effects.csv", "effects.parquet")
    known = [name for name in names if name in made]
    there = [name for name in names if (folder / name).is_file()]
    return folder / [*known, *there, *names][0]


def _asked_of(manifest: Json) -> Json:
    """The inputs of `ablate`, if the manifest has them."""
    inputs: Json = manifest["stages"].get("ablate", {}).get("inputs", {})
    return inputs


def _other(effects: Path, what: str) -> RelneuronError:
    read = f"{effects.parent / 'neurons.json'} {effects.parent / 'prompts.jsonl'}"
    return RelneuronError(
        f"{effects} was made with other {what}",
        f"make it again: relneuron ablate MODEL {read} -o {effects} --force",
    )


def check_neurons_of(effects: Path, manifest: Json) -> None:
    """Raise unless effects are those of the neurons.json beside them, as far as is known.

    A new `identify` makes the manifest forget the `ablate` before it.
    """
    known = _asked_of(manifest).get("neurons")
    if known is None and "identify" not in manifest["stages"]:
        return
    if known != sha256(effects.parent / "neurons.json"):
        raise _other(effects, "neurons than neurons.json has")


def _sets_beside(
    effects: Path, manifest: Json, grids: dict[str, Grid], kind: str, name: str
) -> dict[str, list[Neuron]]:
    """The sets of a kind that were switched off; those of an earlier study may lie there too."""
    path = effects.parent / name
    asked = any(grid.of_kind(kind) for grid in grids.values())
    if not asked or not path.exists():
        return {}
    beside = _asked_of(manifest).get("beside")
    if beside is not None and beside.get(name) != sha256(path):
        raise _other(effects, f"{kind}s than {name} has")
    return _neurons_once(NeuronFile.read(path))


def _gains(effects: Path, manifest: Json, grids: dict[str, Grid], neurons: NeuronFile) -> Gains:
    """The sets by log-probability gain, and how their scores go with those of the own sets."""
    sets = _sets_beside(effects, manifest, grids, "gain", "attribution/neurons.json")
    if not sets or neurons.method != "ap":  # else there is nothing to compare with
        return NO_GAINS
    n_products = int(neurons.model["layers"]) * int(neurons.model["width"])
    folder = effects.parent / "attribution"
    by_ap = read_scores(effects.parent / "scores.safetensors", ("ap.gate", "ap.up"))
    by_gain = read_scores(folder / "scores.safetensors", (GAIN_SCORES,))
    both = [name for name in sets if name in by_ap and name in by_gain]
    correlation = {name: spearman(by_ap[name], by_gain[name])[0] for name in both}
    return Gains(sets, n_products, correlation)


def read_scores(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Each relation's scores of all products, (L * F,): the largest of the tensors `names`.

    A relation without scores is left out, and all are where the file or a tensor is not there.
    """
    if not path.exists():
        return {}
    with open_tensors(path, "identify DIR -o DIR/neurons.json") as file:
        if not set(names) <= set(file.names):
            return {}
        relations = file.names_of("relations")
        shape = (len(relations), None, None)
        found = np.maximum.reduce([file.get(name, shape) for name in names])
    flat = found.reshape(len(found), -1).astype(np.float64)
    pairs = zip(relations, flat, strict=True)
    return {name: scores for name, scores in pairs if np.isfinite(scores).all()}


def _frequency(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    return {row["id"]: row.finite("documents") for row in read_csv(path, ("id", "documents"))}


def _conditions(folder: Path, sets: dict[str, list[Neuron]]) -> dict[str, Condition]:
    """conditions.csv; a study without one has only sets, random sets and `clean`, told by name."""
    path = folder / "conditions.csv"
    if path.exists():
        return read_conditions(path)
    names = dict.fromkeys(row["condition"] for row in read_csv(folder / "accuracy.csv", ACCURACY))
    return {name: _condition(name, sets) for name in names}


def _condition(name: str, sets: dict[str, list[Neuron]]) -> Condition:
    if name == "clean":
        return Condition(name, "clean")
    if name.startswith("random.") and name not in sets:
        size = max(map(len, sets.values()), default=0)
        return Condition(name, "random", seed=int(name.removeprefix("random.")), n_neurons=size)
    return Condition(name, "set", name, n_neurons=len(sets.get(name, ())))


def check_effects(accuracy: Path, grids: dict[str, Grid], prompts: dict[str, Prompt]) -> None:
    """Raise unless effects are of these prompts, and accuracy.csv counts just them."""
    if not grids:
        raise ValueError("effects.csv has no answer of the model as it is")
    for grid in grids.values():
        if unknown := set(grid.ids) - prompts.keys():
            raise ValueError(f"prompts.jsonl has no {min(unknown)}")
    known = {(grid.split, name) for grid in grids.values() for name in grid.relations}
    for row in read_csv(accuracy, ACCURACY):
        condition, relation, split = (row[name] for name in ACCURACY[:3])
        if (split, relation) not in known:
            raise KeyError((split, relation))
        grid = grids[split]
        correct = grid.correct[condition][grid.rows(relation)]
        counted = (correct != NOT_ASKED).sum(), (correct == 1).sum()
        if counted != (row.whole("n_prompts"), row.whole("n_correct")):
            raise ValueError(f"accuracy.csv counts {condition}, {relation}, {split} otherwise")


def read_significance(path: Path, neurons: NeuronFile) -> dict[str, Array]:
    """p, q, low and high of each row of neurons.json, per set (K, 4); NaN for what is not there."""
    found: dict[str, Array] = {
        name: np.full((len(rows), len(SIGNIFICANCE)), np.nan) for name, rows in neurons.sets.items()
    }
    if not path.exists():
        return found
    rows = read_csv(path, ("relation", "layer", "site", "index", *SIGNIFICANCE))
    for name, chosen in neurons.sets.items():
        for place, (layer, site, index, _) in enumerate(chosen):
            row = next(rows, None)
            neuron = [name, str(layer), site, str(index)]
            if row is None or [row[c] for c in ("relation", "layer", "site", "index")] != neuron:
                raise ValueError(f"{path.name} does not hold the rows of neurons.json")
            found[name][place] = [row.real(column) for column in SIGNIFICANCE]
    if next(rows, None) is not None:
        raise ValueError(f"{path.name} holds more rows than neurons.json")
    return found


# Answers

MOST_EXAMPLES = 200  # sets whose answers a page shows


def answered(study: Study, off: str, relation: str) -> Iterator[Example]:
    """The prompts of a relation that were asked both as the model is and with `off` off."""
    grid = study.main
    rows = grid.rows(relation)
    for i in rows[grid.correct[off][rows] != NOT_ASKED]:
        before, after = (
            Answer(grid.prediction[name][i], bool(grid.correct[name][i])) for name in ("clean", off)
        )
        yield Example(study.prompts[grid.ids[i]], before, after)


def examples(study: Study) -> dict[str, list[Example]]:
    """For each set: a prompt of its own relation that it breaks, and one of another that survives.

    The first of each; a set that breaks nothing shows a prompt that stays right, or else any.
    """
    shown = {}
    sets, asked = filled_sets(study.main), set(study.main.relations)
    # Where there are too many, those of the relations that were asked are shown first.
    names = {*sorted(sets, key=lambda name: name not in asked)[:MOST_EXAMPLES]}
    known = [(place, name) for place, name in enumerate(sets) if name in asked]
    places = [place for place, _ in known]
    for place, (name, off) in enumerate(sets.items()):
        if name not in names:
            continue
        own = sorted(
            answered(study, off, name), key=lambda e: (not e.before.correct, e.after.correct)
        )
        # The relations of the sets behind it, then those of the sets before it.
        cut = bisect(places, place)
        others = [other for _, other in known[cut:] + known[:cut] if other != name]
        spared = (
            example
            for relation in others
            for example in answered(study, off, relation)
            if example.before.correct and example.after.correct
        )
        if found := own[:1] + [e for e in [next(spared, None)] if e]:
            shown[name] = found
    return shown
