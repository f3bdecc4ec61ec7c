"""Reading machine code: its loops, its loads, and the 32-bit products in the IR before it."""

from __future__ import annotations

import re
import subprocess
import tempfile
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
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    ends = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b(0x[0-9a-f]+)", text)
        # The code ends with a branch to itself.
        if branch and int(branch[1], 16) < address:
            ends.append((int(branch[1], 16), address))
    return [text for _, text in instructions if text != "NOP"], [
        [text for address, text in instructions if head <= address <= end]
        for head, end in _innermost(ends)
    ]


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
