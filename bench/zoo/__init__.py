"""The zoo: every model type of transformers, built small at random, held to plain hooks.

`python -m bench.zoo` sweeps. `build.py` makes a small model of a type, `oracle.py` reads its MLPs
from values alone and counts and switches off by hooks, `check.py` compares relneuron with that, and
`page.py` makes the tables of docs/zoo.md.
"""
