"""The report's sections on the analyses: which are there, what they say, their tables and files.

The studies are those of kit/studies.py; test_analyses.py has the numbers of the analyses.
"""

from __future__ import annotations

import csv
import io
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relneuron.analyses import figures as draw
from relneuron.analyses import sections
from relneuron.analyses.figures import perplexity_plot, resilience_plot
from relneuron.analyses.page import build
from relneuron.analyses.study import read_study
from relneuron.artifact.effects import conditions_bytes
from relneuron.artifact.files import RelneuronError
from relneuron.report import figures, kit
from relneuron.report.figures import drop_heatmap
from relneuron.report.page import render, write_report
from relneuron.report.tables import Share, Table, show
from relneuron.study.pages import PAGES
from tests.kit.pages import Page, downloads, ids, text_of
from tests.kit.studies import RELATIONS, RIGHT, SETS, condition_of, write_study, write_whole_study

MAIN = ["accuracy", "drop", "interference", "layers", "scores", "overlap", "versatility"]
MAIN += ["resilience", "errors"]
WHOLE = [*MAIN[:3], "perplexity", "sizes", "cumulativity", "sites", *MAIN[3:7], "concepts"]
WHOLE += MAIN[7:]


# Sections


def test_a_section_for_each_analysis_that_has_data(tmp_path: Path) -> None:
    html = render(build(write_study(tmp_path / "main"), {}))
    assert ids(html) == [*MAIN, "examples", "made"]
    splits = ("eva", "eva2", "eva.de")
    html = render(build(write_whole_study(tmp_path / "whole", splits=splits), {}))
    assert ids(html) == ["accuracy", "prompts", *WHOLE[1:], "examples", "made"]
    # The contents name them all, in order.
    contents = html[html.index("<nav") : html.index("</nav>")]
    assert re.findall('href="#([a-z]+)"', contents) == ids(html)
    for key in set(WHOLE) - {"interference", "scores"}:
        section = html[html.index(f'<h2 id="{key}">') :]
        assert "<svg" in section[: section.index("</section>")], key


# By hand, from the numbers in kit/studies.py.
SAID = [
    # Clean 4, 2, 0 of 4; own sets off 1, 1, 0.
    ("accuracy", "On average 50.0 % are answered right before, 16.7 % with the own"),
    # Nothing of the third is right before.
    ("accuracy", "0 of 2 relations lose answers beyond chance"),
    # Matched sets 3 and 4 of 4: drops of 0.125 and -0.75 on average.
    ("accuracy", "random neurons 18.8 %, matched neurons −31.2 %"),
    ("drop", "4 pairs of a relation and a foreign set: 0 with a loss beyond chance"),
    ("drop", "“company ceo” loses 25.0 % of its accuracy when the neurons of “company hq” are off"),
    ("interference", "2 answers to 2 prompts get right; most of a pair, 1, of “company hq”"),
    # Own: drops of 0.25 and -0.5 with one neuron, 0.75 and 0.5 with three.
    ("sizes", "the relation itself is halved, on average, from 3 neurons on"),
    ("sizes", "No size halves the accuracy of the others on average; the drop with the largest, 3"),
    # Of each relation two facts are lost between 1 and 3, of which ranks 2 and 3 break one.
    ("cumulativity", "6 facts were lost when a range of neurons joined those before it; 3 of them"),
    ("cumulativity", "so 50.0 % were lost by the neurons together only"),
    # Drops: gate 0.5 and 0, up 0 and -1, down 1 and 1, own set 0.75 and 0.5.
    ("sites", "gate only 25.0 %, up only −50.0 %, down only 100.0 %, own set 62.5 %"),
    # exp(0.5) = 1.649 for every sentence; six of one sign have p = 2 / 2**6.
    ("perplexity", "perplexity is 164.9 % to 164.9 % of that before"),
    ("perplexity", "it rises for 3 and falls for 0 of 3 relations"),
    ("perplexity", "With random neurons off it is 100.0 % on average."),
    ("concepts", "Most shared: 1, by “company ceo” and the concept “person”"),
    # Two sets share L0.gate.1 and L1.down.0.
    ("overlap", "Most shared: 2, by “company ceo” and “company hq”"),
    ("versatility", "5 of 7 chosen neurons (71.4 %) are in one set only"),
    ("versatility", "the most versatile are in 2 (2 neurons)"),
    ("resilience", "4 of 6 right answers are lost"),
    # The first prompts survive, and they are those that the model is surest of.
    ("resilience", "In 2 of 2 relations with facts of both kinds the model was less sure"),
    # The new answer is "The".
    ("errors", "Lost: 4 answers that were right before."),
    ("errors", "The most frequent kind of new answer: article or punctuation (100.0 %)."),
]


