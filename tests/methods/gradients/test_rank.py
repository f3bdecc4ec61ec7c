"""`identify` on gradients: the published vectors through files, sets of facts and relations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gradients import FILES, IG, RELEVANCE
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.reading import read_csv
from relneuron.methods.gradients.choices import (
    ConsistencyOptions,
    KnowledgeOptions,
    QueryOptions,
    ShareOptions,
)
from relneuron.methods.gradients.rank import identify_gradients
from relneuron.methods.gradients.scored import FACT_COLUMNS, FACTS
from tests.kit.gradient_studies import gradient_study
from tests.methods.gradients.test_selections import E4, dense

Run = Callable[..., tuple[int, str, str]]
# The vector has an attribution of just 0.2 times the largest, which in a file of float32 is above.
TAU = 0.201


@pytest.fixture
def e4(tmp_path: Path) -> Path:
    """Vector E4: four queries, of two relations."""
    facts = [
        (("r", "s")[number // 2], f"q{number}", [dense(one) for one in prompts])
        for number, prompts in enumerate(E4)
    ]
    return gradient_study(tmp_path / "e4", facts)


def chosen(folder: Path, method: str, options: Any, **more: Any) -> NeuronFile:
    output = folder / more.pop("name", "neurons.json")
    made = identify_gradients(folder, output, options, method=method, quiet=True, **more)
    read = NeuronFile.read(output)
    assert read.sets == made.sets and read.method == method
    return read


def table(folder: Path, name: str = FACTS) -> list[dict[str, str]]:
    return [dict(row) for row in read_csv(folder / name, FACT_COLUMNS)]


def test_queries_of_the_vector(e4: Path) -> None:
    options = QueryOptions(top=2, common=0.3, threshold=TAU, sets="fact")
    found = chosen(e4, "qrnca", options)
    one = {"r/q0": (1, 3), "r/q1": (3, 1), "s/q2": (3, 5), "s/q3": (1, 8)}
    assert {name: [row[:3] for row in rows] for name, rows in found.sets.items()} == {
        name: [(layer, "gate", index)] for name, (layer, index) in one.items()
    }
    scores = [found.sets[name][0][3] for name in one]
    expected = [0.46209812, 0.08786373, 0.45205251, 0.46209812]
    assert scores == pytest.approx(expected, abs=5e-9)
    assert found.selection["how"]["common_neurons"] == 3
    rows = table(e4)
    assert [row["fact"] for row in rows] == list(one)
    assert [row["n_prompts"] for row in rows] == ["3", "3", "3", "3"]
    assert rows[0]["n_union"] == "4" and rows[0]["n_neurons"] == "1"


def test_published_queries_keep_common_neurons(e4: Path) -> None:
    options = QueryOptions(top=2, threshold=TAU, keep_common=True, sets="fact")
    found = chosen(e4, "qrnca", options)
    assert [row[:3] for row in found.sets["r/q1"]] == [(3, "gate", 1), (0, "gate", 4)]


def test_a_relation_has_the_neurons_of_all_of_its_facts(e4: Path) -> None:
    found = chosen(e4, "qrnca", QueryOptions(top=2, threshold=TAU))
    assert [row[:3] for row in found.sets["r"]] == [(1, "gate", 3), (3, "gate", 1)]
    assert found.sets["r"][0][3] == pytest.approx(0.46209812 / 2, abs=5e-9)


def fact(*sets: set[int], width: int = 8, layers: int = 2) -> list[np.ndarray[Any, Any]]:
    """Scores of one prompt each: 1 for the neurons of its set, elsewhere below zero."""
    found = []
    for one in sets:
        values = np.full(layers * width, -0.01)
        values[list(one)] = 1
        found.append(values.reshape(layers, width))
    return found


@pytest.fixture
def e5(tmp_path: Path) -> Path:
    """Vector E5's three sets, a fact with the same set everywhere, and one of another relation."""
    abc = fact({0, 1, 2}, {1, 2, 3}, {2, 4})
    same, other = fact({9, 10}, {9, 10}), fact({2, 12}, {2, 13})
    return gradient_study(tmp_path / "e5", [("r", "a", abc), ("r", "b", same), ("s", "c", other)])


