"""`relneuron bench`: the ops timed against peers.

May import `ops`, `testing` and `artifact`. Begin with `timing`.
"""
