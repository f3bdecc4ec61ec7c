"""The `generate` command's work: greedy text for every prompt, under every mask that is asked for.

Masks stand side by side in the rows of a batch; optionally one group's neurons are set to their
mean activation throughout (ablation/steer.py).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.conditions import Ablation, empty_sets, read_sets
from relneuron.ablation.evaluate import Evaluator, How, Row, same_ablation
from relneuron.ablation.options import CLEAN, GenerateOptions
from relneuron.ablation.steer import mean_activations, steering_states
from relneuron.artifact.counts import NAME
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_overwrite,
    require,
    sha256,
)
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.manifest import Manifest, checked, locked, same_model
from relneuron.artifact.neurons import ATTENTION, NeuronFile
from relneuron.artifact.prompts import Prompt
from relneuron.artifact.reading import parse_json, read_lines
from relneuron.model.ask import Asker, Step, cache_of
from relneuron.model.canary import check_canary
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.load import describe_model
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions, encode
from relneuron.texts.tokens import listed, whole_text, without_blanks

FIELD = "{prompt}"


class Generated(NamedTuple):
    """One line of the output; `n_tokens` are all tokens made, EOS left out."""

    mask: str  # whose neurons are off
    set: str  # whose neurons are at their mean activation
    id: str
    prompt: str
    output: str  # up to the first stop string
    n_tokens: int
    stopped: str  # by eos, a stop string, or the length


# --- prompts ---------------------------------------------------------------------------------


def read_questions(path: Path, template: str | None = None) -> list[Prompt]:
    """The prompts of a .txt (one a line, empty lines skipped) or .jsonl file (`prompt`, `id`).

    Without an `id` a prompt is named by its line, from 1. A `template` has the one field
    `{prompt}`.
    """
    if template is not None and template.count(FIELD) != 1:
        raise RelneuronError(
            f"the template {template!r} does not have {FIELD} once", f"use 'Q: {FIELD}', say", 2
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise RelneuronError(f"{path} is neither .txt nor .jsonl", "give one of the two", 2)
    if not path.is_file():
        raise RelneuronError(f"{path} does not exist", "give a file of prompts", 2)
    found: dict[str, Prompt] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        text, name, where = line, str(number), f"{path}, line {number}"
        if path.suffix == ".jsonl":
            fix = "give one JSON object a line with the field prompt"
            record = parse_json(line, where, fix)
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise RelneuronError(f"{where}: not a prompt (it has no text called prompt)", fix)
            text, given = record["prompt"], record.get("id")
            name = str(number if given is None else given)
        if name in found:
            raise RelneuronError(
                f"{path}, line {number}: a second prompt with the id {name}", "give each its own"
            )
        asked = text if template is None else template.replace(FIELD, text)
        found[name] = Prompt(name, "", "", "", template or "", "", "", asked)
    if not found:
        raise RelneuronError(f"{path} holds no prompt", "give one prompt a line")
    return list(found.values())


# --- one batch -------------------------------------------------------------------------------


class Continuer(Asker):
    """Continues batches of prompts, each row until its own end."""

    def __init__(self, model: Any, tokenizer: Any, decoding: GenerateOptions) -> None:
        super().__init__(model, tokenizer)
        self.decoding = decoding

    @torch.no_grad()
    def go_on(
        self, questions: Questions, rows: Sequence[int], before_step: Callable[[Step], None]
    ) -> list[tuple[str, int, str]]:
        """The text, number of tokens and reason of the end of each row's continuation."""
        tokens, mask = self.pad([questions.ids[row] for row in rows])
        # Padding is no token of the prompt: it must not be penalised.
        prompt_rows, columns = mask.nonzero(as_tuple=True)
        prompt_tokens = tokens[prompt_rows, columns]
        seen = torch.empty(0, device="cpu")
        made: list[list[int]] = [[] for _ in rows]
        ends = [""] * len(rows)
        going = list(range(len(rows)))
        entering, cache = mask, None
        for number in range(self.decoding.max_new_tokens):
            places = torch.tensor(going, device=tokens.device)
            before_step(Step(places, entering, min(number, 1), 1))
            out = self._forward(tokens, mask, 1, cache)
            logits = out.logits[:, -1].float()
            if number == 0:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[prompt_rows, prompt_tokens] = True
            chosen = self._choose(logits, seen)
            for row, token in zip(going, chosen.tolist(), strict=True):
                ends[row] = ends[row] or self._end(made[row], token)
            stay = [i for i, row in enumerate(going) if not ends[row]]
            if not stay:
                break
            cache, tokens = cache_of(out), chosen[:, None]
            (state,) = cache.values()
            if len(stay) < len(going) and hasattr(state, "batch_select_indices"):
                kept = torch.tensor(stay, device=tokens.device)
                state.batch_select_indices(kept)
                going = [going[i] for i in stay]
                tokens, mask, seen = tokens[kept], mask[kept], seen[kept]
            entering = torch.ones_like(tokens)
            mask = torch.cat([mask, entering], 1)
        return [(self._cut(t), len(t), end or "length") for t, end in zip(made, ends, strict=True)]

    def _choose(self, logits: Tensor, seen: Tensor) -> Tensor:
        """The next token of each row (B,); `seen` (B, V) learns of it."""
        penalty = self.decoding.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        chosen = torch.where(seen, lowered, logits).argmax(-1)
        seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _end(self, made: list[int], token: int) -> str:
        """Take a row's next token; why it is the last one, or nothing."""
        if token in self._ends:
            return "eos"
        made.append(token)
        text = self._decoded(made) if self.decoding.stop else ""
        return "stop string" if any(stop in text for stop in self.decoding.stop) else ""

    def _cut(self, made: Sequence[int]) -> str:
        text = whole_text(self._decoded, made)
        places = [text.find(stop) for stop in self.decoding.stop]
        return text[: min((place for place in places if place >= 0), default=None)]


