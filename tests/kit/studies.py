"""Small studies written file by file, as the stages write theirs.

No model is needed; report/test_results.py and the tests of the report use them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relneuron.artifact.effects import Condition, conditions_bytes
from relneuron.artifact.files import sha256

NAN = float("nan")
RELATIONS = ("company_ceo", "company_hq", "star_constellation")
# Right answers of 4 prompts: the first n prompts of a relation are right.
RIGHT = {
    "clean": {"company_ceo": 4, "company_hq": 2, "star_constellation": 0},
    "company_ceo": {"company_ceo": 1, "company_hq": 2, "star_constellation": 0},
    "company_hq": {"company_ceo": 3, "company_hq": 1, "star_constellation": 1},
    "star_constellation": {"company_ceo": 4, "company_hq": 3, "star_constellation": 0},
    "random.0": {"company_ceo": 4, "company_hq": 1, "star_constellation": 0},
    "random.1": {"company_ceo": 3, "company_hq": 2, "star_constellation": 0},
}
SETS = {
    "company_ceo": [[0, "gate", 1, 0.9], [1, "up", 2, 0.8], [1, "down", 0, 0.7]],
    "company_hq": [[0, "gate", 1, 0.95], [1, "up", 3, 0.8], [1, "down", 0, 0.5]],
    "star_constellation": [[1, "gate", 1, 0.9], [1, "gate", 2, 0.8], [0, "up", 0, 0.7]],
}


def write_study(
    folder: Path,
    *,
    relations: tuple[str, ...] = RELATIONS,
    splits: tuple[str, ...] = ("eva",),
    right: dict[str, dict[str, int]] = RIGHT,
    sets: dict[str, list[list[Any]]] = SETS,
    text: str = "The CEO of {} is? Answer:",
    prediction: str = "Tim",
    model: str = "a/model",
    manifest: dict[str, Any] | None = None,
    n_prompts: int = 4,
    more: Sequence[tuple[Condition, dict[str, int]]] = (),
) -> Path:
    """`right`: right answers by condition and relation, the first prompts of each are right.

    `more`: conditions of other kinds than clean, set and random, asked of the relations they name
    in the split eva; with them comes a conditions.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, effects, accuracy = [], [], []
    for relation in relations:
        for split in ("det", *splits):
            base, _, language = split.partition(".")
            for i in range(n_prompts):
                name = f"{relation}.{split}.{i}"
                prompts.append(
                    {"id": name, "relation": relation, "split": base, "template": text}
                    | {"language": language or "en", "subject": f"S{i}", "object": "Tim Cook"}
                    | {"prompt": text.replace("{}", f"S{i}")}
                )
    asked = [(name, counts, relations, splits) for name, counts in right.items()]
    asked += [(about.name, counts, tuple(counts), ("eva",)) for about, counts in more]
    for condition, counts, some, where in asked:
        for relation in some:
            for split in where:
                for i in range(n_prompts):
                    name, hit = f"{relation}.{split}.{i}", int(i < counts.get(relation, 0))
                    said = prediction if hit else "The"
                    effects.append([condition, relation, split, name, said, hit, -0.5 - i / 8])
                n = min(n_prompts, counts.get(relation, 0))
                accuracy.append([condition, relation, split, n_prompts, n, n / n_prompts])
    if more:
        known = [condition_of(name) for name in right] + [about for about, _ in more]
        (folder / "conditions.csv").write_bytes(conditions_bytes(known))
    tables = {
        "effects.csv": (
            ["condition", "relation", "split", "id", "prediction", "correct", "logprob"],
            effects,
        ),
        "accuracy.csv": (
            ["condition", "relation", "split", "n_prompts", "n_correct", "accuracy"],
            accuracy,
        ),
    }
    for name, (columns, rows) in tables.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    shape = {"layers": 2, "width": 8, "hidden": 4}
    neurons = {
        "format": "relneuron.neurons/1",
        "model": {"id": model, **shape},
        "method": "ap",
        "selection": {name: {"positives": 3, "ties_at_cut": 2, "perfect": 0} for name in sets},
        "sets": sets,
    }
    (folder / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    stages = dict((manifest or {}).get("stages", {}))
    if "identify" in stages:
        # `ablate` came after it, and had these neurons.
        asked = {"neurons": sha256(folder / "neurons.json")}
        stages.setdefault("ablate", {"inputs": asked, "files": []})
        manifest = {**(manifest or {}), "stages": stages}
    head = {"schema": "relneuron.study/1", "relneuron": "0.1.0", "model": {"id": model, **shape}}
    (folder / "manifest.json").write_text(json.dumps(head | (manifest or {})), encoding="utf-8")
    return folder


def condition_of(name: str) -> Condition:
    """The condition of a name in `right`."""
    if name == "clean":
        return Condition(name, "clean")
    if name.startswith("random."):
        return Condition(name, "random", seed=int(name[7:]), n_neurons=3)
    return Condition(name, "set", name, n_neurons=3)


def write_whole_study(
    folder: Path, *, concept: str = "person", relations: tuple[str, ...] = RELATIONS, **options: Any
) -> Path:
    """`write_study` with every analysis; each relation's numbers are the same.

    Right answers to its own 4 prompts: best neuron off 3, best three off 1, ranks 2 and 3 off 2;
    gate 2, up 4, down 0; matched sets 3 and 4; concept 2. To the others': 4 or, best three off, 3.
    """
    more = []
    for name in relations:
        others = {other: 4 for other in relations if other != name}
        for last, own, rest in ((1, 3, 4), (3, 1, 3)):
            about = Condition(f"{name}@{last}", "size", name, None, 1, last, "", last)
            more.append((about, {name: own} | dict.fromkeys(others, rest)))
        more.append((Condition(f"{name}@2-3", "range", name, None, 2, 3, "", 2), {name: 2}))
        for site, own in (("gate", 2), ("up", 4), ("down", 0)):
            about = Condition(f"{name}@{site}", "site", name, site=site, n_neurons=3)
            more.append((about, {name: own} | others))
        for seed, own in enumerate((3, 4)):
            about = Condition(f"{name}~{seed}", "matched", name, seed=seed, n_neurons=3)
            more.append((about, {name: own}))
    about = Condition(f"concept:{concept}", "concept", concept, n_neurons=2)
    more.append((about, dict.fromkeys(relations, 2)))
    study = write_study(folder, relations=relations, more=more, **options)
    neurons = json.loads((study / "neurons.json").read_text(encoding="utf-8"))
    neurons["sets"] = {concept: [[0, "gate", 1, 0.9], [1, "up", 7, 0.8]]}
    (study / "concepts").mkdir(exist_ok=True)
    (study / "concepts" / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    with (study / "perplexity.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["condition", "relation", "id", "n_tokens", "nll"])
        for name in relations:
            for condition, per_token in (("clean", 2.0), (name, 2.5), ("random.0", 2.0)):
                for i in range(6):
                    sentence = f"{name}.neutral.{i}"
                    rows.writerow([condition, name, sentence, 8, 8 * (per_token + i / 10)])
    return study
