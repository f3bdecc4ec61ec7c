"""Commands of typer from plain functions: their parameters say what the command line takes.

A parameter whose type is a class of options (artifact/options.py) becomes the flags of its fields;
cli/main.py makes its commands here. What each of them takes besides is added: --max-record-mib and
--debug.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from relneuron.artifact.files import RelneuronError, check_place
from relneuron.artifact.installed import need
from relneuron.artifact.journal import n_started
from relneuron.artifact.options import (
    AnyOf,
    Argument,
    Named,
    Options,
    options_of,
    read,
    refuse_stray,
    shown,
)
from relneuron.artifact.reading import MAX_RECORD_MIB, allow_record_mib

state = {"debug": False, "interrupted": False}
_given: list[str] = []  # the parameters that the running command was given
_LARGEST = 2**53  # of a number on the command line
_HELP = {"force": "Overwrite what is there.", "quiet": "Show no progress bar."}


def _debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


_LAST = [
    inspect.Parameter(
        "max_record_mib",
        inspect.Parameter.KEYWORD_ONLY,
        default=MAX_RECORD_MIB,
        annotation=Annotated[
            int,
            typer.Option(
                min=1,
                callback=allow_record_mib,
                help="Largest line, record or cell that is read, in MiB; a JSON file may have four "
                "times as much.",
            ),
        ],
    ),
    inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool, typer.Option("--debug", callback=_debug, help="Show the traceback of an error.")
        ],
    ),
]


def flags_of(classes: Sequence[type[Options]]) -> list[inspect.Parameter]:
    """The flags of classes of options, each once; what several say of one stands in its help."""
    found: dict[str, inspect.Parameter] = {}
    helps: dict[str, dict[str, None]] = {}
    for cls in classes:
        for name, (f, says, kind) in options_of(cls).items():
            default, base = f.default, kind.base
            if kind.many:
                base = list[str] if says.repeats else str
                is_none = says.repeats or default in (None, ())
                default = None if is_none else shown(says, kind, default)
            elif says.read is not None:
                base = str
                default = says.show(default) if says.show and default is not None else default
            off = f"/{says.flag.replace('--', '--no-', 1)}" if f.default is True else ""
            if name in found and found[name].default != default:
                raise TypeError(f"{says.flag} has two defaults: {found[name].default}, {default}")
            helps.setdefault(name, {})[says.help] = None
            found[name] = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[
                    base | None if default is None else base,
                    typer.Option(f"{says.flag}{off}", help=" ".join(helps[name])),
                ],
            )
    return list(found.values())


def taken(cls: type[Options], given: dict[str, Any]) -> Options:
    """The options of a class, from what the command line gave by name."""
    values = {}
    for name, (f, says, kind) in options_of(cls).items():
        if name in given:
            absent = given[name] is None or (says.repeats and not given[name])
            values[name] = f.default if absent else read(says, kind, given[name])
    return cls(**values)


def check_only(options: Options, said: Iterable[str]) -> None:
    """Refuse options, by name, that do nothing beside the others."""
    known = options_of(type(options))
    for name in [name for name in said if name in known]:
        f, says, _ = known[name]
        if says.only is None or says.only.holds(options):
            continue
        if says.only.clashes or getattr(options, name) != f.default:
            refuse_stray(says.flag, says.only.condition)


def given() -> list[str]:
    """The names of the parameters that the running command was given."""
    return list(_given)


def command(function: Callable[..., Any], show: Callable[[Any], object]) -> Callable[..., None]:
    """A function that typer takes, which calls `function` and shows what it yields."""
    signature = inspect.signature(function, eval_str=True)
    own: dict[str, type[Options]] = {}
    several: dict[str, list[inspect.Parameter]] = {}  # of each dictionary of flags
    parameters = []
    for name, parameter in signature.parameters.items():
        hint, about = _parts(parameter.annotation)
        if isinstance(about, AnyOf):
            several[name] = flags_of(about.classes)
            parameters += several[name]
        elif isinstance(hint, type) and issubclass(hint, Options):
            own[name] = hint
            parameters += flags_of([hint])
        else:
            parameters.append(_typed(parameter))
    parameters += _LAST

    @functools.wraps(function)
    def run(**values: Any) -> None:
        found = {name: values[name] for name in signature.parameters if name in values}
        for name, cls in own.items():
            found[name] = taken(cls, values)
            check_only(found[name], _given)
        for name, flags in several.items():
            found[name] = {flag.name: values[flag.name] for flag in flags}
        for item in function(**found) or ():
            show(item)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__
    return run


def _parts(hint: Any) -> tuple[Any, Any]:
    """A parameter's type, and what is said of it."""
    return get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)


def _typed(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter as typer knows it."""
    hint, about = _parts(parameter.annotation)
    made: Any
    if isinstance(about, Argument):
        made = typer.Argument(metavar=about.metavar, help=about.help)
    else:
        flags = about.flags if isinstance(about, Named) else ()
        text = about.help if isinstance(about, Named) else _HELP[parameter.name]
        metavar = about.metavar if isinstance(about, Named) else None
        flag = f"--{parameter.name.replace('_', '-')}"
        plain = (flag,) if hint is bool else ()
        made = typer.Option(*(flags or plain), help=text, metavar=metavar)
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[hint, made],
    )


class Command(TyperCommand):
    """A command that begins nothing that it cannot end."""

    # Of each command; filled by cli/main.py.
    needs: dict[str, tuple[str, ...]] = {}
    shared: set[str] = set()

    def get_short_help_str(self, limit: int = 45) -> str:
        """Its sentence in the list of commands, whole: the list breaks lines itself."""
        return super().get_short_help_str(max(limit, 200))

    def invoke(self, ctx: Any) -> Any:
        """Check the packages, the numbers and the output, then run."""
        name = str(self.name)
        need(f"relneuron {name}", *self.needs.get(name, ()))
        if n_started() > 1 and name not in self.shared:
            raise RelneuronError(
                f"{name} is the work of one process, and torchrun started {n_started()}",
                f"start it without torchrun: relneuron {name} ...",
                2,
            )
        flags = {p.name: p.opts[-1] for p in self.params}
        sources = {option: ctx.get_parameter_source(option) for option in ctx.params}
        _given[:] = [
            o for o, source in sources.items() if getattr(source, "name", "") == "COMMANDLINE"
        ]
        for option, value in ctx.params.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and abs(number) > _LARGEST:
                    cause = f"{flags.get(option, option)} {str(number)[:20]}... is too large"
                    raise RelneuronError(cause, "give a smaller number", 2)
        if ctx.params.get("output") is not None:
            check_place(Path(ctx.params["output"]))
        return super().invoke(ctx)
