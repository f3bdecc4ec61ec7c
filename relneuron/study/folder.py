"""A study folder as data frames: what it holds is read when it is asked for, and not before.

`relneuron.load` opens one, of any kind, and `relneuron.run` returns one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from relneuron.ablation.outputs import Generated, read_outputs
from relneuron.artifact.contrast import Contrast
from relneuron.artifact.effects import read_conditions
from relneuron.artifact.files import Json, RelneuronError, require
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import Neuron, NeuronFile, Shape
from relneuron.artifact.prompts import read_prompts
from relneuron.report.page import kind_of
from relneuron.study import shown, tensors
from relneuron.study.frames import Frame, frame, read_any, read_lens
from relneuron.study.held import HELD
from relneuron.study.opened import Opened
from relneuron.study.pages import PAGES


def load(folder: str | Path) -> Study:
    """A folder that relneuron's commands wrote, of any kind, as data frames.

    Nothing but its manifest is read; a folder of a newer relneuron, or one that holds no file of a
    study, raises RelneuronError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RelneuronError(f"{folder} is no folder", "give the folder of a study", 2)
    study = Study(folder, kind_of(folder, PAGES), Manifest(folder).data)
    if not study.there and not study.manifest["stages"]:
        raise RelneuronError(
            f"{folder} holds no file of a study",
            "make one with relneuron.run(...), or with: relneuron run, count or attribute",
            2,
        )
    return study


