"""The files that stages hand to each other; nothing here imports a model, or another room.

`files` writes, `reading` reads within limits, `manifest` and `journal` make a study resumable,
`options` and `stage` say what a command takes and is; the others are formats, one a module.
Begin with `files.atomic_write` and `reading.read_csv`.
"""
