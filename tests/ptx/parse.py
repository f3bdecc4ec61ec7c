"""Reads the text of PTX: a kernel as blocks of instructions, each with the line of its source."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


class Fault(Exception):
    """What is wrong with a kernel, or what the interpreter does not know; it says where."""


@dataclass(frozen=True)
class Address:
    """[base + offset]: a register, a parameter or shared memory."""

    base: str
    offset: int


# A name or number as it stands there, several of them in braces, or a place in memory.
Operand = str | list[str] | Address


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: list[Operand]
    # Of `@%p` and `@!%p`.
    predicate: str | None
    is_negated: bool
    source: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.source}: {self.op}"

    def destinations(self) -> list[str]:
        """What it writes, if these are registers."""
        first = self.operands[:1]
        return [] if first and isinstance(first[0], Address) else _names(first)

    def sources(self) -> list[str]:
        """What it reads, likewise."""
        is_kept = self.op.startswith("wgmma") or not self.destinations()
        found = _names(self.operands if is_kept else self.operands[1:])
        return found if self.predicate is None else [self.predicate, *found]


def _names(operands: list[Operand]) -> list[str]:
    found: list[str] = []
    for operand in operands:
        if isinstance(operand, Address):
            found.append(operand.base)
        else:
            found += operand if isinstance(operand, list) else operand.split("|")
    return found


@dataclass
class Block:
    """Instructions that run one after the other; the last one may say where it goes on."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass
class Kernel:
    name: str
    # (name, type) in order.
    parameters: list[tuple[str, str]]
    n_threads: int
    # Register -> its class: pred, b16, b32, b64.
    registers: dict[str, str]
    blocks: list[Block]
    # Label -> its block.
    labels: dict[str, int]
    shared_bytes: int = 0

    def instructions(self) -> list[Instruction]:
        """All of them, in order."""
        found = []
        for block in self.blocks:
            found += block.instructions + ([] if block.end is None else [block.end])
        return found

    def forms(self) -> set[str]:
        return {instruction.op for instruction in self.instructions()}

    def temporaries(self) -> set[str]:
        """Registers that live within one block: written by all that run it before it is read."""
        blocks: dict[str, int] = {}
        found, others = set(), set()
        for number, block in enumerate(self.blocks):
            for each in block.instructions + ([] if block.end is None else [block.end]):
                written = set(each.destinations()) if each.predicate is None else set()
                for name in {*each.sources(), *each.destinations()} & self.registers.keys():
                    if name not in blocks:
                        blocks[name] = number
                        is_new = name in written and name not in each.sources()
                        (found if is_new else others).add(name)
                    elif blocks[name] != number:
                        others.add(name)
        return found - others


