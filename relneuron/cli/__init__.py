"""The command line: commands and options, what is checked before, what is printed.

May import every room. Begin with `main`; the order of a whole study's stages is
`study.run`.
"""
