"""The `attribute` stage against loops written from the formulas.

Every file is checked: scores and gains against naive_value_scores, query scores against
naive_query_scores, interventions against edited weights one sentence at a time.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from relneuron.artifact.gains import read_attributions
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import read_prompts
from relneuron.methods.gains.comparison import METHODS, Sizes
from relneuron.methods.gains.options import KINDS
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import trace
from relneuron.ops.logprob_gain.op import TopGains
from tests.kit.attributed import (
    FAMILIES,
    HEAD_DIM,
    HIDDEN,
    N_HEADS,
    N_LAYERS,
    WIDTH,
    naive_query_scores,
    naive_value_scores,
    weights_of,
)
from tests.kit.attribution_runs import OPTIONS, Attributed, rows_by
from tests.kit.files import read_rows

FILES = {
    "manifest.json",
    "prompts.jsonl",
    "targets.csv",
    "attributions.csv",
    "gains.safetensors",
    "promoted.csv",
    "interventions.csv",
    "comparison.csv",
}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Attributed:
    made = Attributed(request.param, tmp_path_factory.mktemp(request.param))
    made.attribute(made.folder / "out")
    return made


# --- what is written -------------------------------------------------------------------------


def test_targets_are_the_models_own_answers(run: Attributed) -> None:
    assert {p.name for p in (run.folder / "out").iterdir()} == FILES | {".lock"}
    rows = read_rows(run.folder / "out" / "targets.csv")
    known = run.known()
    assert 3 <= sum(known) < len(known)
    for row, name, kind, ids, target, kept in zip(
        rows, run.names, run.types, run.ids, run.targets, known, strict=True
    ):
        logits = run.logits(ids).double()
        assert [row[c] for c in ("id", "relation", "target")] == [name, kind, f"w{target}"]
        assert int(row["target_id"]) == target and int(row["n_tokens"]) == len(ids)
        assert int(row["rank"]) == 1 + int((logits > logits[target]).sum())
        assert abs(float(row["logprob"]) - float(logits.log_softmax(0)[target])) < 1e-5
        assert abs(float(row["prob"]) - float(logits.softmax(0)[target])) < 1e-5
        assert row["kept"] == str(int(kept)) and row["n_answer_tokens"] == "1"


def naive(run: Attributed, row: int, **how: bool) -> dict[str, np.ndarray[Any, Any]]:
    """The value scores of one sentence alone, without padding."""
    found = trace(read_residual_model(run.model), [run.ids[row]])
    scores = naive_value_scores(run.model, found, torch.tensor([run.targets[row]]), **how)
    return {kind: values[0].numpy() for kind, values in scores.items()}


def place_of(row: dict[str, str]) -> tuple[int, ...]:
    """Where a row of attributions.csv stands in the array of its kind."""
    names = {
        "ffn_neuron": ("layer", "index"),
        "query_ffn_neuron": ("layer", "index"),
        "attention_neuron": ("layer", "position", "head", "index"),
        "position": ("layer", "head", "position"),
        "head": ("layer", "head"),
        "query_layer": ("index",),
    }.get(row["kind"], ("layer",))
    assert all((row[name] == "") != (name in names) for name in ("head", "index", "position"))
    return tuple(int(row[name]) for name in names)


def check_rows(rows: list[dict[str, str]], expected: np.ndarray[Any, Any], top: int) -> None:
    """Rows of one kind and sentence: the `top` best of all, each with its score, best first."""
    scores = [float(row["score"]) for row in rows]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == min(top, expected.size) and scores == sorted(scores, reverse=True)
    places = [place_of(row) for row in rows]
    assert len(set(places)) == len(places)
    for place, score in zip(places, scores, strict=True):
        assert abs(score - expected[place]) < 1e-5 * max(1.0, abs(expected[place])), place
    # Nothing that was left out is better than the last that was taken.
    rest = expected.copy()
    rest[tuple(zip(*places, strict=True))] = -np.inf
    assert rest.max() <= scores[-1] + 1e-5


def test_value_scores_are_those_of_the_formulas(run: Attributed) -> None:
    rows = run.scores
    gains = load_file(run.folder / "out" / "gains.safetensors")
    assert list(rows) == [
        (name, kind)
        for name in run.names
        for kind in KINDS
        # Nothing activates value neurons that are all of the first layer.
        if kind != "query_ffn_neuron" or (name, kind) in rows
    ]
    for row, name in enumerate(run.names):
        expected = naive(run, row)
        expected["attention_neuron"] = expected["attention_neuron"].reshape(
            N_LAYERS, -1, N_HEADS, HEAD_DIM
        )
        for kind, scores in expected.items():
            whole = kind in ("ffn_layer", "attention_layer", "head")
            check_rows(rows[name, kind], scores, scores.size if whole else OPTIONS.top)
        for layer in range(N_LAYERS):
            found = gains[f"ffn.{layer}"]
            assert found.shape == (len(run.names), WIDTH) and found.dtype == np.float32
            assert np.abs(found[row] - expected["ffn_neuron"][layer]).max() < 2e-5


@pytest.mark.parametrize("query_of", ["attention", "ffn"])
def test_query_scores_are_those_of_the_formulas(
    run: Attributed, tmp_path: Path, query_of: str
) -> None:
    kinds = ("query_layer", "query_ffn_neuron", f"{query_of}_neuron")
    options = replace(OPTIONS, kinds=kinds, compare=False, query_of=query_of, key="up")
    rows = rows_by(run.attribute(tmp_path / "out", options) / "attributions.csv", "id", "kind")
    for row, name in enumerate(run.names[:4]):
        found = trace(read_residual_model(run.model), [run.ids[row]])
        units = rows[name, f"{query_of}_neuron"][: OPTIONS.query_units]
        index = [
            int(u["index"])
            if query_of == "ffn"
            else int(u["position"]) * HIDDEN + int(u["head"]) * HEAD_DIM + int(u["index"])
            for u in units
        ]
        top = TopGains(
            torch.tensor([[float(u["score"]) for u in units]]),
            torch.tensor([[int(u["layer"]) for u in units]]),
            torch.tensor([index]),
        )
        layers, neurons, _ = naive_query_scores(
            run.model, found, top, kind=query_of, n_units=OPTIONS.query_units, key="up"
        )
        check_rows(rows[name, "query_layer"], layers[0].numpy(), 2 * N_LAYERS + 1)
        # What no unit reads is left out.
        best = neurons[0].flatten().sort(descending=True).values[: OPTIONS.top]
        neurons = neurons[0].where(neurons[0] != 0, -torch.inf).numpy()
        n_best = int((best != 0).sum())
        if n_best:
            check_rows(rows[name, "query_ffn_neuron"], neurons, n_best)
        assert ((name, "query_ffn_neuron") in rows) == (n_best > 0)
        for component in rows[name, "query_layer"]:
            place = int(component["index"])
            assert component["layer"] == ("" if place == 0 else str((place - 1) // 2))


@pytest.mark.parametrize(
    "how", [{"own_norm": True}, {"norm_bias": True}, {"own_norm": True, "norm_bias": True}]
)
def test_other_norms(run: Attributed, tmp_path: Path, how: dict[str, bool]) -> None:
    options = replace(OPTIONS, **how, compare=False, mode="exact", kinds=("ffn_neuron", "head"))
    output = run.attribute(tmp_path / "out", options)
    gains, rows = load_file(output / "gains.safetensors"), read_rows(output / "attributions.csv")
    for row in (0, 4, 8):
        expected = naive(run, row, **how)
        for layer in range(N_LAYERS):
            error = np.abs(gains[f"ffn.{layer}"][row] - expected["ffn_neuron"][layer])
            assert error.max() < 2e-5
        heads = [r for r in rows if r["id"] == run.names[row] and r["kind"] == "head"]
        check_rows(heads, expected["head"], N_LAYERS * N_HEADS)


def coefficient_of(traced: Any, kind: str, e: int, row: dict[str, str]) -> float:
    """What a value neuron's vector is multiplied with in a sentence."""
    layer, index = int(row["layer"]), int(row["index"])
    if kind == "ffn_neuron":
        return float(traced.neurons[layer][e, -1, index])
    column = int(row["position"]) + int(traced.n_pad[e])
    place = int(row["head"]) * HEAD_DIM + index
    return float(traced.coefficients(layer)[e, column, place])


