"""What a study's tables say, as arrays: the numbers that report.py writes and figures.py draws.

Pure but for `read_study`, which reads a study directory. NaN stands for what was not measured.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact import (
    SITES,
    Json,
    Neuron,
    NeuronFile,
    Prompt,
    RelneuronError,
    check_neurons,
    read_csv,
    read_prompts,
    require,
)
from relneuron.manifest import Manifest
from relneuron.scores import ranking

Array = NDArray[np.float64]
Key = tuple[str, str, str]  # condition, relation, split

# Each file the report reads, and the command that writes it.
INPUTS = {
    "manifest.json": "run MODEL --facts DIR -o DIR",
    "prompts.jsonl": "prompts FACTS_DIR -o prompts.jsonl",
    "neurons.json": "identify DIR -o neurons.json",
    "significance.csv": "identify DIR -o neurons.json",
    "effects.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
    "accuracy.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
}
# Neurons that come from elsewhere have no such file; a study whose manifest names it must have it.
OPTIONAL = ("significance.csv",)
SIGNIFICANCE = ("p_permutation", "q_value", "ap_low", "ap_high")


class Answer(NamedTuple):
    prediction: str
    correct: bool


class Example(NamedTuple):
    """One prompt, answered by the model as it is and with a set switched off."""

    prompt: Prompt
    before: Answer
    after: Answer


@dataclass(frozen=True)
class Study:
    manifest: Json
    prompts: dict[str, Prompt]
    neurons: NeuronFile
    sets: dict[str, list[Neuron]]  # each neuron once
    significance: dict[str, Array]  # p, q, low, high of each row of neurons.sets: (K, 4)
    accuracy: dict[Key, tuple[int, int]]  # n_correct, n_prompts
    answers: dict[Key, dict[str, Answer]]  # by prompt id; clean and the sets, no random ones

    @property
    def n_neurons(self) -> int:
        return ranking.n_neurons(self.neurons.model)


def read_study(folder: Path) -> Study:
    """Read a study directory; a file whose digest is not the manifest's raises."""
    described = Manifest(folder)
    for name, made_by in INPUTS.items():
        if name not in OPTIONAL or name in described.data["files"]:
            require(folder / name, made_by)
    for name in INPUTS.keys() & described.data["files"].keys():
        described.is_intact(name)
    manifest = described.data
    # A report does not describe itself.
    manifest.get("stages", {}).pop("report", None)
    manifest.get("files", {}).pop("report.html", None)
    prompts = {prompt.id: prompt for prompt in read_prompts(folder / "prompts.jsonl")}
    neurons = NeuronFile.read(folder / "neurons.json")
    accuracy: dict[Key, tuple[int, int]] = {}
    answers: dict[Key, dict[str, Answer]] = defaultdict(dict)
    kept = {"clean", *neurons.sets}
    try:
        sets = {name: check_neurons(found, neurons.model) for name, found in neurons.sets.items()}
        significance = read_significance(folder / "significance.csv", neurons)
        columns = ["condition", "relation", "split", "n_prompts", "n_correct"]
        for row in read_csv(folder / "accuracy.csv", columns):
            key = row["condition"], row["relation"], row["split"]
            accuracy[key] = int(row["n_correct"]), int(row["n_prompts"])
        columns = ["condition", "relation", "split", "id", "prediction", "correct"]
        for row in read_csv(folder / "effects.csv", columns):
            key = row["condition"], row["relation"], row["split"]
            if key[0] in kept:
                prompt = prompts[row["id"]]
                answers[key][prompt.id] = Answer(row["prediction"], bool(int(row["correct"])))
        if "clean" not in {condition for condition, _, _ in accuracy}:
            raise ValueError("accuracy.csv has no row of the condition clean")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RelneuronError(
            f"{folder}: a table is damaged or of another study ({error!r})",
            "run the stages from identify on anew",
        ) from error
    return Study(manifest, prompts, neurons, sets, significance, accuracy, dict(answers))


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
            found[name][place] = [float(row[column] or "nan") for column in SIGNIFICANCE]
    if next(rows, None) is not None:
        raise ValueError(f"{path.name} holds more rows than neurons.json")
    return found


def drop_matrix(before: Array, off: Array) -> Array:
    """(before - off) / before, (R,) and (R, C) -> (R, C); NaN where nothing was right before."""
    base = np.where(before > 0, before, np.nan)[:, None]
    result: Array = (base - off) / base
    return result


class Spread(NamedTuple):
    """Mean, least and greatest of what was measured; NaN if nothing was."""

    mean: float
    low: float
    high: float


def spread(values: Array) -> Spread:
    found = values[np.isfinite(values)]
    if not found.size:
        return Spread(np.nan, np.nan, np.nan)
    return Spread(float(found.mean()), float(found.min()), float(found.max()))


