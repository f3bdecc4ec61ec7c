"""An option exists once: a field of a dataclass says its default, help, range and when it counts.

From the field follow the flag of the command line (cli/flags.py), every check, what a manifest
records (`recorded`) and the words that make the same options again (`words`). What a command takes
besides, its arguments and -o, is written as the type of a parameter: `Model`, `Output`, ...
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.papers import Paper
from relneuron.artifact.words import escaped, pair, split, unescaped, whole_number

_T = TypeVar("_T", bound="Options")


@dataclass(frozen=True)
class Only:
    """When an option does something; on a command line it is refused without the condition.

    Its default may be given all the same, unless that `clashes` with what else is asked.
    """

    condition: str  # as in "--sizes does something only with --analyses sizes"
    holds: Callable[[Any], bool]  # of the options
    clashes: bool = False


@dataclass(frozen=True)
class Flag:
    """What a field says of its option.

    names    words that stand for several values, such as "all"
    is_set   of several values each counts once, in the order of `choices` or ascending
    repeats  several values are given with the flag each, not with commas
    records  whether it can change a result
    bare     the number that the flag stands for where none follows
    read     the value of a text, and `show` back, where the type does not say it
    papers   what some of its values go back to; "" stands for any that is asked for
    panel    the heading in the help that it stands under, in place of its class's
    offers   what the help and completion name beside `choices`, whoever checks it; in capitals
             what stands for a name of one's own
    """

    help: str
    flag: str = ""  # in place of the field's name
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    some: bool = False  # at least one value
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_set: bool = False
    repeats: bool = False
    records: bool = True
    bare: str = ""
    only: Only | None = None
    read: Callable[[str], Any] | None = None
    show: Callable[[Any], str] | None = None
    papers: Mapping[str, Paper] = field(default_factory=dict)
    panel: str = ""
    offers: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """The words that it takes, where these are few."""
        return (*self.names, *self.choices) or self.offers


def option(default: Any, help: str, **says: Any) -> Any:
    """A field with a default that is an option; `says` are fields of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help, **says)})


def like(options: type[Options], name: str, default: Any = ..., **says: Any) -> Any:
    """The option of another class, with its default or one of its own; `says` as in `option`."""
    (found,) = (f for f in fields(options) if f.name == name)
    flag = replace(found.metadata["flag"], **says)
    return field(default=found.default if default is ... else default, metadata={"flag": flag})


def refuse_stray(flag: str, condition: str) -> NoReturn:
    """Raise for an option that was given and does nothing without the condition."""
    raise RelneuronError(
        f"{flag} does something only {condition}", f"leave out {flag}, or run {condition}", 2
    )


@dataclass(frozen=True)
class Kind:
    """The type of an option: `base`, several of it, or none."""

    base: type
    many: bool
    optional: bool


_KNOWN: dict[type, dict[str, tuple[Field[Any], Flag, Kind]]] = {}


def options_of(cls: type[Options]) -> dict[str, tuple[Field[Any], Flag, Kind]]:
    """The options among a class's fields, those of its first base first, with what they say."""
    if cls not in _KNOWN:
        _KNOWN[cls] = _read_fields(cls)
    return _KNOWN[cls]


def _read_fields(cls: type[Options]) -> dict[str, tuple[Field[Any], Flag, Kind]]:
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls) if f.metadata}
    order = dict.fromkeys(name for c in cls.__mro__ for name in getattr(c, "__annotations__", ()))
    return {
        name: (known[name], _with_flag(known[name]), _kind(hints[name]))
        for name in order
        if name in known
    }


def _with_flag(f: Field[Any]) -> Flag:
    says: Flag = f.metadata["flag"]
    return replace(says, flag=f"--{(says.flag or f.name).replace('_', '-')}")


def _kind(hint: Any) -> Kind:
    parts = [part for part in get_args(hint) if part is not NoneType]
    optional = len(parts) < len(get_args(hint)) and get_origin(hint) is not tuple
    inner = parts[0] if optional else hint
    many = get_origin(inner) in (Sequence, tuple)
    return Kind(get_args(inner)[0] if many else inner, many, optional)


