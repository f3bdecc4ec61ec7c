"""The command line: one loop over the commands of the house and of each method.

`relneuron --help` lists them; exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import relneuron
from relneuron.ablation import STAGES as ABLATION
from relneuron.artifact.journal import is_first, n_started
from relneuron.artifact.memory import keep_freed
from relneuron.artifact.stage import Stage, load
from relneuron.cli.errors import end
from relneuron.cli.flags import Command, as_typed, command
from relneuron.cli.help import WIDEST, parts_of, write_examples
from relneuron.cli.show import show
from relneuron.methods import methods

_WORKS = ("tqdm", "filelock")
_ASKS = ("transformers", *_WORKS)
_DRAWS = ("jinja2", "matplotlib", "scipy")
_HERE, _EXCHANGE = "relneuron.cli.commands", "relneuron.cli.exchange"
_MACHINE = "relneuron.cli.machine"
# Objects that are made between two collections of Python's garbage; its own 700 have it go through
# all that was imported, hundreds of thousands, again and again. No batch's tensors wait for one.
GARBAGE = 50_000
_COMPLETES = "_RELNEURON_COMPLETE"  # set by a shell that asks typer for completions
# Of `plan`: the words of the command that is planned are that one's.
OWN_WORDS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_BEGIN = """\
relneuron demo              # a study of the bundled model, in a minute
relneuron doctor            # what works on this machine, what is missing
relneuron COMMAND --help    # what it does, with examples; begin with run
"""


def stages() -> list[Stage]:
    """Every command, those that make a whole study first; a method brings its own."""
    return [
        Stage("demo", f"{_HERE}:demo", (*_ASKS, *_DRAWS), is_shared=True),
        Stage(
            "run",
            f"{_HERE}:run",
            (*_ASKS, *_DRAWS),
            is_shared=True,
            plan="relneuron.study.plan:run",
        ),
        Stage("prompts", f"{_HERE}:prompts", ("filelock",)),
        *(stage for method in methods() for stage in method.stages),
        Stage(
            "attribute",
            f"{_HERE}:attribute",
            _ASKS,
            is_shared=True,
            plan=f"{_HERE}:plan_attribute",
        ),
        Stage("identify", f"{_HERE}:identify", _WORKS),
        *ABLATION,
        Stage("import", f"{_EXCHANGE}:import_files", ("transformers", "filelock")),
        Stage("export", f"{_EXCHANGE}:export", ("filelock",)),
        Stage("look", "relneuron.cli.look:look", (*_ASKS, "jinja2"), is_shared=True),
        Stage("report", f"{_HERE}:report", (*_DRAWS, "filelock")),
        Stage("plan", "relneuron.cli.plan:plan", ("transformers",)),
        Stage("cite", "relneuron.cli.cite:cite"),
        Stage("bench", f"{_MACHINE}:bench"),
        Stage("doctor", f"{_MACHINE}:doctor"),
    ]


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"relneuron {relneuron.__version__}")
        raise typer.Exit


def _of_no_command(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show it and leave."),
    ] = False,
) -> None:
    """Options before the command."""


class Group(TyperGroup):
    """The list of commands, and which to begin with."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before the command."""
        return as_typed(super().get_params(ctx), ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, as they are typed."""
        write_examples(_BEGIN, formatter)


def make_app(only: str | None = None) -> Any:
    """The command line, of typer; with `only` one of its commands, since all take longer."""
    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
        help="Find the neurons of a language model that carry a relation, switch them off, and "
        "measure what is lost.",
    )
    app.callback()(_of_no_command)
    known = stages()
    for stage in [stage for stage in known if only in (None, stage.name)]:
        function = load(stage.run)
        made = app.command(
            stage.name,
            cls=Command,
            epilog=parts_of(function)[1] or None,
            context_settings=OWN_WORDS if stage.name == "plan" else None,
        )
        made(command(function, show, stage.plan))
    Command.needs = {stage.name: stage.needs for stage in known}
    Command.shared = {stage.name for stage in known if stage.is_shared}
    return app


def __getattr__(name: str) -> Any:
    """`app`, with every command, is made when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = make_app()
    return globals()[name]


def _asked() -> str | None:
    """The command that the line begins with, or the line that a shell completes."""
    words = sys.argv[1:]
    if _COMPLETES in os.environ:
        lines = (os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"))
        words = next(filter(None, lines), "").split()[1:]
        os.environ.setdefault("TERMINAL_WIDTH", "1000")  # help that typer breaks is no candidate
    return next((stage.name for stage in stages() if words[:1] == [stage.name]), None)


def _run() -> Any:
    made = globals().get("app") or make_app(_asked())
    return made(standalone_mode=False, prog_name="relneuron")


def _run_together() -> Any:
    """The command line in one of several processes, which end together."""
    from relneuron.model.meeting import leave, meet

    meet(end)
    code = _run()
    leave()
    return code


def main() -> None:
    """Run the command line and turn every error into one line of cause and one of fix."""
    gc.set_threshold(GARBAGE)
    # Read by transformers when, and if, a command imports it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # By torch at its first tensor: those of 2 MB and more lie in large pages, where the system has
    # them. What a forward writes to new memory takes half the time there.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed()
    if n_started() > 1:  # of a process that is gone we say one line, torch pages
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name's letters that it cannot say
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    if not is_first():
        warnings.simplefilter("ignore")
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        code = (_run_together if n_started() > 1 else _run)()
        if code == 130:  # typer's own catch of an interrupt
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        end(error)
    sys.exit(code)
