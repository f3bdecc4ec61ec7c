"""Which tokens the best neurons promote: the largest and the least logits of their value vectors.

The `attribute` stage makes promoted.csv with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from relneuron.artifact.files import Json
from relneuron.artifact.gains import ENDS, Row, number
from relneuron.artifact.prompts import Prompt, relation_names
from relneuron.methods.gains.scorer import NEURONS
from relneuron.model.stream.parts import ResidualModel
from relneuron.texts.tokens import token_text

UNITS = 10  # of each relation and kind, whose promoted tokens are written
TOKENS = 10  # at each end of a neuron's value vector


def promoted_rows(
    residual: ResidualModel, tokenizer: Any, prompts: Sequence[Prompt], found: Iterable[Json]
) -> list[Row]:
    """Tokens at both ends of the neurons that are among the best of most sentences.

    UNITS of each kind and relation, and of all; of those that are in as many sentences the ones
    with the higher sum of scores there. The columns: `attributions.PROMOTED_COLUMNS`.
    """
    times: dict[tuple[str, str], dict[tuple[int, int, int], list[float]]] = {}
    for prompt, one in zip(prompts, found, strict=True):
        for kind, layer, head, index, score, coefficient in one.get("best", ()):
            for relation in ("", prompt.relation):
                units = times.setdefault((kind, relation), {})
                sums = units.setdefault((layer, head, index), [0, 0.0, 0.0, 0])
                for place, value in enumerate((1, float(score), coefficient, coefficient < 0)):
                    sums[place] += value
    rows: list[Row] = []
    for kind in NEURONS:
        taken = set()
        for relation in ("", *relation_names(prompts)):
            units = times.get((kind, relation), {})
            order = sorted(units, key=lambda unit: (*(-n for n in units[unit][:2]), unit))
            taken |= {*order[:UNITS]}
        for layer, head, index in sorted(taken):
            place = index if head < 0 else head * residual.head_dim + index
            of = "attention_neuron" if kind == "attention_neuron" else "ffn_neuron"
            n, _, total, negative = times[kind, ""][layer, head, index]
            unit = (kind, layer, "" if head < 0 else head, index)
            known = (number(total / n), number(negative / n))
            for end, sign in ENDS.items():
                acts = int((total < 0) == (sign < 0))
                tokens = promoted_tokens(residual, of, layer, place, TOKENS, sign=sign)
                rows += [
                    (
                        *unit,
                        *known,
                        end,
                        acts,
                        rank,
                        token_text(tokenizer, token),
                        token,
                        number(logit),
                    )
                    for rank, (token, logit) in enumerate(tokens, 1)
                ]
    return rows


def promoted_tokens(
    residual: ResidualModel, kind: str, layer: int, index: int, n: int = 10, *, sign: int = 1
) -> list[tuple[int, float]]:
    """The `n` largest of unembed @ v for a neuron's value vector v, as (token id, logit).

    With `sign` -1 the `n` least, which the neuron raises where its coefficient is negative.

    `kind` is `ffn_neuron` or `attention_neuron`; `index` of an attention neuron is the coordinate
    j d_h + k, or its flat index, position * H * d_h + coordinate. Of equal logits the lower token
    comes first. The logits are without the norm's scale.
    """
    if kind not in ("ffn_neuron", "attention_neuron"):
        raise ValueError(f"promoted_tokens: {kind!r} is no kind of neuron")
    part = residual.layers[layer]
    if kind == "ffn_neuron":
        value = part.ffn_value(index)
    else:
        value = part.attention.values(index % (residual.n_heads * residual.head_dim))
    logits = residual.unembed @ value.to(residual.unembed.dtype)
    order = (sign * logits).argsort(descending=True, stable=True)[:n]
    return list(zip(order.tolist(), logits[order].tolist(), strict=True))
