"""NLL under masks: what plain forwards of edited weights give, one window at a time.

The corpus is a list of windows here, but for the tests that read files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import relneuron.ablation.nll
import relneuron.ablation.windows
from relneuron.ablation.nll import nll, plan_masks
from relneuron.ablation.options import NllOptions
from relneuron.ablation.windows import Scorer, read_texts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.sources import Source, parse_sources
from tests.conftest import FAMILIES, tiny_model
from tests.kit.files import read_rows

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 48, 32, 96
SHAPE = {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN}
SETS: dict[str, list[tuple[int, str, int, float]]] = {
    "en": [(i % LAYERS, "gate", 7 * i % WIDTH, 0.5) for i in range(20)],
    "zh": [(i % LAYERS, "gate", 5 * i % WIDTH, 0.5) for i in range(31)],
    "other": [(0, "up", 3, 0.1), (1, "down", 4, 0.1), (2, "down", 31, 0.1), (2, "gate", 1, 0.1)],
    "empty": [],
}
Array = np.ndarray[Any, Any]
# One of the sets is empty, which is said in each run.
EMPTY = "empty: its set has no neuron, so that nothing is off for it"
pytestmark = pytest.mark.filterwarnings("ignore:empty. its set has no neuron")


class Window(NamedTuple):
    group: int
    ids: Array
    first: Array


class Windows:
    """A corpus that is a list of windows: what the feed gives, and how it is entered."""

    def __init__(self, groups: Sequence[str], windows: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.groups = list(groups)
        self.windows = [
            Window(self.groups.index(g), np.array(x, np.int32), np.zeros(len(x), bool))
            for g, x in windows
        ]
        self.notes: dict[str, Any] = {}

    def take(self, n: int) -> list[Window]:
        taken, self.windows = self.windows[:n], self.windows[n:]
        return taken

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def drawn(n: int, length: int | None = None, seed: int = 0) -> list[list[int]]:
    """n windows of random ids, all of `length` or each of its own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 24, n) if length is None else [length] * n
    return [rng.integers(3, 90, size).tolist() for size in lengths]


def text(windows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """Windows of three groups in turn."""
    return [(("en", "zh", "de")[i % 3], ids) for i, ids in enumerate(windows)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture
def tokenizer() -> Any:
    """Nothing of it is needed but its name for a manifest."""
    return SimpleNamespace(bos_token_id=1, eos_token_id=2, get_vocab=lambda: {"a": 1})


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        "relneuron.texts.sources.describe_source", lambda source: {"group": source.group}
    )
    monkeypatch.setattr("relneuron.texts.options.default_bos", lambda tokenizer: ("none", None))
    NeuronFile({"id": "m", **SHAPE}, "lape", SETS, {}).write(tmp_path / "neurons.json")
    return tmp_path


def plain(model: Any, ids: Sequence[int]) -> float:
    """Mean NLL of a window by one whole forward, log-softmax in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().double()
    total = 0.0
    for place in range(1, len(ids)):
        row = logits[place - 1]
        total -= float(row[ids[place]] - torch.logsumexp(row, 0))
    return total / (len(ids) - 1)


def without(model: Any, neurons: Sequence[Sequence[Any]]) -> Any:
    """A copy with rows of gate, up and down weights at zero."""
    edited = copy.deepcopy(model)
    for layer, site, index, *_ in neurons:
        getattr(edited.model.layers[layer].mlp, f"{site}_proj").weight.data[index] = 0
    return edited


def run(
    model: Any,
    tokenizer: Any,
    folder: Path,
    texts: Sequence[tuple[str, Sequence[int]]],
    *,
    output: str = "o",
    groups: Sequence[str] = ("en", "zh", "de"),
    **asked: Any,
) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relneuron.ablation.nll, "Feed", lambda *_, **__: Windows(groups, texts))
        sources: Any = [Source(group=name) for name in groups]
        path = folder / "neurons.json"
        more = {name: asked.pop(name) for name in ("force", "backend") if name in asked}
        options = NllOptions(**{"window": 32, **asked})
        return nll(
            "m", model, tokenizer, path, sources, folder / output, options, quiet=True, **more
        )


# --- one window ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 12])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_windows_are_read_as_the_model_reads_them(
    family: str, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the logits of one window are made in several slices, or are scaled or capped."""
    changes = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 2.0}}
    model = tiny_model(family, initializer_range=0.3, **changes.get(family, {}))
    windows = [np.array(ids, np.int32) for ids in drawn(7, length)]
    wanted = [plain(model, ids.tolist()) for ids in windows]
    for limit in (2**26, 5 * VOCABULARY, 1):
        monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", limit)
        scorer = Scorer(model, windows)
        assert scorer.notices == []
        rows = [3, 0, 1, 6, 2, 4, 5]
        found = scorer.ask(rows, lambda step: None)
        assert np.allclose(found, [wanted[row] for row in rows], atol=1e-5)
    assert np.ptp(wanted) > 0.1


