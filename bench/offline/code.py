"""Reading machine code: its loops, its loads and when they are waited for, 32-bit products."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

WIDE_LOAD = re.compile(r"\bLDG(?:STS)?\.E\S*\.128\b|\b(?:global|buffer)_load_dwordx4\b")
LOAD = re.compile(r"\bLDG(?:STS)?\.E|\b(?:global|buffer)_load_")
# What a pair of logprob_gain costs: an exponential, or a product of matrices.
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b|\bv_exp_f32")
PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA)\b|\bv_mfma_f32")
STORE = re.compile(r"\bSTG\b|\b(?:global|buffer)_store_")


def sass(compiled: Any) -> tuple[str, str]:
    """(code, resource usage) as cuobjdump prints them; it comes with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    return printed[0].stdout, printed[1].stdout


def sass_loops(code: str) -> tuple[list[str], list[list[str]]]:
    """All instructions (but those that fill the end), and those of each innermost loop."""
    instructions, ends = _sass_branches(code)
    return [text for _, text in instructions if text != "NOP"], [
        [text for address, text in instructions if head <= address <= end]
        for head, end in _innermost(ends)
    ]


def sass_around(code: str) -> tuple[list[str], list[str]]:
    """(instructions in no loop, those in a loop around others and not in these)."""
    instructions, ends = _sass_branches(code)
    inner = _innermost(ends)

    def is_in(address: int, loops: list[tuple[int, int]]) -> bool:
        return any(head <= address <= end for head, end in loops)

    outside = [text for at, text in instructions if text != "NOP" and not is_in(at, ends)]
    around = [text for at, text in instructions if is_in(at, ends) and not is_in(at, inner)]
    return outside, around


def _sass_branches(code: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """(instructions with their addresses, (target, place) of each branch backwards)."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    ends = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b(0x[0-9a-f]+)", text)
        # The code ends with a branch to itself.
        if branch and int(branch[1], 16) < address:
            ends.append((int(branch[1], 16), address))
    return instructions, ends


def amd_loops(code: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    ends = []
    for line in code.splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.L\w+):", text):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]+_\w+", text):
            branch = re.match(r"s_c?branch\w*\s+(\.L\w+)", text)
            if branch and branch[1] in labels:
                ends.append((labels[branch[1]], len(instructions)))
            instructions.append(text)
    return instructions, [instructions[head : end + 1] for head, end in _innermost(ends)]


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    # Several branches may lead to one head: the last one ends the loop.
    last = {head: max(end for other, end in loops if other == head) for head, _ in loops}
    return [
        (head, end)
        for head, end in sorted(last.items())
        if not any(head <= a and b <= end and (a, b) != (head, end) for a, b in last.items())
    ]


def narrow_products(ttir: str) -> list[str]:
    """32-bit products with a size, a stride or a program id, which may not fit into 32 bits.

    An offset is row * stride + column; with a tensor past 2^31 elements only a 64-bit product
    holds it, whatever it is widened to afterwards.
    """
    large: set[str] = set(re.findall(r"(%(?:stride_\w+|n_tiles|WIDTH|[TFGNMRE])): i32", ttir))
    passes_on = r"tt\.(?:splat|expand_dims|broadcast|reshape)|ttg?\.convert_layout"
    found = []
    for line in ttir.splitlines():
        if not (definition := re.match(r"\s*(%\w+) = ([\w.]+) (.*?) loc\(", line)):
            continue
        name, operation, rest = definition.groups()
        operands = set(re.findall(r"%\w+", rest))
        if operation == "tt.get_program_id" or (
            re.fullmatch(passes_on, operation) and operands & large
        ):
            large.add(name)
        if operation == "arith.muli" and operands & large and re.search(r"\bi32\b|xi32>", rest):
            found.append(line.strip())
    return found


@dataclass(frozen=True)
class Waits:
    """How often one turn of a loop waits for wide loads, in its steady state.

    Loads that are under way at the same time come at the same time: who waits for one has them all.
    """

    n: int
    # Bytes of a thread that are under way when it waits, the fewest. Narrow loads are of ids, which
    # are in a cache: they count as waits of their own, and not here.
    in_flight: int
    n_narrow: int


# Until what is under way is the same in every turn.
_TURNS = 8


def waits(body: list[str]) -> Waits:
    """Of a loop of SASS. Asynchronous copies (LDGSTS) are waited for by group (DEPBAR)."""
    loads: list[tuple[range, int]] = []  # (registers, bytes) of those under way
    groups: list[int] = []
    copied = 0
    found: list[tuple[bool, int]] = []
    for _ in range(_TURNS):
        found = []
        for text in body:
            registers = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
            size = _load_bytes(text)
            kept = re.search(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)", text)
            if kept and len(groups) > int(kept[1], 16):
                found.append((True, sum(groups) + sum(n for _, n in loads)))
                del groups[: len(groups) - int(kept[1], 16)]
            elif any(registers.intersection(place) for place, _ in loads):
                found.append(
                    (max(n for _, n in loads) >= 16, sum(groups) + sum(n for _, n in loads))
                )
                loads = []
            if "LDGSTS" in text:
                copied += size
            elif "LDGDEPBAR" in text:
                groups.append(copied)
                copied = 0
            elif size and (target := re.search(r"\bR(\d+)\b", text)):
                first = int(target[1])
                loads.append((range(first, first + max(1, size // 4)), size))
    return _waits(found)


def amd_waits(body: list[str]) -> Waits:
    """Of a loop for gfx942, where `s_waitcnt vmcnt(n)` waits for all but the last n."""
    under_way: list[int] = []  # bytes; 0 of a store, and of what came while another was awaited
    found: list[tuple[bool, int]] = []
    for _ in range(_TURNS):
        found = []
        for text in body:
            if kept := re.match(r"s_waitcnt.*\bvmcnt\((\d+)\)", text):
                n_done = max(0, len(under_way) - int(kept[1]))
                if any(under_way[:n_done]):
                    found.append((max(under_way[:n_done]) >= 16, sum(under_way)))
                    under_way = [0] * len(under_way)
                under_way = under_way[n_done:]
            elif STORE.match(text):
                under_way.append(0)
            elif LOAD.match(text):
                under_way.append(_load_bytes(text))
    return _waits(found)


def _load_bytes(text: str) -> int:
    if WIDE_LOAD.search(text):
        return 16
    return (8 if re.search(r"\.64\b|dwordx2", text) else 4) if LOAD.search(text) else 0


def _waits(found: list[tuple[bool, int]]) -> Waits:
    wide = [size for is_wide, size in found if is_wide]
    return Waits(len(wide), min(wide, default=0), len(found) - len(wide))


def distance(body: list[str]) -> int:
    """From the first wide load of a loop to its last, in instructions; 0 of asynchronous copies."""
    places = [i for i, text in enumerate(body) if WIDE_LOAD.search(text) and "LDGSTS" not in text]
    return places[-1] - places[0] if places else 0
