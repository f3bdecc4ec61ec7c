"""A model as a residual stream: what its layers write into it, what reads it, proved by numbers.

Begin with `read.py`. `probe.py` records one forward, `find.py` tells from it what every part of a
layer does, `parts.py` is what is found (`norms.py` the norms), `trace.py` what sentences wrote.
"""
