"""What `attribute` refuses, before it writes; what it does with files that are there already."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import relneuron.methods.gains.attribute as attribute_module
import relneuron.methods.gains.scorer
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import prompts_bytes
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import KINDS, VALUE_KINDS, AttributeOptions, attribute_inputs
from relneuron.methods.gains.values import KINDS as SCORED
from relneuron.texts.knowledge import read_knowledge
from tests.conftest import tiny_model
from tests.kit.attributed import VOCABULARY
from tests.kit.attribution_runs import OPTIONS, Attributed, files_of, word_tokenizer
from tests.kit.files import read_rows

QUICK = replace(OPTIONS, kinds=("head",), compare=False)


def table(folder: Path, *rows: str, header: str = "prompt,answer,type") -> Path:
    path = folder / "facts.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def refused(llama: Attributed, output: Path, match: str, *args: Any, **more: Any) -> RelneuronError:
    """The error of a call that must leave the output as it is."""
    before = files_of(output) if output.is_dir() else output.exists()
    with pytest.raises(RelneuronError, match=match) as caught:
        llama.attribute(output, *args, **more)
    assert (files_of(output) if output.is_dir() else output.exists()) == before
    return caught.value


# --- options ---------------------------------------------------------------------------------


def test_the_kinds_are_those_that_are_scored() -> None:
    assert VALUE_KINDS == SCORED and KINDS[: len(SCORED)] == SCORED


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"kinds": ("ffn_layer", "neuron")}, "unknown --kinds 'neuron'"),
        ({"kinds": ()}, "--kinds names nothing"),
        ({"mode": "top"}, "unknown --mode 'top'"),
        ({"key": "value"}, "unknown --key 'value'"),
        ({"query_of": "head"}, "unknown --query-of 'head'"),
        ({"keep": "some"}, "unknown --keep 'some'"),
        ({"format": "json"}, "unknown --format 'json'"),
        ({"top": 0}, "--top must be at least 1, got 0"),
        ({"query_units": 0}, "--query-units must be at least 1, got 0"),
        ({"intervene": 0}, "--intervene must be at least 1, got 0"),
        ({"random_seeds": -1}, "--random-seeds must be at least 0, got -1"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1, got 0"),
        ({"tolerance": 0.0}, "--tolerance must be above 0, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance nan"),
    ],
)
def test_bad_options(asked: dict[str, Any], cause: str) -> None:
    with pytest.raises(RelneuronError, match=cause) as caught:
        AttributeOptions(**asked)
    assert caught.value.exit_code == 2


def test_every_option_is_among_the_inputs() -> None:
    inputs = attribute_inputs({"id": "m", "layers": 2}, None, "p", "t", AttributeOptions())
    options = {*asdict(AttributeOptions())} - {"oom", "shard"}  # change no score
    assert options | {"model", "tokenizer", "prompts", "tokens"} == {*inputs}
    assert inputs["model"] == {"layers": 2} and inputs == json.loads(json.dumps(inputs))


def test_parquet_without_pyarrow(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused(llama, tmp_path / "out", "needs pyarrow", replace(QUICK, format="parquet"))
    assert "write csv" in error.fix


# --- sentences -------------------------------------------------------------------------------


def test_answers_of_several_tokens(llama: Attributed, tmp_path: Path) -> None:
    path = table(tmp_path, "w3 w4,w5,a", "w6 w7,w8 w9 w10,a")
    strict = replace(QUICK, strict=True)
    error = refused(llama, tmp_path / "out", "prompt a.0001.*has 3 tokens", strict, path)
    assert "--strict" in error.fix
    llama.attribute(tmp_path / "out", QUICK, path)
    rows = read_rows(tmp_path / "out" / "targets.csv")
    assert [(row["target"], row["n_answer_tokens"]) for row in rows] == [("w5", "1"), ("w8", "3")]
    tokens = Manifest(tmp_path / "out").data["stages"]["attribute"]["tokens"]
    assert tokens["answers_of_several_tokens"] == 1
    assert tokens["target"] == "the answer's first token"


@pytest.mark.parametrize(
    ("rows", "header", "cause"),
    [
        ([" ".join(["w3"] * 65) + ",w5,a"], "prompt,answer,type", "has 65 tokens, .* context 64"),
        (["w3,w5,"], "prompt,answer,type", "line 2: type is empty"),
        (["w3,,a"], "prompt,answer,type", "line 2: answer is empty"),
        (["w3,w5"], "prompt,answer", "no column type or relation"),
        (["w3,w5"], "prompt,type", "no column answer or object"),
        ([], "prompt,answer,type", "holds no sentence"),
        (["w3,w5,a,x", "w4,w6,a,x"], "prompt,answer,type,id", "line 3: the id 'x'"),
    ],
)
def test_bad_facts(
    llama: Attributed, tmp_path: Path, rows: list[str], header: str, cause: str
) -> None:
    refused(llama, tmp_path / "out", cause, QUICK, table(tmp_path, *rows, header=header))


def test_no_facts_and_splits_that_none_has(llama: Attributed, tmp_path: Path) -> None:
    refused(llama, tmp_path / "out", "does not exist", QUICK, tmp_path / "none.csv")
    error = refused(
        llama, tmp_path / "out", "no prompt of the splits det", replace(QUICK, splits=("det",))
    )
    assert error.exit_code == 2


def test_some_splits_of_a_prompts_file(llama: Attributed, tmp_path: Path) -> None:
    """The copy has all of them, so `ablate` can ask the others."""
    prompts = [
        replace(p, split="det" if i % 3 else "eva")
        for i, p in enumerate(read_knowledge(llama.path))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    llama.attribute(tmp_path / "out", replace(QUICK, splits=("det",)), path)
    ids = [row["id"] for row in read_rows(tmp_path / "out" / "targets.csv")]
    assert ids == [p.id for p in prompts if p.split == "det"]
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == path.read_bytes()


# --- models ----------------------------------------------------------------------------------


def test_a_token_outside_the_vocabulary(llama: Attributed, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more"])
    path = table(tmp_path, "w3 w4,more,a")
    with pytest.raises(RelneuronError, match=f"token {VOCABULARY}, the model has {VOCABULARY}"):
        attribute("m", llama.model, tokenizer, path, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_attributed(llama: Attributed, tmp_path: Path) -> None:
    offloaded = tiny_model("llama")
    offloaded.lm_head.weight = torch.nn.Parameter(offloaded.lm_head.weight.to("meta"))
    training = tiny_model("llama").train()
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    recurrent = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    for model, cause in (
        (offloaded, "lm_head.weight is offloaded"),
        (training, "train mode"),
        (recurrent, "MambaForCausalLM cannot be attributed"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            attribute("m", model, llama.tokenizer, llama.path, tmp_path / "out", QUICK)
        assert not (tmp_path / "out").exists()


def test_tied_embeddings_work(llama: Attributed, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    attribute("m", model, llama.tokenizer, llama.path, tmp_path / "out", QUICK, quiet=True)
    assert len(read_rows(tmp_path / "out" / "targets.csv")) == len(llama.names)


def test_out_of_memory_is_an_error_with_a_way_out(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, rows: list[int], keep: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attribute_module.Scorer, "score", full)
    with pytest.raises(RelneuronError, match="out of memory with") as caught:
        llama.attribute(tmp_path / "out", replace(QUICK, oom="error"))
    assert "--batch-tokens" in caught.value.fix and "--oom split" in caught.value.fix
    with (
        pytest.warns(UserWarning, match="going on with batches of"),
        pytest.raises(RelneuronError, match="out of memory with 1 sentences"),
    ):
        llama.attribute(tmp_path / "alone", QUICK)
    with pytest.raises(RelneuronError, match="oom"):
        replace(QUICK, oom="never")


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("target", ["answer", "prediction"])
def test_out_of_memory_halves_the_batches_and_changes_no_score(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Also after a kill: a run that goes on begins with the batches that fitted."""
    options = replace(OPTIONS, target=target)
    llama.attribute(tmp_path / "whole", options)
    seen: list[int] = []
    killed = False

    def small(name: str) -> Any:
        module = getattr(relneuron.methods.gains, name)
        true = module.trace

        def trace(residual: Any, ids: Any) -> Any:
            nonlocal killed
            seen.append(len(ids) * max(map(len, ids)))
            if seen[-1] > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if name == "scorer" and len(seen) > 8 and not killed:
                killed = True
                raise KeyboardInterrupt
            return true(residual, ids)

        monkeypatch.setattr(module, "trace", trace)

    small("scorer")
    small("targets")
    with pytest.raises(KeyboardInterrupt):
        llama.attribute(tmp_path / "out", options)
    n_before = sum(n > 12 for n in seen)
    llama.attribute(tmp_path / "out", options)
    if target == "answer":
        assert sum(n > 12 for n in seen) == n_before > 0
    [told] = Manifest(tmp_path / "out").data["stages"]["attribute"]["fallbacks"][-1:]
    assert told.startswith("out of memory: batches of 20 tokens cut to ")
    whole, ours = (files_of(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == ours.keys()
    assert whole["targets.csv"].count(b"\n") == ours["targets.csv"].count(b"\n")
    assert (
        Manifest(tmp_path / "out").data["stages"]["attribute"]["inputs"]
        == (Manifest(tmp_path / "whole").data["stages"]["attribute"]["inputs"])
    )
    for name, columns in (("attributions.csv", 6), ("interventions.csv", 4)):
        rows = [read_rows(tmp_path / folder / name) for folder in ("whole", "out")]
        for one, other in zip(*rows, strict=True):
            text = list(one)[:columns]
            assert [one[key] for key in text] == [other[key] for key in text]
            for key in {"score", "prob", "logprob"} & {*one}:
                assert abs(float(one[key]) - float(other[key])) <= 2e-5


def test_numbers_that_are_not_finite(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_trace = relneuron.methods.gains.scorer.trace
    true_scores = relneuron.methods.gains.scorer.value_scores

    def overflown(residual: Any, ids: Any) -> Any:
        found = true_trace(residual, ids)
        found.logits[-1, 3] = torch.inf
        return found

    def lost(*args: Any, **options: Any) -> Any:
        found = true_scores(*args, **options)
        found.ffn_neuron[-1, 1, 5] = torch.nan
        return found

    gains = replace(OPTIONS, kinds=("ffn_neuron",), compare=False)
    for name, function, cause in (
        ("trace", overflown, r"prompt s\d+: its log-probabilities are not all finite"),
        ("value_scores", lost, r"prompt s\d+: its gains are not all finite"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(relneuron.methods.gains.scorer, name, function)
            with pytest.raises(RelneuronError, match=cause):
                llama.attribute(tmp_path / "out", gains)
    llama.attribute(tmp_path / "out", gains)
