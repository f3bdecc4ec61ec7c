"""The bar of a stage: off where nobody looks, shown in a terminal, a widget in a notebook."""

from __future__ import annotations

from typing import Any

import pytest
from tqdm.std import tqdm

from relneuron.artifact.journal import progress_bar


class Widget(tqdm):
    """As tqdm.auto gives in a notebook."""


Widget.__module__ = "tqdm.notebook"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_is_off_where_there_is_no_terminal(quiet: bool) -> None:
    with progress_bar(3, "record", "prompt", quiet) as bar:
        assert bar.disable


@pytest.mark.parametrize("quiet", [False, True])
def test_a_notebook_shows_it(quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    with progress_bar(3, "record", "prompt", quiet, done=1) as bar:
        assert isinstance(bar, Widget) and bar.disable == quiet
        bar.update(2)
    assert ("record" in capsys.readouterr().err) != quiet
