"""The `record` stage: one instrumented pass over the prompts.

It asks every prompt (validated.csv) and pools each det prompt's responses (responses.safetensors).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import (
    Json,
    atomic_write,
    create_safetensors,
    csv_bytes,
    refuse_overwrite,
    rows_digest,
    sha256,
)
from relneuron.artifact.journal import Journal, is_unfinished, progress_bar
from relneuron.artifact.manifest import Manifest, same_model, versions
from relneuron.artifact.neurons import Shape
from relneuron.artifact.reading import RESPONSE_ROWS
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.responses.asked import read_asked
from relneuron.methods.responses.options import RecordOptions
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, batch_sizes
from relneuron.model.canary import check_canary
from relneuron.model.converse import Step
from relneuron.model.identity import tokenizer_digest
from relneuron.model.layers import device_of
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions, is_correct
from relneuron.model.ranks import sharing
from relneuron.model.states import LayerState, Tokens
from relneuron.texts.tokens import policy_text


def record_inputs(model: Json, tokenizer: Any, prompts: Path, options: RecordOptions) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": sha256(prompts),
        "validate": options.validate,
        **options.recorded(),
    }


def pooled_tokens(mask: Tensor, *, pooling: str, exclude_bos: bool) -> Tensor:
    """Which tokens (B, T) of a left- or right-padded batch enter a prompt's response, as bool.

    `mean` takes all effective tokens, BOS among them (arXiv 2502.17355, section 3.2, with the
    reading of methods A6); `exclude_bos` leaves out the first; `last` takes the last one only.
    """
    rank = mask.cumsum(1)
    chosen = mask.bool()
    if pooling == "last":
        return chosen & (rank == rank[:, -1:])
    if exclude_bos:
        chosen = chosen & (rank > 1)
    return chosen


def _modules(mlp: Part) -> Json:
    """Each site's module, with {} for the layer, and at which of its outputs the neurons begin."""
    if isinstance(mlp, Experts):
        parts = {site: (mlp.path, 0) for site in ("gate", "up", "down")}
    else:
        maps = [part for part in (mlp.gate, mlp.up, mlp.down_map) if part is not None]
        parts = {part.site: (part.path, part.start) for part in maps}
    parts |= {part.site: (part.path, part.start) for part in mlp.projections}
    return {
        site: [path.replace(f".{mlp.layer}.", ".{}.", 1), start]
        for site, (path, start) in parts.items()
    }


class _Responses:
    """responses.safetensors while it is filled: one batch in memory, the rest on the disk."""

    def __init__(
        self, path: Path, shape: Json, rows: list[int], divisors: list[int], about: Json
    ) -> None:
        self.order = Shape.of(shape)
        self._row = {row: i for i, row in enumerate(rows)}
        self._divisor = dict(zip(rows, divisors, strict=True))
        self._maps = create_safetensors(
            path,
            {f"{site}.{layer}": (len(rows), width) for layer, site, width in self.order.blocks()},
            # One key only, as in every file: safetensors writes several in any order.
            {RESPONSE_ROWS: json.dumps(about, ensure_ascii=False)},
        )

    def wants(self, rows: Sequence[int]) -> bool:
        return rows[0] in self._row

    def new_sums(self, mlp: Part, n_rows: int, device: torch.device) -> dict[str, Tensor] | None:
        """Zeros (n_rows, .) for one MLP and batch, by site; None where text runs none of it."""
        if not mlp.runs:
            return None
        width, n = mlp.width // mlp.n_experts, n_rows * mlp.n_experts
        shapes = {"gate": (n, width), "up": (n, width), "down": (n_rows, mlp.hidden)}
        shapes |= {part.site: (n_rows, part.width) for part in mlp.projections}
        return {
            site: torch.zeros(shapes[site], device=device)
            for site in self.order.widths
            if site in shapes
        }

    def store(self, mlp: Part, sums: dict[str, Tensor], rows: Sequence[int]) -> None:
        """Write a batch's means at one MLP: sums over pooled tokens by their number."""
        divisors = torch.tensor([self._divisor[row] for row in rows], device="cpu").unsqueeze(1)
        places = [self._row[row] for row in rows]
        for site, values in sums.items():
            is_inner = site in ("gate", "up")
            inside = mlp.inside if is_inner else slice(None)
            means = ((mlp.unfold(values) if is_inner else values).cpu() / divisors).numpy()
            self._maps[f"{site}.{mlp.layer}"][places, inside] = means

    def places(self, rows: Sequence[int]) -> list[int]:
        """Which rows of the file some prompts have."""
        return [self._row[row] for row in rows if row in self._row]

    def digest(self, places: Sequence[int]) -> str | None:
        """Of some rows as they are in the file; None where there is none."""
        return rows_digest(list(self._maps.values()), places) if places else None

    def flush(self) -> None:
        for array in self._maps.values():
            array.flush()

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self._maps.values())


