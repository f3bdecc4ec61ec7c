"""The report's page: what it says, how it writes names and numbers, and what it may never do.

The study is that of kit/studies.py; test_results.py has the numbers.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.analyses.chosen import neuron_table
from relneuron.analyses.page import build, page
from relneuron.analyses.study import read_study
from relneuron.artifact.files import RelneuronError
from relneuron.report.page import render
from relneuron.report.tables import ROWS_AT_ONCE, Column, Rows, Share, Table, visible
from tests.kit.pages import Page
from tests.kit.studies import RELATIONS, RIGHT, SETS, write_study

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
    page = render(build(study, {}))
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


def test_a_table_of_columns_is_that_of_its_rows() -> None:
    names = ["=1+1", "a\x1bb", "plain", "-2"]
    n = 2 * ROWS_AT_ONCE + 3
    place, value = np.arange(n) % len(names), np.linspace(-1, 1, n)
    value[[0, 5, n - 1]] = np.nan, np.inf, np.nan
    columns = [Column(place, names), Column(np.arange(n) - 7), Column(value)]
    columns.append(Column(np.where(np.isinf(value), 0.25, value), is_share=True))
    rows = [
        [names[p], i - 7, v, Share(0.25 if v == np.inf else v)]
        for i, (p, v) in enumerate(zip(place.tolist(), value.tolist(), strict=True))
    ]
    held, plain = (Table("T", ["a", "b", "c", "d"], some) for some in (Rows(columns), rows))
    for one, other in (
        (held, plain),
        (held.where("a", "plain"), plain.where("a", "plain")),
        (held.at([5, 0, n - 1]).at([2, 1]), plain.at([5, 0, n - 1]).at([2, 1])),
        (held.at([]), plain.at([])),
    ):
        assert len(one.rows) == len(other.rows) and bool(one.rows) == bool(other.rows)
        assert one.csv() == other.csv()
        assert one.shown(9) == other.shown(9)
        assert repr([*map(list, one.rows)]) == repr([*other.rows])
        assert [*map(type, one.column("d"))] == [*map(type, other.column("d"))]
        assert np.array_equal(one.floats("c"), other.floats("c"), equal_nan=True)
    assert held.rows[-2][1] == n - 9 and [row[1] for row in held.rows[3:5]] == [-4, -3]
    with pytest.raises(IndexError):
        held.rows[n]
    with pytest.raises(ValueError, match="text"):
        held.floats("a")


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
    text = " ".join(Page(render(page(study, {}))).text.split())
    assert "that of 1,000 bootstrap resamples" in text
    assert "the share of 200 shufflings" in text and "at most 0.001 here" in text
    assert "40 neurons, against 100,000 columns of noise); at most 0.02 here" in text
    # What was not asked for has no column, and nothing is said of it.
    write_significance(tmp_path, ",,0.8,0.99")
    study = read_study(tmp_path)
    shown = neuron_table(study).shown(1)
    assert shown.columns == ["relation", "rank", "neuron", "score (95\xa0%)"]
    assert shown.rows == [("company ceo", "1", "L0.gate.1", "0.9 (0.8 to 0.99)")]
    text = Page(render(page(study, {}))).text
    assert "shufflings" not in text and "of noise" not in text and "bootstrap res" in text


def test_neurons_without_significance_have_a_report(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    assert np.isnan(study.significance["company_ceo"]).all()
    assert "nothing here says how sure" in Page(render(page(study, {}))).text
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
    text = " ".join(Page(render(build(tmp_path, {}))).text.split())
    assert "A set is every neuron with q ≤ 0.05. No neurons: company hq (none has q" in text


# The page


def test_fifty_relations_stay_small(tmp_path: Path) -> None:
    names = tuple(f"a_relation_with_quite_a_long_name_number_{i:02d}_of_fifty" for i in range(50))
    right = {name: dict.fromkeys(names, 1) for name in names}
    right |= {"clean": dict.fromkeys(names, 2), "random.0": dict.fromkeys(names, 2)}
    sets = {name: [[i % 2, "gate", j, 0.5] for j in range(8)] for i, name in enumerate(names)}
    study = write_study(tmp_path, relations=names, right=right, sets=sets, n_prompts=1)
    assert len(render(build(study, {}))) < 5_000_000


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
    html = render(build(write_study(tmp_path, **options), {}))
    assert "nan" not in Page(html).text
