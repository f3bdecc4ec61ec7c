"""The demo of two models: the second one answers otherwise, and the contrast finds what carries it.

Made on fewer prompts than `relneuron demo --analyses contrast` takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron.study.contrast
from relneuron.ablation.outputs import read_outputs
from relneuron.artifact.contrast import NAME, Contrast
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import read_csv
from relneuron.demo import CHECKPOINT, tuned
from relneuron.demo.train import count_correct
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.contrast import Plan
from tests.kit.files import contents
from tests.kit.pages import text_of

Run = Callable[..., tuple[int, str, str]]


def models(folder: Path) -> tuple[Any, Any, Any]:
    a, b = (load_model(str(one), device="cpu") for one in (CHECKPOINT, folder / tuned.FOLDER))
    return a, b, load_tokenizer(str(CHECKPOINT))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts, sets and random sets."""
    contrasted = [
        prompt
        for name in (tuned.RELATION, tuned.BESIDE[0])
        for prompt in tuned.questions("det", of=(name,))[:40]
    ]
    found = contrasted, tuned.questions("eva")[:20], tuned.RELATION
    monkeypatch.setattr(tuned, "prompts", lambda: found)
    fewer = partial(Plan, sizes=(20, 256), random_seeds=1)
    monkeypatch.setattr(relneuron.study.contrast, "Plan", fewer)


def test_the_demo_finds_what_was_taught(few: None, relneuron: Run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    words = ("demo", "--analyses", "contrast", "-o", folder, "--quiet")
    code, out, err = relneuron(*words)
    assert code == 0 and f"report: {folder / 'report.html'}" in out, err

    # What was taught: other answers to one relation, by what neurons read, and nothing else.
    a, b, tokenizer = models(folder)
    own = tuned.questions("eva", "eva2")
    new = [(p.prompt, tuned.other_answers()[p.subject]) for p in own]
    assert count_correct(b, tokenizer, new) >= 0.95 * len(new)
    assert count_correct(a, tokenizer, new) == 0
    names = [one.name for one in tuned.relations() if one.name != tuned.RELATION]
    others = random.Random(0).sample(tuned.questions("eva", of=names), 100)
    assert count_correct(b, tokenizer, [(p.prompt, p.objects) for p in others]) >= 95
    ours, theirs = a.state_dict(), b.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up")}

    # What is found: the relation's tokens change, the other one's hardly do.
    contrast = Contrast.read(folder / NAME)
    assert contrast.groups == [tuned.RELATION, tuned.BESIDE[0]]
    rms = [np.square(contrast.take([name]).rms()).mean() for name in contrast.groups]
    assert rms[0] > 2 * rms[1]

    # What it does: a quarter of the neurons turns the answers over, as many others do not.
    found = {row["mask"]: row for row in read_csv(folder / "effect.csv", ("mask", "effect"))}
    effects = {name: row.finite("effect") for name, row in found.items()}
    assert effects["contrast@256"] >= 0.8 and abs(effects["random.0.contrast@256"]) <= 0.1
    assert effects["contrast@20"] < effects["contrast@256"]
    said: dict[str, dict[str, str]] = {}
    for line in read_outputs(folder / "outputs.jsonl"):
        said.setdefault(line.mask, {})[line.id] = line.output
    new_said = [p for p in tuned.questions("eva")[:20] if said["donor"][p.id]]
    assert all(tuned.cost(p.prompt, said["donor"][p.id]) == 0 for p in new_said)
    assert all(tuned.cost(p.prompt, said["clean"][p.id]) == 1 for p in new_said)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{tuned.RELATION} retaught" in text_of(page)
    assert "relneuron demo" in page and "--analyses contrast" in page

    # Asked again it does nothing, and what is lost is made again as it was.
    before = contents(folder)
    assert relneuron(*words)[0] == 0 and contents(folder) == before
    (folder / "outputs.jsonl").unlink()
    assert relneuron(*words)[0] == 0 and contents(folder) == before
    entry = Manifest(folder).data["stages"]
    assert {*entry} == {"tune", "contrast", "identify", "generate", "effect", "report"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--analyses", "contrast,sizes"), "--analyses contrast is a study of its own"),
        (("--analyses", "contrast", "--top", "5"), "--top does something only without --analyses"),
        (("--analyses", "contrast", "--noise", "5"), "--noise does something only without"),
    ],
)
def test_what_goes_with_no_contrast_is_refused(
    relneuron: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, _, err = relneuron("demo", *words, "-o", tmp_path / "demo")
    assert code == 2 and said in err and len(err.splitlines()) == 2
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_things_is_refused(relneuron: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    code, _, err = relneuron("demo", "--analyses", "contrast", "-o", tmp_path)
    assert code == 2 and "is not empty and holds no study" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
