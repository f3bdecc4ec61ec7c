"""What mkdocs.yml asks of Python: the order of pages, links out of docs/, lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

# The pages in the order in which one comes to need them. A page that is named by no section is
# taken in by `*`, so that a new one needs no list to join.
SECTIONS = {
    "Start": ("index", "installing", "python", "symptoms"),
    "How to": ("howto/my-model", "howto/*", "pictures", "*"),
    "Methods": (
        "methods/index",
        "methods/ap",
        "methods/*",
        "gradients",
        "facts",
        "contrast",
        "patching",
        "effects",
    ),
    "Ops": ("ops/index", "ops/swiglu_stats", "ops/*", "backend", "gain"),
    "Reference": ("api/*",),
    "Benchmarks": ("truth", "rankings", "zoo"),
}
# Of a page in a folder of docs, `../` is docs itself.
_LINK = re.compile(r"\]\(((?:\.\./)+)")


def order(pages: list[str]) -> dict[str, list[str]]:
    """The pages of each section, by their paths without suffix; each page is in one section."""
    left = sorted(pages)
    taken: dict[tuple[str, str], list[str]] = {}
    for are_patterns in (False, True):  # a page that is named is no pattern's
        for section, names in SECTIONS.items():
            for name in names:
                if ("*" in name) == are_patterns:
                    taken[section, name] = [page for page in left if _takes(name, page)]
                    left = [page for page in left if not _takes(name, page)]
    return {
        section: [page for name in names for page in taken[section, name]]
        for section, names in SECTIONS.items()
    }


def _takes(name: str, page: str) -> bool:
    """Whether a name, or a pattern of one folder, is that of a page."""
    return name.count("/") == page.count("/") and fnmatchcase(page, name)


def on_files(files: Any, *, config: Any) -> Any:
    """The navigation, from the pages that are there."""
    pages = [file.src_uri.removesuffix(".md") for file in files.documentation_pages()]
    config["nav"] = [
        {section: [f"{page}.md" for page in own]} for section, own in order(pages).items()
    ]
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """A page's text: `../bench/x.py` is a file of the checkout, on the site one of its address."""
    depth = page.file.src_uri.count("/")
    place = f"]({config['repo_url']}/blob/main/"

    def outward(link: re.Match[str]) -> str:
        ups = link[1].count("../")
        return place if ups == depth + 1 else link[0]

    markdown = _LINK.sub(outward, markdown)
    for mark, made in {"commands": commands, "stages": stages}.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", "\n".join(made()))
    return markdown


def commands() -> Iterator[str]:
    """What `relneuron COMMAND --help` prints, of every command."""
    from typer.testing import CliRunner

    from relneuron.cli.main import app, stages

    for stage in stages():
        shown = CliRunner().invoke(app, [stage.name, "--help"], prog_name="relneuron")
        yield f"## {stage.name}\n\n```text\n{shown.output.strip()}\n```\n"


def stages() -> Iterator[str]:
    """Every function of `relneuron.stages`, for mkdocstrings to show its docstring."""
    from relneuron import stages

    for name in stages.__all__:
        if name[0].islower():
            home = getattr(stages, name)
            yield f"::: {home.__module__}.{home.__qualname__}"
            yield f"    options:\n      heading: stages.{name}\n      toc_label: {name}\n"
