"""What `attribute` refuses, before it writes; what it does with files that are there already."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import relneuron.methods.gains.attribute as attribute_module
import relneuron.methods.gains.scorer
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.prompts import prompts_bytes
from relneuron.methods.gains.attribute import JOURNAL, attribute
from relneuron.methods.gains.options import KINDS, VALUE_KINDS, AttributeOptions, attribute_inputs
from relneuron.methods.gains.values import KINDS as SCORED
from relneuron.texts.knowledge import read_knowledge
from tests.conftest import tiny_model
from tests.kit.attributed import VOCABULARY
from tests.kit.attribution_runs import OPTIONS, Attributed, files_of, word_tokenizer
from tests.kit.hooked import one_thread, read_rows

QUICK = replace(OPTIONS, kinds=("head",), compare=False)


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Attributed:
    made = Attributed("llama", tmp_path_factory.mktemp("llama"))
    made.attribute(made.folder / "out")
    return made


def table(folder: Path, *rows: str, header: str = "prompt,answer,type") -> Path:
    path = folder / "facts.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def refused(run: Attributed, output: Path, match: str, *args: Any, **more: Any) -> RelneuronError:
    """The error of a call that must leave the output as it is."""
    before = files_of(output) if output.is_dir() else output.exists()
    with pytest.raises(RelneuronError, match=match) as caught:
        run.attribute(output, *args, **more)
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
    options = {*asdict(AttributeOptions())} - {"oom"}  # changes no score
    assert options | {"model", "tokenizer", "prompts", "tokens"} == {*inputs}
    assert inputs["model"] == {"layers": 2} and inputs == json.loads(json.dumps(inputs))


def test_parquet_without_pyarrow(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused(run, tmp_path / "out", "needs pyarrow", replace(QUICK, format="parquet"))
    assert "write csv" in error.fix


# --- sentences -------------------------------------------------------------------------------


def test_answers_of_several_tokens(run: Attributed, tmp_path: Path) -> None:
    path = table(tmp_path, "w3 w4,w5,a", "w6 w7,w8 w9 w10,a")
    strict = replace(QUICK, strict=True)
    error = refused(run, tmp_path / "out", "prompt a.0001.*has 3 tokens", strict, path)
    assert "--strict" in error.fix
    run.attribute(tmp_path / "out", QUICK, path)
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
    run: Attributed, tmp_path: Path, rows: list[str], header: str, cause: str
) -> None:
    refused(run, tmp_path / "out", cause, QUICK, table(tmp_path, *rows, header=header))


def test_no_facts_and_splits_that_none_has(run: Attributed, tmp_path: Path) -> None:
    refused(run, tmp_path / "out", "does not exist", QUICK, tmp_path / "none.csv")
    error = refused(
        run, tmp_path / "out", "no prompt of the splits det", replace(QUICK, splits=("det",))
    )
    assert error.exit_code == 2


def test_some_splits_of_a_prompts_file(run: Attributed, tmp_path: Path) -> None:
    """The copy has all of them, so `ablate` can ask the others."""
    prompts = [
        replace(p, split="det" if i % 3 else "eva") for i, p in enumerate(read_knowledge(run.path))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    run.attribute(tmp_path / "out", replace(QUICK, splits=("det",)), path)
    ids = [row["id"] for row in read_rows(tmp_path / "out" / "targets.csv")]
    assert ids == [p.id for p in prompts if p.split == "det"]
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == path.read_bytes()


# --- models ----------------------------------------------------------------------------------


def test_a_token_outside_the_vocabulary(run: Attributed, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more"])
    path = table(tmp_path, "w3 w4,more,a")
    with pytest.raises(RelneuronError, match=f"token {VOCABULARY}, the model has {VOCABULARY}"):
        attribute("m", run.model, tokenizer, path, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_attributed(run: Attributed, tmp_path: Path) -> None:
    offloaded = tiny_model("llama")
    offloaded.lm_head.weight = torch.nn.Parameter(offloaded.lm_head.weight.to("meta"))
    training = tiny_model("llama").train()
    for model, cause in (
        (offloaded, "lm_head.weight is offloaded"),
        (training, "train mode"),
        (tiny_model("gemma2"), "Gemma2ForCausalLM cannot be attributed"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            attribute("m", model, run.tokenizer, run.path, tmp_path / "out", QUICK)
        assert not (tmp_path / "out").exists()


def test_tied_embeddings_work(run: Attributed, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    attribute("m", model, run.tokenizer, run.path, tmp_path / "out", QUICK, quiet=True)
    assert len(read_rows(tmp_path / "out" / "targets.csv")) == len(run.names)


def test_out_of_memory_is_an_error_with_a_way_out(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, rows: list[int]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attribute_module.Scorer, "score", full)
    with pytest.raises(RelneuronError, match="out of memory with") as caught:
        run.attribute(tmp_path / "out", replace(QUICK, oom="error"))
    assert "--batch-tokens" in caught.value.fix and "--oom split" in caught.value.fix
    with (
        pytest.warns(UserWarning, match="going on with batches of"),
        pytest.raises(RelneuronError, match="out of memory with 1 sentences"),
    ):
        run.attribute(tmp_path / "alone", QUICK)
    with pytest.raises(RelneuronError, match="oom"):
        replace(QUICK, oom="never")


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("target", ["answer", "prediction"])
def test_out_of_memory_halves_the_batches_and_changes_no_score(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Also after a kill: a run that goes on begins with the batches that fitted."""
    options = replace(OPTIONS, target=target)
    run.attribute(tmp_path / "whole", options)
    seen: list[int] = []
    killed = False

    def small(name: str) -> Any:
        module = relneuron.methods.gains.scorer if name == "scorer" else attribute_module
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
    small("attribute")
    with pytest.raises(KeyboardInterrupt):
        run.attribute(tmp_path / "out", options)
    n_before = sum(n > 12 for n in seen)
    run.attribute(tmp_path / "out", options)
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
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
                run.attribute(tmp_path / "out", gains)
    run.attribute(tmp_path / "out", gains)


