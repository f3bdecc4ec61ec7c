"""How an answer's probability changes with each neuron: integrated gradients and their relatives.

Begin at `ig.py`, what the stage asks; `sites.py` says where a neuron is read, `reference.py` is the
spec, `staircase.py` the same from one prefill (`prefill.py`), `relevance.py` gradient x activation.
"""
