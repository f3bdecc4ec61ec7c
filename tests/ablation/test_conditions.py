"""What `ablate` compares: sets by size, rank, site and chance, and the prompts each is asked.

What cannot be compared is left out with a notice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.ablation.conditions import (
    PAPER_SIZES,
    default_sizes,
    matched_places,
    plan_conditions,
    read_rankings,
)
from relneuron.ablation.options import ANALYSES, AblateOptions
from relneuron.analyses import run_all
from relneuron.artifact.effects import KINDS, read_conditions, read_effects
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape, top_k
from relneuron.artifact.options import options_of, read
from relneuron.model.ask import Asker
from relneuron.study.settings import DemoOptions, RunOptions
from tests.kit.files import read_rows
from tests.kit.hooked import N_NEURONS, RELATIONS, SHAPE, TOP, Study

SIZES = (1, 5, 40, 100, 256)


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("conditions"))


@pytest.fixture(scope="module")
def everything(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation with every analysis but concepts."""
    folder = tmp_path_factory.mktemp("everything")
    analyses = ("matched", "sizes", "sites", "perplexity")
    splits = ("eva", "eva2")
    study.ablate(folder, splits=splits, analyses=analyses, sizes=SIZES, random_seeds=2)
    return folder


def plan(study: Study, **changes: Any) -> dict[str, Any]:
    sets = {name: Shape.of(SHAPE).places(chosen) for name, chosen in study.sets.items()}
    asked: dict[str, Any] = {
        "sets": sets,
        "rankings": read_rankings(study.folder / "scores.safetensors", sets, SHAPE),
        "concepts": {},
        "gains": {},
        "prompts": [p for p in study.prompts.values() if p.split != "det"],
        "shape": SHAPE,
        "analyses": ("matched", "sizes", "sites"),
        "sizes": SIZES,
        "random_seeds": 3,
    }
    return {a.condition.name: a for a in plan_conditions(**(asked | changes))}


def best(study: Study, relation: str, k: int) -> list[int]:
    """The places of the k best neurons by `top_k`."""
    from safetensors.numpy import load_file

    scores = load_file(study.folder / "scores.safetensors")
    row = sorted(RELATIONS).index(relation)
    chosen = top_k({site: scores[f"ap.{site}"][row] for site in ("gate", "up", "down")}, k)
    return chosen.places.tolist()


# --- which neurons ---------------------------------------------------------------------------


def test_sizes_are_prefixes_of_the_ranking_and_ranges_the_differences(study: Study) -> None:
    planned = plan(study)
    for relation in RELATIONS:
        before: set[int] = set()
        for a, b in zip((0, *SIZES), SIZES, strict=False):
            size = planned[f"{relation}@{b}"]
            now = set(size.places.tolist())
            assert now == set(best(study, relation, b))
            assert len(now) == b
            assert before < now
            assert (size.condition.first, size.condition.last) == (1, b)
            if a:
                between = planned[f"{relation}@{a + 1}-{b}"]
                assert set(between.places.tolist()) == now - before
                assert between.condition.n_neurons == b - a
                assert (between.condition.first, between.condition.last) == (a + 1, b)
            before = now
        assert set(planned[f"{relation}@{TOP}"].places) == set(planned[relation].places)


def test_a_site_set_is_the_best_of_its_site(study: Study) -> None:
    planned = plan(study)
    for relation in RELATIONS:
        ranking = best(study, relation, N_NEURONS)
        for site in ("gate", "up", "down"):
            names = Shape.of(SHAPE).neurons(np.array(ranking))
            inside = [p for p, name in zip(ranking, names, strict=True) if name[1] == site]
            ablation = planned[f"{relation}@{site}"]
            assert ablation.places.tolist() == sorted(inside[:TOP])
            assert ablation.condition.site == site
            assert ablation.condition.n_neurons == TOP


def test_site_places_are_the_sites() -> None:
    order = Shape.of(SHAPE)
    places = {site: set(order.site_places(site).tolist()) for site in ("gate", "up", "down")}
    assert [len(found) for found in places.values()] == [96, 96, 64]
    assert set.union(*places.values()) == set(range(N_NEURONS))
    names = Shape.of(SHAPE).neurons(np.arange(N_NEURONS))
    assert all(p in places[site] for p, (_, site, _) in enumerate(names))
    assert Shape.of(SHAPE).places(names).tolist() == list(range(N_NEURONS))


def cells(places: Any) -> Counter[tuple[int, str]]:
    return Counter(name[:2] for name in Shape.of(SHAPE).neurons(np.asarray(places)))


def test_matched_sets_have_the_counts_of_their_set(study: Study) -> None:
    planned = plan(study)
    for relation in RELATIONS:
        drawn = [tuple(planned[f"{relation}~{seed}"].places.tolist()) for seed in range(3)]
        assert len(set(drawn)) == 3
        for seed, places in enumerate(drawn):
            assert len(set(places)) == TOP
            assert cells(places) == cells(planned[relation].places)
            again = matched_places(planned[relation].places, SHAPE, seed, relation)
            assert tuple(again.tolist()) == places
    # All neurons of a cell leave no choice; no neuron leaves nothing to draw.
    assert matched_places(np.arange(N_NEURONS), SHAPE, 0, "r").tolist() == list(range(N_NEURONS))
    assert matched_places(np.empty(0, np.int64), SHAPE, 0, "r").tolist() == []


