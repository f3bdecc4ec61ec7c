"""What happens to the neurons of each condition, and what the results of `ablate` depend on.

The stage and study/run.py call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.conditions import Ablation, Places, read_sets, scores_beside
from relneuron.ablation.evaluate import How
from relneuron.ablation.expertise import forced_values
from relneuron.ablation.options import FORCED, FROM_RESPONSES, AblateOptions
from relneuron.artifact.files import Json, RelneuronError, sha256
from relneuron.artifact.manifest import checked, same_model
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.prompts import RECORDED, Prompt
from relneuron.artifact.reading import RESPONSE_ROWS, check_rows, open_tensors
from relneuron.model.exchange import Exchanged
from relneuron.model.identity import tokenizer_digest
from relneuron.model.pair import Pair

# Sets found in another way, beside the neurons, and the analysis that compares them.
SETS_BESIDE = {"concepts": "concepts/neurons.json", "gain": "attribution/neurons.json"}


def files_beside(neurons: Path, prompts: Path, options: AblateOptions) -> dict[str, Path]:
    """What is read beside the neurons and the prompts, by name, of what is there."""
    others = {
        scores_beside(neurons).name: (
            neurons.parent if {"sizes", "sites"} & {*options.analyses} else None
        ),
        "responses.safetensors": neurons.parent if options.mode in FROM_RESPONSES else None,
        "labels.csv": neurons.parent if options.mode in FORCED else None,
        "prompts.jsonl": neurons.parent if options.mode in FORCED else None,
        **{
            name: neurons.parent if analysis in options.analyses else None
            for analysis, name in SETS_BESIDE.items()
        },
        "sentences.jsonl": prompts.parent if "perplexity" in options.analyses else None,
    }
    return {n: folder / n for n, folder in others.items() if folder and (folder / n).exists()}


def sets_beside(path: Path, shape: Mapping[str, int]) -> dict[str, Places]:
    """The sets of a neurons.json beside the study's own; none if it is not there."""
    if not path.exists():
        return {}
    found = NeuronFile.read(checked(path))
    found.check_model(shape)
    return read_sets(found, shape)[0]


def left_out(
    analyses: Sequence[str],
    sizes: Sequence[int],
    *,
    known: int,
    total: int,
    has: Mapping[str, bool],
) -> list[str]:
    """What was asked for and cannot be made, and why; `known` ranks of each ranking are."""
    unranked = "no scores.safetensors beside the neurons ranks them so"
    larger = ", ".join(str(size) for size in sizes if size > known)
    why = {
        f"sizes {larger}": unranked if known < total else f"the model has {total} neurons",
        "sites": unranked if known < total else "",
        **{name: f"no {path} beside the neurons" for name, path in SETS_BESIDE.items()},
        "perplexity": "no sentences.jsonl beside the prompts",
    }
    why |= {name: "" for name, is_there in has.items() if is_there}
    if not larger:
        del why["sizes "]
    return [f"{name} left out: {r}" for name, r in why.items() if r and name.split()[0] in analyses]


def by_product(neurons: NeuronFile) -> bool:
    """Whether neurons say that they were found by the gradient of what down reads.

    The gradient along a product is that along its activation or its up (methods 0.2).
    """
    how = neurons.selection.get("how")
    return isinstance(how, dict) and how.get("site") in ("product", "act", "up")


def ablate_inputs(
    model: Json,
    tokenizer: Any,
    neurons: Path,
    prompts: Path,
    options: AblateOptions,
    pair: Pair | None = None,
) -> Json:
    """What the stage depends on, for the manifest; of the donor not by which name it was given."""
    beside = files_beside(neurons, prompts, options)
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons),
        "prompts": sha256(prompts),
        "beside": {name: sha256(path) for name, path in beside.items()},
        **options.recorded(),
        "donor": same_model(pair.described[1]) if pair else None,
    }


def mean_responses(
    responses: Path, prompts: Sequence[Prompt], shape: Mapping[str, int]
) -> dict[str, np.ndarray[Any, Any]]:
    """(M,) float32 mean response of every neuron over the det prompts: of all (""), by relation."""
    made_by = "record MODEL prompts.jsonl -o DIR"
    check_rows(
        checked(responses), RESPONSE_ROWS, [p.id for p in prompts if p.split in RECORDED], made_by
    )
    of = np.array([p.relation if p.split == "det" else "" for p in prompts if p.split in RECORDED])
    groups = {"": of != ""} | {name: of == name for name in dict.fromkeys(of) if name}
    weights = np.stack([rows / rows.sum() for rows in groups.values()]).astype(np.float32)
    parts = []
    with open_tensors(responses, made_by) as file:
        for layer, site, width in Shape.of(shape).blocks():
            values = file.get(f"{site}.{layer}", (len(of), width))
            parts.append(weights @ values)
    return dict(zip(groups, np.concatenate(parts, axis=1), strict=True))


def read_how(
    options: AblateOptions,
    plan: Sequence[Ablation],
    responses: Path,
    prompts: Sequence[Prompt],
    shape: Mapping[str, int],
    *,
    by_product: bool = False,
    exchanged: Exchanged | None = None,
) -> How:
    """What happens to the neurons of each condition; values come from recorded responses.

    `by_product`: whether the neurons were found by the gradient of their product (`by_product`).
    `exchanged`: the model with another model's values, with the mode `patch`.
    """
    if options.mode not in FROM_RESPONSES:
        at = options.scale_at or ("product" if by_product else "output")
        return How(options.mode, options.factor or 0.0, at == "product", model=exchanged)
    of = {a.condition.name: a.condition.relation for a in plan}
    if options.mode in FORCED:
        found = forced_values(responses.parent, options.mode, shape)
        sets = [a.condition.relation for a in plan if a.condition.kind == "set" and a.places.size]
        if strangers := [name for name in sets if name not in found]:
            raise RelneuronError(
                f"{responses.parent / 'labels.csv'} has no positives and negatives of "
                f"{strangers[0]}: --mode {options.mode} has no value for its neurons",
                "identify its neurons with --method ap, or use another --mode",
            )
    else:
        found = mean_responses(responses, prompts, shape)
    if options.mode == "mean" and options.mean_of == "all":
        of = dict.fromkeys(of, "")
    means = {name: found.get(relation, found[""]) for name, relation in of.items()}
    return How("mean", means=means)
