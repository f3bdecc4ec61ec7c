"""A small attribution written file by file with numpy.

No model is needed; the tests of the report on an attribution use it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.gains import (
    ATTRIBUTIONS,
    COMPARISON_COLUMNS,
    PROMOTED_COLUMNS,
    Target,
    targets_bytes,
)
from tests.kit.pages import write_csv

RELATIONS = ("capital_of", "color", "month")
L, H, F, HEAD_DIM = 4, 2, 24, 3
METHODS = (
    *("log_prob_gain", "log_prob", "prob_gain", "norm", "coefficient", "reciprocal_rank"),
    *("coefficient_norm", "coefficient_rank"),
)
Rows = list[list[Any]]


def score_rows(rng: np.random.Generator, name: str, r: int, kinds: set[str], top: int) -> Rows:
    """The rows of one sentence: relation r has its own best layer, head and neurons."""
    found: dict[str, list[tuple[tuple[Any, ...], float]]] = {}
    for layer in range(L):
        for kind, mean in (("ffn_layer", 1.0), ("attention_layer", 0.5)):
            score = rng.normal(mean * (layer == r % L + 1), 0.1)
            found.setdefault(kind, []).append(((layer, "", "", ""), score))
        for head in range(H):
            score = rng.normal(0.6 * (layer == 2 and head == r % H), 0.05)
            found.setdefault("head", []).append(((layer, head, "", ""), score))
            for position in range(3):
                at = (layer, head, "", position)
                found.setdefault("position", []).append((at, rng.normal(0, 0.1)))
                for index in range(HEAD_DIM):
                    at = (layer, head, index, position)
                    found.setdefault("attention_neuron", []).append((at, rng.normal(0, 0.05)))
        for index in range(F):
            at = (layer, "", index, "")
            value = rng.normal(0.8 * (layer == 3 and index in (r, 10 + r)), 0.1)
            found.setdefault("ffn_neuron", []).append((at, value))
            if layer < 3:
                query = rng.normal(0.5 * (layer == 1 and index == 5), 0.1)
                found.setdefault("query_ffn_neuron", []).append((at, query))
    for component in range(2 * L + 1):
        at = ("" if component == 0 else (component - 1) // 2, "", component, "")
        found.setdefault("query_layer", []).append((at, rng.normal(0.2 * component, 0.1)))
    rows: Rows = []
    for kind in [kind for kind in found if kind in kinds]:
        best = sorted(found[kind], key=lambda one: -one[1])
        best = best[:top] if "neuron" in kind or kind == "position" else best
        for rank, (at, score) in enumerate(best, 1):
            layer, head, index, position = at
            rows.append(
                [name, kind, layer, head, index, position, f"{np.float32(score):.9g}", rank]
            )
    return rows


def comparison_rows(
    rng: np.random.Generator, relations: Sequence[str], kept: dict[str, int], seeds: int
) -> Rows:
    """Our method costs 60 %, others less the later they come, random neurons nothing."""
    lost = {"clean": 0.0} | {name: 0.6 - 0.07 * i for i, name in enumerate(METHODS)}
    lost |= {f"random.{seed}": 0.002 * seed for seed in range(seeds)}
    lost |= {"value": 0.97, "query": 0.9}
    lost |= {f"random_{name}.{s}": 0.01 for name in ("value", "query") for s in range(seeds)}
    lost |= {f"heads:{name}": 0.3 for name in relations}
    lost |= {f"random_heads.{seed}": 0.01 for seed in range(seeds)}
    rows: Rows = []
    for name, drop in lost.items():
        for relation in ("", *relations):
            own = drop * (0.2 if name.startswith("heads:") and name[6:] != relation else 1)
            mrr, prob, logprob = 0.5 * (1 - own / 2), 0.4 * (1 - own), -1 - own
            row: dict[str, Any] = {"condition": name, "relation": relation, "n": kept[relation]}
            row |= {"mrr": mrr, "prob": prob, "logprob": logprob}
            for key, value, wide in (
                ("mrr", own / 2, 0.02),
                ("prob", own, 0.03),
                ("logprob", own, 0.1),
            ):
                ends = (0.0, 0.0) if name == "clean" else wide * rng.random(2)
                cells = value, value - ends[0], value + ends[1]
                for end, cell in zip(("", "_low", "_high"), cells, strict=True):
                    row[f"{key}_drop{end}"] = cell if kept[relation] else ""
            cells = [row[column] for column in COMPARISON_COLUMNS]
            rows.append([f"{x:.6g}" if isinstance(x, float) else x for x in cells])
    return rows


def write_attribution(
    folder: Path,
    relations: Sequence[str] = RELATIONS,
    *,
    n: int = 6,
    top: int = 60,
    kinds: Sequence[str] = (
        *("ffn_layer", "attention_layer", "head", "position", "ffn_neuron", "attention_neuron"),
        *("query_layer", "query_ffn_neuron"),
    ),
    compare: bool = True,
    seeds: int = 3,
    token: str = " Rome",
    model: str = "a/model",
    inputs: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """A folder as `attribute` writes it; every third sentence is not known."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    targets, rows = [], []
    for r, relation in enumerate(relations):
        for i in range(n):
            name = f"{relation}.{i}"
            several = 1 + (i == 0)
            known = (i % 3 + 1, 0.4, -0.9) if i % 3 < 2 else (40, 0.001, -7.0)
            targets.append(Target(name, relation, token, 7 + r, several, 3, *known, kept=i % 3 < 2))
            rows += score_rows(rng, name, r, set(kinds), top)
    (folder / "targets.csv").write_bytes(targets_bytes(targets))
    write_csv(folder / "attributions.csv", ATTRIBUTIONS, rows)
    # What they raise is at the end that goes with the coefficient's sign.
    promoted = [
        *(
            ["ffn_neuron", 3, "", index, c, share, end, int(acts)]
            + [place, f"{token if acts else 'not'}{place}", place, sign * (5.0 - place)]
            for index in (*range(len(relations)), *range(10, 10 + len(relations)))
            for c, share in [(2.5, 0.0) if index < 10 else (-27.0, 0.75)]
            for end, sign, acts in (("promoted", 1, c > 0), ("suppressed", -1, c < 0))
            for place in range(1, 11)
        )
    ]
    write_csv(folder / "promoted.csv", PROMOTED_COLUMNS, promoted)
    if compare:
        kept = {
            relation: sum(t.kept for t in targets if t.relation == relation)
            for relation in relations
        }
        kept[""] = sum(t.kept for t in targets)
        write_csv(
            folder / "comparison.csv",
            COMPARISON_COLUMNS,
            comparison_rows(rng, relations, kept, seeds),
        )
    asked = {"kinds": list(kinds), "top": top, "compare": compare, "intervene": 10, "key": "gate"}
    head = {
        "schema": "relneuron.study/1",
        "model": {"id": model, "layers": L, "width": F, "hidden": 6},
        "stages": {"attribute": {"inputs": asked | (inputs or {}), "files": []}},
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(head | (manifest or {})), encoding="utf-8")
    return folder
