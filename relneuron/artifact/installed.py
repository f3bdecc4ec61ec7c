"""How relneuron was installed; the optional packages, and what installs those that are not there.

The command line asks before it starts, and a stage before it reads or writes what needs one.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import relneuron
from relneuron.artifact.files import Json, RelneuronError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

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
    "lm_eval": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
    "pandas": "frames",
}
# What packages are for that no command needs for all that it does (`Stage.needs`).
USES = {
    "pyarrow": ".parquet files in count, nll, attribute and ablate",
    "datasets": "data sets of the hub, hf:..., in count and nll",
    "PIL": "pictures in count, ablate and generate",
    "peft": "adapters in contrast",
    "starlette": "look --serve",
    "uvicorn": "look --serve",
    "pandas": "data frames of relneuron.load: a table is a dict of arrays",
}
# Installed by another name than they are imported by.
PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


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
    found = _installed()
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


def how_installed() -> str:
    """How the relneuron that runs came here, from where, by what, and its commit if it is known."""
    found = _installed()
    root = Path(__file__).resolve().parents[2]
    by = (found.read_text("INSTALLER") or "").strip() if found else ""
    about: Json = json.loads((found.read_text("direct_url.json") if found else None) or "{}")
    if (root / "pyproject.toml").is_file():
        place = _folder_of(about)
        is_editable = place and place.resolve() == root and about["dir_info"].get("editable")
        how = f"editable, by {by}" if is_editable else "not installed, run where it lies"
        said = [f"{how}: {root}", *([f"commit {commit()}"] if commit() != "-" else [])]
    else:
        said = [f"a wheel, by {by or 'hand'}: {root}"]
        if "vcs_info" in about:
            said.append(f"of {about['url']}, commit {about['vcs_info']['commit_id']}")
        elif "url" in about:
            said.append(f"of {about['url']}")
    if found and found.version != relneuron.__version__:
        said.append(f"but installed as {found.version}: install it again")
    return ", ".join(said)


def _folder_of(about: Json) -> Path | None:
    """The folder that was installed, of a direct_url.json that is about one."""
    if "dir_info" not in about:
        return None
    return _path_of(str(about["url"]))


def _path_of(url: str) -> Path:
    from urllib.request import url2pathname  # every command would wait for it

    return Path(url2pathname(urlsplit(url).path))


def distribution(name: str) -> Distribution:
    """What the installer knows of a package."""
    from importlib.metadata import distribution as known  # likewise

    return known(name)


def _installed() -> Distribution | None:
    """What the installer knows of relneuron, if it was installed."""
    from importlib.metadata import PackageNotFoundError

    try:
        return distribution("relneuron")
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that the package's checkout is at, `+dirty` with changes, `-` if it is none."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        # Without optional locks nothing is written, not even git's index.
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return "-"  # installed inside of somebody else's checkout
        name = git("rev-parse", "--short=12", "HEAD")
        return name + (
            "+dirty" if git("status", "--porcelain", "--", ".", ":!bench/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "-"


def _origin(found: Distribution) -> list[str] | None:
    """The words that install this distribution again, its extras left out; None: not known."""
    text = found.read_text("direct_url.json")
    if not text:
        return None
    about: Json = json.loads(text)
    url, parts, place = str(about["url"]), urlsplit(str(about["url"])), _folder_of(about)
    if place:
        if not place.is_dir():
            return None
        return ["-e", str(place)] if about["dir_info"].get("editable") else [str(place)]
    if "vcs_info" in about:
        url = f"{about['vcs_info']['vcs']}+{url}@{about['vcs_info']['commit_id']}"
    elif parts.scheme == "file" and not _path_of(url).is_file():
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
