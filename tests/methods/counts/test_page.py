"""The report's page on a corpus study: any names, any size, missing and damaged files.

The study is that of kit/corpus_studies.py; test_tables.py has the numbers.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.page import build
from relneuron.methods.counts.study import PAGE, read_group_study
from relneuron.report.page import kind_of, render, write_report
from relneuron.study.pages import PAGES
from tests.kit.corpus_studies import GROUPS, kept, write_corpus_study
from tests.kit.pages import Page, ids, rows_of, tables_of, text_of, write_csv


def test_names_that_are_columns_of_tables_keep_their_numbers(tmp_path: Path) -> None:
    names = ("rank", "rank_low", "rank_high", "n_groups", "clean_", "مرحبا")
    page = render(build(write_corpus_study(tmp_path, names, top=40), {}))
    rows = next(rows for name, rows in tables_of(page).items() if name.startswith("neurons.01"))
    assert [f"p({name})" for name in names] == list(rows[0])[-6:]
    section = page[page.index('<h2 id="neurons">') :]
    head = section[section.index("<thead>") : section.index("</thead>")]
    assert head.count("<th ") == 4 + 6


@pytest.mark.parametrize(
    ("groups", "options", "seconds", "size"),
    [
        (7, {"layers": 32, "width": 11008, "top": 3523, "n_windows": 256}, 8, 2_000_000),
        (40, {"layers": 80, "width": 60, "top": 1500, "n_windows": 20}, 20, 5_000_000),
    ],
    ids=["7B", "40 groups"],
)
def test_large_studies_make_a_small_page_soon(
    tmp_path: Path, groups: int, options: dict[str, Any], seconds: float, size: int
) -> None:
    names = [f"{'a very long name of a language ' * 10}{i}" for i in range(groups)]
    study = write_corpus_study(tmp_path, names, slow_entropy=False, **options)
    begun = time.process_time()
    page = render(build(study, {}))
    assert time.process_time() - begun < seconds
    assert len(page.encode()) < size


# Parts


ALL = ("manifest.json", "counts.safetensors", "neurons.json", "scores.safetensors", "nll.csv")


@pytest.mark.parametrize(
    ("names", "options", "sections"),
    [
        (ALL[1:2], {}, ["counted"]),
        (ALL[2:3], {}, ["scores", "layers", "overlap", "neurons", "counted"]),
        (ALL[2:4], {}, ["entropy", "layers", "overlap", "neurons", "counted"]),
        (ALL[1:3], {}, ["scores", "layers", "overlap", "neurons", "counted"]),
        (ALL[:4], {}, ["entropy", "layers", "overlap", "neurons", "counted"]),
        (ALL, {}, ["entropy", "layers", "overlap", "nll", "neurons", "counted"]),
        (ALL[1:2] + ALL[4:], {}, ["nll", "counted"]),
        (ALL[:4], {"groups": ("one",)}, ["layers", "neurons", "counted"]),
        (ALL, {"groups": ("one",)}, ["layers", "nll", "neurons", "counted"]),
        (ALL, {"layers": 1, "width": 9, "top": 4}, None),
        (ALL, {"sets": {name: [] for name in GROUPS}}, ["entropy", "nll", "counted"]),
        (ALL, {"sets": {}}, ["entropy", "nll", "counted"]),
        (
            ALL[:3],
            {"method": "random", "sets": {"en": [[0, "gate", 1, 0.0]], "zh": [[3, "up", 2, 0.0]]}},
            ["layers", "overlap", "neurons", "counted"],
        ),
        (
            ALL[:1] + ALL[2:3],
            {"method": "probability", "sets": {"en": [[0, "down", 1, 0.9], [1, "down", 1, 0.8]]}},
            ["scores", "layers", "neurons", "counted"],
        ),
    ],
)
def test_a_study_without_some_files_has_a_page(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, Any], sections: list[str] | None
) -> None:
    study = kept(tmp_path, *names, **options)
    assert kind_of(study, PAGES) is PAGE
    page = render(build(study, {}))
    assert sections is None or ids(page) == [*sections, "made"]
    assert not re.search(r"\b(nan|inf|None)\b", Page(page).text.split("How it was made")[0])


# Refusals and the way in


def test_broken_scores_and_changed_files_are_named(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path / "a")
    (study / "scores.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RelneuronError, match="damaged"):
        read_group_study(study)
    data = (study / "nll.csv").read_bytes()
    known = {"nll.csv": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    study = write_corpus_study(tmp_path / "b", manifest={"files": known})
    read_group_study(study)
    with (study / "nll.csv").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(RelneuronError, match=r"nll\.csv.*digest"):
        read_group_study(study)
    (study / "nll.csv").unlink()
    with pytest.raises(RelneuronError, match=r"nll\.csv does not exist"):
        read_group_study(study)


def test_a_number_of_too_many_digits_is_damage(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path)
    for name in ("nll_windows.csv", "nll.csv"):
        text = (study / name).read_text(encoding="utf-8")
        cells = text.splitlines()[1].split(",")
        changed = text.replace(
            ",".join(cells[:4]), ",".join([*cells[:2], str(10**30), cells[3]]), 1
        )
        (study / name).write_text(changed, encoding="utf-8")
        with pytest.raises(RelneuronError, match="damaged"):
            read_group_study(study)


def test_a_folder_without_counts_and_neurons_is_refused(tmp_path: Path) -> None:
    kept(tmp_path, "nll.csv")
    with pytest.raises(RelneuronError, match="no counts") as caught:
        write_report(tmp_path, tmp_path / "report.html", PAGES)
    assert "relneuron count" in caught.value.fix


def test_a_group_without_tokens_and_a_window_without_a_number_are_said(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path)
    counts = Counts.read(study / "counts.safetensors")
    counts.tokens[1] = counts.arrays["count.act"][1] = 0
    counts.write(study / "counts.safetensors")
    for name in ("nll.csv", "nll_windows.csv"):
        rows = rows_of(study / name)
        broken = next(row for row in rows if row["mask"] == row["group"] == "fr")
        broken["nll"] = "inf"
        write_csv(study / name, list(rows[0]), [list(row.values()) for row in rows])
    html = render(build(study, {}))
    assert "1 cell without a finite NLL: left out of the means." in text_of(html, "nll")
    assert "of 2 cells" in text_of(html, "nll")
    assert [row["tokens"] for row in tables_of(html)["groups.csv"]][1] == "0"
    assert {row["p(zh)"] for row in tables_of(html)["neurons.01.csv"]} == {""}
    assert not re.search(r"\b(nan|inf)\b", text_of(html))


def test_very_many_groups_make_a_small_page_soon(tmp_path: Path) -> None:
    names = [f"language {i}" for i in range(150)]
    study = write_corpus_study(
        tmp_path, names, layers=8, width=100, top=400, n_windows=3, slow_entropy=False
    )
    begun = time.process_time()
    output = write_report(study, study / "report.html", PAGES)
    assert time.process_time() - begun < 60
    page = output.read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    assert "the name of every 4th" in page and "the 40 of 150 sets" in page
    # What the page leaves out is in the files beside it.
    assert (
        "analyses/overlap.csv" in page and len(rows_of(study / "analyses/overlap.csv")) == 150 * 150
    )
    assert len(rows_of(study / "analyses/nll.csv")) == 151 * 150
