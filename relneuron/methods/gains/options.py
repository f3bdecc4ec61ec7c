"""What `attribute` is asked for, and what its results depend on.

The stage, its command and study/run.py call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.manifest import same_model
from relneuron.artifact.options import Only, TopOptions, option
from relneuron.artifact.prompts import SPLITS
from relneuron.texts.options import ShardOptions

# What a row of attributions.csv can score, in the table's order.
WRITES = ("ffn_layer", "attention_layer", "head", "position")
VALUE_KINDS = (*WRITES, "ffn_neuron", "attention_neuron")
QUERY_KINDS = ("query_layer", "query_ffn_neuron")
KINDS = (*VALUE_KINDS, *QUERY_KINDS)
MODES = ("certified", "exact")
KEYS = ("gate", "up", "down")
QUERY_OF = ("attention", "ffn")
KEEP = ("all", "known")
TARGETS = ("answer", "prediction")
FORMATS = ("csv", "parquet")

_QUERIES = Only("with --compare or --kinds query_layer,query_ffn_neuron", lambda o: o.has_query)


@dataclass(frozen=True)
class AttributeOptions(ShardOptions):
    """What is scored, and what is compared; the defaults are those of arXiv 2312.12141.

    `splits`: only these prompts, () for all. `target`: the token that is scored, of the answer or
    the model's own most probable one ("prediction", as in the published notebooks). `kinds`: rows
    of attributions.csv. `top`: of each sentence's neurons and positions. `mode`: FFN gains within
    `tolerance` nats ("certified") or to the last bit of float32 arithmetic ("exact"). `own_norm`:
    the final norm's scale is computed for each vector, not frozen. `norm_bias`: the final norm's
    bias and the lm_head's are in the logits. `query_units`: the value neurons whose activation the
    query scores explain, of the attention or, with `query_of` "ffn", of the FFN, whose key is then
    the row of its gate or up projection or its value vector ("down"); where the norm is a
    LayerNorm, `center_keys` centres them, which the published GPT-2 notebook does not. `strict`
    refuses answers of several tokens. `keep` "known" scores only sentences whose answer the model
    knows (methods B7). `compare` zeroes the best `intervene` neurons of each method in the known
    sentences, and random ones.
    """

    format: str = option("csv", "Format of the table of scores.", choices=FORMATS)
    splits: Sequence[str] = option(
        (), "Only prompts of these splits, such as det,eva; default: all.", choices=SPLITS
    )
    target: str = option(
        "answer",
        "Token that is scored: answer (its first token, or the column target) or prediction.",
        choices=TARGETS,
    )
    kinds: Sequence[str] = option(
        KINDS,
        "What is scored.",
        choices=KINDS,
        names={"all": KINDS},
        some=True,
    )
    top: int = option(
        300, "Number of each sentence's neurons and positions that are written.", least=1
    )
    mode: str = option(
        "certified", "FFN gains: certified (within --tolerance) or exact.", choices=MODES
    )
    tolerance: float = option(
        1e-5,
        "Largest error of a certified gain, in nats.",
        above=0,
        only=Only("with --mode certified", lambda o: o.mode == "certified"),
    )
    own_norm: bool = option(
        False, "Compute the final norm for each vector, in place of freezing it."
    )
    norm_bias: bool = option(False, "Add the biases of the final norm and the head.")
    key: str = option(
        "gate",
        "Key of a neuron with --query-of ffn.",
        choices=KEYS,
        only=Only("with --query-of ffn", lambda o: o.query_of == "ffn" and o.has_query),
    )
    center_keys: bool = option(
        True,
        "In models with LayerNorm (GPT-2), centre the keys of query scores, as the norm centres "
        "what they read; the published notebook does not.",
    )
    query_of: str = option(
        "attention",
        "Value neurons whose query neurons are scored.",
        choices=QUERY_OF,
        only=_QUERIES,
    )
    query_units: int = option(
        30, "Number of each sentence's value neurons that are explained.", least=1, only=_QUERIES
    )
    strict: bool = option(False, "Refuse answers of several tokens.")
    keep: str = option(
        "all",
        "Sentences that are scored: all, or known (the model knows the answer).",
        choices=KEEP,
    )
    compare: bool = option(True, "Zero the neurons of eight methods in the known sentences.")
    intervene: int = option(
        10,
        "Neurons of each method that are zeroed in a sentence.",
        least=1,
        only=Only("with --compare", lambda o: o.compare),
    )
    random_seeds: int = option(
        3,
        "Number of random neuron sets to compare with.",
        least=0,
        only=Only("with --compare", lambda o: o.compare),
    )
    batch_tokens: int = option(2048, "Tokens of a batch, padding included.", least=1)

    @property
    def table(self) -> str:
        """The name of the table of scores."""
        return f"attributions.{self.format}"

    @property
    def has_query(self) -> bool:
        """Whether query scores are taken."""
        return self.compare or bool({*self.kinds} & {*QUERY_KINDS})

    @property
    def has_writes(self) -> bool:
        """Whether layers, heads and positions are scored."""
        return self.compare or bool({*self.kinds} & {*WRITES})

    def check_installed(self) -> None:
        """Refuse a table that cannot be written here, before any work."""
        if self.format == "parquet":
            need("writing .parquet", "pyarrow", otherwise=", or write csv")


@dataclass(frozen=True)
class GainRankOptions(TopOptions):
    """Over which sentences a neuron's gain is averaged."""

    kept_only: bool = option(False, "Only sentences whose answer the model knows.")


def check_heads(model: str, why: str | None, options: AttributeOptions) -> None:
    """Refuse what needs heads of a model where they are not told apart, for the reason `why`."""
    by_heads = ("head", "position", "attention_neuron")
    asked = [kind for kind in options.kinds if kind in by_heads]
    if options.has_query and options.query_of == "attention":
        asked.append("query scores of attention neurons")
    if why is not None and asked:
        rest = ",".join(kind for kind in KINDS if kind not in by_heads)
        raise RelneuronError(
            f"{model} has no scores of {', '.join(asked)}: {why}",
            f"use --kinds {rest} --query-of ffn",
        )


def attribute_inputs(
    model: Json, tokenizer: Any, prompts: str, tokens: str, options: AttributeOptions
) -> Json:
    """What the stage depends on, for the manifest.

    `prompts` and `tokens` are the digests of the sentences' prompts.jsonl and of their token ids.
    """
    from relneuron.model.identity import tokenizer_digest

    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": prompts,
        "tokens": tokens,
        **options.recorded(),
    }