# --- the command -----------------------------------------------------------------------------


def generate_inputs(
    model: Json,
    tokenizer: Any,
    neurons: Path,
    prompts: Path,
    counts: Path | None,
    options: GenerateOptions,
) -> Json:
    """What the output depends on, for the journal."""
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons),
        "prompts": sha256(prompts),
        **options.recorded(),
        "counts": sha256(counts) if counts else None,
    }


def plan_masks(neurons: NeuronFile, off: Sequence[str], shape: Json, n: int) -> list[Ablation]:
    """The masks asked for by the names of their sets, each once, asked all `n` prompts."""
    sets, _ = read_sets(neurons, shape)
    if CLEAN in sets:
        raise RelneuronError(f"a set is named {CLEAN}, as is the model itself", "rename the set")
    sets = {CLEAN: np.empty(0, np.int64)} | sets
    plan = []
    for name in dict.fromkeys(name or CLEAN for name in off or [CLEAN]):
        check_set(name, sets)
        about = Condition(name, "set" if name != CLEAN else CLEAN, n_neurons=len(sets[name]))
        plan.append(Ablation(about, np.sort(sets[name]), range(n)))
    return plan


def check_set(name: str, known: Any) -> None:
    """Refuse a name that is no set's."""
    if name not in known:
        raise RelneuronError(
            f"the neurons have no set {name!r}", f"use some of {', '.join(known)}", 2
        )


