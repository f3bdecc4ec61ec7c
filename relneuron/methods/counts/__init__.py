"""Neurons of groups of text by how often they are active: LAPE (arXiv 2402.16438) and baselines.

`count` is the corpus pass, `merge` adds, `rank` chooses; `authors_files` are the files of others;
`page`, `study`, `tables` and `figures` are the report's.
"""

from relneuron.report.page import PageKind

_COUNT = "count MODEL GROUP=TEXT... -o DIR"
_NLL = "nll MODEL DIR/neurons.json GROUP=TEXT... -o DIR"
PAGE = PageKind(
    "study",
    reads={
        "manifest.json": _COUNT,
        "counts.safetensors": _COUNT,
        "neurons.json": "identify DIR -o DIR/neurons.json",
        "scores.safetensors": "identify DIR -o DIR/neurons.json",
        "nll.csv": _NLL,
        "nll_windows.csv": _NLL,
    },
    needs=(),
    marks=("counts.safetensors", "nll.csv"),
    hints=("neurons.json",),
    again="run the stages from identify on anew",
    build="relneuron.methods.counts.page:build",
)
