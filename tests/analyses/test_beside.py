"""The comparison of neurons by average precision with neurons by log-probability gain, in a study.

Its tables against plain loops and by hand; its own small study in the folder attribution/ on a tiny
model trained on its facts: as many neurons, the same bytes however often it is cut short.
"""

from __future__ import annotations

import csv
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from relneuron.analyses.beside import Gains, gain, gain_overlap, products
from relneuron.analyses.page import build
from relneuron.analyses.study import read_scores, read_study
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.neurons import Neuron
from relneuron.report.page import render, write_report
from relneuron.report.tables import label
from relneuron.study.pages import PAGES
from tests.kit.pages import PAYLOADS, Page
from tests.kit.studies import RELATIONS, SETS, write_study

GAIN_SETS: dict[str, list[list[Any]]] = {
    "company_ceo": [[0, "gate", 1, 0.5], [1, "gate", 2, 0.4], [1, "gate", 7, 0.3]],
    "company_hq": [[0, "gate", 5, 0.5], [1, "gate", 3, 0.4], [0, "gate", 0, 0.1]],
}
# Right answers of 4 prompts with the gain set of a relation off; before: 4, 2, 0.
RIGHT = {
    "company_ceo": {"company_ceo": 0, "company_hq": 1, "star_constellation": 0},
    "company_hq": {"company_ceo": 4, "company_hq": 2, "star_constellation": 1},
}


