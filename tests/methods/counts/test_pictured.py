"""`count` on records with pictures, and each module's own ranking, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from relneuron.artifact.counts import RAN, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.modules import module_layers, module_shape
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.methods.counts.choose import choose
from relneuron.methods.counts.count import count
from relneuron.methods.counts.options import CountedOptions
from relneuron.model.load import load_model
from relneuron.model.pictures import Processor, load_processor, sent
from relneuron.texts.options import CountOptions
from relneuron.texts.picture_feed import describe_pictures
from relneuron.texts.sources import Source, parse_sources
from tests.conftest import shared_folder
from tests.kit import count_crash, pictures
from tests.kit.corpus_commands import caller
from tests.kit.forked import Forked
from tests.kit.pictures import KINDS, MODULES, plain_counts, write_lines

Run = Callable[..., tuple[int, str, str]]
N = {"art": 5, "road": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, (group, n) in enumerate(N.items()):
        write_lines(folder, group, n, 5 * i)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of("llava", tmp_path_factory)


def model_of(kind: str, factory: pytest.TempPathFactory) -> Path:
    pictures.register()
    return shared_folder(factory, kind, lambda path: pictures.save(kind, path))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return caller(capsys)


def sources(corpus: Path) -> list[str]:
    return [f"{group}={corpus / group}.jsonl" for group in N]


def ran(run: Run, *words: object) -> str:
    """What a command says that goes well."""
    code, said, errors = run(*words)
    assert code == 0, errors
    return said


# --- counts ----------------------------------------------------------------------------------


def test_counts_of_every_module_are_those_of_plain_hooks(
    folder: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    kind = folder.name
    out = tmp_path / "out"
    said = ran(run, "count", folder, *sources(corpus), "-o", out, "--module", "all", "--quiet")
    model, processor = load_model(str(folder)), Processor(load_processor(str(folder)))
    examples = []
    for number, group in enumerate(N):
        for line in (corpus / f"{group}.jsonl").read_text().splitlines():
            record = json.loads(line)

            image = Image.open(corpus / record["image"]).convert("RGB")
            made = processor.inputs([image], record["text"], "a")
            examples.append((sent(model, made), number))
    expected = plain_counts(model, kind, examples, 2)
    found, manifest = Counts.read(out / "counts.safetensors"), Manifest(out).data
    assert found.groups == list(N) and manifest["model"]["modules"] == MODULES[kind]
    assert found.tokens.tolist() == found.tokens_at().max(axis=1).tolist()
    for name, layers in module_layers(manifest["model"]).items():
        counts, tokens = expected[name]
        own = found.arrays["count.act"][:, layers.start : layers.stop]
        np.testing.assert_array_equal(own[:, :, : counts.shape[2]], counts, err_msg=name)
        assert not own[:, :, counts.shape[2] :].any()
        np.testing.assert_array_equal(found.of_layers(layers).tokens, tokens[:, 0])
        assert list(manifest["tokens"]["modules"][name].values()) == tokens[:, 0].tolist()
        assert f"art: {tokens[0, 0]} tokens in {name}\n" in said
    assert manifest["tokens"]["records"] == N
    assert (expected["language"][1][:, 0] != expected["vision"][1][:, 0]).all()
    # A module alone has just its part of them.
    name = list(MODULES[kind])[-1].partition("_")[0]
    ran(run, "count", folder, *sources(corpus), "-o", tmp_path / "one", "--module", name, "--quiet")
    alone = Counts.read(tmp_path / "one" / "counts.safetensors")
    own = [la for n, la in module_layers(manifest["model"]).items() if n.startswith(name)]
    inside = range(own[0].start, own[-1].stop)
    width = alone.arrays["count.act"].shape[2]
    part = found.of_layers(inside)
    np.testing.assert_array_equal(alone.arrays["count.act"], part.arrays["count.act"][..., :width])
    np.testing.assert_array_equal(alone.tokens_at(), part.tokens_at())


def test_the_language_model_alone_counts_image_tokens(
    llava: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    """Without --module, as in a count of text: no key of the shape is new."""
    said = ran(run, "count", llava, *sources(corpus), "-o", tmp_path / "o", "--quiet")
    manifest = Manifest(tmp_path / "o").data
    assert not {"modules", "hiddens", "widths", "gated"} & manifest["model"].keys()
    found = Counts.read(tmp_path / "o" / "counts.safetensors")
    texts = [json.loads(x)["text"] for x in (corpus / "art.jsonl").read_text().splitlines()]
    assert found.tokens[0] == sum(16 + 1 + len(text) for text in texts)  # 16 patches, a line end
    assert said.startswith(f"art: {found.tokens[0]} tokens\n")


@pytest.mark.slow
def test_a_count_that_is_killed_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    process = Forked(count_crash.main, [str(tmp_path), "pictures"])
    assert process.wait(600) == 0, process.said()
    assert json.loads(process.said()[0])["pictures"] == 24


@pytest.mark.slow
def test_processes_share_the_records(tmp_path: Path) -> None:
    process = Forked(count_crash.main, [str(tmp_path), "pictures of ranks"])
    assert process.wait(600) == 0, process.said()
    done = json.loads(process.said()[0])["pictures of ranks"]
    assert done == ["2", "3", "1-2", "2-1", "3-2"]


def test_shards_are_merged(llava: Path, corpus: Path, tmp_path: Path, run: Run) -> None:
    asked = [*sources(corpus), "--module", "all", "--quiet"]
    ran(run, "count", llava, *asked, "-o", tmp_path / "whole")
    for part in ("1/2", "2/2"):
        ran(run, "count", llava, *asked, "--shard", part, "-o", tmp_path / part[0])
    ran(run, "merge", tmp_path / "1", tmp_path / "2", "-o", tmp_path / "both")
    one, two = (tmp_path / name / "counts.safetensors" for name in ("whole", "both"))
    assert load_file(one).keys() == load_file(two).keys()
    for name, array in load_file(one).items():
        np.testing.assert_array_equal(load_file(two)[name], array, err_msg=name)


def test_the_first_records_of_each_group(
    llava: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    ran(run, "count", llava, *sources(corpus), "-o", tmp_path / "o", "--max-records", 2, "--quiet")
    for group in N:
        lines = (corpus / f"{group}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{group}.jsonl").write_text("".join(lines[:2]))
    shutil.copytree(corpus / "pictures", tmp_path / "pictures")
    ran(run, "count", llava, *sources(tmp_path), "-o", tmp_path / "cut", "--quiet")
    one, two = (tmp_path / name / "counts.safetensors" for name in ("o", "cut"))
    assert one.read_bytes() == two.read_bytes()
    assert Manifest(tmp_path / "o").data["tokens"]["records"] == {"art": 2, "road": 2}


# --- what is read ----------------------------------------------------------------------------


def records(corpus: Path) -> list[dict[str, Any]]:
    """All lines with their groups, the pictures as bytes."""
    found = []
    for group in N:
        for line in (corpus / f"{group}.jsonl").read_text().splitlines():
            record = json.loads(line)
            data = (corpus / record["image"]).read_bytes()
            found.append(record | {"domain": group, "bytes": data})
    return found


def count_here(llava: Path, given: list[Source], out: Path) -> Counts:
    model, processor = load_model(str(llava)), Processor(load_processor(str(llava)))
    options = CountOptions(module=("vision",))
    done = count("m", model, None, given, out, options, processor=processor, quiet=True)
    assert done is not None
    return done.counts


def test_parquet_and_datasets_give_the_counts_of_lines(
    llava: Path, corpus: Path, tmp_path: Path
) -> None:
    """Embedded pictures, a column that names the group, PIL images of a Python dataset."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from relneuron.texts.pictures import open_picture

    lines = [
        Source(group, s.files, image_column="image")
        for group, s in zip(N, parse_sources(sources(corpus)), strict=True)
    ]
    expected = count_here(llava, lines, tmp_path / "lines")
    all_of = records(corpus)
    rows = [
        {
            "question": record["text"],
            "domain": record["domain"],
            "picture": {"bytes": record["bytes"], "path": "somewhere.png"},
        }
        for record in all_of
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet", row_group_size=4)
    asked = {"text_column": "question", "group_column": "domain", "image_column": "picture"}
    (parquet,) = parse_sources([str(tmp_path / "all.parquet")], **asked)  # type: ignore[arg-type]
    opened = [
        r | {"picture": [open_picture(r["bytes"], "a")], "question": r["text"]} for r in all_of
    ]
    dataset = Source(**asked, dataset=opened)  # type: ignore[arg-type]
    for number, source in enumerate((parquet, dataset)):
        found = count_here(llava, [source], tmp_path / str(number))
        assert found.groups == expected.groups
        for name, array in expected.tensors().items():
            np.testing.assert_array_equal(found.tensors()[name], array, err_msg=name)
    # Where the pixels lie in memory says nothing.
    again = Source(**asked, dataset=[dict(record) for record in opened])  # type: ignore[arg-type]
    one, two = (describe_pictures([source], None) for source in (dataset, again))
    assert one == two and one["pictures"] == 9


@pytest.mark.filterwarnings("ignore")  # of that package
def test_folders_that_datasets_saved(llava: Path, corpus: Path, tmp_path: Path, run: Run) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [
        {"image": str(corpus / record["image"]), "text": record["text"], "domain": record["domain"]}
        for record in records(corpus)
    ]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    ran(run, "count", llava, *sources(corpus), "-o", tmp_path / "lines", "--quiet")
    expected = (tmp_path / "lines" / "counts.safetensors").read_bytes()
    for name in ("one", "splits"):
        asked = [f"hf:{tmp_path / name}", "--group-column", "domain", "--quiet"]
        ran(run, "count", llava, *asked, "-o", tmp_path / f"{name}.out")
        assert (tmp_path / f"{name}.out" / "counts.safetensors").read_bytes() == expected
    python = Source(group_column="domain", dataset=made, image_column="image")
    assert count_here(llava, [python], tmp_path / "python").groups == list(N)


def test_a_changed_picture_is_another_corpus(
    llava: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    shutil.copytree(corpus, tmp_path / "c")
    words = ["count", llava, *sources(tmp_path / "c"), "-o", tmp_path / "o", "--quiet"]
    ran(run, *words)
    assert "holds this count already" in ran(run, *words)
    pictures.picture(77).save(tmp_path / "c" / "pictures" / "road6.png")
    code, _, errors = run(*words)
    assert code == 1 and "pictures.sha256" in errors, errors


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"image": "pictures/none.png", "text": "a"}, "there is no picture .*none.png"),
    "no file": ({"image": "pictures", "text": "a"}, "there is no picture .*pictures"),
    "no picture": ({"image": "art.jsonl", "text": "a"}, "art.jsonl is no picture that can be read"),
    "cut": ({"image": "cut.png", "text": "a"}, "cut.png is no picture that can be read"),
    "null": ({"image": None, "text": "a"}, "its picture is missing"),
    "a number": ({"image": 3, "text": "a"}, "its picture is 3"),
    "none": ({"image": [], "text": "a"}, "it has no picture"),
    "no image": ({"text": "a"}, "no field 'image', only text"),
    "no text": ({"image": "pictures/art0.png"}, "no field 'text', only image"),
    "text is null": ({"image": "pictures/art0.png", "text": None}, "'text' is no string"),
    "two marks": (
        {"image": "pictures/art0.png", "text": "<image> and <image>"},
        "the text has 2 <image>, the record 1 pictures",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_line_that_is_wrong_is_named(
    llava: Path, corpus: Path, tmp_path: Path, run: Run, what: str
) -> None:
    line, says = BAD[what]
    shutil.copytree(corpus, tmp_path / "c")
    with (tmp_path / "c" / "art.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    data = (tmp_path / "c" / "pictures" / "art0.png").read_bytes()
    (tmp_path / "c" / "cut.png").write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    code, _, errors = run("count", llava, *sources(tmp_path / "c"), "-o", out, "--quiet")
    assert code == 1
    cause, fix = errors.strip().splitlines()[-2:]
    assert re.search(rf"^error: .*art.jsonl, line 6: .*{says}", cause), errors
    assert fix.startswith("fix:") and not (out / "counts.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--module", "qformer"], "has no module qformer"),
        (["--module", "audio"], "unknown --module 'audio'"),
        (["--module", "all", "--sites", "up"], "module vision are not gated"),
        (["--window", 16], "--window is of windows of text"),
        (["--max-tokens", 16], "--max-tokens is of windows of text"),
        (["--exclude-bos"], "--exclude-bos is of windows of text"),
        (["--boundaries", "position"], "--boundaries is of windows of text"),
        (["--examples", "4"], "--examples is of windows of text"),
        (["--histogram"], "--histogram is of windows of text"),
        (["--image-column", "photo"], "has no field 'photo'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    llava: Path, corpus: Path, tmp_path: Path, run: Run, words: list[Any], says: str
) -> None:
    code, _, errors = run("count", llava, *sources(corpus), "-o", tmp_path / "o", *words)
    assert code in (1, 2) and says in errors, errors
    assert not (tmp_path / "o").exists()


def test_text_and_models_without_pictures(
    llava: Path, model_folder: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "hello there " * 40}) + "\n")
    for folder, words, says in (
        (llava, [f"a={text}", "--module", "vision"], "--module is of records with pictures"),
        (llava, [f"a={text}", "--max-records", 1], "--max-records is of records with pictures"),
        (llava, [f"a={text}", *sources(corpus)], "a has no field 'image', other sources"),
        (model_folder, [*sources(corpus), "--image-column", "image"], "reads no pictures"),
        (model_folder, [*sources(corpus), "--module", "vision"], "--module is of records"),
    ):
        code, _, errors = run("count", folder, *words, "-o", tmp_path / "o", "--quiet")
        assert code in (1, 2) and says in errors, errors
    # A corpus of text is read as it was, by a model of either kind, whatever else its records have.
    asked = ["--window", 16, "--quiet"]
    ran(run, "count", llava, f"a={text}", "-o", tmp_path / "one", *asked)
    ran(run, "count", model_folder, *sources(corpus), "-o", tmp_path / "two", *asked)
    for name in ("one", "two"):
        inputs = Manifest(tmp_path / name).data["stages"]["count"]["inputs"]
        assert not {"module", "max_records", "pictures", "processor"} & inputs.keys()


