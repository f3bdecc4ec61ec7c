"""The `identify` stage on an attribution: gains of sentences in, neuron sets of relations out.

`relneuron identify --method logprob_gain` calls it. It needs no model: a relation's neurons are
those whose write raises the log-probability of its answers most, on average over its sentences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    real_path,
    refuse_output,
    require,
    sha256,
    writing,
)
from relneuron.artifact.gains import (
    GAIN_ROWS,
    GAINS,
    MADE_BY,
    TARGETS,
    GainFile,
    Target,
    ffn_widths,
    number,
    read_gains,
    read_targets,
)
from relneuron.artifact.journal import progress_bar
from relneuron.artifact.manifest import MODEL_KEYS, Manifest, checked, json_digest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron, default_top, shape_of
from relneuron.artifact.reading import check_rows
from relneuron.artifact.stage import command, placed

METHOD = "logprob_gain"
N_NAMED = 5  # best neurons of a relation that the manifest names

Array = np.ndarray[Any, Any]


def identify_gains_inputs(
    folder: Path, *, top: int | Mapping[str, int] | None, kept_only: bool
) -> Json:
    """What the stage depends on, for the manifest; gains that were dropped are as noted there."""
    described = Manifest(folder).data
    known = {name: about for name, about in described["files"].items() if about.get("dropped")}
    digests = {
        name: known[name]["sha256"] if name in known else sha256(require(folder / name, MADE_BY))
        for name in (TARGETS, GAINS)
    }
    return {
        "digests": digests,
        "attribute": json_digest(described["stages"].get("attribute", {}).get("inputs")),
        "method": METHOD,
        "top": dict(top) if isinstance(top, Mapping) else top,
        "kept_only": kept_only,
    }


def are_dropped(folder: Path) -> bool:
    """Whether the gains of a finished attribution were deleted to save space."""
    return bool(Manifest(folder).data["files"].get(GAINS, {}).get("dropped"))


def drop_gains(folder: Path) -> None:
    """Delete the gains of a finished attribution; what was made from them stays done."""
    Manifest(folder).drop(GAINS)


def check_top(top: int | Mapping[str, int] | None) -> None:
    """Refuse numbers of neurons that are none."""
    wrong = [n for n in top.values() if n < 0] if isinstance(top, Mapping) else []
    if isinstance(top, int) and top < 1:
        wrong = [top]
    if wrong:
        cause = f"--top must be at least 1, got {wrong[0]}"
        raise RelneuronError(cause, "choose a positive number", 2)


def identify_gains(
    folder: Path,
    output: Path,
    *,
    top: int | Mapping[str, int] | None = None,
    kept_only: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile:
    """Choose each relation's neurons by the gains that `attribute` left in `folder`.

    A neuron's score is the mean of its gain, log p(w | x + m v) - log p(w | x) in nats (arXiv
    2312.12141), over the relation's attributed sentences, or with `kept_only` over those that the
    model knows (methods B7). A set has the `top` FFN neurons with the highest scores (default:
    `identify.default_top`; a mapping gives each relation its own number); they are named by the
    site `gate`, since to zero a gate zeroes all that the neuron writes.

    Beside neurons.json stands scores.safetensors (beside x.json x.scores.safetensors) with
    `logprob_gain.gate` (R, L, F) float32, of layers that have fewer neurons with zeros behind; the
    metadata name the relations. One layer of gains is in memory at a time.
    """
    check_top(top)
    refuse_output(output, "identify", force)
    model, targets = _read(folder)
    shape = shape_of(model)
    inputs = identify_gains_inputs(folder, top=top, kept_only=kept_only)
    relations = sorted({target.relation for target in targets})
    group = _groups(folder, targets, relations, kept_only)
    k = default_top(shape) if top is None else top
    scores = np.zeros((len(relations), shape["layers"], shape["width"]), np.float32)
    bar = progress_bar(shape["layers"], "identify", "layer", quiet)
    with locked(output.parent), bar:
        for layer, gains in read_gains(folder / GAINS, shape, len(targets)):
            _check_finite(folder, layer, gains[group >= 0])
            scores[:, layer, : gains.shape[1]] = mean_gains(gains, group, len(relations))
            bar.update()
        sets, selection = {}, {}
        for row, name in enumerate(relations):
            n = int((group == row).sum())
            own = k.get(name, 0) if isinstance(k, Mapping) else k
            ranked = of_neurons(scores[row], shape)
            sets[name] = best_neurons(ranked, own) if n else []
            selection[name] = _cut(ranked, [score for *_, score in sets[name]], n)
        result = NeuronFile(model, METHOD, sets, selection)
        # A second choice in a folder leaves the scores of the first one as they are.
        stem = "" if output.name == "neurons.json" else f"{output.stem}."
        path = output.parent / f"{stem}scores.safetensors"
        # One key only: safetensors writes several in an order that changes from run to run.
        data = save({f"{METHOD}.gate": scores}, {"relations": json.dumps(relations)})
        manifest = Manifest(output.parent)
        is_elsewhere = real_path(output.parent) != real_path(folder)
        if is_elsewhere and "record" not in manifest.data["stages"]:
            described = Manifest(folder).data
            kept = ("versions", "model", "dtype", "fallbacks")
            manifest.describe(**{key: described[key] for key in kept if key in described})
        stage = _stage(manifest, output)
        with writing("identify", output.parent, [path, output]):
            atomic_write(path, data)
            result.write(output)
            if stage == "identify":
                _remove_replaced(manifest, {path.name, output.name})
            manifest.finish(
                stage,
                inputs,
                [path, output],
                reads=[folder / TARGETS, folder / GAINS],
                top=dict(k) if isinstance(k, Mapping) else k,
                commands=[]  # no command gives each relation its own number
                if isinstance(top, Mapping)
                else command(
                    "identify",
                    *(placed(folder, output.parent), "-o", placed(output, output.parent)),
                    method=METHOD,
                    top=top,
                    kept_only=kept_only,
                ),
            )
    return result


def _stage(manifest: Manifest, output: Path) -> str:
    """What the manifest calls this stage: not `identify`, if that is of another method's neurons.

    So neurons by gain may stand beside those of a recorded study, which stay as they are.
    """
    before = manifest.data["stages"].get("identify", {}).get("inputs", {}).get("method", METHOD)
    is_beside = before != METHOD and output.name != "neurons.json"
    return "identify_gains" if is_beside else "identify"


def _remove_replaced(manifest: Manifest, written: set[str]) -> None:
    """Delete what another method said of the neurons that are replaced: labels, significance."""
    entry = manifest.data["stages"].get("identify", {"inputs": {}, "files": []})
    if entry["inputs"].get("method") != METHOD:
        for name in set(entry["files"]) - written:
            (manifest.path.parent / name).unlink(missing_ok=True)


def _read(folder: Path) -> tuple[Json, list[Target]]:
    """The model and the sentences of a finished attribution; its files must be as it left them."""
    manifest = Manifest(folder)
    entry, model = manifest.data["stages"].get("attribute"), manifest.data.get("model")
    if entry is None or model is None:
        raise RelneuronError(
            f"{folder} has no finished attribution in its manifest",
            f"make it with: relneuron {MADE_BY}",
        )
    attributed = entry["inputs"].get("model", model)
    if any(attributed.get(key) != model.get(key) for key in MODEL_KEYS):
        raise RelneuronError(
            f"{folder} holds the attribution of another model than the one it was recorded with",
            f"make it again in another folder: relneuron {MADE_BY}",
        )
    if GAINS not in entry["files"]:
        raise RelneuronError(
            f"{folder} has no {GAINS}: the FFN neurons were not scored",
            f"score them with: relneuron {MADE_BY} --kinds ffn_neuron --force",
        )
    for name in (TARGETS, GAINS):
        require(checked(folder / name), MADE_BY)
    targets = read_targets(folder / TARGETS)
    check_rows(folder / GAINS, GAIN_ROWS, [target.id for target in targets], MADE_BY)
    return model, targets


def _groups(
    folder: Path, targets: Sequence[Target], relations: Sequence[str], kept_only: bool
) -> Array:
    """(N,) int64 the relation's place of each sentence whose gains count, else -1."""
    inputs = Manifest(folder).data["stages"]["attribute"]["inputs"]
    # Of sentences that were left out there are no gains.
    kept_only = kept_only or inputs["keep"] == "known"
    place = {name: number for number, name in enumerate(relations)}
    taken = [place[t.relation] if t.kept or not kept_only else -1 for t in targets]
    if max(taken) < 0:
        raise RelneuronError(
            f"{folder / TARGETS}: the model knows the answer of no sentence",
            "leave out --kept-only, or attribute with --keep all",
        )
    return np.array(taken, np.int64)


