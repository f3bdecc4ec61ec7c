"""A model as a residual stream: what its layers write into it, what reads it, proved by numbers.

Begin with `read.py`. `probe.py` records one forward, `find.py` tells from it what every part of a
layer does (`find_mixture.py` where it has experts), `parts.py` is what is found (`linear.py` the
maps, `norms.py` the norms, `mixture.py` what experts write), `trace.py` what sentences wrote.
"""
