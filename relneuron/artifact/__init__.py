"""The files that stages hand to each other; nothing here imports a model, or another room.

`files` writes, `reading` reads within limits, `prompts` and `neurons` are two formats of ours.
Begin with `files.atomic_write` and `reading.read_csv`.
"""
