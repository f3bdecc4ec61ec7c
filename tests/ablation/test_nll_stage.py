"""The `nll` stage: its files, killed runs, what it refuses; and texts that stand in files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.ablation.nll import nll
from relneuron.ablation.options import NllOptions
from relneuron.ablation.windows import Scorer
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.sources import parse_sources
from tests.conftest import tiny_model
from tests.kit.files import read_rows
from tests.kit.nll_runs import (
    EMPTY,
    SETS,
    SHAPE,
    drawn,
    make_study,
    named_tokenizer,
    plain,
    run,
    text,
    without,
)

pytestmark = pytest.mark.filterwarnings("ignore:empty. its set has no neuron")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture
def tokenizer() -> Any:
    return named_tokenizer()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_study(tmp_path, monkeypatch)


# --- the stage -------------------------------------------------------------------------------


def test_the_manifest_knows_the_stage(model: Any, tokenizer: Any, study: Path) -> None:
    run(model, tokenizer, study, text(drawn(6)))
    manifest = Manifest(study / "o")
    entry = manifest.data["stages"]["nll"]
    assert entry["files"] == ["nll.csv", "nll_windows.csv"]
    assert manifest.is_done("nll", entry["inputs"])
    assert entry["masks"] == 5 and entry["windows"] == {"en": 2, "zh": 2, "de": 2}
    assert manifest.data["fallbacks"] == [EMPTY]
    assert {path.name for path in (study / "o").iterdir()} == {
        *("manifest.json", "nll.csv", "nll_windows.csv", ".lock"),
    }


def test_a_counted_folder_keeps_the_model_that_was_counted(
    model: Any, tokenizer: Any, study: Path
) -> None:
    folder = study / "o"
    folder.mkdir()
    (folder / "counts.safetensors").write_bytes(b"counts")
    counted = {"id": "counted", **SHAPE, "device": "cuda", "backend": "triton"}
    manifest = Manifest(folder)
    manifest.describe(model=counted, versions={"torch": "0"})
    manifest.finish("count", {}, [folder / "counts.safetensors"], reads=[])
    run(model, tokenizer, study, text(drawn(6)))
    found = Manifest(folder).data
    assert found["model"] == counted and found["versions"] == {"torch": "0"}
    assert [*found["stages"]] == ["count", "nll"]
    assert found["stages"]["nll"]["inputs"]["model"]["device"] == "cpu"
    run(model, tokenizer, study, text(drawn(6)), output="bare")
    assert Manifest(study / "bare").data["model"]["id"] == "m"


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("nll.csv", "nll_windows.csv")]


def test_a_killed_run_goes_on_with_the_same_bits(
    model: Any, tokenizer: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, asked = text(drawn(12)), {"batch_tokens": 100}
    run(model, tokenizer, study, windows, output="whole", **asked)
    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    true, calls = Scorer.ask, 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 5):
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Scorer, "ask", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, study, windows, **asked)
        assert not (study / "o" / "nll.csv").exists()
    run(model, tokenizer, study, windows, **asked)
    n_batches, calls = calls - 2, 100
    assert bytes_of(study / "o") == bytes_of(study / "whole")
    run(model, tokenizer, study, windows, output="again", **asked)
    assert n_batches == calls - 100 > 5
    assert bytes_of(study / "again") == bytes_of(study / "whole")


def test_a_run_killed_behind_its_files_goes_on_without_force(
    model: Any, tokenizer: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = text(drawn(6))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish", interrupt)
        run(model, tokenizer, study, windows)
    before = bytes_of(study / "o")
    run(model, tokenizer, study, windows)
    assert bytes_of(study / "o") == before
    with pytest.raises(RelneuronError, match=r"nll\.csv exists"):
        run(model, tokenizer, study, windows)
    run(model, tokenizer, study, windows, force=True)
    assert bytes_of(study / "o") == before


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_halves_the_batches_and_changes_no_result(
    model: Any, tokenizer: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = text(drawn(12))
    whole = run(model, tokenizer, study, windows, output="whole", batch_tokens=400)
    true = Scorer._read

    def small(self: Any, rows: Any, *args: Any) -> Any:
        if sum(len(self.ids[row]) for row in rows) > 90:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, rows, *args)

    monkeypatch.setattr(Scorer, "_read", small)
    for ours, theirs in zip(
        run(model, tokenizer, study, windows, batch_tokens=400), whole, strict=True
    ):
        assert ours[:4] == theirs[:4]
        assert np.allclose(ours[4:], theirs[4:], atol=1e-6)
    empty, told = Manifest(study / "o").data["fallbacks"]
    assert empty == EMPTY
    assert told.startswith("out of memory: batches of 400 tokens cut to ")
    with pytest.raises(RelneuronError, match="out of memory with .* prompts"):
        run(model, tokenizer, study, windows, output="e", batch_tokens=400, oom="error")
    assert not (study / "e" / "nll.csv").exists()
    long = [("en", drawn(1, 100)[0])]
    with pytest.raises(RelneuronError, match="out of memory with one window of 100") as caught:
        run(model, tokenizer, study, long, output="l", groups=("en",))
    assert "--window" in caught.value.fix


def test_a_loss_that_is_not_finite_is_told(tokenizer: Any, study: Path) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    model.model.embed_tokens.weight.data[89] = math.inf
    windows = [("en", [5, 6, 7, 8, 9, 10, 11, 12, 89, 4]), ("en", [4, 5])]
    with pytest.warns(UserWarning, match="5 windows have a NLL that is not finite"):
        cells = run(model, tokenizer, study, windows, groups=("en",), output="p")
    assert all(math.isnan(cell.nll) and math.isnan(cell.perplexity) for cell in cells)


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"windows": 0}, "--windows must be at least 1, got 0"),
        ({"random_sets": -1}, "--random-sets must be at least 0, got -1"),
        ({"batch_tokens": 0}, "--batch-tokens must be"),
        ({"window": 65}, "longer than the model's context of 64"),
        ({"mode": "tight"}, "unknown --packing"),
        ({"oom": "never"}, "unknown --oom"),
        ({"backend": "metal"}, "unknown backend"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    model: Any, tokenizer: Any, study: Path, asked: dict[str, Any], cause: str
) -> None:
    with pytest.raises(RelneuronError, match=cause):
        run(model, tokenizer, study, text(drawn(3)), **asked)
    assert not (study / "o").exists()


def test_texts_that_cannot_be_read_are_refused(model: Any, tokenizer: Any, study: Path) -> None:
    with pytest.raises(RelneuronError, match="no window of tokens"):
        run(model, tokenizer, study, [("en", [4])])
    with pytest.raises(RelneuronError, match="the token 96, the model has 96"):
        run(model, tokenizer, study, [("en", [4, 96])])
    NeuronFile(SHAPE | {"width": 49}, "lape", SETS, {}).write(study / "neurons.json")
    with pytest.raises(RelneuronError, match="of a model of shape"):
        run(model, tokenizer, study, text(drawn(3)))
    NeuronFile(SHAPE, "lape", {"clean": SETS["en"]}, {}).write(study / "neurons.json")
    with pytest.raises(RelneuronError, match="two masks are named clean"):
        run(model, tokenizer, study, text(drawn(3)))
    assert not (study / "o").exists()


@pytest.mark.filterwarnings("ignore:en. 2 neurons stood there twice")
def test_neurons_that_stand_twice_are_told(model: Any, tokenizer: Any, study: Path) -> None:
    doubled = {"en": [*SETS["en"], *SETS["en"][:2]]}
    NeuronFile(SHAPE, "lape", doubled, {}).write(study / "neurons.json")
    run(model, tokenizer, study, text(drawn(6)))
    assert Manifest(study / "o").data["fallbacks"] == ["en: 2 neurons stood there twice"]


def test_the_model_is_as_it_was(model: Any, tokenizer: Any, study: Path) -> None:
    before = [set(module.__dict__) for module in model.modules()]
    run(model, tokenizer, study, text(drawn(6)))
    assert [set(module.__dict__) for module in model.modules()] == before


# --- from files ------------------------------------------------------------------------------

LINES = {
    "fruit": [f"Person{i} eats {('apple', 'plum', 'pear')[i % 3]}" for i in range(40)],
    "places": [f"Everybody knows that Person{i} lives in Rome" for i in range(25)],
}


@pytest.fixture
def trained(model_folder: Path, tmp_path: Path) -> tuple[Any, Any, list[str], dict[str, Any]]:
    """A trained model and its tokenizer, files of text, and the tokens of each of their lines."""
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    sets = {name: [n for n in SETS[name] if n[0] < 2] for name in ("en", "other")}
    shape = SHAPE | {"layers": 2}
    NeuronFile({"id": "m", **shape}, "lape", sets, {}).write(tmp_path / "neurons.json")
    for name, lines in LINES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    texts = [f"{name}={tmp_path / name}.txt" for name in LINES]
    tokens = {name: tokenizer(lines)["input_ids"] for name, lines in LINES.items()}
    assert tokens["fruit"][0][0] == tokenizer.bos_token_id
    return model, tokenizer, texts, tokens


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_files_of_text_are_read_in_windows(trained: Any, tmp_path: Path, packing: str) -> None:
    model, tokenizer, texts, tokens = trained
    args = ("m", model, tokenizer, tmp_path / "neurons.json", parse_sources(texts), tmp_path / "o")
    nll(*args, NllOptions(windows=5, window=16, mode=packing, batch_tokens=100), quiet=True)
    expected: dict[str, list[list[int]]] = {}
    for name, lines in tokens.items():
        flat = [token for line in lines for token in line]
        pieces = [flat[i : i + 16] for i in range(0, len(flat), 16)]
        if packing == "documents":
            pieces = [line[i : i + 16] for line in lines for i in range(0, len(line), 16)]
        expected[name] = [piece for piece in pieces if len(piece) > 1][:5]
    rows = iter(read_rows(tmp_path / "o" / "nll_windows.csv"))
    sets = json.loads((tmp_path / "neurons.json").read_text())["sets"]
    for mask in ("clean", "en", "other"):
        edited = without(model, sets.get(mask, []))
        for name, windows in expected.items():
            for number, ids in enumerate(windows):
                row = next(rows)
                assert (row["mask"], row["group"], row["window"]) == (mask, name, str(number))
                assert int(row["n_tokens"]) == len(ids) - 1
                assert abs(float(row["nll"]) - plain(edited, ids)) <= 1e-5
    assert next(rows, None) is None
    entry = Manifest(tmp_path / "o").data["stages"]["nll"]
    assert entry["inputs"]["packing"]["max_tokens"] == 80
    assert Manifest(tmp_path / "o").is_done("nll", entry["inputs"])


def test_token_ids_need_no_tokenizer(trained: Any, tmp_path: Path) -> None:
    model, _, _, tokens = trained
    flat = np.array([token for line in tokens["fruit"] for token in line], np.int32)
    np.save(tmp_path / "fruit.npy", flat)
    sources = parse_sources([f"fruit={tmp_path / 'fruit.npy'}"])
    args = ("m", model, None, tmp_path / "neurons.json", sources, tmp_path / "o")
    cells = nll(*args, NllOptions(windows=3, window=20), quiet=True)
    wanted = np.mean([plain(model, flat[i : i + 20].tolist()) for i in (0, 20, 40)])
    assert abs(cells[0].nll - wanted) <= 1e-5


def test_perplexity_of_joined_text_is_that_of_the_field(trained: Any, tmp_path: Path) -> None:
    """As on Wikitext-2: the whole text tokenised, full windows, exp of the mean of their NLL."""
    model, tokenizer, texts, _ = trained
    args = ("m", model, tokenizer, tmp_path / "neurons.json", parse_sources(texts), tmp_path / "o")
    cells = nll(*args, NllOptions(window=16, join="\n\n"), quiet=True)
    sets = json.loads((tmp_path / "neurons.json").read_text())["sets"]
    for cell in cells:
        ids = tokenizer("\n\n".join(LINES[cell.group]))["input_ids"]
        n = len(ids) // 16
        edited = without(model, sets.get(cell.mask, []))
        found = [plain(edited, ids[16 * i : 16 * i + 16]) for i in range(n)]
        assert cell.n_windows == n and cell.n_tokens == 15 * n
        assert cell.perplexity == pytest.approx(math.exp(np.mean(found)), rel=1e-5)
    assert Manifest(tmp_path / "o").data["stages"]["nll"]["inputs"]["packing"]["join"] == "\n\n"
    np.save(tmp_path / "ids.npy", np.zeros(40, np.int32))
    ids_only = parse_sources([f"fruit={tmp_path / 'ids.npy'}"])
    with pytest.raises(RelneuronError, match="--join is of texts, and .* holds token ids"):
        nll(*args[:4], ids_only, tmp_path / "p", NllOptions(window=16, join=" "), quiet=True)


def test_a_changed_text_is_another_study(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal of a killed run does not lend its numbers to another text."""
    model, tokenizer, texts, _ = trained
    options = NllOptions(windows=4, window=16, batch_tokens=40)
    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)

    def stage(output: str) -> None:
        sources = parse_sources(texts)
        path = tmp_path / "neurons.json"
        nll("m", model, tokenizer, path, sources, tmp_path / output, options, quiet=True)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish", interrupt)
        stage("o")
    before = bytes_of(tmp_path / "o")
    (tmp_path / "fruit.txt").write_text("\n".join(reversed(LINES["fruit"])) + "\n")
    with pytest.warns(match="nll.journal: it is of other inputs"):
        stage("o")
    stage("whole")
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole")
    assert bytes_of(tmp_path / "o") != before
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("o", "whole")]
    assert manifests[0] == manifests[1]
