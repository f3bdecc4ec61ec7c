"""`python -m tests.fuzz`: mutated files and odd arguments; run.py says what must hold."""

from tests.fuzz.run import main

main()
