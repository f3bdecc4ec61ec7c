"""The commands that fix lines name: each is one that the command line takes, and that helps."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

import relneuron
from relneuron.cli import main as cli

PACKAGE = Path(relneuron.__file__).parent
QUICK = ["--noise", "0", "--permutations", "0", "--bootstrap", "0", "--top", "20", "--quiet"]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
# A command in a text: its name, then words up to the end of the sentence.
# `plan` takes those of the command behind it.
NAMED = re.compile(rf"relneuron (?:plan )?({'|'.join(COMMANDS)})((?: [^\s;,()`]+)*)")


def texts(path: Path) -> Iterator[str]:
    """The texts of a file, what is put into them left out; those that `relneuron` comes before."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_made_by = re.match(rf"({'|'.join(COMMANDS)}) [A-Z]", node.value)
            yield f"relneuron {node.value}" if is_made_by else node.value


def test_every_named_command_has_its_options() -> None:
    n_found = 0
    for path in PACKAGE.rglob("*.py"):
        for text in texts(path):
            for name, rest in NAMED.findall(text):
                taken = {option for p in COMMANDS[name].params for option in p.opts}
                asked = {word for word in rest.split() if word.startswith("-") and word != "->"}
                assert asked <= taken, (path.name, text)
                n_found += bool(asked)
    assert n_found > 20


@pytest.fixture(scope="module")
def study(model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("study") / "s"
    prompts, neurons = folder / "prompts.jsonl", folder / "neurons.json"
    for words in (
        ["prompts", fact_folder, "-o", prompts, "--eva", "8"],
        ["record", model_folder, prompts, "-o", folder, "--quiet"],
        ["identify", folder, "-o", neurons, *QUICK],
        ["ablate", model_folder, neurons, prompts, "-o", folder / "effects.csv"]
        + ["--random-seeds", "1", "--quiet"],
    ):
        assert called(*words) == 0
    return folder


def called(*words: object) -> int:
    """The exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["relneuron", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_what_a_fix_names_is_done(
    study: Path,
    model_folder: Path,
    fact_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files that are gone, damaged, empty or half written; commands that are given twice."""

    def remove(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).unlink()

    def write(name: str, data: str) -> Callable[[Path], object]:
        def act(folder: Path) -> None:
            # Else it says that the file was changed.
            manifest = json.loads((folder / "manifest.json").read_text())
            del manifest["digest"], manifest["files"][name]
            for stage in manifest["stages"].values():
                stage["files"] = [file for file in stage["files"] if file != name]
            (folder / "manifest.json").write_text(json.dumps(manifest))
            (folder / name).write_text(data)

        return act

    again = ["identify", "DIR", "-o", "neurons.json", *QUICK]
    ablate = [
        "ablate",
        "MODEL",
        "neurons.json",
        "prompts.jsonl",
        "-o",
        "new/effects.csv",
        "--quiet",
    ]
    for spoil, words in (
        (lambda folder: None, again),  # exists: add --force
        (remove("neurons.json"), ablate),
        (remove("prompts.jsonl"), ablate),
        (remove("effects.csv"), ["report", "DIR", "-o", "report.html"]),
        (remove("validated.csv"), [*again, "--force"]),
        (remove("responses.safetensors"), [*again, "--force"]),
        (write("neurons.json", "{}"), ablate),
        (write("prompts.jsonl", ""), ablate),
        (write("validated.csv", "id,prediction,correct\n"), [*again, "--force"]),
    ):
        folder = tmp_path / "s"
        shutil.copytree(study, folder)
        spoil(folder)
        places = {"DIR": folder, "MODEL": model_folder, "FACTS_DIR": fact_folder}
        files = ("neurons.json", "prompts.jsonl", "effects.csv", "report.html", "new/effects.csv")
        places |= {name: folder / name for name in files}
        places |= {f"DIR/{name}": folder / name for name in files}
        first = [str(places.get(word, word)) for word in words]
        capsys.readouterr()
        assert called(*first) in (1, 2)
        fix = capsys.readouterr().err.splitlines()[-1]
        named = NAMED.search(fix)
        if named:
            follow = [named[1], *shlex.split(named[2])]
            follow += ["--eva", "8"] if named[1] == "prompts" else []  # as few facts as there are
        else:
            assert fix.endswith("or add --force"), fix
            follow = [*words, "--force"]
        code = called(*(places.get(word, word) for word in follow))
        assert code == 0, (words, fix, capsys.readouterr().err)
        shutil.rmtree(folder)
