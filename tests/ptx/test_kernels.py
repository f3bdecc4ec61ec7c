"""Whole programs: small ones of the forms that no table has, faulty ones, and every kernel of ours.

The kernels run in a process of their own, as most tests have Triton's interpreter: two calls for
each flag, against the reference. By hand, for longer: python -m tests.ptx --long
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, shared_folder
from tests.ptx.__main__ import FAULTS
from tests.ptx.parse import Fault
from tests.ptx.test_forms import FORMS, launch

Array = np.ndarray[Any, Any]


# --- small programs ------------------------------------------------------------------------------

_LANE = np.arange(32, dtype=np.uint32)
_AT = "mad.wide.u32 %rd2, %r0, {n}, %rd0; mad.wide.u32 %rd3, %r0, {n}, %rd1;"
KINDS = ["b8", "b16", "b32", "b64", "v2.b8", "v2.b16", "v2.b32", "v2.b64", "v4.b32"]
# The forms that a program below is about, and no table of numbers.
WHOLE = {
    "bar.sync", "bar.warp.sync", "bra", "bra.uni", "ret", "ld.param.b64",
    *(f"shfl.sync.{mode}.b32" for mode in ("bfly", "up", "idx")),
    *(f"redux.sync.{name}" for name in ("add.s32", "max.s32", "max.u32", "min.s32")),
    *(f"{way}.{place}.{kind}" for way in ("ld", "st") for place in ("global", "shared")
      for kind in KINDS),
    "ld.shared.s32", "red.global.gpu.relaxed.add.u64", "red.global.gpu.relaxed.max.s64",
    *(f"cp.async.{name}" for name in (
        "cg.shared.global", "ca.shared.global", "commit_group", "wait_group")),
    *(f"{way}matrix.sync.aligned.m8n8.{n}{trans}.shared.b16" for way in ("ld", "st")
      for n in ("x1", "x2", "x4") for trans in ("", ".trans")),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "fence.proxy.async.shared::cta",
    *(f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group")),
    *(f"wgmma.mma_async.sync.aligned.m64n{n}k8.f32.tf32.tf32" for n in (32, 64)),
}  # fmt: skip
KNOWN = {key if isinstance(key, str) else key[0] for key in FORMS} | WHOLE


def numbers(body: str, n: int = 32, **given: Any) -> tuple[list[int], list[str]]:
    """A program that leaves %r9 of each thread; what it left, what is reported."""
    body += " mad.wide.u32 %rd9, %r0, 4, %rd1; st.global.b32 [%rd9 + 0], %r9;"
    given.setdefault("inputs", np.zeros(1, np.uint32))
    out, reports = launch(body, n_out=4 * n, n_threads=n, **given)
    return out.view(np.int32).tolist(), reports


@pytest.mark.parametrize("by", [1, 2, 4, 8, 16, 3])
def test_butterfly_shuffles(by: int) -> None:
    found, _ = numbers(f"shfl.sync.bfly.b32 %r9, %r0, {by}, 31, -1;")
    assert found == (_LANE ^ by).tolist()


def test_other_shuffles() -> None:
    assert numbers("shfl.sync.up.b32 %r9, %r0, 2, 0, -1;")[0] == [0, 1, *range(30)]
    # Within halves of a warp: segments of 16 lanes.
    expected = [*range(1, 16), 15, *range(17, 32), 31]
    assert numbers(f"shfl.sync.down.b32 %r9, %r0, 1, {16 << 8 | 31}, -1;")[0] == expected
    body = "mul.lo.s32 %r5, %r0, 7; shfl.sync.idx.b32 %r9|%p0, %r0, %r5, 31, -1;"
    assert numbers(body)[0] == (7 * _LANE % 32).tolist()


@pytest.mark.parametrize(
    ("form", "result"), [("add.s32", 16), ("max.s32", 16), ("min.s32", -15), ("max.u32", -1)]
)
def test_reductions_of_a_warp(form: str, result: int) -> None:
    body = f"sub.s32 %r4, %r0, 15; mov.b32 %r5, -1; redux.sync.{form} %r9, %r4, %r5;"
    assert numbers(body)[0] == [result] * 32


_BY_WARP = "and.b32 %r4, %r0, 32; setp.eq.b32 %p0, %r4, 0;"


def test_branches_and_loops_of_threads() -> None:
    """Thread t adds t, t - 1, ... 1; odd ones then add 1000 and come back."""
    body = """mov.b32 %r9, 0; mov.b32 %r5, %r0; bra.uni $TEST;
    $LOOP: add.s32 %r9, %r9, %r5; sub.s32 %r5, %r5, 1;
    $TEST: setp.gt.s32 %p0, %r5, 0; @%p0 bra $LOOP;
    and.b32 %r6, %r0, 1; setp.eq.b32 %p1, %r6, 0; @%p1 bra $END;
    add.s32 %r9, %r9, 1000;
    $END: bar.warp.sync -1;"""
    assert numbers(body)[0] == [t * (t + 1) // 2 + 1000 * (t % 2) for t in range(32)]


_EXCHANGE = """shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0; {barrier}
    sub.s32 %r3, 252, %r2; ld.shared.b32 %r9, [%r3];"""


def test_threads_meet_at_a_barrier() -> None:
    found, reports = numbers(_EXCHANGE.format(barrier="bar.sync 0;"), 64, shared=256)
    assert found == [63 - t for t in range(64)] and not reports


@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_stores(kind: str) -> None:
    """Global memory to shared memory of the thread at the other end, and from there back."""
    many, _, single = kind.rpartition(".")
    n, size = int(many[1:] or 1), int(single[1:]) // 8
    letter = {1: "rs", 2: "rs", 4: "r", 8: "rd"}[size]
    names = [f"%{letter}{20 + i}" for i in range(n)]
    words = names[0] if n == 1 else "{" + ", ".join(names) + "}"
    body = (
        _AT.format(n=n * size)
        + f"""
    ld.global.{kind} {words}, [ %rd2 + 0 ];
    sub.s32 %r4, 31, %r0; mul.lo.s32 %r5, %r4, {n * size}; st.shared.{kind} [%r5+64], {words};
    bar.sync 0; mul.lo.s32 %r6, %r0, {n * size}; ld.shared.{kind} {words}, [%r6+64];
    st.global.{kind} [ %rd3 + 0 ], {words};"""
    )
    data = np.random.default_rng(0).integers(0, 256, 32 * n * size, dtype=np.uint8)
    out, reports = launch(body, data, n_out=data.size, shared=64 + data.size)
    assert (out.reshape(32, -1) == data.reshape(32, -1)[::-1]).all() and not reports


def test_a_narrow_load_fills_a_wide_register() -> None:
    body = "st.shared.b32 [0], %r4; ld.shared.s32 %rd4, [0]; cvt.u32.u64 %r5, %rd4;"
    body = "mov.b32 %r4, -2; " + body.replace("[0]", "[global_smem]")
    assert (
        numbers(body + "shr.s64 %rd5, %rd4, 40; cvt.u32.u64 %r9, %rd5;", shared=16)[0] == [-1] * 32
    )


def test_a_load_with_a_predicate_leaves_the_rest() -> None:
    body = """setp.lt.s32 %p0, %r0, 3; mov.u32 %r9, 0x7; mad.wide.u32 %rd2, %r0, 4, %rd0;
    @%p0 ld.global.b32 { %r9 }, [ %rd2 + 0 ];"""
    found, _ = numbers(body, inputs=np.array([5, 6, 8], np.uint32))
    assert found == [5, 6, 8] + [7] * 29


def test_atomic_updates() -> None:
    body = """cvt.u64.u32 %rd4, %r0; setp.ne.b32 %p0, %r0, 31;
    @%p0 red.global.gpu.relaxed.add.u64 [ %rd1 + 0 ], %rd4;
    red.global.gpu.relaxed.max.s64 [ %rd1 + 8 ], %rd4;"""
    out, reports = launch(body, np.zeros(1), n_out=16, grid=3)
    assert out.view(np.int64).tolist() == [3 * 465, 31] and not reports


_COPY = (
    _AT.format(n=16)
    + """
    mul.lo.s32 %r2, %r0, 16; setp.lt.s32 %p0, %r0, 30; selp.b32 %r3, 16, 0, %p0;
    cp.async.{kind}.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
    cp.async.commit_group; {wait} bar.sync 0;
    xor.b32 %r4, %r2, 16; ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4];
    st.global.v4.b32 [ %rd3 + 0 ], {{ %r5, %r6, %r7, %r8 }};"""
)


@pytest.mark.parametrize("kind", ["cg", "ca"])
def test_asynchronous_copies(kind: str) -> None:
    data = np.arange(1, 129, dtype=np.uint32)
    body = _COPY.format(kind=kind, wait="cp.async.wait_group 0;")
    out, reports = launch(body, data, n_out=512, shared=512)
    data[120:] = 0
    expected = data.reshape(16, 2, 4)[:, ::-1]
    assert (out.view(np.uint32).reshape(16, 2, 4) == expected).all() and not reports
    for wait in ("", "cp.async.wait_group 1;"):
        out, reports = launch(_COPY.format(kind=kind, wait=wait), data, n_out=512, shared=512)
        assert "still to write" in reports[0]
        assert not (out.view(np.uint32).reshape(16, 2, 4) == expected).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices_of_shared_memory(n: int, trans: str) -> None:
    """Stored row by row, loaded: lane 4 g + q has the numbers 2 q and 2 q + 1 of row g."""
    words = ", ".join(f"%r{20 + i}" for i in range(n))
    body = _AT.format(n=4 * n) + "mul.lo.s32 %r2, %r0, 16; mul.lo.s32 %r3, %r0, 4;"
    for i in range(n):
        body += f"ld.global.b32 %r{20 + i}, [%rd2 + {4 * i}];"
    body += f"stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r2], {{{words}}}; bar.sync 0;"
    rows = body + "".join(
        f"ld.shared.b32 %r9, [%r3+{128 * i}]; st.global.b32 [%rd3 + {4 * i}], %r9;"
        for i in range(n)
    )
    back = body + f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {{{words}}}, [%r2];"
    for i in range(n):
        back += f"st.global.b32 [%rd3 + {4 * i}], %r{20 + i};"
    given = np.random.default_rng(1).integers(0, 2**16, (32, n, 2), dtype=np.uint16)
    out, reports = launch(rows, given, n_out=given.nbytes, shared=512)
    memory = out.view(np.uint16).reshape(32, n, 2)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(n):
            for j in range(2):
                # Of memory, row by row, 32 words a matrix.
                row, column = (2 * q + j, g) if trans else (g, 2 * q + j)
                word = row * 4 + column // 2
                assert memory[word, i, column % 2] == given[lane, i, j]
    out, more = launch(back, given, n_out=given.nbytes, shared=512)
    assert (out.view(np.uint16).reshape(given.shape) == given).all() and not reports + more


def _fragment(matrix: Array, *places: tuple[int, int]) -> Array:
    """(32, n): of lane 4 g + q the numbers at (g + row, q + column)."""
    return np.array(
        [[matrix[lane // 4 + r, lane % 4 + c] for r, c in places] for lane in range(32)]
    )


def test_product_of_matrices() -> None:
    random = np.random.default_rng(2)
    a, b, c = (
        random.integers(-9, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8))
    )
    # Tensor cores see 10 bits of a mantissa, so this is 1.
    a[0, 0] = 1 + 2.0**-11
    left = _fragment(a, (0, 0), (8, 0), (0, 4), (8, 4))
    right = _fragment(b.T, (0, 0), (0, 4))
    sums = np.array(
        [
            [c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)]
            for lane in range(32)
        ]
    )
    given = np.concatenate([left, right, sums], 1).astype(np.float32)
    body = "mad.wide.u32 %rd2, %r0, 40, %rd0; mad.wide.u32 %rd3, %r0, 16, %rd1;"
    body += "".join(f"ld.global.b32 %r{20 + i}, [%rd2 + {4 * i}];" for i in range(10))
    body += """mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r30, %r31, %r32, %r33 },
    { %r20, %r21, %r22, %r23 }, { %r24, %r25 }, { %r26, %r27, %r28, %r29 };"""
    body += "".join(f"st.global.b32 [%rd3 + {4 * i}], %r{30 + i};" for i in range(4))
    out, _ = launch(body, given, n_out=512)
    a[0, 0] = 1
    d = a @ b + c
    expected = [
        [d[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)] for lane in range(32)
    ]
    assert (out.view(np.float32).reshape(32, 4) == np.array(expected)).all()


def _product_later(
    n: int,
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    fence: str = "fence.proxy.async.shared::cta;",
) -> str:
    """Four warps: 64 rows of A in registers, B (n, 8) in shared memory, rows of 128 bytes."""
    sums = ", ".join(f"%r{100 + i}" for i in range(n // 2))
    body = "mad.wide.u32 %rd2, %r0, 16, %rd0; add.s64 %rd4, %rd0, 2048;"
    body += "".join(f"ld.global.b32 %r{20 + i}, [%rd2 + {4 * i}];" for i in range(4))
    # Thread t writes numbers t, t + 128 ... of B: row t / 8, column t % 8, chunk ^ row % 8.
    body += "shr.u32 %r2, %r0, 3; and.b32 %r3, %r0, 7; shr.u32 %r4, %r3, 2; and.b32 %r5, %r3, 3;"
    body += "and.b32 %r6, %r2, 7; xor.b32 %r7, %r4, %r6; mul.lo.s32 %r8, %r2, 128;"
    body += "mul.lo.s32 %r9, %r7, 16; add.s32 %r10, %r8, %r9; mul.lo.s32 %r11, %r5, 4;"
    body += "add.s32 %r12, %r10, %r11; mad.wide.u32 %rd5, %r0, 4, %rd4;"
    for i in range(n // 16):
        body += f"ld.global.b32 %r13, [%rd5 + {512 * i}]; st.shared.b32 [%r12+{2048 * i}], %r13;"
    body += "".join(f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(n // 2))
    body += f"""{fence} bar.sync 0; mov.b64 %rd6, {(1 << 62) | (1024 >> 4) << 32}; mov.pred %p1, -1;
    wgmma.fence.sync.aligned;"""
    for _ in range(2):
        body += f"""wgmma.mma_async.sync.aligned.m64n{n}k8.f32.tf32.tf32 {{{sums}}},
        {{%r20,%r21,%r22,%r23}}, %rd6, %p1, 1, 1;"""
    body += f"wgmma.commit_group.sync.aligned; {wait} mad.wide.u32 %rd3, %r0, {2 * n}, %rd1;"
    return body + "".join(f"st.global.b32 [%rd3 + {4 * i}], %r{100 + i};" for i in range(n // 2))


@pytest.mark.parametrize("n", [32, 64])
def test_asynchronous_product_of_matrices(n: int) -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(-9, 9, (64, 8)), random.integers(-9, 9, (n, 8))
    left = [_fragment(a[16 * w : 16 * w + 16], (0, 0), (8, 0), (0, 4), (8, 4)) for w in range(4)]
    given = np.concatenate([np.concatenate(left).ravel(), b.ravel()]).astype(np.float32)
    out, reports = launch(_product_later(n), given, n_out=256 * n, n_threads=128, shared=128 * n)
    # Twice, upon sums that begin as ones.
    d = 2 * (a @ b.T) + 1
    for thread in range(128):
        w, lane = divmod(thread, 32)
        for i in range(n // 2):
            row, column = 16 * w + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2
            assert out.view(np.float32).reshape(128, -1)[thread, i] == d[row, column]
    assert not reports
    with pytest.raises(Fault, match="reads %r100, which nothing has written"):
        launch(_product_later(n, wait=""), given, n_out=256 * n, n_threads=128, shared=128 * n)
    _, reports = launch(
        _product_later(n, fence=""), given, n_out=256 * n, n_threads=128, shared=128 * n
    )
    assert "no proxy fence" in reports[0]


# --- what is wrong with a program ----------------------------------------------------------------

BAD = {
    "out of bounds, the first 4 bytes into the 4 of given": "ld.global.b32 %r9, [%rd0 + 4];",
    "bytes before given": "ld.global.b32 %r9, [%rd0 + -4];",
    "misaligned access of 4 bytes": "ld.global.b32 %r9, [%rd0 + 1];",
    "of 64 bytes, an access of 4 bytes at 64": "st.shared.b32 [global_smem+64], %r0;",
    "misaligned access of 8 bytes of shared": "st.shared.b64 [global_smem+4], %rd0;",
    "reads %r8, which nothing has written": """setp.ge.s32 %p0, %r0, 0; @%p0 bra $END;
        mov.b32 %r8, 1; $END: add.s32 %r9, %r8, 1;""",
    "add.sat.s32 is no form that is known here": "add.sat.s32 %r9, %r0, %r0;",
    "of a warp that is not together": """setp.lt.s32 %p0, %r0, 7; @%p0 bra $END;
        shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1; $END:""",
    "a barrier that not all threads of a program reach": f"""{_BY_WARP} @%p0 bra $END;
        bar.sync 0; $END:""",
    "bar.sync: a barrier that not all": f"{_BY_WARP} @!%p0 bra $B; bar.sync 0; $B: bar.sync 0;",
    "another barrier than 0": "bar.sync 1;",
}


@pytest.mark.parametrize("said", BAD)
def test_a_fault_ends_the_launch(said: str) -> None:
    with pytest.raises(Fault, match=re.escape(said)):
        numbers("mov.b32 %r9, 0;" + BAD[said], 64, shared=64)


_SWAP = _EXCHANGE.format(barrier="bar.sync 0;")
_ADD = "mov.b64 %rd5, 1; red.global.gpu.relaxed.add.u64 [%rd1 + 0], %rd5;"
REPORTED = {
    "reads shared memory where another warp wrote": _EXCHANGE.format(barrier=""),
    "writes shared memory where another warp has": f"{_SWAP} st.shared.b32 [%r2], %r9;",
    "reads shared memory that nothing has written": "ld.shared.b32 %r9, [global_smem];",
    "reads %r8, which not all threads": f"""{_BY_WARP} @%p0 bra $END; mov.b32 %r8, 8;
        $END: st.shared.b32 [global_smem], %r8;""",
    "several values at once": "st.global.b32 [%rd1 + 0], %r0;",
    "reads wanted where another": f"""{_AT.format(n=4)} st.global.b32 [%rd3 + 64], %r0;
        xor.b32 %r4, %r0, 32; mad.wide.u32 %rd5, %r4, 4, %rd1; ld.global.b32 %r9, [%rd5 + 64];""",
    "writes wanted where another": f"""{_AT.format(n=4)} xor.b32 %r4, %r0, 32;
        mad.wide.u32 %rd5, %r4, 4, %rd1; ld.global.b32 %r9, [%rd5 + 64];
        st.global.b32 [%rd3 + 64], 7;""",
    "updates wanted where another": f"st.global.b32 [%rd1 + 0], 1; {_ADD}",
}


@pytest.mark.parametrize("said", REPORTED)
def test_a_race_is_reported(said: str) -> None:
    _, reports = launch(
        "mov.b32 %r9, 0;" + REPORTED[said], np.zeros(1), n_out=1024, n_threads=64, shared=256
    )
    assert any(said in report for report in reports), reports


def test_what_is_no_race() -> None:
    """The same value from all; other threads' numbers behind a barrier; updates of updates."""
    same, later = "st.global.b32 [%rd1 + 8], 5;", _SWAP + "bar.sync 0; st.shared.b32 [%r2], 7;"
    for body in (same, f"{_ADD} {_ADD}", _SWAP, later):
        assert not launch(body, np.zeros(1), n_out=64, n_threads=64, shared=256)[1]


