"""Whole studies, from Python as from the command line: made in one go, and read as data frames.

May import every room but `cli`, which is thin above it. Begin with `run.make_study`, the order of
the stages, and `folder.load`, a folder of any kind as data frames; `pages` are the kinds that have
a report.
"""
