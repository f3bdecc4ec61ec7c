"""Fits a figure to a width: its panels are placed anew, its text stays as large as print asks for.

save.py calls it. A picture that is scaled has text that nobody reads; here only what is drawn
between the text is made narrower or wider.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from relneuron.report import kit

NARROW = 5.0  # inches: text is smaller on a sheet of less
SMALLER = 0.85
# Dots an inch of a png, as journals ask for of lines. With so many, text is measured as wide as it
# is in a pdf; with few its letters are moved to whole dots.
DPI = 600
SMALLEST = 6.0  # points of any text; journals ask for 5 to 7
LOWER = 0.75  # ... and what is drawn lower
LEAST = 0.55  # inches of a panel that stands beside another one: room for 0, 50 and 100
WIDEST = 1.6  # times as wide as on the page
SCALE = 2.0  # inches of a scale of colours, at most
DENSE = 8  # rows of a matrix whose names are as small as may be on a narrow sheet
GAP, PAD = 0.08, 0.02  # inches between panels, and around all
APART = 0.03  # inches between names
NAMES = 0.45  # the most of the width that names of rows may take
ROUNDS = 8  # of placing and measuring; three settle all figures of the reports


@dataclass
class Panel:
    """Axes that stand above one another, with the legend that is theirs; inches."""

    axes: list[Axes]
    boxes: list[Bbox]  # on the page
    legends: list[Legend] = field(default_factory=list)
    is_named: bool = True  # whether it has names for its rows, or those of the panel beside it

    @property
    def box(self) -> Bbox:
        return Bbox.union(self.boxes)

    @property
    def is_square(self) -> bool:
        """Whether it is as much lower as it is narrower."""
        return any(ax.get_label() == kit.SQUARE for ax in self.axes)


def fit(fig: Figure, width: float) -> tuple[Bbox, list[str]]:
    """Place all of a figure anew on a sheet of `width` inches.

    Returns the part of the figure that is the sheet, in inches, and what is shown otherwise than on
    the page, in sentences.
    """
    FigureCanvasAgg(fig)
    fig.set_dpi(DPI)
    is_narrow = width < NARROW
    _size_text(fig, is_narrow)
    panels, scales = _panels(fig, LOWER if is_narrow else 1.0)
    n_columns = len({round(panel.box.x0, 3) for panel in panels})
    for ax in fig.axes:
        label = ax.xaxis.label
        if label.get_text() and _inches(fig, label).width > 0.9 * width:
            words = label.get_text()
            label.set_text(textwrap.fill(words, int(0.6 * len(words))))
    _shorten_names(panels, NAMES * width, is_narrow)
    room = width - 2 * PAD
    for beside in range(n_columns, 0, -1):
        narrowest, sheet = _place(fig, panels, scales, beside, room)
        if narrowest >= LEAST:
            break
    _thin(fig)
    said = [*_fit_numbers(fig), *_without_font(fig)]
    if sheet.width > room + 0.01:  # names and numbers alone take more: nothing is cut off
        width = sheet.width + 2 * PAD
        said.append(f"The text of the figure needs {width:.2f}in.")
    left = (sheet.x0 + sheet.x1 - width) / 2
    return Bbox.from_extents(left, sheet.y0 - PAD, left + width, sheet.y1 + PAD), said


# Measuring


def _inches(fig: Figure, *artists: Axes | Legend | Text) -> Bbox:
    """What some parts of a figure take with all their text."""
    boxes = [artist.get_tightbbox() for artist in artists]
    box = Bbox.union([box for box in boxes if box is not None])
    return Bbox(box.get_points() / fig.dpi)


def _panels(fig: Figure, size: float) -> tuple[list[Panel], list[Axes]]:
    """The panels of a figure as they are read, and the scales of colours below them."""
    panels: list[Panel] = []
    scales = [ax for ax in fig.axes if ax.get_label() == kit.SCALE]
    for ax in fig.axes:
        if ax in scales:
            continue
        box = ax.get_position().frozen()
        for panel in panels:
            is_below = abs(panel.box.x0 - box.x0) < 0.01
            apart = max(box.y0 - panel.box.y1, panel.box.y0 - box.y1)
            if is_below and apart < 0.2:  # bars above the squares of the same layers
                panel.axes.append(ax)
                panel.boxes.append(box)
                break
        else:
            panels.append(Panel([ax], [box]))
    panels.sort(key=lambda panel: (-round(panel.box.y1, 3), panel.box.x0))
    for panel in panels:
        texts = [text for ax in panel.axes for text in ax.get_yticklabels()]
        panel.is_named = any(text.get_text() for text in texts)
        panel.boxes = [Bbox(size * box.get_points()) for box in panel.boxes]
    if len(fig.legends) > 1:
        for legend in fig.legends:
            left = legend.get_bbox_to_anchor().x0 / fig.dpi
            min(panels, key=lambda panel: abs(panel.box.x0 - left)).legends.append(legend)
    return panels, scales


def _figure(artist: Artist) -> Figure:
    fig = artist.get_figure(root=True)
    assert fig is not None, "it is part of one"
    return fig


def _points(text: Text) -> float:
    return float(text.get_fontsize())


# Placing


def _place(
    fig: Figure, panels: Sequence[Panel], scales: Sequence[Axes], beside: int, room: float
) -> tuple[float, Bbox]:
    """Place panels so many beside one another; the least width of one, and what all take."""
    _name_rows(panels, beside)
    places = [divmod(i, beside) for i in range(len(panels))]
    n_rows = places[-1][0] + 1
    stretch = 1.0
    widths = np.zeros(beside)
    for panel, (_, column) in zip(panels, places, strict=True):
        widths[column] = max(widths[column], panel.box.width)
    for _ in range(ROUNDS):
        # What the text of each panel takes: left, below, right, above.
        text = np.zeros((len(panels), 4))
        for place, panel in enumerate(panels):
            _move(panel, 0.0, 0.0, stretch)
            outer = _inches(fig, *panel.axes, *panel.legends)
            inner = Bbox.union([ax.get_position() for ax in panel.axes])
            text[place] = (
                *(inner.x0 - outer.x0, inner.y0 - outer.y0),
                *(outer.x1 - inner.x1, outer.y1 - inner.y1),
            )
        text = np.fmax(text, 0.0)
        sides = np.zeros((beside, 2))
        for (_, column), own in zip(places, text, strict=True):
            sides[column] = np.fmax(sides[column], own[[0, 2]])
        free = room - sides.sum() - GAP * (beside - 1)
        before, stretch = stretch, float(np.clip(free / widths.sum(), 0.05, WIDEST))
        if abs(stretch - before) < 1e-4:
            break
    least = min(min(ax.get_position().width for ax in panel.axes) for panel in panels)
    lefts = [
        sides[: c + 1, 0].sum() + sides[:c, 1].sum() + stretch * widths[:c].sum() + GAP * c
        for c in range(beside)
    ]
    below = 0.0
    for row in range(n_rows):
        line = [place for place, (r, _) in enumerate(places) if r == row]
        height = max(_height(panels[place], stretch) for place in line)
        below -= max(text[place, 3] for place in line) + height
        for place in line:
            up = height - _height(panels[place], stretch)
            _move(panels[place], lefts[places[place][1]], below + up, stretch)
        below -= max(text[place, 1] for place in line) + GAP
    for ax in scales:
        _place_scale(fig, ax, (lefts[0], below - 0.05), room)
    top = _inches(fig, *fig.axes).y1
    if len(fig.legends) == 1:
        _fit_legend(fig, fig.legends[0], (lefts[0], top + 0.08), room)
    return least, _inches(fig, *fig.axes, *fig.legends)


def _height(panel: Panel, stretch: float) -> float:
    return float(panel.box.height) * (min(stretch, 1.0) if panel.is_square else 1.0)


def _move(panel: Panel, left: float, below: float, stretch: float) -> None:
    """Place a panel's axes, from its lower left corner on."""
    wide = min(stretch, 1.0) if panel.is_square else stretch
    high = wide if panel.is_square else 1.0
    corner = panel.box
    for ax, box in zip(panel.axes, panel.boxes, strict=True):
        x, y = left + wide * (box.x0 - corner.x0), below + high * (box.y0 - corner.y0)
        ax.set_position((x, y, wide * box.width, high * box.height))
    for legend in panel.legends:
        high_up = below + high * corner.height + 0.3
        fig = _figure(legend)
        legend.set_bbox_to_anchor((left, high_up), transform=fig.transSubfigure)