def test_random_sets_are_as_large_as_the_largest_set(study: Study) -> None:
    sets = {"likes_fruit": np.arange(7), "lives_in": np.arange(30), "works_as": np.arange(2)}
    planned = plan(study, sets=sets, rankings=sets)
    drawn = [planned[f"random.{seed}"].places.tolist() for seed in range(3)]
    assert [len(set(places)) for places in drawn] == [30] * 3
    assert len(set(map(tuple, drawn))) == 3


def test_default_sizes_are_the_papers_or_in_proportion() -> None:
    assert default_sizes(3000, 835_584) == PAPER_SIZES
    assert len(PAPER_SIZES) == 9
    small = default_sizes(220, 2208)
    assert small == (1, 4, 15, 37, 73, 220, 733, 1467, 2208)
    for set_size in range(1, 2209, 13):
        sizes = default_sizes(set_size, 2208)
        assert sizes[0] >= 1
        assert sizes[-1] <= 2208
        assert set_size in sizes
        assert len(sizes) <= 9
        assert list(sizes) == sorted(set(sizes))


def parse_analyses(text: str) -> Sequence[str]:
    """The analyses that a text of the command line stands for."""
    _, says, kind = options_of(AblateOptions)["analyses"]
    return AblateOptions(analyses=read(says, kind, text)).analyses


def test_analyses_are_parsed() -> None:
    assert parse_analyses("main") == ()
    assert parse_analyses("all") == ANALYSES
    assert parse_analyses(" sites , matched") == ("matched", "sites")
    assert parse_analyses("main,sizes") == ("sizes",)
    assert parse_analyses("gain") == ("gain",)
    assert DemoOptions().analyses == ("gain",)
    assert RunOptions().analyses == ()
    for text in ("", ",", "size", "sizes,all"):
        with pytest.raises(RelneuronError, match="unknown --analyses"):
            parse_analyses(text)


@pytest.mark.parametrize("name", ["clean", "random.0", "works_as@5", "works_as~1"])
def test_two_conditions_of_one_name_are_refused(study: Study, name: str) -> None:
    sets = {n: Shape.of(SHAPE).places(chosen) for n, chosen in study.sets.items()}
    sets[name] = np.arange(3)
    with pytest.raises(RelneuronError, match=f"two conditions are named {name}"):
        plan(study, sets=sets, rankings=sets | {"works_as": np.arange(N_NEURONS)})


def test_sizes_in_disorder_or_twice_are_refused_or_sorted(study: Study) -> None:
    for sizes in ((50, 10), (10, 10, 50)):
        try:
            asked = AblateOptions(sizes=sizes).sizes or ()
        except RelneuronError:
            continue
        ranges = [a for a in plan(study, sizes=asked).values() if a.condition.kind == "range"]
        assert {len(a.places) for a in ranges} == {40}


# --- who is asked what -----------------------------------------------------------------------


def test_every_kind_is_asked_its_prompts(study: Study, everything: Path) -> None:
    conditions = read_conditions(everything / "conditions.csv")
    asked: dict[str, set[str]] = {}
    for row in read_rows(everything / "effects.csv"):
        asked.setdefault(row["condition"], set()).add(row["id"])
    assert list(asked) == list(conditions)
    every = {p.id for p in study.prompts.values() if p.split != "det"}
    eva = {p.id for p in study.prompts.values() if p.split == "eva" and p.language == "en"}
    assert len(eva) < len(every)
    for name, about in conditions.items():
        own = {key for key in eva if study.prompts[key].relation == about.relation}
        if about.kind in ("clean", "set", "random"):
            assert asked[name] == every
        elif about.kind in ("size", "site"):
            assert asked[name] == eva
        else:
            assert about.kind in ("matched", "range")
            assert asked[name] == own
            assert len(own) == 4
    scored = {row["condition"] for row in read_rows(everything / "perplexity.csv")}
    assert scored == {n for n, c in conditions.items() if c.kind in ("clean", "set", "random")}
    kinds = Counter(about.kind for about in conditions.values())
    assert dict(kinds) == {
        "clean": 1,
        "set": 3,
        "random": 2,
        "matched": 6,
        "size": 15,
        "range": 12,
        "site": 9,
    }


