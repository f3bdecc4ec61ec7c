"""`relneuron` and `python -m relneuron`: the command line, if what it is made of is installed."""

from __future__ import annotations

import sys

from relneuron.installed import install_command, missing

# What relneuron.cli imports; the commands themselves check what they need.
PACKAGES = ("typer", "rich", "pydantic")


def main() -> None:
    """Run the command line, or say in two lines that relneuron was installed without it."""
    absent = missing(*PACKAGES)
    if absent:
        sys.stderr.write(
            f"error: the command line needs {', '.join(absent)}: not installed\n"
            f"fix:   {install_command('all')}\n"
        )
        sys.exit(1)
    from relneuron.cli import main as run

    run()


if __name__ == "__main__":
    main()