def test_sentences_say_what_the_tables_say(tmp_path: Path) -> None:
    html = render(build(write_whole_study(tmp_path), {}))
    for key, sentence in SAID:
        assert sentence in text_of(html, key)


def test_answers_that_cannot_be_due_to_chance_are_bold() -> None:
    columns = ["relation", "off", "own", "drop", "q_value"]
    rows = [["a", "a", 1, Share(0.9), 0.05], ["a", "b", 0, Share(0.1), 0.051]]
    rows += [["b", "a", 0, Share(-0.2), math.nan], ["b", "b", 1, Share(0.8), 1e-9]]
    svg = drop_heatmap(Table("T", columns, rows)).svg
    written = re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', svg)
    bold = [text for style, text in written if "700" in style or "bold" in style]
    assert bold == ["90", "80"]
    assert {"10", "−20"} <= {text for _, text in written}


def test_what_has_no_place_on_an_axis_is_left_out() -> None:
    columns = ["relation", "before", "own", "random", "ratio", "ratio_low", "ratio_high"]
    rows = [["a", 20.0, math.inf, math.nan, Share(math.inf), Share(math.nan), Share(math.inf)]]
    assert "20.0 → –" in perplexity_plot(Table("T", columns, rows)).svg
    columns = ["relation", "n_resilient", "n_sensitive", "logprob_resilient", "logprob_sensitive"]
    rows = [["a", 3, 1, -math.inf, math.nan]]
    assert "1 of 4" in resilience_plot(Table("T", columns, rows)).svg


def test_matched_sets_are_drawn_where_they_were_asked(tmp_path: Path) -> None:
    splits = ("eva", "eva2")
    html = render(build(write_whole_study(tmp_path / "whole", splits=splits), {}))
    assert "matched neurons off" in text_of(html, "accuracy")
    assert "matched" not in text_of(html, "prompts")
    html = render(build(write_study(tmp_path / "main", splits=splits), {}))
    assert "matched" not in text_of(html)


# Tables


def test_people_read_intervals_and_names_in_one_cell() -> None:
    columns = ["split", "relation", "n_prompts", "own", "own_low", "own_high", "random"]
    columns += ["random_low", "random_high", "matched", "p_value", "logprob"]
    nan = math.nan
    rows: list[list[Any]] = [
        ["eva.de", "a_b", 1200, Share(0.5), Share(0.25), Share(0.75)]
        + [Share(0.5), Share(nan), Share(nan), Share(nan), 0.000123, -1234.5]
    ]
    shown = Table("T", columns, rows).shown(5)
    assert shown.columns == [
        *("split", "relation", "prompts", "own (95\xa0%)", "random (range)", "p", "logprob")
    ]
    cells = ["evaluation prompts, de", "a b", "1,200", "50.0\xa0% (25.0 to 75.0)", "50.0\xa0%"]
    assert [list(row) for row in shown.rows] == [[*cells, "0.00012", "−1,234"]]
    assert show(0.123456) == "0.1235" and show(12345.6) == "12,346" and show(nan) == "–"


def test_names_are_read_without_underscores() -> None:
    for column in ("relation", "off", "other", "concept", "group", "mask", "set"):
        assert Table("T", [column], [["a_b"]]).shown(1).rows == [("a b",)]
    assert Table("T", ["id"], [["a_b"]]).shown(1).rows == [("a_b",)]


