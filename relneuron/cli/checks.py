"""What every command checks before it starts: its packages, its options, and where it writes.

cli/main.py gives its commands the class `Command`; what is not checked here needs files or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from relneuron.artifact.files import RelneuronError, check_place
from relneuron.artifact.installed import need
from relneuron.cli.options import names

Values = Mapping[str, Any]  # of a command's parameters, by name

# The optional packages of each command, beside those that the command line itself is made of.
_WORKS = ("tqdm", "filelock")
_ASKS = ("transformers", *_WORKS)
_DRAWS = ("jinja2", "matplotlib", "scipy")
NEEDS = {
    "demo": (*_ASKS, *_DRAWS),
    "run": (*_ASKS, *_DRAWS),
    "record": _ASKS,
    "ablate": _ASKS,
    "attribute": _ASKS,
    "count": _ASKS,
    "nll": _ASKS,
    "generate": _ASKS,
    "identify": _WORKS,
    "prompts": ("filelock",),
    "merge": ("filelock",),
    "export": ("filelock",),
    "import": ("transformers", "filelock"),
    "report": (*_DRAWS, "filelock"),
}

_LARGEST = 2**53  # of a number on the command line

# What each `identify --method` takes, beside -o, --force, --quiet and --debug.
_COUNTED = ("top", "top_rate", "site", "groups", "precision")
METHODS = {
    "ap": ("top", "ends", "fdr", "negatives", "permutations", "bootstrap", "noise", "seed"),
    "logprob_gain": ("top", "kept_only"),
    "lape": (*_COUNTED, "filter_rate", "bar_ratio"),
    "probability": _COUNTED,
    "mean": _COUNTED,
    "random": (*_COUNTED, "seed"),
}


@dataclass(frozen=True)
class Only:
    """Options that do something only under a condition; given without it they are refused.

    Their defaults may be given, unless they say otherwise than another option (`clashes`).
    """

    options: tuple[str, ...]
    condition: str  # what must be given, or must not
    holds: Callable[[Values], bool]
    clashes: bool = False


def _has_analysis(name: str) -> Callable[[Values], bool]:
    return lambda given: bool({name, "all"} & {*names(given["analyses"])})


def _is(option: str, *values: object) -> Callable[[Values], bool]:
    return lambda given: given[option] in values


_SIZES = Only(("sizes",), "with --analyses sizes", _has_analysis("sizes"))
_MEAN = Only(("mean_of",), "with --mode mean", _is("mode", "mean"))
_POOLED = Only(("exclude_bos",), "with --pooling mean", _is("pooling", "mean"))
RULES = {
    "demo": (_SIZES,),
    "run": (_SIZES, _MEAN, _POOLED),
    "record": (_POOLED,),
    "ablate": (
        _SIZES,
        _MEAN,
        Only(("accept_object_prefix",), "without --generate", _is("generate", None)),
    ),
    "identify": (Only(("top_rate",), "without --top", _is("top", None), clashes=True),),
    "attribute": (
        Only(("intervene", "random_seeds"), "with --compare", _is("compare", True)),
        Only(
            ("query_of", "query_units"),
            "with --compare or --kinds query_layer,query_ffn_neuron",
            lambda given: given["compare"] or given["kinds"] == "all" or "query" in given["kinds"],
        ),
        Only(("key",), "with --query-of ffn", _is("query_of", "ffn")),
        Only(("tolerance",), "with --mode certified", _is("mode", "certified")),
    ),
    "count": (
        Only(
            ("checkpoint_seconds",),
            "without --checkpoint-batches",
            _is("checkpoint_batches", None),
            clashes=True,
        ),
    ),
    "generate": (Only(("counts",), "with --set", lambda given: given["set_to"] is not None),),
    "import": (
        Only(
            ("names",),
            "with a .neuron.pth",
            lambda given: any("=" not in text or Path(text).exists() for text in given["files"]),
        ),
    ),
    "bench": (
        Only(("quick",), "without --full", _is("full", False)),
        Only(("dtype", "tokens"), "with the op swiglu_stats", _is("op", None, "swiglu_stats")),
    ),
    "doctor": (Only(("revision",), "with a MODEL", lambda given: given["model"] is not None),),
}


class Command(TyperCommand):
    """A command that refuses what it would swallow, and begins nothing that it cannot end."""

    def invoke(self, ctx: Any) -> Any:
        """Check, then run."""
        name = str(self.name)
        need(f"relneuron {name}", *NEEDS.get(name, ()))
        flags = {p.name: p.opts[-1] for p in self.params}
        given = [
            option
            for option in ctx.params
            if getattr(ctx.get_parameter_source(option), "name", "") == "COMMANDLINE"
        ]
        for option, value in ctx.params.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and abs(number) > _LARGEST:
                    cause = f"{flags.get(option, option)} {str(number)[:20]}... is too large"
                    raise RelneuronError(cause, "give a smaller number", 2)
        if name == "identify":
            check_method(ctx.params["method"], {key: flags[key] for key in given})
        defaults = {p.name: p.default for p in self.params}
        for rule in RULES.get(name, ()):
            for option in rule.options:
                is_said = rule.clashes or ctx.params[option] != defaults[option]
                if option in given and is_said and not rule.holds(ctx.params):
                    raise RelneuronError(
                        f"{flags[option]} does something only {rule.condition}",
                        f"leave out {flags[option]}, or run {rule.condition}",
                        2,
                    )
        if ctx.params.get("output") is not None:
            check_place(Path(ctx.params["output"]))
        return super().invoke(ctx)


def check_method(method: str, given: Mapping[str, str]) -> None:
    """Refuse a method that is none, and options, by name and flag, that are those of others."""
    if method not in METHODS:
        raise RelneuronError(f"unknown method {method!r}", f"use {', '.join(METHODS)}", 2)
    of_others = {name for options in METHODS.values() for name in options} - {*METHODS[method]}
    for name, flag in given.items():
        if name in of_others:
            takers = [other for other, options in METHODS.items() if name in options]
            raise RelneuronError(
                f"--method {method} takes no {flag}",
                f"leave it out, or use --method {' or '.join(takers)}, which "
                f"{'take' if takers[1:] else 'takes'} it",
                2,
            )
