"""The command line: one loop over the commands of the house and of each method.

`relneuron --help` lists them; exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import relneuron
from relneuron.artifact.journal import is_first, n_started
from relneuron.artifact.stage import Stage, load
from relneuron.cli.errors import end
from relneuron.cli.flags import Command, command
from relneuron.cli.show import show
from relneuron.methods import methods

_WORKS = ("tqdm", "filelock")
_ASKS = ("transformers", *_WORKS)
_DRAWS = ("jinja2", "matplotlib", "scipy")
_HERE, _ABLATION = "relneuron.cli.commands", "relneuron.ablation.commands"
_EXCHANGE = "relneuron.cli.exchange"


def stages() -> list[Stage]:
    """Every command, those that make a whole study first; a method brings its own."""
    return [
        Stage("demo", f"{_HERE}:demo", (*_ASKS, *_DRAWS), is_shared=True),
        Stage("run", f"{_HERE}:run", (*_ASKS, *_DRAWS), is_shared=True),
        Stage("prompts", f"{_HERE}:prompts", ("filelock",)),
        *(stage for method in methods() for stage in method.stages),
        Stage("attribute", f"{_HERE}:attribute", _ASKS, is_shared=True),
        Stage("identify", f"{_HERE}:identify", _WORKS),
        Stage("ablate", f"{_ABLATION}:ablate", _ASKS, is_shared=True),
        Stage("nll", f"{_ABLATION}:nll", _ASKS, is_shared=True),
        Stage("generate", f"{_ABLATION}:generate", _ASKS, is_shared=True),
        Stage("effect", f"{_ABLATION}:effect", _WORKS),
        Stage("import", f"{_EXCHANGE}:import_files", ("transformers", "filelock")),
        Stage("export", f"{_EXCHANGE}:export", ("filelock",)),
        Stage("report", f"{_HERE}:report", (*_DRAWS, "filelock")),
        Stage("bench", f"{_HERE}:bench"),
        Stage("doctor", f"{_HERE}:doctor"),
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


def make_app() -> Any:
    """The command line, of typer."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Find the neurons of a language model that carry a relation, switch them off, and "
        "measure what is lost.",
    )
    app.callback()(_of_no_command)
    for stage in stages():
        app.command(stage.name, cls=Command)(command(load(stage.run), show))
    Command.needs = {stage.name: stage.needs for stage in stages()}
    Command.shared = {stage.name for stage in stages() if stage.is_shared}
    return app


app = make_app()


def _run_together() -> Any:
    """Run it in one of several processes, which end together."""
    from relneuron.model.meeting import leave, meet

    meet(end)
    code = app(standalone_mode=False)
    leave()
    return code


def main() -> None:
    """Run the command line and turn every error into one line of cause and one of fix."""
    # Read by transformers when, and if, a command imports it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name's letters that it cannot say
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    if not is_first():
        warnings.simplefilter("ignore")
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        if n_started() > 1:
            from relneuron.model.meeting import meet

            meet(end)
        code = app(standalone_mode=False)
        if code == 130:  # typer's own catch of an interrupt
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        end(error)
    sys.exit(code)