def test_a_folder_without_its_processor(
    llava: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llava, bare)
    (bare / "processor_config.json").unlink()
    (bare / "chat_template.jinja").unlink()
    code, _, errors = run("count", bare, *sources(corpus), "-o", tmp_path / "o", "--quiet")
    assert code == 1 and "has no usable processor" in errors and "processor.save" in errors
    assert "pictures" in run("doctor", bare)[1]


@pytest.mark.parametrize("module", ["language", "all"])
def test_a_processor_of_another_model(
    llava: Path, corpus: Path, tmp_path: Path, run: Run, module: str
) -> None:
    """It puts another number of image tokens into the text than the tower has patches."""
    other = tmp_path / "other"
    shutil.copytree(llava, other)
    path = other / "processor_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"num_additional_image_tokens": 3}))
    words = [*sources(corpus), "-o", tmp_path / "o", "--module", module, "--quiet"]
    code, _, errors = run("count", other, *words)
    cause = "art.jsonl, line 1: the model does not take it (Image features"
    cause = cause if module == "language" else "a forward with a picture fails (Image features"
    assert code == 1 and cause in errors and "belongs to the model" in errors, errors
    assert "no: a forward with a picture fails" in run("doctor", other)[1]


def test_doctor_lists_the_modules(folder: Path, run: Run) -> None:
    lines = [" ".join(line.split()) for line in run("doctor", folder)[1].splitlines()]
    tower = next(line for line in lines if line.startswith("module vision"))
    n, width = (MODULES[folder.name]["vision"], 64 if folder.name == "qwen2_vl" else 40)
    assert f"works: {n} layers, F={width}, " in tower and tower.endswith("sites gate, act, down")
    found = [line.split()[1] for line in lines if line.startswith("module ")]
    assert found == list(MODULES[folder.name])
    assert any(line.startswith("pictures read by ") for line in lines)


