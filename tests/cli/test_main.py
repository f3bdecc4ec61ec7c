"""The command line: every bad input gets one line of cause and one of fix, and writes nothing.

Also the stages as single commands: they write what `run` writes.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.forked import command

RUN = ["--eva", "8", "--top", "40", "--random-seeds", "2", "--quiet"]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a study by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def broken_model(source: Path, folder: Path, change: str) -> Path:
    """A copy of the tiny model with something wrong."""
    shutil.copytree(source, folder)
    config = folder / "config.json"
    if change == "no tokenizer":
        for path in folder.glob("token*"):
            path.unlink()
    elif change == "no config":
        config.unlink()
    elif change == "no weights":
        (folder / "model.safetensors").unlink()
    elif change == "cut weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif change == "short context":
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 9})
        )
    elif change == "more layers":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    elif change in ("ungated", "no MLP"):
        import transformers

        sizes = {"vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 2}
        made: Any = transformers.GPT2Config(**sizes, n_head=2)
        if change == "no MLP":
            made = transformers.MambaConfig(**sizes, state_size=4, time_step_rank=2)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("no config", "is no model folder"),
        ("no weights", "could not be loaded"),
        ("cut weights", "could not be loaded"),
        ("more layers", "lacks weights"),
        ("no tokenizer", "no usable tokenizer"),
        ("no MLP", "0 of 2 layers have a supported MLP; layers 0-1: no MLP (linear maps: mixer."),
        ("short context", "longer than the model's context of 9"),
    ],
)
def test_bad_models(
    relneuron: Any, model_folder: Path, fact_folder: Path, tmp_path: Path, change: str, cause: str
) -> None:
    model = broken_model(model_folder, tmp_path / "model", change)
    check_refused(
        relneuron("run", model, "--facts", fact_folder, "-o", tmp_path / "out", *RUN), cause
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--backend", "cuda"], "unknown backend"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--splits", "eva,test"], "unknown --splits 'test'"),
        (["--method", "lape"], "run ranks by ap, not by lape"),
        (["--method", "best"], "run ranks by ap, not by best"),
        (["--pooling", "max"], "unknown --pooling"),
        (["--top", "0"], "--top"),
        (["--top", "5", "--fdr", "0.05"], "--top and --fdr"),
        (["--fdr", "1"], "--fdr must be above 0 and below 1"),
        (["--fdr", "0.05", "--noise", "0"], "more columns of noise"),
        (["--permutations", "-1"], "--permutations"),
        (["--bootstrap", "-1"], "--bootstrap"),
        (["--noise", "-1"], "--noise"),
    ],
)
def test_bad_options(
    relneuron: Any, model_folder: Path, fact_folder: Path, tmp_path: Path, words: Any, cause: str
) -> None:
    out = tmp_path / "out"
    command = ["run", model_folder, "--facts", fact_folder, "-o", out, "--eva", "8", "--quiet"]
    check_refused(relneuron(*command, *words), cause)
    assert not out.exists()


def check_refused(result: tuple[int, str, str], cause: str) -> None:
    code, out, err = result
    assert code in (1, 2)
    lines = err.strip().splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert cause in lines[0]
    assert lines[1].startswith("fix:   ")
    assert out == ""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "JSON"),
        ('{"prompt_templates": ["{} is"]}', "samples"),
        (
            '{"prompt_templates": ["{} is"], "samples": [{"subject": "", "object": "a"}]}',
            "samples.0.subject",
        ),
        (
            '{"prompt_templates": ["It is"], "samples": [{"subject": "b", "object": "a"}]}',
            "prompt_templates.0",
        ),
        (
            '{"prompt_templates": ["{} is"], "samples": [{"subject": "b", "object": "a"}]}',
            "too few",
        ),
    ],
)
def test_bad_facts(
    relneuron: Any, model_folder: Path, fact_folder: Path, tmp_path: Path, text: str, cause: str
) -> None:
    facts = tmp_path / "facts"
    shutil.copytree(fact_folder, facts)
    (facts / "odd.json").write_text(text)
    out = tmp_path / "out"
    check_refused(relneuron("run", model_folder, "--facts", facts, "-o", out, *RUN), cause)
    check_refused(relneuron("prompts", facts, "-o", out / "prompts.jsonl", "--eva", "8"), cause)
    assert not out.exists()


@pytest.fixture(scope="module")
def by_stages(model_folder: Path, fact_folder: Path, tmp_path_factory: Any) -> Path:
    """A study made by the single commands, in one folder."""
    folder: Path = tmp_path_factory.mktemp("stages") / "s"
    for words in (
        ["prompts", fact_folder, "-o", folder / "prompts.jsonl", "--eva", "8"],
        ["record", model_folder, folder / "prompts.jsonl", "-o", folder, "--quiet"],
        ["identify", folder, "-o", folder / "neurons.json", "--top", "40", "--quiet"],
        ["look", folder, "-o", folder / "look.html", "--quiet"],
        ["ablate", model_folder, folder / "neurons.json", folder / "prompts.jsonl", "-o"]
        + [folder / "effects.csv", "--random-seeds", "2", "--quiet"],
        ["report", folder, "-o", folder / "report.html"],
    ):
        process = command(*words)
        assert process.wait() == 0, process.said()
    return folder


@pytest.fixture(scope="module")
def whole(model_folder: Path, fact_folder: Path, tmp_path_factory: Any) -> Path:
    """The same study made by `relneuron run` in another process, whose sets have another order."""
    folder: Path = tmp_path_factory.mktemp("whole") / "s"
    done = command("run", model_folder, "--facts", fact_folder, "-o", folder, *RUN)
    assert done.wait() == 0, done.said()
    assert done.said()[0].splitlines()[-1] == f"report: {folder / 'report.html'}"
    return folder


def test_single_stages_write_what_run_writes(by_stages: Path, whole: Path) -> None:
    assert contents(by_stages) == contents(whole)


def test_run_goes_on_with_the_parts_of_two_machines(
    model_folder: Path, fact_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Folders that `merge` puts together, and what docs/howto/several-gpus.md says to type."""
    study, prompts = tmp_path / "s", tmp_path / "s/prompts.jsonl"
    asked = [model_folder, study / "neurons.json", prompts, "--random-seeds", "2"]

    def parts(stage: str, words: list[Any], file: str = "") -> list[list[Any]]:
        folders = [tmp_path / f"{stage}{number}" for number in (1, 2)]
        done = [
            [stage, *words, "-o", folder / file, "--shard", f"{number}/2", "--quiet"]
            for number, folder in enumerate(folders, 1)
        ]
        return [*done, ["merge", *folders, "-o", study]]

    for words in (
        ["prompts", fact_folder, "-o", prompts, "--eva", "8"],
        *parts("record", [model_folder, prompts]),
        ["record", model_folder, prompts, "-o", study, "--quiet"],
        ["identify", study, "-o", study / "neurons.json", "--top", "40", "--quiet"],
        *parts("ablate", asked, "effects.csv"),
        ["run", model_folder, "--facts", fact_folder, "-o", study, *RUN],
    ):
        process = command(*words)
        assert process.wait() == 0, process.said()
    assert contents(study) == contents(whole)


