"""bench.gradients: its peer is the definition, and its contestants are held to it."""

from __future__ import annotations

import pytest
import torch

from bench import gradients
from bench.attribution import make_model
from relneuron.model.gradients.reference import integrate_reference


@pytest.fixture(scope="module")
def race() -> gradients.Race:
    return gradients.Race(make_model(90, 64, 48, 2, key_heads=4), 2, 6, 3)


def test_all_contestants_give_what_the_definition_gives(race: gradients.Race) -> None:
    wanted = integrate_reference(race.sites, race.ids, race.targets, race.points).ig
    for name, run in race.contestants().items():
        found = run()
        n = 2 if name == gradients.MANY else 1
        assert found.shape == (n, 2, 48)
        assert float((found - wanted[:n]).abs().max()) < 1e-5 * float(wanted.abs().max()), name


def test_a_wrong_contestant_has_no_time(
    race: gradients.Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "peak_rises", lambda *_: {})
    monkeypatch.setattr(gradients, "Race", lambda *_: race)
    monkeypatch.setattr(gradients, "make_model", lambda *_, **__: race.model)
    monkeypatch.setattr(race, "ours", lambda n: torch.zeros(n, 2, 48))
    before = torch.get_num_threads()
    try:
        with pytest.raises(AssertionError, match="staircase, one prompt: attributions differ by 1"):
            gradients.main(["--rounds", "1"])
    finally:
        torch.set_num_threads(before)


def test_the_forward_of_the_same_rows_keeps_a_graph_where_it_is_asked_for(
    race: gradients.Race,
) -> None:
    race.rows(graph=True)
    race.rows(graph=False)
    assert all(weight.requires_grad for weight in race.model.parameters())
