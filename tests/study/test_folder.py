"""A study folder as data frames: every kind, unfinished, damaged, of a newer schema, and large.

What a frame says is held to the csv module, json and safetensors.
"""

from __future__ import annotations

import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relneuron
from relneuron.artifact.counts import Counts
from relneuron.artifact.dense import create_safetensors
from relneuron.artifact.files import RelneuronError, atomic_write
from relneuron.artifact.gains import GainFile
from relneuron.artifact.manifest import Manifest
from relneuron.methods.gains.rank import mean_gains
from relneuron.study.folder import Study, load
from relneuron.study.frames import TEXTS
from relneuron.study.held import HELD
from tests.conftest import ROOT
from tests.kit.attribution_studies import write_attribution
from tests.kit.contrasted import write_contrast
from tests.kit.corpus_studies import write_corpus_study
from tests.kit.gradient_studies import gradient_study, write_fact_study
from tests.kit.studies import write_study

pandas = pytest.importorskip("pandas")


def check_csv(frame: Any, path: Path) -> None:
    """A frame's columns hold what the csv module reads in the file, with types of their own."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(frame) == len(rows) > 0
    for name in frame.columns:
        cells = [row[name] for row in rows]
        if name in TEXTS:
            assert frame[name].tolist() == cells
        else:
            expected = np.array([float(cell or "nan") for cell in cells])
            np.testing.assert_array_equal(frame[name].astype(float), expected)


def test_a_study_of_relations(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    study = load(folder)
    for name in ("effects", "accuracy"):
        check_csv(getattr(study, name), folder / f"{name}.csv")
    assert study.effects["correct"].dtype == bool
    assert study.accuracy["n_prompts"].dtype == np.int64
    sets = json.loads((folder / "neurons.json").read_text())["sets"]
    for name, rows in sets.items():
        own = study.neurons[study.neurons["set"] == name]
        assert own[["layer", "site", "index", "score"]].values.tolist() == rows
        assert own["rank"].tolist() == list(range(1, len(rows) + 1))
    ids = [json.loads(line)["id"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert study.prompts["id"].tolist() == ids
    assert study.prompts["objects"].map(type).eq(tuple).all()
    assert study.effects is study.effects  # read once


def test_drops_are_those_of_the_shares(tmp_path: Path) -> None:
    study = load(write_study(tmp_path / "s"))
    a = study.accuracy[study.accuracy["split"] == "eva"]
    n = a.set_index(["condition", "relation"])["n_correct"]
    assert len(study.drops) == 9 and study.drops["own"].dtype == bool
    for row in study.drops.itertuples():
        before, after = n["clean", row.relation], n[row.off, row.relation]
        assert (row.n_before, row.n_after, row.own) == (before, after, row.off == row.relation)
        drop = (before - after) / before if before else np.nan
        np.testing.assert_equal(row.drop, drop)


def test_a_study_of_a_corpus(tmp_path: Path) -> None:
    folder = write_corpus_study(tmp_path / "s")
    study, counts = load(folder), Counts.read(folder / "counts.safetensors")
    for name in ("nll", "nll_windows"):
        check_csv(getattr(study, name), folder / f"{name}.csv")
    found = study.counts
    assert len(found) == counts.arrays["count.act"].size
    values = counts.arrays["count.act"]
    places = [found["group"].cat.codes, found["layer"], found["index"]]
    assert found["group"].cat.categories.tolist() == counts.groups
    assert (found["count"].to_numpy() == values[tuple(places)]).all()
    assert (found["tokens"].to_numpy() == counts.tokens[found["group"].cat.codes]).all()
    assert set(found["site"]) == {"act"}
    one = study.counts_of(counts.groups[1])
    assert one.equals(
        found[found["group"] == counts.groups[1]]
        .reset_index(drop=True)[list(one.columns)]
        .assign(group=one["group"])
    )
    tensors = load_file(folder / "scores.safetensors")
    scores = study.scores(counts.groups[2])
    at = scores["layer"].to_numpy(), scores["index"].to_numpy()
    assert (scores["lape"].to_numpy() == tensors["lape.act"][at]).all()
    assert (scores["probability"].to_numpy() == tensors["probability.act"][2][at]).all()
    with pytest.raises(RelneuronError, match="no relation or group 'xx'"):
        study.scores("xx")
    with pytest.raises(RelneuronError, match="no group 'xx'"):
        study.counts_of("xx")


def test_layers_of_different_width(tmp_path: Path) -> None:
    """What stands behind the neurons of a narrow layer is none; moments and layers come, too."""
    count = np.arange(2 * 2 * 4).reshape(2, 2, 4)
    ran = np.array([[9, 8], [7, 6]])
    arrays = {"count.act": count, "sum.act": count * 0.5, "sum_sq.act": count * 0.25}
    arrays |= {"max.act": count.astype(np.float32), "n_nonfinite.act": count * 0}
    arrays |= {"count.down": count[:, :, :3], "sum.down": count[:, :, :3] * 0.5}
    arrays |= {"sum_sq.down": count[:, :, :3] * 0.5, "n_nonfinite.down": count[:, :, :3] * 0}
    arrays |= {"max.down": count[:, :, :3].astype(np.float32)}
    Counts(["a", "b"], np.array([9, 7]), arrays, {"tokens.layer": ran}).write(
        tmp_path / "counts.safetensors"
    )
    manifest = Manifest(tmp_path)
    manifest.describe(model={"layers": 2, "width": 4, "hidden": 3, "widths": [4, 2]})
    manifest.save()
    found = load(tmp_path).counts_of("b")
    rows = found[["layer", "site", "index"]].values.tolist()
    inner = [[la, "act", i] for la, width in enumerate((4, 2)) for i in range(width)]
    assert rows == inner + [[la, "down", i] for la in range(2) for i in range(3)]
    assert found["tokens"].tolist() == [7] * 4 + [6] * 2 + [7] * 3 + [6] * 3
    assert found["sum"].tolist()[:6] == (count[1].reshape(-1)[:6] * 0.5).tolist()


def test_an_attribution(tmp_path: Path) -> None:
    folder = write_attribution(tmp_path / "s")
    study = load(folder)
    for name in ("targets", "attributions", "promoted", "comparison"):
        check_csv(getattr(study, name), folder / f"{name}.csv")
    ids = study.targets["id"].tolist()
    relations = study.targets["relation"].tolist()
    model = study.manifest["model"]
    values = np.random.default_rng(0).normal(size=(len(ids), model["layers"], model["width"]))
    values = values.astype(np.float32)
    file = GainFile(folder / "gains.safetensors", model, {"ids": ids})
    file.store(range(len(ids)), values)
    file.flush()
    one = study.gains_of(ids[3])
    assert (one["gain"].to_numpy() == values[3].reshape(-1)).all()
    names = sorted({*relations})
    group = np.array([names.index(name) for name in relations])
    means = np.stack([mean_gains(values[:, la], group, len(names)) for la in range(len(values[0]))])
    found = study.gains
    at = found["layer"].to_numpy(), found["relation"].cat.codes, found["index"].to_numpy()
    assert len(found) == means.size and (found["gain"].to_numpy() == means[tuple(at)]).all()
    kept = study.targets["kept"].to_numpy()
    assert kept.any() and not kept.all()  # all count unless only the known ones were scored
    study.manifest["stages"]["attribute"] = {"inputs": {"keep": "known"}, "files": []}
    group[~kept] = -1
    known = np.stack([mean_gains(values[:, la], group, len(names)) for la in range(len(values[0]))])
    assert (study.gains["gain"].to_numpy() == known[tuple(at)]).all()


def test_gains_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_folder = tmp_path / "whole"
    test_an_attribution(test_folder)
    monkeypatch.setattr("relneuron.study.tensors._BLOCK_BYTES", 300)
    test_an_attribution(tmp_path / "blocks")


@pytest.mark.parametrize("method", ["ig", "relevance"])
def test_gradients(tmp_path: Path, method: str) -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    folder = gradient_study(tmp_path / "s", [("r", "Ann", list(values))], method)
    found = load(folder).gradients("r.Ann.1", method)
    assert found["score"].to_numpy().tolist() == values[1].reshape(-1).tolist()
    assert found["index"].tolist() == [*range(8)] * 3
    with pytest.raises(RelneuronError, match="no sentence 'r.Ann.2'"):
        load(folder).gradients("r.Ann.2", method)


def test_a_study_of_facts(tmp_path: Path) -> None:
    folder = write_fact_study(tmp_path / "s")
    study = load(folder)
    for name in ("facts", "completeness", "effects", "conditions"):
        check_csv(getattr(study, name), folder / f"{name}.csv")
    assert study.effects["choice"].tolist()[:2] == ["A", "B"]
    assert np.isnan(study.conditions["seed"][0])


def test_a_contrast(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    groups = {
        name: (*rng.normal(size=(2, n, 2, 5)).astype(np.float32),)
        for name, n in (("en", 7), ("de", 4))
    }
    write_contrast(tmp_path / "s", groups)
    study = load(tmp_path / "s")
    a, b = (np.concatenate([both[i] for both in groups.values()]) for i in range(2))
    change = np.sqrt(np.square(a - b).mean(0))
    found = study.changes
    assert found.columns.tolist() == ["layer", "index", "rms"] and len(found) == 10
    np.testing.assert_allclose(found["rms"], change.reshape(-1), rtol=1e-6)
    one = study.contrasted("de").set_index(["layer", "site", "index"])
    assert (one["tokens"] == 4).all() and len(one) == 3 * 10
    values = groups["de"][1]
    np.testing.assert_allclose(one.loc[(1, "b", 3), "sum"], values[:, 1, 3].sum(), rtol=1e-6)
    assert one.loc[(1, "b", 3), "count"] == (values[:, 1, 3] > 0).sum()
    with pytest.raises(RelneuronError, match="no group 'fr'"):
        study.contrasted("fr")


def test_responses_of_a_prompt(tmp_path: Path) -> None:
    shapes = {f"{site}.{la}": (3, w) for la in range(2) for site, w in (("gate", 5), ("up", 5))}
    shapes |= {f"down.{la}": (3, 4) for la in range(2)}
    about = {"relneuron.responses": json.dumps({"ids": ["a", "b", "c"]})}
    maps = create_safetensors(tmp_path / "responses.safetensors", shapes, about)
    rng = np.random.default_rng(2)
    for values in maps.values():
        values[:] = rng.normal(size=values.shape)
        values.flush()
    with pytest.raises(RelneuronError, match="of which model"):
        load(tmp_path).responses("b")
    manifest = Manifest(tmp_path)
    manifest.describe(model={"layers": 2, "width": 5, "hidden": 4})
    manifest.save()
    found = load(tmp_path).responses("b")
    expected = [maps[f"{s}.{la}"][1] for la in range(2) for s in ("gate", "up", "down")]
    assert (found["response"].to_numpy() == np.concatenate(expected)).all()
    assert found["site"].tolist() == (["gate"] * 5 + ["up"] * 5 + ["down"] * 4) * 2


def test_analyses_are_the_tables_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "analyses").mkdir()
    text = "relation,drop,n_prompts,own\na,0.5,3,-0.1\nb,,4,0.2\n"
    (tmp_path / "analyses" / "drop.csv").write_text(text)
    write_study(tmp_path)
    table = load(tmp_path).analyses["drop"]
    assert table["relation"].tolist() == ["a", "b"] and table["n_prompts"].dtype == np.int64
    assert table["drop"].tolist()[0] == 0.5 and np.isnan(table["drop"][1])


def test_the_page_of_docs_names_every_table() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = {(held.call or name).partition("(")[0] for name, held in HELD.items()} | {"analyses"}
    assert {name for name in names if not re.search(rf"`[^`|]*\b{name}\b", text)} == set()


def test_every_column_is_explained() -> None:
    """The words of a table name each of its columns, and every table has words."""
    for name, held in HELD.items():
        member = getattr(Study, name if not held.call else held.call.partition("(")[0])
        words = (getattr(member, "func", None) or getattr(member, "fget", None) or member).__doc__
        assert words
        for column in held.columns:
            stem = re.sub(r"_drop(_low|_high)?$", "", column)  # comparison's are told by its own
            assert re.search(rf"\b{stem}\b", words), f"{name}: {column}"


# --- without pandas ------------------------------------------------------------------------------


def test_without_pandas_a_table_is_a_dict_of_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relations, corpus = write_study(tmp_path / "r"), write_corpus_study(tmp_path / "c")
    with_pandas = load(relations).effects, load(corpus).counts
    monkeypatch.setattr("relneuron.study.frames.missing", lambda *_: ["pandas"])
    for whole, plain in zip(
        with_pandas, (load(relations).effects, load(corpus).counts), strict=True
    ):
        assert isinstance(plain, dict) and list(plain) == list(whole.columns)
        for name, values in plain.items():
            assert isinstance(values, np.ndarray) and values.tolist() == whole[name].tolist()


# --- what is not there, or not as it was ---------------------------------------------------------


def test_what_is_missing_says_what_makes_it(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    for name in ("effects.csv", "accuracy.csv"):
        (folder / name).unlink()
    study = load(folder)
    for read in ("effects", "drops", "accuracy"):
        with pytest.raises(RelneuronError, match="does not exist") as error:
            getattr(study, read)
        assert "relneuron ablate MODEL neurons.json prompts.jsonl -o effects.csv" in error.value.fix
    with pytest.raises(RelneuronError, match="does not exist") as error:
        _ = study.counts
    assert error.value.fix.startswith("make it with: relneuron count")
    shown = html.unescape(study._repr_html_())
    assert "missing: <code>relneuron ablate MODEL neurons.json" in shown
    assert ".neurons" in shown and "counts" not in shown  # of another kind of study
    assert "effects" in repr(study) and "missing" in repr(study)


def test_names_of_a_study_are_shown_as_text(tmp_path: Path) -> None:
    manifest = {"model": {"id": "<script>", "layers": 2, "width": 8, "hidden": 4}}
    shown = load(write_study(tmp_path / "<b>", manifest=manifest))._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "<b></code>" not in shown


def test_what_is_unfinished_is_said(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    create_safetensors(folder / "responses.safetensors", {"gate.0": (1, 2)})
    (folder / "record.journal").write_bytes(b"")
    study = load(folder)
    with pytest.raises(RelneuronError, match="of a run that was not finished") as error:
        study.responses("a")
    assert error.value.fix.startswith("go on with: relneuron record")
    assert "unfinished" in study._repr_html_()
    atomic_write(folder / ".unfinished", b'{"neurons.json": "identify"}')
    with pytest.raises(RelneuronError, match="run of relneuron identify that was not finished"):
        _ = study.neurons


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = write_corpus_study(tmp_path / "s")
    manifest = Manifest(folder)
    names = ("counts.safetensors", "nll.csv", "scores.safetensors")
    manifest.finish("count", {}, [folder / name for name in names], reads=[])
    for name in names:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)
    study = load(folder)
    for read in (lambda: study.counts, lambda: study.nll, lambda: study.scores("en")):
        with pytest.raises(RelneuronError, match="is not the file that was written by count"):
            read()


def test_a_damaged_file_says_what_is_wrong(tmp_path: Path) -> None:
    folder = write_corpus_study(tmp_path / "s")
    for name, text in (("nll.csv", "mask,group\nclean,en\n"), ("nll_windows.csv", "")):
        (folder / name).write_text(text)
    for name in ("counts.safetensors", "scores.safetensors"):
        (folder / name).write_bytes(b"no tensors")
    study = load(folder)
    for read in ("nll", "nll_windows", "counts"):
        with pytest.raises(RelneuronError):
            getattr(study, read)
    with pytest.raises(RelneuronError, match="no file of scores"):
        study.scores("en")
    save_file({"tokens": np.zeros(2, np.int64)}, folder / "counts.safetensors")
    with pytest.raises(RelneuronError, match="the groups are None"):
        _ = study.counts


def test_a_newer_schema_is_refused_at_once(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", manifest={"schema": "relneuron.study/2"})
    with pytest.raises(RelneuronError, match="schema 'relneuron.study/2'") as error:
        load(folder)
    assert "the version of relneuron that wrote it" in error.value.fix
    folder = write_study(tmp_path / "n")
    text = (folder / "neurons.json").read_text()
    (folder / "neurons.json").write_text(text.replace("neurons/1", "neurons/2"))
    with pytest.raises(RelneuronError, match="no neuron file of format"):
        _ = load(folder).neurons


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(RelneuronError, match="holds no file of a study"):
        load(tmp_path)


# --- size ----------------------------------------------------------------------------------------


def test_counts_that_are_too_many_are_asked_for_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load(write_corpus_study(tmp_path / "s"))
    size = (tmp_path / "s" / "counts.safetensors").stat().st_size
    monkeypatch.setattr("relneuron.study.frames.MOST_BYTES", 2 * size)
    with pytest.raises(RelneuronError, match="GB as a frame") as error:
        _ = study.counts
    assert error.value.fix == "ask for one group"
    assert len(study.counts_of("en"))


LARGE = r"""
import sys
import relneuron
from relneuron.artifact.memory import peak_bytes
study = relneuron.load(sys.argv[1])
study._repr_html_()
assert len(study.responses("p7")) == 4 * 20_000
assert "torch" not in sys.modules
print(peak_bytes())
"""


def test_a_folder_of_5_gb_takes_little_memory(tmp_path: Path) -> None:
    """A file with holes in place of zeros: 15,625 prompts of four layers of 20,000 gates."""
    n, layers, width = 15_625, 4, 20_000
    header: dict[str, Any] = {
        "__metadata__": {"relneuron.responses": json.dumps({"ids": [f"p{i}" for i in range(n)]})}
    }
    step = 4 * n * width
    for la in range(layers):
        offsets = [la * step, (la + 1) * step]
        header[f"gate.{la}"] = {"dtype": "F32", "shape": [n, width], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path = tmp_path / "responses.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * step)
    assert path.stat().st_size > 5e9
    manifest = Manifest(tmp_path)
    widths = {"layers": layers, "width": width, "hidden": 0, "gated": False}
    manifest.describe(model=widths)
    manifest.save()
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 << 20


def test_the_package_brings_load() -> None:
    assert relneuron.load is load and relneuron.Study is Study