def write_gain_study(
    folder: Path, sets: dict[str, list[list[Any]]] = GAIN_SETS, **options: Any
) -> Path:
    """`write_study` with the conditions of gain, its neurons, and scores of both kinds."""
    names = options.pop("names", {name: name for name in RIGHT})
    more = [
        (
            Condition(f"gain:{names[name]}", "gain", names[name], n_neurons=3),
            {names.get(asked, asked): n for asked, n in right.items()},
        )
        for name, right in RIGHT.items()
    ]
    write_study(folder, more=more, sets=options.pop("own_sets", SETS), **options)
    neurons = json.loads((folder / "neurons.json").read_text(encoding="utf-8"))
    neurons |= {"method": "logprob_gain", "sets": {names[name]: sets[name] for name in sets}}
    (folder / "attribution").mkdir(exist_ok=True)
    (folder / "attribution" / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    return folder


def write_scores(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores of both kinds of two layers of eight neurons, the relations in another order."""
    rng = np.random.default_rng(seed)
    shape = {"gate": 8, "up": 8, "down": 4}
    own = {f"ap.{s}": rng.random((3, 2, n)).astype(np.float32) for s, n in shape.items()}
    by_gain = {"logprob_gain.gate": rng.normal(size=(2, 2, 8)).astype(np.float32)}
    save_file(own, folder / "scores.safetensors", {"relations": json.dumps(RELATIONS)})
    order = json.dumps(["company_hq", "company_ceo"])
    save_file(by_gain, folder / "attribution" / "scores.safetensors", {"relations": order})
    return own | by_gain


# The tables


def test_drops_are_those_of_the_answers_by_hand(tmp_path: Path) -> None:
    study = read_study(write_gain_study(tmp_path))
    rows = {tuple(row[:2]): row for row in study.tables["gain"].rows}
    assert list(rows) == list(product(("company_ceo", "company_hq"), ("ap", "gain")))
    # Neurons, products (a down neuron is none), prompts, right before and after.
    assert rows["company_ceo", "ap"][2:7] == [3, 2, 4, 4, 1]
    assert rows["company_ceo", "gain"][2:7] == [3, 3, 4, 4, 0]
    drops = {pair: float(row[7]) for pair, row in rows.items()}
    assert drops == {
        ("company_ceo", "ap"): 0.75,
        ("company_ceo", "gain"): 1.0,
        ("company_hq", "ap"): 0.5,
        ("company_hq", "gain"): 0.0,
    }
    # Of the others one has no drop: nothing of it is right before.
    assert [float(row[-1]) for row in rows.values()] == [0.0, 0.5, 0.25, 0.0]
    assert [row[10:12] for row in rows.values()] == [[3, 0], [4, 0], [1, 0], [0, 0]]
    # Signs of so many facts that all changed alike: 2 / 2^n.
    assert [float(row[12]) for row in rows.values()] == [0.25, 0.125, 1.0, 1.0]


def test_shared_products_against_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    sites = ("gate", "up", "down")
    sets: dict[str, list[Neuron]] = {}
    gains: dict[str, list[Neuron]] = {}
    for name, n in (("a", 12), ("b", 5), ("none", 0)):
        places = {
            (int(rng.integers(2)), sites[rng.integers(3)], int(rng.integers(8))) for _ in range(n)
        }
        sets[name] = sorted(places)
        gains[name] = [(la, "gate", i) for la in range(2) for i in range(n // 2)]
    table = gain_overlap(sets, Gains(gains, 16, {"a": 0.25}))
    assert table.column("relation") == ["a", "b", "none"]
    for row in table.rows:
        name, by_ap, by_gain, shared, share, expected, correlation, p, _ = row
        own = [
            (layer, index)
            for layer in range(2)
            for index in range(8)
            if (layer, "gate", index) in sets[str(name)] or (layer, "up", index) in sets[str(name)]
        ]
        both = [place for place in own if (place[0], "gate", place[1]) in gains[str(name)]]
        m = len(gains[str(name)])
        assert (by_ap, by_gain, shared) == (len(own), m, len(both))
        assert expected == len(own) * m / 16
        assert correlation == 0.25 if name == "a" else math.isnan(float(correlation))
        if not own or not m:
            assert math.isnan(float(p)) and (m or math.isnan(float(share)))
            continue
        assert float(share) == len(both) / m
        ways = sum(
            math.comb(len(own), k) * math.comb(16 - len(own), m - k)
            for k in range(len(both), min(len(own), m) + 1)
        )
        assert float(p) == pytest.approx(ways / math.comb(16, m), rel=1e-9)


def test_sets_that_are_not_there_have_no_row(tmp_path: Path) -> None:
    grid = read_study(write_gain_study(tmp_path)).grids["eva"]
    assert gain(grid, {}, Gains({}, 16, {})).rows == []
    [only] = gain(grid, {}, Gains({"company_hq": []}, 16, {})).rows[1:]
    assert only[:4] == ["company_hq", "gain", 3, 0]
    assert products([(0, "gate", 1), (0, "up", 1), (0, "down", 2)]) == {(0, 1)}


def test_scores_are_compared_neuron_by_neuron(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    write_gain_study(tmp_path)
    tensors = write_scores(tmp_path)
    found = read_study(tmp_path).gains.correlation
    for name, place in (("company_ceo", 1), ("company_hq", 0)):
        r = RELATIONS.index(name)
        by_ap = [
            max(tensors["ap.gate"][r, la, i], tensors["ap.up"][r, la, i])
            for la in range(2)
            for i in range(8)
        ]
        by_gain = [tensors["logprob_gain.gate"][place, la, i] for la in range(2) for i in range(8)]
        assert found[name] == pytest.approx(float(spearmanr(by_ap, by_gain).statistic), abs=1e-12)
    # Scores of another kind, or without numbers, are none.
    path = tmp_path / "attribution" / "scores.safetensors"
    assert read_scores(path, ("ap.gate",)) == {}
    gains = tensors["logprob_gain.gate"].copy()
    gains[0, 1, 3] = np.nan
    save_file({"logprob_gain.gate": gains}, path, {"relations": '["company_hq", "company_ceo"]'})
    assert set(read_study(tmp_path).gains.correlation) == {"company_ceo"}
    path.write_bytes(b"no tensors")
    with pytest.raises(RelneuronError, match="damaged"):
        read_study(tmp_path)


# The page


def section(html: str) -> str:
    html = html[html.index('<h2 id="gain">') :]
    return " ".join(Page(html[: html.index("</section>")]).text.split())


def test_the_page_says_what_the_tables_say(tmp_path: Path) -> None:
    study = write_gain_study(tmp_path)
    html = write_report(study, study / "report.html", PAGES).read_text(encoding="utf-8")
    text = section(html)
    # Own drops 0.75 and 0.5, 1 and 0; of the others 0 and 0.25, 0.5 and 0.
    assert "relation itself: 62.5 % with its neurons by average precision (AP) off, 50.0 %" in text
    assert "Of the others: 12.5 % and 25.0 %." in text
    # Two products each by AP, three by gain; shared: L0.1 and L1.2, L1.3.
    assert "set 2 products of the MLPs to zero on average, those by gain 3, of which 1.5" in text
    assert "random sets would share 0.375" in text and "Rank correlation" not in text
    assert "<svg" in html[html.index('<h2 id="gain">') :].partition("</section>")[0]
    with (study / "analyses" / "gain.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["relation"], row["method"], float(row["drop"])) for row in rows] == [
        *(("company_ceo", "ap", 0.75), ("company_ceo", "gain", 1.0)),
        *(("company_hq", "ap", 0.5), ("company_hq", "gain", 0.0)),
    ]
    assert (study / "analyses" / "gain_overlap.csv").exists()
    write_scores(study)
    assert "Rank correlation of the two scores, mean:" in section(render(build(study, {})))


def test_names_of_relations_stay_text(tmp_path: Path) -> None:
    pages = []
    for place, text in enumerate(["harmless", *PAYLOADS[::2]]):
        relations = (f"rel_{text}", "company_hq", "star_constellation")
        right = {"clean": dict.fromkeys(relations, 3), relations[0]: dict.fromkeys(relations, 1)}
        names = {"company_ceo": relations[0], "company_hq": "company_hq"}
        sets = {relations[0]: SETS["company_ceo"], "company_hq": SETS["company_hq"]}
        study = write_gain_study(
            tmp_path / str(place), names=names, relations=relations, right=right, own_sets=sets
        )
        pages.append((text, Page(render(build(study, {})))))
    for text, page in pages:
        assert page.tags == pages[0][1].tags
        assert label(text) in page.text


def test_gains_of_another_study_are_not_compared(tmp_path: Path) -> None:
    study = write_gain_study(tmp_path)
    neurons = study / "attribution" / "neurons.json"
    manifest = json.loads((study / "manifest.json").read_text())
    beside = {"attribution/neurons.json": sha256(neurons)}
    asked = {"neurons": sha256(study / "neurons.json"), "beside": beside}
    manifest |= {"stages": {"ablate": {"inputs": asked, "files": []}}, "files": {}}
    (study / "manifest.json").write_text(json.dumps(manifest))
    assert "gain" in read_study(study).tables
    neurons.write_bytes(neurons.read_bytes() + b"\n")
    with pytest.raises(RelneuronError, match="made with other gains than attribution/neurons.json"):
        read_study(study)
    neurons.unlink()
    assert "gain" not in read_study(study).tables


# The study of the gains on a tiny model
