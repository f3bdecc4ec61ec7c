"""Continues batches of prompts, each row until its own end, greedily or by sampling.

`generate` calls it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relneuron.ablation.options import GenerateOptions
from relneuron.model.ask import Asker, cache_of, ignore
from relneuron.model.converse import Step, go_through
from relneuron.model.lens import Lens, Read
from relneuron.model.questions import Questions
from relneuron.texts.tokens import whole_text

# The text, the number of its tokens, why it ended; then, of its first tokens and every layer, the
# entropy and the most probable tokens that the logit lens reads.
Said = tuple[str, int, str, list[list[Read]]]


class Continuer(Asker):
    """Continues batches of prompts; a row is a prompt and a seed, number prompt * seeds + seed.

    Greedy text has one seed.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: GenerateOptions) -> None:
        super().__init__(model, tokenizer)
        self.decoding = decoding
        self.lens = Lens(model) if decoding.lens else None

    @torch.no_grad()
    def go_on(
        self, questions: Questions, rows: Sequence[int], before_step: Callable[[Step], None]
    ) -> list[Said]:
        """The text, number of tokens and reason of the end of each row's continuation.

        Rows of a prompt with pictures must be of that prompt alone.
        """
        return self._continue(questions, rows, before_step).said()

    @torch.no_grad()
    def write(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None] = ignore,
    ) -> list[list[int]]:
        """The tokens of each row's continuation, without the one that ends the text."""
        return self._continue(questions, rows, before_step).made

    def _continue(
        self, questions: Questions, rows: Sequence[int], before_step: Callable[[Step], None]
    ) -> Texts:
        prompts = [row // self.decoding.n_seeds for row in rows]
        if questions.has_pictures(prompts[0]):
            return self._look(questions, rows, before_step)
        tokens, mask = self.pad([questions.ids[row] for row in prompts])
        texts = Texts(self, questions, rows)
        # Padding is no token of the prompt: it must not be penalised.
        prompt_rows, columns = mask.nonzero(as_tuple=True)
        texts.begin(prompt_rows, tokens[prompt_rows, columns])
        going = list(range(len(rows)))
        entering, cache = mask, None
        for number in range(self.decoding.max_new_tokens):
            places = torch.tensor(going, device=tokens.device)
            before_step(Step(places, entering, min(number, 1), 1))
            out = self._forward(tokens, mask, 1, cache)
            chosen = texts.take(going, out.logits[:, -1].float())
            stay = [i for i, row in enumerate(going) if not texts.ends[row]]
            if not stay:
                break
            cache, tokens = cache_of(out), chosen[:, None]
            (state,) = cache.values()
            if len(stay) < len(going) and hasattr(state, "batch_select_indices"):
                kept = torch.tensor(stay, device=tokens.device)
                state.batch_select_indices(kept)
                going = [going[i] for i in stay]
                tokens, mask = tokens[kept], mask[kept]
            entering = torch.ones_like(tokens)
            mask = torch.cat([mask, entering], 1)
        return texts

    def _look(
        self, questions: Questions, rows: Sequence[int], before_step: Callable[[Step], None]
    ) -> Texts:
        """`go_on` of one prompt with pictures, in so many rows, all of which go on to the end."""
        texts, everyone = Texts(self, questions, rows), range(len(rows))
        prompt = rows[0] // self.decoding.n_seeds
        ids = torch.tensor(questions.ids[prompt], device=self.device).repeat(len(rows))
        of = torch.arange(len(rows), device=self.device)
        texts.begin(of.repeat_interleave(len(questions.ids[prompt])), ids)

        def choose(_: int, logits: Tensor) -> Tensor | None:
            chosen = texts.take(everyone, logits)
            return None if all(texts.ends) else chosen

        most = self.decoding.max_new_tokens
        go_through(self.model, questions.inputs(prompt), len(rows), most, choose, before_step)
        return texts

    def decoded(self, made: Sequence[int]) -> str:
        return self._decoded(made)

    def is_end(self, token: int) -> bool:
        return token in self._ends


class Texts:
    """What the rows of a batch have said so far, and how each goes on."""

    def __init__(self, continuer: Continuer, questions: Questions, rows: Sequence[int]) -> None:
        self.continuer, self.decoding = continuer, continuer.decoding
        self.made: list[list[int]] = [[] for _ in rows]
        self.ends = [""] * len(rows)
        self.n_forwards = 0
        self.read: list[list[list[Read]]] = [[] for _ in rows]
        # One stream of numbers for each prompt and seed, whatever is off and shares the batch:
        # conditions differ by what they do, and not by the draw.
        self._draws = [self._draw(questions, row) for row in rows]
        self._first: tuple[Tensor, Tensor] | None = None
        self._seen = torch.empty(0, device="cpu")

    def _draw(self, questions: Questions, row: int) -> random.Random:
        number, seed = divmod(row, self.decoding.n_seeds)
        # Without sampling nothing is drawn, and prompts need no names.
        name = questions.prompts[number].id if self.decoding.temperature is not None else ""
        return random.Random(f"relneuron.sample.{seed}.{name}")

    def begin(self, rows: Tensor, tokens: Tensor) -> None:
        """The tokens of the prompts, and the row of each: the penalty is for these, too."""
        self._first = (rows, tokens)

    def take(self, going: Sequence[int], logits: Tensor) -> Tensor:
        """The next token of each of the rows that go on, from its logits (b, V) float32."""
        if self._first is not None:
            rows, tokens = self._first
            # What stands for a picture need not be a token of the model's.
            known = tokens < logits.shape[-1]
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[rows[known], tokens[known]] = True
            self._first = None
        lens = self.continuer.lens
        if lens is not None and self.n_forwards < (self.decoding.lens or 0):
            for row, layers in zip(going, lens.read(logits), strict=True):
                if not self.ends[row]:
                    self.read[row].append(layers)
        self.n_forwards += 1
        places = torch.tensor(going, device=logits.device)
        drawn = [self._draws[row].random() for row in going]
        chosen = next_tokens(logits, self._seen[places], self.decoding, drawn)
        self._seen[places, chosen] = True
        for row, token in zip(going, chosen.tolist(), strict=True):
            if not self.ends[row]:
                self.ends[row] = self._end(self.made[row], token)
        return chosen

    def said(self) -> list[Said]:
        found = zip(self.made, self.ends, self.read, strict=True)
        return [(self._cut(made), len(made), end or "length", read) for made, end, read in found]

    def _end(self, made: list[int], token: int) -> str:
        """Take a row's next token; why it is the last one, or nothing."""
        if self.continuer.is_end(token):
            return "eos"
        made.append(token)
        text = self.continuer.decoded(made) if self.decoding.stop else ""
        return "stop string" if any(stop in text for stop in self.decoding.stop) else ""

    def _cut(self, made: Sequence[int]) -> str:
        text = whole_text(self.continuer.decoded, made)
        places = [text.find(stop) for stop in self.decoding.stop]
        return text[: min((place for place in places if place >= 0), default=None)]


def next_tokens(
    logits: Tensor, seen: Tensor, decoding: GenerateOptions, drawn: Sequence[float]
) -> Tensor:
    """(b,) int64 of logits (b, V), lowered where a token was `seen`: the argmax, or a sample."""
    penalty = decoding.repetition_penalty
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, lowered, logits)
    if decoding.temperature is None:
        return logits.argmax(-1)
    return sample(logits, drawn, decoding.temperature, decoding.top_k)


def sample(
    logits: Tensor, drawn: Sequence[float], temperature: float, top_k: int | None = None
) -> Tensor:
    """(b,) int64: a token of each row from softmax(logits / temperature), by a number in [0, 1).

    It is the first token k at which the sum of the probabilities of the tokens 0 to k is above
    the number that was drawn, in float64. With `top_k` only the tokens whose logits are as large
    as the top_k-th largest one can be drawn.
    """
    scaled = logits.double() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    up_to = scaled.softmax(-1).cumsum(-1)
    total = up_to[:, -1:]
    number = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None] * total
    # A product that is rounded up to the whole would lead past the last token.
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(up_to, torch.minimum(number, below), right=True)[:, 0]