def _check_finite(folder: Path, layer: int, gains: Array) -> None:
    if not np.isfinite(gains).all():
        raise RelneuronError(
            f"{folder / GAINS}: gains of layer {layer} are not all finite",
            "attribute with --dtype float32 or bfloat16",
        )


def _cut(scores: Array, chosen: Sequence[float], n_sentences: int) -> Json:
    """What neurons.json says of a relation's cut."""
    if not n_sentences:
        return {"sentences": 0, "reason": "no sentence whose answer the model knows"}
    if not chosen:
        return {"sentences": n_sentences, "reason": "none was asked for"}
    cut = chosen[-1]
    return {
        "sentences": n_sentences,
        "score_at_cut": cut,
        "ties_at_cut": int((scores == np.float32(cut)).sum()),
        "ties_chosen": sum(score == cut for score in chosen),
    }


# From sentences to relations


def mean_gains(gains: Array, group: Array, n_groups: int) -> Array:
    """The mean over each group's sentences: (G, F) float32, summed in float64.

    `gains` (N, F) nats, `group` (N,) int64 the group of each sentence, -1 for none. A group
    without sentences has NaN.
    """
    means = np.full((n_groups, gains.shape[1]), np.nan, np.float32)
    for place in range(n_groups):
        rows = gains[group == place]
        if len(rows):
            means[place] = rows.mean(0, dtype=np.float64)
    return means


