"""What a stage of the command line and a method say of themselves: plain data, imported when used.

methods/__init__.py lists the methods, cli/main.py the other stages; nothing registers itself.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.artifact.files import Json, RelneuronError, real_path
from relneuron.artifact.options import Options
from relneuron.artifact.papers import Paper
from relneuron.artifact.reading import MAX_RECORD_MIB, max_record_mib


class Printed(NamedTuple):
    """A table that a command prints."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def load(name: str) -> Any:
    """What a string "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def load_own(flag: str, name: str, takes: str) -> Any:
    """The function `module:function` of a user's own, which an option names.

    The module is looked for where Python looks, and in the working directory. `takes` says what the
    function is of. Raises RelneuronError for a module that cannot be imported, and for what is no
    function in it.
    """
    module, _, function = name.partition(":")
    fix = f"give module:function, a function of {takes}"
    if not (module and function):
        raise RelneuronError(f"unknown {flag} {name!r}", fix, 2)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = import_module(module)
    except Exception as error:  # a module of the user's raises whatever it runs into
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RelneuronError(
            f"{flag} {name}: {module} cannot be imported ({said})", fix, 2
        ) from error
    finally:
        sys.path.remove(here)
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RelneuronError(f"{flag} {name}: {module} has no function {function}", fix, 2)
    return found


@dataclass(frozen=True)
class Stage:
    """A command of relneuron.

    run     "module:function"; the function's parameters are the command line's (artifact/options),
            its docstring the help, and what it yields, lines and `Printed`, is printed. The module
            imports no torch.
    needs   packages besides those of the command line
    is_shared   whether the processes of torchrun share its work
    papers  what it goes back to, whatever it is asked for
    plan    "module:function" of the same parameters, which yields the `planned.Planned` of what it
            would take, for --dry-run and `relneuron plan`; "" of a stage that runs no model
    """

    name: str
    run: str
    needs: tuple[str, ...] = ()
    is_shared: bool = False
    papers: tuple[Paper, ...] = ()
    plan: str = ""


@dataclass(frozen=True)
class Ranking:
    """A way to rank neurons: one `identify --method`.

    title    what it is, for help and reports
    options  the class of what it takes
    reads    the file of a folder that it ranks, and `of`, what that holds
    run      "module:function" (folder, output, options, *, method, force, quiet), which yields what
             is printed
    papers   what it goes back to
    """

    name: str
    title: str
    options: type[Options]
    reads: str
    of: str
    run: str
    papers: tuple[Paper, ...] = ()


@dataclass(frozen=True)
class Attribution:
    """A way to attribute answers to neurons: one `attribute --method`.

    title    what it is, for help
    options  the class of what it takes
    run      "module:function" (model, prompts, output, options, load_options, *, method, force,
             quiet), which yields what is printed
    papers   what it goes back to
    plan     "module:function" of the same parameters, as of a `Stage`
    """

    name: str
    title: str
    options: type[Options]
    run: str
    papers: tuple[Paper, ...] = ()
    plan: str = ""


@dataclass(frozen=True)
class Method:
    """A way to find neurons: its commands, its rankings, its page of a report, and its models.

    page      "module:PAGE" of a report.page.PageKind, if a folder of its files has a page
    supports  "module:function" (model) -> one row of `relneuron doctor`, if it has a say in it
    formats   whose files of neurons and counts it reads, by the names of `import --format`
    """

    stages: tuple[Stage, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    page: str = ""
    supports: str = ""
    formats: Mapping[str, Paper] = field(default_factory=dict)


# --- the command that makes a stage's files again ----------------------------------------------
#
# A stage builds its own from what it was given (`command`, `placed`), the manifest keeps it, and a
# report prints it: nothing is guessed.

STUDY = "STUDY"  # stands for the folder of the manifest, so that it holds no path of an output
WHOLE = ("run", "demo")  # commands that make all of `IN_WHOLE`
IN_WHOLE = ("prompts", "record", "identify", "look", "ablate")

Words = list[str]


def command(name: str, *arguments: object, **options: object) -> list[Words]:
    """The words of `relneuron NAME ARGUMENTS --option value ...`, as `Manifest.finish` takes them.

    An option that is None, False or empty is left out, True is a flag, several values are joined
    by commas. The key is `commands`: a stage of several commands has more than one.
    """
    words = [name, *map(str, arguments)]
    allowed = max_record_mib()
    options |= {"max_record_mib": None if allowed == MAX_RECORD_MIB else allowed}
    for option, value in options.items():
        if value is None or value is False or value == [] or value == ():
            continue
        words.append(f"--{option.replace('_', '-')}")
        if isinstance(value, list | tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return [words]


def loading(described: Json) -> Json:
    """The options that load a model as it was: dtype, place, revision, and kernels not its own."""
    device, backend = described["device"], described["backend"]
    own = {"cuda": "triton", "cpu": "cpu"}.get(device)
    device_map, n_parts = described.get("device_map"), described.get("tensor_parallel_size")
    return {
        "dtype": described["dtype"],
        "device": None if device_map or n_parts else device,
        "device_map": device_map,
        "tensor_parallel_size": n_parts,
        "revision": described["revision"],
        "backend": None if backend == own else backend,
    }


def placed(path: Path | str, folder: Path) -> str:
    """A path as a command takes it: within the study's folder from there, else as it was given."""
    whole, root = real_path(path), real_path(folder)
    if not whole.is_relative_to(root):
        return str(path)
    return "/".join((STUDY, *whole.relative_to(root).parts))


def moved(commands: Sequence[Words], place: str) -> list[Words]:
    """Commands of a study that is at `place` of another."""

    def word(text: str) -> str:
        head, equals, path = text.rpartition("=")
        is_inside = path == STUDY or path.startswith((f"{STUDY}/", f"{STUDY}."))
        return f"{head}{equals}{place}{path[len(STUDY) :]}" if is_inside else text

    return [[word(text) for text in words] for words in commands]


def commands(manifest: Json) -> list[str]:
    """The lines of a script that makes a study again, from what each of its stages recorded."""
    stages: Json = manifest.get("stages", {})
    recorded = {s: entry.get("commands") for s, entry in stages.items() if s != "report"}
    every = [words for found in recorded.values() for words in found or ()]
    whole = [words for words in every if words[0] in WHOLE][-1:]
    lines = [_line(words) for words in whole]
    for stage, found in recorded.items():
        if not found:
            lines.append(f"# {stage}: made from Python, or within another study")
            continue
        for words in found:
            if words[0] not in WHOLE:
                # The whole study has written these files already.
                again = ["--force"] if whole and stage in IN_WHOLE else []
                line = _line([*words, *again])
                # One command may make two stages.
                lines += [line] if line not in lines else []
    return "\n".join([*lines, f"relneuron report {STUDY} -o {STUDY}/report.html"]).split("\n")


def _line(words: Words) -> str:
    """A command, each option on a line of its own."""
    line = "relneuron"
    if "--tensor-parallel-size" in words:
        n_parts = words[words.index("--tensor-parallel-size") + 1]
        line = f"torchrun --nproc-per-node {n_parts} -m relneuron"
    for number, word in enumerate(words):
        begins = word.startswith("--") and number
        line += (" \\\n    " if begins else " ") + shlex.quote(word)
    return line