@dataclass(frozen=True)
class Options:
    """The options of a stage, checked; two that say the same are equal.

    `PANEL` is the heading in the help of the options that a class declares; without one they
    stand under that of the class that takes them over.
    """

    PANEL = ""

    def __post_init__(self) -> None:
        for name, (_, says, kind) in options_of(type(self)).items():
            value = getattr(self, name)
            if kind.many and value is not None:
                value = (value,) if isinstance(value, str) else tuple(value)
                if says.is_set:
                    value = tuple(sorted({*value}, key=_rank(says)))
                object.__setattr__(self, name, value)
            if value is not None:
                _check(says, kind, value)

    def part(self, cls: type[_T]) -> _T:
        """Those of the options that another class has."""
        return cls(**{f.name: getattr(self, f.name) for f in fields(cls)})

    def does_nothing(self, says: Flag) -> bool:
        """Whether an option counts only beside others than these."""
        return says.only is not None and not says.only.holds(self)

    def recorded(self) -> dict[str, Any]:
        """What the results depend on; None for an option that does nothing beside the others."""
        found: dict[str, Any] = {}
        for name, (_, says, _) in options_of(type(self)).items():
            if says.records:
                value = None if self.does_nothing(says) else getattr(self, name)
                found[name] = list(value) if isinstance(value, tuple) else value
        return found

    def words(self, *, all: bool = False) -> list[str]:
        """The words of a command line that make these options; of `all`, or those that record.

        An option that is at its default of None, False or nothing is left out, and one that does
        nothing.
        """
        words: list[str] = []
        for name, (f, says, kind) in options_of(type(self)).items():
            value = getattr(self, name)
            is_none = value is None or value is False or value == ()
            if self.does_nothing(says) or (is_none and value == f.default):
                continue
            if not (all or says.records):
                continue
            if kind.base is bool:
                words.append(says.flag if value else says.flag.replace("--", "--no-", 1))
            elif says.repeats:
                for one in value or ("",):
                    words += pair(says.flag, escaped(one))
            else:
                words += pair(says.flag, shown(says, kind, value))
        return words


def _rank(says: Flag) -> Callable[[Any], Any]:
    known = {name: place for place, name in enumerate(says.choices)}
    return lambda value: (known.get(value, len(known)), value)


def _check(says: Flag, kind: Kind, value: Any) -> None:
    """Raise for a value that is none of the choices, or out of range."""
    several = value if isinstance(value, tuple) else (value,)
    if not several and (says.some or kind.optional):
        fix = f"use some of {_known(says)}" if says.some else f"leave {says.flag} out for all"
        raise RelneuronError(f"{says.flag} names nothing", fix, 2)
    if says.some and len({*several}) < len(several):
        raise RelneuronError(f"{says.flag} names one twice", "name each once", 2)
    for one in several:
        if says.choices and one not in says.choices:
            raise RelneuronError(f"unknown {says.flag} {one!r}", f"use {_known(says)}", 2)
        if isinstance(one, float) and not math.isfinite(one):
            raise RelneuronError(f"{says.flag} {one} is not finite", "give a finite number", 2)
        limits = (
            ("at least", says.least, operator.ge),
            ("at most", says.most, operator.le),
            ("above", says.above, operator.gt),
            ("below", says.below, operator.lt),
        )
        if any(limit is not None and not holds(one, limit) for _, limit, holds in limits):
            wanted = [f"{word} {limit:g}" for word, limit, _ in limits if limit is not None]
            bounds = " and ".join(wanted)
            raise RelneuronError(
                f"{says.flag} must be {bounds}, got {one}", f"give a number {bounds}", 2
            )


def _known(says: Flag) -> str:
    return ", ".join(says.named)


# --- texts of a command line -----------------------------------------------------------------


def shown(says: Flag, kind: Kind, value: Any) -> str:
    """A value, not None, as the command line takes it."""
    if says.show is not None:
        return says.show(value)
    if not kind.many:
        return str(value)
    for name, stands_for in says.names.items():
        if tuple(value) == stands_for:
            return name
    return ",".join(str(one).replace(",", "\\,") for one in value)