@dataclass(frozen=True)
class Result:
    """Accuracies of one split: R relations, C sets switched off, S random sets."""

    split: str
    relations: list[str]
    sets: list[str]
    n_prompts: NDArray[np.int64]  # (R,)
    before: Array  # (R,)
    off: Array  # (R, C)
    random: Array  # (R, S)

    @property
    def own(self) -> NDArray[np.bool_]:
        """(R, C): where the set is the relation's own."""
        pairs = [[name == relation for name in self.sets] for relation in self.relations]
        return np.array(pairs, dtype=np.bool_).reshape(self.off.shape)

    @property
    def after(self) -> Array:
        """(R,): accuracy with the relation's own set off."""
        result: Array = np.fmax.reduce(np.where(self.own, self.off, np.nan), 1, initial=np.nan)
        return result

    @property
    def drop(self) -> Array:
        return drop_matrix(self.before, self.off)


def split_results(study: Study) -> list[Result]:
    """One result per split, eva first; relations and sets in the order of neurons.json."""
    keys = list(study.accuracy)
    conditions = list(dict.fromkeys(condition for condition, _, _ in keys))
    relations = list(dict.fromkeys(relation for _, relation, _ in keys))
    order = list(study.sets)
    relations.sort(key=lambda name: order.index(name) if name in order else len(order))
    sets = [name for name in order if name in conditions]
    seeds = [name for name in conditions if name.startswith("random.") and name not in sets]
    seeds.sort(key=lambda name: (len(name), name))

    def accuracies(split: str, names: Sequence[str]) -> Array:
        pairs = [[study.accuracy.get((n, r, split), (0, 0)) for n in names] for r in relations]
        counts = np.array(pairs, dtype=np.float64).reshape(len(relations), len(names), 2)
        right, total = counts[..., 0], counts[..., 1]
        result: Array = right / np.where(total > 0, total, np.nan)
        return result

    splits = {split for condition, _, split in keys if condition == "clean"}
    results = []
    for split in sorted(splits, key=lambda s: (not s.startswith("eva"), "." in s, s)):
        n_prompts = [study.accuracy.get(("clean", r, split), (0, 0))[1] for r in relations]
        before, off, random = (accuracies(split, names) for names in (["clean"], sets, seeds))
        results.append(
            Result(split, relations, sets, np.array(n_prompts), before[:, 0], off, random)
        )
    return results


class Headline(NamedTuple):
    """Relative drops of a relation's accuracy: over relations, over pairs, over seeds."""

    own: Spread
    other: Spread
    random: Spread


def headline(result: Result) -> Headline:
    """The three numbers that answer the question; the random range is over the seeds' means."""
    drop, random = result.drop, drop_matrix(result.before, result.random)
    seeds = np.array([spread(column).mean for column in random.T])
    return Headline(
        spread(drop[result.own]),
        spread(drop[~result.own]),
        spread(seeds)._replace(mean=spread(random).mean),
    )


def site_counts(sets: Collection[Sequence[Neuron]], n_layers: int) -> NDArray[np.int64]:
    """Chosen neurons per set, site (gate, up, down) and layer: (R, 3, L)."""
    count = np.zeros((len(sets), len(SITES), n_layers), dtype=np.int64)
    for r, neurons in enumerate(sets):
        for layer, site, _ in neurons:
            count[r, SITES.index(site), layer] += 1
    return count


def shared_neurons(sets: Collection[Sequence[Neuron]]) -> NDArray[np.int64]:
    """How many neurons two sets have in common: (R, R); the diagonal holds the sizes."""
    chosen = [set(neurons) for neurons in sets]
    pairs = [[len(a & b) for b in chosen] for a in chosen]
    return np.array(pairs, dtype=np.int64).reshape(len(chosen), len(chosen))


def answered(study: Study, off: str, relation: str, split: str) -> list[Example]:
    """The prompts of a relation that were asked both as the model is and with `off` off."""
    before = study.answers.get(("clean", relation, split), {})
    after = study.answers.get((off, relation, split), {})
    return [Example(study.prompts[i], before[i], after[i]) for i in before if i in after]


def flips(study: Study, relation: str, split: str) -> tuple[int, int]:
    """Prompts of a relation that its own set turns from right to wrong, and from wrong to right."""
    pairs = [
        (e.before.correct, e.after.correct) for e in answered(study, relation, relation, split)
    ]
    return pairs.count((True, False)), pairs.count((False, True))


def examples(study: Study, result: Result) -> dict[str, list[Example]]:
    """For each set: a prompt of its own relation that it breaks, and one of another that survives.

    The first of each; a set that breaks nothing shows a prompt that stays right, or else any.
    """
    shown = {}
    for c, off in enumerate(result.sets):
        own = answered(study, off, off, result.split)
        own.sort(key=lambda e: (not e.before.correct, e.after.correct))
        others = result.sets[c + 1 :] + result.sets[:c]
        spared = (
            example
            for relation in others
            for example in answered(study, off, relation, result.split)
            if example.before.correct and example.after.correct
        )
        if found := own[:1] + [e for e in [next(spared, None)] if e]:
            shown[off] = found
    return shown