@dataclass(frozen=True, repr=False, eq=False)
class Study(Opened):
    """What a folder holds, each table read when it is first asked for.

    A table is a pandas.DataFrame; without pandas (the extra `frames`) a dict of numpy arrays, one a
    column. One row is one case: a neuron is (layer, site, index), from zero. What is not there
    raises RelneuronError with the command that makes it, and so does a file that is not as the
    manifest notes it: its digest is compared first, at about 1 GB a second. `load` the folder again
    for what was written since.
    """

    # --- prompts and answers

    @cached_property
    def prompts(self) -> Frame:
        """The prompts: id, relation, split, language, subject, object, objects, template, prompt.

        `objects` is the tuple of all right answers, `object` the first of them.
        """
        names = HELD["prompts"].columns
        prompts = read_prompts(self._path("prompts"))
        return frame({name: [getattr(prompt, name) for prompt in prompts] for name in names})

    @cached_property
    def answers(self) -> Frame:
        """What the model as it is says to each prompt: id, prediction, correct."""
        return self._table("answers")

    @cached_property
    def labels(self) -> Frame:
        """Which prompts neurons were ranked by: relation, id, label (1 positive, 0 negative)."""
        return self._table("labels")

    @cached_property
    def effects(self) -> Frame:
        """Every answer under every condition: condition, relation, split, id, prediction, correct,
        logprob.

        `logprob` is that of the right answer's first token, in nats. Where they are in the file
        also given (the right answer that was said), logprob_of and choice.
        """
        return self._table("effects", more=("given", "logprob_of", "choice"))

    @cached_property
    def conditions(self) -> Frame:
        """What was off: condition, kind, relation, seed, first, last, site, n_neurons.

        NaN where a condition has no seed, or no first and last rank.
        """
        read_conditions(self._path("conditions"))  # which says what is wrong with it
        return self._table("conditions")

    @cached_property
    def accuracy(self) -> Frame:
        """Shares of right answers: condition, relation, split, n_prompts, n_correct, accuracy."""
        return self._table("accuracy")

    @cached_property
    def drops(self) -> Frame:
        """What every set does to every relation, of the main split.

        relation, off, own, n_prompts, n_before, n_after, drop, drop_low, drop_high, lost, gained,
        p_value, q_value: drop = (before - after) / before with its 95 % interval over facts, the
        sign-flip test's p, and q over the whole matrix (analyses.drops.drop_table).
        """
        from relneuron.analyses.drops import drop_table
        from relneuron.analyses.study import read_study

        table = drop_table(read_study(self.folder).main)
        columns: dict[str, Any] = {name: table.column(name) for name in table.columns}
        return frame(columns | {"own": [bool(own) for own in columns["own"]]})

    @cached_property
    def perplexity(self) -> Frame:
        """Neutral sentences: condition, relation, id, n_tokens, nll (their sum, in nats)."""
        return self._table("perplexity")

    @cached_property
    def analyses(self) -> Mapping[str, Frame]:
        """The tables of the report by name, as its folder `analyses` has them.

        Numbers are float64, but whole ones int64 where their column's name says that they are.
        """
        paths = sorted((self.folder / "analyses").glob("*.csv"))
        if not paths:
            require(self.folder / "analyses" / "accuracy.csv", "report DIR -o DIR/report.html")
        for path in paths:
            Manifest(self.folder).check(path.relative_to(self.folder).as_posix())
        return {path.stem: frame(read_any(path)) for path in paths}

    # --- neurons

    @cached_property
    def neurons(self) -> Frame:
        """The chosen neurons: set, rank (from 1), layer, site, index, score.

        Beside them p_permutation, q_value, ap_low and ap_high, where significance.csv has them.
        Such a frame, or some rows of it, goes into relneuron.ablate.
        """
        found = NeuronFile.read(self._path("neurons"))
        rows = [
            (s, rank, *n) for s, chosen in found.sets.items() for rank, n in enumerate(chosen, 1)
        ]
        names = HELD["neurons"].columns
        columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        significance = checked(self.folder / "significance.csv")
        if significance.is_file():
            from relneuron.analyses.study import SIGNIFICANCE, read_significance

            numbers = [
                row for some in read_significance(significance, found).values() for row in some
            ]
            columns |= {name: [row[i] for row in numbers] for i, name in enumerate(SIGNIFICANCE)}
        return frame(columns)

    def scores(self, relation: str) -> Frame:
        """The scores of all neurons for one relation or group: layer, site, index and each score.

        `ap`, or `logprob_gain`; of counts `probability` and, for all groups the same, `lape`. NaN
        where a neuron was not ranked.
        """
        path, held = self._path("scores"), HELD["scores"]
        return frame(tensors.scores(path, held.made_by, relation, self._order))

    def responses(self, prompt: str) -> Frame:
        """The mean response of every neuron to one det prompt: layer, site, index, response."""
        path = self._path("responses")
        return frame(tensors.responses(path, prompt, Shape.of(self._model(path))))

    def card(self, neuron: str | Sequence[Any]) -> shown.Card:
        """What `look` found of a neuron such as "12.gate.345", drawn in a notebook."""
        return shown.find_card(self._path("cards"), neuron)

    # --- corpora

    @property
    def counts(self) -> Frame:
        """What was counted: group, layer, site, index, tokens, count.

        `count` of the `tokens` that ran the layer passed the threshold; with moments also sum,
        sum_sq, max, n_nonfinite. More than 200 MB are refused: see `counts_of`.
        """
        return frame(self._counts(None))

    def counts_of(self, group: str) -> Frame:
        """`counts` of one group."""
        return frame(self._counts(group))

    def examples(self, neuron: Neuron | str, tokenizer: Any = None, context: int = 16) -> Frame:
        """A neuron's strongest tokens: layer, site, index, group, rank, value, position, token,
        before, after, window, token_id, text. Neurons are (12, "act", 345) or "12.act.345".

        A notebook draws the neuron's card: the one that `look` made, or what is in these rows.
        """
        path = self._path("examples")
        model = self._model(path)
        found = frame(tensors.examples(path, neuron, model, tokenizer, context))
        return shown.drawn(found, lambda: self._card(tensors.neuron_of(neuron, model), found))

    def histogram(self, neuron: Neuron | str) -> Frame:
        """A neuron's values, low <= v < high: layer, site, index, group, bin, low, high, count."""
        path = self._path("histogram")
        return frame(tensors.histogram(path, neuron, self._model(path)))

    def _card(self, neuron: Neuron, examples: Frame) -> Json:
        """The card of a neuron that `look` made, or one of its examples alone."""
        if HELD["cards"].path(self.folder) is not None:
            with suppress(RelneuronError):
                return self.card(neuron).data
        bins = HELD["histogram"].path(self.folder)
        spread = None if bins is None else self.histogram(neuron)
        order = self._order
        name = order.name(*neuron) if order else ".".join(map(str, neuron))
        return shown.card_of(neuron, name, examples, spread)

    @cached_property
    def nll(self) -> Frame:
        """Text under each mask: mask, group, n_windows, n_tokens, nll, nll_se, perplexity."""
        return self._table("nll")

    @cached_property
    def nll_windows(self) -> Frame:
        """The same by window: mask, group, window, n_tokens, nll (mean, nats per token)."""
        return self._table("nll_windows")

    @cached_property
    def evaluation(self) -> Frame:
        """Tasks: condition, set, task, metric, filter, value, stderr, n, n_shot."""
        return self._table("evaluation")

    # --- texts and what they tell

    @cached_property
    def outputs(self) -> Frame:
        """The texts of `generate`: mask, set, id, prompt, output, n_tokens, stopped, group, seed,
        score.

        None where a text has no group, seed or score.
        """
        lines = read_outputs(self._path("outputs"))
        return frame({name: [getattr(line, name) for line in lines] for name in Generated._fields})

    @cached_property
    def output_scores(self) -> Frame:
        """Their mean scores: mask, group, measure, n_prompts, n_seeds, score, sd_seeds, low, high.

        `low` and `high` are the 95 % interval of the mean.
        """
        return self._table("output_scores")

    @cached_property
    def lens(self) -> Frame:
        """What each layer would say: mask, group, id, seed, place, layer, entropy, top.

        `place` counts a text's tokens from 0; `entropy` is in nats; `top` is the tuple of the most
        probable tokens.
        """
        return frame(read_lens(self._path("lens")))

    @cached_property
    def layer_stages(self) -> Frame:
        """Its mean by layer: mask, group, n_tokens, layer, entropy, stage (1 to 3)."""
        return self._table("layer_stages")

    @cached_property
    def probe(self) -> Frame:
        """A probe: neurons, n_prompts, n_positive, n_neurons, accuracy, low, high, chance,
        sd_sets.

        `neurons` is `top`, the chosen ones, or random ones; `chance` the share of the larger class.
        """
        return self._table("probe")

    @cached_property
    def probe_predictions(self) -> Frame:
        """Of each prompt: id, label, fold, predicted, probability (of label 1)."""
        return self._table("probe_predictions")

    # --- attribution and gradients

    @cached_property
    def targets(self) -> Frame:
        """The sentences: id, relation, target, target_id, n_answer_tokens, n_tokens, rank, prob,
        logprob, kept."""
        return self._table("targets")

    @cached_property
    def attributions(self) -> Frame:
        """The best of each sentence: id, kind, layer, head, index, position, score, rank."""
        return self._table("attributions")

    @property
    def gains(self) -> Frame:
        """What FFN neurons add to the answer: relation, layer, index, gain.

        `gain` is the mean of log p(answer | x + m v) - log p(answer | x) over the relation's
        sentences, in nats, as `identify --method logprob_gain` takes it.
        """
        path, targets = self._path("gains"), self.targets
        asked = self.manifest["stages"].get("attribute", {}).get("inputs", {})
        rows = zip(targets["id"], targets["relation"], targets["kept"], strict=True)
        known = {i: r for i, r, kept in rows if kept or asked.get("keep") != "known"}
        return frame(tensors.gains(path, known, self._model(path)))

    def gains_of(self, sentence: str) -> Frame:
        """The gain of every FFN neuron for one sentence: layer, index, gain."""
        path = self._path("gains")
        return frame(tensors.gains_of(path, sentence, self._model(path)))

    @cached_property
    def promoted(self) -> Frame:
        """The tokens at both ends of value vectors: kind, layer, head, index, coefficient,
        negative, end, acts, place, token, token_id, logit."""
        return self._table("promoted")

    @cached_property
    def interventions(self) -> Frame:
        """Sentences with neurons or heads off: condition, id, relation, rank, prob, logprob."""
        return self._table("interventions")

    @cached_property
    def comparison(self) -> Frame:
        """Their means: condition, relation ("": all), n, mrr, prob, logprob, and the drops of these
        with their _low and _high."""
        return self._table("comparison")

    def gradients(self, sentence: str, method: str = "ig") -> Frame:
        """The score of every FFN neuron for one sentence: layer, index, score.

        Of integrated gradients, or with `method="relevance"` of gradient x activation.
        """
        if method not in ("ig", "relevance"):
            raise RelneuronError(f"unknown method {method!r}", "use ig or relevance", 2)
        return frame(tensors.gradients(self._path(method), method, sentence))

    @cached_property
    def completeness(self) -> Frame:
        """How far integrated gradients sum to what they should: id, relation, layer, probability,
        probability_at_baseline, change, sum, gap."""
        return self._table("completeness")

    @cached_property
    def facts(self) -> Frame:
        """Facts and their neurons: relation, fact, n_prompts, n_of_prompt, n_union, n_neurons, cs1,
        cs2, consistent."""
        return self._table("facts")

    # --- two models

    @cached_property
    def changes(self) -> Frame:
        """The change of every neuron between two models: layer, index, rms.

        `rms` is sqrt(mean (a - b)^2) of its value before down, over the tokens of all groups.
        """
        return frame(tensors.changes(self._path("changes"), self._order))

    def contrasted(self, group: str) -> Frame:
        """Both models on a group's tokens: group, layer, site, index, tokens, count, sum, sum_sq,
        max, n_nonfinite.

        The site is `a` or `b`, the neuron in each model, or their `difference`.
        """
        path = self._path("contrasted")
        return frame(tensors.counts(path, Contrast, [group], self._order))

    @cached_property
    def causal_effects(self) -> Frame:
        """What patching does to a cost: mask, n_prompts, n_seeds, cost_clean, cost_donor, cost,
        effect, low, high.

        `effect` is E[cost - cost_clean] / E[cost_donor - cost_clean] with its 95 % interval.
        """
        return self._table("causal_effects")

    @cached_property
    def edits(self) -> Frame:
        """What `edit` changed: measure, n, before, before_low, before_high, after, after_low,
        after_high."""
        return self._table("edits")
