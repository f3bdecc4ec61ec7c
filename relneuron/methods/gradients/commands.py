"""What `attribute --method ig` and `--method relevance` do; cli/commands.py calls it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import RelneuronError, check_folder
from relneuron.artifact.gradients import COMPLETENESS, COMPLETENESS_COLUMNS, FILES, IG, Gradients
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.options import LoadOptions, refuse_stray
from relneuron.artifact.reading import read_csv
from relneuron.methods.gradients.options import GradientOptions


def attribute(
    model: str,
    prompts: Path,
    output: Path,
    options: GradientOptions,
    load_options: LoadOptions,
    *,
    method: str,
    force: bool,
    quiet: bool,
) -> Iterator[str]:
    """Says each relation's best neurons, and how far the gradients' sums are from the change."""
    from relneuron.methods.gradients.attribute import attribute as attribute_stage
    from relneuron.model.load import load

    check(prompts, output, options, load_options)
    loaded, tokenizer = load(model, load_options)
    attribute_stage(model, loaded, tokenizer, prompts, output, options, force=force, quiet=quiet)
    yield from attributed(output, method)


def check(prompts: Path, output: Path, options: GradientOptions, load_options: LoadOptions) -> None:
    """Raise for what can be refused before a model is loaded, or planned."""
    from relneuron.texts.knowledge import read_knowledge

    if load_options.backend != "auto":
        refuse_stray("--backend", "with --method gain")
    check_folder(output)
    read_knowledge(prompts, answers=options.target == "answer")


def attributed(folder: Path, method: str) -> Iterator[str]:
    """How the scores came about, how complete they are, and each relation's best neurons."""
    entry = Manifest(folder).data["stages"][f"attribute_{method}"]
    yield f"{entry['sentences']:,} sentences: {entry['how']}"
    if method == IG:
        rows = list(read_csv(folder / COMPLETENESS, COMPLETENESS_COLUMNS))
        gaps = np.array([abs(row.real("gap")) for row in rows])
        changes = np.array([abs(row.real("change")) for row in rows])
        yield (
            f"a layer's sum and the change of P differ by {np.median(gaps):.2g} in the median, by "
            f"{gaps.max():.2g} at most; P changes by {np.median(changes):.2g} and "
            f"{changes.max():.2g}"
        )
    found = Gradients.read(folder / FILES[method], method)
    for relation, scores in zip(*_means(found), strict=True):
        best = np.argsort(-scores.ravel(), kind="stable")[:5]
        shown = [f"{k // found.width}_{k % found.width} {scores.flat[k]:+.3g}" for k in best]
        yield f"{relation}: best neurons {', '.join(shown)}"


def _means(found: Gradients) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The relations, and each one's mean scores (R, L, F)."""
    sums = found.group_sums()
    return list(dict.fromkeys(found.relations)), sums["signed"] / sums["sentences"][:, None, None]


def supports(model: Any) -> tuple[str, str]:
    """The row of `relneuron doctor`: whether gradients can be taken, and how fast."""
    from relneuron.model.gradients.sites import read_sites
    from relneuron.model.gradients.staircase import read_staircase
    from relneuron.model.layers import Unfound

    try:
        read_staircase(read_sites(model))
    except RelneuronError as error:
        return "gradients", f"not supported: {error.cause}"
    except Unfound as error:
        return "gradients", f"supported, layer by layer: {error}"
    return "gradients", "supported: every layer and step from one prefill"
