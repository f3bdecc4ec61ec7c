"""`python -m relneuron`: the command line without the console script."""

from relneuron.cli import main

main()
