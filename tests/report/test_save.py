"""The files of a page's figures: each opens alone, is as wide as asked for, the same each time."""

from __future__ import annotations

import csv
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.report import kit
from relneuron.report.page import make_page
from relneuron.report.save import FORMATS, FigureOptions, inches
from relneuron.study.figures import figures
from relneuron.study.pages import PAGES
from tests.conftest import ROOT
from tests.kit.attribution_studies import write_attribution
from tests.kit.files import contents as files_of
from tests.kit.studies import write_study

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_attribution(tmp_path_factory.mktemp("save") / "study")


@pytest.fixture(scope="module")
def made(study: Path) -> Path:
    out = study.parent / "figures"
    before = files_of(study)
    paths = figures(study, out, FigureOptions(format=FORMATS, width=3.3))
    assert {path.name for path in paths} == {*files_of(out)}
    assert files_of(study) == before  # nothing in the study changes
    return out


def names(study: Path) -> list[str]:
    """A figure is named by its section, one of several by its number, too."""
    found = []
    for section in make_page(study, PAGES).sections:
        n = len(section.drawings)
        found += [section.key] if n == 1 else [f"{section.key}.{i + 1}" for i in range(n)]
    return found


def test_every_figure_has_its_files(study: Path, made: Path) -> None:
    kinds = (*FORMATS, "csv", "txt")
    expected = {f"{name}.{kind}" for name in names(study) for kind in kinds}
    assert {*files_of(made)} == expected | {"references.bib"}
    assert "comparison.2.pdf" in expected and "layers.pdf" in expected


def test_an_svg_is_whole_by_itself(made: Path) -> None:
    for path in made.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg" and root.get("width") == "237.6pt"
        assert not re.search(r"var\(|currentColor|<style|https?://(?!www\.w3\.org/)", text)
        families = {node.get("font-family") for node in root.iter() if node.get("font-family")}
        assert families == {kit.FONTS}
        found = {node.get("id") for node in root.iter()}
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', text)) <= found
        # On white, whatever is behind it.
        first = next(root.iter(f"{SVG}path"))
        assert first.get("fill") == kit.PAPER
        for node in root.iter(f"{SVG}text"):
            size = re.search(r"font-size: ([\d.]+)px|font: (?:[\w]+ )*([\d.]+)px", str(node.attrib))
            assert size and float(size[1] or size[2]) >= 6


def test_a_pdf_has_its_fonts_and_its_width(made: Path) -> None:
    for path in made.glob("*.pdf"):
        data = path.read_bytes()
        assert data.startswith(b"%PDF-")
        box = re.search(rb"/MediaBox \[ ?([\d. ]+)\]", data)
        assert box and float(box[1].split()[2]) == pytest.approx(3.3 * 72, abs=0.01)
        assert b"/FontFile2" in data and b"/Type3" not in data
        assert not re.search(rb"CreationDate|Producer|/Creator", data)


def test_a_png_is_as_sharp_as_print(made: Path) -> None:
    for path in made.glob("*.png"):
        data = path.read_bytes()
        assert struct.unpack(">I", data[16:20]) == (round(3.3 * 600),)
        assert b"tEXt" not in data


