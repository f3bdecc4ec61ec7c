"""What `ablate` refuses and mends, before it asks; what it writes, read back; its clock.

Nothing may be written where something is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.how import ablate_inputs
from relneuron.ablation.options import AblateOptions
from relneuron.artifact.effects import (
    EFFECTS,
    KINDS,
    NOT_ASKED,
    Condition,
    conditions_bytes,
    read_conditions,
    read_effects,
)
from relneuron.artifact.files import RelneuronError, atomic_write, csv_bytes
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import Prompt
from relneuron.model.instrument import Clock
from tests.conftest import tiny_model
from tests.kit.files import read_rows
from tests.kit.hooked import RELATIONS, Study, same_rows


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("input"))


def refused(study: Study, output: Path, match: str, **asked: Any) -> RelneuronError:
    with pytest.raises(RelneuronError, match=match) as caught:
        study.ablate(output, **asked)
    assert not output.exists()
    return caught.value


def test_neurons_of_another_model_are_refused(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "n" / "neurons.json", {"works_as": [[0, "gate", 48]]})
    refused(study, tmp_path / "out", "is not in a model", neurons=path)
    data = json.loads(path.read_text())
    data["model"]["layers"] = 3
    path.write_text(json.dumps(data))
    refused(study, tmp_path / "out", "shape", neurons=path)


def test_a_set_of_no_asked_relation_needs_any_set(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "n" / "neurons.json", {"typo": study.sets["works_as"]})
    error = refused(study, tmp_path / "out", "typo", neurons=path)
    assert "--any-set" in error.fix
    rows = study.ablate(tmp_path / "out", neurons=path, any_set=True, analyses=("matched",))
    assert {condition for condition, _ in rows} == {"clean", "typo", "random.0"}


def test_an_empty_set_is_clean_and_said(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "neurons.json", study.sets | {"works_as": []})
    with pytest.warns(UserWarning, match="works_as: its set has no neuron"):
        rows = study.ablate(tmp_path / "out", neurons=path, analyses=("matched",))
    empty = [(c, key) for c, key in rows if c.startswith("works_as")]
    assert {c for c, _ in empty} == {"works_as", "works_as~0"}
    for condition, key in empty:
        for column in ("prediction", "correct", "logprob"):
            assert rows[condition, key][column] == rows["clean", key][column], condition
    notices = json.loads((tmp_path / "out" / "manifest.json").read_text())["fallbacks"]
    assert "works_as: its set has no neuron, so that nothing is off for it" in notices


def test_sets_without_any_neuron_are_refused(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "neurons.json", {"works_as": [], "lives_in": []})
    refused(study, tmp_path / "out", "no neuron to switch off: works_as, lives_in", neurons=path)
    path = study.write_sets(tmp_path / "neurons.json", {})
    refused(study, tmp_path / "out", "no neuron to switch off: the file", neurons=path)


def test_doubles_are_merged_with_a_warning(study: Study, tmp_path: Path) -> None:
    chosen = study.sets["works_as"][:9]
    double = {**study.sets, "works_as": [*chosen, chosen[2], chosen[2], chosen[0]]}
    once = study.write_sets(tmp_path / "1" / "neurons.json", {**study.sets, "works_as": chosen})
    twice = study.write_sets(tmp_path / "2" / "neurons.json", double)
    with pytest.warns(UserWarning, match="works_as: 3 neurons stood there twice"):
        ours = study.ablate(tmp_path / "a", neurons=twice)
    same_rows(ours, study.ablate(tmp_path / "b", neurons=once), 0)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert "works_as: 3 neurons stood there twice" in manifest["fallbacks"]
    conditions = [(tmp_path / name / "conditions.csv").read_bytes() for name in "ab"]
    assert conditions[0] == conditions[1]


class Letters:
    """A tokenizer of one token per letter, none for a space, and no special tokens."""

    eos_token_id = 2

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(c) % 90 + 3 for c in text if c != " "] for text in texts]}

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def test_prompts_of_one_token_are_asked(study: Study, tmp_path: Path) -> None:
    model = tiny_model("llama")
    prompts = [Prompt(c, "works_as", "eva", "en", "{}", c, "xy", c) for c in "abcdefgh"]
    path = study.write_prompts(tmp_path / "prompts.jsonl", prompts)
    neurons = study.write_sets(tmp_path / "neurons.json", {"works_as": study.sets["works_as"]})
    data = json.loads(neurons.read_text())
    data["model"] = {"layers": 3, "width": 48, "hidden": 32}
    neurons.write_text(json.dumps(data))
    for positions in ("all", "prompt", "last"):
        folder = tmp_path / positions
        asked: dict[str, Any] = {"positions": positions, "random_seeds": 1, "quiet": True}
        ablate_prompts("m", model, Letters(), neurons, path, folder / "effects.csv", **asked)
        assert len(read_rows(folder / "effects.csv")) == 24


@pytest.mark.parametrize("answer", ["", " "])
@pytest.mark.parametrize("tokenizer", ["letters", "trained"])
def test_an_object_of_no_token_is_refused_by_name(
    study: Study, tmp_path: Path, answer: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [p for p in study.prompts.values() if p.split == "eva"]
    prompts[3] = replace(prompts[3], object=answer)
    path = study.write_prompts(tmp_path / "p" / "prompts.jsonl", prompts)
    if tokenizer == "letters":
        monkeypatch.setattr(study, "tokenizer", Letters())
    refused(study, tmp_path / "out", prompts[3].id, prompts=path)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"mode": "double"}, "unknown --mode"),
        ({"positions": "first"}, "unknown --positions"),
        ({"mean_of": "median"}, "unknown --mean-of"),
        ({"factor": 0.5}, "factor"),
        ({"mode": "mean", "factor": 0.5}, "factor"),
        ({"mode": "scale"}, "factor"),
        ({"mode": "scale", "factor": float("nan")}, "factor nan is not finite"),
        ({"mode": "scale", "factor": float("inf")}, "factor inf is not finite"),
        ({"sizes": (0, 10)}, "sizes"),
        ({"sizes": ()}, "sizes"),
        ({"splits": ("eva3",)}, "unknown --splits 'eva3'"),
        ({"generate": 0}, "generate"),
        ({"generate": 60}, "context of 64"),
        ({"batch_tokens": 0}, "batch"),
        ({"analyses": ("size",)}, "analys"),
    ],
)
def test_unknown_options_are_refused(
    study: Study, tmp_path: Path, asked: dict[str, Any], match: str
) -> None:
    refused(study, tmp_path / "out", match, **asked)


def test_means_are_an_input_of_the_stage(study: Study, tmp_path: Path) -> None:
    """The manifest must notice other responses where they decide the effects."""
    neurons = study.write_sets(tmp_path / "neurons.json", study.sets)
    prompts, options = study.folder / "prompts.jsonl", AblateOptions(mode="mean")
    found = []
    for content in (b"some", b"others"):
        (tmp_path / "responses.safetensors").write_bytes(content)
        found.append(ablate_inputs({}, None, neurons, prompts, options))
    assert found[0] != found[1]


def test_means_need_responses_of_the_same_prompts(study: Study, tmp_path: Path) -> None:
    neurons = study.write_sets(tmp_path / "n" / "neurons.json", study.sets)
    error = refused(study, tmp_path / "out", "does not exist", neurons=neurons, mode="mean")
    assert "relneuron record" in error.fix
    path = study.write_prompts(tmp_path / "prompts.jsonl", list(study.prompts.values())[1:])
    refused(study, tmp_path / "out", "of other prompts", prompts=path, mode="mean")


# --- what is written -------------------------------------------------------------------------


def test_effects_are_read_as_they_were_written(study: Study, tmp_path: Path) -> None:
    analyses = ("matched", "sizes", "sites")
    study.ablate(tmp_path, splits=("eva", "eva2"), analyses=analyses, sizes=(1, 40, 100))
    conditions = read_conditions(tmp_path / "conditions.csv")
    assert conditions_bytes(conditions.values()) == (tmp_path / "conditions.csv").read_bytes()
    assert conditions["works_as@2-40"] == Condition(
        "works_as@2-40", "range", "works_as", None, 2, 40, "", 39
    )
    grids = read_effects(tmp_path / "effects.csv", conditions)
    assert list(grids) == ["eva", "eva2", "eva.de"]
    rows = read_rows(tmp_path / "effects.csv")
    measured = 0
    for row in rows:
        grid, name = grids[row["split"]], row["condition"]
        i = grid.ids.index(row["id"])
        assert grid.relation[i] == row["relation"]
        assert grid.correct[name][i] == int(row["correct"])
        assert grid.logprob[name][i] == float(row["logprob"])
        assert grid.prediction[name][i] == row["prediction"]
    for grid in grids.values():
        assert grid.relations == [r for r in RELATIONS if r in grid.relation]
        for name, correct in grid.correct.items():
            asked = correct != NOT_ASKED
            measured += int(asked.sum())
            assert (np.isnan(grid.logprob[name]) == ~asked).all()
            assert [grid.prediction[name][i] for i in np.flatnonzero(~asked)] == [""] * sum(~asked)
    assert measured == len(rows)
    missing = {kind for kind in KINDS if not grids["eva"].of_kind(kind)}
    assert missing == {"concept", "gain"}


TEXTS = ["", 'a "b", c', "a\nb", "a\rb", "a\r\nb", "\u2028", "'", "Ünï", "clean,eva", "\x00"]


def test_any_prediction_survives_the_file(tmp_path: Path) -> None:
    rows = [("clean", "r", "eva", str(i), t, i % 2, -0.1 * i) for i, t in enumerate(TEXTS)]
    (tmp_path / "effects.csv").write_bytes(csv_bytes(EFFECTS, rows))
    grid = read_effects(tmp_path / "effects.csv", {"clean": Condition("clean", "clean")})["eva"]
    assert grid.prediction["clean"] == TEXTS
    assert grid.logprob["clean"].tolist() == [row[-1] for row in rows]


def test_doubled_and_foreign_rows_are_refused(tmp_path: Path) -> None:
    names = ("clean", "r")
    conditions = {name: Condition(name, "clean") for name in names}
    rows = [(name, "r", "eva", key, "text", 1, -0.5) for name in names for key in ("a", "b")]
    path = tmp_path / "effects.csv"
    path.write_bytes(csv_bytes(EFFECTS, rows))
    assert set(read_effects(path, conditions)["eva"].correct) == set(names)
    for extra in (
        ("clean", "r", "eva", "a", "text", 1, -0.5),
        ("r", "r", "eva", "b", "other", 0, -1.5),
        ("s", "r", "eva", "a", "text", 1, -0.5),
        ("r", "r", "eva", "c", "text", 1, -0.5),
        ("r", "r", "eva2", "a", "text", 1, -0.5),
    ):
        path.write_bytes(csv_bytes(EFFECTS, [*rows, extra]))
        with pytest.raises(RelneuronError, match="twice|does not know"):
            read_effects(path, conditions)


def test_a_name_stands_in_conditions_once(tmp_path: Path) -> None:
    twice = [Condition("r", "set", "r"), Condition("r", "site", "r", site="up")]
    (tmp_path / "conditions.csv").write_bytes(conditions_bytes(twice))
    with pytest.raises(RelneuronError, match="twice"):
        read_conditions(tmp_path / "conditions.csv")


def test_what_was_not_asked_again_does_not_stay(study: Study, tmp_path: Path) -> None:
    """The report would read the perplexities of other neurons."""
    study.ablate(tmp_path, analyses=("perplexity",))
    assert (tmp_path / "perplexity.csv").exists()
    others = study.write_sets(tmp_path / "n" / "neurons.json", {"works_as": [[0, "up", 3]]})
    study.ablate(tmp_path, neurons=others, force=True)
    assert not (tmp_path / "perplexity.csv").exists()


# --- the clock -------------------------------------------------------------------------------


def test_the_clock_measures_and_leaves_the_model_as_it_was(llama: Any) -> None:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    tokens = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        clean = llama(tokens).logits
        with Clock(llama) as clock:
            assert torch.equal(llama(tokens).logits, clean)
    assert clock.products is not None
    assert 0 < clock.products < clock.seconds
    assert f"{clock.products / clock.seconds:.0%} of it" in str(clock)
    measured = clock.products
    with pytest.raises(KeyError), Clock(llama):
        raise KeyError
    llama(tokens)
    assert clock.products == measured
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()] == hooks


def test_a_run_killed_between_its_files_and_the_manifest_goes_on(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.ablate(tmp_path / "whole")
    for method in ("finish", "save"):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(Manifest, method, _killed)
            study.ablate(tmp_path / "s")
        assert (tmp_path / "s" / "effects.csv").exists()
    study.ablate(tmp_path / "s")
    for name in ("effects.csv", "accuracy.csv", "conditions.csv", "manifest.json"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What is done is not overwritten, even beside the journal of another run.
    (tmp_path / "s" / "ablate.journal").write_text("{}\n")
    with pytest.raises(RelneuronError, match="exists"):
        study.ablate(tmp_path / "s")


@pytest.mark.parametrize("n_written", [1, 2, 3])
def test_a_run_killed_between_its_files_goes_on(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    """The files of an ablation with perplexity, then of one without it in their place."""
    for analyses in (("perplexity",), ()):
        asked: dict[str, Any] = {"analyses": analyses, "random_seeds": 1 + len(analyses)}
        study.ablate(tmp_path / "whole", force=True, **asked)
        left = n_written

        def stopping(path: Path, data: bytes) -> None:
            nonlocal left
            if path.suffix == ".csv" and not left:
                raise InterruptedError
            left -= path.suffix == ".csv"
            atomic_write(path, data)

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(sys.modules["relneuron.ablation.ablate"], "atomic_write", stopping)
            patch.setattr(Manifest, "finish", _killed)
            study.ablate(tmp_path / "s", force=not analyses, **asked)
        study.ablate(tmp_path / "s", **asked)
        files = [
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            for name in ("s", "whole")
        ]
        assert files[0] == files[1]
        assert ("perplexity.csv" in files[0]) == bool(analyses)


@pytest.mark.parametrize("beside", ["accuracy.csv", "conditions.csv", "perplexity.csv"])
def test_the_files_of_another_ablation_are_not_overwritten(
    study: Study, tmp_path: Path, beside: str
) -> None:
    (tmp_path / beside).write_text("of a finished study")
    for name in ("effects.csv", "other.parquet", beside):
        with pytest.raises(RelneuronError, match=rf"{beside} (exists|is written beside)"):
            ablate_prompts(
                "m",
                study.model,
                study.tokenizer,
                study.folder / "neurons.json",
                study.folder / "prompts.jsonl",
                tmp_path / name,
                quiet=True,
            )
        assert [path.name for path in tmp_path.iterdir()] == [beside]
        assert (tmp_path / beside).read_text() == "of a finished study"


def _killed(*_: Any, **__: Any) -> None:
    raise InterruptedError
