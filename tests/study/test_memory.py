"""`relneuron.run`: a study of a model and facts in memory is the command line's, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.options import options_of
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.facts import Facts, fact_files
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import contents

CHOSEN: dict[str, Any] = {
    **{"eva": 8, "top": 20, "random_seeds": 1, "batch_tokens": 256},
    **{"permutations": 5, "bootstrap": 5, "noise": 20},
}
TEMPLATES = {"likes_fruit": "{} eats", "lives_in": "{} lives in", "works_as": "{} works as a"}


def given(model_folder: Path) -> tuple[Any, Any]:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


def run(model_folder: Path, facts: Any, output: Path, **options: Any) -> relneuron.Study:
    return relneuron.run(*given(model_folder), facts, output=output, quiet=True, **CHOSEN | options)


def rows_of(fact_folder: Path) -> list[dict[str, Any]]:
    """One row a fact of the folder's files, with their main templates."""
    return [
        {"relation": path.stem, **sample, "template": TEMPLATES[path.stem]}
        for path in sorted(fact_folder.glob("*.json"))
        for sample in json.loads(path.read_text())["samples"]
    ]


@pytest.fixture(scope="module")
def by_name(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("by_name") / "s"
    run_study(str(model_folder), fact_folder, folder, RunOptions(**CHOSEN), quiet=True)
    return folder


@pytest.fixture(scope="module")
def in_memory(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("in_memory") / "s"
    return run(model_folder, fact_folder, folder).folder


def test_it_writes_what_the_command_writes(by_name: Path, in_memory: Path) -> None:
    ours, theirs = contents(in_memory), contents(by_name)
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if ours[name] != theirs[name]}
    # These say how they were made.
    assert differing == {"manifest.json", "report.html", "look.html"}
    mine, other = Manifest(in_memory).data, Manifest(by_name).data
    assert mine["model"] == other["model"]  # its name, too, as its config has it
    for stage, entry in other["stages"].items():
        found = mine["stages"][stage]
        if stage in ("record", "look", "ablate"):
            assert entry.pop("commands") and found.pop("commands") == []
        if stage != "report":
            assert found == entry
    assert b"record: made from Python" in ours["report.html"]


def test_the_study_comes_back_as_frames(in_memory: Path, by_name: Path) -> None:
    study = relneuron.load(in_memory)
    assert study.effects.equals(relneuron.load(by_name).effects)
    assert set(study.neurons["set"]) == set(TEMPLATES)


def test_the_same_run_again_asks_nothing(
    model_folder: Path, fact_folder: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(in_memory)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    for name in ("record", "identify", "ablate_prompts", "write_prompts", "write_report"):
        monkeypatch.setattr(f"relneuron.study.run.{name}", asked)
    run(model_folder, fact_folder, in_memory, name="another name")
    assert contents(in_memory) == before


def test_the_stages_one_by_one_are_the_study(
    model_folder: Path, fact_folder: Path, by_name: Path, tmp_path: Path
) -> None:
    stages, (model, tokenizer) = relneuron.stages, given(model_folder)
    prompts, neurons = tmp_path / "prompts.jsonl", tmp_path / "neurons.json"
    stages.prompts(fact_folder, prompts, stages.PromptsOptions(eva=8))
    asking = stages.RecordOptions(batch_tokens=256)
    stages.record("m", model, tokenizer, prompts, tmp_path, asking, quiet=True)
    ranking = stages.RankOptions(top=20, permutations=5, bootstrap=5, noise=20)
    stages.identify(tmp_path, neurons, ranking, quiet=True)
    off = stages.AblateOptions(random_seeds=1, batch_tokens=256)
    output = tmp_path / "effects.csv"
    stages.ablate("m", model, tokenizer, neurons, prompts, output, off, quiet=True)
    for name in ("prompts.jsonl", "validated.csv", "scores.safetensors", "effects.csv"):
        assert (tmp_path / name).read_bytes() == (by_name / name).read_bytes()
    stages.ablate(
        *("m", model, tokenizer, neurons, prompts, tmp_path / "o" / "effects.csv", off),
        **{"splits": ("eva2",), "quiet": True},
    )
    found = relneuron.load(tmp_path / "o").effects
    assert {*found["split"]} == {"eva2"} and {*found["condition"]} == {
        "clean",
        "random.0",
        *TEMPLATES,
    }


def test_facts_in_memory_ask_the_same(
    model_folder: Path, fact_folder: Path, by_name: Path, tmp_path: Path
) -> None:
    whole = [
        {**json.loads(path.read_text()), "name": path.stem}
        for path in sorted(fact_folder.glob("*.json"))
    ]
    made = run(model_folder, whole, tmp_path / "whole").folder
    for name in ("prompts.jsonl", "effects.csv", "neurons.json"):
        assert (made / name).read_bytes() == (by_name / name).read_bytes()
    command = Manifest(made).data["stages"]["prompts"]["commands"][0]
    assert command[:2] == ["prompts", "STUDY/facts"]


def test_a_dataset_is_its_rows(fact_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = rows_of(fact_folder)
    assert fact_files(datasets.Dataset.from_list(rows)) == fact_files(rows)


def test_rows_and_a_frame_are_the_same_facts(fact_folder: Path) -> None:
    rows = rows_of(fact_folder)
    files = fact_files(rows)
    assert list(files) == sorted(TEMPLATES)
    for frame in (pandas.DataFrame(rows), iter(rows)):
        assert fact_files(frame) == files
    for relation in Facts.of(rows).relations(None):
        path = fact_folder / f"{relation.name}.json"
        [theirs] = Facts.of(path).relations(None)
        assert relation.facts == theirs.facts
        assert relation.templates.main == theirs.templates.main


def test_cells_of_several_texts() -> None:
    row = {"relation": "plays it", "subject": "Ann", "object": ["lute", "harp"]}
    frame = pandas.DataFrame([row | {"template": ["{} plays", "{} has a"]}] * 2)
    files = fact_files(frame)
    assert files["plays_it"]["prompt_templates"] == ["{} plays", "{} has a"]
    [relation] = Facts.of(frame).relations(None)
    assert relation.facts[0].objects == ("lute", "harp") and len(relation.facts) == 1


ROW = {"relation": "r", "subject": "Ann", "object": "x", "template": "{} is"}


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ([], "there is no fact"),
        ([3], "the facts are no rows"),
        ([{"relation": "r", "subject": "Ann"}], "fact 0 has no object, template"),
        ([ROW, {"name": "s", "samples": []}], "some facts are whole relations"),
        ([ROW | {"relation": "a/b"}], "fact 0: relation is 'a/b'"),
        ([ROW | {"relation": float("nan")}], "fact 0: relation is nan"),
        ([ROW | {"subject": float("nan")}], "holds what JSON does not"),
        ([ROW | {"subject": " "}], "relation r: samples.0.subject"),
        ([ROW | {"object": []}], "relation r: samples.0.object"),
        ([ROW | {"template": "no slot"}], "relation r: prompt_templates.0"),
        ([{"samples": [], "prompt_templates": []}], "relation 0: name is None"),
        ([{"name": "r", "samples": []}] * 2, "two relations are called 'r'"),
        (Path("nowhere"), "nowhere does not exist"),
        ([ROW], "the list of facts has one relation"),
    ],
)
def test_facts_that_are_none_are_refused(
    model_folder: Path, tmp_path: Path, facts: Any, cause: str
) -> None:
    with pytest.raises(RelneuronError) as error:
        run(model_folder, facts, tmp_path / "o")
    assert cause in error.value.cause
    assert not list(tmp_path.iterdir())


def test_models_and_options_that_are_refused(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = given(model_folder)
    for options, cause in (
        ({"dtype": "float32"}, "dtype says how a model is loaded"),
        ({"device_map": "auto"}, "device_map says how a model is loaded"),
        ({"tops": 3}, "run has no option 'tops'"),
        ({"top": 0}, "--top must be at least 1"),
        ({"analyses": ("size",)}, "unknown --analyses 'size'"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            relneuron.run(model, tokenizer, fact_folder, output=tmp_path / "o", **options)
    for other, what in (
        ((torch.compile(model, backend="eager"), tokenizer), "the model is compiled"),
        ((str(model_folder), tokenizer), "is a name, not a model"),
        ((model, None), "which makes no tokens"),
    ):
        with pytest.raises(RelneuronError, match=what):
            relneuron.run(*other, fact_folder, output=tmp_path / "o")
    model.train()
    with pytest.raises(RelneuronError, match="in training mode"):
        relneuron.run(model, tokenizer, fact_folder, output=tmp_path / "o")
    assert not list(tmp_path.iterdir())
    assert {"top", "chat_template", "analyses", "backend"} <= options_of(RunOptions).keys()


def test_another_model_other_facts_and_other_options_are_refused(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    rows = rows_of(fact_folder)
    folder = run(model_folder, rows, tmp_path / "s").folder
    before = contents(folder)
    model, tokenizer = given(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(RelneuronError, match="model.digest"):
        relneuron.run(model, tokenizer, rows, output=folder, quiet=True, **CHOSEN)
    for changed in (rows[:-1], [*rows, rows[0] | {"subject": "Zoe"}]):
        with pytest.raises(RelneuronError, match="is a study of other facts"):
            run(model_folder, changed, folder)
    with pytest.raises(RelneuronError, match="made from other inputs: .*top: 20 -> 21"):
        run(model_folder, rows, folder, top=21)
    assert contents(folder) == before
    study = run(model_folder, rows[::-1], folder, force=True)
    assert (folder / "facts" / "works_as.json").read_bytes() != before["facts/works_as.json"]
    assert len(study.prompts) == 3 * 24


def adapted(model: Any, seed: int) -> Any:
    """The model with a LoRA adapter of peft on every linear map of its layers."""
    from peft import LoraConfig, get_peft_model

    maps = [f"{name}_proj" for name in ("gate", "up", "down", "q", "k", "v", "o")]
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 by a name that it gives up.
        warnings.simplefilter("ignore", FutureWarning)
        found = get_peft_model(model, LoraConfig(target_modules=maps, r=2)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.05)
    return found


def test_an_adapted_model_is_the_one_that_it_is_merged_into(
    model_folder: Path, fact_folder: Path, by_name: Path, tmp_path: Path
) -> None:
    options = {"quiet": True, **CHOSEN}
    model, tokenizer = given(model_folder)
    apart = adapted(model, 1)
    study = relneuron.run(apart, tokenizer, fact_folder, output=tmp_path / "apart", **options)
    with pytest.raises(RelneuronError, match=r"model\.digest"):
        other = adapted(given(model_folder)[0], 2)
        relneuron.run(other, tokenizer, fact_folder, output=tmp_path / "apart", **options)
    merged = apart.merge_and_unload()
    whole = relneuron.run(merged, tokenizer, fact_folder, output=tmp_path / "merged", **options)
    ours, theirs = (one.answers.set_index("id") for one in (study, whole))
    assert (ours["prediction"] == theirs["prediction"]).mean() > 0.99  # ties of rounding
    plain = relneuron.load(by_name).answers.set_index("id")
    assert (ours["prediction"] != plain["prediction"]).any()
    clean = [one.effects.query("condition == 'clean'")["logprob"] for one in (study, whole)]
    pandas.testing.assert_series_equal(*clean, rtol=0, atol=1e-4)
    chosen = [set(map(tuple, one.neurons.iloc[:, [0, 2, 3, 4]].values)) for one in (study, whole)]
    assert len(chosen[0] & chosen[1]) > 0.9 * len(chosen[0]) == 0.9 * 60


def test_a_run_that_was_stopped_goes_on(
    model_folder: Path,
    fact_folder: Path,
    in_memory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "s"
    for name in ("write_prompts", "identify", "ablate_prompts"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"relneuron.study.run.{name}", stop)
            run(model_folder, fact_folder, folder)
    shown = relneuron.load(folder)._repr_html_()
    assert "effects" in shown and "missing" in shown
    assert contents(run(model_folder, fact_folder, folder).folder) == contents(in_memory)


def test_a_chat_template_is_asked_as_on_the_command_line(
    model_folder: Path, fact_folder: Path, by_name: Path, tmp_path: Path
) -> None:
    """One that puts nothing around a prompt, which this model would not understand."""
    model, tokenizer = given(model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    study = relneuron.run(
        *(model, tokenizer, fact_folder),
        **{"output": tmp_path / "s", "chat_template": True, "quiet": True, **CHOSEN},
    )
    assert (study.folder / "effects.csv").read_bytes() == (by_name / "effects.csv").read_bytes()
    assert "chat_template" in study.manifest["stages"]["prompts"]["inputs"]
    tokenizer.chat_template = "Q: " + tokenizer.chat_template
    with pytest.raises(RelneuronError, match="prompts was made from other inputs: chat_template"):
        relneuron.run(
            *(model, tokenizer, fact_folder),
            **{"output": tmp_path / "s", "chat_template": True, "quiet": True, **CHOSEN},
        )