# --- outputs ---------------------------------------------------------------------------------


def test_the_output_is_a_file(run: Attributed, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(run, tmp_path / "out", "is a file", QUICK)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["targets.csv", "attributions.parquet", "gains.safetensors", "comparison.csv"]
)
def test_files_of_others_stay(run: Attributed, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("mine")
    assert refused(run, output, f"{name} exists", QUICK).exit_code == 2
    run.attribute(output, QUICK, force=True)
    assert (output / "targets.csv").read_text().startswith("id,relation")


def test_other_prompts_stay(run: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "prompts.jsonl").write_text("mine")
    refused(run, output, "prompts.jsonl exists", QUICK)
    # A file that is read is left as it is, however it is written.
    prompts = read_knowledge(run.path)
    text = "".join(json.dumps(asdict(p), indent=None, sort_keys=True) + "\n" for p in prompts)
    (output / "prompts.jsonl").write_text(text)
    run.attribute(output, QUICK, output / "prompts.jsonl")
    assert (output / "prompts.jsonl").read_text() == text


def test_what_is_finished_is_left_as_it_is(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(run.folder / "out", output)
    before = files_of(output)

    def never(*_: Any) -> None:
        raise AssertionError("a sentence was scored again")

    monkeypatch.setattr(attribute_module.Scorer, "score", never)
    for force in (False, True):
        # Killed behind the manifest, a run leaves its journal.
        (output / JOURNAL).write_text("left")
        run.attribute(output, force=force)
        assert files_of(output) == before
    (output / "targets.csv").write_text("changed")
    assert "digest differs" in refused(run, output, "is not the file that was written").cause


def test_other_options_need_force(run: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(run.folder / "out", output)
    other = replace(OPTIONS, top=3, compare=False)
    cause = "compare: True -> False; .*; top: 40 -> 3"
    refused(run, output, f"attribute was made from other inputs: {cause}", other)
    run.attribute(output, other, force=True)
    run.attribute(tmp_path / "anew", other)
    assert files_of(output) == files_of(tmp_path / "anew")
    assert not (output / "comparison.csv").exists()


def test_forced_and_killed_it_goes_on_with_force_only(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, other = tmp_path / "out", replace(OPTIONS, top=3, compare=False)
    shutil.copytree(run.folder / "out", output)
    true, n_scored = attribute_module.Scorer.score, 0

    def score(self: Any, rows: list[int]) -> Any:
        nonlocal n_scored
        n_scored += 1
        if n_scored == 3:
            raise KeyboardInterrupt
        return true(self, rows)

    monkeypatch.setattr(attribute_module.Scorer, "score", score)
    with pytest.raises(KeyboardInterrupt):
        run.attribute(output, other, force=True)
    # Neither attribution is whole: the first one's gains are gone.
    refused(run, output, "made from other inputs", other)
    refused(run, output, "exists|not the file")
    run.attribute(output, other, force=True)
    n_batches = Manifest(output).data["stages"]["attribute"]["batch_plan"]["batches"]
    assert n_scored == n_batches + 1
    run.attribute(tmp_path / "anew", other)
    assert files_of(output) == files_of(tmp_path / "anew")


def test_a_study_of_a_corpus_is_not_overwritten(run: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "count"
    manifest = Manifest(output)
    manifest.data["stages"]["count"] = {"inputs": {}, "files": []}
    manifest.save()
    refused(run, output, "holds a study of groups of text", QUICK)


def test_a_locked_folder(run: Attributed, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, time; from pathlib import Path\n"
        "from relneuron.artifact.manifest import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        refused(run, tmp_path / "out", "another process is writing to", QUICK)
    finally:
        holder.communicate()
    run.attribute(tmp_path / "out", QUICK)
    with locked(tmp_path / "out"):
        assert "targets.csv" in files_of(tmp_path / "out")
