"""The optional packages: whether they are there, and what installs the ones that are not.

The command line asks before it starts, and a stage before it reads or writes what needs one.
"""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from relneuron.artifact.files import Json, RelneuronError

# Each package, by the name it is imported by, and the extra of pyproject.toml that brings it.
EXTRAS = {
    **dict.fromkeys(("typer", "rich", "pydantic", "jinja2", "tqdm", "filelock"), "cli"),
    "scipy": "stats",
    "transformers": "hf",
    "matplotlib": "plot",
    "datasets": "data",
    "pyarrow": "data",
    "PIL": "pictures",
    "sklearn": "probe",
    "peft": "adapters",
}
# Installed by another name than they are imported by.
PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def missing(*packages: str) -> list[str]:
    """Those of `packages` that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def need(what: str, *packages: str, otherwise: str = "") -> None:
    """Raise RelneuronError if one of `packages` is missing; `otherwise` is the other way out."""
    absent = missing(*packages)
    if absent:
        names = " and ".join(filter(None, (", ".join(absent[:-1]), absent[-1])))
        raise RelneuronError(
            f"{what} needs {names}, which {'are' if absent[1:] else 'is'} not installed",
            install_command(*dict.fromkeys(EXTRAS[name] for name in absent)) + otherwise,
        )


def install_command(*extras: str) -> str:
    """What adds `extras` to relneuron as it was installed: relneuron itself is on no index.

    pip notes where a package came from (direct_url.json): a folder, an archive, a repository. With
    no such note, or if its folder is gone, the packages of the extras are named instead.
    """
    wanted = f"[{','.join(extras)}]"
    found = None
    with suppress(PackageNotFoundError):
        found = distribution("relneuron")
    pip = "pip install"
    if found and (found.read_text("INSTALLER") or "").strip() == "uv":
        pip = "uv pip install"
    origin = _origin(found) if found else None
    if origin is None and (Path(__file__).parents[2] / "pyproject.toml").is_file():
        origin = [str(Path(__file__).parents[2])]  # not installed: run where it lies
    if origin is None:
        names = [name for name in EXTRAS if {EXTRAS[name], "all"} & {*extras}]
        return f"{pip} {shlex.join(_requirement(found, name) for name in names)}"
    *options, place = origin
    named = f"relneuron{wanted} @ {place}" if "://" in place else f"{place}{wanted}"
    return f"{pip} {shlex.join([*options, named])}"


def _origin(found: Distribution) -> list[str] | None:
    """The words that install this distribution again, its extras left out; None: not known."""
    text = found.read_text("direct_url.json")
    if not text:
        return None
    about: Json = json.loads(text)
    url, parts = str(about["url"]), urlsplit(str(about["url"]))
    if "dir_info" in about:
        place = Path(url2pathname(parts.path))
        if not place.is_dir():
            return None
        return ["-e", str(place)] if about["dir_info"].get("editable") else [str(place)]
    if "vcs_info" in about:
        url = f"{about['vcs_info']['vcs']}+{url}@{about['vcs_info']['commit_id']}"
    elif parts.scheme == "file" and not Path(url2pathname(parts.path)).is_file():
        return None
    folder = about.get("subdirectory")
    return [f"{url}#subdirectory={folder}" if folder else url]


def _requirement(found: Distribution | None, package: str) -> str:
    """A package with the versions that relneuron asks for, without its conditions."""
    package = PROJECTS.get(package, package)
    for line in (found.requires or []) if found else []:
        if re.match(rf"{package}\b", line):
            return line.partition(";")[0].replace(" ", "").strip("()")
    return package
