"""The commands for corpora: every bad input ends in two lines and writes nothing.

Exit code 1 or 2, one line of cause and one of fix. test_corpus.py holds what they write.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.corpus_commands import (
    COUNT,
    check_refused,
    other_shape,
    sources,
)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Files that are no corpus."""
    (tmp_path / "in").mkdir()
    for name, data in {
        "empty.txt": b"",
        "blank.txt": b"\n\n\n",
        "short.txt": b"Rome\n",
        "latin.txt": "Zürich\n".encode("latin-1"),
        "text.doc": b"\xd0\xcf\x11\xe0",
        "broken.jsonl": b'{"text": "Rome"}\n{"text": \n',
        "other.jsonl": b'{"body": "Rome"}\n',
        "number.jsonl": b'{"text": 3}\n',
        "table.parquet": b"PAR1",
        "ids.pt": b"no archive",
        "odd.bin": b"\0\1\2",
    }.items():
        (tmp_path / "in" / name).write_bytes(data)
    np.save(tmp_path / "in" / "large.npy", np.full(100, 70_000))
    np.save(tmp_path / "in" / "negative.npy", np.full(100, -1))
    np.save(tmp_path / "in" / "float.npy", np.ones(100))
    (tmp_path / "in" / "folder").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        (["en={}/empty.txt"], "the corpus has no window of tokens"),
        (["en={}/blank.txt", "zh={}/empty.txt"], "the corpus has no window of tokens"),
        (["en={}/short.txt"], "the corpus has no window of tokens"),
        (["en={}/missing.txt"], "missing.txt does not exist"),
        (["{}/missing.txt"], "missing.txt has no group"),
        (["{}/short.txt"], "short.txt has no group"),
        (["en="], "en= names no path"),
        (["en={}/text.doc"], "text.doc has an unknown suffix"),
        (["en={}/folder"], "folder holds no file of a corpus"),
        (["en={}/short.txt", "zh={}/short.txt"], "short.txt is in the corpus twice"),
        (["en={}/latin.txt"], "latin.txt, line 1: not UTF-8"),
        (["en={}/broken.jsonl"], "broken.jsonl, line 2: not JSON"),
        (["en={}/other.jsonl"], "other.jsonl, line 1: no field 'text'"),
        (["en={}/number.jsonl"], "number.jsonl, line 1: the field 'text' is no string"),
        (["en={}/table.parquet"], "table.parquet"),
        (["en={}/ids.pt"], "ids.pt"),
        (["en={}/odd.bin"], "odd.bin"),
        (["en={}/large.npy"], "large.npy"),
        (["en={}/negative.npy"], "negative.npy"),
        (["en={}/float.npy"], "float.npy"),
        (["{}/other.jsonl", "--group-column", "body"], "other.jsonl, line 1: no field 'text'"),
        (["{}/short.txt", "--group-column", "language"], "short.txt has no fields"),
        (["en={}/short.txt", "--group-column", "g"], "names a group, and so does --group-column"),
        (["en={}/short.txt", "--groups", "en"], "--groups needs --group-column"),
        (["{}/other.jsonl", "--group-column", "g", "--groups", "a,a"], "--groups 'a,a'"),
        (["en={}/odd.bin", "--ids-dtype", "int8"], "unknown --ids-dtype 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_texts_that_are_no_corpus(
    relneuron: Any, model_folder: Path, bad: Path, tmp_path: Path, texts: list[str], cause: str
) -> None:
    words = [text.format(bad) for text in texts]
    out = tmp_path / "o"
    check_refused(relneuron, tmp_path, cause, "count", model_folder, *words, "-o", out, *COUNT)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--shard", "1"], "unknown --shard '1'"),
        (["--shard", "a/b"], "unknown --shard 'a/b'"),
        (["--shard", "0/3"], "--shard 0/3 does not exist"),
        (["--shard", "4/3"], "--shard 4/3 does not exist"),
        (["--sites", "attention"], "unknown --sites 'attention'"),
        (["--sites", ","], "--sites names nothing"),
        (["--packing", "padded"], "unknown --packing 'padded'"),
        (["--bos", "first"], "unknown --bos 'first'"),
        (["--boundaries", "mask"], "unknown --boundaries 'mask'"),
        (["--oom", "retry"], "unknown --oom 'retry'"),
        (["--threshold", "nan"], "--threshold nan is not finite"),
        (["--threshold", "inf"], "--threshold inf is not finite"),
        (["--window", "0"], "--window must be at least 1"),
        (["--window", "65"], "--window 65 is longer than the model's context of 64"),
        (["--window", "1", "--bos", "window"], "--window 1, --max-tokens all"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--max-tokens", "5"], "has no window of tokens (--window 24, --max-tokens 5)"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_count_cannot_have(
    relneuron: Any, model_folder: Path, corpus: Path, tmp_path: Path, words: Any, cause: str
) -> None:
    command = ["count", model_folder, f"en={corpus / 'en.txt'}", "-o", tmp_path / "o", *COUNT]
    check_refused(relneuron, tmp_path, cause, *command, *words)


