"""The `identify` stage: responses and answers in, scores, neuron sets and their significance out.

It needs no model: it ranks every neuron by average precision, takes each relation's best (--top)
or all that pass a false discovery rate (--fdr), and says how sure each one's score is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from relneuron import ops
from relneuron.artifact.effects import fact_numbers
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_output,
    require,
    sha256,
    writing,
)
from relneuron.artifact.installed import need
from relneuron.artifact.journal import progress_bar
from relneuron.artifact.manifest import Manifest, checked, json_digest, locked
from relneuron.artifact.neurons import NeuronFile, Shape, default_top
from relneuron.artifact.prompts import RECORDED, Prompt, read_prompts, relation_names
from relneuron.artifact.reading import RESPONSE_ROWS, check_rows, open_tensors, read_csv
from relneuron.artifact.stage import command, placed
from relneuron.methods.responses import significance
from relneuron.methods.responses.choice import choose
from relneuron.methods.responses.labels import sample_labels, why_unranked
from relneuron.methods.responses.options import RankOptions
from relneuron.methods.responses.places import Kept, blocks_of

METHOD = "ap"
RECORD = "record MODEL prompts.jsonl -o DIR"
COLUMNS = (
    *("relation", "layer", "site", "index", "score"),
    *("p_permutation", "q_value", "ap_low", "ap_high"),
)

Array = np.ndarray[Any, Any]


def identify_inputs(folder: Path, options: RankOptions) -> Json:
    """What the stage depends on, for the manifest."""
    names = ("prompts.jsonl", "validated.csv")
    return {
        "digests": {name: sha256(require(folder / name, RECORD)) for name in names},
        "record": json_digest(Manifest(folder).data["stages"].get("record", {}).get("inputs")),
        "method": METHOD,
        **options.recorded(),
    }


def check_installed(noise: int) -> None:
    """Refuse q-values without the library that makes them, before any work."""
    if noise:
        need("a q-value", "scipy", otherwise=", or --noise 0 for none")


def identify(
    folder: Path,
    output: Path,
    options: RankOptions | None = None,
    *,
    responses: Kept | None = None,
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile:
    """Score every neuron for every relation and write each relation's best to `output`.

    A relation's positives are its validated det prompts, its negatives `negatives` times as many
    of the other relations' (labels.csv says which). Its neurons are the `top` with the highest
    scores (default: `default_top`), or with `fdr` every one with q <= fdr. `ends`: `bottom` takes
    those with the lowest scores, the lowest first, `both` one half of each, the highest before the
    lowest (for which p and q ask how often chance is as low). Beside neurons.json
    stand labels.csv, scores.safetensors with `ap.gate`, `ap.up` (R, L, F) and `ap.down` (R, L, D)
    float32, and significance.csv: for each chosen neuron its p-value from `permutations` shuffled
    labels, its q-value from `noise` columns of noise and the 95 % interval of its score from
    `bootstrap` resamples of the facts; a cell is empty where the number is 0.

    One layer and site is in memory at a time; the responses are read twice if there are
    permutations or resamples. `responses` that `record` kept (`places.Store`) are ranked where they
    are, in place of those of responses.safetensors: the files are the same.
    """
    options = options or RankOptions()
    top, fdr, ends, seed = options.top, options.fdr, options.ends, options.seed
    permutations, bootstrap, noise = options.permutations, options.bootstrap, options.noise
    check_installed(noise)
    refuse_output(output, "identify", force)
    relations, prompts, valid = _read_answers(folder)
    model = Manifest(folder).data.get("model")
    if model is None:
        raise RelneuronError(
            f"{folder} has no record in its manifest", f"record it with: relneuron {RECORD} --force"
        )
    order = Shape.of(model)
    widths = order.widths
    inputs = identify_inputs(folder, options)

    asked = fact_numbers([prompt.id for prompt in prompts], {p.id: p for p in prompts})
    labels = sample_labels(
        relations,
        [prompt.relation if prompt.split == "det" else "" for prompt in prompts],
        valid,
        negatives=options.negatives,
        own_negatives=[prompt.negative_of for prompt in prompts],
        seed=seed,
    )
    reasons = {name: why_unranked(row) for name, row in zip(relations, labels, strict=True)}
    usable = [row for row, name in enumerate(relations) if reasons[name] is None]
    if not usable:
        found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RelneuronError(
            f"no relation has both a correct det prompt and others to compare with ({found})",
            "give facts that the model knows, of at least two relations",
        )
    ids = [prompt.id for prompt in prompts]
    reads = [folder / "prompts.jsonl", folder / "validated.csv"]
    if responses is not None:
        if responses.ids != ids:
            raise RelneuronError(
                f"the responses are of other prompts than {folder / 'prompts.jsonl'}",
                "rank them in the folder that they were recorded for",
            )
        blocks, rows = partial(blocks_of, responses), responses.rows
    else:
        path = require(folder / "responses.safetensors", f"{RECORD} --force")
        check_rows(checked(path), RESPONSE_ROWS, ids, RECORD)
        reads.append(path)
        blocks, rows = partial(_read_blocks, path, order, len(prompts)), np.arange(len(prompts))
    n_blocks = len(list(order.blocks()))
    n_noise = len(list(significance.blocks(noise, 8 * len(prompts))))
    total = n_blocks * (2 if permutations or bootstrap else 1) + n_noise
    with locked(output.parent), progress_bar(total, "identify", "block", quiet) as bar:
        scores = {
            site: np.full((len(relations), order.layers, width), np.nan, np.float32)
            for site, width in widths.items()
        }
        picked = torch.from_numpy(labels[usable][:, np.argsort(rows)])
        for layer, site, values in blocks(bar.update):
            # NaN and infinities show in the extremes, without a copy of the block.
            if not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
                raise RelneuronError(
                    f"responses of layer {layer}, {site} are not all finite",
                    "record with --dtype float32 or bfloat16",
                )
            of_block = ops.average_precision(values, picked).cpu().numpy()
            scores[site][usable, layer, : of_block.shape[1]] = of_block
            del values  # before the next block is read
        key = significance.seed_of("noise", seed)
        null = significance.noise_ap(labels[usable], noise, key, bar.update)

        k = top if top is not None else default_top(model)
        size = min(k, order.total)
        n_lowest = {"top": 0, "bottom": size, "both": size // 2}[ends]
        selection: dict[str, Json] = {name: {"reason": reasons[name]} for name in relations}
        chosen: dict[str, significance.Significance] = {}
        for row, own_null in zip(usable, null, strict=True):
            name = relations[row]
            own = {site: scores[site][row] for site in widths}
            facts = {
                "positives": int((labels[row] == 1).sum()),
                "negatives": int((labels[row] == 0).sum()),
            }
            neurons, q, cut = choose(own, own_null, size, fdr, n_lowest, order)
            selection[name] = facts | cut
            chosen[name] = significance.Significance(
                *(name, labels[row], neurons, q, permutations, bootstrap, seed, asked, n_lowest)
            )
        if permutations or bootstrap:
            for layer, site, values in blocks(bar.update):
                for relation in chosen.values():
                    relation.measure(layer, site, values, rows)
                del values
            for relation in chosen.values():
                relation.finish()

        sets = {name: list(chosen[name].neurons) if name in chosen else [] for name in relations}
        result = NeuronFile(model, METHOD, sets, selection)
        written = {
            "scores.safetensors": save(
                {f"ap.{site}": scores[site] for site in widths},
                # One key only: safetensors writes several in an order that changes from run to run.
                {"relations": json.dumps(relations)},
            ),
            "labels.csv": csv_bytes(
                ("relation", "id", "label"), _label_rows(relations, prompts, labels)
            ),
            "significance.csv": csv_bytes(COLUMNS, _significance_rows(chosen)),
        }
        files = [output.parent / name for name in written]
        manifest, recorded = Manifest(output.parent), Manifest(folder).data
        manifest.describe(
            model=model,
            seeds=manifest.data.get("seeds", {}) | {"negatives": seed, "significance": seed},
            memory=recorded.get("memory", {})
            | _memory(labels, order, permutations, bootstrap, noise),
        )
        details: Json = {"top": k, "share_of_neurons": k / order.total} if fdr is None else {}
        made_by = command(
            "identify",
            *(placed(folder, output.parent), "-o", placed(output, output.parent)),
            *("--method", METHOD, *options.words()),
        )
        files.append(output)
        with writing("identify", output.parent, files):
            for file, data in zip(files, written.values(), strict=False):
                atomic_write(file, data)
            result.write(output)
            manifest.finish("identify", inputs, files, reads=reads, commands=made_by, **details)
    return result


# --- reading ---------------------------------------------------------------------------------


def _read_answers(folder: Path) -> tuple[list[str], list[Prompt], list[bool]]:
    """The relations, the recorded prompts, and whether the model answered each correctly."""
    everything = read_prompts(checked(folder / "prompts.jsonl"))
    prompts = [prompt for prompt in everything if prompt.split in RECORDED]
    path = require(checked(folder / "validated.csv"), RECORD)
    rows = read_csv(path, ("id", "correct"))
    correct = {row["id"]: row.flag("correct") for row in rows}
    unknown = [prompt.id for prompt in prompts if prompt.id not in correct]
    if unknown:
        raise RelneuronError(
            f"{folder / 'validated.csv'} lacks the prompt {unknown[0]} of prompts.jsonl",
            f"record these prompts again: relneuron {RECORD} --force",
        )
    return relation_names(everything), prompts, [correct[prompt.id] for prompt in prompts]


def _read_blocks(
    path: Path, order: Shape, n_prompts: int, advance: Callable[[], object]
) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, site, values (N, F) or (N, D)) of responses.safetensors, one at a time."""
    for layer, site, width in order.blocks():
        # Opened again for each block: as long as a file is open, all that was read of it stays in
        # this process's memory.
        with open_tensors(path, RECORD, "pt") as file:
            values = file.get(f"{site}.{layer}", (n_prompts, width))
        yield layer, site, values
        del values
        advance()


