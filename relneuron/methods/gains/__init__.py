"""Neurons by what they add to an answer's log-probability (arXiv 2312.12141).

`attribute` scores sentences (`scorer`, `values`, `queries`), `comparison` switches off what was
found, `rank` chooses; `page`, `study`, `tables` and `figures` are the report's.
"""
