"""One type of model, checked: what relneuron says of it and does with it, against plain hooks.

`bench.zoo` runs `check` in a process of its own for each type and writes its Row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import relneuron
from bench.zoo import build, oracle
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.commands import supports
from relneuron.model.gated import find_gated_mlps, inspect_layers
from relneuron.testing.accuracy import assert_accurate

RIGHT, WRONG, UNPROVED, FAILED, NONE = "right", "wrong", "unproved", "failed", ""
# Of an ablation: its kernels in torch give the same bits as hooks, and the compiled ones numbers
# that are as near to the truth (RIGHT); all give the same bits; both are only as near.
SAME, ROUNDED = "right, same bits", "right, rounded"
GROUPS = 3
NEW_TOKENS = 6


class Row(NamedTuple):
    """A line of the csv: what became of one type."""

    model_type: str
    mapping: str
    model_class: str
    layers: int
    supported: int  # layers
    verdict: str  # supported | refused | not built | no forward
    oracle: str  # what the plain reading found
    counts: str
    ablation: str
    restored: str
    generation: str
    attribution: str
    reason: str


@dataclass
class Inputs:
    """Two batches of text: one without padding to read from, one padded on the left, in groups."""

    ids: Tensor
    mask: Tensor
    groups: Tensor  # (B, T), -1: none

    @classmethod
    def make(cls, rows: int, length: int, padded: bool) -> Inputs:
        generator = torch.Generator().manual_seed(2)
        low, high = build.TEXT_IDS.start, build.TEXT_IDS.stop
        ids = torch.randint(low, high, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(rows):
                mask[row, : 3 * row] = 0
        groups = torch.randint(-1, GROUPS, (rows, length), generator=generator)
        return cls(ids.masked_fill(mask == 0, 0), mask, groups)

    def words(self, model: Any) -> dict[str, Any]:
        takes = inspect.signature(model.forward).parameters
        words = {"input_ids": self.ids, "attention_mask": self.mask}
        return words | ({"use_cache": False} if "use_cache" in takes else {})

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            out = model(**self.words(model))
        return getattr(out, "logits", None) if hasattr(out, "logits") else out[0]

    def generated(self, model: Any) -> Tensor:
        """Greedy tokens with a cache."""
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            return model.generate(
                input_ids=self.ids,
                attention_mask=self.mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )


def check(kind: str, model_type: str, model: Any = None) -> Row:
    """The row of a type."""
    name, verdict = "", "not built"
    try:
        model = build.build(kind, model_type) if model is None else model
        name, verdict = type(model).__name__, "no forward"
        inputs = Inputs.make(4, 24, padded=True)
        clean = inputs.logits(model)[inputs.mask == 1]
        if not bool(clean.isfinite().all()):
            raise ValueError("its logits are not finite")
    except Exception as error:
        return Row(model_type, kind, name, 0, 0, verdict, *[NONE] * 6, _words(error))
    return _Checks(kind, model_type, model, clean).row()


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


class _Checks:
    def __init__(self, kind: str, model_type: str, model: Any, clean: Tensor) -> None:
        self.kind, self.model_type, self.model, self.clean = kind, model_type, model, clean
        self.inputs = Inputs.make(4, 24, padded=True)
        self.whole = Inputs.make(4, 16, padded=False)
        self.reasons: list[str] = []
        self.mlps: list[oracle.MLP] = []
        self.generator = torch.Generator().manual_seed(3)

    def row(self) -> Row:
        verdicts, verdict = [], "refused"
        try:
            verdicts = inspect_layers(self.model)
            self.reasons += [v.reason for v in verdicts if not v.mlp][:1]
            find_gated_mlps(self.model)
            verdict = "supported"
        except RelneuronError as error:
            if not self.reasons:
                self.reasons.append(error.cause)
        reading = self._read()
        results = [NONE] * 4
        if verdict == "supported":
            checks = (self._counts, self._ablation, self._restored, self._generation)
            fault = self._match(verdicts, reading)
            results = [self._try(check, fault) for check in checks]
        return Row(
            self.model_type,
            self.kind,
            type(self.model).__name__,
            len(verdicts),
            sum(bool(v.mlp) for v in verdicts),
            verdict,
            _summary(reading),
            *results,
            self._attribution(),
            "; ".join(self.reasons),
        )

    def _read(self) -> oracle.Reading:
        return oracle.read(self.model, lambda: self.whole.logits(self.model))

    def _match(self, verdicts: Sequence[Any], reading: oracle.Reading) -> str:
        """Why the oracle cannot judge, or nothing; sets the MLPs in relneuron's order."""
        for verdict in verdicts:
            here = [mlp for mlp in reading.mlps if mlp.layer == verdict.layer]
            if verdict.layer in reading.unclear:
                return reading.unclear[verdict.layer]
            if verdict.layer in reading.experts:
                return f"experts in {reading.experts[verdict.layer]}"
            if len(here) != 1:
                return f"{len(here)} MLPs are read in layer {verdict.layer}"
            if not here[0].down.path.startswith(verdict.mlp.path):
                return f"the oracle reads {here[0].down.path}, relneuron {verdict.mlp.path}"
            self.mlps += here
        return ""

    def _try(self, check: Callable[[], str], fault: str) -> str:
        if fault and check != self._restored:
            if fault not in self.reasons:
                self.reasons.append(fault)
            return UNPROVED
        try:
            return check()
        except Exception as error:
            self.reasons.append(f"{check.__name__[1:]}: {_words(error)}")
            return FAILED

    # --- what is compared --------------------------------------------------------------------

    def _counts(self) -> str:
        inputs, sites = self.inputs, oracle.SITES[:4]
        if not all(mlp.up for mlp in self.mlps):
            sites = ("gate", "act")
        groups = inputs.groups.masked_fill(inputs.mask == 0, -1)
        names = [str(g) for g in range(GROUPS)]
        with relneuron.instrument(self.model, names, sites=sites) as probe:
            probe.batch(inputs.mask, inputs.groups)
            inputs.logits(self.model)
        run = lambda: inputs.logits(self.model)  # noqa: E731
        theirs = oracle.count(self.model, self.mlps, run, groups.flatten(), GROUPS)
        n_tokens = torch.stack([(groups == g).sum() for g in range(GROUPS)])
        for number, counted in enumerate(theirs):
            stats = probe.stats[number]
            if not torch.equal(stats.tokens, n_tokens):
                return self._wrong(f"layer {number} counts {stats.tokens.tolist()} tokens of {n_tokens.tolist()}")
            for site in sites:
                ours, other = stats.count[site], counted[site]
                if ours.shape != other.shape or not torch.equal(ours, other):
                    return self._wrong(f"{site} of layer {number} is counted in another way")
                if not 0 < int(ours.sum()) < int(n_tokens.sum()) * ours.shape[1]:
                    self.reasons.append(f"{site} of layer {number} tells nothing")
                    return UNPROVED
        return RIGHT

    def _neurons(self) -> list[tuple[int, str, int]]:
        """Some of every site and layer."""
        chosen = []
        for number, mlp in enumerate(self.mlps):
            for site in ("gate", "up", "down"):
                part = getattr(mlp, site)
                if part is not None:
                    width = len(range(part.start, part.stop, part.step))
                    order = torch.randperm(width, generator=self.generator)
                    chosen += [(number, site, int(i)) for i in order[: width // 8]]
        return chosen

    def _off(self) -> tuple[list[tuple[int, str, int]], Callable[[Any], AbstractContextManager[Any]]]:
        chosen = self._neurons()
        return chosen, lambda model: oracle.switched_off(model, self.mlps, chosen)

    def _ablation(self) -> str:
        chosen, hooks = self._off()
        with hooks(self.model):
            theirs = self.whole.logits(self.model)
        if torch.equal(theirs, self.whole.logits(self.model)):
            self.reasons.append("the hooks change nothing")
            return UNPROVED
        found = {}
        for backend in ("reference", "auto"):
            with relneuron.ablate(self.model, chosen, backend=backend):
                found[backend] = self.whole.logits(self.model)
        if all(torch.equal(ours, theirs) for ours in found.values()):
            return SAME
        double = copy.deepcopy(self.model).double()
        with hooks(double):
            truth = self.whole.logits(double).double()
        # The one rule of accuracy for the largest numbers: rounding errors of all layers meet in
        # each logit, so that torch's own error at one of them says little.
        error = (theirs.double() - truth).abs().max()
        for backend, ours in found.items():
            try:
                baseline = (truth + error).to(ours.dtype)
                assert_accurate(ours, truth, baseline, truth.abs().max().expand(truth.shape))
            except AssertionError as error:
                return self._wrong(f"ablation ({backend}): {error}")
        return RIGHT if torch.equal(found["reference"], theirs) else ROUNDED

    def _real(self, model: Any) -> Tensor:
        """Logits of the tokens that are no padding."""
        return self.inputs.logits(model)[self.inputs.mask == 1]

    def _restored(self) -> str:
        left = [n for n, m in self.model.named_modules() if "forward" in m.__dict__]
        if left:
            return self._wrong(f"{left[0]} keeps a forward")
        if not torch.equal(self._real(self.model), self.clean):
            return self._wrong("the logits are not what they were")
        return RIGHT

    def _generation(self) -> str:
        chosen, hooks = self._off()
        with hooks(self.model):
            theirs = self.inputs.generated(self.model)
        with relneuron.ablate(self.model, chosen):
            ours = self.inputs.generated(self.model)
        if not torch.equal(ours, theirs):
            return self._wrong("other tokens are generated")
        return RIGHT

    def _attribution(self) -> str:
        try:
            return supports(self.model)[1]
        except Exception as error:
            return f"{FAILED}: {_words(error)}"

    def _wrong(self, why: str) -> str:
        self.reasons.append(why)
        return WRONG


def _summary(reading: oracle.Reading) -> str:
    gated = sum(mlp.up is not None for mlp in reading.mlps)
    found = {
        "gated": gated,
        "plain": len(reading.mlps) - gated,
        "experts": len(reading.experts),
        "unclear": len(reading.unclear),
    }
    return ", ".join(f"{n} {what}" for what, n in found.items() if n) or "nothing"
