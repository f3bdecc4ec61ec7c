"""What the command line says of inputs that users have, and relneuron cannot take as they are.

One line of cause, one of fix, and nothing is written; or a notice, where work goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

import relneuron as package
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.cli.doctor import model_report
from relneuron.model.load import choose_device
from relneuron.model.mlps.find import find_mlps, inspect_layers
from relneuron.model.stream.read import read_residual_model
from tests.conftest import tiny_model
from tests.kit.corpus_commands import (
    COUNT,
    call,
    check_refused,
    sources,
)
from tests.kit.files import read_rows

IDS = torch.arange(5, 11)[None]


@pytest.fixture(scope="module")
def prompts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert call("prompts", fact_folder, "-o", path, "--eva", 8) == 0
    return path


@pytest.fixture(scope="module")
def recorded(model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("recorded") / "r"
    assert call("record", model_folder, prompts, "-o", folder, "--quiet") == 0
    return folder


# --- sets without neurons --------------------------------------------------------------------


@pytest.fixture
def gaps(study: Path, tmp_path: Path) -> Path:
    """LAPE gave one group no neuron, or in none.json no group any: a set of its own folder."""
    folder = tmp_path / "gaps"
    shutil.copytree(study, folder)
    found = NeuronFile.read(study / "neurons.json")
    for name, kept in (("one", ("en", "zh")), ("none", ())):
        sets = {key: chosen if key in kept else [] for key, chosen in found.sets.items()}
        NeuronFile(found.model, found.method, sets, {}).write(folder / f"{name}.json")
    return folder


def test_identify_says_which_group_has_no_neuron(
    relneuron: Any, study: Path, tmp_path: Path
) -> None:
    """The one neuron of the lowest entropy is not active enough everywhere."""
    words = ["identify", study, "-o", tmp_path / "n.json", "--method", "lape", "--top", 1]
    code, out, _ = relneuron(*words, "--filter-rate", 0, "--bar-ratio", 0.999)
    sets = NeuronFile.read(tmp_path / "n.json").sets
    empty = [name for name, chosen in sets.items() if not chosen]
    assert code == 0 and empty
    for name in empty:
        assert f"{name}: no neurons: none of those chosen is active enough in it" in out


def test_generate_says_that_a_set_is_empty(
    relneuron: Any, model_folder: Path, corpus: Path, gaps: Path, tmp_path: Path
) -> None:
    words = ["generate", model_folder, corpus / "prompts.txt", "--max-new-tokens", 3, "--quiet"]
    words += ["-o", tmp_path / "o.jsonl", "--neurons"]
    cause = "no neuron to switch off: code has none"
    check_refused(relneuron, tmp_path, cause, *words, gaps / "one.json", "--off", "code")
    cause = "no neuron to switch off: en, zh have none"
    check_refused(relneuron, tmp_path, cause, *words, gaps / "none.json", "--off", "clean,en,zh")
    cause = "no neuron to set to its mean: the set code has none"
    words += [gaps / "one.json"]
    check_refused(relneuron, tmp_path, cause, *words, "--off", "en", "--set", "code")
    with pytest.warns(UserWarning, match="code: its set has no neuron"):
        assert relneuron(*words, "--off", "en,code")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in (["--off", "clean"], ["--off", "clean", "--set", "en"], ["--off", "en"]):
            assert relneuron(*words, *asked, "--force")[0] == 0
    with pytest.warns(UserWarning, match="code: its set has no neuron"):
        assert relneuron(*words, "--off", "code", "--set", "en", "--force")[0] == 0


def test_nll_says_that_a_set_is_empty(
    relneuron: Any, model_folder: Path, corpus: Path, gaps: Path, tmp_path: Path
) -> None:
    words = [*sources(corpus), "-o", tmp_path / "o", "--windows", 2, *COUNT]
    cause = "no neuron to switch off: en, zh, code have none"
    check_refused(relneuron, tmp_path, cause, "nll", model_folder, gaps / "none.json", *words)
    with pytest.warns(UserWarning, match="code: its set has no neuron"):
        code, out, _ = relneuron("nll", model_folder, gaps / "one.json", *words)
    first = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert code == 0 and first == ["clean", "en", "zh"]
    notices = json.loads((tmp_path / "o" / "manifest.json").read_text())["fallbacks"]
    assert "code: its set has no neuron, so that nothing is off for it" in notices


def test_ablate_says_that_a_set_is_empty(
    relneuron: Any, model_folder: Path, recorded: Path, tmp_path: Path
) -> None:
    neurons = tmp_path / "neurons.json"
    words = ["identify", recorded, "-o", neurons, "--quiet"]
    assert relneuron(*words, "--fdr", 0.001, "--noise", 1500)[0] == 0
    sets = NeuronFile.read(neurons).sets
    assert not any(sets.values())
    words = ["ablate", model_folder, neurons, recorded / "prompts.jsonl"]
    words += ["-o", tmp_path / "e.csv", "--random-seeds", 1, "--quiet"]
    cause = "no neuron to switch off: likes_fruit, lives_in, works_as have none"
    check_refused(relneuron, tmp_path, cause, *words)
    found = NeuronFile.read(neurons)
    one = found.sets | {"lives_in": [(0, "gate", i, 1.0) for i in range(9)]}
    # A file that is changed on purpose gets another name.
    edited = tmp_path / "edited.json"
    NeuronFile(found.model, found.method, one, {}).write(edited)
    words[2] = edited
    with pytest.warns(UserWarning) as said:
        code, out, _ = relneuron(*words)
    assert code == 0
    assert sorted(str(w.message).split(":")[0] for w in said) == ["likes_fruit", "works_as"]
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in out.splitlines()
        if line.startswith("│")
    }
    # Of a relation without neurons there is nothing to say under "own off".
    assert cells["works_as"][1] == "" and cells["lives_in"][1] != ""
    rows = {
        (r["condition"], r["relation"], r["split"]): r for r in read_rows(tmp_path / "accuracy.csv")
    }
    off = float(rows["lives_in", "works_as", "eva"]["accuracy"])
    assert cells["works_as"][2] == f"{off:.1%}"


def test_an_empty_ablation_in_python_is_said(llama: Any) -> None:
    with pytest.warns(UserWarning, match="no neuron is given") as said, package.ablate(llama, []):
        pass
    assert said[0].filename == __file__


# --- devices, and where to write -------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(
    model_folder: Path, fact_folder: Path, corpus: Path, study: Path, prompts: Path
) -> dict[str, list[object]]:
    """Every command that writes, all but its -o."""
    neurons = study / "neurons.json"
    return {
        "demo": [],
        "run": [model_folder, "--facts", fact_folder, "--eva", 8],
        "prompts": [fact_folder, "--eva", 8],
        "record": [model_folder, prompts],
        "identify": [study, "--method", "lape"],
        "ablate": [model_folder, neurons, prompts],
        "attribute": [model_folder, prompts],
        "contrast": [model_folder, model_folder, prompts],
        "probe": [model_folder, prompts, "--apply", "probe.safetensors"],
        "eval": [model_folder, "--neurons", neurons, "--tasks", "t"],
        "effect": ["outputs.jsonl", "--cost", "costs.csv:cost"],
        "count": [model_folder, *sources(corpus), *COUNT],
        "nll": [model_folder, neurons, *sources(corpus), *COUNT],
        "merge": [study, study],
        "generate": [model_folder, corpus / "prompts.txt", "--neurons", neurons],
        "import": ["a.pth", "--model", model_folder, "--names", "a"],
        "export": [neurons],
        "edit": [model_folder, neurons, prompts],
        "look": [study],
        "report": [study],
        "cite": [study],
        "bench": ["--quick"],
    }


def test_an_output_under_a_file(relneuron: Any, commands: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, words in commands.items():
        for place in ("file/x", "file/x/y.csv"):
            for force in ([], ["--force"]) if name != "bench" else ([],):
                out = ["-o", tmp_path / place, *force]
                cause = f"{tmp_path / 'file'} is a file, {tmp_path / place} cannot be written in it"
                check_refused(relneuron, tmp_path, cause, name, *words, *out)


def test_every_command_that_writes_is_tried(commands: Any) -> None:
    from relneuron.cli.main import app

    names = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert {*commands} == names - {"doctor", "plan"}


def test_a_folder_that_is_closed(
    relneuron: Any, commands: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: mode != os.W_OK | os.X_OK)
    for name, words in commands.items():
        cause = f"{tmp_path} cannot be written to"
        check_refused(relneuron, tmp_path, cause, name, *words, "-o", tmp_path / "new" / "x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1", "mps", "meta", "cpu:1", "0", ""])
def test_devices_that_are_not_here(
    relneuron: Any, commands: Any, tmp_path: Path, device: str
) -> None:
    for name in ("run", "record", "ablate", "attribute", "count", "nll", "generate", "bench"):
        out = tmp_path / ("e.csv" if name == "ablate" else "o")
        words = [name, *commands[name], "-o", out, "--device", device]
        if name in ("ablate", "nll", "generate") and device != "gpu":
            continue  # the same function; one is enough where files are read first
        fix = check_refused(relneuron, tmp_path, f"no device {device!r} here", *words)
        assert fix == "fix:   use --device cpu"


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == choose_device("cpu:0") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == "cuda"
    assert [choose_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(RelneuronError, match="torch finds 2") as caught:
        choose_device("cuda:2")
    assert caught.value.fix == "use --device cpu or cuda"


# --- models ----------------------------------------------------------------------------------


def test_an_adapter_is_no_model(
    relneuron: Any, commands: Any, model_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    about = {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    cause = "lora is an adapter (adapter_config.json) of meta-llama/Llama-2-7b-hf"
    for name in ("record", "run", "count", "import"):
        words = [adapter if word == model_folder else word for word in commands[name]]
        fix = check_refused(relneuron, tmp_path, cause, name, *words, "-o", tmp_path / "o")
        assert "merge_and_unload" in fix
    check = relneuron("doctor", adapter)
    assert check[0] == 1 and cause in check[2]


def test_a_model_that_also_holds_an_adapter(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    both = tmp_path / "both"
    shutil.copytree(model_folder, both)
    (both / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    words = ["record", both, prompts, "-o", tmp_path / "o", "--quiet"]
    with monkeypatch.context() as without:
        without.setattr("relneuron.model.load.find_spec", lambda _: None)
        for place in ("integrations.peft", "models.auto.auto_factory"):
            without.setattr(f"transformers.{place}.is_peft_available", lambda: False)
        with pytest.warns(UserWarning, match="holds an adapter .* it is ignored without peft"):
            assert relneuron(*words)[0] == 0
    peft = type(sys)("peft")
    peft.__spec__ = ModuleSpec("peft", None)
    monkeypatch.setitem(sys.modules, "peft", peft)
    from relneuron.model.load import load_model

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: 1 / 0)
    with (
        pytest.warns(UserWarning, match="it is used, as peft is installed"),
        pytest.raises(RelneuronError, match="could not be loaded"),
    ):
        load_model(str(both))


def test_a_folder_has_no_revision(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["record", model_folder, prompts, "-o", tmp_path / "o", "--revision", "main"]
    assert "leave out --revision" in check_refused(relneuron, tmp_path, "no revision main", *words)


def test_a_wrapped_model_names_what_it_wraps(llama: Any) -> None:
    wrapped = torch.nn.DataParallel(llama)
    for read in (find_mlps, read_residual_model):
        with pytest.raises(RelneuronError, match="DataParallel holds the model") as caught:
            read(wrapped)
        assert caught.value.fix == "give model.module in place of model"
    assert len(find_mlps(wrapped.module)) == 3


def test_one_compiled_mlp_is_named(llama: Any) -> None:
    llama.model.layers[1].mlp = torch.compile(llama.model.layers[1].mlp, backend="eager")
    reasons = [verdict.reason for verdict in inspect_layers(llama)]
    assert reasons[1] == "mlp is compiled by itself: compile the whole model, or no part of it"
    assert "F=48" in reasons[0] and "F=48" in reasons[2]


def test_float64_is_refused_where_the_model_is_read(
    relneuron: Any, model_folder: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", torch.float64)
    assert all("float64 weights" in verdict.reason for verdict in inspect_layers(model))
    with (
        pytest.raises(RelneuronError, match="layers 0-2: float64 weights"),
        package.ablate(model, [(0, "gate", 1)]),
    ):
        pass
    rows, supported = model_report(model)
    assert not supported and dict(rows)["layers 0-2"].startswith("not supported: float64")


def test_generating_inside_of_instrument_says_what_to_do(llama: Any) -> None:
    with package.instrument(llama, 1) as probe:
        probe.batch(torch.ones_like(IDS))
        with pytest.raises(RelneuronError, match="were counted already") as refused:
            llama.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3)
    assert "count its text by one forward" in refused.value.fix


# --- prompts and tables ----------------------------------------------------------------------


def test_blank_lines_between_prompts_do_no_harm(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    lines = prompts.read_text().splitlines()
    spaced = tmp_path / "prompts.jsonl"
    spaced.write_text("\n" + lines[0] + "\n\n  \n" + "\n".join(lines[1:]) + "\n\n")
    assert read_prompts(spaced) == read_prompts(prompts)
    assert relneuron("record", model_folder, spaced, "-o", tmp_path / "o", "--quiet")[0] == 0
    spaced.write_text("\n\n" + lines[0] + "\n{\n\n")
    out = tmp_path / "p"
    words = ["record", model_folder, spaced, "-o", out]
    check_refused(relneuron, tmp_path, f"{spaced}, line 4: not JSON", *words)
    empty = json.dumps(json.loads(lines[1]) | {"object": " "})
    spaced.write_text("\n" + lines[0] + "\n\n" + empty + "\n\n")
    words = ["attribute", model_folder, spaced, "-o", out]
    check_refused(relneuron, tmp_path, f"{spaced}, line 4: object is empty", *words)


def test_columns_separated_by_semicolons_are_named(
    relneuron: Any, model_folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("prompt;answer;type\nPerson1 eats;plum;fruit\n")
    words = ["attribute", model_folder, table, "-o", tmp_path / "o"]
    fix = check_refused(relneuron, tmp_path, "line 1: its columns are separated by semi", *words)
    assert "commas" in fix and ".tsv" in fix
    with pytest.raises(RelneuronError, match="answer: its columns are separated by semicolons"):
        list(read_csv(table, ("prompt", "answer")))


def test_more_tokens_than_the_context_names_the_option(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, recorded: Path, tmp_path: Path
) -> None:
    words = ["generate", model_folder, corpus / "prompts.txt", "--neurons", study / "neurons.json"]
    words += ["-o", tmp_path / "o.jsonl", "--max-new-tokens"]
    fix = check_refused(relneuron, tmp_path, "longer than the model's context of 64", *words, 63)
    room = int(fix.split("at most ")[1].split()[0])
    assert "--max-new-tokens" in fix and 50 < room < 63
    neurons = tmp_path / "n.json"
    assert relneuron("identify", recorded, "-o", neurons, "--top", 9, "--quiet")[0] == 0
    words = ["ablate", model_folder, neurons, recorded / "prompts.jsonl", "-o", tmp_path / "e.csv"]
    fix = check_refused(relneuron, tmp_path, "context of 64", *words, "--generate", 63)
    assert "--generate" in fix