def _place_scale(fig: Figure, ax: Axes, corner: tuple[float, float], room: float) -> None:
    """A scale of colours from its upper left corner on, with its numbers on the sheet."""
    left, high = corner[0], ax.get_position().height
    right = min(room, left + SCALE)
    for _ in range(3):
        ax.set_position((left, corner[1] - high, right - left, high))
        box = _inches(fig, ax)
        left, right = left + max(0.0, -box.x0), right - max(0.0, box.x1 - room)


def _fit_legend(fig: Figure, legend: Legend, place: tuple[float, float], room: float) -> None:
    """A legend of as many columns as there is room for; from the sheet's edge on if it is wide."""
    marks, size = legend.legend_handles, _points(legend.get_texts()[0])
    for n_columns in (3, 2, 1):
        if legend in fig.legends:
            legend.remove()
        legend = kit.legend(fig, marks, place[1], place[0], n_columns)
        for text in legend.get_texts():
            text.set_fontsize(size)
        wide = _inches(fig, legend).width
        if wide <= room:
            break
    if place[0] + wide > room:
        legend.set_bbox_to_anchor((0.0, place[1]), transform=fig.transSubfigure)


def _name_rows(panels: Sequence[Panel], beside: int) -> None:
    """Names for the rows of panels that begin a line, and for the axes of those that end one."""
    for place, panel in enumerate(panels):
        for ax, first in zip(panel.axes, panels[0].axes, strict=False):
            if panel.is_named or not (like := first.get_yticklabels()):
                continue
            names = [text.get_text() if place % beside == 0 else "" for text in like]
            ax.set_yticks(first.get_yticks(), names)
            size, colour = like[0].get_fontsize(), like[0].get_color()
            ax.tick_params(axis="y", labelsize=size, labelcolor=colour)
    labels = [panel.axes[-1].get_xlabel() for panel in panels]
    for place, panel in enumerate(panels):
        is_last, axis = place + beside >= len(panels), panel.axes[-1].xaxis
        if "" in labels:  # only the last ones have some
            axis.set_label_text(max(labels, key=len) if is_last else "")