def test_programs_race_with_each_other() -> None:
    body = (
        "mov.u32 %r4, %ctaid.x; st.global.b32 [%rd1 + 0], {value}; ld.global.b32 %r9, [%rd1 + 0];"
    )
    assert not launch(body.format(value="7"), np.zeros(1), n_out=4)[1]
    # More programs than run at once.
    _, reports = launch(body.format(value="%r4"), np.zeros(1), n_out=4, grid=1000)
    for said in ("several values", "reads wanted where another", "writes wanted where another"):
        assert any(said in each for each in reports)


# --- the kernels ---------------------------------------------------------------------------------


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")


def asked(*words: str) -> dict[str, Any]:
    """What `python -m tests.ptx` says as JSON."""
    words = (sys.executable, "-m", "tests.ptx", *words)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["90", "80"])
def test_every_kernel_and_flag(capability: str) -> None:
    found = asked("--quick", capability)
    assert set(found.pop("forms")) <= KNOWN
    assert len(found) >= (4 if capability == "80" else 25)
    assert not {name: said for name, said in found.items() if isinstance(said, str)}


@pytest.fixture(scope="session")
def said_of_faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    def make(folder: Path) -> None:
        (folder / "said.json").write_text(json.dumps(asked("--faults")))

    folder = shared_folder(tmp_path_factory, "ptx_faults", make)
    return json.loads((folder / "said.json").read_text())  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_is_found(name: str, said_of_faults: dict[str, str]) -> None:
    assert re.search(FAULTS[name].said, said_of_faults[name]), said_of_faults[name]
