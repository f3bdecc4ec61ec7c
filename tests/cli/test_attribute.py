"""The command `attribute`, and the commands that go on from its folder: identify and ablate."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.gains.attribute import JOURNAL
from relneuron.methods.gains.commands import _cell
from tests.kit.attribution_runs import files_of
from tests.kit.corpus_commands import Result, call
from tests.kit.files import read_rows
from tests.kit.forked import command

QUICK = ["--query-units", 4, "--top", 20, "--random-seeds", 1, "--batch-tokens", 200, "--quiet"]
RELATIONS = ("likes_fruit", "lives_in", "works_as")


@pytest.fixture(scope="module")
def prompts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """det, eva and eva2 prompts of the three relations."""
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert call("prompts", fact_folder, "-o", path, "--eva", 4) == 0
    return path


@pytest.fixture(scope="module")
def folder(model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An attribution of the det prompts."""
    output: Path = tmp_path_factory.mktemp("attribute") / "out"
    assert call("attribute", model_folder, prompts, "-o", output, "--splits", "det", *QUICK) == 0
    return output


def check_refused(result: Result, cause: str) -> None:
    code, out, err = result
    lines = err.strip().splitlines()
    assert code in (1, 2) and out == "" and len(lines) == 2, err
    assert lines[0].startswith("error: ") and cause in lines[0]
    assert lines[1].startswith("fix:   ")


def test_what_the_command_says(
    relneuron: Any, model_folder: Path, prompts: Path, folder: Path
) -> None:
    """Once it is finished, the same command says the same and writes nothing."""
    before = files_of(folder)
    words = ["attribute", model_folder, prompts, "-o", folder, "--splits", "det", *QUICK]
    code, out, err = relneuron(*words)
    assert code == 0 and err == "" and files_of(folder) == before
    lines = out.splitlines()
    rows = read_rows(folder / "targets.csv")
    n_kept = sum(row["kept"] == "1" for row in rows)
    n_several = sum(row["n_answer_tokens"] != "1" for row in rows)
    assert lines[0] == (
        f"{len(rows)} sentences, the model knows the answer of {n_kept}; "
        f"{n_several} answers of several tokens: their first one was asked for"
    )
    for relation, line in zip(RELATIONS, lines[1:4], strict=True):
        asked = Counter((r["target"], r["target_id"]) for r in rows if r["relation"] == relation)
        (token, token_id), n = asked.most_common(1)[0]
        assert line.startswith(f"{relation}: asked for {token!r} ({token_id}) {n} times")
        assert line.endswith("one and the same token") == (len(asked) == 1)
    for relation, line in zip(RELATIONS, lines[4:7], strict=True):
        assert re.fullmatch(rf"{relation}: best neurons (\d_\d+ \+\S+, ){{4}}\d_\d+ \S+ nats", line)
    assert lines[-1] == f"-> {folder}"
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names[0] == "clean" and "log_prob_gain" in names
    assert names[-3:] == ["random_heads", "heads, own type", "heads, others"] or {
        "random",
        "random_value",
        "random_query",
        "random_heads",
        "heads, own type",
        "heads, others",
    } <= {*names}
    clean = next(line for line in lines if line.startswith("│ clean"))
    table = {(r["condition"], r["relation"]): r for r in read_rows(folder / "comparison.csv")}
    assert f"{float(table['clean', '']['mrr']):.3f}" in clean
    gain = next(line for line in lines if line.startswith("│ log_prob_gain"))
    assert f"{float(table['log_prob_gain', '']['prob_drop']):.1%}" in gain
    own = [float(table[f"heads:{r}", r]["mrr"]) for r in RELATIONS]
    heads = next(line for line in lines if line.startswith("│ heads, own"))
    assert f"{sum(own) / 3:.3f}" in heads