def _ask_all(
    asker: Asker,
    mlps: Sequence[Part],
    questions: Questions,
    responses: _Responses,
    journal: Journal,
    *,
    batches: Sequence[Sequence[int]],
    budget: Budget,
    pooling: dict[str, Any],
    validate: bool,
    backend: str,
    quiet: bool,
) -> None:
    """Ask (or only read) every batch that the journal lacks; det batches leave responses, too."""
    total = len(questions.prompts)
    # Only what is said is kept: no log-probability of what follows a space is asked for.
    asked = Questions(questions.prompts, questions.ids, questions.answers)
    bar = progress_bar(total, "record", "prompt", quiet)
    with bar, journal, Patch(mlps, [LayerState() for _ in mlps], backend=backend) as patch:

        def pool_the_prompt(step: Step) -> None:
            patch.tokens = Tokens()
            if step.n_answer == 0:
                chosen = pooled_tokens(step.mask, **pooling)
                ids = step.rows.int()
                patch.tokens.prompt_ids = torch.where(chosen, ids[:, None], -1).int()

        def ask(rows: list[int]) -> list[str]:
            downs: dict[int, Tensor] = {}
            for mlp, state in zip(mlps, patch.states, strict=True):
                sums = responses.new_sums(mlp, len(rows), device_of(mlp.module))
                if responses.wants(rows) and sums is not None:
                    # The MLPs of a layer write into one stream: their down is what they sum to.
                    sums["down"] = downs.setdefault(mlp.layer, sums["down"])
                    state.responses = sums
            try:
                if validate:
                    said = asker.ask(asked, rows, pool_the_prompt).predictions
                else:
                    asker.read(questions, rows, pool_the_prompt)
                    said = [""] * len(rows)
                for mlp, state in zip(mlps, patch.states, strict=True):
                    if state.responses is not None:
                        responses.store(mlp, state.responses, rows)
            finally:
                for state in patch.states:
                    state.responses = None
            return said

        for number, rows in enumerate(batches):
            if journal.takes(str(number)):
                said = budget.run(rows, questions.length, ask)
                places = responses.places(rows)
                noted = {"rows": places, "digest": responses.digest(places)}
                journal.add(str(number), {"predictions": said, **noted})
            bar.update(len(rows))
        journal.together()


