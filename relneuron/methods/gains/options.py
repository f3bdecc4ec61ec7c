"""What `attribute` is asked for, and what its results depend on.

The stage, its command and cli/run.py call it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.manifest import same_model

# What a row of attributions.csv can score, in the table's order.
VALUE_KINDS = (
    "ffn_layer",
    "attention_layer",
    "head",
    "position",
    "ffn_neuron",
    "attention_neuron",
)
QUERY_KINDS = ("query_layer", "query_ffn_neuron")
KINDS = (*VALUE_KINDS, *QUERY_KINDS)
MODES = ("certified", "exact")
KEYS = ("gate", "up", "down")
QUERY_OF = ("attention", "ffn")
KEEP = ("all", "known")
TARGETS = ("answer", "prediction")
FORMATS = ("csv", "parquet")
OOM = ("split", "error")


@dataclass(frozen=True)
class AttributeOptions:
    """What is scored, and what is compared; the defaults are those of arXiv 2312.12141.

    `splits`: only these prompts, () for all. `target`: the token that is scored, of the answer or
    the model's own most probable one ("prediction", as in the published notebooks). `kinds`: rows
    of attributions.csv. `top`: of each sentence's neurons and positions. `mode`: FFN gains within
    `tolerance` nats ("certified") or to the last bit of float32 arithmetic ("exact"). `own_norm`:
    the final norm's scale is taken anew for each vector, not frozen. `norm_bias`: the final norm's
    bias and the lm_head's are in the logits. `query_units`: the value neurons whose activation the
    query scores explain, of the attention or, with `query_of` "ffn", of the FFN, whose key is then
    the row of its gate or up projection or its value vector ("down"); where the norm is a
    LayerNorm, `center_keys` centres them, which the published GPT-2 notebook does not. `strict`
    refuses answers of several tokens. `keep` "known" scores only sentences whose answer the model
    knows (methods B7). `compare` zeroes the best `intervene` neurons of each method in the known
    sentences, and random ones. `oom`: out of memory halves the batches from there on ("split") or
    ends the stage ("error").
    """

    splits: Sequence[str] = ()
    target: str = "answer"
    kinds: Sequence[str] = KINDS
    top: int = 300
    mode: str = "certified"
    tolerance: float = 1e-5
    own_norm: bool = False
    norm_bias: bool = False
    key: str = "gate"
    center_keys: bool = True
    query_of: str = "attention"
    query_units: int = 30
    strict: bool = False
    keep: str = "all"
    compare: bool = True
    intervene: int = 10
    random_seeds: int = 3
    batch_tokens: int = 2048
    oom: str = "split"
    format: str = "csv"

    def __post_init__(self) -> None:
        for what, value, known in (
            *(("kind", kind, KINDS) for kind in self.kinds),
            ("target", self.target, TARGETS),
            ("mode", self.mode, MODES),
            ("key", self.key, KEYS),
            ("query-of", self.query_of, QUERY_OF),
            ("keep", self.keep, KEEP),
            ("format", self.format, FORMATS),
            ("oom", self.oom, OOM),
        ):
            if value not in known:
                raise RelneuronError(f"unknown {what} {value!r}", f"use {', '.join(known)}", 2)
        if not self.kinds:
            raise RelneuronError("no kind of score is asked for", f"use {', '.join(KINDS)}", 2)
        for what, number, least in (
            ("top", self.top, 1),
            ("query-units", self.query_units, 1),
            ("intervene", self.intervene, 1),
            ("random-seeds", self.random_seeds, 0),
            ("batch-tokens", self.batch_tokens, 1),
        ):
            if number < least:
                fix = f"give a number of at least {least}"
                raise RelneuronError(f"{what} {number} is too small", fix, 2)
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise RelneuronError(
                f"tolerance {self.tolerance} is not positive", "give nats, such as 1e-5", 2
            )

    @property
    def table(self) -> str:
        """The name of the table of scores."""
        return f"attributions.{self.format}"

    def check_installed(self) -> None:
        """Refuse a table that cannot be written here, before any work."""
        if self.format == "parquet":
            need("writing .parquet", "pyarrow", otherwise=", or write csv")


def attribute_inputs(
    model: Json, tokenizer: Any, prompts: str, tokens: str, options: AttributeOptions
) -> Json:
    """What the stage depends on, for the manifest.

    `prompts` and `tokens` are the digests of the sentences' prompts.jsonl and of their token ids.
    """
    asked = {
        name: list(value) if isinstance(value, tuple | list) else value
        for name, value in asdict(options).items()
        if name != "oom"
    }
    # What does nothing without another option is none of the inputs.
    queries = options.compare or {*options.kinds} & {*QUERY_KINDS}
    unused = {
        "tolerance": options.mode != "certified",
        "query_of": not queries,
        "query_units": not queries,
        "key": not queries or options.query_of != "ffn",
        "intervene": not options.compare,
        "random_seeds": not options.compare,
    }
    asked |= {name: None for name, is_unused in unused.items() if is_unused}
    from relneuron.model.identity import tokenizer_digest

    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": prompts,
        "tokens": tokens,
        **asked,
    }