def test_promoted_tokens_are_at_both_ends_of_the_value_vectors(run: Attributed) -> None:
    traced = trace(read_residual_model(run.model), run.ids)
    rows = rows_by(run.folder / "out" / "promoted.csv", "kind", "layer", "head", "index")
    best: dict[tuple[str, str, str], dict[tuple[str, ...], list[float]]] = {}
    coefficients: dict[tuple[str, ...], list[float]] = {}
    for row in read_attributions(run.folder / "out"):
        if row["kind"].endswith("neuron") and int(row["rank"]) <= 10:
            unit = tuple(row[name] for name in ("kind", "layer", "head", "index"))
            if row["kind"] != "query_ffn_neuron":
                e = run.names.index(row["id"])
                found = coefficient_of(traced, row["kind"], e, row)
                coefficients.setdefault(unit, []).append(found)
            relation = run.types[run.names.index(row["id"])]
            for kind in ("", relation):
                sums = best.setdefault((row["kind"], kind, ""), {}).setdefault(unit, [0, 0.0])
                sums[0] += 1
                sums[1] += float(row["score"])
    expected = set()
    for units in best.values():
        expected |= {*sorted(units, key=lambda u: (-units[u][0], -units[u][1]))[:10]}
    assert {*rows} == expected
    is_gpt2 = run.family == "gpt2"
    norm = run.model.transformer.ln_f if is_gpt2 else run.model.model.norm
    head = run.model.lm_head.weight.detach().double() * norm.weight.detach().double()
    weights = weights_of(run.model)
    negative = 0
    for (kind, layer, j, index), tokens in rows.items():
        own = weights[int(layer)]
        place = int(index) + (int(j) * HEAD_DIM if j else 0)
        vector = (own.w_out if kind == "attention_neuron" else own.w_down)[place]
        logits = head @ (vector - vector.mean() if is_gpt2 else vector)
        order = logits.argsort(descending=True).tolist()
        order = order[:10] + order[::-1][:10]
        assert [int(t["token_id"]) for t in tokens] == order
        assert [t["token"] for t in tokens] == [f"w{t}" for t in order]
        assert [int(t["place"]) for t in tokens] == 2 * list(range(1, 11))
        assert [t["end"] for t in tokens] == ["promoted"] * 10 + ["suppressed"] * 10
        mean = float(tokens[0]["coefficient"])
        if kind != "query_ffn_neuron":
            own_mean = np.array(coefficients[kind, layer, j, index])
            assert mean == pytest.approx(own_mean.mean(), rel=1e-4, abs=1e-6)
            assert float(tokens[0]["negative"]) == pytest.approx((own_mean < 0).mean())
        negative += mean < 0
        # What the neuron writes raises these most.
        raised = (mean * logits).argsort(descending=True)[:10].tolist()
        assert [int(t["token_id"]) for t in tokens if t["acts"] == "1"] == raised
        for token in tokens:
            assert abs(float(token["logit"]) - float(logits[int(token["token_id"])])) < 1e-4
    assert 0 < negative < len(rows)