# Text


def _axes_of(fig: Figure) -> Iterable[Axis]:
    return [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]


def _size_text(fig: Figure, is_narrow: bool) -> None:
    """Smaller text on a narrow sheet, and nowhere text that is too small."""

    def size(text: Text) -> float:
        return max(SMALLEST, (SMALLER if is_narrow else 1.0) * _points(text))

    # What an axis writes is made anew when it changes: its size is the axis's to know.
    of_axes = [(axis, axis.get_ticklabels()) for axis in _axes_of(fig)]
    written = {id(text) for _, texts in of_axes for text in texts}
    for text in fig.findobj(Text):
        if id(text) not in written:
            text.set_fontsize(size(text))
    for axis, texts in of_axes:
        if texts:
            is_dense = axis.axes.get_label() == kit.SQUARE and len(texts) > DENSE
            axis.set_tick_params(labelsize=SMALLEST if is_dense and is_narrow else size(texts[0]))


def _shorten_names(panels: Sequence[Panel], room: float, is_narrow: bool) -> None:
    """Cut names in their middle until those of the rows take no more than `room` inches."""
    axes = [ax for panel in panels for ax in panel.axes]
    texts = [text for ax in axes for text in ax.get_yticklabels() if text.get_text()]
    wide = max((_inches(_figure(text), text).width for text in texts), default=0.0)
    longest = max((len(text.get_text()) for text in texts), default=0)
    most = int(longest * room / wide) if wide > room else 34
    for ax in axes:
        if is_narrow and len(panels) > 4:  # two beside one another have room for so many
            title = ax.get_title("left")
            for text in ax.findobj(Text):
                if title and text.get_text() == title:
                    text.set_text("\n".join(kit.short(line, 22) for line in title.splitlines()))
        for axis, n in ((ax.yaxis, most), (ax.xaxis, 22 if is_narrow else 34)):
            names = [text.get_text() for text in axis.get_ticklabels()]
            if any(len(name) > n for name in names):
                axis.set_ticks(axis.get_ticklocs(), [kit.short(name, n) for name in names])


