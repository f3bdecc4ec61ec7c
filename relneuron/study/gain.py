"""Neurons by log-probability gain beside a study's own, as `relneuron run --analyses gain` asks.

`run.make_study` calls it; the analyses compare the two.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from relneuron.artifact.files import RelneuronError, atomic_write, writing
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import prompts_bytes, read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.rank import (
    are_dropped,
    drop_gains,
    identify_gains,
    identify_gains_inputs,
)
from relneuron.methods.gains.study import BEST
from relneuron.model.ranks import Ranks
from relneuron.model.stream.read import read_residual_model


def gain_study(
    name: str,
    model: Any,
    tokenizer: Any,
    study: Path,
    *,
    batch_tokens: int = 4096,
    oom: str = "split",
    drop: bool = False,
    ranks: Ranks | None = None,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile | None:
    """Make, or go on with, `study`/attribution: as many neurons by gain as each set has by AP.

    The gains are those of the det prompts that are answered right, which the sets were found with;
    with `drop` gains.safetensors goes once the neurons are chosen. `ranks` are processes that share
    the attribution, and wait to hear of it (`Ranks.serve`). Returns the neurons, or None,
    with a warning, if the model cannot be attributed.
    """
    try:
        read_residual_model(model)
    except RelneuronError as error:
        warnings.warn(f"gain left out: {error.cause}", stacklevel=2)
        return None
    validated = read_csv(checked(study / "validated.csv"), ("id", "correct"))
    right = {row["id"] for row in validated if row.flag("correct")}
    everything = read_prompts(checked(study / "prompts.jsonl"))
    data = prompts_bytes([p for p in everything if p.split == "det" and p.id in right])
    sets = NeuronFile.read(checked(study / "neurons.json")).sets
    chosen: dict[str, Any] = {"kept_only": False}
    chosen["top"] = {relation: len(neurons) for relation, neurons in sets.items()}
    options = AttributeOptions(
        kinds=("ffn_neuron",), top=BEST, compare=False, batch_tokens=batch_tokens, oom=oom
    )
    folder = study / "attribution"
    prompts, neurons = folder / "prompts.jsonl", folder / "neurons.json"
    with locked(folder):
        inputs = {"right": hashlib.sha256(data).hexdigest()}
        if not Manifest(folder).is_done("prompts", inputs, force=force):
            with writing("prompts", folder, [prompts]):
                atomic_write(prompts, data)
                Manifest(folder).finish("prompts", inputs, [prompts], reads=[])
        if are_dropped(folder):
            inputs = identify_gains_inputs(folder, **chosen)
            if not Manifest(folder).is_done("identify", inputs, force=force):
                Manifest(folder).forget("attribute")
        # What no manifest knows is left of a run that was killed.
        again = force or "attribute" not in Manifest(folder).data["stages"]
        (ranks or Ranks()).call(
            attribute,
            name,
            model,
            tokenizer,
            prompts,
            folder,
            options,
            backend=backend,
            force=again,
            quiet=quiet,
        )
        inputs = identify_gains_inputs(folder, **chosen)
        if not Manifest(folder).is_done("identify", inputs, force=force):
            identify_gains(folder, neurons, **chosen, force=True, quiet=quiet)
        if drop:
            drop_gains(folder)
    return NeuronFile.read(neurons)