def test_tables_are_files_in_full_precision(tmp_path: Path) -> None:
    study = write_whole_study(tmp_path / "study", splits=("eva", "eva2"))
    write_report(study, tmp_path / "elsewhere.html", PAGES)
    assert not (study / "analyses").exists()
    html = write_report(study, study / "report.html", PAGES).read_text(encoding="utf-8")
    tables = read_study(study).tables
    files = {path.stem: path.read_bytes() for path in (study / "analyses").iterdir()}
    assert files.keys() == tables.keys()
    assert {"accuracy", "cumulativity_summary", "concepts", "perplexity"} <= files.keys()
    for key, table in tables.items():
        assert key == "accuracy" or downloads(html)[f"{key}.csv"] == files[key]
        columns, *rows = csv.reader(io.StringIO(files[key].decode()))
        assert columns == list(table.columns)
        for row, cells in zip(rows, table.rows, strict=True):
            for cell, value in zip(row, cells, strict=True):
                if isinstance(value, float):
                    assert cell == "" if math.isnan(value) else float(cell) == float(value)
                else:
                    assert cell == str(value)
    assert downloads(html)["accuracy.eva2.csv"].count(b"\n") == 1 + len(RELATIONS)


def test_long_tables_are_cut_in_the_page_only(tmp_path: Path) -> None:
    right = {"clean": {}, "a": {"b": 60}, "b": {"a": 7}}
    sets = {"a": SETS["company_ceo"], "b": SETS["company_hq"]}
    study = write_study(tmp_path, relations=("a", "b"), right=right, sets=sets, n_prompts=60)
    html = render(build(study, {}))
    section = html[html.index('<h2 id="interference">') :]
    section = section[: section.index("</section>")]
    assert section.count("<tr>") == 1 + 50
    assert "The first 50 of 67 rows" in Page(section).text
    assert downloads(section)["interference.csv"].count(b"\n") == 1 + 67
    assert "67 answers to 67 prompts get right; most of a pair, 60, of “b”" in Page(section).text


# Whatever a study holds


ONE: dict[str, Any] = {"relations": RELATIONS[:1], "sets": {"company_ceo": SETS["company_ceo"]}}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, "perplexity.csv"),
        ({}, "concepts/neurons.json"),
        ({"right": {name: RIGHT[name] for name in ("clean", *RELATIONS)}}, None),
        ({"right": {name: RIGHT[name] for name in ("clean", "company_hq", "random.0")}}, None),
        ({"right": {"clean": {}} | {name: {} for name in RELATIONS}}, None),
        ({"right": {"clean": RIGHT["clean"]}}, None),
        ({"sets": {name: [] for name in SETS}}, None),
        (ONE | {"right": {"clean": {"company_ceo": 4}, "company_ceo": {"company_ceo": 1}}}, None),
        (ONE | {"right": {"clean": {"company_ceo": 4}}}, "perplexity.csv"),
    ],
    ids=[
        *("no sentences", "no concepts", "no random", "one set off", "nothing right"),
        *("clean only", "empty sets", "one relation", "one relation, clean"),
    ],
)
def test_missing_data_leave_a_report(
    tmp_path: Path, options: dict[str, Any], gone: str | None
) -> None:
    study = write_whole_study(tmp_path, **options)
    if gone:
        (study / gone).unlink()
    html = render(build(study, {}))
    assert "nan" not in text_of(html).lower()
    missing = {"perplexity.csv": "perplexity", "concepts/neurons.json": "concepts"}.get(gone or "")
    assert missing not in ids(html)
    assert "sizes" in ids(html)