def test_models_that_cannot_count(
    relneuron: Any, model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "model"
    shutil.copytree(model_folder, bare)
    for path in bare.glob("token*"):
        path.unlink()
    text, out = f"en={corpus / 'en.txt'}", tmp_path / "o"
    check_refused(relneuron, tmp_path, "tokenizer", "count", bare, text, "-o", out, *COUNT)
    np.save(tmp_path / "a.npy", np.ones(100, np.int64))
    ids = f"en={tmp_path / 'a.npy'}"
    words = ["count", bare, ids, "-o", out, *COUNT, "--exclude-bos"]
    check_refused(relneuron, tmp_path, "tokenizer", *words)
    words = ["count", tmp_path / "none", text, "-o", out]
    check_refused(relneuron, tmp_path, "is no model folder", *words)


def test_an_output_that_is_a_folder(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    out, neurons, pth = tmp_path / "o", study / "neurons.json", tmp_path / "n.pth"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert relneuron("export", neurons, "-o", pth)[0] == 0
    prompts = corpus / "prompts.txt"
    for words in (
        ["generate", model_folder, prompts, "--neurons", neurons, "--off", "en"],
        ["identify", study, "--method", "lape"],
        ["import", pth, "--model", model_folder, "--names", "en,zh,code"],
        ["export", neurons],
        ["report", study],
    ):
        for force in ([], ["--force"]):
            check_refused(relneuron, tmp_path, f"{out} is a folder", *words, "-o", out, *force)


def test_an_output_that_is_a_file(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "o", f"en={corpus / 'en.txt'}"
    out.write_text("mine")
    for words in (
        ["count", model_folder, text],
        ["nll", model_folder, study / "neurons.json", text],
        ["merge", study, study],
        ["import", f"en={tmp_path / 'a.pth'}", "--model", model_folder],
        ["export", study],
    ):
        for force in ([], ["--force"]):
            check_refused(relneuron, tmp_path, f"{out} is a file", *words, "-o", out, *force)


def test_a_count_of_other_inputs_is_kept(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path
) -> None:
    words = ["count", model_folder, *sources(corpus), "-o", study, *COUNT]
    check_refused(relneuron, study, "moments: True -> False", *words)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--groups", "en,de"], "'de'"),
        (["--groups", "en"], "LAPE needs at least two groups"),
        (["--site", "up"], "up"),
        (["--site", "attention"], "unknown --site 'attention'"),
        (["--top-rate", "2"], "--top-rate"),
        (["--filter-rate", "-1"], "--filter-rate"),
        (["--bar-ratio", "nan"], "--bar-ratio"),
        (["--precision", "float16"], "unknown --precision 'float16'"),
        (["--top", "0"], "--top must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_identify_cannot_have(
    relneuron: Any, study: Path, tmp_path: Path, words: Any, cause: str
) -> None:
    command = ["identify", study, "-o", tmp_path / "n.json", "--method", "lape", *words]
    check_refused(relneuron, tmp_path, cause, *command)


def test_nothing_is_identified_without_counts(relneuron: Any, study: Path, tmp_path: Path) -> None:
    for method in ("lape", "probability", "mean", "random"):
        words = ["identify", tmp_path, "-o", tmp_path / "n.json", "--method", method]
        check_refused(relneuron, tmp_path, "counts.safetensors", *words)
    words = ["identify", study, "-o", study / "neurons.json"]
    check_refused(relneuron, study, "exists", *words, "--method", "lape")
    fix = check_refused(relneuron, study, f"{study} holds counts, no responses", *words)
    assert fix == "fix:   add --method lape"


def test_neurons_that_nll_cannot_use(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    text, out = f"en={corpus / 'en.txt'}", tmp_path / "o"
    neurons = study / "neurons.json"
    (tmp_path / "broken.json").write_text("[")
    other = other_shape(study, tmp_path / "other.json")
    for path, texts, asked, cause in (
        (tmp_path / "none.json", [text], [], "none.json does not exist"),
        (tmp_path / "broken.json", [text], [], "broken.json"),
        (other, [text], [], "'width': 64"),
        (neurons, [f"en={corpus / 'none.txt'}"], [], "none.txt does not exist"),
        (neurons, [str(corpus / "en.txt")], [], "en.txt has no group"),
        (neurons, [text], ["--window", "65"], "longer than the model's context"),
        (neurons, [text], ["--packing", "x"], "unknown --packing 'x'"),
    ):
        words = ["nll", model_folder, path, *texts, "-o", out, "--quiet", *asked]
        check_refused(relneuron, tmp_path, cause, *words)
    (tmp_path / "short.txt").write_text("Rome\n")
    words = ["nll", model_folder, neurons, f"en={tmp_path / 'short.txt'}", "-o", out, *COUNT]
    check_refused(relneuron, tmp_path, "no window of tokens", *words)


def test_sets_that_generate_cannot_use(
    relneuron: Any, model_folder: Path, corpus: Path, study: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    words = ["count", model_folder, *sources(corpus), "-o", plain, *COUNT]
    assert relneuron(*words)[0] == 0
    (tmp_path / "empty.txt").write_text("\n")
    other = other_shape(study, tmp_path / "other.json")
    prompts, neurons = corpus / "prompts.txt", study / "neurons.json"
    for path, sets, asked, cause in (
        (prompts, neurons, ["--off", "de"], "the neurons have no set 'de'"),
        (prompts, neurons, ["--set", "de"], "the neurons have no set 'de'"),
        (prompts, neurons, ["--set", "zh", "--counts", plain], "holds no sums of activations"),
        (prompts, neurons, ["--set", "zh", "--counts", tmp_path], "does not exist"),
        (prompts, other, ["--off", "en"], "'width': 64"),
        (prompts, tmp_path / "none.json", [], "none.json does not exist"),
        (tmp_path / "none.txt", neurons, [], "none.txt does not exist"),
        (tmp_path / "empty.txt", neurons, [], "empty.txt holds no prompt"),
        (neurons, neurons, [], "neither .txt nor .jsonl"),
        (prompts, neurons, ["--template", "Q:"], "does not have {prompt} once"),
        (prompts, neurons, ["--repetition-penalty", "0"], "must be above 0"),
        (prompts, neurons, ["--max-new-tokens", "99"], "longer than the model's context"),
    ):
        words = ["generate", model_folder, path, "--neurons", sets, "-o", tmp_path / "o.jsonl"]
        check_refused(relneuron, tmp_path, cause, *words, "--quiet", *asked)


def test_files_that_cannot_be_imported_or_exported(
    relneuron: Any, model_folder: Path, study: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.pth").write_bytes(b"no archive")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "counts.safetensors").write_text("mine")
    assert relneuron("export", study, "-o", tmp_path / "counts")[0] == 0
    files = sorted((tmp_path / "counts").glob("[!.]*"))
    counts = [f"{g}={p}" for g, p in zip("ab", files[:2], strict=True)]
    model, names = ["--model", model_folder], ["--names", "en,zh"]
    for words, cause in (
        (["a.pth", *model], "does not name its groups"),
        (["a.pth", *model, *names], "a.pth"),
        (["none.pth", *model, *names], "none.pth does not exist"),
        (["en=none.pth", *model], "none.pth does not exist"),
        (["=none.pth", *model], "has no group"),
        (["a.pth", "en=a.pth", *model], "unknown files"),
        ([*counts[:1], f"a={files[1]}", *model], "the group a is there twice"),
        ([tmp_path / "mine", *model], "holds no file activation.GROUP.train.MODEL"),
        (["a.pth", "--model", tmp_path, *names], "is no model folder"),
        ([*counts, *model], "counts.safetensors exists"),
    ):
        paths = [
            str(tmp_path / w) if str(w).endswith(".pth") and "=" not in str(w) else w for w in words
        ]
        out = tmp_path / ("mine" if words[0] in counts else "o")
        check_refused(relneuron, tmp_path, cause, "import", *paths, "-o", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    check_refused(relneuron, tmp_path, "does not exist", "export", tmp_path / "n", "-o", out)
    check_refused(relneuron, tmp_path, "counts.safetensors", "export", empty, "-o", out)
    check_refused(relneuron, tmp_path, "does not exist", "report", empty, "-o", out)


def test_counts_that_cannot_be_merged(relneuron: Any, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    check_refused(relneuron, tmp_path, "nothing to merge", "merge", study, "-o", out)
    words = ["merge", study, tmp_path / "none", "-o", out]
    check_refused(relneuron, tmp_path, "holds no finished count", *words)
    check_refused(relneuron, tmp_path, "count the same windows", "merge", study, study, "-o", out)