def test_knowledge_neurons_are_in_more_than_their_share(e5: Path) -> None:
    found = chosen(e5, "knowledge_neurons", KnowledgeOptions(sets="fact"))
    names = {name: [row[2] + 8 * row[0] for row in rows] for name, rows in found.sets.items()}
    assert names == {"r/a": [2, 1], "r/b": [9, 10], "s/c": [2]}  # 2 first: its mean is 1
    assert found.sets["r/a"][1][3] == pytest.approx((1 + 1 - 0.01) / 3)
    both = chosen(e5, "knowledge_neurons", KnowledgeOptions(), name="r.json")
    assert [row[:3] for row in both.sets["r"]] == [
        *((0, "gate", 2), (1, "gate", 1), (1, "gate", 2), (0, "gate", 1))
    ]
    assert both.sets["r"][0][3] == pytest.approx(0.5)


def test_negatives_are_really_removed(e5: Path) -> None:
    options = KnowledgeOptions(sets="fact", negative_prompts=9)
    found = chosen(e5, "knowledge_neurons", options)
    assert [row[2] for row in found.sets["r/a"]] == [1]  # 2 is a neuron of s/c
    assert found.sets["s/c"] == []
    assert table(e5)[2]["n_neurons"] == "0"


def test_the_share_is_found_by_steps(e5: Path) -> None:
    found = chosen(e5, "knowledge_neurons", KnowledgeOptions(stepped=True))
    assert found.selection["how"]["in_aim"] and 2 <= found.selection["how"]["mean_size"] <= 5
    # 0.7 leaves {2}, {9, 10}, {2}: 4/3; so does 0.65 and then 2/3 is not below 0.65 any more.
    assert found.selection["how"]["share"] == pytest.approx(0.45)


def test_no_share_in_aim_is_said(tmp_path: Path) -> None:
    folder = gradient_study(tmp_path, [("r", "a", fact(set(range(9)), set(range(9))))])
    with pytest.warns(UserWarning, match="no share gives facts 2 to 5 neurons on average: 0.95"):
        chosen(folder, "knowledge_neurons", KnowledgeOptions(stepped=True))


def test_consistency_and_its_verdict(e5: Path) -> None:
    found = chosen(e5, "query_localization", ConsistencyOptions(cut=0.5, sets="fact"))
    rows = table(e5)
    assert [(float(row["cs1"]), float(row["cs2"])) for row in rows] == [
        (0.2, 0.4),
        (1, 1),
        (1 / 3, 1 / 3),
    ]
    assert [row["consistent"] for row in rows] == ["0", "1", "0"]
    assert (found.selection["how"]["consistent"], found.selection["how"]["inconsistent"]) == (1, 2)
    # 2 is in all three prompts: 0.7 * 1; 1 in two of three; 0.7 * 2/3 - 0.3 * 0.476 = 0.324 > 0.21.
    names = [row[2] for row in found.sets["r/a"]]
    assert names == [2, 1]
    otsu = chosen(e5, "query_localization", ConsistencyOptions(otsu=True), name="o.json")
    assert (
        otsu.selection["how"]["cut"] == pytest.approx(0.4)
        and otsu.selection["how"]["consistent"] == 1
    )
    union = ConsistencyOptions(neurons="union", sets="fact")
    assert len(chosen(e5, "query_localization", union, name="u.json").sets["r/a"]) == 5
    first = ConsistencyOptions(neurons="query", sets="fact")
    query = chosen(e5, "query_localization", first, name="q.json").sets["r/a"]
    assert sorted(row[2] for row in query) == [0, 1, 2]
    assert {FACTS, "o.facts.csv", "u.facts.csv", "q.facts.csv"} <= {p.name for p in e5.iterdir()}


