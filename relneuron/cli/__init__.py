"""The command line: commands and options, what is checked before, what is printed.

May import every room. Begin with `main`; `run` is the order of the stages, `pages` the report.
"""
