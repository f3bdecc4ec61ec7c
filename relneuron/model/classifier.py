"""A classifier of texts from a folder: one of its logits for each text, in batches.

`ablation/costs.py` asks it what a completion costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.model.batches import Budget, cut, shared
from relneuron.model.identity import check_model_folder
from relneuron.model.layers import first_line, input_device
from relneuron.model.load import choose_device, load_tokenizer, settle_arithmetic

TEXTS = "{n} texts of together {tokens} tokens"


class Classifier:
    """An `AutoModelForSequenceClassification` with its tokenizer, in eval mode."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._longest = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)

    def place_of(self, label: str | None) -> int:
        """Which logit a label's name or number means; without one, that of a single label."""
        names = {int(place): str(name) for place, name in self.model.config.id2label.items()}
        places = {str(place): place for place in names} | {n: place for place, n in names.items()}
        if label is None and len(names) == 1:
            return 0
        if label not in places:
            what = "has several labels" if label is None else f"has no label {label!r}"
            known = ", ".join(f"{place} ({name})" for place, name in names.items())
            raise RelneuronError(f"the classifier {self.name} {what}", f"use --label: {known}", 2)
        return places[label]

    def logits(
        self,
        texts: Sequence[str],
        label: int,
        batch_tokens: int,
        advance: Callable[[int], object] = lambda _: None,
        journal: Journal | None = None,
    ) -> list[float]:
        """The float32 logit of a label for each text, padded on the right in batches by length.

        A text has the special tokens that the tokenizer gives it. One that is longer than what
        the classifier reads raises, as does a logit that is not finite. With a `journal` its
        processes share the batches.
        """
        ids = [list(line) for line in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        for number, line in enumerate(ids, 1):
            if not 0 < len(line) <= self._longest:
                raise RelneuronError(
                    f"text {number} has {len(line)} tokens, the classifier {self.name} reads 1 to "
                    f"{self._longest}",
                    "make shorter outputs, or give a classifier that reads more",
                )
        budget = Budget(batch_tokens, journal=journal, what=TEXTS, otherwise="")

        def length(row: int) -> int:
            return len(ids[row])

        def ask(batch: list[int]) -> list[float]:
            said = budget.run(
                batch, length, lambda rows: self._ask([ids[row] for row in rows], label)
            )
            if bad := [value for value in said if not math.isfinite(value)]:
                raise RelneuronError(
                    f"the classifier {self.name} gives {bad[0]}", "use --dtype float32"
                )
            return said

        batches = cut(sorted(range(len(ids)), key=length), length, batch_tokens)
        found = [0.0] * len(ids)
        said = shared(journal, "texts", batches, ask, advance)
        for batch, values in zip(batches, said, strict=True):
            for row, value in zip(batch, values, strict=True):
                found[row] = value
        return found

    @torch.no_grad()
    def _ask(self, ids: Sequence[Sequence[int]], label: int) -> list[float]:
        """One forward. A classifier that pools the last token finds it by its pad token.

        One without a pad token gets one that no text ends in.
        """
        config, device = self.model.config.get_text_config(), input_device(self.model)
        own = config.pad_token_id
        last = {line[-1] for line in ids}
        vocabulary = self.model.get_input_embeddings().num_embeddings
        filled = (
            own if own is not None else next((t for t in range(vocabulary) if t not in last), None)
        )
        if filled is None:
            return [value for line in ids for value in self._ask([line], label)]
        longest = max(map(len, ids))
        rows = [[*line, *[filled] * (longest - len(line))] for line in ids]
        inside = [[int(place < len(line)) for place in range(longest)] for line in ids]
        try:
            config.pad_token_id = filled
            logits = self.model(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(inside, device=device),
            ).logits
        finally:
            config.pad_token_id = own
        values: list[float] = logits[:, label].float().tolist()
        return values


def load_classifier(
    name: str, *, dtype: str | None = None, device: str | None = None
) -> Classifier:
    """The classifier of a folder, with every weight from there.

    `device` defaults to the GPU if there is one, `dtype` to float32 on a CPU and else to the
    checkpoint's own.
    """
    from transformers import AutoModelForSequenceClassification

    check_model_folder(name)
    device = choose_device(device)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise RelneuronError(f"unknown dtype {dtype!r}", "use float32, bfloat16 or float16", 2)
    settle_arithmetic()
    kind = dtype or ("float32" if device == "cpu" else "auto")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=kind, output_loading_info=True
        )
    except Exception as error:  # a damaged config or weight raises whatever it leads to
        raise RelneuronError(
            f"{name} could not be loaded as a classifier of texts: {first_line(error)}",
            "give a folder of a model for sequence classification, with its tokenizer",
        ) from error
    if info["missing_keys"]:
        raise RelneuronError(
            f"{name} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}",
            "give a folder of a model that was trained to classify",
        )
    return Classifier(model.to(device).eval(), load_tokenizer(name), name)
