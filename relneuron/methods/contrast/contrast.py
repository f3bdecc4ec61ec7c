"""The `contrast` stage: two models read the same tokens, every neuron compared per group.

Nothing of a model is kept beside one batch. Counters and the position among the batches are written
together, so a run that is killed goes on with the same bits; under `torchrun` several processes,
each with both models, share the batches and add their counters.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from relneuron.artifact.contrast import APART, NAME, SITES, Contrast
from relneuron.artifact.files import Json, RelneuronError, sha256
from relneuron.artifact.manifest import Manifest, checked, same_model, versions
from relneuron.artifact.prompts import Prompt, read_questions
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.contrast.counter import PairCounter
from relneuron.methods.contrast.job import ContrastJob
from relneuron.methods.contrast.lines import Lines
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.batches import Budget
from relneuron.model.checkpoint import (
    Checkpoint,
    Position,
    Saver,
    drop_checkpoint,
    interruptible,
    refusal,
    write_checkpoint,
)
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import fallbacks
from relneuron.model.meeting import OthersEnd
from relneuron.model.pair import Pair
from relneuron.model.questions import Questions, encode
from relneuron.model.ranks import held, joined
from relneuron.texts.prompts import chat_wrap
from relneuron.texts.tokens import policy_text

CHECKPOINT = "contrast.checkpoint"
NO_GROUP = "prompts"  # the group of prompts that name none


@dataclass(frozen=True)
class Contrasted:
    """A finished contrast, and how this run went."""

    contrast: Contrast
    tokens: int  # that each model read in this run, padding left out
    seconds: float


def contrast_inputs(pair: Pair, prompts: Path, options: ContrastOptions) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "model": same_model(pair.described[0]),
        "model_b": same_model(pair.described[1]),
        "tokenizer": tokenizer_digest(pair.tokenizer),
        "prompts": sha256(prompts),
        **options.recorded(),
        "shard": "{}/{}".format(*options.shard),
    }


def contrast(
    pair: Pair,
    prompts_path: Path,
    folder: Path,
    options: ContrastOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> Contrasted | None:
    """Compare every neuron of two models on the tokens of prompts; write contrast.safetensors.

    A neuron's value m is what its down map reads (arXiv 2406.14144, section 3: behind the scale of
    an (IA)3 adapter). Over the tokens J that are compared, all prompts pooled,
    S = sqrt(1/|J| sum (m^A - m^B)^2), from the differences and never from moments. Each group of
    prompts (`group` or `relation` of a line) has counters of its own; padding is in none.

    A completion is written greedily by the model `options.completion_by` with its own cache of keys
    and values, and read by both (teacher-forced). Its tokens are taken as they were written, the
    end of text left out; the authors' code decodes them and makes tokens of the text again.

    `contrast.checkpoint` is replaced every `checkpoint_seconds` or `checkpoint_batches`, and on
    Ctrl-C; the same call goes on from it and ends with the same bits, with `force` only if it is of
    the same inputs. A contrast that is finished already is left as it is: the result is then None.
    """
    options = options or ContrastOptions()
    lines = lines_of(pair, read_questions(checked(prompts_path), options.template), options)
    inputs = contrast_inputs(pair, prompts_path, options)
    counter = PairCounter(pair, len(lines.groups), backend)
    began, path = perf_counter(), folder / CHECKPOINT
    with joined(pair.a) as ranks, held(folder, ranks), interruptible() as stopped:
        if Manifest(folder).is_done("contrast", inputs, apart=APART, force=force):
            if ranks.rank == 0:
                drop_checkpoint(path, inputs, Contrast)
            return None
        refused = None
        if ranks.rank == 0:
            refused = refusal(path, folder / NAME, inputs, Contrast, force=force)
        # Nobody reads the checkpoint before it was looked at, and all end if it cannot be used.
        if ranks.largest(int(refused is not None)):
            raise refused or OthersEnd()
        job = ContrastJob(
            options=options,
            counter=counter,
            ranks=ranks,
            budget=Budget(options.batch_tokens, options.oom if ranks.size == 1 else "error"),
            saver=Saver(path, inputs, ranks, options, stopped),
            quiet=quiet,
            lines=lines,
        )
        job.run_in_memory()
        found = ranks.add(counter.result(lines.groups))
        tokens = ranks.total(job.n_tokens)
        if ranks.rank == 0:
            if sha256(prompts_path) != inputs["prompts"]:
                raise RelneuronError(
                    f"{prompts_path} changed while it was read",
                    "leave it as it is meanwhile, and read it again with --force",
                )
            _finish(pair, prompts_path, folder, inputs, options, found, job)
    return Contrasted(found, tokens, perf_counter() - began)


def lines_of(pair: Pair, prompts: list[Prompt], options: ContrastOptions) -> Lines:
    """Prompts as both models of a pair read them."""
    if options.chat_template:
        wrap = chat_wrap(pair.tokenizer)
        prompts = [replace(prompt, prompt=wrap(prompt.prompt)) for prompt in prompts]
    n_new = options.max_new_tokens if options.tokens == "completion" else 0
    questions: Questions | None = None
    for model in dict.fromkeys((pair.b, pair.a)):  # each has a context of its own
        questions = encode(pair.tokenizer, model, prompts, answers=False, n_tokens=n_new)
    assert questions is not None, "there are models"
    names = [prompt.relation or NO_GROUP for prompt in prompts]
    groups = list(dict.fromkeys(names))
    return Lines(pair, questions, groups, [groups.index(name) for name in names], options)


def _finish(
    pair: Pair,
    prompts: Path,
    folder: Path,
    inputs: Json,
    options: ContrastOptions,
    found: Contrast,
    job: ContrastJob,
) -> None:
    """Write the counters and the manifest; the checkpoint goes last."""
    if options.shard[1] == 1:
        _check_tokens(found.groups, found.tokens.tolist())
    for site in SITES:
        bad = int(found.arrays[f"n_nonfinite.{site}"].sum())
        if bad:
            told = f"{bad} values of {site} are not finite: they are in no moment"
            warnings.warn(told, stacklevel=3)
    path = folder / NAME
    if not (folder / CHECKPOINT).exists():
        # Without it counters that have no manifest yet would be another's, not to be overwritten.
        nothing = Checkpoint(found.take([]), Position(None, 0, 0))
        write_checkpoint(folder / CHECKPOINT, inputs, nothing)
    found.write(path)
    (described, other), budget = pair.described, job.budget
    manifest = Manifest(folder)
    manifest.describe(
        versions=versions(),
        model=described,
        model_b=other,
        dtype=described["dtype"],
        sites=list(SITES),
        threshold=0.0,
        groups=found.groups,
        tokens={
            "compared": dict(zip(found.groups, found.tokens.tolist(), strict=True)),
            "special": policy_text(pair.tokenizer),
            "padding": "left, masked; position ids are explicit",
        },
        batch_plan={
            "batch_tokens": options.batch_tokens,
            **job.sizes,
            "order": "longest prompt first, within a batch by group",
            **({"plan_changed": f"{budget.tokens} tokens a forward"} if budget.notices else {}),
        },
        fallbacks=fallbacks(described),
    )
    made_by = command(
        "contrast",
        *(described["id"], other["id"], placed(prompts, folder), "-o", STUDY, *options.words()),
        **loading(described),
    )
    manifest.finish("contrast", inputs, [path], reads=[], apart=APART, commands=made_by)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _check_tokens(groups: Sequence[str], tokens: Sequence[int]) -> None:
    if not any(tokens):
        raise RelneuronError(
            "no completion has a token: the model ends each text at once",
            "compare the tokens of the prompts (--tokens prompt), or give it --chat-template",
        )
    for name, n in zip(groups, tokens, strict=True):
        if not n:
            warnings.warn(f"group {name!r} has no token that was compared", stacklevel=4)
