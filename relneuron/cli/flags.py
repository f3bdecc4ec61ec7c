"""Commands of typer from plain functions: their parameters say what the command line takes.

A parameter whose type is a class of options (artifact/options.py) becomes the flags of its fields;
cli/main.py makes its commands here. What each of them takes besides is added: --max-record-mib and
--debug.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from relneuron.artifact.files import RelneuronError, check_place
from relneuron.artifact.installed import need
from relneuron.artifact.journal import PartDone, n_started
from relneuron.artifact.options import (
    AnyOf,
    Argument,
    Flag,
    Kind,
    Named,
    Options,
    options_of,
    read,
    refuse_stray,
    shown,
)
from relneuron.artifact.reading import MAX_RECORD_MIB, allow_record_mib
from relneuron.artifact.stage import load
from relneuron.artifact.words import whole_number
from relneuron.cli.help import FILES, RUNS, parts_of, write_examples, write_panels
from relneuron.cli.plan import DryOptions, report

state = {"debug": False, "interrupted": False}
_bare: dict[str, str] = {}  # by flag, the number that it stands for where none follows
_given: list[str] = []  # the parameters that the running command was given
_LARGEST = 2**53  # of a number on the command line
# The parameters that say nothing of themselves: their help and its heading.
_PLAIN = {
    "force": Named("Overwrite what is there.", panel=FILES),
    "quiet": Named("Show no progress bar.", panel=RUNS),
}
_RUNNING = ("batch_tokens", "shard")  # they say how a stage runs, though results depend on them


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
                rich_help_panel=RUNS,
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
            bool,
            typer.Option(
                "--debug",
                callback=_debug,
                rich_help_panel=RUNS,
                help="Show the traceback of an error.",
            ),
        ],
    ),
]


def flags_of(classes: Mapping[str, type[Options]]) -> list[inspect.Parameter]:
    """The flags of classes of options, each once; what several say of one stands in its help.

    Of several classes, by the names of their methods, a flag's heading says whose it is.
    """
    found: dict[str, inspect.Parameter] = {}
    helps: dict[str, dict[str, None]] = {}
    for cls in classes.values():
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
            if says.bare:
                _bare[says.flag] = says.bare
            found[name] = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[
                    base | None if default is None else base,
                    typer.Option(
                        f"{says.flag}{off}",
                        help=" ".join(helps[name]),
                        metavar=_metavar(says, kind),
                        rich_help_panel=_panel(name, classes),
                        autocompletion=_completion(says.named, kind.many and not says.repeats),
                    ),
                ],
            )
    return list(found.values())


def _metavar(says: Flag, kind: Kind) -> str | None:
    """What a flag takes: words as [a|b], several as [a|b],..., what may be left out as [<int>].

    None where typer says it.
    """
    several = ",..." if kind.many and not says.repeats else ""
    if says.named:
        return f"[{'|'.join(says.named)}]{several}"
    one = f"<{kind.base.__name__}>"
    if says.bare:
        return f"[{one}]"
    return f"{one}{several}" if kind.many else None


def _panel(name: str, classes: Mapping[str, type[Options]]) -> str:
    """The heading that an option stands under."""
    takers = [method for method, cls in classes.items() if name in options_of(cls)]
    cls = classes[takers[0]]
    says = options_of(cls)[name][1]
    if name in _RUNNING or not says.records:
        return RUNS
    if len(classes) > 1:
        if len(takers) > 4 or len(takers) == len(classes):
            return "Of every method" if len(takers) == len(classes) else "Of several methods"
        head = ", ".join(takers[:-1])
        return f"Of --method {f'{head} or ' if head else ''}{takers[-1]}"
    declared = next(c for c in cls.__mro__ if name in inspect.get_annotations(c))
    return says.panel or declared.PANEL or cls.PANEL  # type: ignore[attr-defined]


def _completion(words: tuple[str, ...], several: bool = False) -> Any:
    """What completes a value from the words that it takes; None for one that takes any.

    Of `several` the last one behind a comma is completed, by words that were not given before it.
    """
    offered = [word for word in words if not word.isupper()]

    def complete(incomplete: str) -> list[str]:
        before, comma, _ = incomplete.rpartition(",") if several else ("", "", "")
        return [f"{before}{comma}{word}" for word in offered if word not in before.split(",")]

    return complete if offered else None


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


def command(
    function: Callable[..., Any], show: Callable[[Any], object], plan: str = ""
) -> Callable[..., None]:
    """A function that typer takes, which calls `function` and shows what it yields.

    With `plan`, the "module:function" of its stage's planner, it takes --dry-run, too.
    """
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
            parameters += flags_of({name: hint})
        else:
            parameters.append(_typed(parameter))
    if plan:
        parameters += flags_of({"plan": DryOptions})
    parameters += _LAST

    @functools.wraps(function)
    def run(**values: Any) -> None:
        found = {name: values[name] for name in signature.parameters if name in values}
        for name, cls in own.items():
            found[name] = taken(cls, values)
            check_only(found[name], _given)
        for name, flags in several.items():
            found[name] = {flag.name: values[flag.name] for flag in flags}
        try:
            for item in _run(function, found, values, plan) or ():
                show(item)
        except PartDone as part:
            show(str(part))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = parts_of(function)[0]
    del run.__wrapped__
    return run


def _run(
    function: Callable[..., Any], found: dict[str, Any], values: dict[str, Any], plan: str
) -> Any:
    """What a command yields, or, where it is planned, its plan."""
    if not plan:
        return function(**found)
    dry = taken(DryOptions, values)
    check_only(dry, _given)
    assert isinstance(dry, DryOptions)
    return report(list(load(plan)(**found)), dry) if dry.dry_run else function(**found)


def _parts(hint: Any) -> tuple[Any, Any]:
    """A parameter's type, and what is said of it."""
    return get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)


