"""What a shell completes: commands, options and choices, by the protocol that its script speaks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relneuron.cli.flags import _completion
from relneuron.cli.main import stages
from relneuron.methods import rankings

NAMES = [stage.name for stage in stages()]
Completed = Callable[..., list[str]]


@pytest.fixture
def completed(relneuron: Any, monkeypatch: pytest.MonkeyPatch) -> Completed:
    """What a shell is told of a line, in this process; the last word is the one to complete."""

    def ask(*words: str, shell: str = "bash") -> list[str]:
        line = " ".join(("relneuron", *words))
        monkeypatch.setenv("_RELNEURON_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setattr("relneuron.cli.main.app", None, raising=False)
        code, out, err = relneuron()
        assert (code, err) == (0, "")
        return [line for line in out.splitlines() if line]

    return ask


def test_commands_are_completed(completed: Completed) -> None:
    assert completed("") == NAMES
    assert completed("re") == [name for name in NAMES if name.startswith("re")]
    assert completed("no-such") == []
    assert {"--version", "--install-completion", "--show-completion"} <= {*completed("--")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("count", "--pac"), ["--packing"]),
        (("count", "m", "--packing", ""), ["packed", "documents"]),
        (("count", "m", "--packing", "d"), ["documents"]),
        (("count", "m", "--sites", "act,g"), ["act,gate"]),
        (
            ("count", "m", "--sites", "gate,"),
            [f"gate,{s}" for s in ("up", "act", "product", "down")],
        ),
        (("ablate", "--analyses", "m"), ["main", "matched"]),
        (("identify", "d", "--method", ""), [*rankings()]),
        (("identify", "d", "--method", "q"), ["qrnca", "query_localization"]),
        (("attribute", "--method", ""), ["gain", "ig", "relevance"]),
        (("import", "--format", "s"), ["safety"]),
        (("record", "--dtype", "f"), ["float32", "float16"]),
        (("record", "--device-map", ""), ["auto", "balanced", "sequential"]),  # and files
        (("generate", "--measure", ""), ["exact", "anls", "letter"]),
        (("bench", "s"), ["swiglu_stats"]),
        (("cite", "--format", ""), ["bibtex", "text"]),
        # A path is the shell's to complete, and a number nobody's.
        (("report", ""), []),
        (("identify", "d", "--within", "n"), []),
        (("identify", "d", "--top", "1"), []),
    ],
)
def test_options_and_choices_are_completed(
    completed: Completed, words: tuple[str, ...], expected: list[str]
) -> None:
    assert completed(*words) == expected


def test_every_option_of_every_command_is_offered(completed: Completed) -> None:
    for name in NAMES:
        offered = completed(name, "--")
        assert {"--debug", "--max-record-mib", "--help"} <= {*offered}
        assert len({*offered}) == len(offered)


def test_a_word_that_was_given_is_not_offered_again() -> None:
    assert _completion(("gate", "up", "FILE"), True)("gate,u") == ["gate,up"]
    assert _completion(("gate", "up", "FILE"))("") == ["gate", "up"]
    assert _completion(("FILE",)) is None and _completion(()) is None


def test_help_of_a_candidate_is_one_line(completed: Completed) -> None:
    """A line of fish is a candidate, its help behind a tab."""
    for name in NAMES:
        for line in completed(name, "--", shell="fish"):
            assert re.fullmatch(r"--[\w-]+\t[^\t]+", line), line
    said = completed("count", "--pac", shell="zsh")
    assert len(said) == 1 and said[0].startswith('_arguments \'*: :(("--packing":"packed')
    assert completed("report", "", shell="zsh") == ["_files"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(
    relneuron: Any, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("_RELNEURON_COMPLETE", f"source_{shell}")
    code, out, err = relneuron()
    assert code == 0 and f"complete_{shell}" in out and "relneuron" in out
    program = shutil.which(shell)
    if program is not None:
        assert subprocess.run([program, "-n"], input=out, text=True).returncode == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_its_script(tmp_path: Path) -> None:
    """As typed: the script is sourced, and its function asked; no torch is imported for it."""
    program = tmp_path / "relneuron"
    code = "import sys; from relneuron.__main__ import main\ntry:\n    main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    (tmp_path / "main.py").write_text(code)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/main.py" "$@"\n')
    program.chmod(0o755)
    lines = f"""
        PATH="{tmp_path}:$PATH"
        source <(_RELNEURON_COMPLETE=source_bash relneuron)
        complete -p relneuron
        for line in "relneuron identify d --method l" "relneuron cou"; do
            COMP_WORDS=($line); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _relneuron_completion relneuron
            echo "${{COMPREPLY[@]}}"
        done
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(["bash", "-c", lines], env=env, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.splitlines() == [
        "complete -o default -F _relneuron_completion relneuron",
        "lape logprob_gain",
        "count",
    ]