def of_neurons(scores: Array, shape: Mapping[str, Any]) -> Array:
    """Scores (L, F), -inf at what are no neurons of layers that have fewer than F."""
    if "widths" not in shape:
        return scores
    beyond = np.arange(scores.shape[1]) >= np.array(shape["widths"])[:, None]
    return np.where(beyond, -np.inf, scores).astype(scores.dtype)


def best_neurons(scores: Array, k: int) -> list[ScoredNeuron]:
    """The k neurons with the highest scores (L, F), best first; equal ones by layer, then index.

    None that has -inf. Their site is `gate`: a neuron whose gate is zero writes zero, so it stands
    for the product.
    """
    flat = scores.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:k]
    order = order[flat[order] > -np.inf]
    layers, indices = np.divmod(order, scores.shape[1])
    return [
        (layer, "gate", index, score)
        for layer, index, score in zip(
            layers.tolist(), indices.tolist(), flat[order].tolist(), strict=True
        )
    ]


def best_by_relation(
    gains: GainFile, shape: Mapping[str, Any], targets: Sequence[Target], keep: str
) -> Json:
    """Each relation's FFN neurons with the highest mean gain: [layer, index, nats], best first."""
    relations = sorted({target.relation for target in targets})
    place = {name: number for number, name in enumerate(relations)}
    taken = np.array([place[t.relation] if t.kept or keep == "all" else -1 for t in targets])
    n_sentences = np.bincount(taken[taken >= 0], minlength=len(relations))
    scores = np.zeros((len(relations), shape["layers"], shape["width"]), np.float32)
    for layer, width in enumerate(ffn_widths(shape)):
        sums = np.zeros((len(relations), width))
        for rows, block in gains.blocks(layer):
            add_rows(sums, block, taken[rows])
        with np.errstate(invalid="ignore"):  # of a relation without sentences
            scores[:, layer, :width] = sums / n_sentences[:, None]
    return {
        name: [
            [layer, index, float(number(score))]
            for layer, _, index, score in best_neurons(of_neurons(scores[row], shape), N_NAMED)
        ]
        for row, name in enumerate(relations)
        if row in taken
    }


def add_rows(sums: Array, values: Array, group: Array) -> None:
    """Add each row of `values` (n, F) to the float64 sums (G, F) of its group; -1 is none.

    One after the other, as `mean` adds them, so that it does not matter how they are cut.
    """
    for place in np.unique(group[group >= 0]).tolist():
        rows = np.concatenate([sums[place][None], values[group == place]], dtype=np.float64)
        sums[place] = rows.sum(0)
