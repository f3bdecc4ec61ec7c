"""The report's page: what it says, how it writes names and numbers, and what it may never do.

The study is that of kit/studies.py; test_results.py has the numbers.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.analyses.chosen import neuron_table
from relneuron.analyses.study import read_study
from relneuron.artifact.files import RelneuronError
from relneuron.cli.pages import render, write_report
from relneuron.report.tables import Table, visible
from tests.kit.studies import PAYLOADS, RELATIONS, RIGHT, SETS, Page, write_study

# Text


@pytest.mark.parametrize(
    ("inputs", "note"),
    [
        ({"mode": "zero", "positions": "all"}, ""),
        ({"mode": "scale", "factor": 0.5}, "“Off” means here: outputs times 0.5."),
        ({"mode": "mean", "mean_of": "relation"}, "mean over the relation&#39;s det prompts."),
        ({"mode": "zero", "positions": "last"}, "outputs at zero, at the last token of the prompt"),
    ],
)
def test_the_page_says_what_off_means(tmp_path: Path, inputs: dict[str, Any], note: str) -> None:
    study = write_study(tmp_path, manifest={"stages": {"ablate": {"inputs": inputs, "files": []}}})
    page = render(read_study(study))
    assert note in page
    assert ("“Off” means" in page) == bool(note)


def test_hidden_characters_show_as_escapes() -> None:
    for text in ("plain ñ 中 👍\xa0", "می\u200cخواهم"):
        assert visible(text) == text
    assert visible("a\nb\x1b[31m\x00\x7f") == "a\\nb\\x1b[31m\\x00\\x7f"
    assert visible("\u202edrow \u2066x\ufeff") == "\\u202edrow \\u2066x\\ufeff"
    assert visible("\ud800 \ufffe") == "\\ud800 \\ufffe"


def test_downloads_hold_no_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "fine", 'quo"te,comma']
    table = Table("T", ["=head", "x", "n"], [[text, -12.5, 43_500_000_000] for text in texts])
    head, _, data = table.uri().partition(",")
    assert head == "data:text/csv;charset=utf-8;base64"
    rows = list(csv.reader(io.StringIO(base64.b64decode(data).decode())))
    assert rows[0] == ["'=head", "x", "n"]
    cells = [row[0] for row in rows[1:]]
    assert cells == ["'=1+1", "+1", "-1", "'@SUM(A1)", "\\t=1", "' =1", "fine", 'quo"te,comma']
    # A number stays a number.
    assert rows[1][1:] == ["-12.5", "43500000000"]


# Significance


def write_significance(folder: Path, cells: str = "0.001,0.02,0.8,0.99") -> Path:
    rows = [f"{name},{la},{site},{i}" for name, chosen in SETS.items() for la, site, i, _ in chosen]
    head = "relation,layer,site,index,score,p_permutation,q_value,ap_low,ap_high"
    lines = [head, *(f"{row},0,{cells}" for row in rows)]
    path = folder / "significance.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_table_of_neurons_says_how_sure_each_score_is(tmp_path: Path) -> None:
    asked = {"bootstrap": 1000, "permutations": 200, "noise": 100_000}
    noted = {"inputs": asked, "files": []}
    write_significance(write_study(tmp_path, manifest={"stages": {"identify": noted}}))
    study = read_study(tmp_path)
    assert neuron_table(study).rows[2] == [
        *("company_ceo", 3, "L1.down.0", 0.7, 0.8, 0.99, 0.001, 0.02)
    ]
    text = " ".join(Page(render(study)).text.split())
    assert "that of 1,000 bootstrap resamples" in text
    assert "the share of 200 shufflings" in text and "at most 0.001 here" in text
    assert "40 neurons, against 100,000 columns of noise); at most 0.02 here" in text
    # What was not asked for has no column, and nothing is said of it.
    write_significance(tmp_path, ",,0.8,0.99")
    study = read_study(tmp_path)
    shown = neuron_table(study).shown(1)
    assert shown.columns == ["relation", "rank", "neuron", "score (95\xa0%)"]
    assert shown.rows == [("company ceo", "1", "L0.gate.1", "0.9 (0.8 to 0.99)")]
    text = Page(render(study)).text
    assert "shufflings" not in text and "of noise" not in text and "bootstrap res" in text


def test_neurons_without_significance_have_a_report(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    assert np.isnan(study.significance["company_ceo"]).all()
    assert "nothing here says how sure" in Page(render(study)).text
    # A long set shows its best and its last.
    long = [[0, "gate", i, 0.9 - i / 10] for i in range(8)]
    study = read_study(write_study(tmp_path, sets={"company_ceo": long}))
    assert [row[1] for row in neuron_table(study).rows] == [1, 2, 3, 4, 5, 8]


def test_significance_of_other_neurons_is_refused(tmp_path: Path) -> None:
    path = write_significance(write_study(tmp_path))
    text = path.read_text(encoding="utf-8")
    for changed in (
        text.replace("company_hq,1,up,3", "company_hq,1,up,4"),
        text + "company_hq,1,up,3,0,,,,\n",
        text[: text.rindex("star")],
        text.replace("0.001", "low"),
        text.replace("q_value", "q"),
    ):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(RelneuronError):
            read_study(tmp_path)
    # A study whose manifest names the file must have it.
    noted = {"files": {"significance.csv": {"sha256": "0" * 64, "bytes": 1}}}
    write_study(tmp_path, manifest=noted)
    path.unlink()
    with pytest.raises(RelneuronError, match=r"significance\.csv does not exist"):
        read_study(tmp_path)


def test_an_empty_set_has_its_reason(tmp_path: Path) -> None:
    path = write_study(tmp_path, sets=SETS | {"company_hq": []}) / "neurons.json"
    neurons = json.loads(path.read_text(encoding="utf-8"))
    neurons["selection"]["company_hq"] = {"fdr": 0.05, "reason": "none has q <= 0.05"}
    path.write_text(json.dumps(neurons), encoding="utf-8")
    text = " ".join(Page(render(read_study(tmp_path))).text.split())
    assert "A set is every neuron with q ≤ 0.05. No neurons: company hq (none has q" in text


# The page


def test_the_page_says_what_was_found_and_asks_for_nothing(tmp_path: Path) -> None:
    study = write_study(tmp_path, splits=("eva", "eva2", "eva.de"))
    html = render(read_study(study))
    page = Page(html)
    for text in ("62.5\xa0%", "a/model", "“company ceo”", "evaluation prompts, de"):
        assert text in page.text
    # accuracy, other prompts (2), drop, layers, overlap, versatility, resilience, errors
    assert page.tags.count("svg") == 9
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", html)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    # Each reference inside the page has its target, each placeholder colour its variable.
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', html)) <= set(ids)
    assert "#0102" not in html


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", splits=("eva", "eva2"))
    first = write_report(study, tmp_path / "1.html").read_bytes()
    # Another process, hash seed, timezone, locale and matplotlib configuration.
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 20\naxes.grid: True\n", encoding="utf-8")
    code = (
        "import sys, pathlib, relneuron.cli.pages as r; "
        "r.write_report(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    environment |= {"MATPLOTLIBRC": str(settings), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", code, str(study), str(tmp_path / "2.html")]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "2.html").read_bytes() == first


def test_a_recorded_report_does_not_change_the_next(tmp_path: Path) -> None:
    first = read_study(write_study(tmp_path, manifest={"stages": {}, "files": {}})).manifest
    noted = {"stages": {"report": {"inputs": {}, "files": ["report.html"]}}}
    noted["files"] = {"report.html": {"sha256": "0" * 64, "bytes": 1}}
    assert read_study(write_study(tmp_path, manifest=noted)).manifest == first


def hostile_page(folder: Path, text: str) -> Page:
    """The page of a study that holds `text` wherever a study can hold text."""
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
    return Page(render(read_study(folder)))


def test_text_stays_text(tmp_path: Path) -> None:
    harmless = hostile_page(tmp_path, "harmless")
    for payload in PAYLOADS:
        page = hostile_page(tmp_path, payload)
        assert page.tags == harmless.tags
        assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
        links = [value for name, value in page.attributes if name in ("href", "src")]
        assert all(re.match(r"#[\w-]+$|data:(text/csv|image/png);", link) for link in links)
        assert visible(payload) in page.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text)


def test_fifty_relations_stay_small(tmp_path: Path) -> None:
    names = tuple(f"a_relation_with_quite_a_long_name_number_{i:02d}_of_fifty" for i in range(50))
    right = {name: dict.fromkeys(names, 1) for name in names}
    right |= {"clean": dict.fromkeys(names, 2), "random.0": dict.fromkeys(names, 2)}
    sets = {name: [[i % 2, "gate", j, 0.5] for j in range(8)] for i, name in enumerate(names)}
    study = write_study(tmp_path, relations=names, right=right, sets=sets, n_prompts=1)
    assert len(render(read_study(study))) < 5_000_000


@pytest.mark.parametrize(
    "options",
    [
        {"relations": RELATIONS[:2], "right": {k: RIGHT[k] for k in ("clean", *RELATIONS[:2])}},
        {"right": {"clean": RIGHT["clean"]}},
        {"right": {name: {} for name in RIGHT}},
        {"sets": {name: [] for name in SETS}},
        {"sets": {}},
        {"relations": ("größe", "首都", "$x_1$"), "right": {"clean": {"首都": 2}}},
    ],
    ids=["two", "clean only", "zero", "empty sets", "no sets", "unicode"],
)
def test_partial_studies_have_a_report(tmp_path: Path, options: dict[str, Any]) -> None:
    html = render(read_study(write_study(tmp_path, **options)))
    assert "nan" not in Page(html).text


# Refusals


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    study, output = write_study(tmp_path), tmp_path / "report.html"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(RelneuronError):
        write_report(study, output)
    assert output.read_text(encoding="utf-8") == "mine"
    write_report(study, output, force=True)
    assert "relneuron" in output.read_text(encoding="utf-8")
    # The study itself is never the output.
    with pytest.raises(RelneuronError):
        write_report(study, study / "neurons.json", force=True)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("effects.csv", "clean,company_ceo,eva,company_ceo.eva.0,", "clean,company_ceo,eva,x,"),
        ("effects.csv", ",Tim,1,", ",Tim,yes,"),
        ("accuracy.csv", "clean,", "dirty,"),
        ("neurons.json", '"gate"', '"gait"'),
        ("neurons.json", "[0, ", "[7, "),
        ("manifest.json", "study/1", "study/2"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, old: str, new: str) -> None:
    path = write_study(tmp_path) / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RelneuronError):
        read_study(tmp_path)


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    data = (study / "effects.csv").read_bytes()
    known = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_study(tmp_path, manifest={"files": {"effects.csv": known}})
    read_study(study)
    with (study / "effects.csv").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(RelneuronError, match=r"effects\.csv.*digest"):
        read_study(study)
    (study / "neurons.json").unlink()
    with pytest.raises(RelneuronError, match=r"neurons\.json"):
        read_study(study)