# --- the comparison --------------------------------------------------------------------------


def without(run: Attributed, ffn: list[int], attention: list[int]) -> Any:
    """A copy of the model whose neurons at these places have no value vectors."""
    edited = copy.deepcopy(run.model)
    is_gpt2 = run.family == "gpt2"
    blocks = edited.transformer.h if is_gpt2 else edited.model.layers
    for places, width, part in ((ffn, WIDTH, "mlp"), (attention, HIDDEN, "attn")):
        for place in places:
            block, index = blocks[place // width], place % width
            if is_gpt2:
                getattr(block, part).c_proj.weight.data[index] = 0
            elif part == "mlp":
                block.mlp.down_proj.weight.data[:, index] = 0
            else:
                block.self_attn.o_proj.weight.data[:, index] = 0
    return edited


def off_places(run: Attributed, condition: str, name: str, sizes: Sizes) -> Any:
    """(FFN, attention) places that a condition zeroes in a sentence, read from the files."""
    rows = {kind: run.scores.get((name, kind), []) for kind in KINDS}

    def ffn(kind: str, n: int) -> list[int]:
        return [int(r["layer"]) * WIDTH + int(r["index"]) for r in rows[kind][:n]]

    if condition == "log_prob_gain":
        return ffn("ffn_neuron", sizes.method), []
    if condition == "value":
        coordinates = [
            int(r["layer"]) * HIDDEN + int(r["head"]) * HEAD_DIM + int(r["index"])
            for r in rows["attention_neuron"]
        ]
        best = list(dict.fromkeys(coordinates))[: sizes.value_attention]
        return ffn("ffn_neuron", sizes.value_ffn), best
    if condition == "query":
        return ffn("query_ffn_neuron", sizes.query), []
    if condition == "norm":
        norms = torch.cat([w.w_down.norm(dim=1) for w in weights_of(run.model)])
        return norms.argsort(descending=True)[: sizes.method].tolist(), []
    if condition.startswith("heads:"):
        kind = condition.removeprefix("heads:")
        kept = [k == kind and known for k, known in zip(run.types, run.known(), strict=True)]
        total = np.zeros(N_LAYERS * N_HEADS)
        for other, is_of in zip(run.names, kept, strict=True):
            for r in run.scores[other, "head"]:
                total[int(r["layer"]) * N_HEADS + int(r["head"])] += is_of * float(r["score"])
        best = np.argsort(-total)[: sizes.heads].tolist()
        return [], [head * HEAD_DIM + k for head in best for k in range(HEAD_DIM)]
    assert condition == "clean"
    return [], []


def test_interventions_are_those_of_edited_weights(run: Attributed) -> None:
    out, known = run.folder / "out", run.known()
    sizes = Sizes.of(read_residual_model(run.model), OPTIONS.intervene)
    found = {(r["condition"], r["id"]): r for r in read_rows(out / "interventions.csv")}
    conditions = list(dict.fromkeys(condition for condition, _ in found))
    types = sorted({kind for kind, is_known in zip(run.types, known, strict=True) if is_known})
    assert set(conditions) == {
        *("clean", *METHODS, "value", "query", *(f"heads:{kind}" for kind in types)),
        *(f"random{part}.{seed}" for part in ("", "_value", "_query", "_heads") for seed in (0, 1)),
    }
    assert conditions[0] == "clean"
    assert {name for _, name in found} == {n for n, k in zip(run.names, known, strict=True) if k}
    assert len(found) == len(conditions) * sum(known)
    for condition in ("clean", "log_prob_gain", "norm", "value", "query", f"heads:{types[0]}"):
        for row, name in enumerate(run.names):
            if not known[row]:
                continue
            edited = without(run, *off_places(run, condition, name, sizes))
            logits = run.logits(run.ids[row], edited).double()
            target, said = run.targets[row], found[condition, name]
            assert said["relation"] == run.types[row]
            assert int(said["rank"]) == 1 + int((logits > logits[target]).sum())
            assert abs(float(said["logprob"]) - float(logits.log_softmax(0)[target])) < 1e-5
            assert abs(float(said["prob"]) - float(logits.softmax(0)[target])) < 1e-5


def test_the_table_is_the_mean_of_the_interventions(run: Attributed) -> None:
    rows = rows_by(run.folder / "out" / "interventions.csv", "condition")
    table = read_rows(run.folder / "out" / "comparison.csv")
    relations = {"", *(row["relation"] for row in rows[("clean",)])}
    assert len(table) == len(rows) * len(relations)

    def means(condition: str, relation: str) -> tuple[float, ...]:
        own = [r for r in rows[(condition,)] if relation in ("", r["relation"])]
        values = [(1 / int(r["rank"]), float(r["prob"]), float(r["logprob"])) for r in own]
        return tuple(sum(column) / len(values) for column in zip(*values, strict=True))

    for row in table:
        clean, own = means("clean", row["relation"]), means(row["condition"], row["relation"])
        drops = [(b - a) / b for a, b in zip(own[:2], clean[:2], strict=True)]
        expected = (*own, *drops, clean[2] - own[2])
        names = ("mrr", "prob", "logprob", "mrr_drop", "prob_drop", "logprob_drop")
        for name, value in zip(names, expected, strict=True):
            assert abs(float(row[name]) - value) < 1e-6, (row, name)
            if name.endswith("drop") and int(row["n"]) > 1:
                low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
                assert low <= high


def test_the_manifest_says_how(run: Attributed) -> None:
    manifest = Manifest(run.folder / "out")
    entry = manifest.data["stages"]["attribute"]
    assert {*entry["files"]} == FILES - {"manifest.json"}
    assert all(manifest.is_intact(name) for name in entry["files"])
    assert (entry["sentences"], entry["kept"]) == (12, sum(run.known()))
    norm = run.model.config.rms_norm_eps if run.family == "llama" else 1e-5
    assert entry["final_norm"]["eps"] == norm and entry["final_norm"]["scale"] == "frozen"
    kind = {"llama": ("RMSNorm", "silu"), "gpt2": ("LayerNorm", "gelu_new")}[run.family]
    described = manifest.data["model"]
    assert (entry["final_norm"]["kind"], described["activation"]) == kind
    shape = [described[key] for key in ("layers", "width", "hidden")]
    assert shape == [N_LAYERS, WIDTH, HIDDEN]
    assert entry["tokens"]["answers_of_several_tokens"] == 0
    assert "within 1e-05 nats" in entry["ffn_gains"]
    gains = load_file(run.folder / "out" / "gains.safetensors")
    mean = {
        (layer, k): float(np.mean([values[i, k] for i, t in enumerate(run.types) if t == "color"]))
        for layer in range(N_LAYERS)
        for values in [gains[f"ffn.{layer}"]]
        for k in range(WIDTH)
    }
    best = sorted(mean, key=lambda place: -mean[place])[:5]
    assert [(layer, k) for layer, k, _ in entry["best"]["color"]] == best
    assert all(abs(gain - mean[la, k]) < 1e-6 for la, k, gain in entry["best"]["color"])
    prompts = read_prompts(run.folder / "out" / "prompts.jsonl")
    assert [(p.id, p.relation, p.split) for p in prompts] == [
        (name, kind, "eva") for name, kind in zip(run.names, run.types, strict=True)
    ]