def test_one_prompt_a_fact_has_no_consistency(tmp_path: Path) -> None:
    single = gradient_study(tmp_path / "1", [("r", "a", fact({1})), ("r", "b", fact({2}))])
    with pytest.raises(RelneuronError, match="one prompt: nothing can be consistent"):
        chosen(single, "query_localization", ConsistencyOptions())
    assert not (single / "neurons.json").exists()
    with pytest.warns(UserWarning, match="2 facts have one prompt, so its refined set is its co"):
        chosen(single, "knowledge_neurons", KnowledgeOptions())
    assert [row["cs1"] for row in table(single)] == ["", ""]
    mixed = gradient_study(tmp_path / "2", [("r", "a", fact({1})), ("r", "b", fact({2}, {2}))])
    with pytest.warns(UserWarning, match="1 facts have one prompt, so it has no verdict: r/a"):
        chosen(mixed, "query_localization", ConsistencyOptions())
    assert [row["consistent"] for row in table(mixed)] == ["", "1"]


def test_an_empty_cluster_is_said(tmp_path: Path) -> None:
    none = [np.full((2, 8), -1.0)]
    facts = [("r", "a", none), ("r", "b", fact({1})), ("s", "c", fact({2})), ("s", "d", fact({3}))]
    folder = gradient_study(tmp_path, facts)
    with pytest.warns(UserWarning, match="1 queries have an empty cluster.*: r/a"):
        found = chosen(folder, "qrnca", QueryOptions(sets="fact", common=0.5))
    assert found.sets["r/a"] == [] and len(found.sets["r/b"]) == 1


def test_relevance_by_its_shares(tmp_path: Path) -> None:
    a, b = np.zeros((2, 2, 4))
    a[0], b[0] = [3, 1, -5, 0], [1, 1, 2, 0]
    folder = gradient_study(tmp_path, [("r", "x", [a, a]), ("s", "y", [b])], RELEVANCE)
    found = chosen(folder, "relevance", ShareOptions(top=2))
    assert found.sets == {
        "r": [(0, "gate", 0, 3.0), (0, "gate", 1, 1.0)],
        "s": [(0, "gate", 2, 2.0), (0, "gate", 1, 1.0)],
    }
    assert found.selection["how"] == {
        "site": "product",
        "wanted": 2,
        "specific": 0.5,
        "with_their_share": {"r": 2, "s": 2},
    }
    absolute = chosen(folder, "relevance", ShareOptions(top=1, sums="absolute"), name="a.json")
    assert absolute.sets["r"] == [(0, "gate", 2, 5.0)]
    assert not (folder / FACTS).exists()
    alone = gradient_study(tmp_path / "one", [("r", "x", [a])], RELEVANCE)
    with pytest.raises(RelneuronError, match="one relation, which has all of the relevance"):
        chosen(alone, "relevance", ShareOptions())


def test_a_relation_without_neurons_is_told_why(relneuron: Run, tmp_path: Path) -> None:
    all_over, none = np.array([[2.0, 2, 1, 0]]), np.array([[-1.0, 0, 0, 0]])
    facts = [("r", "x", [all_over]), ("s", "y", [all_over]), ("t", "z", [none])]
    folder = gradient_study(tmp_path, facts, RELEVANCE)
    words = ["identify", folder, "-o", folder / "n.json", "--method", "relevance", "--quiet"]
    code, out, err = relneuron(*words, "--specific", 0.6)
    assert code == 0, err
    assert "r: 0 neurons: none has a share of 0.6 of its relevance there (--specific)\n" in out
    code, out, err = relneuron(*words, "--specific", 0, "--force")
    assert code == 0, err
    assert "s: 1 neurons\nt: 0 neurons: none has any relevance there\n" in out


def test_layers_have_their_own_widths(tmp_path: Path) -> None:
    scores = fact({1, 6}, width=8)
    scores[0][1, 5] = 9.0  # beyond the second layer's width: no neuron
    folder = gradient_study(tmp_path, [("r", "a", scores * 2)], widths=[8, 4])
    found = chosen(folder, "knowledge_neurons", KnowledgeOptions())
    assert [row[:3] for row in found.sets["r"]] == [(0, "gate", 1), (0, "gate", 6)]


