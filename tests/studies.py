"""A small study written file by file, as the stages write theirs: no model is needed.

test_results.py and test_report.py read it.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

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
) -> Path:
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
    for condition, counts in right.items():
        for relation in relations:
            for split in splits:
                for i in range(n_prompts):
                    name, hit = f"{relation}.{split}.{i}", int(i < counts.get(relation, 0))
                    said = prediction if hit else "The"
                    effects.append([condition, relation, split, name, said, hit, -0.5])
                n = min(n_prompts, counts.get(relation, 0))
                accuracy.append([condition, relation, split, n_prompts, n, n / n_prompts])
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
    head = {"schema": "relneuron.study/1", "relneuron": "0.1.0", "model": {"id": model, **shape}}
    (folder / "manifest.json").write_text(json.dumps(head | (manifest or {})), encoding="utf-8")
    return folder