def _thin(fig: Figure) -> None:
    """Leave out names and numbers of axes that would touch one another: all but each second, ..."""
    for axis in _axes_of(fig):
        low, high = sorted(axis.get_view_interval())
        labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        shown = [(place, text) for place, text in labels if low <= place <= high]
        if not any(text.get_text() for _, text in shown):
            continue
        side = "intervalx" if isinstance(axis, XAxis) else "intervaly"
        ends = [getattr(_inches(fig, text), side) for _, text in shown]
        apart = APART if isinstance(axis, XAxis) else 0.0
        if shown[0][1].get_rotation():  # side by side they are as far apart as they are high
            ends = [(end[0], end[0] + _points(shown[0][1]) / 72) for end in ends]
            apart = 0.0
        order = sorted(range(len(ends)), key=lambda i: ends[i][0])
        for step in range(1, len(order) + 1):
            kept = order[::step]
            pairs = zip(kept, kept[1:], strict=False)
            if all(ends[b][0] - ends[a][1] >= apart for a, b in pairs):
                break
        if step > 1:
            axis.set_ticks([shown[i][0] for i in kept], [shown[i][1].get_text() for i in kept])


def _fit_numbers(fig: Figure) -> list[str]:
    """Numbers within their cells: smaller if need be, or dots and lines in place of them."""
    said = []
    for ax in fig.axes:
        texts = [text for text in ax.texts if text.get_gid() == kit.CELL]
        if not texts:
            continue
        wide = max(_inches(fig, text).width for text in texts)
        least = min(_points(text) for text in texts)
        room = 0.94 * ax.get_position().width / ax.viewLim.width
        shrink = min(1.0, room / wide)
        if shrink * least >= SMALLEST or shrink == 1:
            for text in texts:
                text.set_fontsize(shrink * _points(text))
            continue
        for text in ax.texts:
            if text.get_gid() == kit.ERROR:
                text.set_text("")
        said.append("The cells are too small for their numbers, which are in the table.")
        is_bold = [text.get_fontweight() == "bold" for text in texts]
        is_known = not all(is_bold)  # else nothing was tested
        shape = np.abs(ax.viewLim.size[::-1]).round().astype(int)
        negative = np.zeros(shape, np.bool_)
        for text, is_sure in zip(texts, is_bold, strict=True):
            column, row = (int(x) for x in text.get_position())
            negative[row, column] |= text.get_text().startswith("−")
            text.set(text="•" if is_sure and is_known else "", fontsize=SMALLEST)
        if any(is_bold) and is_known:
            said.append("A dot stands for a number in bold.")
        if negative.any():
            kit.hatch(ax, negative)
            said.append("Lines: below 0.")
    return said


def _without_font(fig: Figure) -> list[str]:
    """Of letters that the font of figures lacks: a viewer of svg has other ones, a pdf has not."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    texts = {char for text in fig.findobj(Text) for char in text.get_text()}
    lost = "".join(sorted(char for char in texts if ord(char) not in known and char.isprintable()))
    return [f"DejaVu Sans lacks {lost[:20]}: boxes in pdf and png."] if lost else []
