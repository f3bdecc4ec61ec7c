"""NLL under masks: what plain forwards of edited weights give, one window at a time.

The corpus is a list of windows here; test_nll_stage.py has the stage, and texts in files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron.ablation.windows
from relneuron.ablation.nll import plan_masks, summarise, window_rows
from relneuron.ablation.windows import Scorer, Texts, read_texts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from tests.conftest import FAMILIES, tiny_model
from tests.kit.files import read_rows
from tests.kit.nll_runs import (
    HIDDEN,
    LAYERS,
    SETS,
    SHAPE,
    VOCABULARY,
    WIDTH,
    Windows,
    drawn,
    make_study,
    named_tokenizer,
    plain,
    run,
    text,
    without,
)

pytestmark = pytest.mark.filterwarnings("ignore:empty. its set has no neuron")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture
def tokenizer() -> Any:
    return named_tokenizer()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_study(tmp_path, monkeypatch)


# --- one window ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 12])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_windows_are_read_as_the_model_reads_them(
    family: str, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the logits of one window are made in several slices, or are scaled or capped."""
    changes = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 2.0}}
    model = tiny_model(family, initializer_range=0.3, **changes.get(family, {}))
    windows = [np.array(ids, np.int32) for ids in drawn(7, length)]
    wanted = [plain(model, ids.tolist()) for ids in windows]
    for limit in (2**26, 5 * VOCABULARY, 1):
        monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", limit)
        scorer = Scorer(model, windows)
        assert scorer.notices == []
        rows = [3, 0, 1, 6, 2, 4, 5]
        found = scorer.ask(rows, lambda step: None)
        assert np.allclose(found, [wanted[row] for row in rows], atol=1e-5)
    assert np.ptp(wanted) > 0.1


