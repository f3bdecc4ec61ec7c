"""Who takes part in `relneuron bench`, and how each is known to be right.

bench/timing.py asks for the contestants of a case and times them. Those of swiglu_stats are here,
with their peers in bench/peers.py; those of average_precision are in bench/ranking.py, those of
logprob_gain in bench/gain.py, those of pair_stats in bench/pair_stats.py, those of peaks,
merge_peaks and histogram in bench/peaks.py. `torch.compile` gets
whole graphs of fixed shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from relneuron import ops
from relneuron.bench import gain as bench_gain
from relneuron.bench import pair_stats as bench_pair
from relneuron.bench import peaks as bench_peaks
from relneuron.bench import peers
from relneuron.bench import ranking as bench_ranking
from relneuron.bench import training as bench_training
from relneuron.bench.case import Case, Contestant, near
from relneuron.bench.own import Own
from relneuron.testing import assert_accurate

PROMPT_TOKENS = 20  # length of a prompt in the relations of the LRE data set, about
CONDITIONS = 13  # the clean one and twelve relations switched off
RESPONSES = ("gate", "up", "product")


# --- swiglu_stats ----------------------------------------------------------------------------


class _Bench:
    """Inputs, the reference's results and the contestants of one case."""

    def __init__(self, case: Case, device: str, n_sets: int) -> None:
        self.case, self.device = case, device
        T, F, G = case.T, case.F, case.G
        random = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal() -> Tensor:
            return torch.randn(T, F, generator=random, dtype=dtype, device=device)

        empty = partial(torch.empty, T, F, dtype=dtype, device=device)
        self.sets = [(normal(), normal(), empty()) for _ in range(n_sets)]
        order = torch.arange(T, device=device)
        if case.layout == "mixed":
            order = torch.randperm(T, generator=random, device=device)
        self.ids = order * G // T
        self.ids32 = self.ids.int()
        ends = torch.bincount(self.ids, minlength=G).cumsum(0).tolist()
        self.bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
        # On a GPU the product has tensor cores for the short types; on a CPU only float32 is exact.
        short = dtype if device != "cpu" else torch.float32
        self.weights = nnf.one_hot(self.ids, G).T.to(short).contiguous()
        length = min(PROMPT_TOKENS, T)
        self.N = T // length
        prompt = torch.arange(T, device=device, dtype=torch.int32) // length
        self.prompt_ids = torch.where(prompt < self.N, prompt, -1)
        self.mask = torch.ones(self.N, length, 1, dtype=dtype, device=device)
        words = torch.randint(
            -(2**31), 2**31, (3, CONDITIONS, (F + 31) // 32), generator=random, device=device
        ).int()
        self.keep = words[0] | words[1] | words[2]  # one neuron in eight is off
        self.keep[0] = -1
        self.condition_ids = torch.arange(T, device=device, dtype=torch.int32) % CONDITIONS

        self.reference = self._stats(moments=True)
        self.reference_sums = self._sums()
        gate, up, _ = self.sets[0]
        self.right_act = [nnf.silu(gate)]
        self.right = [
            ops.swiglu_stats(
                gate,
                up,
                stats=self.reference,
                group_ids=self.ids32,
                responses=self.reference_sums,
                prompt_ids=self.prompt_ids,
                backend="reference",
            )
        ]
        self.training = bench_training.Training(gate, up)
        self.contestants: list[Contestant] = []

    def _stats(self, moments: bool = False) -> ops.GroupStats:
        case = self.case
        return ops.GroupStats(groups=case.G, width=case.F, moments=moments, device=self.device)

    def _sums(self) -> dict[str, Tensor]:
        return {s: torch.zeros(self.N, self.case.F, device=self.device) for s in RESPONSES}

    def add(
        self,
        variant: str,
        name: str,
        call: Callable[..., Tensor | None],
        *,
        moved: float,
        least: float = 3,
        compare: Callable[[Tensor], None] | None = None,
        missing: str = "",
        is_base: bool = False,
    ) -> None:
        """`moved` and `least` count elements of the inputs' dtype per neuron and token."""

        def run(number: int) -> Tensor | None:
            return call(*self.sets[number % len(self.sets)])

        def check() -> None:
            out = self.sets[0][2].fill_(math.nan)
            made = run(0)
            (compare or self.same_h)(out if made is None else made)

        per_element = self.case.T * self.case.F * self.sets[0][0].element_size()
        n_bytes, moved_bytes = round(least * per_element), round(max(moved, least) * per_element)
        contestant = Contestant(
            name, variant, run, check, n_bytes, moved_bytes, missing=missing, is_base=is_base
        )
        if name == "relneuron":
            kernel = ops.available_backends()["cpu" if self.device == "cpu" else "triton"]
            contestant.note = "" if kernel.works else f"the reference ran: {kernel.detail}"
        self.contestants.append(contestant)

    def same_h(self, h: Tensor) -> None:
        """h by the accuracy rule; bits that were right once are right again."""
        if any(torch.equal(h, right) for right in self.right):
            return
        gate, up, _ = self.sets[0]
        # By blocks, since float64 of everything would not fit beside the inputs.
        for start in range(0, self.case.T, 512):
            rows = slice(start, start + 512)
            truth = nnf.silu(gate[rows].double()) * up[rows].double()
            assert_accurate(h[rows], truth, self.right[0][rows])
        self.right.append(h.clone())

    def same_act(self, h: Tensor) -> None:
        """h of a call without up, likewise."""
        if any(torch.equal(h, right) for right in self.right_act):
            return
        gate = self.sets[0][0]
        for start in range(0, self.case.T, 512):
            rows = slice(start, start + 512)
            assert_accurate(h[rows], nnf.silu(gate[rows].double()), self.right_act[0][rows])
        self.right_act.append(h.clone())

    def same_masked_h(self, h: Tensor) -> None:
        """h of kept neurons as of our op without masks, and zero elsewhere."""
        gate, up, _ = self.sets[0]
        width = torch.arange(self.case.F, device=self.device)
        bits = (self.keep[:, width // 32] >> (width % 32).int() & 1).bool()[
            self.condition_ids.long()
        ]
        assert not bool(h.masked_select(~bits).any()), "a neuron that is off is not zero"
        self.same_h(torch.where(bits, h, ops.swiglu_stats(gate, up)))

    def add_ours(
        self, variant: str, *, masks: bool, moments: bool, responses: bool, own: Own | None = None
    ) -> None:
        """Our op, or a user's own in its place, which is held to the contract of it first."""
        stats, sums = self._stats(moments), self._sums() if responses else {}
        options: dict[str, Any] = {"stats": stats, "group_ids": self.ids32}
        features = ["counts"]
        if masks:
            options |= {"keep": self.keep, "condition_ids": self.condition_ids}
            features.append("masks")
        if moments:
            features.append("moments")
        if responses:
            options |= {"responses": sums, "prompt_ids": self.prompt_ids}
            features.append("responses")
        missing = "" if own is None else own.missing(*options)

        def call(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
            if own is not None:
                return self.own_h(own, gate, up, out, **options)
            return ops.swiglu_stats(gate, up, out=out, ids_checked=True, **options)

        def compare(h: Tensor) -> None:
            if own is not None:
                own.verify(self.case, self.device, *features)
            (self.same_masked_h if masks else self.same_h)(h)
            self._same_stats(stats)
            self._same_sums(sums)

        least = 3 + (self._responses_least() if responses else 0)
        name = "relneuron" if own is None else own.name
        self.add(variant, name, call, moved=least, least=least, compare=compare, missing=missing)

    @staticmethod
    def own_h(own: Own, gate: Tensor, up: Tensor, out: Tensor, **options: Any) -> Tensor:
        """h of a user's own op, in `out` if it takes one."""
        if own.takes_out:
            options["out"] = out
        found: Tensor = own.function(gate, up, activation="silu", **options)
        return found

    def add_own(self, own: Own) -> None:
        """A user's own op in every task of ours that it takes the arguments of."""

        def compare(h: Tensor) -> None:
            own.verify(self.case, self.device)
            self.same_h(h)

        self.add("swiglu", own.name, partial(self.own_h, own), moved=3, compare=compare)
        self.add_ours("count", masks=False, moments=False, responses=False, own=own)
        self.add_ours("moments+masks", masks=True, moments=True, responses=False, own=own)
        self.add_ours("responses", masks=False, moments=False, responses=True, own=own)

    def _responses_least(self) -> float:
        """Elements for three float32 sums that are read and written."""
        return 3 * 2 * 4 / self.sets[0][0].element_size() * self.N / self.case.T

    def add_ours_ungated(self) -> None:
        stats = self._stats()
        options: dict[str, Any] = {"stats": stats, "group_ids": self.ids32, "ids_checked": True}

        def call(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
            return ops.swiglu_stats(gate, None, out=out, **options)

        def compare(h: Tensor) -> None:
            self.same_act(h)
            self._same_stats(stats)

        self.add("ungated", "relneuron", call, moved=2, least=2, compare=compare, is_base=True)

    def add_counting(
        self,
        variant: str,
        name: str,
        call: Callable[..., Tensor | None],
        *extra: object,
        moved: float,
        missing: str = "",
    ) -> None:
        """A way to count; of the variant "ungated" it gets no up."""
        is_gated = variant != "ungated"
        want = self.reference.count["act"]
        want = want.sum(0) if variant == "total" else want
        count = torch.zeros_like(want)

        def compare(h: Tensor) -> None:
            (self.same_h if is_gated else self.same_act)(h)
            n_wrong = int((count != want).sum())
            assert not n_wrong, f"{n_wrong} of {count.numel()} counts differ"

        def run(gate: Tensor, up: Tensor, out: Tensor) -> Tensor | None:
            return call(gate, up if is_gated else None, out, count, *extra)

        least = 3 if is_gated else 2
        self.add(variant, name, run, moved=moved, least=least, compare=compare, missing=missing)

    def add_training(self, name: str, forward: bench_training.Forward) -> None:
        """Forward and backward: h of two inputs, and two gradients of three."""

        def compare(h: Tensor) -> None:
            self.same_h(h)
            self.training.check()

        call = self.training.call(forward)
        is_base = forward is bench_training.ours
        self.add("training", name, call, moved=8, least=8, compare=compare, is_base=is_base)

    def add_summing(self, name: str, call: Callable[..., None], moved: float) -> None:
        sums = self._sums()

        def compare(h: Tensor) -> None:
            self.same_h(h)
            self._same_sums(sums)

        run = lambda gate, up, out: call(gate, up, out, sums, self.mask)  # noqa: E731
        least = 3 + self._responses_least()
        self.add("responses", name, run, moved=moved, least=least, compare=compare)

    def _same_stats(self, stats: ops.GroupStats) -> None:
        want = self.reference
        names = ("count", "max", "n_nonfinite") if stats.moments else ("count",)
        assert torch.equal(stats.tokens, want.tokens), "tokens differ"
        for name in names:
            ours, theirs = getattr(stats, name)["act"], getattr(want, name)["act"]
            assert torch.equal(ours, theirs), f"{int((ours != theirs).sum())} of {name} differ"
        if stats.moments:
            # As in the contract of relneuron.testing: partial sums over up to 256 tokens may be
            # float32, and sum |x| is at most sqrt(n sum x^2).
            eps, square = 16 * torch.finfo(torch.float32).eps, want.sum_sq["act"]
            size = (self.case.T * square).sqrt()
            near(stats.sum["act"], want.sum["act"], eps * size, "sum")
            near(stats.sum_sq["act"], square, eps * square, "sum_sq")

    def _same_sums(self, sums: dict[str, Tensor]) -> None:
        inside = self.prompt_ids >= 0
        ids = self.prompt_ids[inside].long()
        gate, up, _ = self.sets[0]
        for site, got in sums.items():
            value = {"gate": gate, "up": up, "product": self.right[0]}[site]
            size = torch.zeros_like(got).index_add_(0, ids, value[inside].float().abs())
            # A product may differ from torch's in its last bit, beside the order of the sum.
            eps = torch.finfo(value.dtype).eps + PROMPT_TOKENS * torch.finfo(torch.float32).eps
            near(got, self.reference_sums[site], eps * size, f"response of {site}")


def swiglu_stats_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Everybody who takes part in a case of swiglu_stats; the first is what ratios refer to."""
    torch.compiler.reset()  # its limit of shapes per function is for a whole process
    b = _Bench(case, device, n_sets)
    b.add_ours("count", masks=False, moments=False, responses=False)
    b.add_ours("moments+masks", masks=True, moments=True, responses=False)
    b.add_ours("responses", masks=False, moments=False, responses=True)
    b.add_ours("all", masks=True, moments=True, responses=True)
    ours = lambda gate, up, out: ops.swiglu_stats(gate, up, out=out)  # noqa: E731
    b.add("swiglu", "relneuron", ours, moved=3)
    b.add_ours_ungated()
    b.add_training("relneuron", bench_training.ours)
    b.add_training("eager", bench_training.eager)
    b.add_training("in place, Liger's way", bench_training.liger_way)
    fine = lambda h: None  # noqa: E731
    triad = lambda gate, up, out: torch.add(gate, up, out=out)  # noqa: E731
    copy = lambda gate, up, out: out.copy_(gate)  # noqa: E731
    b.add("ceiling", "triad", triad, moved=3, compare=fine)
    b.add("ceiling", "copy", copy, moved=2, least=2, compare=fine)

    # Elements per neuron and token: silu 2, mul 3; 1 and 4 bytes are a bool and a float32.
    size = b.sets[0][0].element_size()
    bool_, float_ = 1 / size, 4 / size
    widen = 0.0 if size == 4 else 1 + float_
    tuned = peers.Tuned(b.sets[0][0], case.G, b.weights)
    b.add("swiglu", "eager", peers.swiglu, moved=5)
    b.add_counting("total", "eager lape", peers.lape, moved=5 + widen + float_ + 2 * bool_)
    b.add_counting("total", "eager tuned", tuned.total, moved=6 + 2 * float_)
    of_group: list[tuple[str, Any, object, float]] = [
        ("one-hot", peers.one_hot, b.weights, 1 + 2 * bool_ + 2 * b.weights.element_size() / size),
        ("index_add", peers.index_add, b.ids, 1 + 2 * bool_ + 4 * float_),
        ("index_add f32", peers.index_add_float, b.ids, 1 + 2 * bool_ + 2 * float_),
    ]
    of_group_tuned: list[tuple[str, Any, object, float]] = [
        ("one-hot", tuned.one_hot, b.weights, 1 + 2 * b.weights.element_size() / size),
        ("index_add", tuned.index_add, b.ids, 1 + 2 * float_),
    ]
    if case.layout == "sorted":
        of_group.insert(0, ("segments", peers.segments, b.bounds, 1 + 2 * bool_))
        of_group_tuned.insert(0, ("segments", tuned.segments, b.bounds, 1 + 2 * float_))
    for form, call, extra, moved in of_group:
        b.add_counting("count", f"eager {form}", call, extra, moved=5 + moved)
        b.add_counting("ungated", f"eager {form}", call, extra, moved=2 + moved)
    for form, call, extra, moved in of_group_tuned:
        b.add_counting("count", f"eager {form} tuned", call, extra, moved=5 + moved)
        b.add_counting("ungated", f"eager {form} tuned", call, extra, moved=2 + moved)
    b.add_summing("eager masked sums", tuned.responses, 5 + 9 + b._responses_least())
    if device != "cpu":
        moved = 5 + 3 + 3 * float_ + b._responses_least()
        b.add_summing("to the host", peers.responses_on_host, moved)
        missing = "" if find_spec("liger_kernel") else "liger-kernel is not installed"
        b.add("swiglu", "liger", peers.liger, moved=3, missing=missing)

    # Autotuning chooses between templates of matrix products; on a CPU there are none to choose.
    modes = {"compile": "default"}
    if device != "cpu":
        modes["compile max-autotune"] = "max-autotune-no-cudagraphs"
    for name, mode in modes.items() if compiled else ():
        make = partial(torch.compile, dynamic=False, fullgraph=True, mode=mode)
        b.add("swiglu", name, make(peers.swiglu), moved=3)
        b.add_counting("total", name, make(peers.total), moved=3)
        for form, call, extra, _ in of_group:
            b.add_counting("count", f"{name} {form}", make(call), extra, moved=3)
            b.add_counting("ungated", f"{name} {form}", make(call), extra, moved=2)
    if own is not None:
        b.add_own(own)
    return b.contestants


CONTESTANTS: dict[str, Callable[..., list[Contestant]]] = {
    "swiglu_stats": swiglu_stats_contestants,
    "average_precision": bench_ranking.average_precision_contestants,
    "logprob_gain": bench_gain.logprob_gain_contestants,
    "pair_stats": bench_pair.pair_stats_contestants,
    "peaks": bench_peaks.peaks_contestants,
    "merge_peaks": bench_peaks.merge_peaks_contestants,
    "histogram": bench_peaks.histogram_contestants,
}
