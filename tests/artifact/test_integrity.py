"""What was changed, cut or flipped between two stages is found by the stage that reads it next.

Every file is one that a stage wrote: a small study of relations, its attribution, a small corpus.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import relneuron.model.ask
from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.generate import generate
from relneuron.ablation.nll import nll
from relneuron.ablation.options import ANALYSES, GenerateOptions, NllOptions
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.cli.pages import PAGES
from relneuron.cli.run import run_study
from relneuron.cli.settings import RunOptions
from relneuron.methods.counts.count import count
from relneuron.methods.counts.folders import export_counts, merge
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.rank import identify_gains
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.load import load_model, load_tokenizer
from relneuron.report.page import write_report
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import parse_sources
from tests.kit.counted import rank_counts

OPTIONS = RunOptions(
    eva=8, top=40, random_seeds=1, batch_tokens=256, permutations=9, bootstrap=9, analyses=ANALYSES
)
KINDS = ("ffn_layer", "ffn_neuron")
ATTRIBUTED = AttributeOptions(kinds=KINDS, top=5, random_seeds=1, batch_tokens=200)
COUNTED = CountOptions(window=16, moments=True)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def facts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The facts, with two kinds of subject: concepts are studied, too."""
    folder = tmp_path_factory.mktemp("facts")
    for path in fact_folder.glob("*.json"):
        data = json.loads(path.read_text())
        town = path.stem == "works_as"
        data["properties"] = {"domain_name": "town" if town else "person"}
        if town:
            data["samples"] = [s | {"subject": f"{s['subject']}ville"} for s in data["samples"]]
        (folder / path.name).write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    for group, verb in (("a", "eats"), ("b", "lives in")):
        lines = [f"Person{i} {verb} apple Rome plum Oslo {i}" for i in range(60)]
        (folder / f"{group}.txt").write_text("\n".join(lines))
    return [f"{group}={folder / group}.txt" for group in "ab"]


