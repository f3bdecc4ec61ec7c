"""One type of model, checked: what relneuron says of it and does with it, against plain hooks.

`bench.zoo` runs `check` in a process of its own for each type and writes its Row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import relneuron
from bench.zoo import build, gains, oracle
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.commands import supports
from relneuron.model.mlps.find import find_mlps, inspect_layers
from relneuron.testing.accuracy import assert_accurate

RIGHT, WRONG, UNPROVED, FAILED, NONE = "right", "wrong", "unproved", "failed", ""
REFUSED = "refused"  # by relneuron, with a reason
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
    verdict: str  # supported | refused | failed | not built | ended
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
    try:
        model = build.build(kind, model_type) if model is None else model
    except Exception as error:
        return Row(model_type, kind, "", 0, 0, "not built", *[NONE] * 6, _words(error))
    return _Checks(kind, model_type, model).row()


def _is_in_a_norm(modules: Mapping[str, torch.nn.Module], path: str) -> bool:
    """Whether a map is part of a norm, which it scales: it writes nothing into the stream."""
    steps = path.split(".")
    above = (modules[".".join(steps[:n])] for n in range(1, len(steps)))
    return any(type(module).__name__.endswith("Norm") for module in above)


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


class _Checks:
    def __init__(self, kind: str, model_type: str, model: Any) -> None:
        self.kind, self.model_type, self.model = kind, model_type, model
        self.inputs = Inputs.make(4, 24, padded=True)
        self.whole = Inputs.make(4, 16, padded=False)
        self.reasons: list[str] = []
        self.parts: list[oracle.MLP | oracle.Experts] = []  # in relneuron's order
        self.offsets: list[int] = []
        self.generator = torch.Generator().manual_seed(3)

    def row(self) -> Row:
        verdicts, verdict = [], REFUSED
        try:
            verdicts = inspect_layers(self.model)
            self.reasons += [v.reason for v in verdicts if not v.mlps and not v.passed][:1]
            find_mlps(self.model)
            verdict = "supported"
        except RelneuronError as error:
            if not self.reasons:
                self.reasons.append(error.cause)
        except Exception as error:
            verdict = FAILED
            self.reasons.append(f"find_mlps: {_words(error)}")
        reading, fault = oracle.Reading(), ""
        try:
            self.clean = self._real(self.model)
            if not bool(self.clean.isfinite().all()):
                raise ValueError("its logits are not finite")
            reading = oracle.read(self.model, lambda: self.whole.logits(self.model))
            fault = self._match(verdicts, reading)
        except Exception as error:
            fault = f"no forward of text: {_words(error)}"
            if verdict != "supported":
                self.reasons.append(fault)
        results = [NONE] * 4
        if verdict == "supported":
            checks = (self._counts, self._ablation, self._restored, self._generation)
            results = [self._try(check, fault) for check in checks]
        return Row(
            self.model_type,
            self.kind,
            type(self.model).__name__,
            len(verdicts),
            sum(bool(v.mlps) for v in verdicts),
            verdict,
            _summary(reading),
            *results,
            self._attribution(fault),
            "; ".join(self.reasons),
        )

    def _match(self, verdicts: Sequence[Any], reading: oracle.Reading) -> str:
        """Why the oracle cannot judge, or nothing; sets the parts in relneuron's order."""
        modules = dict(self.model.named_modules())
        maps = {id(modules[mlp.down.path]): mlp for mlp in reading.mlps}
        routed = {id(experts.module): experts for experts in reading.experts}
        for verdict in verdicts:
            offset = 0
            for mlp in verdict.mlps:
                if not mlp.runs:
                    if self._is_called(mlp.module):
                        return f"{mlp.path} runs, relneuron says that it does not"
                    continue
                down = getattr(mlp, "down_map", None)
                if down is None:
                    mine = routed.pop(id(mlp.module), None)
                else:
                    mine = maps.pop(id(down.module), None)
                if mine is None or mine.layer != verdict.layer:
                    return f"the oracle does not read {mlp.path}"
                self.parts.append(mine)
                self.offsets.append(offset)
                offset += mine.width
        if not self.parts:
            return "a forward of text runs none of the MLPs that relneuron lists"
        # Others that write into the residual stream, too.
        hidden = {part.hidden for part in self.parts}
        left = [
            mlp.down.path
            for mlp in maps.values()
            if mlp.hidden in hidden and not _is_in_a_norm(modules, mlp.down.path)
        ]
        left += [*(experts.path for experts in routed.values()), *reading.unclear]
        return f"left out by relneuron: {', '.join(left[:3])}" if left else ""

    def _is_called(self, module: torch.nn.Module) -> bool:
        """Whether a forward of text calls a module."""
        calls: list[object] = []
        handle = module.register_forward_hook(lambda *_: calls.append(None))
        try:
            self.whole.logits(self.model)
        finally:
            handle.remove()
        return bool(calls)

    def _try(self, check: Callable[[], str], fault: str) -> str:
        if fault:
            if fault not in self.reasons:
                self.reasons.append(fault)
            return UNPROVED
        try:
            return check()
        except RelneuronError as error:
            self.reasons.append(f"{check.__name__[1:]}: {error.cause}")
            return REFUSED
        except Exception as error:
            self.reasons.append(f"{check.__name__[1:]}: {_words(error)}")
            return FAILED

    # --- what is compared --------------------------------------------------------------------

    def _counts(self) -> str:
        inputs, sites = self.inputs, ("gate", "act", "up", "product")
        if not all(part.up is not None for part in self.parts):
            sites = sites[:2]
        groups = inputs.groups.masked_fill(inputs.mask == 0, -1)
        names = [str(g) for g in range(GROUPS)]
        with relneuron.instrument(self.model, names, sites=sites) as probe:
            probe.batch(inputs.mask, inputs.groups)
            inputs.logits(self.model)
        run = lambda: inputs.logits(self.model)  # noqa: E731
        theirs = oracle.count(self.model, self.parts, run, groups.flatten(), GROUPS)
        n_tokens = torch.stack([(groups == g).sum() for g in range(GROUPS)])
        for layer in dict.fromkeys(part.layer for part in self.parts):
            mine = [n for n, part in enumerate(self.parts) if part.layer == layer]
            stats, where = probe.stats[layer], f"layer {layer}"
            if not torch.equal(stats.tokens, n_tokens):
                return self._wrong(f"{where}: {stats.tokens.tolist()} tokens are counted")
            sent = [theirs[n][oracle.SENT] for n in mine if oracle.SENT in theirs[n]]
            if sent and not torch.equal(stats.expert_tokens, torch.cat(sent, 1)):
                return self._wrong(f"{where}: experts get other tokens")
            for site in sites:
                ours = stats.count[site]
                other = torch.cat([theirs[n][site] for n in mine], 1)
                if ours.shape != other.shape or not torch.equal(ours, other):
                    return self._wrong(f"{where}: {site} is counted in another way")
                if not 0 < int(ours.sum()) < int(n_tokens.sum()) * ours.shape[1]:
                    self.reasons.append(f"{where}: {site} tells nothing")
                    return UNPROVED
        return RIGHT

    def _chosen(self) -> tuple[list[oracle.Neuron], list[oracle.Neuron]]:
        """An eighth of every site: as relneuron names them, and by number of the part."""
        named, plain = [], []
        for number, (part, offset) in enumerate(zip(self.parts, self.offsets, strict=True)):
            for site in ("gate", "up"):
                if getattr(part, site) is not None:
                    for i in self._some(part.width):
                        named.append((part.layer, site, offset + i))
                        plain.append((number, site, i))
        # An output of down is one of all parts of a layer.
        for layer in dict.fromkeys(part.layer for part in self.parts):
            numbers = [n for n, part in enumerate(self.parts) if part.layer == layer]
            for i in self._some(self.parts[numbers[0]].hidden):
                named.append((layer, "down", i))
                plain += [(n, "down", i) for n in numbers]
        return named, plain

    def _some(self, width: int) -> list[int]:
        return torch.randperm(width, generator=self.generator)[: width // 8].tolist()

    def _off(self) -> tuple[list[oracle.Neuron], Callable[[Any], AbstractContextManager[Any]]]:
        chosen, plain = self._chosen()
        return chosen, lambda model: oracle.switched_off(model, self.parts, plain)

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
        double = self._double()
        with hooks(double):
            truth = self.whole.logits(double).double()
        if not bool(truth.isfinite().all()):
            self.reasons.append("ablation: its logits in float64 are not finite")
            return UNPROVED
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

    def _attribution(self, fault: str) -> str:
        """What relneuron says, and behind it whether hooks in float64 say so, too."""
        try:
            said = supports(self.model)[1]
        except Exception as error:
            return f"{FAILED}: {_words(error)}"
        if not said.startswith("supported"):
            return said
        if not fault:
            try:
                ids = self.whole.ids[0].tolist()
                wrong = gains.fault(self._double(), self.parts, self.offsets, ids, self.generator)
                return f"{WRONG}: {wrong}" if wrong else f"{said}; {RIGHT}"
            except Exception as error:
                fault = _words(error)
        return f"{said}; {UNPROVED}: {fault}"

    def _double(self) -> Any:
        """The model in float64."""
        double = copy.deepcopy(self.model).double()
        for module in double.modules():  # torch has grouped products of no float64
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"
        return double

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
