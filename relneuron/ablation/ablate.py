"""The `ablate` stage: switch neurons off, every condition beside the others, and ask again.

It writes one row per condition and prompt (effects), what the conditions are (conditions.csv), the
accuracies (accuracy.csv) and, if asked for, the perplexity of neutral sentences (perplexity.csv).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from relneuron.ablation.asked import (
    Prompts,
    encode_asked,
    plan_sets,
    rows_asked,
    rows_read,
    sentences_of,
)
from relneuron.ablation.asking import asking
from relneuron.ablation.conditions import (
    Ablation,
)
from relneuron.ablation.evaluate import Evaluator, same_ablation
from relneuron.ablation.exchange import check_products, from_donor
from relneuron.ablation.how import (
    ablate_inputs,
    by_product,
    files_beside,
    read_how,
)
from relneuron.ablation.options import AblateOptions
from relneuron.ablation.pictured import (
    find_for,
    first_inputs,
    pictured_inputs,
)
from relneuron.ablation.said import Row
from relneuron.ablation.tables import Accuracy, Effect, check_format, table_pieces
from relneuron.artifact.effects import (
    conditions_bytes,
    split_name,
)
from relneuron.artifact.files import (
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_overwrite,
)
from relneuron.artifact.journal import Journal, PartDone, is_unfinished, progress_bar
from relneuron.artifact.manifest import Manifest, checked, versions
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.stage import command, loading, placed
from relneuron.model.ask import Asker
from relneuron.model.canary import check_canary, check_exchange
from relneuron.model.identity import other_weights
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pair import Pair
from relneuron.model.pictures import Processor
from relneuron.model.questions import (
    Questions,
    given_object,
)
from relneuron.model.ranks import sharing

PERPLEXITY = ("condition", "relation", "id", "n_tokens", "nll")
BESIDE = ("accuracy.csv", "conditions.csv", "perplexity.csv")  # written beside the output


def refuse_outputs(output: Path, force: bool) -> None:
    """Raise if a file that the stage writes exists, unless `force` or a killed run left it."""
    if output.name in BESIDE:
        raise RelneuronError(f"{output.name} is written beside the output", "give another name", 2)
    force = force or is_unfinished(output, "ablate")
    for path in (output, *(output.parent / name for name in BESIDE)):
        refuse_overwrite(path, force)


def ablate_prompts(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    prompts_path: Path,
    output: Path,
    options: AblateOptions | None = None,
    *,
    pair: Pair | None = None,
    processor: Processor | None = None,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
    **asked: Any,
) -> list[tuple[str, str, str, int, int, float]]:
    """Ask the prompts of some splits under every condition; returns accuracy.csv's rows.

    `asked` are fields of `AblateOptions` in place of those of `options`. By default a condition
    sets the outputs of its neurons to zero at all positions of prompt and answer, KV cache included
    (arXiv 2502.17355, section 3.3). With the mode `patch` their products become those of the other
    model of `pair`, which reads the same tokens; `donor` is its name, and `model` is `pair.a`.
    `logprob` is the log-probability in nats of the object's first token after the prompt, with the
    space before it (`predict.Answers`): of several right objects the most probable one's, named by
    `logprob_of`. `given` is the one that the prediction gives, if it is right; `choice`, where
    prompts have options, the most probable of these. With `choose` an option is the answer, and
    `logprob` that of the right option as a whole (asking.py). `output` is .csv or .parquet; the
    files in `BESIDE` stand in its folder.

    Neurons that were found in other weights (those of a model before it was tuned, say) are taken
    with a warning, which the manifest keeps; a folder with the study of other weights is refused.
    """
    options = replace(options or AblateOptions(), **asked)
    refuse_outputs(output, force)
    check_format(output)
    neurons = NeuronFile.read(checked(neurons_path))
    found = Prompts.read(prompts_path, options, neurons)
    everything, prompts = found.everything, found.asked
    mlps = pair.mlps[0] if pair else find_for(model, neurons, processor)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    described = pair.described[0] if pair else describe_model(name, model, mlps, backend)
    Manifest(output.parent).check_model(described)
    of_weights = other_weights(f"{neurons_path}: neurons", neurons.model, described)
    sets = plan_sets(neurons_path, neurons, found, options, shape, of_weights)
    plan, own = sets.plan, sets.own
    exchanged = from_donor(pair, options.donor, options.mode)
    if exchanged:
        check_products(plan, mlps, prompts, options.mode)
    total = Shape.of(shape).total
    tokens = encode_asked(tokenizer, model, found, sets, options, total, processor)
    questions, texts = tokens.questions, tokens.sentences
    notices = sets.notices + tokens.notices
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    responses = neurons_path.parent / "responses.safetensors"
    how = read_how(
        *(options, plan, responses, everything, shape),
        by_product=by_product(neurons),
        exchanged=exchanged,
    )
    asker = Asker(exchanged or model, tokenizer)
    # Only an MLP's neurons leave what comes before it as it is, and no other model's products do.
    way = asking(asker, questions, options, () if exchanged else mlps)
    first_prompt = first_inputs(questions, asker.pad)
    check_canary(model, mlps, first_prompt, backend)
    if exchanged:
        check_exchange(model, exchanged.mlps, first_prompt)
    inputs = ablate_inputs(described, tokenizer, neurons_path, prompts_path, options, pair)
    inputs |= pictured_inputs(processor, prompts)
    beside = files_beside(neurons_path, prompts_path, options)
    with sharing(model, output.parent) as ranks:
        with ranks.in_turn():
            journal = Journal(
                output.parent / "ablate.journal", inputs, ranks=ranks, shard=options.shard
            )
        evaluator = Evaluator(
            asker, mlps, plan, journal, how, options.batch_tokens, backend, options.oom
        )
        rows = rows_asked(plan, how)
        scored = rows_read(plan, texts, how)
        bar = progress_bar(way.n_rows(rows) + len(scored), "ablate", "answer", quiet)
        with bar, journal:
            nll: Mapping[Row, float] = {}
            if texts:
                lengths, score = [len(ids) for ids in texts.ids], partial(asker.score, texts)
                with suppress(PartDone):  # it ends with the answers
                    nll = evaluator.run("sentences", scored, lengths, score, bar.update)
            answers = way.answers(evaluator, rows, bar.update)
        first = same_ablation(plan, how)

        about = [(p.relation, split_name(p, own), p.id) for p in prompts]
        # Under most conditions a prompt's answer is one that was given before.
        given: dict[tuple[int, str], str] = {}

        def asked_of() -> Iterator[Effect]:
            for place, ablation in enumerate(plan):
                condition, asked = ablation.condition.name, ablation.prompts
                for row, answer in zip(asked, answers.of(first[place], asked), strict=True):
                    said, logprob, which, *choice = answer
                    p, key = prompts[row], (row, said)
                    if key not in given:
                        given[key] = given_object(said, p.objects, way.is_right)
                    right = given[key]
                    values = (said, right, int(bool(right)), p.objects[which], logprob)
                    chosen = ("" if k < 0 else p.options[k] for k in choice)
                    yield (condition, *about[row], *values, *chosen)

        accuracy = Accuracy()
        effects = accuracy.count(asked_of())
        if ranks.rank:
            for _ in effects:
                pass
            return accuracy.rows()
        written: dict[Path, Iterable[bytes]] = {
            output: table_pieces(output, effects),
            output.parent / "accuracy.csv": accuracy.pieces(),
            output.parent / "conditions.csv": [conditions_bytes(a.condition for a in plan)],
        }
        if texts:
            table = _perplexity_rows(plan, texts, nll, first)
            written[output.parent / "perplexity.csv"] = [csv_bytes(PERPLEXITY, table)]
        # The output comes first: if this is killed, it says that the others are not finished.
        for file, data in written.items():
            atomic_write(file, data)
        for name_beside in BESIDE:
            if output.parent / name_beside not in written:
                (output.parent / name_beside).unlink(missing_ok=True)
        manifest = Manifest(output.parent)
        manifest.describe(
            versions=versions(),
            model=described,
            seeds=manifest.data.get("seeds", {}) | {"random": list(range(options.random_seeds))},
            fallbacks=fallbacks(described) + notices + evaluator.notices,
        )
        manifest.finish(
            "ablate",
            inputs,
            list(written),
            reads=[neurons_path, prompts_path, *beside.values()],
            conditions=len(plan),
            prompts=len(prompts),
            answers=accuracy.n_effects,
            answering=way.described,
            random_set_size=sets.size,
            batch_plan={"batch_tokens": options.batch_tokens, **evaluator.sizes},
            commands=command(
                "ablate",
                *(name, *(placed(p, output.parent) for p in (neurons_path, prompts_path))),
                *("-o", placed(output, output.parent), *options.words()),
                **loading(described),
            ),
        )
        journal.remove()
    return accuracy.rows()


def _perplexity_rows(
    plan: Sequence[Ablation], texts: Questions, nll: Mapping[Row, float], first: Sequence[int]
) -> list[tuple[str, str, str, int, float]]:
    return [
        (a.condition.name, p.relation, p.id, len(texts.ids[row]) - 1, nll[Row(first[place], row)])
        for place, a in enumerate(plan)
        for row in sentences_of(a, texts)
        for p in [texts.prompts[row]]
    ]