@pytest.fixture(scope="module")
def made(
    model_folder: Path,
    loaded: tuple[Any, Any],
    facts: Path,
    corpus: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders that the stages wrote: study, attribution, counts with all that follows, halves."""
    root = tmp_path_factory.mktemp("made")
    run_study(str(model_folder), facts, root / "study", OPTIONS, quiet=True)
    attributed(loaded, root / "study" / "prompts.jsonl", root / "attribution")
    identify_gains(root / "attribution", root / "attribution" / "neurons.json", quiet=True)
    write_report(root / "attribution", root / "attribution" / "report.html", PAGES)
    counted(loaded, corpus, root / "counts")
    for shard in (1, 2):
        counted(loaded, corpus, root / f"half{shard}", shard=(shard, 2))
    neurons = root / "counts" / "neurons.json"
    chosen = {"top_rate": 0.2, "filter_rate": 0.5, "bar_ratio": 0.5}
    rank_counts(root / "counts", neurons, **chosen)
    nll("m", *loaded, neurons, parse_sources(corpus), root / "counts", NLL, quiet=True)
    # A second choice: the manifest's entry is now this one's.
    rank_counts(root / "counts", root / "counts" / "random.json", method="random", top=9)
    write_report(root / "counts", root / "counts" / "report.html", PAGES)
    return root


NLL = NllOptions(window=16, windows=3)


def attributed(loaded: tuple[Any, Any], prompts: Path, folder: Path, **more: Any) -> None:
    attribute("m", *loaded, prompts, folder, ATTRIBUTED, quiet=True, **more)


def counted(loaded: tuple[Any, Any], corpus: list[str], folder: Path, **changes: Any) -> None:
    options = CountOptions(window=16, moments=True, **changes)
    count("m", *loaded, parse_sources(corpus), folder, options, quiet=True)


def flip(path: Path, rng: random.Random, end: int | None = None) -> None:
    """One bit of a file, anywhere (before `end`)."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# --- a flipped bit of a file between two stages --------------------------------------------------

Stage = Callable[[tuple[Any, Any], list[str], Path, Path], object]


def ablated(loaded: Any, corpus: Any, root: Path, out: Path, **asked: Any) -> object:
    study, output = root / "study", out / "effects.csv"
    neurons, prompts = study / "neurons.json", study / "prompts.jsonl"
    asked = {"random_seeds": 1, "quiet": True} | asked
    return ablate_prompts("m", *loaded, neurons, prompts, output, **asked)


def generated(loaded: Any, corpus: Any, root: Path, out: Path, **asked: Any) -> object:
    counts, prompts = root / "counts", root / "study" / "prompts.jsonl"
    output = out / "texts.jsonl"
    options = GenerateOptions(**{"max_new_tokens": 4} | asked)
    return generate("m", *loaded, counts / "neurons.json", prompts, output, options, quiet=True)


def reported(loaded: Any, corpus: Any, root: Path, out: Path, *, of: str) -> object:
    return write_report(root / of, out / "report.html", PAGES)


STAGES: dict[str, tuple[Stage, tuple[str, ...]]] = {
    "record": (
        lambda m, c, r, o: record("m", *m, r / "study" / "prompts.jsonl", o, quiet=True),
        ("study/prompts.jsonl",),
    ),
    "identify": (
        lambda m, c, r, o: identify(r / "study", o / "neurons.json", quiet=True),
        tuple(
            f"study/{name}"
            for name in ("prompts.jsonl", "validated.csv", "responses.safetensors", "manifest.json")
        ),
    ),
    "ablate": (ablated, ("study/neurons.json", "study/prompts.jsonl", "study/manifest.json")),
    "ablate sizes": (partial(ablated, analyses=("sizes",)), ("study/scores.safetensors",)),
    "ablate mean": (partial(ablated, mode="mean"), ("study/responses.safetensors",)),
    "ablate gain": (
        partial(ablated, analyses=("gain", "concepts")),
        ("study/attribution/neurons.json", "study/concepts/neurons.json"),
    ),
    "ablate perplexity": (partial(ablated, analyses=("perplexity",)), ("study/sentences.jsonl",)),
    "report": (
        partial(reported, of="study"),
        tuple(
            f"study/{name}"
            for name in (
                *("manifest.json", "prompts.jsonl", "neurons.json", "significance.csv"),
                *("effects.csv", "accuracy.csv", "conditions.csv", "perplexity.csv"),
                *("scores.safetensors", "concepts/neurons.json", "attribution/neurons.json"),
                "attribution/scores.safetensors",
            )
        ),
    ),
    "attribute": (
        lambda m, c, r, o: attributed(m, r / "study" / "prompts.jsonl", o),
        ("study/prompts.jsonl",),
    ),
    "identify gains": (
        lambda m, c, r, o: identify_gains(r / "attribution", o / "neurons.json", quiet=True),
        tuple(f"attribution/{name}" for name in ("targets.csv", "gains.safetensors")),
    ),
    "report attribution": (
        partial(reported, of="attribution"),
        tuple(
            f"attribution/{name}.csv"
            for name in ("targets", "attributions", "promoted", "comparison")
        ),
    ),
    "identify counts": (
        lambda m, c, r, o: rank_counts(r / "counts", o / "neurons.json", top=5),
        ("counts/counts.safetensors", "counts/manifest.json"),
    ),
    "merge": (
        lambda m, c, r, o: merge([r / "half1", r / "half2"], o),
        tuple(f"half2/{name}" for name in ("counts.safetensors", "manifest.json")),
    ),
    "export": (
        lambda m, c, r, o: export_counts(r / "counts", o),
        ("counts/counts.safetensors", "counts/manifest.json"),
    ),
    "nll": (
        lambda m, c, r, o: nll(
            "m", *m, r / "counts" / "neurons.json", parse_sources(c), o, NLL, quiet=True
        ),
        ("counts/neurons.json",),
    ),
    "nll of a second choice": (
        lambda m, c, r, o: nll(
            "m", *m, r / "counts" / "random.json", parse_sources(c), o, NLL, quiet=True
        ),
        ("counts/random.json",),
    ),
    "generate": (generated, ("counts/neurons.json", "study/prompts.jsonl")),
    "generate steered": (partial(generated, set_to="a"), ("counts/counts.safetensors",)),
    "report groups": (
        partial(reported, of="counts"),
        tuple(
            f"counts/{name}"
            for name in (
                *("manifest.json", "counts.safetensors", "neurons.json"),
                *("scores.safetensors", "nll.csv", "nll_windows.csv"),
            )
        ),
    ),
}
"""Each stage, and the files that it reads of those that stages wrote."""


@pytest.mark.parametrize("stage", STAGES)
def test_who_reads_a_file_finds_its_flipped_bit(
    made: Path, loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path, stage: str
) -> None:
    run, names = STAGES[stage]
    root, rng = tmp_path / "made", random.Random(stage)
    shutil.copytree(made, root)
    for number, name in enumerate(names * 3):
        path = root / name
        whole = path.read_bytes()
        flip(path, rng)
        out = tmp_path / str(number)
        with pytest.raises(RelneuronError) as raised:
            run(loaded, corpus, root, out)
        assert str(path) in raised.value.cause, raised.value.cause
        assert not out.exists() or {p.name for p in out.iterdir()} <= {".lock"}
        path.write_bytes(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_files_as_they_were_written_are_read(
    made: Path, loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path, stage: str
) -> None:
    STAGES[stage][0](loaded, corpus, made, tmp_path)


def test_what_a_user_changed_is_read_under_another_name(
    made: Path, loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "counts"
    shutil.copytree(made / "counts", folder)
    path, mine = folder / "random.json", folder / "mine.json"
    text = path.read_text().replace('"gate",', '"up",', 1)
    path.write_text(text)
    mine.write_text(text)
    asked = (parse_sources(corpus), tmp_path / "nll")
    with pytest.raises(
        RelneuronError, match="random.json is not the file .* by identify"
    ) as raised:
        nll("m", *loaded, path, *asked, NLL, quiet=True)
    assert "under another name" in raised.value.fix
    nll("m", *loaded, mine, *asked, NLL, quiet=True)


def test_a_file_beside_the_manifest_of_another_program_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app", "schema": 3}')
    (tmp_path / "prompts.txt").write_text("Rome is")
    assert checked(tmp_path / "prompts.txt") == tmp_path / "prompts.txt"


def test_a_changed_file_is_hashed_again_and_a_settled_one_once(tmp_path: Path) -> None:
    import os

    path, seen = tmp_path / "file", set()
    for number in range(200):  # of one size, within one tick of the clock
        path.write_bytes(number.to_bytes(4, "little"))
        seen.add(sha256(path))
    assert len(seen) == 200
    os.utime(path, ns=(0, 0))
    path.write_bytes(b"0000")
    os.utime(path, ns=(0, 0))  # the time of a change cannot be set
    assert sha256(path) not in seen


# --- a changed model, tokenizer or corpus --------------------------------------------------------


def changed(model_folder: Path, tmp_path: Path, change: Callable[[Any, Any], object]) -> Path:
    """A copy of the model whose weights and tokenizer `change` has changed."""
    folder = tmp_path / "changed"
    model = load_model(str(model_folder))
    tokenizer = load_tokenizer(str(model_folder))
    with torch.no_grad():
        change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_columns(model: Any, _: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 1:] = 0


def other_template(_: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


def other_tokens(_: Any, tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Person1", "Person2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_columns, "record was made from other inputs: model.digest: "),
        (other_template, "record was made from other inputs: tokenizer: "),
        (other_tokens, "record was made from other inputs: tokenizer: "),
    ],
)
def test_a_finished_run_is_not_taken_for_that_of_a_changed_model(
    made: Path, model_folder: Path, facts: Path, tmp_path: Path, change: Any, named: str
) -> None:
    model = changed(model_folder, tmp_path, change)
    study = tmp_path / "study"
    shutil.copytree(made / "study", study)
    with pytest.raises(RelneuronError, match=named):
        run_study(str(model), facts, study, OPTIONS, quiet=True)


def test_every_stage_notes_its_tokenizer(made: Path) -> None:
    noted = {
        stage: entry["inputs"].get("tokenizer")
        for folder in ("study", "attribution", "counts")
        for stage, entry in Manifest(made / folder).data["stages"].items()
        if stage in ("record", "ablate", "attribute", "count", "nll")
    }
    assert len(noted) == 4 and len(set(noted.values())) == 1  # a new identify forgot nll
    assert None not in noted.values()


def test_neurons_of_other_weights_are_taken_with_a_notice_that_stays(
    made: Path, model_folder: Path, corpus: list[str], tmp_path: Path
) -> None:
    folder = changed(model_folder, tmp_path, without_columns)
    loaded = load_model(str(folder)), load_tokenizer(str(folder))
    out = tmp_path / "out"
    with pytest.warns(
        match="neurons.json: neurons of other weights: found in .*model.*, used in m$"
    ):
        ablated(loaded, corpus, made, out)
    fallbacks = Manifest(out).data["fallbacks"]
    assert any("neurons of other weights" in notice for notice in fallbacks)
    with pytest.warns(match="neurons of other weights"):
        STAGES["nll"][0](loaded, corpus, made, tmp_path / "nll")
    assert any("other weights" in n for n in Manifest(tmp_path / "nll").data["fallbacks"])
    with pytest.warns(UserWarning) as said:
        generated(loaded, corpus, made, tmp_path / "texts", set_to="a")
    texts = [str(warning.message) for warning in said]
    assert [text.split(": ")[1] for text in texts] == ["neurons of other weights"] * 1 + [
        "means of other weights"
    ]


@pytest.mark.parametrize("name", ["ablate", "nll"])
def test_a_folder_of_a_study_is_not_filled_by_another_model(
    made: Path, model_folder: Path, corpus: list[str], tmp_path: Path, name: str
) -> None:
    folder = changed(model_folder, tmp_path, without_columns)
    loaded = load_model(str(folder)), load_tokenizer(str(folder))
    root = tmp_path / "made"
    shutil.copytree(made, root)
    study = root / ("study" if name == "ablate" else "counts")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    with pytest.raises(RelneuronError, match="holds a study of another model, or of other weights"):
        if name == "ablate":
            ablated(loaded, corpus, root, study, force=True)
        else:
            neurons = study / "neurons.json"
            nll("m", *loaded, neurons, parse_sources(corpus), study, NLL, force=True, quiet=True)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_the_middle_of_a_text_counts(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    data = bytearray(b"Person1 eats plum\n" * 180_000)  # 3 MiB
    text.write_bytes(data)
    corpus = [f"a={text}"]
    counted(loaded, corpus, tmp_path / "one", max_tokens=64)
    data[len(data) // 2] ^= 1
    text.write_bytes(data)
    with pytest.raises(RelneuronError, match=r"other inputs: sources.0.files.0.sha256"):
        counted(loaded, corpus, tmp_path / "one", max_tokens=64)
    counted(loaded, corpus, tmp_path / "two", max_tokens=64)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")  # two texts, not one twice


def test_a_text_that_changes_while_it_is_counted_is_refused(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relneuron.methods.counts.counter import Speed

    text, true = tmp_path / "a.txt", Speed.count
    text.write_text("Person1 eats plum\n" * 50)

    def counting(*args: Any) -> None:
        text.write_text("Person1 eats pear\n" * 50)
        true(*args)

    monkeypatch.setattr(Speed, "count", counting)
    with pytest.raises(RelneuronError, match=r"a text changed while it was read: 0.files.0.sha256"):
        counted(loaded, [f"a={text}"], tmp_path / "out")
    assert not (tmp_path / "out" / "counts.safetensors").exists()


# --- what a crash damaged ------------------------------------------------------------------------


class Crash(Exception):
    """In the middle of a stage: what was finished before is in the journal."""


def crashed(run: Callable[[], object], owner: Any, name: str, n: int) -> None:
    """Run a stage that dies in its `n`-th call of a function, having saved all before."""
    true, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == n:
            raise Crash
        return true(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(Journal, "SAVE_EVERY_S", 0.0)
        patch.setattr(owner, name, dying)
        run()
        pytest.fail("it did not die")


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_header(path: Path) -> None:
    flip(path, random.Random(1), end=40)


def flip_data(path: Path) -> None:
    """A bit of a row that is written: of the first layer's first site."""
    with safe_open(path, "np") as file:
        name = min(file.keys())
        row = next(i for i, row in enumerate(file.get_tensor(name)) if row.any())
        n_row = file.get_slice(name).get_shape()[1]
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:header])[name]["data_offsets"][0]
    data[header + begin + 4 * n_row * row + 7] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "rows of .* are not as they were written: [0-9]+ of [0-9]+ blocks are done again"),
    "a bit": (flip_data, "rows of .* are not as they were written: 1 of [0-9]+ blocks"),
    "its header": (flip_header, "rows of .* are not as they were written"),
    "gone": (Path.unlink, "rows of .* are not as they were written"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGE, "journal"])
def test_record_does_damaged_rows_again(
    made: Path, loaded: tuple[Any, Any], tmp_path: Path, damage: str, force: bool
) -> None:
    prompts = made / "study" / "prompts.jsonl"
    run = partial(record, "m", *loaded, prompts, batch_tokens=128, quiet=True)
    run(tmp_path / "whole")
    folder = tmp_path / "out"
    crashed(partial(run, folder), relneuron.model.ask.Asker, "_forward", 16)
    n_lines = (folder / "record.journal").read_bytes().count(b"\n")
    assert n_lines > 5
    if damage == "journal":
        lines = (folder / "record.journal").read_bytes().split(b"\n")
        lines[2] = lines[2][:80] + b"{" + lines[2][80:]
        (folder / "record.journal").write_bytes(b"\n".join(lines))
        said = f"{n_lines - 2} of {n_lines} lines are not as they were written"
    else:
        act, said = DAMAGE[damage]
        act(folder / "responses.safetensors")
    with pytest.warns(match=said):
        run(folder, force=force)
    assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", DAMAGE)
def test_attribute_does_damaged_gains_again(
    made: Path, loaded: tuple[Any, Any], tmp_path: Path, damage: str
) -> None:
    from relneuron.methods.gains.scorer import Scorer

    run = partial(attributed, loaded, made / "study" / "prompts.jsonl")
    crashed(partial(run, tmp_path / "out"), Scorer, "score", 4)
    act, said = DAMAGE[damage]
    act(tmp_path / "out" / "gains.safetensors")
    with pytest.warns(match=said):
        run(tmp_path / "out")
    before = files(made / "attribution")
    for name, data in files(tmp_path / "out").items():
        if name not in ("manifest.json",):
            assert data == before[name], name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stage", ["ablate", "nll", "generate"])
def test_a_flipped_bit_of_a_journal_changes_no_result(
    made: Path,
    loaded: tuple[Any, Any],
    corpus: list[str],
    tmp_path: Path,
    stage: str,
    seed: int,
) -> None:
    asked = {"ablate": {"batch_tokens": 100}, "nll": {"batch_tokens": 20}}.get(
        stage, {"batch_tokens": 100, "max_new_tokens": 4}
    )
    run: Callable[[Path], object] = {
        "ablate": lambda o: ablated(loaded, corpus, made, o, **asked),
        "generate": lambda o: generated(loaded, corpus, made, o, **asked),
        "nll": lambda o: nll(
            "m",
            *loaded,
            made / "counts" / "neurons.json",
            parse_sources(corpus),
            o,
            replace(NLL, **asked),
            quiet=True,
        ),
    }[stage]
    run(tmp_path / "whole")
    folder, blocks = tmp_path / "out", []
    add = Journal.add

    def dying(self: Journal, *args: Any) -> None:
        add(self, *args)
        blocks.append(1)
        if len(blocks) == 4:
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Journal, "SAVE_EVERY_S", 0.0)
        patch.setattr(Journal, "add", dying)
        run(folder)
    (journal,) = folder.glob("*.journal")
    flip(journal, random.Random(seed), end=len(journal.read_bytes()) - 1)
    with pytest.warns(match=r"\.journal: .* not as they were written"):
        run(folder)
    assert files(folder) == files(tmp_path / "whole")


def test_a_flipped_checkpoint_is_refused(
    loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path
) -> None:
    from relneuron.methods.counts.counter import Speed

    true, calls = Speed.count, []

    def dying(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Crash
        true(*args)

    options = CountOptions(window=16, batch_tokens=32)
    run = partial(count, "m", *loaded, parse_sources(corpus), tmp_path, quiet=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Speed, "count", dying)
        run(replace(options, checkpoint_batches=1))
    flip(tmp_path / "count.checkpoint", random.Random(0))
    with pytest.raises(RelneuronError, match="count.checkpoint is not the file that was written"):
        run(options)
    run(options, force=True)


# --- whose rows they are -------------------------------------------------------------------------


def test_responses_and_gains_say_whose_rows_they_are(made: Path) -> None:
    for folder, name, key in (
        ("study", "responses.safetensors", "relneuron.responses"),
        ("attribution", "gains.safetensors", "relneuron.gains"),
    ):
        prompts = read_prompts(made / folder / "prompts.jsonl")
        if folder == "study":
            ids = [prompt.id for prompt in prompts if prompt.split == "det"]
        else:
            ids = [row["id"] for row in read_csv(made / folder / "targets.csv", ("id",))]
        with safe_open(made / folder / name, "np") as file:
            (said,) = file.metadata().items()
            n_rows = {file.get_slice(tensor).get_shape()[0] for tensor in file.keys()}  # noqa: SIM118
        about = json.loads(said[1])
        assert said[0] == key and about["ids"] == ids and n_rows == {len(ids)}
        assert about["prompts"] == sha256(made / folder / "prompts.jsonl")
        assert about["model"] == NeuronFile.read(made / "study" / "neurons.json").model["digest"]
    with safe_open(made / "study" / "responses.safetensors", "np") as file:
        about = json.loads(file.metadata()["relneuron.responses"])
    assert (about["pooling"], about["exclude_bos"]) == ("mean", False)


def test_responses_of_other_prompts_are_not_ranked(
    made: Path, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """As many rows, but of the prompts in another order; no manifest knows the file."""
    lines = (made / "study" / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(reversed(lines)))
    record("m", *loaded, tmp_path / "prompts.jsonl", tmp_path / "other", quiet=True)
    shutil.copytree(made / "study", tmp_path / "study")
    name = "responses.safetensors"
    (tmp_path / "study" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    manifest = Manifest(tmp_path / "study")
    del manifest.data["files"][name]
    manifest.save()
    with pytest.raises(RelneuronError, match="the rows of .*responses.* are of other prompts"):
        identify(tmp_path / "study", tmp_path / "neurons.json", quiet=True)
