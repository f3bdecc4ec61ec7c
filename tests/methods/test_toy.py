"""A method is one folder and one name: a toy is added, is everywhere, and is taken away again.

It ranks by the mean absolute response to a relation's prompts, and its page counts its neurons.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from relneuron import methods
from relneuron.cli import main as cli
from relneuron.study import pages
from tests.kit.pages import Page

TOY = '''
"""Neurons by the mean absolute response of their gates to a relation's prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

from relneuron.artifact.options import TopOptions, option
from relneuron.artifact.stage import Method, Ranking

NAME = "toy"


@dataclass(frozen=True)
class ToyOptions(TopOptions):
    power: float = option(1.0, "Power of the responses before their mean.", above=0)


METHOD = Method(
    rankings=(
        Ranking(
            NAME, "mean absolute response", ToyOptions, "validated.csv", "responses",
            f"{__name__}:rank",
        ),
    ),
    supports=f"{__name__}:supports",
)


def supports(model) -> tuple[str, str]:
    return NAME, "supported: it needs nothing"


def rank(folder, output, options, *, method, force, quiet) -> Iterator[str]:
    import numpy as np

    from relneuron.artifact.files import sha256
    from relneuron.artifact.manifest import Manifest, checked, locked
    from relneuron.artifact.neurons import NeuronFile
    from relneuron.artifact.prompts import read_prompts
    from relneuron.artifact.reading import open_tensors
    from relneuron.artifact.files import refuse_output, writing

    refuse_output(output, "identify", force)
    responses = checked(folder / "responses.safetensors")
    prompts = [p.relation for p in read_prompts(folder / "prompts.jsonl") if p.split == "det"]
    model = Manifest(folder).data["model"]
    with open_tensors(responses, "record") as file:
        shape = len(prompts), model["width"]
        gates = np.stack([file.get(f"gate.{i}", shape) for i in range(model["layers"])], axis=1)
    sets = {}
    for relation in dict.fromkeys(prompts):
        own = np.abs(gates[[name == relation for name in prompts]]) ** options.power
        score = own.mean(0).ravel()
        best = np.argsort(-score, kind="stable")[: options.top or 10]
        sets[relation] = [(*divmod(i, model["width"]), score[i].item()) for i in best.tolist()]
        sets[relation] = [(layer, "gate", i, x) for layer, i, x in sets[relation]]
        yield f"{relation}: {len(best)} neurons"
    inputs = {"responses": sha256(responses), "method": method, **options.recorded()}
    with locked(output.parent), writing("identify", output.parent, [output]):
        NeuronFile(model, method, sets, {name: {} for name in sets}).write(output)
        Manifest(output.parent).finish("identify", inputs, [output], reads=[responses])
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package with the folder methods/toy, and `toy` in `NAMES`."""
    folder = tmp_path / "methods" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(TOY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder.parent)])
    monkeypatch.setattr(methods, "NAMES", (*methods.NAMES, "toy"))
    monkeypatch.setattr(cli, "app", cli.make_app())
    yield
    sys.modules.pop("relneuron.methods.toy")


def help_of(command: str) -> str:
    made = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    return " ".join(
        made.get_help(made.make_context(command, ["-x"], resilient_parsing=True)).split()
    )


def test_a_method_is_one_folder_and_one_name(
    toy: None, relneuron: Any, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    assert len(TOY.strip().splitlines()) < 80
    assert "toy is mean absolute response" in help_of("identify")
    assert "--power" in help_of("identify")
    study = tmp_path / "study"
    prompts, neurons = study / "prompts.jsonl", study / "neurons.json"
    for words in (
        ["prompts", fact_folder, "-o", prompts, "--eva", 8],
        ["record", model_folder, prompts, "-o", study, "--quiet"],
        ["identify", study, "-o", neurons, "--method", "toy", "--top", 20, "--power", 2],
        ["ablate", model_folder, neurons, prompts, "-o", study / "effects.csv", "--quiet"],
        ["report", study, "-o", study / "report.html"],
    ):
        code, out, err = relneuron(*words)
        assert code == 0, err
    assert json.loads(neurons.read_text())["method"] == "toy"
    text = " ".join(Page((study / "report.html").read_text()).text.split())
    assert "ranked by mean absolute response" in text
    assert "toy  " in relneuron("doctor", model_folder)[1]
    # The options of others are refused, its own by others, and it is told of.
    identify = ["identify", study, "-o", tmp_path / "n.json", "--method"]
    assert "--method toy takes no --fdr" in relneuron(*identify, "toy", "--fdr", "0.1")[2]
    assert "use --method toy, which takes it" in relneuron(*identify, "ap", "--power", "2")[2]
    assert "--power must be above 0" in relneuron(*identify, "toy", "--power", "0")[2]


def test_without_the_folder_nothing_is_left(relneuron: Any, tmp_path: Path) -> None:
    assert "toy" not in methods.rankings() and "toy" not in pages.titles()
    assert "toy" not in help_of("identify")
    words = ["identify", tmp_path, "-o", tmp_path / "n.json", "--method", "toy"]
    assert "unknown method 'toy'" in relneuron(*words)[2]
