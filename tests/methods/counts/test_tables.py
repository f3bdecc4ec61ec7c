"""The report's page on a corpus study: every number against a plain computation from the files.

The study is that of kit/corpus_studies.py; test_page.py has what a page may hold.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import false_discovery_control, wilcoxon

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import sha256
from relneuron.artifact.manifest import Manifest
from relneuron.methods.counts.page import build, page
from relneuron.methods.counts.study import read_group_study
from relneuron.methods.counts.tables import group_tables
from relneuron.report.page import render, write_report
from relneuron.report.tables import amount
from relneuron.study.pages import PAGES
from tests.kit.corpus_studies import GROUPS, entropies, kept, sets_of, write_corpus_study
from tests.kit.counted import rank_counts
from tests.kit.pages import Page, ids, rows_of, tables_of, text_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noted = {"count": {"inputs": {"threshold": 0.0, "sites": ["act"]}, "files": []}}
    noted["count"]["notes"] = {"dropped_tokens": {"en": 1200, "zh": 34}}
    return write_corpus_study(
        tmp_path_factory.mktemp("corpus") / "study", manifest={"stages": noted}
    )


@pytest.fixture(scope="module")
def html(study: Path) -> str:
    return render(build(study, {}))


# Numbers


def test_the_answer_and_the_tiles(study: Path, html: str) -> None:
    counts = Counts.read(study / "counts.safetensors")
    sets = sets_of(study)
    chosen = set().union(*sets.values())
    several = [n for n in chosen if sum(n in some for some in sets.values()) > 1]
    assert len(chosen) == 30 and several
    nll = {(row["mask"], row["group"]): float(row["nll"]) for row in rows_of(study / "nll.csv")}
    rise = {(m, g): value - nll["clean", g] for (m, g), value in nll.items() if m != "clean"}
    own = np.mean([value for (m, g), value in rise.items() if m == g])
    others = np.mean([value for (m, g), value in rise.items() if m != g])
    assert 0.9 < own < 1.5 and abs(others) < 0.02
    said = f"rises by {abs(others):.2g}" if others > 0 else f"falls by {abs(others):.2g} nats"
    said = said.replace("rises ", "")
    text = text_of(html)
    assert (
        f"3 groups, {counts.tokens.sum() / 1e6:.2f} million tokens: 30 of 200 neurons (15.00 %) "
        "are specific to a group; without a group's own neurons the NLL of its text rises by "
        f"{own:.2f} nats, that of the other groups {said}." in text
    )
    tiles = html[html.index('<ul class="tiles">') :]
    tiles = " ".join(Page(tiles[: tiles.index("</ul>")]).text.split())
    sizes = sorted(len(some) for some in sets.values())
    assert f"neurons chosen30{sizes[0]} to {sizes[-1]} a group" in tiles
    assert f"in more than one group{len(several)}{100 * len(several) / 30:.1f} %" in tiles
    assert f"rise of its own text, nats{own:.2f}" in tiles
    # A log-probability is never called a perplexity.
    rows = tables_of(html)["clean.csv"]
    for row in rows:
        assert math.isclose(float(row["perplexity"]), math.exp(nll["clean", row["group"]]))
        assert float(row["nll"]) == nll["clean", row["group"]]


def test_large_numbers_of_tokens_are_short() -> None:
    written = {
        0: "0",
        999_999: "999,999",
        12_345_678: "12.3 million",
        999_999_999: "1,000 million",
        7 * 10**9: "7.00 billion",
        2 * 10**12: "2,000 billion",
    }
    assert {n: amount(n).replace("\xa0", " ") for n in written} == written


def test_the_histogram_counts_every_neuron_once(study: Path, html: str) -> None:
    counts = Counts.read(study / "counts.safetensors")
    p = counts.arrays["count.act"] / counts.tokens[:, None, None]
    entropy = entropies(p)
    selection = json.loads((study / "neurons.json").read_text(encoding="utf-8"))["selection"]
    above = (p > selection["threshold"]).any(axis=0)
    chosen = {(layer, index) for some in sets_of(study).values() for layer, _, index in some}
    rows = tables_of(html)["entropy.csv"]
    assert len(rows) == 60 and float(rows[-1]["to"]) == math.log(3)
    expected = np.zeros((60, 3), int)
    for layer, index in np.ndindex(entropy.shape):
        place = min(59, int(entropy[layer, index] / math.log(3) * 60))
        expected[place] += [1, above[layer, index], (layer, index) in chosen]
    found = [[int(row[name]) for name in ("neurons", "candidates", "chosen")] for row in rows]
    assert (
        np.abs(np.array(found) - expected).sum() <= 2
    )  # a value on an edge may fall on either side
    assert np.array(found).sum(axis=0).tolist() == [200, above.sum(), 30]
    text = text_of(html, "entropy")
    assert f"{200 - above.sum()} of 200 neurons" in text
    cut = max(entropy[place] for place in chosen)
    assert f"entropies up to {cut:.3g} nats" in text
    for mark in (f"cut {cut:.3g}", "ln 3 = 1.10"):
        assert f">{mark}</text>" in html


def test_layers_and_overlaps_are_those_of_the_sets(study: Path, html: str) -> None:
    sets, tables = sets_of(study), tables_of(html)
    for row in tables["layers.csv"]:
        layers = [layer for layer, _, _ in sets[row["group"]]]
        assert [int(row[f"layer_{i}"]) for i in range(4)] == [layers.count(i) for i in range(4)]
        assert int(row["all_layers"]) == len(layers)
    assert len(tables["overlap.csv"]) == 9
    for row in tables["overlap.csv"]:
        a, b = set(sets[row["group"]]), set(sets[row["other"]])
        assert int(row["shared"]) == len(a & b)
        assert math.isclose(float(row["jaccard"]), len(a & b) / len(a | b))
        if row["group"] != row["other"]:
            assert math.isclose(float(row["expected"]), len(a) * len(b) / 200)
    times = [sum(n in some for some in sets.values()) for n in set().union(*sets.values())]
    found = {int(row["n_groups"]): int(row["n_neurons"]) for row in tables["multiplicity.csv"]}
    assert found == {n: times.count(n) for n in range(1, max(times) + 1)}
    single = f"{times.count(1)} of 30 chosen neurons ({100 * times.count(1) / 30:.1f} %)"
    assert f"{single} are in one group only" in text_of(html, "overlap")


def test_rises_are_paired_by_window_and_tested_over_the_matrix(study: Path, html: str) -> None:
    windows: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows_of(study / "nll_windows.csv"):
        windows.setdefault((row["mask"], row["group"]), {})[row["window"]] = float(row["nll"])
    tested = [(mask, group) for mask, group in windows if mask != "clean"]
    differences = {
        (mask, group): np.array([v - windows["clean", group][w] for w, v in found.items()])
        for (mask, group), found in windows.items()
    }
    p = [wilcoxon(differences[key]).pvalue for key in tested]
    q = dict(zip(tested, false_discovery_control(p), strict=True))
    rows = {(row["mask"], row["group"]): row for row in tables_of(html)["nll.csv"]}
    assert rows.keys() == windows.keys()
    for key, row in rows.items():
        if key[0] == "clean":
            assert row["rise"] == row["q_value"] == ""
            continue
        d = differences[key]
        assert math.isclose(float(row["rise"]), sum(d) / 12, rel_tol=1e-9)
        error = math.sqrt(sum((d - sum(d) / 12) ** 2) / 11 / 12)
        assert math.isclose(float(row["rise_se"]), error, rel_tol=1e-9)
        assert math.isclose(float(row["q_value"]), q[key], rel_tol=1e-9)
    # The cells that cannot be due to chance are bold, and no other.
    svg = html[html.index('aria-label="Rise of the NLL of each text under each mask"') :]
    written = re.findall(
        r'<text style="([^"]*)"[^>]*>([+−][^<]*)</text>', svg[: svg.index("</svg>")]
    )
    bold = sorted(text for style, text in written if "700" in style or "bold" in style)
    sure = [f"{differences[key].mean():+.3f}".replace("-", "−") for key in tested if q[key] <= 0.05]
    assert bold == sorted(sure) and 3 <= len(sure) < 9
    own = [key for key in tested if key[0] == key[1]]
    up = sum(q[key] <= 0.05 and differences[key].mean() > 0 for key in own)
    assert up == 3
    assert f"of 3 cells {up} up and 0 down beyond chance" in text_of(html, "nll")
    # Own text against the others, one row a set.
    for row in tables_of(html)["rises.csv"]:
        others = [differences[k].mean() for k in tested if k[0] == row["set"] != k[1]]
        assert math.isclose(float(row["others"]), np.mean(others), rel_tol=1e-9)
        assert math.isclose(float(row["own"]), differences[row["set"], row["set"]].mean())
        assert math.isclose(float(row["others_low"]), min(others))


def test_neurons_with_their_probability_in_each_group(study: Path, html: str) -> None:
    counts = Counts.read(study / "counts.safetensors")
    data = json.loads((study / "neurons.json").read_text(encoding="utf-8"))["sets"]
    tables = tables_of(html)
    for place, (name, chosen) in enumerate(data.items(), 1):
        rows = tables[f"neurons.{place:02d}.csv"]
        assert [int(row["rank"]) for row in rows] == list(range(1, len(chosen) + 1))
        for row, (layer, site, index, score) in zip(rows, chosen, strict=True):
            assert row["neuron"] == f"L{layer}.{site}.{index}" and float(row["score"]) == score
            for g, group in enumerate(GROUPS):
                p = counts.arrays["count.act"][g, layer, index] / counts.tokens[g]
                assert math.isclose(float(row[f"p({group})"]), p, rel_tol=1e-5)
        assert f"best of “{name}”" in text_of(html, "neurons")


def test_the_groups_with_their_tokens(study: Path, html: str) -> None:
    counts, sets = Counts.read(study / "counts.safetensors"), sets_of(study)
    rows = tables_of(html)["groups.csv"]
    assert [row["group"] for row in rows] == list(GROUPS)
    assert [int(row["tokens"]) for row in rows] == counts.tokens.tolist()
    assert [row["dropped_tokens"] for row in rows] == ["1200", "34", ""]
    assert [int(row["neurons"]) for row in rows] == [len(sets[name]) for name in GROUPS]
    text = text_of(html, "counted")
    assert "Site act, active above 0." in text and "1,234 tokens of windows" in text


def test_long_sets_show_their_best_and_the_page_holds_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relneuron.methods.counts.page.MOST_CELLS", 0)
    write_corpus_study(tmp_path, top=80)
    page = write_report(tmp_path, tmp_path / "report.html", PAGES).read_text(encoding="utf-8")
    sizes = {name: len(chosen) for name, chosen in sets_of(tmp_path).items()}
    assert max(sizes.values()) > 10
    assert len(tables_of(page)["neurons.01.csv"]) == 10
    everything = rows_of(tmp_path / "analyses" / "neurons.csv")
    assert len(everything) == sum(sizes.values())
    assert f"the longest set has {max(sizes.values())}" in text_of(page, "neurons")
    names = {path.name for path in (tmp_path / "analyses").iterdir()}
    assert names == {name for name in tables_of(page) if "neurons" not in name} | {"neurons.csv"}


def test_one_window_has_no_error_and_no_test(tmp_path: Path) -> None:
    page = render(build(write_corpus_study(tmp_path, n_windows=1), {}))
    rows = [row for row in tables_of(page)["nll.csv"] if row["mask"] != "clean"]
    assert all(row["rise"] and not row["rise_se"] for row in rows)
    assert all(float(row["p_value"]) == 1 for row in rows)


def test_without_windows_nothing_is_called_sure(tmp_path: Path) -> None:
    page = render(build(kept(tmp_path, "counts.safetensors", "neurons.json", "nll.csv"), {}))
    rows = tables_of(page)["nll.csv"]
    nll = {(row["mask"], row["group"]): float(row["nll"]) for row in rows}
    for row in rows:
        if row["mask"] != "clean":
            rise = nll[row["mask"], row["group"]] - nll["clean", row["group"]]
            assert math.isclose(float(row["rise"]), rise, abs_tol=1e-12)
            assert row["rise_se"] == row["p_value"] == row["q_value"] == ""
    assert "nothing says how sure they are" in text_of(page, "nll")
    assert "up and" not in text_of(page, "nll")


def test_random_masks_and_empty_sets_stand_apart(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path)
    for name in ("nll.csv", "nll_windows.csv"):
        text = (study / name).read_text(encoding="utf-8")
        (study / name).write_text(text.replace("\nzh,", "\nrandom.0,"), encoding="utf-8")
    neurons = json.loads((study / "neurons.json").read_text(encoding="utf-8"))
    neurons["sets"]["fr"] = []
    del neurons["sets"]["zh"]
    (study / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    found = read_group_study(study)
    masks = found.cells.masks
    for cells, name in ((found.own, "en"), (found.others, "en"), (found.random, "random.0")):
        assert {masks[place] for place in cells.mask} == {name}
    rows = [row for row in tables_of(render(page(found)))["nll.csv"] if row["mask"] == "random.0"]
    mean = np.mean([float(row["rise"]) for row in rows])
    text = text_of(render(page(found)), "nll")
    assert "Left out of the means: 1 set without neurons." in text
    assert f"any group, with random neurons off, rises by {mean:.2f} nats on average" in text
    (study / "neurons.json").unlink()
    found = read_group_study(study)
    assert {found.cells.masks[place] for place in found.others.mask} == {"en", "fr"}
    assert {found.cells.masks[place] for place in found.random.mask} == {"random.0"}


def read_study(folder: Path) -> Path:
    """A study whose manifest has a count, LAPE neurons and their NLL."""
    write_corpus_study(folder)
    manifest = Manifest(folder)
    manifest.finish("count", {"corpus": 1}, [folder / "counts.safetensors"], reads=[])
    rates = {"filter_rate": 0.8, "bar_ratio": 0.8}
    rank_counts(folder, folder / "neurons.json", top=30, force=True, **rates)
    finish_nll(folder)
    return folder


def finish_nll(folder: Path) -> None:
    inputs = {"neurons": sha256(folder / "neurons.json")}
    files = [folder / "nll.csv", folder / "nll_windows.csv"]
    Manifest(folder).finish("nll", inputs, files, reads=[folder / "neurons.json"])


def check_parts(folder: Path, *, neurons: bool, scores: bool, nll: bool) -> None:
    """Whether the study and its page have the chosen neurons, their scores and the NLL."""
    found, page = read_group_study(folder), render(build(folder, {}))
    assert found.counts is not None
    assert (found.neurons is not None) == neurons == ("neurons" in ids(page))
    assert (found.entropy is not None) == scores
    assert bool(found.cells) == nll == ("nll" in ids(page))


def test_what_another_run_of_a_stage_made_is_left_out(tmp_path: Path) -> None:
    whole = {"neurons": True, "scores": True, "nll": True}
    check_parts(read_study(tmp_path / "whole"), **whole)
    check_parts(write_corpus_study(tmp_path / "no stages"), **whole)

    again = read_study(tmp_path / "identified again")
    rank_counts(again, again / "neurons.json", method="random", top=9, force=True)
    check_parts(again, **(whole | {"nll": False}))
    finish_nll(again)
    check_parts(again, **whole)

    second = read_study(tmp_path / "second file")
    rank_counts(second, second / "x.json", method="random", top=9)
    check_parts(second, neurons=False, scores=False, nll=False)

    counted = read_study(tmp_path / "counted again")
    path = counted / "counts.safetensors"
    counts = Counts.read(path)
    Counts(counts.groups, counts.tokens + 1, counts.arrays).write(path)
    Manifest(counted).finish("count", {"corpus": 2}, [path], reads=[])
    check_parts(counted, neurons=False, scores=False, nll=False)
    assert "no neurons are chosen yet" in text_of(render(build(counted, {})))


def test_imported_neurons_are_of_no_stage_and_stay(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path, method="imported")
    Manifest(study).finish("count", {"corpus": 1}, [study / "counts.safetensors"], reads=[])
    check_parts(study, neurons=True, scores=False, nll=False)
    finish_nll(study)
    check_parts(study, neurons=True, scores=False, nll=True)
    text = (study / "neurons.json").read_text(encoding="utf-8")
    (study / "neurons.json").write_text(text.replace("a/model", "b/model"), encoding="utf-8")
    check_parts(study, neurons=True, scores=False, nll=False)


def test_the_columns_of_every_table_are_tidy(tmp_path: Path) -> None:
    tables = group_tables(read_group_study(write_corpus_study(tmp_path)))
    columns = {column for table in tables.values() for column in table.columns}
    assert columns and not [column for column in columns if " " in column]
