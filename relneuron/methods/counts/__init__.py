"""Neurons of groups of text by how often they are active: LAPE (arXiv 2402.16438) and baselines.

`count` is the corpus pass, `merge` adds, `rank` chooses; `authors_files` are the files of others;
`page`, `study`, `tables` and `figures` are the report's.
"""
