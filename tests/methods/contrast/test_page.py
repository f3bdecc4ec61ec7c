"""What the page on a contrast says: its numbers are those of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relneuron.artifact.contrast import NAME, Contrast
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.contrast.study import PAGE, read_contrast_study
from relneuron.methods.contrast.tables import contrast_tables, gini
from relneuron.report.page import kind_of, make_page, render
from relneuron.study.pages import PAGES, titles
from tests.kit.contrasted import M1, M2, write_contrast, write_contrast_study
from tests.kit.pages import tables_of, text_of


def words(folder: Path, section: str = "") -> str:
    text = text_of(render(make_page(folder, PAGES, titles())), section)
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_says_what_the_files_hold(tmp_path: Path) -> None:
    folder = write_contrast_study(tmp_path)
    assert kind_of(folder, PAGES) is PAGE
    squares = np.square(Contrast.read(folder / NAME).rms())
    best = np.sort(squares.ravel())[::-1]
    text = words(folder)
    share = 100 * best[:60].sum() / best.sum()
    assert f"The 60 neurons that change most, 25.0 % of all, have {share:.1f} % of the" in text
    # 10 of 12 texts are B's with 60 neurons; of random sets one of two has 1 of 12.
    assert "of contrast@60 A makes 83.3 % of B's change of the cost, with random ones 4.2 %" in text
    assert "A is a/model, B is a/model b" in text and "90 tokens · 240 neurons · 2 groups" in text
    half = int((np.cumsum(best) < 0.5 * best.sum()).sum()) + 1
    assert f"{half} neurons of 240" in words(folder, "concentration")
    layer = squares.sum(1)
    said = f"Layer {layer.argmax()} has {100 * layer.max() / layer.sum():.1f} % of the squared"
    assert said in words(folder, "layers")
    said = "The 60 neurons of contrast@60 make 83.3 % of the change, 58.3 % at least; none of 2 "
    assert f"{said}random sets makes more than 8.3 %" in words(folder, "effects")
    said = "contrast@60 A writes B's text in 83.3 % of cases, its own in 16.7 %"
    assert said in words(folder, "texts")


def test_the_tables(tmp_path: Path) -> None:
    folder = write_contrast_study(tmp_path)
    contrast = Contrast.read(folder / NAME)
    tables = tables_of(render(make_page(folder, PAGES, titles())))
    tables = {name.removesuffix(".csv"): rows for name, rows in tables.items()}
    sums = [contrast.arrays[f"sum_sq.{site}"].sum((0, 2)) for site in ("difference", "a")]
    rms = contrast.rms()
    for layer, row in enumerate(tables["layers"]):
        assert float(row["relative_change"]) == pytest.approx(np.sqrt(sums[0] / sums[1])[layer])
        assert float(row["rms"]) == pytest.approx(np.sqrt(np.square(rms[layer]).mean()))
        assert float(row["largest"]) == pytest.approx(rms[layer].max())
    chosen = NeuronFile.read(folder / "neurons.json").sets["contrast@60"]
    counts = [sum(layer == own for layer, *_ in chosen) for own in range(4)]
    assert [int(row["n_chosen"]) for row in tables["layers"]] == counts
    layer, _, index, score = chosen[0]
    first = tables["neurons"][0]
    assert first["neuron"] == f"L{layer}.{index}"
    assert float(first["change"]) == pytest.approx(score)
    assert float(first["std_b"]) == pytest.approx(contrast.std("b")[layer, index])
    own = contrast.take(["y"])
    assert float(tables["groups"][1]["rms"]) == pytest.approx(np.sqrt(np.square(own.rms()).mean()))
    assert [row["n_tokens"] for row in tables["groups"]] == ["40", "50"]
    # Texts that the patched neurons change come first.
    shown = tables["examples"]
    is_changed = [row["patched"] != row["clean"] for row in shown]
    assert is_changed == sorted(is_changed, reverse=True) and sum(is_changed) == 10
    assert all(row["patched"] == row["donor"] for row in shown[:10])


def test_gini() -> None:
    """0 of equal ones, 1 - 1/N of one that has all, and the mean difference over twice the mean."""
    assert gini(np.ones(7)) == pytest.approx(0)
    assert gini(np.array([0, 0, 5, 0])) == pytest.approx(0.75)
    values = np.random.default_rng(0).random(30)
    pairs = np.abs(values[:, None] - values).mean()
    assert gini(values) == pytest.approx(pairs / (2 * values.mean()))
    assert np.isnan(gini(np.zeros(3)))


def test_a_contrast_alone_has_a_page(tmp_path: Path) -> None:
    """Without sets, effects and texts: what changes, and nothing else."""
    folder = write_contrast(tmp_path)
    text = words(folder)
    assert "The neuron that changes most, 16.7 % of all, has 72.6 % of the squared change." in text
    assert "What the neurons do" not in text and "What is written" not in text
    study = read_contrast_study(folder)
    np.testing.assert_allclose(np.sqrt(study.squares[3]), 1.00249688, rtol=1e-7)
    assert [*contrast_tables(study)] == ["layers", "concentration", "neurons"]


def test_texts_without_a_cost_are_compared(tmp_path: Path) -> None:
    folder = write_contrast_study(tmp_path)
    (folder / "effect.csv").unlink()
    text = words(folder)
    assert "; with B's values in the 60 neurons of contrast@60 A writes B's text in 83.3 %" in text
    assert "What the neurons do" not in text


def test_models_that_are_the_same(tmp_path: Path) -> None:
    folder = write_contrast(tmp_path, {"x": (M1, M1), "y": (M2, M2)})
    text = words(folder)
    assert "The models are the same on these tokens: no neuron changes" in text
    assert "How concentrated" not in text and "No neuron changes." in text


def test_random_sets_are_those_of_their_set(tmp_path: Path) -> None:
    """`random.<seed>` is of the one set that was patched, of several each has its own."""
    study = read_contrast_study(write_contrast_study(tmp_path))
    several = ["clean", "contrast@5", "random.0.contrast@5", "contrast@20", "random.0.contrast@20"]
    assert study.controls("contrast@20", several) == ["random.0.contrast@20"]
    assert study.controls("contrast@20", ["contrast@20", "random.0", "random.1"]) == [
        "random.0",
        "random.1",
    ]
    assert study.controls("contrast@20", ["contrast@20", "contrast@5", "random.0"]) == []


def test_effects_of_other_neurons_are_refused(tmp_path: Path) -> None:
    folder = write_contrast_study(tmp_path)
    path = folder / "outputs.jsonl"
    path.write_text(path.read_text().replace('"mask": "contrast@5"', '"mask": "safety"'))
    with pytest.raises(RelneuronError, match="has the mask safety, of which neurons.json has no"):
        make_page(folder, PAGES)
