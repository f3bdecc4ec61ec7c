"""Figures on a sheet: as wide as asked for, with text that can be read, and told apart in grey.

The studies are those of test_pages.py: every figure of every kind of study.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from relneuron.report import kit, paper
from relneuron.report.page import make_page
from relneuron.report.paper import fit
from relneuron.study.pages import PAGES
from tests.kit.attribution_studies import write_attribution
from tests.kit.contrasted import write_contrast_study
from tests.kit.corpus_studies import write_corpus_study
from tests.kit.gradient_studies import write_fact_study
from tests.kit.studies import SETS, write_study, write_whole_study

LONG = "a_relation_with_quite_a_long_name_{}_of_its_own"


def many_groups(folder: Path) -> Path:
    return write_corpus_study(folder, tuple(f"group_number_{i:02}" for i in range(22)))


def long_names(folder: Path) -> Path:
    a, b = LONG.format(1), LONG.format(2)
    return write_whole_study(
        folder,
        relations=(a, b),
        right={"clean": {a: 3, b: 2}, a: {a: 1, b: 4}},
        sets={a: SETS["company_ceo"], b: SETS["company_hq"]},
    )


WRITERS: dict[str, Callable[[Path], Path]] = {
    "relations": lambda folder: write_study(folder, splits=("eva", "eva2", "eva.de")),
    "analyses": write_whole_study,
    "long": long_names,
    "attribution": write_attribution,
    "corpus": write_corpus_study,
    "groups": many_groups,
    "facts": write_fact_study,
    "contrast": write_contrast_study,
}


@cache
def study_of(kind: str, root: Path) -> Path:
    return WRITERS[kind](root / kind)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


def labels_of(axis: Axis) -> tuple[list[Text], list[Text]]:
    """What is written at the ticks of an axis, and what is not as it is beyond the axis' end."""
    low, high = sorted(axis.get_view_interval())
    labels = list(zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True))
    inside = [text for place, text in labels if low <= place <= high and text.get_text()]
    return inside, [text for place, text in labels if not low <= place <= high]


def texts_of(fig: Figure) -> list[Text]:
    axes = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    beyond = {id(text) for axis in axes for text in labels_of(axis)[1]}
    texts = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if id(text) not in beyond]


def box_of(fig: Figure, text: Any) -> Bbox:
    return Bbox(text.get_window_extent().get_points() / fig.dpi)


@pytest.mark.parametrize(
    ("kind", "width"),
    [*((kind, 3.3) for kind in WRITERS), ("analyses", 7.0), ("attribution", 7.0), ("corpus", 7.0)],
)
def test_every_figure_fits_its_sheet(kind: str, width: float, root: Path) -> None:
    page = make_page(study_of(kind, root), PAGES)
    drawings = [drawing for section in page.sections for drawing in section.drawings]
    assert drawings
    for drawing in drawings:
        fig = drawing.figure
        with kit.themed():
            sheet, _ = fit(fig, width)
            assert sheet.width == pytest.approx(width)
            fig.draw_without_rendering()  # which places the texts of legends
            inside = sheet.padded(0.005)
            for text in texts_of(fig):
                box, name = box_of(fig, text), (drawing.stem, text.get_text())
                assert inside.x0 <= box.x0 and box.x1 <= inside.x1, name
                assert inside.y0 <= box.y0 and box.y1 <= inside.y1, name
                assert text.get_fontsize() >= paper.SMALLEST, name
            for ax in fig.axes:
                assert ax.get_position().width >= 0.3, drawing.stem
                # Numbers and names of an axis do not touch one another.
                for axis in (ax.xaxis, ax.yaxis):
                    labels = labels_of(axis)[0]
                    upright = [box_of(fig, text) for text in labels if not text.get_rotation()]
                    for a, b in combinations(upright, 2):
                        assert not a.padded(-0.01).overlaps(b.padded(-0.01)), drawing.stem
                cells = [text for text in ax.texts if text.get_gid() == kit.CELL]
                room = ax.get_position().width / ax.viewLim.width
                assert all(box_of(fig, text).width <= 1.02 * room for text in cells), drawing.stem


