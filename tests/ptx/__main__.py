"""`python -m tests.ptx`: the kernels' PTX, run without a GPU and compared with the reference.

python -m tests.ptx --quick 90    what make test runs, as JSON: {call: seconds, or what is wrong}
python -m tests.ptx --faults      what is said of each of FAULTS, as JSON
python -m tests.ptx --long        all Triton tests, 2,000 random calls of each op: an hour or two
python -m tests.ptx --long tests -- tests/ops -k triton     other tests, by pytest's own words
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seeded:
    """A fault put into a kernel: what is replaced, in its PTX or in its source; what is said."""

    old: str
    new: str
    said: str
    # Of tests/ptx/calls.py, and its arguments.
    call: str = "swiglu"
    given: tuple[tuple[str, Any], ...] = ()
    # The module and name of a function whose source it is, else PTX: a regular expression.
    source: str = ""
    capability: int = 90
    # How many places in PTX, 0 = all.
    places: int = 1
    kernel: str = ""


_KERNELS = "relneuron.ops.swiglu_stats.triton_kernels."
_SUMS = "relneuron.ops.swiglu_stats.triton_sums."
_RANKING = "relneuron.ops.average_precision.triton_launch."
_COUNT = (("sites", ("act",)), ("shape", (144, 512)), ("moments", True), ("conditions", 3))
_MIXED = (("sites", ("act",)), ("shape", (144, 272)), ("order", "mixed"), ("conditions", 2))
_RESPONSES = (("responses", ("gate", "up", "product")), ("shape", (144, 512)))
_MOMENTS = (("shape", (70, 1100, 40, 6)),)
_RANKS = (("shape", (900, 4)),)
_BARRIER = r"\tbar\.sync \t0;"
FAULTS = {
    "the first barrier removed": Seeded(
        _BARRIER, "", r"race: triton_kernels\.py:\d+ .*shared memory", given=_COUNT
    ),
    "every barrier of the responses removed": Seeded(
        _BARRIER, "", "race: .*shared memory", given=_RESPONSES, places=0, kernel="_responses"
    ),
    "every barrier of a sort removed": Seeded(
        _BARRIER, "", "race: .*shared memory", "ranking", _RANKS, places=0, kernel="_sort_kernel"
    ),
    "every barrier of a product removed": Seeded(
        _BARRIER, "", "race: .*shared memory", "moments", _MOMENTS, places=0
    ),
    "every barrier behind the order of rows removed": Seeded(
        _BARRIER, "", "race: .* reads order_ptr", given=_MIXED, places=0
    ),
    "the mask of a store dropped": Seeded(
        "tl.store(h_cells, _multiply(act, up, kept, PTX), mask=live)",
        "tl.store(h_cells, _multiply(act, up, kept, PTX))",
        "out of bounds",
        given=_MIXED,
        source=_KERNELS + "_step",
    ),
    "the mask of a load dropped": Seeded(
        "tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0)",
        "tl.load(ptr)",
        "out of bounds.* of (gate|up|keep)_ptr",
        given=_MIXED,
        source=_KERNELS + "_load",
    ),
    "the predicate of a store dropped": Seeded(
        r"@%p\d+ st\.global\.v4", "st.global.v4", "out of bounds", given=_MIXED, places=0
    ),
    "an offset in 32 bits": Seeded(
        "column = tl.program_id(0).to(tl.int64)",
        "column = tl.program_id(0)",
        "out of bounds.* values_ptr",
        "ranking_of_far_columns",
        source=_RANKING + "_sort_kernel",
    ),
    "an atomic addition made plain": Seeded(
        "tl.atomic_add(count_cells, n_hits, mask=mask_f & (n_hits > 0), sem=\"relaxed\")",
        "tl.store(count_cells, tl.load(count_cells, mask=mask_f) + n_hits, mask=mask_f)",
        "race: .*count_ptr",
        given=_COUNT,
        source=_KERNELS + "_flush",
    ),
    "an atomic addition made plain, in PTX": Seeded(
        r"red\.global\.gpu\.relaxed\.add\.u64 (\[.*?\]), (%rd\d+);",
        r"st.global.b64 \1, {\2};",
        "race: .*count_ptr",
        given=_COUNT,
        places=0,
    ),
    "a swapped layout of a load": Seeded(
        r"(ldmatrix\S+x4\S+ \{)(%r\d+), (%r\d+)", r"\1\3, \2", "inaccurate", "moments", _MOMENTS
    ),
    "a swapped layout of a product": Seeded(
        r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", "inaccurate", "moments",
        _MOMENTS, capability=80, places=0,
    ),
    "swapped halves of a word": Seeded(
        r"cvt\.rn\.bf16x2\.f32 \t(%r\d+), (%r\d+), (%r\d+)", r"cvt.rn.bf16x2.f32 \t\1, \3, \2",
        "differ", given=_COUNT,
    ),
    "a missing wait for copies": Seeded(
        r"cp\.async\.wait_group \t\d+;", "", "is still to write|nothing has written", "moments",
        _MOMENTS, places=0,
    ),
    "a missing wait for copies, sm_80": Seeded(
        r"cp\.async\.wait_group \t\d+;", "", "is still to write|nothing has written", "moments",
        _MOMENTS, capability=80, places=0,
    ),
    "a wait for one copy less": Seeded(
        r"cp\.async\.wait_group \t2;", "cp.async.wait_group 3;", "is still to write", "moments",
        _MOMENTS,
    ),
    "a missing wait for a product": Seeded(
        r"wgmma\.wait_group\.sync\.aligned 0;", "", "reads %r\\d+, which nothing has written",
        "moments", _MOMENTS, places=0,
    ),
    "a missing fence before a product": Seeded(
        r"fence\.proxy\.async\.shared::cta;", "", "no proxy fence", "moments", _MOMENTS, places=0
    ),
    "a store to shared memory removed": Seeded(
        r"\tst\.shared\S+ .*?;", "", "shared memory that nothing has written", given=_COUNT
    ),
    "a shuffle at another distance": Seeded(
        r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+), \d+,", r"\1, 3,", "differ|off by", given=_COUNT,
        places=0,
    ),
    "scratch that nothing has filled": Seeded(
        "span_ptr + N + ids", "span_ptr + ids", "responses|off by|differ", given=_RESPONSES,
        source=_SUMS + "_span_kernel",
    ),
    "a read of sums that no tile has written": Seeded(
        "mask = (n_rows > 0)[:, None]", "mask = (offs_n < n_tiles)[:, None]",
        "reads what nothing has written of partial_ptr", given=_COUNT,
        source=_SUMS + "_moments_kernel",
    ),
    "a store past the end of shared memory": Seeded(
        r"(st\.shared\S+ \t\[%r\d+)\]", r"\1+65536]", "shared memory of", given=_COUNT
    ),
    "a load that is misaligned": Seeded(
        r"(ld\.global\.v4\.b32 \{.*?\}, \[ %rd\d+) \+ 0", r"\1 + 8", "misaligned", given=_COUNT
    ),
    "another rounding of a sum": Seeded(
        r"add\.rn\.f32", "add.rz.f32", "is no form that is known here", given=_COUNT
    ),
}  # fmt: skip


def outcome(stand: Any, call: Callable[[], None]) -> str:
    """Nothing, or what is wrong with a call."""
    before = stand.log.reports.copy()
    said = []
    try:
        call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = [f"{type(error).__name__} ({last.name}): {error}"]
    return "; ".join([*(stand.log.reports - before), *said])


def quick(capability: int) -> dict[str, Any]:
    from tests.ptx.driver import Stand

    stand = Stand(capability)
    found: dict[str, Any] = {}
    before = what_is_patched()
    with stand.installed():
        from tests.ptx import chosen

        assert what_is_patched() != before
        for name, call in chosen.quick(capability).items():
            start = time.process_time()
            wrong = outcome(stand, call)
            found[name] = wrong or round(time.process_time() - start, 2)
    if what_is_patched() != before:
        found["afterwards"] = "something is still patched"
    return found | {"forms": sorted(stand.log.forms)}


def what_is_patched() -> list[Any]:
    """All that the stand-in driver replaces for a time."""
    import torch
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from relneuron.ops import backends

    found: list[Any] = [driver._active, knobs.cache.dir, torch.empty, torch.empty_like]
    found += [torch.Tensor.new_empty, torch.cuda.device, torch.cuda.get_device_capability]
    found += [CompiledKernel._init_handles, CUDABackend.make_cubin]
    for op in ("swiglu_stats", "average_precision", "logprob_gain"):
        module = backends.triton_module(op)
        found += [module.IS_INTERPRETED, module.INTERPRETER_LAUNCH, getattr(module, "plan", None)]
    return found


def faults() -> dict[str, str]:
    """Of each fault what is said."""
    return {name: said_of(fault) for name, fault in FAULTS.items()}


def said_of(fault: Seeded) -> str:
    from tests.ptx.driver import Stand

    changed = []

    def change(kernel: str, text: str) -> str:
        if fault.source or fault.kernel not in kernel:
            return text
        text, n = re.subn(fault.old, fault.new, text, count=fault.places)
        changed.extend([kernel] * n)
        return text

    stand = Stand(fault.capability, change=change)
    with stand.installed(), with_source(fault):
        from tests.ptx import calls

        call = getattr(calls, fault.call)
        said = outcome(stand, lambda: call(**dict(fault.given)))
    return said if fault.source or changed else "its text is in no kernel"


@contextlib.contextmanager
def with_source(fault: Seeded) -> Iterator[None]:
    """A function of Triton has another source, and all that call it are compiled again."""
    from importlib import import_module

    from triton import JITFunction

    if not fault.source:
        yield
        return
    module, _, name = fault.source.rpartition(".")
    function = getattr(import_module(module), name)
    before = function.src
    assert before.count(fault.old) == 1, f"{fault.old} stands {before.count(fault.old)} times"

    def become(source: str) -> None:
        function._unsafe_update_src(source)
        for each in list(sys.modules.values()):
            if getattr(each, "__name__", "").startswith("relneuron.ops"):
                for value in vars(each).values():
                    if isinstance(value, JITFunction):
                        value.hash = None

    become(before.replace(fault.old, fault.new))
    try:
        yield
    finally:
        become(before)


# --- the long mode -------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the long mode has done so far."""

    tests: int = 0
    calls: int = 0
    start: float = field(default_factory=time.perf_counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT {text}", flush=True)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        return (
            f"{self.tests} tests passed, {self.calls} calls compared, {seconds:.0f} seconds, "
            f"{len(self.faults)} faults"
        )

    # As a plugin of pytest.
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.fault(f"{report.nodeid} ({report.when})")
        elif report.when == "call" and report.passed:
            self.tests += 1


