"""What was changed, cut or flipped between two stages is found by the stage that reads it next.

Every file is one that a stage wrote: a small study of relations, its attribution, a small corpus.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.generate import generate
from relneuron.ablation.harness.options import EvalOptions
from relneuron.ablation.harness.stage import evaluate
from relneuron.ablation.nll import nll
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.methods.contrast.rank import identify_contrast
from relneuron.methods.counts.folders import export_counts
from relneuron.methods.counts.merge import merge
from relneuron.methods.gains.rank import identify_gains
from relneuron.methods.gradients.attribute import attribute as gradients
from relneuron.methods.gradients.choices import KnowledgeOptions
from relneuron.methods.gradients.edit import edit_model
from relneuron.methods.gradients.options import IgOptions
from relneuron.methods.gradients.rank import identify_gradients
from relneuron.methods.responses.at_once import identify_at_once
from relneuron.methods.responses.options import AtOnceOptions, RecordOptions
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.pair import pair_of
from relneuron.report.page import write_report
from relneuron.study.pages import PAGES
from relneuron.texts.sources import parse_sources
from tests.artifact.handed import NLL, attributed, contrasted, flip, looked, probed
from tests.kit.counted import rank_counts
from tests.kit.tasks import write_tasks

# --- a flipped bit of a file between two stages --------------------------------------------------

Stage = Callable[[tuple[Any, Any], list[str], Path, Path], object]


def ablated(loaded: Any, corpus: Any, root: Path, out: Path, **asked: Any) -> object:
    study, output = root / "study", out / "effects.csv"
    neurons, prompts = study / "neurons.json", study / "prompts.jsonl"
    asked = {"random_seeds": 1, "quiet": True} | asked
    return ablate_prompts("m", *loaded, neurons, prompts, output, **asked)


def evaluated(
    loaded: Any, corpus: Any, root: Path, out: Path, of: str = "counts", **asked: Any
) -> object:
    tasks = write_tasks(root.parent / "tasks", 4)
    asked |= {"tasks": ("tiny_choice",), "include_path": (str(tasks),), "limit": 1}
    neurons = root / of / "neurons.json"
    first = next(name for name, rows in NeuronFile.read(neurons).sets.items() if rows)
    options = EvalOptions(off=(first,), **asked)
    return evaluate("m", *loaded, neurons, out, options, quiet=True)


def generated(loaded: Any, corpus: Any, root: Path, out: Path, **asked: Any) -> object:
    counts, prompts = root / "counts", root / "study" / "prompts.jsonl"
    pair = asked.pop("pair", None)
    options = GenerateOptions(**{"max_new_tokens": 4} | asked)
    files = (counts / "neurons.json", prompts, out / "texts.jsonl")
    return generate("m", *loaded, *files, options, pair=pair, quiet=True)


def generated_by(loaded: Any, corpus: Any, root: Path, out: Path) -> object:
    """Text with the values of another model, which is the same."""
    model, tokenizer = loaded
    pair = pair_of(model, copy.deepcopy(model), tokenizer)
    return generated(loaded, corpus, root, out, pair=pair, mode="patch", donor="b", off="a")


def edited(loaded: Any, corpus: Any, root: Path, out: Path) -> object:
    model, tokenizer = loaded
    neurons, prompts = root / "attribution" / "neurons.json", root / "study" / "prompts.jsonl"
    return edit_model("m", copy.deepcopy(model), tokenizer, neurons, prompts, out, quiet=True)


def reported(loaded: Any, corpus: Any, root: Path, out: Path, *, of: str) -> object:
    return write_report(root / of, out / "report.html", PAGES)


AT_ONCE = AtOnceOptions(identify=True, top=5, permutations=0, bootstrap=0, noise=0)
IG = IgOptions(steps=2, splits=("eva",))
STAGES: dict[str, tuple[Stage, tuple[str, ...]]] = {
    "record": (
        lambda m, c, r, o: record("m", *m, r / "study" / "prompts.jsonl", o, quiet=True),
        ("study/prompts.jsonl",),
    ),
    "record and identify at once": (
        lambda m, c, r, o: identify_at_once(
            *("m", *m, r / "study" / "prompts.jsonl", o, RecordOptions(), AT_ONCE), quiet=True
        ),
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
                *("attribution/scores.safetensors", "cards.jsonl"),
            )
        ),
    ),
    "attribute": (
        lambda m, c, r, o: attributed(m, r / "study" / "prompts.jsonl", o),
        ("study/prompts.jsonl",),
    ),
    "attribute ig": (
        lambda m, c, r, o: gradients("m", *m, r / "study" / "prompts.jsonl", o, IG, quiet=True),
        ("study/prompts.jsonl",),
    ),
    "identify gains": (
        lambda m, c, r, o: identify_gains(r / "attribution", o / "neurons.json", quiet=True),
        tuple(f"attribution/{name}" for name in ("targets.csv", "gains.safetensors")),
    ),
    "identify facts": (
        lambda m, c, r, o: identify_gradients(
            r / "gradients",
            o / "n.json",
            KnowledgeOptions(),
            method="knowledge_neurons",
            quiet=True,
        ),
        ("gradients/prompts.jsonl", "gradients/ig.safetensors", "gradients/manifest.json"),
    ),
    "edit": (
        edited,
        ("attribution/neurons.json", "study/prompts.jsonl", "study/sentences.jsonl"),
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
    "contrast": (
        lambda m, c, r, o: contrasted(m, r / "study" / "prompts.jsonl", o),
        ("study/prompts.jsonl",),
    ),
    "identify contrast": (
        lambda m, c, r, o: identify_contrast(r / "contrast", o / "neurons.json"),
        ("contrast/contrast.safetensors", "contrast/manifest.json"),
    ),
    "report contrast": (
        partial(reported, of="contrast"),
        tuple(
            f"contrast/{name}" for name in ("manifest.json", "contrast.safetensors", "neurons.json")
        ),
    ),
    "merge": (
        lambda m, c, r, o: merge([r / "half1", r / "half2"], o),
        tuple(
            f"half2/{name}"
            for name in (
                *("counts.safetensors", "examples.safetensors", "histogram.safetensors"),
                "manifest.json",
            )
        ),
    ),
    **{
        f"look at {folder}": (
            lambda m, c, r, o, folder=folder: looked(m, r / folder),
            tuple(f"{folder}/{name}" for name in ("manifest.json", *names)),
        )
        for folder, names in {
            "study": ("neurons.json", "significance.csv", "responses.safetensors", "prompts.jsonl"),
            "attribution": ("neurons.json", "gains.safetensors", "targets.csv", "prompts.jsonl"),
            "counts": ("neurons.json", "examples.safetensors", "histogram.safetensors"),
        }.items()
    },
    "export": (
        lambda m, c, r, o: export_counts(r / "counts", o),
        ("counts/counts.safetensors", "counts/manifest.json"),
    ),
    "export snapshots": (
        lambda m, c, r, o: export_counts(r / "counts", o, mmneuron=True),
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
    "probe": (
        lambda m, c, r, o: probed(m, r, o),
        ("counts/neurons.json", "study/prompts.jsonl"),
    ),
    "probe, applied": (
        lambda m, c, r, o: probed(m, r, o, apply=r / "probe" / "probe.safetensors"),
        ("probe/probe.safetensors",),
    ),
    "eval": (evaluated, ("counts/neurons.json",)),
    "eval steered": (partial(evaluated, set_to="a"), ("counts/counts.safetensors",)),
    "eval of means": (
        lambda m, c, r, o: evaluated(m, c, r, o, "study", mode="mean"),
        ("study/neurons.json", "study/responses.safetensors", "study/prompts.jsonl"),
    ),
    "generate patched": (generated_by, ("counts/neurons.json", "study/prompts.jsonl")),
    "generate mean": (
        lambda m, c, r, o: generated(m, c, r, o, mode="mean", off="a", moments=r / "products"),
        ("products/counts.safetensors", "products/manifest.json"),
    ),
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