def test_conditions_are_told_by_name_without_their_file(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    first = render(build(study, {}))
    known = [condition_of(name) for name in RIGHT]
    (study / "conditions.csv").write_bytes(conditions_bytes(known))
    assert render(build(study, {})) == first
    # A condition that the file lacks is an error, and so is one that nothing says the kind of.
    (study / "conditions.csv").write_bytes(conditions_bytes(known[:-1]))
    with pytest.raises(RelneuronError, match="conditions"):
        read_study(study)


def test_counted_documents_are_compared_and_old_tables_go(tmp_path: Path) -> None:
    """company_ceo keeps its first prompt and loses three; company_hq one and one."""
    study = write_study(tmp_path)
    ids = [f"{name}.eva.{i}" for name in ("company_ceo", "company_hq") for i in range(4)]
    documents = dict(zip(ids, [90, 10, 20, 30, 5, 15, 0, 0], strict=True))
    lines = "".join(f"{key},{n}\n" for key, n in documents.items())
    (study / "frequency.csv").write_text(f"id,documents\n{lines}", encoding="utf-8")
    (study / "analyses").mkdir()
    (study / "analyses" / "sizes.csv").write_text("old")
    html = write_report(study, study / "report.html", PAGES).read_text(encoding="utf-8")
    assert not (study / "analyses" / "sizes.csv").exists()
    table = read_study(study).tables["resilience"]
    assert [float(x) for x in table.column("frequency_difference")[:2]] == [-3.5, 10 / 15]
    assert "In 1 of 2 relations fewer documents name the lost facts" in text_of(html, "resilience")


def test_accuracy_that_contradicts_effects_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path) / "accuracy.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("company_hq,eva,4,2,", "company_hq,eva,4,3,", 1), encoding="utf-8")
    with pytest.raises(RelneuronError, match="counts clean, company_hq, eva otherwise"):
        read_study(tmp_path)


def test_two_hundred_thousand_answers_make_a_small_page_soon(tmp_path: Path) -> None:
    names = tuple(f"relation_{i:02d}" for i in range(12))
    splits = ("eva", "eva2", "eva.de", "eva.fr", "eva.zh")
    right = {"clean": dict.fromkeys(names, 60)}
    right |= {name: dict.fromkeys(names, 55) | {name: 30} for name in names}
    right |= {f"random.{seed}": dict.fromkeys(names, 58) for seed in range(10)}
    # Every set mends five answers of every other relation.
    for place, name in enumerate(names):
        right[name] |= {other: 65 for other in names[place + 1 :]}
    sets = {name: [[0, "gate", (i + j) % 8, 0.9] for j in range(3)] for i, name in enumerate(names)}
    study = write_whole_study(
        tmp_path, relations=names, splits=splits, right=right, sets=sets, n_prompts=110
    )
    begun = time.process_time()
    with (study / "effects.csv").open(encoding="utf-8", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) > 200_000
    read = time.process_time()
    html = render(build(study, {}))
    # Of the time in which the csv module alone reads it, so that a core that is shared counts once.
    assert time.process_time() - read < 25 * (read - begun)
    assert len(html.encode()) < 2_000_000


def test_random_sets_that_help_have_room_in_the_picture() -> None:
    rows = [["eva", 0.4, -0.1, -0.6], ["eva2", 0.3, 0.0, -0.2]]
    table = Table("", ["split", "own_drop", "others_drop", "random_drop"], rows)
    limits = []

    def inline(fig: Any, *_: str) -> str:
        limits.append(fig.axes[0].get_xlim())
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "inline", inline)
        draw.splits_plot(table)
    assert limits == [(-60, 100)]


@pytest.mark.parametrize(
    ("drops", "said"),
    [
        ([0.5, 0.327], "Asked otherwise: 32.7 % (alternative templates)."),
        ([0.5, 0.327, 0.1], "Asked otherwise, from 10.0 % (evaluation prompts, de) to 32.7 %"),
        ([0.5, 0.2, 0.2], "Asked otherwise: 20.0 %."),
    ],
)
def test_one_number_is_no_range(
    drops: list[float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = ["eva", "eva2", "eva.de"][: len(drops)]
    shares = zip(splits, map(Share, drops), strict=True)
    rows = [[split, share, Share(0.0), Share(0.0)] for split, share in shares]
    table = Table("", ["split", "own_drop", "others_drop", "random_drop"], rows)
    monkeypatch.setattr(sections, "splits_table", lambda study: table)
    monkeypatch.setattr(figures, "accuracy_plots", lambda *_: [])
    everything = Table("", ["split"], [])
    study: Any = SimpleNamespace(tables={"accuracy": everything}, grids=dict.fromkeys(splits))
    seen = sections.prompts(study).seen
    assert said in seen[1].replace("\N{NO-BREAK SPACE}", " ")
