"""What holds for the page of every kind of study: whole, offline, the same bytes, text stays text.

The studies are those of studies.py, corpus_studies.py and their like in the kit; no model is
needed. What a kind's page says is in the test_report files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.stage import STUDY, command
from relneuron.report.page import PageKind, kind_of, make_page, render, write_report
from relneuron.report.tables import visible
from relneuron.study.pages import PAGES
from tests.kit.attribution_studies import write_attribution
from tests.kit.contrasted import write_contrast_study
from tests.kit.corpus_studies import write_corpus_study
from tests.kit.gradient_studies import write_fact_study
from tests.kit.pages import PAYLOADS, Page, ids
from tests.kit.studies import SETS, write_study, write_whole_study

RELATIONS, COUNTS, GAINS, FACTS, CONTRAST = PAGES


@dataclass(frozen=True)
class Case:
    kind: PageKind
    write: Callable[..., Path]
    hostile: Callable[[Path, str], object]  # a study that holds a text wherever it can hold text
    sections: tuple[str, ...]
    drawings: int
    file: str  # one that the page is made from
    damages: tuple[tuple[str, str, str], ...]  # file, old text, new text


def hostile_relations(folder: Path, text: str) -> None:
    relation = f"rel_{text}"
    write_study(
        folder,
        relations=(relation, "b"),
        right={"clean": {relation: 3, "b": 2}, relation: {relation: 1, "b": 2}},
        sets={relation: SETS["company_ceo"], "b": SETS["company_hq"]},
        text=f"{text} {{}}",
        prediction=text,
        model=text,
        manifest={
            text: {text: [text]},
            "fallbacks": [text],
            "files": {text: {"sha256": text, "bytes": 0}},
        }
        | {"stages": {"record": {"inputs": {text: text}, "files": [text]}}},
    )


def hostile_analyses(folder: Path, text: str) -> None:
    relation = f"rel_{text}"
    study = write_whole_study(
        folder,
        relations=(relation, "b"),
        right={"clean": {relation: 3, "b": 2}, relation: {relation: 1, "b": 4}},
        sets={relation: SETS["company_ceo"], "b": SETS["company_hq"]},
        concept=text,
        text=f"{text} {{}}",
        prediction=text,
    )
    path = study / "effects.csv"
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([text if cell == "The" else cell for cell in row] for row in rows)


def hostile_corpus(folder: Path, text: str) -> None:
    words = command("count", text, f"{text}={text}", "-o", STUDY, text_column=text)
    noted = {"inputs": {text: text}, "files": [], "commands": words}
    described = {text: {text: [text]}, "fallbacks": [text], "stages": {"count": noted}}
    groups = (text, f"a {text}", "b")
    write_corpus_study(folder, groups, model=text, manifest=described, method=text)


def hostile_attribution(folder: Path, text: str) -> None:
    described = {text: {text: [text]}, "fallbacks": [text]}
    relations = (f"a {text}", "b")
    write_attribution(folder, relations, token=text, model=text, manifest=described, n=3, top=12)


def hostile_facts(folder: Path, text: str) -> None:
    described = {text: {text: [text]}, "fallbacks": [text]}
    relations = (f"a {text}", "b")
    write_fact_study(
        folder,
        relations=relations,
        subject=text,
        model=text,
        prediction=text,
        manifest=described,
    )


def hostile_contrast(folder: Path, text: str) -> None:
    noted = {"inputs": {text: text}, "files": [], "commands": command("contrast", text, text)}
    described = {text: {text: [text]}, "fallbacks": [text], "stages": {"contrast": noted}}
    names = (f"a {text}", "b")
    write_contrast_study(
        folder, names, text=text, model=text, manifest=described, sizes=(5, 20), by_group=True
    )


def write_splits(folder: Path, **options: Any) -> Path:
    return write_study(folder, splits=("eva", "eva2", "eva.de"), **options)


CASES = {
    "relations": Case(
        RELATIONS,
        write_splits,
        hostile_relations,
        (
            *("accuracy", "prompts", "drop", "interference", "layers", "scores", "overlap"),
            *("versatility", "resilience", "errors", "examples", "made"),
        ),
        9,
        "effects.csv",
        (
            ("effects.csv", "clean,company_ceo,eva,company_ceo.eva.0,", "clean,company_ceo,eva,x,"),
            ("effects.csv", ",Tim,1,", ",Tim,yes,"),
            ("accuracy.csv", "clean,", "dirty,"),
            ("neurons.json", '"gate"', '"gait"'),
            ("neurons.json", "[0, ", "[7, "),
            ("manifest.json", "study/1", "study/2"),
        ),
    ),
    "attribution": Case(
        GAINS,
        write_attribution,
        hostile_attribution,
        (
            *("comparison", "interventions", "heads_off", "layers", "heads", "neurons", "sides"),
            *("answers", "made"),
        ),
        9,
        "comparison.csv",
        (
            ("attributions.csv", "month.5,ffn_neuron", "month.9,ffn_neuron"),
            ("attributions.csv", "ffn_layer,3,", "ffn_layer,4,"),
            ("attributions.csv", "ffn_layer,3,", "ffn_layer,-1,"),
            ("attributions.csv", "head,3,1,", "head,4,1,"),
            ("attributions.csv", "query_layer,3,,8,", "query_layer,3,,9,"),
            ("attributions.csv", "color.1,ffn_neuron,3,,11,", "color.1,ffn_neuron,3,,24,"),
            ("attributions.csv", "\ncolor.1,ffn_neuron,3,", "\ncolor.1,ffn_neuron,9,"),
            ("attributions.csv", ",score,", ",points,"),
            ("comparison.csv", "clean,month,4,", "clean,month,7,"),
            ("comparison.csv", "clean,month,", "clean,year,"),
            ("comparison.csv", "random.1,,12,", "random.1,,12x,"),
            ("promoted.csv", "ffn_neuron,3,,", "ffn_neuron,x,,"),
            ("targets.csv", "capital_of.1,", "capital_of.1,extra,"),
            ("manifest.json", '"layers": 4', '"layers": null'),
            ("manifest.json", "study/1", "study/2"),
        ),
    ),
    "corpus": Case(
        COUNTS,
        write_corpus_study,
        hostile_corpus,
        ("entropy", "layers", "overlap", "nll", "neurons", "counted", "made"),
        7,
        "nll.csv",
        (
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
        ),
    ),
    "facts": Case(
        FACTS,
        write_fact_study,
        hostile_facts,
        ("changes", "sizes", "layers", "consistency", "completeness", "made"),
        5,
        "neurons.json",
        (
            ("facts.csv", "likes,likes/C Ann,2,", "likes,likes/C Ann,x,"),
            ("facts.csv", "likes/C Ann", "likes/D Ann"),
            ("facts.csv", "n_union", "union"),
            ("completeness.csv", ",0,0.5,", ",x,0.5,"),
            ("completeness.csv", ",0.35,", ",nan,"),
            ("effects.csv", "clean,likes,eva,likes.C Ann.0,", "clean,likes,eva,x,"),
            ("effects.csv", "likes/C Ann,likes,", "x,likes,"),
            ("conditions.csv", "likes/C Ann,set", "clean,set"),
            ("neurons.json", '"gate"', "3"),
            ("neurons.json", '"layers": 3', '"layers": null'),
            ("manifest.json", "study/1", "study/2"),
        ),
    ),
    "contrast": Case(
        CONTRAST,
        write_contrast_study,
        hostile_contrast,
        ("effects", "texts", "layers", "concentration", "scores", "groups", "made"),
        5,
        "effect.csv",
        (
            ("effect.csv", "contrast@5,12,", "contrast@6,12,"),
            ("effect.csv", ",cost,", ",price,"),
            ("effect.csv", "contrast@20,12,1,0.0", "contrast@20,12,1,x"),
            ("outputs.jsonl", '"mask": "contrast@5"', '"mask": "other"'),
            ("outputs.jsonl", '"id": "p1"', '"id": "p0"'),
            ("neurons.json", '"gate"', '"gait"'),
            ("neurons.json", '"layers": 4', '"layers": 5'),
            ("manifest.json", '"layers": 4', '"layers": 5'),
            ("manifest.json", "study/1", "study/2"),
        ),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def study(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write(tmp_path_factory.mktemp("page") / "study")


@pytest.fixture(scope="module")
def html(study: Path) -> str:
    return render(make_page(study, PAGES))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.name != ".lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()
    }


# The page


def test_the_page_is_whole_and_asks_for_nothing(case: Case, study: Path, html: str) -> None:
    assert kind_of(study, PAGES) is case.kind
    page = Page(html)
    assert ids(html) == [*case.sections]
    # The contents name all sections, in order.
    contents = html[html.index("<nav") : html.index("</nav>")]
    assert re.findall('href="#([a-z_]+)"', contents) == ids(html)
    assert page.tags.count("svg") == case.drawings
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(page.tags)
    # A drawing names the languages that it is in, so that it works where it is copied to.
    asked = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/\d+/\w+"', "", html)
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", asked)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    found = [value for name, value in page.attributes if name == "id"]
    assert len(found) == len(set(found))
    # Each reference inside the page has its target, each placeholder colour its variable.
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', html)) <= set(found)
    assert "#0102" not in html and not re.search(r"\bnan\b", page.text)


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another process, with another hash seed, timezone, locale and matplotlib configuration."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 20\naxes.grid: True\n", encoding="utf-8")
    code = (
        "import sys, pathlib\n"
        "from relneuron.study.pages import PAGES\n"
        "from relneuron.report.page import write_report\n"
        "for name in sys.argv[1:]:\n"
        "    write_report(pathlib.Path(name), pathlib.Path(name + '.2.html'), PAGES)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    root = str(Path(__file__).resolve().parents[2])
    environment |= {"MATPLOTLIBRC": str(settings), "PYTHONPATH": root}
    studies = {name: case.write(tmp_path / name) for name, case in CASES.items()}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, studies.values())], check=True, env=environment
    )
    for name, study in studies.items():
        first = write_report(study, tmp_path / f"{name}.1.html", PAGES).read_bytes()
        assert (tmp_path / f"{name}.2.html").read_bytes() == first


@pytest.mark.parametrize(
    "hostile",
    [
        *(hostile_relations, hostile_analyses, hostile_attribution, hostile_corpus),
        *(hostile_facts, hostile_contrast),
    ],
    ids=["relations", "analyses", "attribution", "corpus", "facts", "contrast"],
)
def test_text_stays_text(hostile: Callable[[Path, str], object], tmp_path: Path) -> None:
    def page_with(text: str) -> Page:
        hostile(tmp_path, text)
        return Page(render(make_page(tmp_path, PAGES)))

    harmless = page_with("harmless")
    for payload in [*PAYLOADS, "=" + "x" * 299]:
        page = page_with(payload)
        assert page.tags == harmless.tags
        assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
        links = [value for name, value in page.attributes if name in ("href", "src")]
        assert all(re.match(r"#[\w-]+$|data:(text/csv|image/png);", link) for link in links)
        assert visible(payload) in page.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text)


def test_tables_are_files_in_full_precision(case: Case, tmp_path: Path) -> None:
    study = case.write(tmp_path / "study")
    write_report(study, tmp_path / "elsewhere.html", PAGES)
    assert not (study / "analyses").exists()
    (study / "analyses").mkdir()
    (study / "analyses" / "old.csv").write_text("old")
    write_report(study, study / "report.html", PAGES)
    tables = make_page(study, PAGES).tables
    files = {path.stem: path.read_bytes() for path in (study / "analyses").iterdir()}
    assert files == {name: table.csv() for name, table in tables.items()}
    for name, table in tables.items():
        columns, *rows = csv.reader(io.StringIO(files[name].decode()))
        assert columns == list(table.columns)
        for row, cells in zip(rows, table.rows, strict=True):
            for cell, value in zip(row, cells, strict=True):
                if isinstance(value, float):
                    assert cell == "" if math.isnan(value) else float(cell) == float(value)
                else:
                    assert cell == str(value)


# Refusals


def test_nothing_is_overwritten_without_force(case: Case, tmp_path: Path) -> None:
    study, output = case.write(tmp_path / "study"), tmp_path / "report.html"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(RelneuronError):
        write_report(study, output, PAGES)
    assert output.read_text(encoding="utf-8") == "mine"
    write_report(study, output, PAGES, force=True)
    assert "relneuron" in output.read_text(encoding="utf-8")
    # The study itself is never the output.
    before = files_of(study)
    for name in case.kind.reads:
        with pytest.raises(RelneuronError, match="is a file of the study"):
            write_report(study, study / name, PAGES, force=True)
    assert files_of(study) == before


def test_a_recorded_report_does_not_change_the_next(case: Case, tmp_path: Path) -> None:
    noted: dict[str, Any] = {"report.html": {"sha256": "0" * 64, "bytes": 1}}
    pages = []
    for stages, files in (({}, {}), ({"report": {"inputs": {}, "files": ["report.html"]}}, noted)):
        study = case.write(tmp_path, manifest={"stages": stages, "files": files})
        page = make_page(study, PAGES)
        pages.append((page.manifest, render(page)))
    assert pages[0] == pages[1] and "report" not in pages[0][0]["stages"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name, case in CASES.items() for damage in case.damages],
)
def test_files_that_do_not_fit_are_refused(
    name: str, damage: tuple[str, str, str], tmp_path: Path
) -> None:
    study, (file, old, new) = CASES[name].write(tmp_path), damage
    text = (study / file).read_text(encoding="utf-8")
    assert old in text
    # Of a study of relations all that is alike is changed.
    count = -1 if name == "relations" else 1
    (study / file).write_text(text.replace(old, new, count), encoding="utf-8")
    with pytest.raises(RelneuronError):
        write_report(study, study / "report.html", PAGES)
    assert not (study / "report.html").exists() and not (study / "analyses").exists()


def test_changed_and_lost_files_are_named(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path) / case.file
    data = path.read_bytes()
    known = {case.file: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    case.write(tmp_path, manifest={"files": known})
    make_page(tmp_path, PAGES)
    path.write_bytes(data + b"\n")
    with pytest.raises(RelneuronError, match=rf"{re.escape(case.file)}.*digest"):
        make_page(tmp_path, PAGES)
    path.unlink()
    with pytest.raises(RelneuronError, match=rf"{re.escape(case.file)} does not exist") as caught:
        make_page(tmp_path, PAGES)
    assert f"relneuron {case.kind.reads[case.file].split()[0]}" in caught.value.fix


# What a folder is


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ((), RELATIONS),
        (("effects.csv", "targets.csv", "counts.safetensors"), RELATIONS),
        (("effects.parquet", "nll.csv"), RELATIONS),
        (("targets.csv", "neurons.json"), GAINS),
        (("targets.csv", "prompts.jsonl"), GAINS),
        (("counts.safetensors", "prompts.jsonl"), COUNTS),
        (("nll.csv",), COUNTS),
        (("neurons.json",), COUNTS),
        (("neurons.json", "prompts.jsonl"), RELATIONS),
        (("facts.csv", "effects.csv", "targets.csv"), FACTS),
        (("ig.safetensors", "effects.csv"), RELATIONS),
        (("contrast.safetensors", "effects.csv", "prompts.jsonl"), CONTRAST),
    ],
)
def test_the_folder_says_what_it_is(files: tuple[str, ...], kind: PageKind, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    assert kind_of(tmp_path, PAGES) is kind