def test_only_slices_of_the_logits_are_held(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", 10 * VOCABULARY)
    scorer = Scorer(model, [np.array(ids, np.int32) for ids in drawn(6, 12)])
    shapes: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    scorer.ask(list(range(6)), lambda step: None)
    handle.remove()
    # 11 of the 12 tokens of each window: the last one predicts nothing that is scored.
    assert [tuple(s) for s in shapes] == [(10, VOCABULARY)] * 6 + [(6, VOCABULARY)]


@pytest.mark.parametrize("length", [None, 12])
def test_a_head_of_another_kind_is_the_models_own_forward(
    length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    true = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = true(*args, **options)
        out.logits = out.logits.cumsum(-1) / 4
        return out

    monkeypatch.setattr(model, "forward", forward)
    windows = [np.array(ids, np.int32) for ids in drawn(7, length)]
    longest = max(map(len, windows)) - 1
    monkeypatch.setattr(relneuron.ablation.windows, "LOGITS", 3 * longest * VOCABULARY)
    scorer = Scorer(model, windows)
    assert len(scorer.notices) == 1
    groups: list[list[int]] = []
    found = scorer.ask(list(range(7)), lambda step: groups.append(step.rows.tolist()))
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert np.allclose(found, [plain(model, ids.tolist()) for ids in windows], atol=1e-5)


def test_in_bfloat16_log_probabilities_are_float32() -> None:
    model = tiny_model("llama", torch.bfloat16, initializer_range=0.3)
    windows = [np.array(ids, np.int32) for ids in drawn(5, 12)]
    scorer = Scorer(model, windows)
    assert scorer.notices == []
    wanted = [plain(model, ids.tolist()) for ids in windows]
    assert np.allclose(scorer.ask(list(range(5)), lambda step: None), wanted, atol=2e-2)


# --- the matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 20])
def test_every_mask_and_window_is_the_edited_model_on_the_window_alone(
    model: Any, tokenizer: Any, study: Path, length: int | None
) -> None:
    windows = text(drawn(14, length))
    cells = run(model, tokenizer, study, windows, batch_tokens=150, mode="documents")
    rows = read_rows(study / "o" / "nll_windows.csv")
    masks = ["clean", *SETS]
    groups = ["en", "zh", "de"]
    found: dict[tuple[str, str], list[float]] = {}
    place = iter(rows)
    for mask in masks:
        edited = without(model, SETS.get(mask, []))
        for group in groups:
            mine = [ids for name, ids in windows if name == group]
            for number, ids in enumerate(mine):
                row = next(place)
                assert [row[c] for c in ("mask", "group", "window", "n_tokens")] == [
                    *(mask, group, str(number), str(len(ids) - 1)),
                ]
                assert abs(float(row["nll"]) - plain(edited, ids)) <= 1e-5
                found.setdefault((mask, group), []).append(float(row["nll"]))
    assert next(place, None) is None
    table = read_rows(study / "o" / "nll.csv")
    assert [(row["mask"], row["group"]) for row in table] == list(found)
    for row, cell, (key, values) in zip(table, cells, found.items(), strict=True):
        n_tokens = sum(len(ids) - 1 for name, ids in windows if name == key[1])
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        assert (int(row["n_windows"]), int(row["n_tokens"])) == (len(values), n_tokens)
        assert abs(float(row["nll"]) - mean) <= 1e-12
        assert abs(float(row["nll_se"]) - error) <= 1e-12
        assert math.isclose(float(row["perplexity"]), math.exp(mean), rel_tol=1e-12)
        assert [str(value) for value in cell] == list(row.values())
    by_mask = {m: tuple(v for (a, _), vs in found.items() if a == m for v in vs) for m in masks}
    # No neuron off is the clean model to the last bit, and the other masks all differ.
    assert by_mask["empty"] == by_mask["clean"]
    assert len(set(by_mask.values())) == len(masks) - 1


def test_one_window_has_no_standard_error(model: Any, tokenizer: Any, study: Path) -> None:
    cells = run(model, tokenizer, study, text(drawn(3)))
    assert {cell.nll_se for cell in cells} == {None} and len(cells) == 15
    assert {row["nll_se"] for row in read_rows(study / "o" / "nll.csv")} == {""}


@pytest.mark.filterwarnings("ignore:de. no window")
def test_windows_beyond_the_number_or_of_one_token_are_left_out(
    model: Any, tokenizer: Any, study: Path
) -> None:
    windows = [("zh", [5]), *(("zh", ids) for ids in drawn(4)), ("de", [7]), ("en", [3, 4])]
    cells = run(model, tokenizer, study, windows, windows=3)
    clean = [cell for cell in cells if cell.mask == "clean"]
    assert [(c.group, c.n_windows) for c in clean] == [("en", 1), ("zh", 3)]
    assert clean[1].n_tokens == sum(len(ids) - 1 for _, ids in windows[1:4])
    assert "de: no window of 32 tokens" in Manifest(study / "o").data["fallbacks"]


def test_texts_come_by_group_in_the_order_of_the_feed() -> None:
    texts = read_texts(Windows(("a", "b"), [("b", [1, 2]), ("a", [3, 4]), ("b", [5, 6])]), 9)
    assert texts.groups == ["a", "b", "b"]
    assert [ids.tolist() for ids in texts.ids] == [[3, 4], [1, 2], [5, 6]]
    many = Windows(("a",), [("a", [1, 2, i]) for i in range(200)])
    assert len(read_texts(many, 150).ids) == 150


def test_masks_of_random_sets() -> None:
    rng = np.random.default_rng(0)
    widths = [WIDTH, WIDTH, HIDDEN]
    gates = np.array([la * sum(widths) + i for la in range(LAYERS) for i in range(WIDTH)])
    sets = {"a": rng.choice(gates, 30, replace=False), "b": rng.choice(gates, 10, replace=False)}
    plan = plan_masks(sets, SHAPE, 3)
    assert [a.condition.name for a in plan] == [
        *("clean", "a", "b", "random.0", "random.1", "random.2"),
    ]
    assert len(plan[0].places) == 0
    for ablation in plan[3:]:
        assert len(set(ablation.places.tolist())) == 30
        assert set(ablation.places.tolist()) <= set(gates.tolist())
        assert (np.diff(ablation.places) > 0).all()
    assert len({a.places.tobytes() for a in plan}) == 6
    again = plan_masks(sets, SHAPE, 3)
    assert [a.places.tobytes() for a in again] == [a.places.tobytes() for a in plan]
    downs = {"c": np.array([2 * WIDTH, 2 * WIDTH + 5])}
    places = plan_masks(sets | downs, SHAPE, 20)
    sites = {int(p % sum(widths) // WIDTH) for a in places[4:] for p in a.places}
    assert sites == {0, 2}
    for names in (["clean"], ["a", "random.0"]):
        with pytest.raises(RelneuronError, match=f"two masks are named {names[-1]}"):
            plan_masks(dict.fromkeys(names, sets["a"]), SHAPE, 1)


def test_random_sets_are_read_as_others(model: Any, tokenizer: Any, study: Path) -> None:
    cells = run(model, tokenizer, study, text(drawn(6)), random_sets=2)
    assert [cell.mask for cell in cells][::3] == ["clean", *SETS, "random.0", "random.1"]
    assert Manifest(study / "o").data["stages"]["nll"]["random_set_size"] == 31


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
