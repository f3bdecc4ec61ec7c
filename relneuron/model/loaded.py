"""A model and its tokenizer, as the options of a command say."""

from __future__ import annotations

from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import LoadOptions


def load(name: str, options: LoadOptions, *, needs_text: bool = True) -> tuple[Any, Any]:
    """The model and its tokenizer; without text to read it may lack one."""
    from relneuron.model.load import load_model, load_tokenizer

    model = load_model(name, revision=options.revision, dtype=options.dtype, device=options.device)
    try:
        return model, load_tokenizer(name, revision=options.revision)
    except RelneuronError:
        if needs_text:
            raise
        return model, None