def test_text_of_a_narrow_sheet_is_not_scaled_with_it(root: Path) -> None:
    """Three times narrower, and the names are smaller by what a narrow sheet's are."""
    sizes = {}
    for width in (3.0, 10.0):
        [section] = [s for s in make_page(study_of("relations", root), PAGES).sections[:1]]
        fig = section.drawings[0].figure
        with kit.themed():
            fit(fig, width)
            sizes[width] = fig.axes[0].get_yticklabels()[0].get_fontsize()
    assert sizes == {10.0: 9.0, 3.0: pytest.approx(paper.SMALLER * 9)}


def panels(n: int, title: str = "") -> Figure:
    with kit.figure() as fig:
        for place in range(n):
            ax = kit.rows_axes(fig, ["some row", "another"], left=2.0 * place, named=place == 0)
            ax.set_position((2.0 * place, 0, 1.8, 0.7))
            ax.set_title(title, loc="left")
            ax.set(xlim=(0, 100), xticks=(0, 50, 100), xlabel="share, %")
    return fig


def test_panels_without_room_stand_below_with_names_of_their_own() -> None:
    with kit.themed():
        fit(wide := panels(4), 7.0)
        fit(narrow := panels(4), 2.5)
    for fig, beside in ((wide, 4), (narrow, 2)):
        lefts = [round(ax.get_position().x0, 3) for ax in fig.axes]
        assert len({*lefts}) == beside
        for place, ax in enumerate(fig.axes):
            names = [text.get_text() for text in ax.get_yticklabels()]
            assert names == (["some row", "another"] if place % beside == 0 else ["", ""])
    tops = [ax.get_position().y1 for ax in narrow.axes]
    assert tops[0] == tops[1] > tops[2] == tops[3]


def squares(n: int, numbers: float) -> Figure:
    values = np.full((n, n), numbers)
    values[0, 1] = -numbers
    sure = np.eye(n, dtype=np.bool_)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = [f"row {i}" for i in range(n)]
    with kit.figure() as fig:
        colours = ScalarMappable(Normalize(-numbers, numbers), colormaps["RdBu_r"])
        kit.matrix(fig, names, names, values, colours, sure=sure)
    return fig


def test_numbers_that_do_not_fit_their_cells_become_dots_and_lines() -> None:
    with kit.themed():
        _, few = fit(squares(3, 100.0), 3.3)
        _, many = fit(fig := squares(14, 100.0), 3.3)
    assert few == [] and len(many) == 3
    cells = [text for text in fig.axes[0].texts if text.get_gid() == kit.CELL]
    dots = [text.get_position() for text in cells if text.get_text()]
    assert dots == [(i + 0.5, i + 0.5) for i in range(14)]
    [lines] = [patch for patch in fig.axes[0].patches if patch.get_hatch()]
    assert lines.get_path().get_extents().extents.tolist() == [1, 0, 2, 1]  # of the one below 0


def test_colours_are_steps_in_grey() -> None:
    def brightness(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    steps = [brightness(c) for c in (kit.INK, kit.MUTED, kit.OFF, kit.RANDOM, kit.PAPER)]
    assert min(np.diff(steps)) >= 0.2
    # A page finds a colour of the theme by its value: no other part of a figure may have one.
    assert not {kit.DARK, kit.FAINT, kit.LIGHT} & {*kit.THEME.values()}
    assert len({*kit.THEME.values()}) == len(kit.THEME)


def test_letters_without_a_font_are_said() -> None:
    with kit.themed():
        _, said = fit(panels(2, "中文 and more"), 7.0)
        _, none = fit(panels(2, "ß, ж, →"), 7.0)
    assert said == ["DejaVu Sans lacks 中文: boxes in pdf and png."] and none == []


def test_text_that_needs_more_room_is_not_cut_off() -> None:
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, ["a row"])
        kit.beside(ax, "", ["a note that is " + "very " * 20 + "long"])
    with kit.themed():
        sheet, said = fit(fig, 3.3)
    assert sheet.width > 3.3 and said == [f"The text of the figure needs {sheet.width:.2f}in."]
    assert box_of(fig, ax.texts[1]).x1 < sheet.x1
