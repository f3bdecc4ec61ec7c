"""Ask a model its prompts: tokens, batches, the greedy answer of two tokens, and its correctness.

The `record` and `ablate` stages call it, so both ask in exactly the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact import Prompt, RelneuronError

N_ANSWER_TOKENS = 2  # arXiv 2502.17355, section 3.2


def is_correct(prediction: str, answer: str, *, accept_object_prefix: bool = False) -> bool:
    """Whether a prediction is a non-empty prefix of the answer, ignoring case and outer space.

    `accept_object_prefix` also accepts a prediction that the answer is a prefix of ("Japan." for
    "Japan"); the paper's rule (arXiv 2502.17355, section 3.2) does not.
    """
    given, wanted = prediction.strip().lower(), answer.strip().lower()
    if not given:
        return False
    return wanted.startswith(given) or (accept_object_prefix and given.startswith(wanted))


@dataclass(frozen=True)
class Questions:
    """Prompts as tokens: `ids` of each prompt and the first token of its object's answer."""

    prompts: list[Prompt]
    ids: list[list[int]]
    answers: list[int]


def encode(tokenizer: Any, model: Any, prompts: Sequence[Prompt]) -> Questions:
    """Tokenise prompts with the tokenizer's own special tokens (BOS, where it adds one).

    Raises RelneuronError for an empty prompt and for one that does not fit the context.
    """
    ids = tokenizer([prompt.prompt for prompt in prompts])["input_ids"]
    full = tokenizer([f"{prompt.prompt} {prompt.object}" for prompt in prompts])["input_ids"]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(max(line, default=0) for line in full)
    if largest >= vocabulary:
        raise RelneuronError(
            f"the tokenizer made the token {largest}, the model has {vocabulary} tokens",
            "give a model and a tokenizer that belong together",
        )
    answers = []
    for prompt, head, whole in zip(prompts, ids, full, strict=True):
        if not head:
            raise RelneuronError(f"prompt {prompt.id} has no token", "remove the empty prompt")
        if context is not None and len(head) + N_ANSWER_TOKENS > context:
            raise RelneuronError(
                f"prompt {prompt.id} has {len(head)} tokens; with {N_ANSWER_TOKENS} for the answer "
                f"it is longer than the model's context of {context}",
                "shorten or remove it",
            )
        common = next(
            (i for i, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1]),
            min(len(head), len(whole) - 1),
        )
        answers.append(whole[common])
    return Questions(list(prompts), [list(head) for head in ids], answers)


def plan_batches(questions: Questions, batch_tokens: int) -> list[list[int]]:
    """Indices of the prompts in batches of one split and language, at most `batch_tokens` padded.

    Sorted by length within a split, so that a prompt's batch does not depend on other splits and
    every stage that asks a split asks it in the same batches.
    """
    kinds = [(prompt.split, prompt.language) for prompt in questions.prompts]
    batches: list[list[int]] = []
    for kind in dict.fromkeys(kinds):
        rows = [i for i, k in enumerate(kinds) if k == kind]
        rows.sort(key=lambda i: len(questions.ids[i]))
        batch: list[int] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(questions.ids[row]) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    return batches


@dataclass(frozen=True)
class Answers:
    """Per prompt of a batch: the text of two greedy tokens, log p of the object's first token."""

    predictions: list[str]
    logprobs: list[float]  # nats


class Asker:
    """Asks a model batches of prompts: left padding, explicit positions, KV cache."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) int64 token ids, padded on the left, and their attention mask.

        The pad token's value does not matter: the mask decides what is a token.
        """
        longest = max(map(len, ids))
        tokens = np.zeros((len(ids), longest), np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for row, line in enumerate(ids):
            tokens[row, longest - len(line) :] = line
            mask[row, longest - len(line) :] = 1
        return torch.from_numpy(tokens).to(self.device), torch.from_numpy(mask).to(self.device)

    @torch.no_grad()
    def ask(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[int, Tensor], None] = lambda step, mask: None,
    ) -> Answers:
        """Greedy decoding, argmax over float32 logits, ending at EOS.

        `before_step` is called before each forward with its number (0 = the prompt) and the mask
        (B, T) of the tokens that enter it.
        """
        tokens, mask = self.pad([questions.ids[row] for row in rows])
        wanted = torch.tensor([questions.answers[row] for row in rows], device=self.device)
        inputs, cache, entering = tokens, None, mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        chosen: list[Tensor] = []
        logprobs: list[float] = []
        for step in range(N_ANSWER_TOKENS):
            before_step(step, entering)
            out = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
            logits = out.logits[:, -1].float()
            if step == 0:
                logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
            chosen.append(logits.argmax(-1))
            cache = out.past_key_values
            inputs, positions = chosen[-1][:, None], positions[:, -1:] + 1
            entering = torch.ones_like(inputs)
            mask = torch.cat([mask, entering], 1)
        predictions = []
        for answer in torch.stack(chosen, 1).tolist():
            end = next((i for i, token in enumerate(answer) if token in self._ends), len(answer))
            text = self.tokenizer.decode(answer[:end], skip_special_tokens=True)
            predictions.append(text.strip())
        return Answers(predictions, logprobs)
