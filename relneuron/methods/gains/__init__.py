"""Neurons by what they add to an answer's log-probability (arXiv 2312.12141).

`attribute` scores sentences (`scorer`, `values`, `queries`), `comparison` switches off what was
found, `rank` chooses; `page`, `study`, `tables` and `figures` are the report's.
"""

from relneuron.report.page import PageKind

_ATTRIBUTE = "attribute MODEL PROMPTS -o DIR"
PAGE = PageKind(
    "attribution",
    reads={
        "manifest.json": _ATTRIBUTE,
        "targets.csv": _ATTRIBUTE,
        "attributions.csv": _ATTRIBUTE,
        "attributions.parquet": f"{_ATTRIBUTE} --format parquet",
        "promoted.csv": _ATTRIBUTE,
        "comparison.csv": f"{_ATTRIBUTE} --compare",
    },
    needs=(),
    marks=("targets.csv",),
    hints=(),
    again="run attribute again with --force",
    build="relneuron.methods.gains.page:build",
)