def read(says: Flag, kind: Kind, given: Any) -> Any:
    """The value of what the command line gave: a text where the type is several, else itself."""
    if says.read is not None and given is not None:
        return says.read(given)
    if given is None or not kind.many:
        return given
    if says.repeats:
        return tuple(unescaped(text) for text in given if text)
    if given in says.names:
        return says.names[given]
    parts = split(given)
    if says.names and not parts:
        raise RelneuronError(f"unknown {says.flag} {given!r}", f"use {_known(says)}", 2)
    if kind.base is int:
        numbers = [whole_number(part) for part in parts]
        if None in numbers:
            raise RelneuronError(
                f"unknown number in {says.flag} {given!r}", "use numbers such as 10,50,200", 2
            )
        return tuple(numbers) or (None if kind.optional else ())
    # A name for nothing more, beside others, adds nothing.
    chosen = tuple(part for part in parts if says.names.get(part) != ())
    return chosen or (None if kind.optional else ())


# --- options of several stages ---------------------------------------------------------------


@dataclass(frozen=True)
class SeedOptions(Options):
    """The seed of a stage that draws."""

    seed: int = option(0, "Seed of the split, the negatives and everything else that is drawn.")


@dataclass(frozen=True)
class TopOptions(Options):
    """How many neurons a method chooses."""

    PANEL = "Which neurons are chosen"

    top: int | None = option(
        None,
        "Neurons of each relation; default: 3000, at most a tenth of the model's.",
        least=1,
    )


@dataclass(frozen=True)
class OomOptions(Options):
    """What a stage does when memory runs out."""

    oom: str = option(
        "split",
        "When memory runs out: split halves the batches, error ends the command.",
        choices=("split", "error"),
        records=False,
    )


DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
DEVICE_MAPS = ("auto", "balanced", "sequential", "FILE")


@dataclass(frozen=True)
class PlaceOptions(Options):
    """How a model is loaded, and where it lies."""

    PANEL = "The model"
    dtype: str | None = option(
        None,
        "Type of its numbers; default: float32 on a CPU, else the model's own.",
        offers=DTYPES,
    )
    device: str | None = option(
        None, "Where it runs; default: the GPU if there is one.", offers=DEVICES
    )
    device_map: str | None = option(
        None,
        "Spread the model over devices, in place of --device: by one of three rules, or as a JSON "
        "file of {module: device} says; what fits on none lies on the CPU or the disk.",
        offers=DEVICE_MAPS,
    )
    revision: str | None = option(None, "Revision of a model on the hub.")


@dataclass(frozen=True)
class LoadOptions(PlaceOptions):
    """How a model is loaded, and which kernels it runs with."""

    backend: str = option(
        "auto",
        "Kernels that it runs with; auto: those of the device.",
        offers=("auto", "reference", "cpu", "triton"),
    )


@dataclass(frozen=True)
class PartsOptions(LoadOptions):
    """How a model is loaded by a stage that several processes run, each with a part of it."""

    tensor_parallel_size: int | None = option(
        None,
        "Hold the model in so many parts, by its tensor parallel plan of transformers: one in each "
        "process of torchrun --nproc-per-node N -m relneuron ...",
        least=2,
        most=1024,
    )


# --- what a command takes besides ------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """A parameter of a command that is an argument; `offers` as in `Flag`."""

    metavar: str
    help: str
    offers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named:
    """A parameter of a command that has a flag and is no option of a stage, such as -o.

    `panel` and `offers` as in `Flag`; without a panel it stands with what is read and written.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    panel: str = ""
    offers: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnyOf:
    """A parameter of a command that is a dictionary: the flags of several classes of options.

    Each class by the name of the method that takes it.
    """

    classes: Mapping[str, type[Options]]


Model = Annotated[str, Argument("MODEL", "Model folder or hub name.")]
Neurons = Annotated[Path, Argument("NEURONS", "A neurons.json.")]
Prompts = Annotated[Path, Argument("PROMPTS", "A prompts.jsonl.")]
Study = Annotated[Path, Argument("DIR", "A study directory.")]
Output = Annotated[Path, Named("Where to write.", ("-o", "--output"))]