# u32, s32, f32 and b32 are registers of one kind.
_CLASS = re.compile(r"pred|[busf](?:8|16|32|64)|(?:b?f16|tf32)(?:x2)?")
_ENDS = re.compile(r"(?:bra|ret|exit|bar\.sync)\b")
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\[{]+?)\s*(?:,|$)")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w@]+)\s+)?([a-z][\w.:]*)\s*(.*)")
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file."""
    files = {
        int(number): Path(name).name
        for number, name in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', text)
    }
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if head is None:
        raise Fault("no .entry in this PTX")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    shared = re.search(r"\.shared\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", text)
    reader = _Reader(files)
    reader.read(text[head.end() :])
    return Kernel(
        name=head[1],
        parameters=[
            (name, kind)
            for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[2].strip())
        ],
        n_threads=int(threads[1]) if threads else 32,
        registers=reader.registers,
        blocks=reader.blocks,
        labels=reader.labels,
        shared_bytes=int(shared[1]) if shared else 0,
    )


class _Reader:
    """The body of a kernel, statement by statement."""

    def __init__(self, files: dict[int, str]) -> None:
        self.files = files
        self.registers: dict[str, str] = {}
        self.blocks = [Block()]
        self.labels: dict[str, int] = {}
        # Labels that something jumps to; the others are for debuggers.
        self.targets: set[str] = set()
        self.source = "?"
        # Names that are local to braces, and what they are called here.
        self.scopes: list[dict[str, str]] = []
        self.n_scopes = 0

    def read(self, body: str) -> None:
        self.targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", body))
        depth = 1
        rest = ""
        for line in body.splitlines():
            found = _LOC.match(line)
            if found:
                self._locate(*found.groups())
                continue
            rest += " " + line.split("//")[0].strip()
            # Braces of a scope stand alone; those of operands come after a comma or a name.
            while rest := rest.lstrip():
                label = _LABEL.match(rest)
                if label:
                    if label[1] in self.targets:
                        self._start_block()
                        self.labels[label[1]] = len(self.blocks) - 1
                    rest = rest[label.end() :]
                elif rest[0] in "{}":
                    depth += 1 if rest[0] == "{" else -1
                    if depth == 0:
                        return
                    if rest[0] == "{":
                        self.scopes.append({})
                    else:
                        self.scopes.pop()
                    rest = rest[1:]
                elif ";" in rest:
                    statement, _, rest = rest.partition(";")
                    self._statement(" ".join(statement.split()))
                else:
                    break

    def _locate(self, file: str, line: str, outer: str | None, outer_line: str | None) -> None:
        here = f"{self.files.get(int(file), file)}:{line}"
        if outer is None:
            self.source = here
        else:
            # The line of the kernel that called, and where that led.
            self.source = f"{self.files.get(int(outer), outer)}:{outer_line} ({here})"

    def _start_block(self) -> None:
        if self.blocks[-1].instructions or self.blocks[-1].end:
            self.blocks.append(Block())

    def _statement(self, text: str) -> None:
        if not text or text.startswith("."):
            if text.startswith(".reg"):
                self._declare(text)
            return
        for scope in self.scopes:
            for name, unique in scope.items():
                text = re.sub(rf"(?<![\w%.@]){re.escape(name)}(?![\w@])", unique, text)
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise Fault(f"{self.source}: cannot read {text!r}")
        instruction = Instruction(
            op=found[3],
            operands=_operands(found[4]),
            predicate=found[2],
            is_negated=found[1] == "!",
            source=self.source,
            text=text,
        )
        if self.blocks[-1].end:
            self.blocks.append(Block())
        if _ENDS.match(instruction.op):
            self.blocks[-1].end = instruction
        else:
            self.blocks[-1].instructions.append(instruction)

    def _declare(self, text: str) -> None:
        kind, names = text.removeprefix(".reg").strip().removeprefix(".").split(maxsplit=1)
        if not _CLASS.fullmatch(kind):
            raise Fault(f"{self.source}: unknown registers {text!r}")
        kind = kind if kind == "pred" else f"b{max(16, int(re.sub('[^0-9]', '', kind)))}"
        for name in names.split(","):
            many = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", name)
            if many:
                self.registers |= {f"{many[1]}{i}": kind for i in range(int(many[2]))}
            elif self.scopes:
                self.n_scopes += 1
                unique = f"{name.strip()}@{self.n_scopes}"
                self.scopes[-1][name.strip()] = unique
                self.registers[unique] = kind
            else:
                self.registers[name.strip()] = kind


def _operands(text: str) -> list[Operand]:
    found: list[Operand] = []
    at = 0
    text = text.strip()
    while at < len(text):
        match = _OPERAND.match(text, at)
        if match is None:
            raise Fault(f"cannot read the operands {text!r}")
        word = match[1]
        if word[0] == "{":
            found.append([name.strip() for name in word[1:-1].split(",")])
        elif word[0] == "[":
            base, _, offset = word[1:-1].replace(" ", "").partition("+")
            found.append(Address(base, int(offset or "0", 0)))
        else:
            found.append(word.strip())
        at = match.end()
    return found