def test_identify_says_what_it_chose_and_how_sure_it_is(
    relneuron: Any, by_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "neurons.json"
    words = ["identify", by_stages, "-o", output, "--quiet", "--force"]
    code, out, _ = relneuron(*words, "--top", "40")
    lines = out.splitlines()
    assert code == 0 and lines[-1] == f"-> {output}"
    assert re.fullmatch(r"peak memory: [\d,]+ MiB", lines[-2])
    for line in lines[:-2]:
        assert re.fullmatch(
            r"\w+: 40 neurons, AP >= 0\.\d{4}, q <= \S+, \d+ of \d+ tied at the cut chosen, "
            r"\d+ with AP = 1",
            line,
        )
    first = (tmp_path / "significance.csv").read_bytes()
    assert relneuron(*words, "--top", "40")[0] == 0
    assert (tmp_path / "significance.csv").read_bytes() == first
    # Measured numbers are printed, never written.
    assert "peak" not in (tmp_path / "manifest.json").read_text()
    # A system that tells no peaks.
    monkeypatch.setattr("relneuron.artifact.memory.PROCESSES", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "resource", None)
    code, out, _ = relneuron(*words, "--fdr", "0.001", "--noise", "1500")
    assert code == 0
    # 256 neurons / 1,501 / 0.001
    assert "--fdr finds 171 or more neurons of a relation, or none" in out
    assert "no neurons, none has q <= 0.001, the lowest is" in out
    assert "peak" not in out


def test_nothing_is_overwritten_without_force(
    relneuron: Any, by_stages: Path, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    before = contents(by_stages)
    s = by_stages
    for words in (
        ["prompts", fact_folder, "-o", s / "prompts.jsonl", "--eva", "8"],
        ["record", model_folder, s / "prompts.jsonl", "-o", s],
        ["identify", s, "-o", s / "neurons.json"],
        ["ablate", model_folder, s / "neurons.json", s / "prompts.jsonl", "-o", s / "effects.csv"],
        ["report", s, "-o", s / "report.html"],
    ):
        check_refused(relneuron(*words), "exists")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    words = ["run", model_folder, "--facts", fact_folder, "-o", tmp_path / "mine", *RUN]
    check_refused(relneuron(*words), "not empty")
    assert files_in(tmp_path) == {"mine", "mine/thesis.tex"}
    assert contents(by_stages) == before


def test_neurons_of_another_model_are_refused(
    relneuron: Any, by_stages: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = json.loads((by_stages / "neurons.json").read_text())
    other = tmp_path / "neurons.json"
    prompts, output = by_stages / "prompts.jsonl", tmp_path / "effects.csv"
    for change, cause in (
        ({"model": data["model"] | {"width": 64}}, "'width': 64"),
        ({"sets": {"works_as": [[0, "gate", 48, 1.0]]}}, "index 48"),
        ({"sets": {"works_as": [[2, "gate", 0, 1.0]]}}, "layer 2"),
        ({"sets": {"works_as": [[0, "act", 0, 1.0]]}}, "site 'act'"),
        ({"sets": {"works_as": [["x"]]}}, "no neuron file"),
        ({"format": "other"}, "no neuron file"),
    ):
        other.write_text(json.dumps(data | change))
        check_refused(relneuron("ablate", model_folder, other, prompts, "-o", output), cause)
    other.write_text("[")
    check_refused(relneuron("ablate", model_folder, other, prompts, "-o", output), "not JSON")
    assert files_in(tmp_path) == {"neurons.json"}


@pytest.mark.parametrize(
    ("line", "cause"),
    [("{", "line 1"), ('{"id": "a"}', "relation"), ("", "no prompt"), ("[1]", "line 1")],
)
def test_bad_prompts(
    relneuron: Any, model_folder: Path, tmp_path: Path, line: str, cause: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    check_refused(relneuron("record", model_folder, prompts, "-o", tmp_path / "out"), cause)


def limit_files(n_bytes: int) -> None:
    """Stands in for a full disk: no file may grow past the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(
    model_folder: Path, fact_folder: Path, whole: Path, tmp_path: Path
) -> None:
    study = ["run", model_folder, "--facts", fact_folder, "-o", tmp_path / "s", *RUN]
    for n_bytes in (1_000, 25_000, 60_000):
        process = command(*study, before=partial(limit_files, n_bytes))
        assert process.wait() == 1
        check_refused((1, "", process.said()[1]), "File too large")
        left = {path.name for path in (tmp_path / "s").iterdir()}
        assert not {name for name in left if name.endswith(".tmp")}
    # With space again the same command ends with the bits of an undisturbed run.
    assert command(*study).wait() == 0
    assert contents(tmp_path / "s") == contents(whole)


def test_doctor_gives_a_verdict_per_layer(
    relneuron: Any, model_folder: Path, tmp_path: Path
) -> None:
    code, out, _ = relneuron("doctor")
    assert code == 0
    assert "backend reference" in out
    code, out, _ = relneuron("doctor", model_folder)
    assert code == 0
    assert "supported: 2 of 2 layers" in out
    assert "supported: 4 heads a layer" in out
    code, out, _ = relneuron("doctor", broken_model(model_folder, tmp_path / "m", "ungated"))
    assert code == 0
    assert "layers 0-1                     supported: transformer.h.{}.mlp: gelu_tanh, F=64" in out
    assert "supported: 2 heads a layer" in out  # a GPT-2
    code, out, _ = relneuron("doctor", broken_model(model_folder, tmp_path / "n", "no MLP"))
    assert code == 1
    assert "passed over: no MLP (linear maps: mixer.in_proj" in out
    assert "no: no layer has a supported MLP" in out


def test_usage_errors_and_unexpected_errors(
    relneuron: Any, monkeypatch: pytest.MonkeyPatch, by_stages: Path, tmp_path: Path
) -> None:
    assert relneuron("no-such-command")[0] == 2
    assert relneuron("run")[0] == 2
    check_refused(relneuron("identify", by_stages, "-o", tmp_path / "n", "--method", "x"), "method")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relneuron.study.run.report_stage", interrupted)
    code, _, err = relneuron("report", by_stages, "-o", "r.html")
    assert code == 130
    assert f"relneuron report {by_stages} -o r.html" in err


def test_a_table_format_is_refused_before_any_work(
    relneuron: Any, by_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ablate", tmp_path / "no model", by_stages / "neurons.json"]
    words.append(by_stages / "prompts.jsonl")
    check_refused(relneuron(*words, "-o", tmp_path / "effects.xlsx"), "neither .csv nor .parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_refused(relneuron(*words, "-o", tmp_path / "effects.parquet"), "needs pyarrow")


def test_parquet_holds_the_same_rows(
    relneuron: Any, by_stages: Path, model_folder: Path, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "effects.parquet"
    words = ["ablate", model_folder, by_stages / "neurons.json", by_stages / "prompts.jsonl"]
    code, _, err = relneuron(*words, "-o", output, "--random-seeds", "2", "--quiet")
    assert code == 0, err
    table = pyarrow.read_table(output).to_pydict()
    lines = (by_stages / "effects.csv").read_text().splitlines()
    assert ",".join(table) == lines[0]
    assert len(table["id"]) == len(lines) - 1
    torch.testing.assert_close(table["logprob"][0], float(lines[1].split(",")[-1]))