def _typed(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter as typer knows it."""
    hint, about = _parts(parameter.annotation)
    made: Any
    if isinstance(about, Argument):
        completed = _completion(about.offers)
        made = typer.Argument(metavar=about.metavar, help=about.help, autocompletion=completed)
    else:
        said = about if isinstance(about, Named) else _PLAIN[parameter.name]
        flag = f"--{parameter.name.replace('_', '-')}"
        made = typer.Option(
            *(said.flags or ((flag,) if hint is bool else ())),
            help=said.help,
            metavar=said.metavar or (f"[{'|'.join(said.offers)}]" if said.offers else None),
            rich_help_panel=said.panel or FILES,
            autocompletion=_completion(said.offers),
        )
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[hint, made],
    )


def _with_numbers(words: Sequence[str]) -> list[str]:
    """The words of a command line with the number of each flag that may stand without one."""
    found = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        found.append(word)
        if word in _bare and whole_number(following.removeprefix("-")) is None:
            found.append(_bare[word])
    return found


def as_typed(params: list[Any], ctx: Any) -> list[Any]:
    """The parameters; while a shell completes, their values stay as typed: to read them is slow."""
    if ctx.resilient_parsing:
        for param in params:
            param.process_value = lambda ctx, value: value
    return params


class Command(TyperCommand):
    """A command that begins nothing that it cannot end."""

    # Of each command; filled by cli/main.py.
    needs: dict[str, tuple[str, ...]] = {}
    shared: set[str] = set()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Its arguments by the names that their help has."""
        params = self.get_params(ctx)
        named = [str(p.metavar) for p in params if p.param_type_name == "argument"]
        return ["[OPTIONS]", *named]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Its arguments and options, under their headings."""
        write_panels(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Its examples."""
        if self.epilog:
            write_examples(self.epilog, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, and --help."""
        return as_typed(super().get_params(ctx), ctx)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Its sentence in the list of commands, whole: the list breaks lines itself."""
        return super().get_short_help_str(max(limit, 200))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words as the parser takes them."""
        if self.name == "run" and any(word.partition("=")[0] == "--shard" for word in args):
            raise RelneuronError(
                "run makes no part of a study: its stages need each other's results",
                "share the long ones: relneuron record MODEL DIR/prompts.jsonl -o PART --shard 1/2 "
                "(and 2/2, on the other machine), relneuron merge PART PART -o DIR; likewise "
                "ablate; the same run without --shard then does the rest in DIR",
                2,
            )
        return super().parse_args(ctx, _with_numbers(args))

    def invoke(self, ctx: Any) -> Any:
        """Check the packages, the numbers and the output, then run."""
        name = str(self.name)
        need(f"relneuron {name}", *self.needs.get(name, ()))
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
        if n_started() > 1 and name not in self.shared:
            from relneuron.model.meeting import first_alone

            return first_alone(functools.partial(super().invoke, ctx))
        return super().invoke(ctx)
