"""A model's processor: from pictures and a text to what a forward takes.

`count`, and whatever asks with pictures, make their inputs here; `model/mlps/` finds the neurons
of a vision tower in a forward with a picture that is made here, too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.model.identity import tokenizer_digest
from relneuron.model.layers import compute_dtype, first_line, input_device

_MASKS = ("attention_mask", "qformer_attention_mask")  # of text


def reads_pictures(model: Any) -> bool:
    """Whether a model is of a kind that transformers gives pictures and text."""
    import transformers as hf

    return type(getattr(model, "config", None)) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_processor(name: str, *, revision: str | None = None) -> Any:
    """The processor that belongs to a model, from its folder or the hub."""
    from transformers import AutoProcessor

    need("reading pictures", "PIL")
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError("it has only a tokenizer")
    except Exception as error:  # each processor has errors of its own
        fix = "save the model's processor into its folder (processor.save_pretrained)"
        if isinstance(error, ImportError) and "orchvision" in str(error):
            fix = "install the torchvision that belongs to the torch which is here"
        raise RelneuronError(f"{name} has no usable processor: {first_line(error)}", fix) from error
    return processor


class Processor:
    """A processor of transformers, and how it is asked.

    marker  what stands for one picture in a text: the processor's own image token with what its
            chat template puts around it; "" where the processor puts it there itself
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        token = getattr(processor, "image_token", None)
        self.token = str(getattr(token, "content", token)) if token is not None else ""
        self.marker = "" if self._is_put_by_itself() else self._in_chat() or self.token

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def inputs(self, pictures: Sequence[Any], text: str, where: str) -> dict[str, Tensor]:
        """What a forward takes (B = 1, nothing padded) for pictures (PIL, RGB) and a text.

        A text that has a marker for each of its pictures, or the bare image token, stays as it is;
        before any other one stands a line with a marker for each picture (`<image>\\n{text}`, as
        arXiv 2406.11193 asks). `where` is how an error calls the record. Patches that a processor
        fills a picture up with are run, and count, as any others.
        """
        found = max(text.count(one) if one else 0 for one in (self.marker, self.token))
        if self.marker and found not in (0, len(pictures)):
            raise RelneuronError(
                f"{where}: the text has {found} {self.token}, the record {len(pictures)} pictures",
                "give as many of one as of the other, or leave them out of the text",
            )
        if self.marker and not found:
            text = f"{self.marker}\n" * len(pictures) + text
        try:
            made = self.processor(images=list(pictures), text=text, return_tensors="pt")
        except Exception as error:  # each processor has errors of its own
            raise RelneuronError(
                f"{where}: the processor does not take it ({first_line(error)})",
                "give every record all that the model's processor needs, text and pictures",
            ) from error
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        if not all(tensors[name].all() for name in _MASKS if name in tensors):
            raise RelneuronError(
                f"{where}: the processor pads a text that is alone",
                "save it with padding False (processor.tokenizer, save_pretrained)",
            )
        return tensors

    def _is_put_by_itself(self) -> bool:
        try:
            made = self.processor(images=[_small_picture()], text="a", return_tensors="pt")
        except Exception:  # one that misses its token in the text
            return False
        own = self.tokenizer.convert_tokens_to_ids(self.token) if self.token else None
        return own is None or bool((made["input_ids"] == own).any())

    def _in_chat(self) -> str:
        """What the chat template writes for a picture; "" without one."""
        if not getattr(self.processor, "chat_template", None):
            return ""
        text = {"type": "text", "text": "a"}

        def said(*parts: Mapping[str, str]) -> str:
            turn = [{"role": "user", "content": list(parts)}]
            return str(self.processor.apply_chat_template(turn, tokenize=False))

        try:
            with_picture, without = said({"type": "image"}, text), said(text)
        except Exception:  # a template that takes no list of parts
            return ""
        begin = len(commonprefix([with_picture, without]))
        end = len(with_picture) - len(without) + begin
        return with_picture[begin:end].strip()

    def digest(self) -> str:
        """The SHA-256 of all that decides what it makes of pictures and texts."""
        own = {name: value for name, value in self.processor.to_dict().items() if name != "_commit"}
        parts = [getattr(self.processor, name, None) for name in ("tokenizer", "qformer_tokenizer")]
        pixels = self.processor.image_processor
        about = [type(self.processor).__name__, type(pixels).__name__, self.marker]
        rules = [own, pixels.to_dict(), [tokenizer_digest(part) for part in parts], about]
        rules.append(getattr(self.processor, "chat_template", None))
        return hashlib.sha256(json.dumps(rules, sort_keys=True, default=repr).encode()).hexdigest()


def sent(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model takes them; pixels in the dtype that it computes in."""
    device, dtype = input_device(model), compute_dtype(model)
    return {
        name: x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
        for name, x in inputs.items()
    }


def picture_run(model: Any, processor: Processor) -> Callable[[], object]:
    """A forward of a small made picture and three words, without a cache, uncompiled."""
    inner = getattr(model, "_orig_mod", model)
    takes = inspect.signature(inner.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    inputs = processor.inputs([_small_picture()], "what is this?", "a small picture")

    def run() -> object:
        return inner.forward(**sent(inner, inputs), **options)

    return run


def _small_picture() -> Any:
    """A picture of random colours, the same each time."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