def test_neurons_go_straight_into_ablate(
    relneuron: Any, model_folder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "neurons.json"
    words = ["identify", folder, "-o", output, "--method", "logprob_gain", "--quiet"]
    code, out, _ = relneuron(*words, "--top", 12)
    assert code == 0
    lines = out.splitlines()
    for relation, line in zip(RELATIONS, lines[:3], strict=True):
        assert re.fullmatch(
            rf"{relation}: 12 neurons, mean gain >= \S+ nats over 20 sentences", line
        )
    assert lines[3] == f"-> {output}"
    chosen = NeuronFile.read(output)
    best = Manifest(folder).data["stages"]["attribute"]["best"]
    for relation, neurons in chosen.sets.items():
        assert [[layer, k] for layer, _, k, _ in neurons[:5]] == [n[:2] for n in best[relation]]
    effects = tmp_path / "effects.csv"
    prompts = folder / "prompts.jsonl"
    code, out, err = relneuron(
        *("ablate", model_folder, output, prompts, "-o", effects),
        *("--random-seeds", 2, "--splits", "det,eva", "--quiet"),
    )
    assert code == 0, err
    rows = read_rows(effects)
    assert {row["condition"] for row in rows} == {"clean", *RELATIONS, "random.0", "random.1"}
    assert {row["split"] for row in rows} >= {"det", "eva"}
    # Neurons that raise an answer: without them it is less probable.
    mean = {
        condition: [
            float(r["logprob"])
            for r in rows
            if r["condition"] == condition and r["relation"] == "lives_in" and r["split"] == "det"
        ]
        for condition in ("clean", "lives_in")
    }
    assert sum(mean["lives_in"]) < sum(mean["clean"]) - 1


def test_known_sentences_only(relneuron: Any, folder: Path, tmp_path: Path) -> None:
    words = ["identify", folder, "--method", "logprob_gain", "--quiet", "-o"]
    code, out, _ = relneuron(*words, tmp_path / "neurons.json", "--kept-only")
    rows = read_rows(folder / "targets.csv")
    for relation, line in zip(RELATIONS, out.splitlines()[:3], strict=True):
        n = sum(row["kept"] == "1" and row["relation"] == relation for row in rows)
        assert n and code == 0 and line.endswith(f"over {n} sentences")


def test_identify_says_which_method_a_folder_is_for(
    relneuron: Any, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "neurons.json"
    result = relneuron("identify", folder, "-o", output)
    check_refused(result, "holds an attribution, no responses")
    assert "--method logprob_gain" in result[2]
    words = ["identify", tmp_path, "-o", output, "--method", "logprob_gain"]
    check_refused(relneuron(*words), "no finished attribution")
    output.write_text("mine")
    words[1] = folder
    check_refused(relneuron(*words), "neurons.json exists")
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--kinds", "ffn_layer,neurons"], "unknown --kinds 'neurons'"),
        (["--mode", "fast"], "unknown --mode"),
        (["--splits", "test"], "unknown --splits"),
        (["--splits", "eva2,det", "--backend", "cuda"], "unknown backend"),
        (["--keep", "none"], "unknown --keep"),
        (["--format", "xlsx"], "unknown --format"),
        (["--tolerance", "-1"], "--tolerance must be above 0, got -1.0"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--strict", "--splits", "eva"], "tokens"),
    ],
)
def test_bad_options_write_nothing(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path, words: Any, cause: str
) -> None:
    output = tmp_path / "out"
    check_refused(relneuron("attribute", model_folder, prompts, "-o", output, *words), cause)
    assert not output.exists()


def test_bad_paths_write_nothing(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    missing, file = tmp_path / "none.csv", tmp_path / "file"
    file.write_text("mine")
    output = tmp_path / "out"
    for words, cause in (
        ([model_folder, missing, "-o", output], "none.csv does not exist"),
        ([model_folder, prompts, "-o", file], "is a file"),
        (["no model", missing, "-o", output], "none.csv does not exist"),
        ([tmp_path, prompts, "-o", output], "is no model folder"),
    ):
        check_refused(relneuron("attribute", *words), cause)
    assert not output.exists() and file.read_text() == "mine"


def test_fact_files_and_parquet(
    relneuron: Any, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    """LRE facts are asked as they are; what is not compared is not said."""
    output = tmp_path / "out"
    code, out, _ = relneuron(
        *("attribute", model_folder, fact_folder, "-o", output, "--format", "parquet"),
        *("--kinds", "ffn_neuron,head", "--no-compare", "--quiet", "--mode", "exact"),
    )
    assert code == 0 and "│" not in out
    assert {*files_of(output)} == {
        *("attributions.parquet", "gains.safetensors", "manifest.json"),
        *("promoted.csv", "prompts.jsonl", "targets.csv"),
    }
    lines = (output / "prompts.jsonl").read_text().splitlines()
    assert {json.loads(line)["split"] for line in lines} == {"eva"}
    assert len(read_rows(output / "targets.csv")) == len(lines) == 72


def test_the_command_killed_and_run_again(
    model_folder: Path, prompts: Path, folder: Path, tmp_path: Path
) -> None:
    """SIGKILL while sentences are scored; the end is an undisturbed run's."""
    output = tmp_path / "out"
    words = ["attribute", model_folder, prompts, "-o", output, "--splits", "det", *QUICK]
    process = command(*words)
    end = time.monotonic() + 60
    while not (output / JOURNAL).exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "targets.csv").exists()
    assert call(*words) == 0
    assert files_of(output) == files_of(folder)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("{:.1%}", -0.0004, "0.0%"),
        ("{:.1%}", -0.0006, "-0.1%"),
        ("{:.2f}", -0.001, "0.00"),
        ("{:.2f}", -0.01, "-0.01"),
        ("{:.3f}", float("nan"), ""),
    ],
)
def test_zero_has_no_sign(form: str, value: float, text: str) -> None:
    assert _cell(form, value) == text