# --- writing ---------------------------------------------------------------------------------


def _label_rows(
    relations: Sequence[str], prompts: Sequence[Prompt], labels: Array
) -> Iterator[tuple[str, str, int]]:
    for name, row in zip(relations, labels, strict=True):
        for prompt, label in zip(prompts, row, strict=True):
            if label >= 0:
                yield name, prompt.id, int(label)


def _significance_rows(
    chosen: Mapping[str, significance.Significance],
) -> Iterator[tuple[object, ...]]:
    """In the order of neurons.json; six digits, and an empty cell for what was not asked for."""
    for name, found in chosen.items():
        numbers = np.stack([found.p, found.q, *found.interval], axis=1).tolist()
        for neuron, row in zip(found.neurons, numbers, strict=True):
            yield name, *neuron, *("" if math.isnan(x) else f"{x:.6g}" for x in row)


def _memory(labels: Array, order: Shape, permutations: int, bootstrap: int, noise: int) -> Json:
    """What the stage holds at a time, in bytes, for the manifest; the same on every machine."""
    n_relations, n_prompts = labels.shape
    block = 4 * n_prompts * max(order.widths.values())
    # Scores and the noise's; a p, a q and what sorting them needs for one relation.
    held = 4 * n_relations * (order.total + noise) + 48 * order.total
    # Shuffled labels or multiplicities of one relation: one byte each, ten while they are drawn.
    drawn = 10 * int((labels >= 0).sum(1).max()) * max(permutations, bootstrap)
    return {
        "scoring": "streamed by layer and site: one block of responses in memory",
        "scoring_block_bytes": block,
        # A block and, first its bytes in the file, then the columns of one relation's neurons;
        # two buffers of noise or of APs; what waits of each relation, and once more joined.
        "identify_bytes": 2 * block
        + held
        + drawn
        + 2 * significance.BLOCK_BYTES
        + (n_relations + 1) * significance.WAITING_BYTES,
    }