def record(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts_path: Path,
    folder: Path,
    options: RecordOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> float | None:
    """Ask every prompt and write validated.csv and responses.safetensors; returns clean accuracy.

    A det prompt's response of a neuron is the mean over its pooled tokens of the neuron's raw
    output: gate_proj's (before the activation), up_proj's, down_proj's; float32. The tensors
    `gate.<layer>`, `up.<layer>` (N, F) and `down.<layer>` (N, D) have one row per det prompt, in
    the order of prompts.jsonl; the file's metadata names them, their file's digest, the pooling and
    the model's digest. Memory holds one batch of responses at a time: rows go to a memory map, and
    a journal of finished batches, with the digests of their rows, lets a killed run go on with the
    same bits; rows that are not as they were noted are asked for again. With `attention` also the
    outputs of the attention's projections, as `q.<layer>` to `o.<layer>`.

    Without `validate`, or where no prompt has an object (sentences for concepts), nothing is asked:
    one forward a prompt, no prediction, every prompt counts as correct, None in place of accuracy.
    """
    options = options or RecordOptions()
    pooling, exclude_bos = options.pooling, options.exclude_bos
    output = folder / "validated.csv"
    refuse_overwrite(output, force or is_unfinished(output, "record"))
    asked = read_asked(prompts_path, model, tokenizer, options)
    prompts, options, questions = asked.prompts, asked.options, asked.questions
    batches, det, n_pooled = asked.batches, asked.det, asked.n_pooled
    validate = options.validate
    mlps = find_mlps(model, attention=options.attention)
    shape = model_shape(mlps)
    if options.attention:
        check_canary(model, mlps, Asker(model, tokenizer).pad(questions.ids[:1])[0], backend)
    described = describe_model(name, model, mlps, backend)
    inputs = record_inputs(described, tokenizer, prompts_path, options)
    for notice in questions.notices:
        warnings.warn(notice, stacklevel=2)
    about = asked.about(inputs["prompts"], described["digest"])
    copy, path = folder / "prompts.jsonl", folder / "responses.safetensors"
    with sharing(model, folder, rows=True) as ranks:
        with ranks.in_turn():
            data = prompts_path.read_bytes()
            if ranks.rank == 0 and not (copy.exists() and copy.read_bytes() == data):
                refuse_overwrite(copy, force)
                atomic_write(copy, data)
            journal = Journal(folder / "record.journal", inputs, ranks=ranks, shard=options.shard)
            if journal.is_first and not journal.done:
                path.unlink(missing_ok=True)
            responses = _Responses(path, shape, det, n_pooled, about)
            journal.before_commit = responses.flush
            journal.check(responses.digest, path.name)
        budget = Budget(options.batch_tokens, options.oom, journal)
        _ask_all(
            Asker(model, tokenizer),
            mlps,
            questions,
            responses,
            journal,
            batches=batches,
            budget=budget,
            pooling={"pooling": pooling, "exclude_bos": exclude_bos},
            validate=validate,
            backend=backend,
            quiet=quiet,
        )
        predictions = [""] * len(prompts)
        for number, rows in enumerate(batches):
            said = journal.done[str(number)]["predictions"]
            for row, prediction in zip(rows, said, strict=True):
                predictions[row] = prediction
        right = partial(is_correct, accept_object_prefix=options.accept_object_prefix)
        correct = [
            not validate or any(right(prediction, name) for name in prompt.objects)
            for prompt, prediction in zip(prompts, predictions, strict=True)
        ]
        accuracy = sum(correct) / len(correct) if validate else None
        if ranks.rank:
            return accuracy
        table = zip((prompt.id for prompt in prompts), predictions, map(int, correct), strict=True)
        atomic_write(output, csv_bytes(("id", "prediction", "correct"), table))
        manifest = Manifest(folder)
        manifest.describe(
            versions=versions(),
            model=described,
            dtype=described["dtype"],
            sites=list(responses.order.widths),
            modules=_modules(mlps[0]),
            threshold=None,  # responses are means, nothing is counted
            tokens={
                "pooling": pooling,
                "first_token": "excluded" if exclude_bos else "included",
                "special": policy_text(tokenizer),
                "first_prompt_ids": questions.ids[0][:8],
                "padding": "left, masked; position ids are explicit",
                "pooled": sum(n_pooled),
            },
            batch_plan={
                "batch_tokens": options.batch_tokens,
                **batch_sizes(batches, questions.length),
                "order": "by split and language, then by length",
            },
            memory={
                "responses": "streamed by block of prompts: one batch in memory, the rest on disk",
                "responses_on_disk_bytes": responses.n_bytes,
                "responses_in_memory_bytes": responses.n_bytes // len(det) * max(map(len, batches)),
            },
            fallbacks=fallbacks(described) + questions.notices + budget.notices,
        )
        made_by = command(
            "record",
            *(name, placed(prompts_path, folder), "-o", STUDY, *options.words()),
            **loading(described),
        )
        # No command leaves out the validation of prompts that have objects.
        is_asked = validate or not any(prompt.object for prompt in prompts)
        made = [output, path, copy]
        made_by = made_by if is_asked else []
        manifest.finish("record", inputs, made, reads=[copy], commands=made_by)
        journal.remove()
    return accuracy
