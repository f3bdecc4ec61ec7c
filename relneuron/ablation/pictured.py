"""What `ablate` and `generate` need beside a model for prompts with pictures: its processor.

Their commands and stages call it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import ATTENTION, NeuronFile
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.prompts import Prompt
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part
from relneuron.model.pictures import Processor, load_processor, picture_run
from relneuron.model.questions import Questions
from relneuron.texts.pictures import picture_digests

LANGUAGE = ("language",)


def processor_for(
    name: str, options: LoadOptions, neurons: NeuronFile, prompts: Sequence[Prompt]
) -> Processor | None:
    """The model's processor, where prompts have pictures or neurons are of what reads them."""
    if "modules" not in neurons.model and not any(prompt.images for prompt in prompts):
        return None
    return Processor(load_processor(name, revision=options.revision))


def find_for(model: Any, neurons: NeuronFile, processor: Processor | None) -> list[Part]:
    """The parts of the modules that neurons are of, with attention's where they have some."""
    modules = tuple(neurons.model.get("modules", LANGUAGE))
    if modules != LANGUAGE and processor is None:
        raise RelneuronError(
            f"the neurons are of {', '.join(modules)}, which are found with a picture",
            "give the model's processor: processor=Processor(load_processor(MODEL))",
        )
    run = picture_run(model, processor) if processor is not None else None
    attention = ATTENTION[0] in neurons.model
    return find_mlps(model, attention=attention, modules=modules, run=run)


def check_positions(positions: str, neurons: NeuronFile, prompts: Sequence[Prompt]) -> None:
    """Refuse what a vision tower has not: a last token of the prompt."""
    others = [m for m in neurons.model.get("modules", LANGUAGE) if m != "language"]
    if positions == "last" and others and any(prompt.images for prompt in prompts):
        raise RelneuronError(
            f"--positions last: what {others[0]} reads of a picture is no last token",
            "use --positions all or prompt",
            2,
        )


def pictured_inputs(processor: Processor | None, prompts: Sequence[Prompt]) -> Json:
    """What results depend on beside the prompts' file: the pictures and the processor."""
    paths = [Path(image) for prompt in prompts for image in prompt.images]
    if processor is None or not paths:
        return {}
    digest = hashlib.sha256(b"".join(picture_digests(paths, {}))).hexdigest()
    return {"pictures": digest, "processor": processor.digest()}


def first_inputs(questions: Questions, pad: Any) -> Any:
    """What the canary runs: the first prompt with pictures, or the first one's tokens."""
    for row in range(len(questions.ids)):
        if questions.has_pictures(row):
            return questions.inputs(row)
    return pad(questions.ids[:1])[0]


def alone(questions: Questions, n_seeds: int = 1) -> Any:
    """Which rows share a batch: of a prompt with pictures only its own."""

    def key(row: int) -> int:
        prompt = row // n_seeds
        return prompt if questions.has_pictures(prompt) else -1

    return key
