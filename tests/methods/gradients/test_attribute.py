"""`attribute --method ig|relevance`: what is written, against plain hooks; resumed; refused."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron.artifact.files
import relneuron.artifact.journal
import relneuron.artifact.manifest
import relneuron.artifact.prompts
import relneuron.methods.gradients.attribute as stage
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gradients import (
    COMPLETENESS,
    COMPLETENESS_COLUMNS,
    FILES,
    IG,
    RELEVANCE,
    Gradients,
)
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import read_csv
from relneuron.methods.gradients.commands import attributed, supports
from relneuron.methods.gradients.options import GradientOptions, IgOptions, RelevanceOptions
from relneuron.model.gradients.reference import alphas
from tests.kit.attributed import attributed_model
from tests.kit.attribution_runs import Attributed, files_of
from tests.kit.dying import Killed, Points
from tests.kit.forked import Forked
from tests.kit.slopes import plain_ig

SMALL = IgOptions(steps=3, batch_tokens=60)
RELEVANT = RelevanceOptions(batch_tokens=20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Attributed:
    return Attributed("llama", tmp_path_factory.mktemp("gradients"))


def run(case: Attributed, folder: Path, options: GradientOptions = SMALL, **more: Any) -> Path:
    path = more.pop("path", case.path)
    model = more.pop("model", case.model)
    more = {"quiet": True, **more}
    stage.attribute("m", model, case.tokenizer, path, folder, options, **more)
    return folder


def downs_of(model: Any) -> list[Any]:
    return [layer.mlp.down_proj for layer in model.model.layers]


@pytest.fixture(scope="module")
def whole(llama: Attributed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {IG: run(llama, root / IG), RELEVANCE: run(llama, root / RELEVANCE, RELEVANT)}


# --- what is written ---------------------------------------------------------------------------


def test_ig_is_what_plain_hooks_give(llama: Attributed, whole: dict[str, Path]) -> None:
    found = Gradients.read(whole[IG] / FILES[IG], IG)
    assert (found.ids, found.relations) == (llama.names, llama.types)
    assert found.targets == [[target] for target in llama.targets]
    assert found.about["steps"] == 3 and found.about["schedule"] == "inclusive"
    rows = {
        (row["id"], row.whole("layer")): row
        for row in read_csv(whole[IG] / COMPLETENESS, COMPLETENESS_COLUMNS)
    }
    for row, scores in found.scores([0, 4, 11]):
        wanted, p, at = plain_ig(
            llama.model,
            downs_of(llama.model),
            llama.ids[row],
            llama.targets[row],
            alphas("inclusive", 3),
        )
        off = np.abs(scores - wanted.numpy()).max() / float(wanted.abs().max())
        assert off < 2e-6
        assert found.beside["probability"][row] == pytest.approx(p, rel=1e-5)
        assert found.beside["probability_at_baseline"][row] == pytest.approx(at, rel=1e-5)
        for layer in range(3):
            said = rows[llama.names[row], layer]
            assert said["relation"] == llama.types[row]
            assert said.real("change") == pytest.approx(p - at[layer], abs=1e-6)
            total = float(wanted[layer].sum())
            assert said.real("sum") == pytest.approx(total, abs=1e-6)
            assert said.real("gap") == pytest.approx(total - (p - at[layer]), abs=2e-6)


def test_relevance_is_what_autograd_gives(llama: Attributed, whole: dict[str, Path]) -> None:
    found = Gradients.read(whole[RELEVANCE] / FILES[RELEVANCE], RELEVANCE)
    for row, scores in found.scores([2, 7]):
        seen: list[torch.Tensor] = []
        hooks = [
            down.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
            for down in downs_of(llama.model)
        ]
        value = llama.model(torch.tensor([llama.ids[row]])).logits[0, -1, llama.targets[row]]
        for hook in hooks:
            hook.remove()
        slopes = torch.autograd.grad(value, seen)
        wanted = torch.stack(
            [(m.detach() * g)[0].sum(0) for m, g in zip(seen, slopes, strict=True)]
        )
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-6)
        assert found.beside["value"][row] == pytest.approx(float(value.detach()), rel=1e-5)
    sums = found.group_sums()
    assert sums["sentences"].tolist() == [4, 4, 4]


def several(case: Attributed, folder: Path) -> Path:
    """A table with answers of one, two and three tokens."""
    path = folder / "several.csv"
    path.write_text(
        "id,prompt,answer,type\na,w3 w9 w4,w5,x\nb,w7 w3,w8 w2,x\nc,w11 w4 w9 w3,w8 w6 w30,y\n"
    )
    return path


@pytest.mark.parametrize("answer", ["mean", "sum"])
@pytest.mark.parametrize("extend", ["answer", "argmax"])
def test_answers_of_several_tokens(
    llama: Attributed, tmp_path: Path, answer: str, extend: str
) -> None:
    options = replace(SMALL, answer=answer, extend=extend)
    folder = run(llama, tmp_path / "out", options, path=several(llama, tmp_path))
    found = Gradients.read(folder / FILES[IG], IG)
    assert found.targets == [[5], [8, 2], [8, 6, 30]]
    prompts = [[3, 9, 4], [7, 3], [11, 4, 9, 3]]
    for row, scores in found.scores():
        line, total, p_total = prompts[row], torch.zeros(3, scores.shape[1]), 0.0
        for target in found.targets[row]:
            downs = downs_of(llama.model)
            one, p, _ = plain_ig(llama.model, downs, line, target, alphas("inclusive", 3))
            total, p_total = total + one, p_total + p
            best = int(llama.logits(line).argmax())
            line = [*line, target if extend == "answer" else best]
        n = len(found.targets[row]) if answer == "mean" else 1
        off = np.abs(scores - total.numpy() / n).max() / float(total.abs().max() / n)
        assert off < 4e-6
        assert found.beside["probability"][row] == pytest.approx(p_total / n, rel=1e-5)


def test_the_models_own_token(llama: Attributed, tmp_path: Path) -> None:
    folder = run(llama, tmp_path / "out", replace(SMALL, target="prediction"))
    found = Gradients.read(folder / FILES[IG], IG)
    assert found.targets == [[int(llama.logits(line).argmax())] for line in llama.ids]


def test_float64_and_sixteen_bits_are_said(tmp_path: Path, llama: Attributed) -> None:
    model = attributed_model("llama").bfloat16()
    with pytest.warns(match="of a model that computes in bfloat16"):
        run(llama, tmp_path / "narrow", model=model)
    about = Gradients.read(tmp_path / "narrow" / FILES[IG], IG).about
    assert about["probability"] == "float32, of a model that computes in bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, tmp_path / "wide", replace(SMALL, precision="float64"), model=model)
    assert next(model.parameters()).dtype == torch.bfloat16
    found = Gradients.read(tmp_path / "wide" / FILES[IG], IG)
    assert found.about["probability"] == "float64"
    model.double()
    (scores,) = [scores for _, scores in found.scores([1])]
    wanted, *_ = plain_ig(
        model, downs_of(model), llama.ids[1], llama.targets[1], alphas("inclusive", 3)
    )
    # The norms of `model.double()` itself are in float32.
    assert np.abs(scores - wanted.numpy()).max() < 1e-5 * float(wanted.abs().max())


def test_what_is_printed(whole: dict[str, Path]) -> None:
    lines = list(attributed(whole[IG], IG))
    assert lines[0] == "12 sentences: integrated gradients, one prefill, in float32"
    assert lines[1].startswith("a layer's sum and the change of P differ by ")
    assert [line.partition(":")[0] for line in lines[2:]] == ["capital", "color", "number"]
    assert next(attributed(whole[RELEVANCE], RELEVANCE)) == (
        "12 sentences: gradient x activation, in float32"
    )


def test_where_the_staircase_is_not_exact_it_is_said(
    llama: Attributed, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relneuron.model.gradients.staircase._difference", lambda _: 1.0)
    with pytest.warns(match="layer by layer and step by step, not from one prefill"):
        run(llama, tmp_path / "out")
    entry = Manifest(tmp_path / "out").data["stages"]["attribute_ig"]
    assert entry["how"] == "integrated gradients, layer by layer, in float32"
    plain = [s for _, s in Gradients.read(tmp_path / "out" / FILES[IG], IG).scores()]
    ours = [s for _, s in Gradients.read(whole[IG] / FILES[IG], IG).scores()]
    assert np.abs(np.stack(plain) - np.stack(ours)).max() < 2e-6 * np.abs(plain).max()


def test_the_row_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attributed_model("gpt2")
    assert supports(model) == ("gradients", "supported: every layer and step from one prefill")
    monkeypatch.setattr("relneuron.model.gradients.staircase._difference", lambda _: float("nan"))
    assert supports(model)[1].startswith("supported, layer by layer: its layers need more")
    assert supports(model.train())[1].startswith("not supported: ")


# --- resumed, and made again -----------------------------------------------------------------


STEPS = (
    (Journal, "commit"),
    (Journal, "remove"),
    (Manifest, "save"),
    (stage, "atomic_write"),
    (relneuron.artifact.prompts, "atomic_write"),
    (relneuron.artifact.journal, "atomic_write"),
)


@pytest.mark.parametrize("options", [SMALL, RELEVANT], ids=["ig", "relevance"])
def test_killed_at_every_step_it_ends_with_the_same_bytes(
    llama: Attributed, tmp_path: Path, whole: dict[str, Path], options: GradientOptions
) -> None:
    expected = files_of(whole[IG if options is SMALL else RELEVANCE])
    with Points(0, STEPS) as counted:
        run(llama, tmp_path / "counted", options)
    assert files_of(tmp_path / "counted") == expected and counted.n > 8
    for last in range(1, counted.n + 1):
        with pytest.raises(Killed), Points(last, STEPS):
            run(llama, tmp_path / str(last), options)
        run(llama, tmp_path / str(last), options)
        assert files_of(tmp_path / str(last)) == expected, last


def attribute_and_die(folder: Path) -> None:
    """A run that is killed behind its second commit, with half a line in its journal."""
    true, n = Journal.commit, 0

    def commit(self: Journal) -> None:
        nonlocal n
        n += 1
        true(self)
        if n == 2:
            with self.path.open("ab") as file:
                file.write(b'{"key": "cut sh')
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.SAVE_EVERY_S = 0.0
    Journal.commit = commit  # type: ignore[method-assign]
    run(Attributed("llama", folder), folder / "out")


def test_a_process_that_is_killed_goes_on(
    llama: Attributed, tmp_path: Path, whole: dict[str, Path]
) -> None:
    assert Forked(attribute_and_die, tmp_path).wait() == -signal.SIGKILL
    assert (tmp_path / "out" / "attribute_ig.journal").exists()
    run(llama, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole[IG])


def test_what_was_scored_is_not_scored_again(
    llama: Attributed, tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    true, most = stage.Asking.ask, 5

    def ask(self: Any, rows: list[int]) -> Any:
        if len(done) > most:
            raise KeyboardInterrupt
        done.extend(rows)
        return true(self, rows)

    monkeypatch.setattr(stage.Asking, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out")
    assert 0 < len(done) < 12
    most = 12
    run(llama, tmp_path / "out")
    assert sorted(done) == list(range(12))  # each once
    assert files_of(tmp_path / "out") == files_of(whole[IG])


def test_scores_that_were_changed_meanwhile_are_made_again(
    llama: Attributed, tmp_path: Path, whole: dict[str, Path]
) -> None:
    with Points(6, STEPS), pytest.raises(Killed):
        run(llama, tmp_path / "out")
    path = tmp_path / "out" / FILES[IG]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(llama, tmp_path / "out")
    assert any("done again" in str(one.message) for one in said)
    assert files_of(tmp_path / "out") == files_of(whole[IG])


def test_a_finished_one_is_left_and_another_is_refused(
    llama: Attributed, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole[IG], folder)
    before = files_of(folder)
    run(llama, folder)
    assert files_of(folder) == before
    with pytest.raises(RelneuronError, match="attribute_ig was made from other inputs: steps"):
        run(llama, folder, replace(SMALL, steps=4))
    run(llama, folder, replace(SMALL, steps=4), force=True)
    assert Gradients.read(folder / FILES[IG], IG).about["steps"] == 4
    # Another method stands beside it.
    run(llama, folder, RELEVANT)
    assert {"attribute_ig", "attribute_relevance"} == {*Manifest(folder).data["stages"]}


def test_memory_that_runs_out_makes_smaller_batches(
    llama: Attributed, tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = stage.Asking.ask

    def ask(self: Any, rows: list[int]) -> Any:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return true(self, rows)

    monkeypatch.setattr(stage.Asking, "ask", ask)
    with pytest.warns(match="out of memory"):
        run(llama, tmp_path / "out", replace(SMALL, batch_tokens=100))
    found = [s for _, s in Gradients.read(tmp_path / "out" / FILES[IG], IG).scores()]
    ours = [s for _, s in Gradients.read(whole[IG] / FILES[IG], IG).scores()]
    assert np.abs(np.stack(found) - np.stack(ours)).max() < 2e-6 * np.abs(ours).max()


# --- bad input -------------------------------------------------------------------------------


def table(folder: Path, *rows: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(["id,prompt,answer,type", *rows, ""]))
    return path


BAD: list[tuple[GradientOptions, list[str], str]] = [
    (SMALL, ["a," + "w3 " * 65 + ",w5,x"], "prompt a has 65 tokens, the model's context 64"),
    (
        replace(SMALL, answer="sum"),
        ["a," + "w3 " * 63 + ",w5 w6 w7,x"],
        "prompt a has 65 tokens with its answer, the model's context 64",
    ),
    (replace(SMALL, baseline="replaced"), ["a,w3,w5,x"], "has no end of text to replace"),
    (replace(SMALL, splits=("det",)), ["a,w3,w5,x"], "has no prompt of the splits det"),
    (RELEVANT, ["a,w3,,x"], "answer"),
]


@pytest.mark.parametrize(("options", "rows", "cause"), BAD)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    llama: Attributed, tmp_path: Path, options: GradientOptions, rows: list[str], cause: str
) -> None:
    with pytest.raises(RelneuronError, match=cause):
        run(llama, tmp_path / "out", options, path=table(tmp_path, *rows))
    assert not (tmp_path / "out").exists()


def test_an_answer_outside_of_the_vocabulary(llama: Attributed, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "a", "prompt": "w3 w4", "type": "x", "target": 90}\n')
    with pytest.raises(RelneuronError, match="its target is the token 90, the model predicts 90"):
        run(llama, tmp_path / "out", path=path)


def test_one_step_is_refused() -> None:
    with pytest.raises(RelneuronError, match="--steps must be at least 2, got 1"):
        IgOptions(steps=1)


def test_numbers_that_are_not_finite_are_refused(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = stage.Asking.ask

    def ask(self: Any, rows: list[int]) -> Any:
        said = true(self, rows)
        said[0]["ig"][0, 0] = np.nan
        return said

    monkeypatch.setattr(stage.Asking, "ask", ask)
    with pytest.raises(RelneuronError, match="its gradients are not finite"):
        run(llama, tmp_path / "out")