def test_a_table_is_what_the_figure_is_drawn_from(study: Path, made: Path) -> None:
    page = make_page(study, PAGES)
    for section in page.sections:
        for number, drawing in enumerate(section.drawings, 1):
            name = f"{section.key}.{number}" if len(section.drawings) > 1 else section.key
            table = drawing.table or section.tables[0][1]
            assert (made / f"{name}.csv").read_bytes() == table.csv()
    with (made / "sides.2.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and "query_value" in rows[0]


def test_a_caption_says_what_one_sees(study: Path, made: Path) -> None:
    page = make_page(study, PAGES)
    [section] = [section for section in page.sections if section.key == "comparison"]
    text = (made / "comparison.1.txt").read_text(encoding="utf-8")
    assert text.startswith(f"{section.drawings[0].alt}. ")
    for part in (*section.seen, section.how, page.title, page.facts):
        assert part in text
    assert "bootstrap" in text and "18 sentences" in text
    assert all("\n" not in path.read_text(encoding="utf-8")[:-1] for path in made.glob("*.txt"))


def test_references_are_those_of_the_study(made: Path) -> None:
    text = (made / "references.bib").read_text(encoding="utf-8")
    assert text.count("\n@") >= 1 and "relneuron" in text


def test_the_same_study_gives_the_same_files(study: Path, made: Path, tmp_path: Path) -> None:
    """In another process, with another hash seed, timezone, locale and matplotlib configuration."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 20\npdf.fonttype: 3\nsavefig.dpi: 50\n", encoding="utf-8")
    code = (
        "import sys, pathlib\n"
        "from relneuron.report.save import FORMATS, FigureOptions\n"
        "from relneuron.study.figures import figures\n"
        "study, out = map(pathlib.Path, sys.argv[1:])\n"
        "figures(study, out, FigureOptions(format=FORMATS, width=3.3))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    environment |= {"MATPLOTLIBRC": str(settings), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(study), str(tmp_path / "again")]
    subprocess.run(words, check=True, env=environment)
    assert files_of(tmp_path / "again") == files_of(made)


def test_another_width_is_another_drawing(study: Path, made: Path, tmp_path: Path) -> None:
    figures(study, tmp_path / "wide", FigureOptions(format=("svg",), width=7.0))
    wide, narrow = (
        ElementTree.parse(folder / "comparison.1.svg").getroot()
        for folder in (tmp_path / "wide", made)
    )
    assert wide.get("width") == "504pt"

    def sizes(root: Any) -> set[str]:
        return {
            size for t in root.iter(f"{SVG}text") for size in re.findall(r"[\d.]+px", str(t.attrib))
        }

    assert "9px" in sizes(wide) and "7.65px" in sizes(narrow)


# What is asked for


@pytest.mark.parametrize(
    ("text", "width"),
    [("3.3in", 3.3), ("8.4cm", 8.4 / 2.54), ("84 mm", 8.4 / 2.54), ("252pt", 3.5), ("7.in", 7.0)],
)
def test_widths(text: str, width: float) -> None:
    assert inches(text) == pytest.approx(width)


@pytest.mark.parametrize(
    "text",
    ["", "3.3", "in", "3,3in", "-3in", "+3in", "1e3mm", "nanin", "infin", "3.3 inch", "3px", "²in"]
    + ["0in", "2.99in", "41in", "5mm", "9999999999pt"],
)
def test_odd_widths_are_refused_with_words(text: str) -> None:
    with pytest.raises(RelneuronError, match="--width") as error:
        inches(text)
    assert "3.3in" in error.value.fix and error.value.exit_code == 2


def test_a_width_from_python_has_the_same_limits() -> None:
    for width in (1.0, 41.0, float("nan")):
        with pytest.raises(RelneuronError, match="--width"):
            FigureOptions(width=width)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    study, out = write_study(tmp_path / "study"), tmp_path / "figures"
    out.mkdir()
    (out / "drop.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RelneuronError, match=r"drop\.txt exists"):
        figures(study, out)
    assert files_of(out) == {"drop.txt": b"mine"}
    figures(study, out, force=True)
    assert (out / "drop.txt").read_bytes() != b"mine" and (out / "drop.pdf").exists()


@pytest.mark.parametrize("place", ["study", "study/analyses", "study/concepts", "study/drop.txt"])
def test_files_of_a_study_are_never_overwritten(place: str, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    (study / "concepts").mkdir()
    (study / "concepts" / "manifest.json").write_text("{}")
    (study / "drop.txt").write_text("a file")
    before = files_of(tmp_path)
    with pytest.raises(RelneuronError) as error:
        figures(study, tmp_path / place, force=True)
    assert error.value.exit_code == 2 and files_of(tmp_path) == before
