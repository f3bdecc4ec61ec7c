"""What `ablate` is asked for, and what happens to the neurons: its options, and what they read.

The stage and cli/run.py call it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.conditions import ANALYSES, Ablation, scores_beside
from relneuron.ablation.evaluate import MODES as PLAIN
from relneuron.ablation.evaluate import POSITIONS, How
from relneuron.ablation.expertise import FORCED, forced_values
from relneuron.artifact.files import Json, RelneuronError, sha256
from relneuron.artifact.manifest import checked, same_model
from relneuron.artifact.neurons import site_widths
from relneuron.artifact.prompts import RECORDED, Prompt
from relneuron.artifact.reading import RESPONSE_ROWS, check_rows, open_tensors
from relneuron.model.batches import OOM
from relneuron.model.identity import tokenizer_digest

MODES = (*PLAIN, *FORCED)
FROM_RESPONSES = ("mean", *FORCED)  # modes that need what was recorded
MEANS_OF = ("all", "relation")
# Sets found in another way, beside the neurons, and the analysis that compares them.
SETS_BESIDE = {"concepts": "concepts/neurons.json", "gain": "attribution/neurons.json"}


@dataclass(frozen=True)
class AblateOptions:
    """What is asked, and what happens to the neurons; the defaults are the paper's.

    `analyses`: of conditions.ANALYSES, beside the sets and the random ones. `sizes`: of the sets
    of the analysis sizes; None: the paper's nine. `mode`: `zero`, `scale` (outputs times
    `factor`) or `mean` (outputs become their mean response over the det prompts: of all
    relations, or with `mean_of` "relation" of the relation that the set belongs to), or `p50`,
    `p90`, `off_mean`: the median or 90th percentile of their responses on what the set's relation
    was found with, or the mean on what it was compared with (random sets: of all of these).
    `positions`: `all` tokens, those of the `prompt`, or the `last` of the prompt and all of the
    answer; the neutral sentences have all. `generate`: answers of so many greedy tokens, right if
    they begin with the object. `any_set`: also sets named after no relation. `oom`: out of memory
    halves the batches from there on ("split") or ends the stage ("error").
    """

    splits: Sequence[str] = ("eva", "eva2")
    analyses: Sequence[str] = ()
    sizes: Sequence[int] | None = None
    random_seeds: int = 10
    mode: str = "zero"
    factor: float | None = None
    mean_of: str = "all"
    positions: str = "all"
    generate: int | None = None
    any_set: bool = False
    batch_tokens: int = 4096
    accept_object_prefix: bool = False
    oom: str = "split"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("mode", self.mode, MODES),
            ("positions", self.positions, POSITIONS),
            ("mean-of", self.mean_of, MEANS_OF),
            ("oom", self.oom, OOM),
            *(("analysis", name, ANALYSES) for name in self.analyses),
        ):
            if value not in known:
                raise RelneuronError(f"unknown {what} {value!r}", f"use {', '.join(known)}", 2)
        if (self.factor is not None) != (self.mode == "scale"):
            raise RelneuronError(
                "a factor belongs to the mode scale, and scale to a factor",
                "use --mode scale --factor 0.5, say",
                2,
            )
        if self.factor is not None and not math.isfinite(self.factor):
            raise RelneuronError(f"factor {self.factor} is not finite", "give a finite number", 2)
        for what, numbers in (
            ("sizes", self.sizes),
            ("generate", self.generate),
            ("batch-tokens", self.batch_tokens),
        ):
            given = numbers if isinstance(numbers, Sequence) else [numbers]
            if numbers is not None and min([n for n in given if n is not None], default=0) < 1:
                raise RelneuronError(
                    f"{what} {numbers} is not positive", "give a number above 0", 2
                )


def ablate_inputs(
    model: Json, tokenizer: Any, neurons: Path, prompts: Path, options: AblateOptions
) -> Json:
    """What the stage depends on, for the manifest."""
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
    read = {n: folder / n for n, folder in others.items() if folder and (folder / n).exists()}
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons),
        "prompts": sha256(prompts),
        "beside": {name: sha256(path) for name, path in read.items()},
        **{name: value for name, value in asdict(options).items() if name != "oom"},
        # What does nothing without another option is none of the inputs.
        "mean_of": options.mean_of if options.mode == "mean" else None,
        "sizes": options.sizes if "sizes" in options.analyses else None,
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
        for layer in range(shape["layers"]):
            for site, width in site_widths(shape).items():
                values = file.get(f"{site}.{layer}", (len(of), width))
                parts.append(weights @ values)
    return dict(zip(groups, np.concatenate(parts, axis=1), strict=True))


def read_how(
    options: AblateOptions,
    plan: Sequence[Ablation],
    responses: Path,
    prompts: Sequence[Prompt],
    shape: Mapping[str, int],
) -> How:
    """What happens to the neurons of each condition; values come from recorded responses."""
    if options.mode not in FROM_RESPONSES:
        return How(options.mode, options.factor or 0.0)
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
    return How("mean", 0.0, means)
