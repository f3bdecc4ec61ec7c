"""The report's page on a corpus study: any names, any size, missing and damaged files.

The study is that of kit/corpus_studies.py; test_tables.py has the numbers.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.command import STUDY, command
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.cli.pages import render, write_report
from relneuron.methods.counts.study import is_group_study, read_group_study
from relneuron.report.tables import visible
from tests.conftest import ROOT
from tests.kit.corpus_studies import (
    GROUPS,
    ids,
    kept,
    rows_of,
    tables_of,
    text_of,
    write_corpus_study,
    write_csv,
)
from tests.kit.studies import PAYLOADS, Page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noted = {"count": {"inputs": {"threshold": 0.0, "sites": ["act"]}, "files": []}}
    noted["count"]["notes"] = {"dropped_tokens": {"en": 1200, "zh": 34}}
    return write_corpus_study(
        tmp_path_factory.mktemp("corpus") / "study", manifest={"stages": noted}
    )


@pytest.fixture(scope="module")
def html(study: Path) -> str:
    return render(read_group_study(study))


# What the page may never do


def test_the_page_is_whole_and_asks_for_nothing(study: Path, html: str) -> None:
    page = Page(html)
    sections = ["entropy", "layers", "overlap", "nll", "neurons", "counted", "made"]
    assert ids(html) == sections
    contents = html[html.index("<nav") : html.index("</nav>")]
    assert re.findall('href="#([a-z]+)"', contents) == sections
    assert page.tags.count("svg") == 7
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )
    found = [value for name, value in page.attributes if name == "id"]
    assert len(found) == len(set(found))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', html)) <= set(found)
    assert "#0102" not in html and not re.search(r"\bnan\b", page.text)


def test_the_same_study_gives_the_same_bytes(study: Path, html: str, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, relneuron.cli.pages as r; "
        "r.write_report(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(study), str(tmp_path / "2.html")]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "2.html").read_text(encoding="utf-8") == html


def hostile_page(folder: Path, text: str) -> Page:
    """The page of a study that holds `text` wherever one can hold text."""
    words = command("count", text, f"{text}={text}", "-o", STUDY, text_column=text)
    noted = {"inputs": {text: text}, "files": [], "commands": words}
    described = {text: {text: [text]}, "fallbacks": [text], "stages": {"count": noted}}
    groups = (text, f"a {text}", "b")
    write_corpus_study(folder, groups, model=text, manifest=described, method=text)
    return Page(render(read_group_study(folder)))


def test_text_stays_text(tmp_path: Path) -> None:
    harmless = hostile_page(tmp_path, "harmless")
    for payload in [*PAYLOADS, "=" + "x" * 299]:
        page = hostile_page(tmp_path, payload)
        assert page.tags == harmless.tags
        assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
        links = [value for name, value in page.attributes if name in ("href", "src")]
        assert all(re.match(r"#[\w-]+$|data:(text/csv|image/png);", link) for link in links)
        assert visible(payload) in page.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text)


def test_names_that_are_columns_of_tables_keep_their_numbers(tmp_path: Path) -> None:
    names = ("rank", "rank_low", "rank_high", "n_groups", "clean_", "مرحبا")
    page = render(read_group_study(write_corpus_study(tmp_path, names, top=40)))
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
    page = render(read_group_study(study))
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
    assert is_group_study(study)
    page = render(read_group_study(study))
    assert sections is None or ids(page) == [*sections, "made"]
    assert not re.search(r"\b(nan|inf|None)\b", Page(page).text.split("How it was made")[0])


# Refusals and the way in


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("nll.csv", "en,zh,12,", "en,zh,11,"),
        ("nll.csv", "zh,en,12,", "zh,fr,12,"),
        ("nll.csv", ",nll,", ",loss,"),
        ("nll_windows.csv", "clean,en,3,", "clean,en,99,"),
        ("nll_windows.csv", "en,en,0,31,", "en,en,0,31,1"),
        ("nll_windows.csv", "en,en,0,31,", "en,en,0,31,x"),
        ("neurons.json", '"gate"', '"gait"'),
        ("neurons.json", '"width": 50', '"width": 49'),
        ("neurons.json", '"layers": 4', '"layers": 5'),
        ("manifest.json", "study/1", "study/2"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, old: str, new: str) -> None:
    change(write_corpus_study(tmp_path) / name, old, new)
    with pytest.raises(RelneuronError):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "analyses").exists()


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
    with pytest.raises(RelneuronError, match=r"nll\.csv is gone"):
        read_group_study(study)


def test_a_folder_without_counts_and_neurons_is_refused(tmp_path: Path) -> None:
    kept(tmp_path, "nll.csv")
    with pytest.raises(RelneuronError, match="no counts") as caught:
        write_report(tmp_path, tmp_path / "report.html")
    assert "relneuron count" in caught.value.fix
    assert not is_group_study(tmp_path / "empty")
    kept(tmp_path / "neurons", "neurons.json")
    (tmp_path / "neurons" / "prompts.jsonl").write_text("")
    assert not is_group_study(tmp_path / "neurons")
    write_corpus_study(tmp_path / "effects")
    (tmp_path / "effects" / "effects.csv").write_text("")
    assert not is_group_study(tmp_path / "effects")


def test_nothing_of_the_study_is_overwritten(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path)
    for name in ("counts.safetensors", "nll.csv", "scores.safetensors", "neurons.json"):
        with pytest.raises(RelneuronError):
            write_report(study, study / name, force=True)
    first = write_report(study, study / "report.html").read_bytes()
    with pytest.raises(RelneuronError):
        write_report(study, study / "report.html")
    # A report that the manifest knows does not change the next.
    noted = {"stages": {"report": {"inputs": {}, "files": ["report.html"]}}}
    write_corpus_study(
        study, manifest=noted | {"files": {"report.html": {"sha256": "", "bytes": 0}}}
    )
    assert write_report(study, study / "report.html", force=True).read_bytes() == first


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
    html = render(read_group_study(study))
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
    output = write_report(study, study / "report.html")
    assert time.process_time() - begun < 60
    page = output.read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    assert "the name of every 4th" in page and "the 40 of 150 sets" in page
    # What the page leaves out is in the files beside it.
    assert (
        "analyses/overlap.csv" in page and len(rows_of(study / "analyses/overlap.csv")) == 150 * 150
    )
    assert len(rows_of(study / "analyses/nll.csv")) == 151 * 150