def long_tests(capability: int, words: list[str], tally: Tally) -> None:
    """The tests of Triton as they are, or others."""
    import pytest

    from tests.ptx.driver import ROOT, Stand

    stand = Stand(capability)
    with stand.installed():
        words = words or sorted(map(str, ROOT.glob("tests/ops/**/test_*triton.py")))
        pytest.main([*words, "-q", "-p", "no:cacheprovider"], plugins=[tally])
    for text, n in stand.log.reports.items():
        tally.fault(f"sm_{capability}: {text} ({n} times)")
    print(f"sm_{capability}: {dict(stand.log.launches)}; {tally}", flush=True)


def long_calls(capability: int, seeds: range, ops: list[str], tally: Tally) -> None:
    """Random calls, with approximate instructions off by up to two units in the last place."""
    from tests.ptx.code import Options
    from tests.ptx.driver import Stand

    stand = Stand(capability)
    with stand.installed():
        from tests.ptx import chosen

        for op in ops or chosen.OPS:
            for number, seed in enumerate(seeds):
                stand.options = Options(ulps=seed % 3, seed=seed)
                tally.calls += 1
                if wrong := outcome(stand, chosen.random_call(op, seed)):
                    tally.fault(f"sm_{capability} {op} {seed}: {wrong[:500]}")
                if number % 100 == 99:
                    print(f"sm_{capability} {op} {number + 1}: {tally}", flush=True)


