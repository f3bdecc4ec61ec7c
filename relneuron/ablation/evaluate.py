"""Asks a model its prompts under many ablations at once: each row has its own neurons off.

The `ablate` stage calls it. A row is one condition and one prompt; conditions share batches, so a
condition with three prompts costs three rows and not a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relneuron.ablation.conditions import Ablation
from relneuron.ablation.exchange import puts_of
from relneuron.ablation.options import DONOR
from relneuron.ablation.said import PackedRows, Row, Said
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Shape
from relneuron.model.alike import LEAST_ROWS
from relneuron.model.batches import Budget, batch_sizes, cut_off
from relneuron.model.converse import Step
from relneuron.model.exchange import Exchanged, Rows
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Tokens, off_state, replacements

WAVE_BYTES = 2**28  # of masks as bytes, before they are packed
ANYONE = -1  # whose rows share batches with all others that may


# What changes neurons in the forwards, by the conditions of its `tokens`.
Acting = Patch | Exchanged

# Says something of each of some prompts, and before each forward what its tokens are.
Ask = Callable[[list[int], Callable[[Step], None]], list[Any]]


class Answering(Protocol):
    """Who answers on some device: an Asker, or the Scorer of `nll`."""

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class How:
    """What happens to the chosen neurons.

    `zero`: outputs become 0; `scale`: outputs times `factor`, or with `at_product` what down reads;
    `mean`: outputs become `means`, (M,) float32 of all neurons by condition name. With a
    `model` that runs in place of the patched one, their products become what it says.
    """

    mode: str = "zero"
    factor: float = 0.0
    at_product: bool = False
    means: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    model: Exchanged | None = None


def same_ablation(plan: Sequence[Ablation], how: How) -> list[int]:
    """For each condition the first one that does just the same: it is asked for both."""
    first: dict[tuple[bytes, int, bool], int] = {}
    values = (id(how.means.get(a.condition.name)) for a in plan)
    donors = (a.condition.kind == DONOR for a in plan)
    keys = zip((a.places.tobytes() for a in plan), values, donors, strict=True)
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def _anyone(prompt: int) -> int:
    return ANYONE


def plan_rows(
    rows: Sequence[Row],
    lengths: Sequence[int],
    batch_tokens: int,
    n_conditions: int,
    alone: Callable[[int], int] = _anyone,
    by_prompt: bool = False,
) -> Iterator[tuple[range, PackedRows]]:
    """Batches of rows of about the same length, at most `batch_tokens` with padding.

    Conditions come in waves of `n_conditions`, whose masks are held together; each batch says
    which wave it belongs to. Within a batch rows stand by condition. Only rows of prompts for which
    `alone` says the same share a batch: those of one prompt with pictures. With `by_prompt` rows
    of one prompt stand together, each with as much padding as without (model/alike.py).
    """
    numbers = (rows if isinstance(rows, PackedRows) else PackedRows(rows)).numbers
    conditions, prompts = numbers.T
    waves, n_tokens = conditions // n_conditions, np.array(lengths, np.int64)[prompts]
    company = np.array([alone(prompt) for prompt in range(len(lengths))], np.int64)[prompts]
    order = np.lexsort((prompts, conditions, n_tokens, company, waves))
    numbers, n_tokens, kinds = numbers[order], n_tokens[order], np.stack([waves, company], 1)[order]
    # Where another wave begins, or rows that share no batch with those before them.
    begins = np.flatnonzero((kinds[1:] != kinds[:-1]).any(1)) + 1
    for start, stop in pairwise([0, *begins.tolist(), len(numbers)]):
        if start == stop:
            continue
        number = int(kinds[start, 0])
        wave = range(number * n_conditions, (number + 1) * n_conditions)
        own, own_tokens = numbers[start:stop], n_tokens[start:stop]
        cuts = cut_off(range(stop - start), own_tokens.tolist().__getitem__, batch_tokens)
        spans = (slice(batch[0], batch[-1] + 1) for batch in cuts)
        batches = _by_prompt(own, own_tokens, spans) if by_prompt else (own[span] for span in spans)
        for batch in batches:
            yield wave, PackedRows.of(batch[np.lexsort(batch.T[::-1])])


def wave_size(mode: str, total: int) -> int:
    """How many conditions have their masks held together, of a model of so many neurons."""
    return max(1, WAVE_BYTES // ((1 if mode == "zero" else 5) * total) - 1)


def _by_prompt(
    numbers: NDArray[np.int32], n_tokens: NDArray[np.int64], spans: Iterable[slice]
) -> Iterator[NDArray[np.int32]]:
    """The rows of all batches of one length, by prompt, in as many batches of about one size.

    Batches with padding, and small ones, stay as they are: so are the bits of their answers.
    """

    def length_of(span: slice) -> int:
        found = n_tokens[span]
        is_same = found[0] == found[-1]  # they are in the order of their lengths
        return int(found[0]) if is_same and len(found) >= LEAST_ROWS else 0

    for length, some in groupby(spans, length_of):
        same = list(some)
        if not length:
            yield from (numbers[span] for span in same)
            continue
        rows = numbers[same[0].start : same[-1].stop]
        rows = rows[np.lexsort(rows.T)]
        ends = [len(rows) * k // len(same) for k in range(len(same) + 1)]
        yield from (rows[a:b] for a, b in pairwise(ends))


def wave_states(
    plan: Sequence[Ablation], wave: range, mlps: Sequence[Part], how: How
) -> list[LayerState]:
    """Per Part, what switches off the neurons of the conditions of a wave; row 0 is clean."""
    shape = Shape.of(model_shape(mlps))
    members = [plan[i] for i in wave if i < len(plan)]
    off = np.zeros((len(members) + 1, shape.total), bool)
    for row, ablation in enumerate(members):
        off[row + 1, ablation.places] = True
    states = []
    for mlp in mlps:
        spans = {site: shape.span(mlp.layer, site) for site in shape.widths}
        chosen = {site: off[:, span] for site, span in spans.items() if off[:, span].any()}
        if how.mode == "zero":
            states.append(off_state(mlp, chosen))
            continue
        if how.at_product:
            inner = [chosen.pop(site) for site in ("gate", "up") if site in chosen]
            # An activation times a factor is the product times it.
            chosen |= {"act": np.logical_or.reduce(inner)} if inner else {}
        shifts = None
        if how.mode == "mean":
            shifts = {site: _means(how, members, spans[site]) for site in chosen}
        states.append(LayerState(replace=replacements(mlp, chosen, how.factor, shifts)))
    return states


def _means(how: How, members: Sequence[Ablation], inside: slice) -> Any:
    """(C, .) float32, what the neurons of a site become under each condition; row 0 is clean."""
    rows = [np.zeros(inside.stop - inside.start, np.float32)]
    rows += [how.means[ablation.condition.name][inside] for ablation in members]
    return np.stack(rows)


@dataclass
class Evaluator:
    """Runs rows through the model; what is finished stands in the journal under the batch's key."""

    asker: Answering
    mlps: Sequence[Part]
    plan: Sequence[Ablation]
    journal: Journal
    how: How
    batch_tokens: int
    backend: str = "auto"
    oom: str = "split"

    def __post_init__(self) -> None:
        total = Shape.of(model_shape(self.mlps)).total
        self._wave_size = wave_size(self.how.mode, total)
        # Of all batches, whoever runs them: `batches.batch_sizes`.
        self.sizes = batch_sizes([], len)
        self._budget = Budget(self.batch_tokens, self.oom, self.journal)

    @property
    def notices(self) -> list[str]:
        """What a reader of the results must know of how they came about."""
        return self._budget.notices

    def run(
        self,
        what: str,
        rows: Sequence[Row],
        lengths: Sequence[int],
        ask: Ask,
        advance: Callable[[int], object],
        positions: str = "all",
        alone: Callable[[int], int] = _anyone,
        by_prompt: bool = False,
    ) -> Said:
        """What `ask(prompts, before_step)` says of each row; `what` names the rows' batches.

        At the tokens `positions` (all, prompt, last) the neurons are off. `by_prompt`: as
        `plan_rows`.
        """
        states: list[LayerState] = []
        current = range(0)
        batches = list(
            plan_rows(rows, lengths, self.batch_tokens, self._wave_size, alone, by_prompt)
        )
        more = batch_sizes((b for _, b in batches), lambda row: lengths[row.prompt])
        self.sizes = {name: n + more[name] for name, n in self.sizes.items()}
        for number, (wave, batch) in enumerate(batches):
            key = f"{what} {number}"
            if self.journal.takes(key):
                if wave != current:
                    states, current = self._begin(wave), wave
                with self._acting(states) as acting:
                    part = partial(self._ask, acting, wave, ask, positions)
                    said = self._budget.run(batch, lambda row: lengths[row.prompt], part)
                self.journal.add(key, said)
            advance(len(batch))
        self.journal.together()
        done = (self.journal.done[f"{what} {number}"] for number in range(len(batches)))
        return Said((batch for _, batch in batches), done)

    def _begin(self, wave: range) -> list[LayerState]:
        """What a patch does under the conditions of a wave; an exchanged model is told it."""
        model = self.how.model
        if model is None:
            return wave_states(self.plan, wave, self.mlps, self.how)
        members = [self.plan[i] for i in wave if i < len(self.plan)]
        model.puts = puts_of(members, model.mlps, model_shape(self.mlps))
        return []

    def _acting(self, states: Sequence[LayerState]) -> AbstractContextManager[Acting]:
        """What changes neurons in the forwards of a batch."""
        if self.how.model is not None:
            return nullcontext(self.how.model)
        return Patch(self.mlps, states, backend=self.backend)

    def _ask(
        self, acting: Acting, wave: range, ask: Ask, positions: str, part: list[Row]
    ) -> list[Any]:
        """One forward's rows, or those of a few."""
        ids = torch.tensor([row.condition - wave.start + 1 for row in part], device="cpu").int()
        mark = _marker(acting, ids.to(self.asker.device), positions)
        if isinstance(acting, Exchanged):
            mark = self._with_rows(acting, part, mark)
        return ask([row.prompt for row in part], mark)

    def _with_rows(
        self, model: Exchanged, part: list[Row], mark: Callable[[Step], None]
    ) -> Callable[[Step], None]:
        """`mark` that also tells an exchanged model what the rows of the next forward are."""
        asked, device = [self.plan[row.condition] for row in part], self.asker.device
        is_donor = torch.tensor([a.condition.kind == DONOR for a in asked], device=device)
        is_chosen = torch.tensor([a.places.size > 0 for a in asked], device=device)

        def mark_rows(step: Step) -> None:
            mark(step)
            prompts = [part[row].prompt for row in step.rows.tolist()]
            model.rows = Rows(prompts, is_donor[step.rows], is_chosen[step.rows])

        return mark_rows


def _marker(acting: Acting, ids: Tensor, positions: str) -> Callable[[Step], None]:
    """Says before each forward which condition each token has; 0 = clean."""

    def mark(step: Step) -> None:
        conditions = ids[step.rows]
        width = step.mask.shape[1]
        # In the forward of the prompt all that is in the pictures belongs to the prompt.
        if positions != "all" and not (positions == "prompt" and step.has_pictures):
            column = torch.arange(width, device=ids.device)
            prompt_end = width - step.n_answer
            inside = column < prompt_end if positions == "prompt" else column >= prompt_end - 1
            conditions = conditions[:, None] * inside
        n_needed = step.n_needed if step.n_needed < width else None
        acting.tokens = Tokens(
            conditions=conditions.int(), n_needed=n_needed, stacked=step.has_pictures
        )

    return mark