def test_pictures_need_a_processor_in_python_too(llava: Path, corpus: Path, tmp_path: Path) -> None:
    found = parse_sources(sources(corpus), image_column="image")
    with pytest.raises(RelneuronError, match="pictures need a processor"):
        count("m", load_model(str(llava)), None, found, tmp_path / "o")


# --- rankings --------------------------------------------------------------------------------


def independent_lape(p: np.ndarray[Any, Any], top: int, rate: float) -> list[set[tuple[int, int]]]:
    """LAPE of probabilities (G, L, F), written by the steps of its authors' code, in one pass."""
    q = p / np.where(p.sum(0) == 0, 1, p.sum(0))
    entropy = -(np.where(q > 0, q, 1) * np.log(np.where(q > 0, q, 1)) * (q > 0)).sum(0)
    flat = np.sort(p.ravel())
    threshold = flat[round(flat.size * rate) - 1]
    entropy = np.where((p > threshold).any(0), entropy, np.inf)
    order = np.argsort(entropy.ravel(), kind="stable")[:top]
    order = order[np.isfinite(entropy.ravel()[order])]
    cells = [divmod(int(i), p.shape[2]) for i in order]
    return [{(la, i) for la, i in cells if own[la, i] > threshold} for own in p]


def test_each_module_has_a_ranking_of_its_own(
    folder: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    """MMNeuron's selection, LAPE inside of a module, by another computation; joined by default."""
    out = tmp_path / "out"
    ran(run, "count", folder, *sources(corpus), "-o", out, "--module", "all", "--quiet")
    asked = ["--method", "lape", "--top-rate", 0.1, "--filter-rate", 0.6, "--bar-ratio", 0.6]
    said = ran(run, "identify", out, "-o", out / "neurons.json", *asked)
    joined = NeuronFile.read(out / "neurons.json")
    counts, model = Counts.read(out / "counts.safetensors"), joined.model
    scores = load_file(out / "scores.safetensors")
    together: dict[str, list[Any]] = {name: [] for name in N}
    for name, layers in module_layers(model).items():
        shape = Shape.of(module_shape(model, name))
        inside = slice(layers.start, layers.stop)
        width = shape.widths["gate"]
        own = counts.arrays["count.act"][:, inside, :width].astype(np.float32)
        tokens = counts.tokens_at()[:, inside].astype(np.float32)
        p = own / tokens[:, :, None]
        np.testing.assert_array_equal(scores["probability.act"][:, inside, :width], p)
        top = round(0.1 * p[0].size)
        expected = independent_lape(p, top, 0.6)
        ran(
            run, "identify", out, "-o", out / f"{name}.json", *asked, "--module", name.split("_")[0]
        )
        alone = NeuronFile.read(out / f"{name}.json")
        for (group, chosen), members in zip(alone.sets.items(), expected, strict=True):
            mine = [row for row in chosen if row[0] in layers]
            assert {(la - layers.start, i) for la, _, i, _ in mine} == members
            together[group] += mine
        facts = joined.selection["modules"][name]
        assert facts["top"] == top and facts["chosen"] <= top
        assert all(name in Shape.of(model).name(*row[:3]) for row in mine)
    assert joined.sets == together and any(together.values())
    assert joined.selection["top"] == sum(s["top"] for s in joined.selection["modules"].values())
    assert " language, " in said
    ran(run, "identify", out, "-o", out / "neurons.json", *asked, "--force")
    ran(run, "report", out, "-o", out / "report.html")
    page = (out / "report.html").read_text()
    assert "language L" in page and "By module: language" in page


def test_layers_that_saw_fewer_tokens_have_their_own_rates() -> None:
    """As a tower's that merges patches on the way: a rate is of the tokens that its layer saw."""
    rng = np.random.default_rng(0)
    ran = np.array([[40, 40, 10], [80, 80, 20]], np.int64)
    count = rng.integers(0, ran[:, :, None] + 1, (2, 3, 5))
    sums = rng.normal(size=(2, 3, 5))
    arrays = {"count.act": count, "sum.act": sums}
    model = {"layers": 3, "width": 5, "hidden": 4, "gated": False, "modules": {"vision": 3}}
    counts = Counts(["a", "b"], ran.max(1), arrays, {RAN: ran})
    options = CountedOptions(top=6, precision="float64")
    for method, values in (("probability", count), ("mean", sums)):
        found = choose(counts, model, options, method, "x")
        rates = values / ran[:, :, None]
        for place, name in enumerate(counts.groups):
            best = sorted(np.ndindex(3, 5), key=lambda at: (-rates[place][at], at))[:6]
            assert [(la, i) for la, _, i, _ in found.sets[name]] == best
            scores = [score for *_, score in found.sets[name]]
            assert scores == pytest.approx([rates[place][at] for at in best])


@pytest.mark.parametrize("method", ["probability", "mean", "random"])
def test_other_methods_rank_a_module_as_if_it_were_all(
    llava: Path, corpus: Path, tmp_path: Path, run: Run, method: str
) -> None:
    words = ["count", llava, *sources(corpus), "--moments", "--quiet", "--module"]
    ran(run, *words, "all", "-o", tmp_path / "all")
    ran(run, *words, "vision", "-o", tmp_path / "alone")
    asked = ["--method", method, "--top", 7]
    for name, more in (("all", ["--module", "vision"]), ("alone", [])):
        place = tmp_path / name
        ran(run, "identify", place, "-o", place / "neurons.json", *asked, *more)
    whole, alone = (NeuronFile.read(tmp_path / n / "neurons.json") for n in ("all", "alone"))
    moved = {
        group: [(layer - 2, *rest) for layer, *rest in rows] for group, rows in whole.sets.items()
    }
    assert moved == alone.sets and all(len(rows) == 7 for rows in alone.sets.values())
    words = ["identify", tmp_path / "alone", "-o", tmp_path / "x.json", *asked]
    code, _, errors = run(*words, "--module", "projector")
    assert code == 2 and "no counts of the module projector" in errors
