"""What `attribute --method ig`, `--method relevance` and `edit` are asked for.

The stages and their commands read them; `methods/gains/options.py` has those of `--method gain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relneuron.artifact.options import Only, OomOptions, option
from relneuron.artifact.papers import ATTNLRP
from relneuron.artifact.prompts import SPLITS
from relneuron.texts.options import ShardOptions

SITES = ("product", "act", "up", "gate")
SCHEDULES = ("inclusive", "right", "midpoint")
BASELINES = ("zero", "replaced")
ANSWERS = ("first", "mean", "sum")
EXTENSIONS = ("answer", "argmax")
PRECISIONS = ("model", "float64")
OF = ("logit", "probability")
RULES = ("plain", "conservative")


@dataclass(frozen=True)
class GradientOptions(ShardOptions):
    """What both have in common.

    `site`: where a neuron is taken, `product`, `act` and `up` being one and the same but under the
    conservative rules; `precision` "float64" widens the model's weights, and all that its code
    would compute in float32.
    """

    splits: Sequence[str] = option(
        (), "Only prompts of these splits, such as det,eva; default: all.", choices=SPLITS
    )
    target: str = option(
        "answer",
        "Token that is scored: answer (its first token, or the column target) or prediction.",
        choices=("answer", "prediction"),
    )
    site: str = option(
        "product",
        "Where a neuron is: product (what down_proj reads), act and up (the same scores), or gate "
        "(before the activation).",
        choices=SITES,
    )
    precision: str = option(
        "model", "Compute in the model's own precision, or in float64.", choices=PRECISIONS
    )
    batch_tokens: int = option(2048, "Tokens of a batch, padding included.", least=1)


@dataclass(frozen=True)
class IgOptions(GradientOptions):
    """How the path from a baseline to a layer's neurons is gone, and for which tokens.

    The defaults are those of the published code of knowledge neurons (arXiv 2104.08696). `answer`
    "mean" and "sum" ask for every token of an answer, the prompt going on with the answer's own
    tokens or, as in that code, with the model's most probable ones (`extend`).
    """

    steps: int = option(20, "Steps from the baseline to the layer's own values.", least=2)
    schedule: str = option(
        "inclusive",
        "Steps at k/(s-1) from 0 to 1 (inclusive), at k/s from 1/s to 1 (right), or at (k-1/2)/s "
        "(midpoint).",
        choices=SCHEDULES,
    )
    baseline: str = option(
        "zero",
        "Where the path begins: zero, or the mean over the sentence with each of its tokens "
        "replaced in turn by the tokenizer's end of text.",
        choices=BASELINES,
    )
    answer: str = option(
        "first",
        "Tokens of an answer: first, or the mean or sum over all of them.",
        choices=ANSWERS,
        only=Only("with --target answer", lambda o: o.target == "answer"),
    )
    extend: str = option(
        "answer",
        "What the prompt goes on with to the answer's next token: the answer, or the model's own "
        "argmax.",
        choices=EXTENSIONS,
        only=Only("with --answer mean or sum", lambda o: o.asks_all),
    )

    @property
    def asks_all(self) -> bool:
        return self.target == "answer" and self.answer != "first"


@dataclass(frozen=True)
class RelevanceOptions(GradientOptions):
    """What is differentiated, and by which backward rules (`model/gradients/rules.py`)."""

    of: str = option("logit", "The target's logit, or its probability.", choices=OF)
    rules: str = option(
        "plain",
        "Backward rules: plain (the gradient), or conservative (relevance that adds up; see the "
        "docs on a patent of others).",
        choices=RULES,
        papers={"conservative": ATTNLRP},
    )


@dataclass(frozen=True)
class EditOptions(OomOptions):
    """Which sets are edited, and how; the factors are those of arXiv 2104.08696, section 5.1."""

    PANEL = "The edit"

    sets: Sequence[str] | None = option(
        None,
        "Set of neurons to edit, of a relation or a fact; may be given several times. Default: "
        "all.",
        repeats=True,
    )
    to: str | None = option(
        None, "New answer of what the sets are about; without it their neurons are erased."
    )
    old_factor: float = option(
        1.0,
        "How much of the old answer's embedding is taken from each value vector.",
        only=Only("with --to", lambda o: o.to is not None),
    )
    new_factor: float = option(
        8.0,
        "How much of the new answer's embedding is added to each value vector.",
        only=Only("with --to", lambda o: o.to is not None),
    )
    embedding: str = option(
        "output",
        "Embedding of the answers, where a model has two: output (the unembedding) or input.",
        choices=("output", "input"),
        only=Only("with --to", lambda o: o.to is not None),
    )
    batch_tokens: int = option(4096, "Tokens of a batch, padding included.", least=1)