def test_the_manifest_knows_what_was_chosen_from_what(e4: Path) -> None:
    chosen(e4, "qrnca", QueryOptions(top=2))
    chosen(e4, "knowledge_neurons", KnowledgeOptions(), name="kn.json")
    stages = Manifest(e4).data["stages"]
    assert stages["identify"]["files"] == ["neurons.json", FACTS]
    assert stages["identify_knowledge_neurons"]["files"] == ["kn.json", f"kn.{FACTS}"]
    assert set(stages["identify"]["reads"]) == {FILES[IG], "prompts.jsonl"}
    (words,) = stages["identify"]["commands"]
    assert words[:5] == ["identify", "STUDY", "-o", "STUDY/neurons.json", "--method"]
    # What another method says of neurons that are chosen in its place goes with them.
    (e4 / "scores.safetensors").write_bytes(b"of another method")
    manifest = Manifest(e4)
    manifest.data["stages"]["identify"]["files"].append("scores.safetensors")
    manifest.save()
    with pytest.raises(RelneuronError, match="neurons.json exists"):
        chosen(e4, "qrnca", QueryOptions())
    chosen(e4, "qrnca", QueryOptions(), force=True)
    assert not (e4 / "scores.safetensors").exists() and (e4 / f"kn.{FACTS}").exists()


def test_what_does_not_fit_is_refused(e4: Path, tmp_path: Path) -> None:
    bad = gradient_study(tmp_path / "nan", [("r", "a", [np.full((1, 3), np.nan)])])
    with pytest.raises(RelneuronError, match="not all finite"):
        chosen(bad, "knowledge_neurons", KnowledgeOptions())
    other = gradient_study(tmp_path / "other", [("r", "a", fact({1}))], digest="another")
    with pytest.raises(RelneuronError, match="is of another model than its folder"):
        chosen(other, "knowledge_neurons", KnowledgeOptions())
    text = (e4 / "prompts.jsonl").read_text().replace("in words 0", "in other words")
    (e4 / "prompts.jsonl").write_text(text)
    with pytest.raises(RelneuronError, match="prompts.jsonl is not the file"):
        chosen(e4, "knowledge_neurons", KnowledgeOptions())
    manifest = Manifest(e4)
    del manifest.data["files"]["prompts.jsonl"]
    manifest.save()
    with pytest.raises(RelneuronError, match="are of other prompts"):
        chosen(e4, "knowledge_neurons", KnowledgeOptions())
    with pytest.raises(RelneuronError, match="only one relation"):
        single = gradient_study(tmp_path / "s", [("r", "a", fact({1}, {1}))])
        chosen(single, "knowledge_neurons", KnowledgeOptions(negative_prompts=1))


def test_the_command(relneuron: Run, e4: Path) -> None:
    words = ["identify", e4, "-o", e4 / "n.json", "--quiet", "--method"]
    code, out, err = relneuron(*words, "qrnca", "--top", 2, "--sets", "fact", "--threshold", TAU)
    assert code == 0, err
    assert "r/q0: 1 neurons" in out and "4 facts, 1 neurons each on average, 0 without" in out
    code, out, err = relneuron(*words, "query_localization", "--otsu", "--force")
    assert code == 0 and "facts are consistent (cs2 > " in out, err
    assert "takes no --otsu" in relneuron(*words, "qrnca", "--otsu")[2]
    assert (
        "only without --stepped"
        in relneuron(*words, "knowledge_neurons", "--stepped", "--share", 0.4)[2]
    )
    assert (
        "no threshold of its own"
        in relneuron(*words, "knowledge_neurons", "--kind", "percentile")[2]
    )
    assert json.loads((e4 / "n.json").read_text())["method"] == "query_localization"
    assert "holds integrated gradients" in relneuron(*words, "relevance")[2]