def test_equal_neurons_are_asked_once_and_written_for_both(
    study: Study, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects = read_rows(everything / "effects.csv")
    said = {(row["condition"], row["id"]): row for row in effects}
    for relation in RELATIONS:
        twins = [key for key in said if key[0] == f"{relation}@{TOP}"]
        assert len(twins) == 12
        for _, key in twins:
            for column in ("prediction", "correct", "logprob"):
                assert said[f"{relation}@{TOP}", key][column] == said[relation, key][column]
    asked: list[int] = []
    forced = Asker.ask_forced

    def count(self: Asker, questions: Any, rows: Any, *rest: Any) -> Any:
        asked.extend(rows if rest else [])
        return forced(self, questions, rows, *rest)

    monkeypatch.setattr(Asker, "ask_forced", count)
    rows = study.ablate(tmp_path, analyses=("sizes",), sizes=(TOP, N_NEURONS), random_seeds=0)
    # 3 sizes of 40 are the sets; the sets of all neurons are one; ranges differ.
    n_eva, n_all = 12, len({key for _, key in rows})
    assert len(rows) == 4 * n_all + 6 * n_eva + 12
    assert len(asked) == 4 * n_all + n_eva + 12


@pytest.mark.parametrize(
    ("splits", "languages", "main"),
    [
        (("det", "eva2"), ("en", "de"), "eva2"),
        (("eva2", "det", "eva"), ("en", "de"), "eva"),
        (("det",), ("en",), "det"),
        (("eva", "eva2"), ("de",), "eva"),  # nothing says that German is not their own
    ],
)
def test_the_report_reads_the_split_that_was_asked(
    study: Study, tmp_path: Path, splits: Any, languages: Any, main: str
) -> None:
    """What only one split is asked must be of the split that the analyses are of."""
    prompts = [p for p in study.prompts.values() if p.language in languages]
    path = study.write_prompts(tmp_path / "prompts.jsonl", prompts)
    analyses = ("matched", "sizes", "sites")
    asked: dict[str, Any] = {"splits": splits, "analyses": analyses, "sizes": (5, 40)}
    study.ablate(tmp_path / "out", prompts=path, any_set=True, **asked)
    conditions = read_conditions(tmp_path / "out" / "conditions.csv")
    grids = read_effects(tmp_path / "out" / "effects.csv", conditions)
    for name, about in conditions.items():
        found = {split for split, grid in grids.items() if name in grid.conditions}
        assert found == ({main} if about.kind in KINDS[3:] else set(grids)), name
    sets = {name: [(0, "gate", 1)] for name in study.sets}
    tables = run_all(grids, sets, study.prompts, N_NEURONS)
    assert {"sizes", "cumulativity", "sites"} <= tables.keys()
    # Only lives_in is asked in German.
    relations = {"lives_in"} if languages == ("de",) else set(RELATIONS)
    assert set(tables["sizes"].column("relation")) == relations
    matched = tables["accuracy"].where("split", main).column("matched")
    assert np.isfinite(np.array(matched, np.float64)).all()


def left_out(folder: Path) -> list[str]:
    notices = json.loads((folder / "manifest.json").read_text())["fallbacks"]
    return [notice for notice in notices if "left out" in notice]


def test_without_scores_what_they_rank_is_left_out_with_a_notice(
    study: Study, tmp_path: Path
) -> None:
    neurons = study.write_sets(tmp_path / "neurons.json", study.sets)
    analyses = ("sizes", "sites", "perplexity")
    with pytest.warns(UserWarning, match="left out"):
        study.ablate(tmp_path / "out", neurons=neurons, analyses=analyses, sizes=SIZES)
    conditions = read_conditions(tmp_path / "out" / "conditions.csv").values()
    assert {c.last for c in conditions if c.kind == "size"} == {1, 5, 40}
    assert not [c for c in conditions if c.kind == "site"]
    notices = left_out(tmp_path / "out")
    assert [notice.split()[0] for notice in notices] == ["sizes", "sites"]


def test_scores_of_another_ranking_are_no_ranking(study: Study, tmp_path: Path) -> None:
    sets = {name: Shape.of(SHAPE).places(chosen) for name, chosen in study.sets.items()}
    path = study.folder / "scores.safetensors"
    assert {len(r) for r in read_rankings(path, sets, SHAPE).values()} == {N_NEURONS}
    sets["works_as"] = np.append(sets["works_as"][:-1], best(study, "works_as", 99)[-1])
    sets["stranger"] = np.arange(3)
    found = {name: len(ranking) for name, ranking in read_rankings(path, sets, SHAPE).items()}
    assert found == {"likes_fruit": 256, "lives_in": 256, "works_as": TOP, "stranger": 3}


def test_one_size_alone_is_not_left_out(study: Study, tmp_path: Path) -> None:
    study.ablate(tmp_path, analyses=("sizes",), sizes=(100,))
    conditions = read_conditions(tmp_path / "conditions.csv").values()
    assert sum(c.kind == "size" for c in conditions) == 3
    assert left_out(tmp_path) == []


def test_neurons_of_concepts_are_checked_like_the_others(study: Study, tmp_path: Path) -> None:
    neurons = study.write_sets(tmp_path / "neurons.json", study.sets)
    beside = study.write_sets(tmp_path / "concepts" / "neurons.json", {"people": [[0, "up", 3]]})
    rows = study.ablate(tmp_path / "a", neurons=neurons, analyses=("concepts",))
    assert len([key for key in rows if key[0] == "concept:people"]) == 12
    data = json.loads(beside.read_text())
    data["model"]["width"] = 64
    beside.write_text(json.dumps(data))
    with pytest.raises(RelneuronError, match="model of shape"):
        study.ablate(tmp_path / "b", neurons=neurons, analyses=("concepts",))
