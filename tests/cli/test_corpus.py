"""The commands for corpora end to end: what they write, and what they say.

test_corpus_input.py holds what they refuse.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relneuron.artifact.counts import Counts
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from tests.kit.corpus_commands import (
    COUNT,
    GROUPS,
    TEXTS,
    WINDOW,
    check_refused,
    sources,
)
from tests.kit.counted import plain_counts
from tests.kit.pairs import save_moved


def test_the_counts_are_plain_hooks(model_folder: Path, study: Path) -> None:
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    windows = []
    for group, lines in enumerate(TEXTS.values()):
        stream = [token for line in lines for token in tokenizer(line)["input_ids"]]
        assert stream[0] == tokenizer.bos_token_id
        for first in range(0, len(stream) - WINDOW + 1, WINDOW):
            windows.append((group, stream[first : first + WINDOW]))
    tokens, active = plain_counts(model, windows, len(GROUPS))
    counts = Counts.read(study / "counts.safetensors")
    assert counts.groups == list(GROUPS) and counts.tokens.tolist() == tokens.tolist()
    differ = abs(counts.arrays["count.act"] - active)
    assert differ.max() <= 1 and (differ > 0).mean() < 0.01


def test_the_study_has_every_artifact(study: Path) -> None:
    names = {"counts.safetensors", "neurons.json", "scores.safetensors", "nll.csv"}
    names |= {"nll_windows.csv", "report.html", "manifest.json", ".lock"}
    assert names <= {path.name for path in study.iterdir()}
    stages = json.loads((study / "manifest.json").read_text())["stages"]
    assert list(stages) == ["count", "identify", "nll", "report"]
    chosen = NeuronFile.read(study / "neurons.json").sets
    assert list(chosen) == list(GROUPS) and all(chosen.values())
    with (study / "nll.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["mask"], r["group"]) for r in rows] == [
        (mask, group) for mask in ("clean", *GROUPS) for group in GROUPS
    ]
    assert all(float(row["nll"]) > 0 and row["n_windows"] == "5" for row in rows)
    assert len({row["nll"] for row in rows}) > len(GROUPS)


def test_counting_says_what_it_found_and_how_fast(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    words = ["count", model_folder, *sources(corpus), *COUNT, "--moments", "-o"]
    code, out, err = relneuron(*words, tmp_path / "o")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    counts = Counts.read(tmp_path / "o" / "counts.safetensors")
    for name, tokens, line in zip(GROUPS, counts.tokens.tolist(), lines, strict=False):
        assert line == f"{name}: {tokens:,} tokens"
    assert "tokens/s" in lines[3] and "waiting for tokens" in lines[3]
    assert lines[4] == f"-> {tmp_path / 'o' / 'counts.safetensors'}"
    whole = (study / "counts.safetensors").read_bytes()
    assert (tmp_path / "o" / "counts.safetensors").read_bytes() == whole
    code, out, err = relneuron(*words, tmp_path / "o")
    assert (code, out, err) == (0, f"{tmp_path / 'o'} holds this count already\n", "")


def test_a_column_names_the_groups(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    path = corpus / "all.jsonl"
    words = ["count", model_folder, path, *COUNT, "--text-column", "body"]
    words += ["--group-column", "language", "--moments"]
    assert relneuron(*words, "-o", tmp_path / "all")[0] == 0
    whole = Counts.read(study / "counts.safetensors")
    found = Counts.read(tmp_path / "all" / "counts.safetensors")
    assert sorted(found.groups) == sorted(GROUPS)  # as their first windows come
    found = found.take(GROUPS)
    assert found.tokens.tolist() == whole.tokens.tolist()
    assert abs(found.arrays["count.act"] - whole.arrays["count.act"]).max() <= 1
    assert relneuron(*words, "--groups", "code,en", "-o", tmp_path / "two")[0] == 0
    two = Counts.read(tmp_path / "two" / "counts.safetensors")
    assert two.groups == ["code", "en"]
    assert two.tokens.tolist() == whole.take(two.groups).tokens.tolist()


def test_shards_are_merged(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    asked = ["count", model_folder, *sources(corpus), *COUNT, "--batch-tokens", 48]
    for shard in ("1/2", "2/2"):
        assert relneuron(*asked, "--shard", shard, "-o", tmp_path / shard[0])[0] == 0
    code, out, err = relneuron("merge", tmp_path / "1", tmp_path / "2", "-o", tmp_path / "o")
    assert (code, err) == (0, "")
    total = Counts.read(tmp_path / "o" / "counts.safetensors")
    told = [f"{n}: {t:,} tokens" for n, t in zip(GROUPS, total.tokens.tolist(), strict=True)]
    assert out.splitlines() == [*told, f"-> {tmp_path / 'o'}"]
    assert total.tokens.tolist() == Counts.read(study / "counts.safetensors").tokens.tolist()
    neurons = tmp_path / "o" / "neurons.json"
    words = ["identify", tmp_path / "o", "-o", neurons, "--method", "lape", "--top-rate", 0.2]
    code, out, err = relneuron(*words)
    assert code == 0 and out.splitlines()[-1] == f"-> {neurons}"


def test_token_ids_need_no_tokenizer(relneuron: Any, model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    shutil.copytree(model_folder, bare)
    for path in bare.glob("token*"):
        path.unlink()
    ids = np.random.default_rng(0).integers(0, 90, 400)
    np.save(tmp_path / "a.npy", ids.astype(np.int64))
    torch.save(torch.from_numpy(ids[:200]), tmp_path / "b.pt")
    words = ["count", bare, f"a={tmp_path / 'a.npy'}", f"b={tmp_path / 'b.pt'}", *COUNT]
    code, _, err = relneuron(*words, "-o", tmp_path / "o")
    assert code == 0, err
    windows = [(0, ids[i : i + WINDOW].tolist()) for i in range(0, 400 - WINDOW + 1, WINDOW)]
    windows += [(1, ids[i : i + WINDOW].tolist()) for i in range(0, 200 - WINDOW + 1, WINDOW)]
    tokens, active = plain_counts(load_model(str(model_folder)), windows, 2)
    found = Counts.read(tmp_path / "o" / "counts.safetensors")
    assert found.tokens.tolist() == tokens.tolist()
    assert abs(found.arrays["count.act"] - active).max() <= 1


def test_text_is_generated_with_sets_off_and_set(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    words = ["generate", model_folder, corpus / "prompts.txt", "-o", tmp_path / "o.jsonl"]
    words += ["--neurons", study / "neurons.json", "--max-new-tokens", 4, "--quiet"]
    code, out, err = relneuron(*words, "--off", "clean,en", "--set", "zh")
    assert (code, err) == (0, "")
    assert out == f"4 outputs -> {tmp_path / 'o.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(row["mask"], row["set"]) for row in rows] == [
        ("clean", "zh"),
        ("clean", "zh"),
        ("en", "zh"),
        ("en", "zh"),
    ]


def test_text_is_generated_with_another_models_values(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    donor = save_moved(model_folder, tmp_path / "donor")
    words = ["generate", model_folder, corpus / "prompts.txt", "-o", tmp_path / "o.jsonl"]
    words += ["--neurons", study / "neurons.json", "--max-new-tokens", 4, "--quiet"]
    words += ["--off", "clean,en,donor", "--mode", "patch", "--random-seeds", 1, "--from"]
    code, out, err = relneuron(*words, donor)
    assert (code, err) == (0, "")
    assert out == f"8 outputs -> {tmp_path / 'o.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["mask"] for row in rows[::2]] == ["clean", "en", "random.0", "donor"]
    assert rows[0]["output"] != rows[-2]["output"]
    check_refused(relneuron, tmp_path, "is no model folder", *words, tmp_path, "--force")


def test_token_ids_under_the_authors_names_are_counted(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    data = tmp_path / "data"
    data.mkdir()
    for name in GROUPS:
        ids = tokenizer("\n".join(TEXTS[name]), add_special_tokens=False)["input_ids"]
        torch.save(torch.tensor(ids), data / f"id.{name}.train.llama")
        np.save(tmp_path / f"{name}.npy", np.array(ids))
    options = ["--window", 24, "--quiet"]
    files = [data / f"id.{name}.train.llama" for name in GROUPS]
    assert relneuron("count", model_folder, *files, "-o", tmp_path / "own", *options)[0] == 0
    parts = [f"{name}={file}" for name, file in zip(GROUPS, files, strict=True)]
    assert relneuron("count", model_folder, *parts, "-o", tmp_path / "named", *options)[0] == 0
    arrays = [f"{name}={tmp_path / name}.npy" for name in GROUPS]
    assert relneuron("count", model_folder, *arrays, "-o", tmp_path / "npy", *options)[0] == 0
    counts = [(tmp_path / d / "counts.safetensors").read_bytes() for d in ("own", "named", "npy")]
    assert counts[0] == counts[1] == counts[2]
    words = [model_folder, study / "neurons.json", *files, "-o", tmp_path / "n", "--window", 24]
    assert relneuron("nll", *words, "--quiet")[0] == 0


def test_files_of_the_authors_and_back(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    pth, back = tmp_path / "n.neuron.pth", tmp_path / "back.json"
    assert relneuron("export", study / "neurons.json", "-o", pth)[0] == 0
    names = ["--names", ",".join(GROUPS), "--model", model_folder]
    assert relneuron("import", pth, *names, "-o", back)[0] == 0
    before, after = (NeuronFile.read(path).sets for path in (study / "neurons.json", back))
    assert {g: sorted(n[:3] for n in s) for g, s in before.items()} == {
        g: sorted(n[:3] for n in s) for g, s in after.items()
    }
    code, out, _ = relneuron("export", study, "-o", tmp_path / "counts")
    files = [line.removeprefix("-> ") for line in out.splitlines()]
    assert code == 0 and {Path(file) for file in files} == {*(tmp_path / "counts").glob("[!.]*")}
    assert {Path(file).name for file in files} == {
        f"activation.{name}.train.{model_folder.name}" for name in GROUPS
    }
    words = ["import", *files, "--model", model_folder, "-o", tmp_path / "imported"]
    assert relneuron(*words)[0] == 0
    parts = [f"{name}={path}" for name, path in zip(GROUPS, files, strict=True)]
    for given in (parts, [tmp_path / "counts"]):
        same = ["import", *given, "--model", model_folder, "-o", tmp_path / "same"]
        assert relneuron(*same, "--force")[0] == 0
        assert {
            name: Counts.read(tmp_path / "same" / "counts.safetensors").take([name]).to_bytes()
            for name in GROUPS
        } == {
            name: Counts.read(tmp_path / "imported" / "counts.safetensors").take([name]).to_bytes()
            for name in GROUPS
        }
    found = Counts.read(tmp_path / "imported" / "counts.safetensors")
    whole = Counts.read(study / "counts.safetensors")
    assert found.groups == whole.groups and found.tokens.tolist() == whole.tokens.tolist()
    assert np.array_equal(found.arrays["count.act"], whole.arrays["count.act"])
    assert relneuron(*words)[0] == 0  # it is done already
    again = tmp_path / "again.json"
    words = ["identify", tmp_path / "imported", "-o", again, "--method", "lape"]
    words += ["--top-rate", 0.2, "--filter-rate", 0.6, "--bar-ratio", 0.6]
    assert relneuron(*words)[0] == 0
    assert NeuronFile.read(again).sets == before