def test_only_slices_of_the_logits_are_held(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", 10 * VOCABULARY)
    scorer = Scorer(model, [np.array(ids, np.int32) for ids in drawn(6, 12)])
    shapes: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    scorer.ask(list(range(6)), lambda step: None)
    handle.remove()
    # 11 of the 12 tokens of each window: the last one predicts nothing that is scored.
    assert [tuple(s) for s in shapes] == [(10, VOCABULARY)] * 6 + [(6, VOCABULARY)]


@pytest.mark.parametrize("length", [None, 12])
def test_a_head_of_another_kind_is_the_models_own_forward(
    length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    true = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = true(*args, **options)
        out.logits = out.logits.cumsum(-1) / 4
        return out

    monkeypatch.setattr(model, "forward", forward)
    windows = [np.array(ids, np.int32) for ids in drawn(7, length)]
    longest = max(map(len, windows)) - 1
    monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", 3 * longest * VOCABULARY)
    scorer = Scorer(model, windows)
    assert len(scorer.notices) == 1
    groups: list[list[int]] = []
    found = scorer.ask(list(range(7)), lambda step: groups.append(step.rows.tolist()))
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert np.allclose(found, [plain(model, ids.tolist()) for ids in windows], atol=1e-5)


def test_in_bfloat16_log_probabilities_are_float32() -> None:
    model = tiny_model("llama", torch.bfloat16, initializer_range=0.3)
    windows = [np.array(ids, np.int32) for ids in drawn(5, 12)]
    scorer = Scorer(model, windows)
    assert scorer.notices == []
    wanted = [plain(model, ids.tolist()) for ids in windows]
    assert np.allclose(scorer.ask(list(range(5)), lambda step: None), wanted, atol=2e-2)


# --- the matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 20])
def test_every_mask_and_window_is_the_edited_model_on_the_window_alone(
    model: Any, tokenizer: Any, study: Path, length: int | None
) -> None:
    windows = text(drawn(14, length))
    cells = run(model, tokenizer, study, windows, batch_tokens=150, mode="documents")
    rows = read_rows(study / "o" / "nll_windows.csv")
    masks = ["clean", *SETS]
    groups = ["en", "zh", "de"]
    found: dict[tuple[str, str], list[float]] = {}
    place = iter(rows)
    for mask in masks:
        edited = without(model, SETS.get(mask, []))
        for group in groups:
            mine = [ids for name, ids in windows if name == group]
            for number, ids in enumerate(mine):
                row = next(place)
                assert [row[c] for c in ("mask", "group", "window", "n_tokens")] == [
                    *(mask, group, str(number), str(len(ids) - 1)),
                ]
                assert abs(float(row["nll"]) - plain(edited, ids)) <= 1e-5
                found.setdefault((mask, group), []).append(float(row["nll"]))
    assert next(place, None) is None
    table = read_rows(study / "o" / "nll.csv")
    assert [(row["mask"], row["group"]) for row in table] == list(found)
    for row, cell, (key, values) in zip(table, cells, found.items(), strict=True):
        n_tokens = sum(len(ids) - 1 for name, ids in windows if name == key[1])
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        assert (int(row["n_windows"]), int(row["n_tokens"])) == (len(values), n_tokens)
        assert abs(float(row["nll"]) - mean) <= 1e-12
        assert abs(float(row["nll_se"]) - error) <= 1e-12
        assert math.isclose(float(row["perplexity"]), math.exp(mean), rel_tol=1e-12)
        assert [str(value) for value in cell] == list(row.values())
    by_mask = {m: tuple(v for (a, _), vs in found.items() if a == m for v in vs) for m in masks}
    # No neuron off is the clean model to the last bit, and the other masks all differ.
    assert by_mask["empty"] == by_mask["clean"]
    assert len(set(by_mask.values())) == len(masks) - 1


def test_one_window_has_no_standard_error(model: Any, tokenizer: Any, study: Path) -> None:
    cells = run(model, tokenizer, study, text(drawn(3)))
    assert {cell.nll_se for cell in cells} == {None} and len(cells) == 15
    assert {row["nll_se"] for row in read_rows(study / "o" / "nll.csv")} == {""}


@pytest.mark.filterwarnings("ignore:de. no window")
def test_windows_beyond_the_number_or_of_one_token_are_left_out(
    model: Any, tokenizer: Any, study: Path
) -> None:
    windows = [("zh", [5]), *(("zh", ids) for ids in drawn(4)), ("de", [7]), ("en", [3, 4])]
    cells = run(model, tokenizer, study, windows, windows=3)
    clean = [cell for cell in cells if cell.mask == "clean"]
    assert [(c.group, c.n_windows) for c in clean] == [("en", 1), ("zh", 3)]
    assert clean[1].n_tokens == sum(len(ids) - 1 for _, ids in windows[1:4])
    assert "de: no window of 32 tokens" in Manifest(study / "o").data["fallbacks"]


def test_texts_come_by_group_in_the_order_of_the_feed() -> None:
    texts = read_texts(Windows(("a", "b"), [("b", [1, 2]), ("a", [3, 4]), ("b", [5, 6])]), 9)
    assert texts.groups == ["a", "b", "b"]
    assert [ids.tolist() for ids in texts.ids] == [[3, 4], [1, 2], [5, 6]]
    many = Windows(("a",), [("a", [1, 2, i]) for i in range(200)])
    assert len(read_texts(many, 150).ids) == 150


class Counted(list[Any]):
    """A list that counts how many of its items are looked at."""

    n = 0

    def __iter__(self) -> Any:
        for item in super().__iter__():
            self.n += 1
            yield item

    def __getitem__(self, place: Any) -> Any:
        self.n += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("n_masks", [1, 7, 60])
def test_the_windows_are_looked_at_as_often_whatever_the_number_of_masks(n_masks: int) -> None:
    """Of twice the groups a matrix has four times the cells, and takes four times as long."""
    rng = np.random.default_rng(0)
    groups = [f"g{i // 5}" for i in range(200)]
    texts = Texts(Counted(groups), Counted(drawn(200)))
    masks, values = [f"m{i}" for i in range(n_masks)], rng.random((n_masks, 200))
    cells = summarise(masks, texts, values)
    rows = [*window_rows(masks, texts, values)]
    assert texts.groups.n == texts.ids.n == 2 * 200  # type: ignore[attr-defined]
    assert [(c.mask, c.group) for c in cells] == [(m, f"g{i}") for m in masks for i in range(40)]
    assert np.allclose([c.nll for c in cells], values.reshape(-1, 40, 5).mean(2).ravel())
    assert [row[-1] for row in rows] == values.ravel().tolist()


def test_masks_of_random_sets() -> None:
    rng = np.random.default_rng(0)
    widths = [WIDTH, WIDTH, HIDDEN]
    gates = np.array([la * sum(widths) + i for la in range(LAYERS) for i in range(WIDTH)])
    sets = {"a": rng.choice(gates, 30, replace=False), "b": rng.choice(gates, 10, replace=False)}
    plan = plan_masks(sets, SHAPE, 3)
    assert [a.condition.name for a in plan] == [
        *("clean", "a", "b", "random.0", "random.1", "random.2"),
    ]
    assert len(plan[0].places) == 0
    for ablation in plan[3:]:
        assert len(set(ablation.places.tolist())) == 30
        assert set(ablation.places.tolist()) <= set(gates.tolist())
        assert (np.diff(ablation.places) > 0).all()
    assert len({a.places.tobytes() for a in plan}) == 6
    again = plan_masks(sets, SHAPE, 3)
    assert [a.places.tobytes() for a in again] == [a.places.tobytes() for a in plan]
    downs = {"c": np.array([2 * WIDTH, 2 * WIDTH + 5])}
    places = plan_masks(sets | downs, SHAPE, 20)
    sites = {int(p % sum(widths) // WIDTH) for a in places[4:] for p in a.places}
    assert sites == {0, 2}
    for names in (["clean"], ["a", "random.0"]):
        with pytest.raises(RelneuronError, match=f"two masks are named {names[-1]}"):
            plan_masks(dict.fromkeys(names, sets["a"]), SHAPE, 1)


def test_random_sets_are_read_as_others(model: Any, tokenizer: Any, study: Path) -> None:
    cells = run(model, tokenizer, study, text(drawn(6)), random_sets=2)
    assert [cell.mask for cell in cells][::3] == ["clean", *SETS, "random.0", "random.1"]
    assert Manifest(study / "o").data["stages"]["nll"]["random_set_size"] == 31
