"""A language model: loaded, its parts found by structure, patched, traced, asked.

May import `ops`, `artifact` and `texts` (how a text becomes tokens); nothing here knows a study.
Begin with `mlps.find.find_mlps` and `patch.Patch`; `instrument` is what `import relneuron` shows.
"""