def generate(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    prompts_path: Path,
    output: Path,
    options: GenerateOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> list[Generated]:
    """Continue every prompt under every mask of `options.off` and write the JSONL `output`.

    The neurons of a mask are at zero at all tokens of the prompt and of the output; `clean` or ""
    is no mask. With `options.set_to` the neurons of that set are instead at their mean activation
    in the counts of `options.counts` (default: the neurons' folder), at all tokens, whatever is
    off.

    Lines come in order of masks, then prompts. A batch holds `options.batch_tokens` tokens of
    prompts and outputs at most. `<output>.journal` lets a killed run go on; it is removed at the
    end.
    """
    options = options or GenerateOptions()
    set_to = options.set_to
    journal_path = output.with_name(f"{output.name}.journal")
    refuse_overwrite(output, force or journal_path.exists())
    neurons = NeuronFile.read(checked(neurons_path))
    prompts = read_questions(checked(prompts_path), options.template)
    mlps = find_mlps(model, attention=ATTENTION[0] in neurons.model)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    plan = plan_masks(neurons, options.off, shape, len(prompts))
    asked = {a.condition.name: a.places for a in plan if a.condition.kind != CLEAN}
    # With --set something is done, whatever is off.
    for notice in empty_sets({"": (0,), **asked} if set_to or not asked else asked):
        warnings.warn(notice, stacklevel=2)
    counts = (options.counts or neurons_path.parent) / NAME if set_to else None
    steering: Any = nullcontext()
    if set_to and counts:
        steering = steering_patch(mlps, neurons, set_to, counts, backend)
    questions = encode(tokenizer, model, prompts, answers=False, n_tokens=options.max_new_tokens)
    _, blank = without_blanks(tokenizer, [p.prompt for p in prompts], ["a"] * len(prompts))
    if blank:
        named = listed([prompts[row].id for row in blank])
        why = "which the tokenizer joins to the next word: a model hardly knows it alone"
        warnings.warn(f"{named}: the prompt ends in a space, {why}", stacklevel=2)
    described = describe_model(name, model, mlps, backend)
    notices = other_weights(f"{neurons_path}: neurons", neurons.model, described)
    if counts:
        counted_in = Manifest(counts.parent).data.get("model", {})
        notices += other_weights(f"{counts}: means", counted_in, described)
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    continuer = Continuer(model, tokenizer, options)
    check_canary(model, mlps, continuer.pad(questions.ids[:1])[0], backend)
    masks = [ablation.condition.name for ablation in plan]
    inputs = generate_inputs(described, tokenizer, neurons_path, prompts_path, counts, options)
    first = same_ablation(plan, How())
    rows = [Row(place, p) for place in dict.fromkeys(first) for p in range(len(prompts))]
    lengths = [len(ids) + options.max_new_tokens for ids in questions.ids]
    with locked(output.parent):
        journal = Journal(journal_path, inputs)
        evaluator = Evaluator(
            continuer, mlps, plan, journal, How(), options.batch_tokens, backend, options.oom
        )
        ask = partial(continuer.go_on, questions)
        bar = progress_bar(len(rows), "generate", "text", quiet)
        with bar, journal, steering:
            found = evaluator.run("texts", rows, lengths, ask, bar.update)
        lines = [
            Generated(mask, set_to or "", p.id, p.prompt, *found[Row(first[place], i)])
            for place, mask in enumerate(masks)
            for i, p in enumerate(prompts)
        ]
        text = "".join(json.dumps(g._asdict(), ensure_ascii=False) + "\n" for g in lines)
        atomic_write(output, text.encode())
        journal.remove()
    return lines


def steering_patch(
    mlps: Sequence[Part], neurons: NeuronFile, name: str, counts: Path, backend: str
) -> Patch:
    """A patch that sets the neurons of a set to their mean activation."""
    check_set(name, neurons.sets)
    if not neurons.sets[name]:
        raise RelneuronError(
            f"no neuron to set to its mean: the set {name} has none",
            "give a set with neurons: identify with other options, such as a larger --top-rate",
        )
    require(counts, "count MODEL GROUP=TEXT... -o DIR --moments")
    means = mean_activations(counts.parent, name, model_shape(mlps))
    return Patch(mlps, steering_states(mlps, [[]], neurons.sets[name], means), backend=backend)
