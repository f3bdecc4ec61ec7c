"""The tables of docs/zoo.md, made of the csv of a sweep.

    python -m bench.zoo.page bench/results/zoo.csv docs/zoo.md

puts them between the page's marks; a test compares the two.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.zoo.build import KINDS
from bench.zoo.check import RIGHT, UNPROVED, WRONG, Row
from relneuron.artifact.files import atomic_write
from relneuron.artifact.reading import read_csv

NOTHING = ""  # was read of a type that is not built
CHECKS = ("counts", "ablation", "restored", "generation")


def read_rows(path: Path) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of a csv, and the versions that they were made with."""
    versions = ("transformers", "torch", "commit")
    lines = list(read_csv(path, [*Row._fields, *versions]))
    rows = []
    for line in lines:
        own = {name: line[name] for name in Row._fields}
        rows.append(Row(**own)._replace(layers=int(own["layers"]), supported=int(own["supported"])))
    return rows, {name: sorted({line[name] for line in lines}) for name in versions}


def is_proved(row: Row) -> bool:
    """Whether all that was compared is right."""
    return all(getattr(row, check).startswith(RIGHT) for check in CHECKS)


def summary(rows: Sequence[Row]) -> list[str]:
    """How many types of each mapping came out how."""
    lines = ["| | types | built | supported | all right | wrong | gains | by hooks, too |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for kind in KINDS:
        mine = [row for row in rows if row.mapping == kind]
        built = [row for row in mine if row.oracle != NOTHING]
        supported = [row for row in mine if row.verdict == "supported"]
        wrong = [row for row in mine if WRONG in row or row.attribution.startswith(WRONG)]
        gains = [row for row in mine if row.attribution.startswith("supported")]
        right = [row for row in gains if row.attribution.endswith(f"; {RIGHT}")]
        counts = (mine, built, supported, list(filter(is_proved, supported)), wrong, gains, right)
        lines.append(f"| {kind} | {' | '.join(str(len(some)) for some in counts)} |")
    return lines


def reasons(rows: Iterable[Row]) -> list[str]:
    """Why types are not among those of which all is right, and which types they are."""
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if row.verdict != "supported" or not is_proved(row):
            by_reason.setdefault(_kind_of(row), []).append(row)
    lines = ["| reason, as the first type has it | | types |", "|---|--:|---|"]
    for same in sorted(by_reason.values(), key=lambda some: (-len(some), _kind_of(some[0]))):
        names = list(dict.fromkeys(row.model_type for row in same))
        reason = f"{same[0].verdict}: {same[0].reason}"[:240].replace("|", "\\|")
        lines.append(f"| {reason} | {len(names)} | {', '.join(names)} |")
    return lines


def _kind_of(row: Row) -> str:
    """A reason without what differs from type to type: numbers, paths, names of classes."""
    text = re.sub(r"\(linear maps: [^)]*\)", "", row.reason)
    text = re.sub(r"\w+(\.\w+)+", "it", text)
    text = re.sub(r"\b[A-Z]\w*(For|Model|LMHead|Decoder)\w*", "it", text)
    return f"{row.verdict}: {re.sub(r'[0-9]+', 'n', text)}"[:100]


def table(rows: Sequence[Row]) -> list[str]:
    """A line a type."""
    lines = ["| type | read by values | counts | ablation | generation | gains |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        said = [row.counts, row.ablation, row.generation]
        if row.verdict != "supported":
            said = [row.verdict, "", ""]
        gains = _gains(row)
        lines.append(f"| {row.model_type} | {row.oracle} | {' | '.join(said)} | {gains} |")
    return lines


def _gains(row: Row) -> str:
    """What became of attribution: nothing where it is refused."""
    if row.attribution.startswith(WRONG):
        return WRONG
    if not row.attribution.startswith("supported"):
        return ""
    said = RIGHT if row.attribution.endswith(f"; {RIGHT}") else UNPROVED
    return f"{said}, no heads" if "but for heads" in row.attribution else said


def sections(path: Path) -> dict[str, list[str]]:
    """The lines between the page's marks, by the mark's name."""
    rows, versions = read_rows(path)
    said = [f"{name} {', '.join(values)}" for name, values in versions.items()]
    return {
        "versions": [f"{', '.join(said)}."],
        "summary": summary(rows),
        "reasons": reasons(rows),
        **{f"table {kind}": table([row for row in rows if row.mapping == kind]) for kind in KINDS},
    }


def fill(text: str, path: Path) -> str:
    """The page's text with the lines of the csv `path` between its marks."""
    for name, lines in sections(path).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no marks {begin.strip()} and {end}")
        text = before + begin + "\n".join(lines) + "\n" + end + after
    return text


def main(rows: Path, page: Path) -> None:
    atomic_write(page, fill(page.read_text(encoding="utf-8"), rows).encode())
    print(f"-> {page}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
