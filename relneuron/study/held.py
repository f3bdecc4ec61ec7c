"""What a study folder may hold: each table, the file that it is read from, and who writes that.

`folder.Study` reads them; what the columns are stands there, at each table's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from relneuron.ablation.effect import Effect
from relneuron.ablation.harness.scores import CSV as EVAL
from relneuron.ablation.harness.scores import Score
from relneuron.ablation.outputs import SCORES, STAGES, Generated
from relneuron.analyses.perplexity import SentenceRow
from relneuron.analyses.study import ACCURACY
from relneuron.artifact import contrast, examples, histogram
from relneuron.artifact.cards import MADE_BY as CARDS_BY
from relneuron.artifact.cards import NAME as CARDS
from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.effects import EFFECTS
from relneuron.artifact.gains import (
    ATTRIBUTIONS,
    COMPARISON,
    COMPARISON_COLUMNS,
    GAINS,
    INTERVENTIONS,
    INTERVENTIONS_COLUMNS,
    PROMOTED,
    PROMOTED_COLUMNS,
    TABLES,
    TARGETS,
)
from relneuron.artifact.gains import MADE_BY as ATTRIBUTE
from relneuron.artifact.gradients import (
    COMPLETENESS,
    COMPLETENESS_COLUMNS,
    EDIT,
    EDIT_COLUMNS,
    FILES,
    IG,
    RELEVANCE,
)
from relneuron.artifact.gradients import made_by as gradients_by
from relneuron.methods.contrast.classify import MADE_BY as PROBE
from relneuron.methods.contrast.classify import PREDICTIONS, Scored
from relneuron.methods.contrast.study import EFFECT
from relneuron.methods.counts.rises import NLL, WINDOWS
from relneuron.methods.gradients.scored import FACT_COLUMNS, FACTS

_RECORD = "record MODEL prompts.jsonl -o DIR"
_IDENTIFY = "identify DIR -o DIR/neurons.json"
_ABLATE = "ablate MODEL DIR/neurons.json DIR/prompts.jsonl -o DIR/effects.csv"
_COUNT = "count MODEL GROUP=TEXT... -o DIR"
_NLL = "nll MODEL DIR/neurons.json GROUP=TEXT... -o DIR"
_GENERATE = "generate MODEL PROMPTS -o DIR/outputs.jsonl"
_EDIT = "edit MODEL neurons.json prompts.jsonl -o DIR"
_IG = gradients_by(IG)


class Held(NamedTuple):
    """A table: what it is in words, its file (the first that is there), and who writes it.

    `made_by` holds where the folder's kind of study has no command of its own for the file.
    `columns` are those that a csv must have, `call` how a table is asked for that has parts,
    `journals` what a killed run leaves beside a file that it has begun.
    """

    words: str
    files: tuple[str, ...]
    made_by: str
    columns: tuple[str, ...] = ()
    call: str = ""
    journals: tuple[str, ...] = ()

    def path(self, folder: Path) -> Path | None:
        """Its file in a folder, if that is there."""
        paths = (folder / name for name in self.files)
        return next((path for path in paths if path.is_file()), None)


_PROMPT = ("id", "relation", "split", "language", "subject", "object", "objects")
_ATTRIBUTING = ("attribute.journal",)

HELD = {
    "prompts": Held(
        "what is asked",
        ("prompts.jsonl",),
        "prompts FACTS -o DIR/prompts.jsonl",
        (*_PROMPT, "template", "prompt"),
    ),
    "answers": Held(
        "what the model answers", ("validated.csv",), _RECORD, ("id", "prediction", "correct")
    ),
    "responses": Held(
        "responses of every neuron",
        ("responses.safetensors",),
        _RECORD,
        call="responses(id)",
        journals=("record.journal",),
    ),
    "labels": Held(
        "what neurons were ranked by", ("labels.csv",), _IDENTIFY, ("relation", "id", "label")
    ),
    "neurons": Held(
        "the chosen neurons",
        ("neurons.json",),
        _IDENTIFY,
        ("set", "rank", "layer", "site", "index", "score"),
    ),
    "scores": Held(
        "scores of all neurons", ("scores.safetensors",), _IDENTIFY, call="scores(relation)"
    ),
    "cards": Held("neurons to look at", (CARDS,), CARDS_BY, call="card(neuron)"),
    "conditions": Held(
        "which neurons were off",
        ("conditions.csv",),
        _ABLATE,
        ("condition", "kind", "relation", "seed", "first", "last", "site", "n_neurons"),
    ),
    "effects": Held(
        "answers with neurons off",
        ("effects.csv", "effects.parquet"),
        _ABLATE,
        EFFECTS,
        journals=("ablate.journal",),
    ),
    "accuracy": Held(
        "right answers with neurons off", ("accuracy.csv",), _ABLATE, (*ACCURACY, "accuracy")
    ),
    "drops": Held("accuracy that is lost", ("effects.csv", "effects.parquet"), _ABLATE),
    "perplexity": Held(
        "plain sentences with neurons off",
        ("perplexity.csv",),
        f"{_ABLATE} --analyses perplexity",
        SentenceRow._fields,
    ),
    "counts": Held("how often neurons are active", (COUNTS,), _COUNT),
    "counts_of": Held("the same of one group", (COUNTS,), _COUNT, call="counts_of(group)"),
    "examples": Held(
        "where a neuron is the strongest",
        (examples.NAME,),
        examples.MADE_BY,
        call="examples(neuron)",
    ),
    "histogram": Held(
        "how its values are spread",
        (histogram.NAME,),
        histogram.MADE_BY,
        call="histogram(neuron)",
    ),
    "nll": Held("text with neurons off", ("nll.csv",), _NLL, NLL),
    "nll_windows": Held("the same by window", ("nll_windows.csv",), _NLL, WINDOWS),
    "outputs": Held("texts with neurons off", ("outputs.jsonl",), _GENERATE, Generated._fields),
    "output_scores": Held(
        "their scores", ("outputs.scores.csv",), f"{_GENERATE} --measure MEASURE", SCORES
    ),
    "lens": Held(
        "what each layer would say",
        ("outputs.lens.csv",),
        f"{_GENERATE} --lens 5",
        ("mask", "group", "id", "seed", "place", "layer", "entropy", "top"),
    ),
    "layer_stages": Held(
        "its mean by layer", ("outputs.stages.csv",), f"{_GENERATE} --lens 5", STAGES
    ),
    "probe": Held("what neurons tell of a label", ("probe.csv",), PROBE, Scored._fields),
    "probe_predictions": Held(
        "the same of each prompt", ("probe_predictions.csv",), PROBE, PREDICTIONS
    ),
    "targets": Held(
        "sentences and their answers",
        (TARGETS,),
        ATTRIBUTE,
        (*("id", "relation", "target", "target_id", "n_answer_tokens", "n_tokens", "rank"),)
        + ("prob", "logprob", "kept"),
    ),
    "attributions": Held("what raised each answer", TABLES, ATTRIBUTE, ATTRIBUTIONS),
    "gains": Held("mean gain of every FFN neuron", (GAINS,), ATTRIBUTE, journals=_ATTRIBUTING),
    "gains_of": Held(
        "the same of one sentence", (GAINS,), ATTRIBUTE, call="gains_of(id)", journals=_ATTRIBUTING
    ),
    "promoted": Held("tokens that neurons promote", (PROMOTED,), ATTRIBUTE, PROMOTED_COLUMNS),
    "interventions": Held(
        "sentences without the best neurons",
        (INTERVENTIONS,),
        f"{ATTRIBUTE} --compare",
        INTERVENTIONS_COLUMNS,
    ),
    "comparison": Held("their means", (COMPARISON,), f"{ATTRIBUTE} --compare", COMPARISON_COLUMNS),
    IG: Held(
        "integrated gradients",
        (FILES[IG],),
        _IG,
        call="gradients(id)",
        journals=("attribute_ig.journal",),
    ),
    "completeness": Held("what they sum to", (COMPLETENESS,), _IG, COMPLETENESS_COLUMNS),
    RELEVANCE: Held(
        "gradient x activation",
        (FILES[RELEVANCE],),
        gradients_by(RELEVANCE),
        call='gradients(id, "relevance")',
        journals=("attribute_relevance.journal",),
    ),
    "facts": Held(
        "facts and their neurons",
        (FACTS,),
        f"{_IDENTIFY} --method knowledge_neurons",
        FACT_COLUMNS,
    ),
    "changes": Held("how far two models are apart", (contrast.NAME,), contrast.MADE_BY),
    "contrasted": Held(
        "both models in one group", (contrast.NAME,), contrast.MADE_BY, call="contrasted(group)"
    ),
    "evaluation": Held(
        "tasks with neurons off",
        (EVAL,),
        "eval MODEL --neurons neurons.json --tasks TASKS -o DIR",
        Score._fields,
        journals=("eval.journal",),
    ),
    "causal_effects": Held(
        "what patching does to a cost",
        (EFFECT,),
        f"effect outputs.jsonl -o DIR/{EFFECT} --cost COST",
        Effect._fields[:9],
    ),
    "edits": Held("what an edit changed", (EDIT,), _EDIT, EDIT_COLUMNS),
}