def long_forms(tally: Tally) -> None:
    """Every form that the launches of bench/offline emit is known, and has its test."""
    from bench.offline.cases import TARGETS, cases, compile_launch, launches
    from tests.ptx.driver import Stand
    from tests.ptx.machine import Machine
    from tests.ptx.parse import Fault, parse
    from tests.ptx.test_kernels import KNOWN

    forms: set[str] = set()
    with Stand(90).installed():
        for case in cases():
            if case[0] not in ("sm_80", "sm_90"):
                continue
            for launch in launches(*case):
                try:
                    compiled = compile_launch(launch, TARGETS[case[0]])
                    forms |= Machine(parse(compiled.asm["ptx"])).kernel.forms()
                except Fault as fault:
                    tally.fault(f"{', '.join(case)}: {fault}")
    for form in forms - KNOWN:
        tally.fault(f"{form} has no test")
    print(f"{len(forms)} forms in the launches of bench/offline; {tally}", flush=True)


def main() -> int:
    # Read when triton is imported: this is about the compiler, never about the interpreter.
    os.environ["TRITON_INTERPRET"] = "0"
    from tests.ptx import driver

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.ptx", None, __doc__, formatter_class=raw)
    parser.add_argument("--quick", type=int, metavar="CAPABILITY")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--long", nargs="*", choices=["forms", "tests", "calls"], metavar="PART")
    parser.add_argument("--capability", type=int, nargs="*", default=[90, 80])
    parser.add_argument("--calls", type=int, default=2000, help="of each op, half on each GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--op", nargs="*", default=[], help="only of these ops")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    if options.quick:
        json.dump(quick(options.quick), sys.stdout, indent=1)
    if options.faults:
        json.dump(faults(), sys.stdout, indent=1)
    if options.long is None:
        return 0
    parts, tally = options.long or ["forms", "tests", "calls"], Tally()
    # What it compiles is half a gigabyte.
    with tempfile.TemporaryDirectory() as folder:
        driver.CACHE = Path(folder)
        if "forms" in parts:
            long_forms(tally)
        for number, capability in enumerate(options.capability):
            if "tests" in parts:
                long_tests(capability, words[split + 1 :], tally)
            if "calls" in parts:
                seeds = range(options.seed, options.seed + options.calls)
                long_calls(capability, seeds[number :: len(options.capability)], options.op, tally)
    print(tally)
    return bool(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
