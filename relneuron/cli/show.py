"""What the command line prints: plain lines and tables; cli/main.py's commands call it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.reading import read_csv

if TYPE_CHECKING:
    from relneuron.ablation.nll import Cell
    from relneuron.methods.counts.count import Counted


def say(text: str) -> None:
    """Print plain text: no markup, no control characters from data."""
    Console(highlight=False, soft_wrap=True).print(_printable(text), markup=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        say(f"{name:<{width}}  {finding}")


def print_chosen(chosen: NeuronFile) -> None:
    """One line a relation on its neurons and the cut; what --fdr can resolve; the peak memory."""
    resolution = 1
    for relation, found in chosen.selection.items():
        resolution = max(resolution, found.get("fdr_resolution", 1))
        if "reason" in found:
            say(f"{relation}: no neurons, {found['reason']}")
            continue
        parts = [(found, "<=" if found.get("ends") == "bottom" else ">=")]
        parts += [(found["lowest"], "<=")] if "lowest" in found else []
        n_rest = len(chosen.sets[relation]) - found.get("lowest", {}).get("neurons", 0)
        for cut, sign in parts:
            q = f", q <= {cut['q_at_cut']:.2g}" if "q_at_cut" in cut else ""
            say(
                f"{relation}: {cut.get('neurons', n_rest)} neurons, AP {sign} "
                f"{cut['score_at_cut']:.4f}{q}, {cut['ties_chosen']} of {cut['ties_at_cut']} "
                f"tied at the cut chosen, {cut['perfect']} with AP = 1"
            )
    if resolution > 1:
        say(
            f"with so few columns of noise, --fdr finds {resolution} or more neurons of a "
            "relation, or none: a larger --noise resolves smaller sets"
        )
    peak = peak_bytes()
    if peak is not None:
        say(f"peak memory: {peak / 2**20:,.0f} MiB")


def print_groups(chosen: NeuronFile) -> None:
    """How many neurons each group has, and what was left out."""
    for name, neurons in chosen.sets.items():
        none = ": none of those chosen is active enough in it" if chosen.method == "lape" else ""
        say(f"{name}: {len(neurons):,} neurons" if neurons else f"{name}: no neurons{none}")
    multiplicity = chosen.selection.get("multiplicity")
    if multiplicity:
        several = sum(multiplicity[1:])
        say(f"{sum(multiplicity):,} distinct neurons, {several:,} of them in several groups")
    if "reason" in chosen.selection:
        say(str(chosen.selection["reason"]))


def print_counted(counted: Counted | None, folder: Path) -> None:
    """What a count found and how its time went; None: it was finished before."""
    if counted is None:
        say(f"{folder} holds this count already")
        return
    for name, tokens in zip(counted.counts.groups, counted.counts.tokens.tolist(), strict=True):
        say(f"{name}: {tokens:,} tokens")
    seconds = max(counted.seconds, 1e-9)
    share = counted.share_of_bare
    bare = f", {share:.2f} of the bare forward's speed" if share is not None else ""
    say(
        f"count: {counted.seconds:.1f} s, {counted.tokens / seconds:,.0f} tokens/s{bare}; "
        f"{counted.waiting / seconds:.1%} of it waiting for tokens, "
        f"{counted.saving / seconds:.1%} for checkpoints"
    )
    say(f"-> {folder / COUNTS}")


def print_nll(cells: Sequence[Cell], empty: Collection[str] = ()) -> None:
    """The NLL of each group's text: clean, then how much it rises under each mask.

    Masks in `empty` have no neuron: there is nothing to say of them.
    """
    groups = list(dict.fromkeys(cell.group for cell in cells))
    clean = {cell.group: cell.nll for cell in cells if cell.mask == cells[0].mask}
    table = Table("off", caption="NLL, nats a token")
    for name in groups:
        table.add_column(Text(_printable(name)), justify="right")
    for mask in dict.fromkeys(cell.mask for cell in cells if cell.mask not in empty):
        found = {cell.group: cell.nll for cell in cells if cell.mask == mask}
        first = mask == cells[0].mask
        values = [found[g] if first else found[g] - clean[g] for g in groups]
        table.add_row(
            Text(_printable(mask)), *(f"{x:.4f}" if first else f"{x:+.4f}" for x in values)
        )
    Console(highlight=False).print(table)


def peak_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_accuracy(folder: Path) -> None:
    """Accuracy per relation: before, with its own neurons off, others' off, random off.

    Of eva, or of the first split that was asked.
    """
    columns = ("condition", "relation", "split", "accuracy")
    conditions = read_csv(folder / "conditions.csv", ("condition", "kind", "n_neurons"))
    empty = {c["condition"] for c in conditions if c["n_neurons"] == "0" and c["kind"] != "clean"}
    rows = [r for r in read_csv(folder / "accuracy.csv", columns) if r["condition"] not in empty]
    splits = [row["split"] for row in rows]
    main = "eva" if "eva" in splits else splits[0]
    found = {
        (row["condition"], row["relation"]): row.real("accuracy")
        for row in rows
        if row["split"] == main
    }
    relations = [relation for condition, relation in found if condition == "clean"]
    table = Table("relation", "clean", "own off", "others off", "random off")
    for relation in relations:
        own = found.get((relation, relation))
        others = [found[c, relation] for c in relations if c != relation and (c, relation) in found]
        chance = [v for (c, r), v in found.items() if r == relation and c.startswith("random.")]
        cells = [
            found["clean", relation],
            own,
            sum(others) / len(others) if others else None,
            sum(chance) / len(chance) if chance else None,
        ]
        shown = ("" if cell is None else f"{cell:.1%}" for cell in cells)
        table.add_row(Text(_printable(relation)), *shown)  # a Text has no markup
    Console().print(table)


def print_bench(title: str, rows: Sequence[Any]) -> None:
    """The rows of one case; a contestant that is wrong or not here has a reason and no times."""
    names = ("task", "who", "ms", "min ms", "x ours", "GB/s", "/triad", "/copy")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        if row.median_ms is None:
            say(f"{row.variant}, {row.contestant}: {row.note}")
            continue
        shares = ["" if s is None else f"{s:.0%}" for s in (row.share_triad, row.share_copy)]
        times = [f"{row.median_ms:.3g}", f"{row.min_ms:.3g}", f"{row.ratio:.3g}"]
        table.add_row(row.variant, row.contestant, *times, f"{row.GB_s:.3g}", *shares)
    Console().print(table)


def print_study(report: Path) -> None:
    print_accuracy(report.parent)
    say(f"report: {report}")
