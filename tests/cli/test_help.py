"""`relneuron --version`, and what every help page shows: headings, choices, examples."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import relneuron as package
from relneuron.artifact.options import AnyOf, Options, options_of
from relneuron.artifact.stage import load
from relneuron.cli import main as cli
from relneuron.cli.commands import _asked
from relneuron.cli.flags import _RUNNING, _parts, check_only, taken
from relneuron.cli.help import ARGUMENTS, FILES, RUNS, folded, parts_of
from relneuron.cli.main import stages
from relneuron.methods import attributions, rankings

GROUP: Any = typer.main.get_command(cli.make_app())
NAMES = [stage.name for stage in stages()]


def page(name: str, columns: int = 80) -> str:
    """The help of a command at a width of the terminal."""
    command = GROUP.commands[name]
    settings = {**command.context_settings, "terminal_width": columns - 2, "max_content_width": 120}
    context = command.context_class(command, info_name=f"relneuron {name}", **settings)
    return str(command.get_help(context))


def headings(text: str) -> dict[str, str]:
    """The parts of a page by their headings."""
    found = re.split(r"^(\S.*):\n", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))


def run_of(name: str) -> Any:
    """The function of a command."""
    return load(next(stage.run for stage in stages() if stage.name == name))


def classes_of(name: str) -> dict[str, type[Options]]:
    """The classes of options that a command takes, by its method or its parameter."""
    found: dict[str, type[Options]] = {}
    for parameter in inspect.signature(run_of(name), eval_str=True).parameters.values():
        hint, about = _parts(parameter.annotation)
        if isinstance(about, AnyOf):
            found |= about.classes
        elif isinstance(hint, type) and issubclass(hint, Options):
            found[parameter.name] = hint
    return found


def examples(name: str) -> Iterator[list[str]]:
    """The words of each example of a command, without the lines that say something of it."""
    text = parts_of(run_of(name))[1]
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def test_the_version_is_said_and_nothing_else(relneuron: Any) -> None:
    assert relneuron("--version") == (0, f"relneuron {package.__version__}\n", "")
    assert relneuron("--version", "no-such-command")[0] == 0
    assert relneuron("--version=3")[0] == 2


def test_it_needs_no_torch() -> None:
    words = "import sys\nsys.argv = ['relneuron', '--version']\n"
    words += "from relneuron.cli.main import main\n"
    words += "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True).returncode == 0


def test_no_summary_of_a_command_is_cut_off(relneuron: Any) -> None:
    code, out, _ = relneuron("--help")
    told = " ".join(out.split())
    assert code == 0
    for stage in stages():
        first = " ".join((load(stage.run).__doc__ or "").split("\n\n")[0].split())
        sentence = first.split(". ")[0].removesuffix(".")
        assert f" {stage.name} {sentence}" in told
    assert "Examples:\n  relneuron demo " in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_its_columns(name: str, columns: int) -> None:
    text = page(name, columns)
    assert max(map(len, text.splitlines())) <= columns
    # No word is lost to the layout, and none of it is broken but at a hyphen.
    said = "".join(text.split())
    for param in GROUP.commands[name].params:
        assert "".join((param.help or "").split()) in said, param.name
    if columns == 120 and len(GROUP.commands[name].params) > 8:
        assert len(text.splitlines()) < len(page(name).splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_every_option_stands_under_one_heading(name: str) -> None:
    parts = headings(page(name))
    assert "Options" not in parts and list(parts)[-2:] == [RUNS, "Examples"]
    for param in GROUP.commands[name].params:
        left = param.metavar if param.param_type_name == "argument" else param.opts[-1]
        there = [heading for heading, text in parts.items() if _has(text, str(left))]
        assert len(there) == 1, (left, there)
        if param.param_type_name == "argument":
            assert there == [ARGUMENTS]
        if param.name in ("output", "force"):
            assert there == [FILES]
        if param.name in ("quiet", "debug", "batch_tokens", "oom", "workers"):
            assert there == [RUNS]
        if param.name in ("dtype", "revision", "backend") and name not in ("bench", "effect"):
            assert there == ["The model"]


@pytest.mark.parametrize("name", NAMES)
def test_what_says_how_it_runs_changes_no_result(name: str) -> None:
    """An option of a class without a heading would be lost among those."""
    running = headings(page(name))[RUNS]
    for cls in classes_of(name).values():
        for option, (_, says, _) in options_of(cls).items():
            if _has(running, says.flag):
                assert not says.records or option in _RUNNING, option


def _has(text: str, left: str) -> bool:
    """Whether a row begins with a flag or an argument."""
    return bool(re.search(rf"^  (-\w, )?{re.escape(left)}(?![\w-])", text, re.M))


@pytest.mark.parametrize(
    ("name", "known"), [("identify", rankings()), ("attribute", attributions())]
)
def test_a_heading_says_which_methods_take_an_option(name: str, known: Any) -> None:
    parts = headings(page(name))
    for heading, text in parts.items():
        flags = re.findall(r"^  (--[\w-]+)", text, re.M)
        if not heading.startswith("Of "):
            continue
        for flag in flags:
            field = flag[2:].replace("-", "_")
            takers = [m for m, way in known.items() if field in options_of(way.options)]
            if heading == "Of every method":
                assert takers == [*known]
            elif heading == "Of several methods":
                assert len(takers) > 4
            else:
                assert takers == re.split(", | or ", heading.removeprefix("Of --method "))


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_shown_as_choices(name: str) -> None:
    said = "".join(page(name).split())
    for cls in classes_of(name).values():
        for _, says, kind in options_of(cls).values():
            if says.named:
                several = ",..." if kind.many and not says.repeats else ""
                assert f"{says.flag}[{'|'.join(says.named)}]{several}" in said
    if name in ("identify", "attribute"):
        known = rankings() if name == "identify" else attributions()
        assert f"--method[{'|'.join(known)}]" in said


def test_a_long_list_of_choices_is_broken_behind_a_bar() -> None:
    flag = f"--method [{'|'.join(rankings())}]"
    lines = folded(flag, 60).splitlines()
    assert len(lines) > 1 and all(line.endswith("|") for line in lines[:-1])
    assert "".join(line.strip() for line in lines) == flag and max(map(len, lines)) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command itself: its options are read, and do something beside the others."""
    found = list(examples(name))
    assert found and all(words[0] == "relneuron" for words in found)
    assert any(words[1] == name for words in found)
    for _, command, *words in found:
        context = GROUP.commands[command].make_context(command, words)
        given = [
            key for key in context.params if context.get_parameter_source(key).name == "COMMANDLINE"
        ]
        classes = classes_of(command)
        if command in ("identify", "attribute"):
            known: Any = rankings() if command == "identify" else attributions()
            monkeypatch.setattr("relneuron.cli.commands.given", lambda given=given: given)
            options = {
                k: v
                for c in classes.values()
                for k, v in context.params.items()
                if k in options_of(c)
            }
            check_only(_asked(context.params["method"], known, options), given)
            continue
        for cls in classes.values():
            check_only(taken(cls, context.params), given)


def test_the_examples_of_the_stages_make_a_study(
    relneuron: Any,
    model_folder: Path,
    fact_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Typed one after the other, with a tiny model in place of theirs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts").symlink_to(fact_folder)
    few = {"prompts": ["--eva", 8], "ablate": ["--random-seeds", 1, "--quiet"]}
    few |= {"record": ["--quiet"], "look": ["--cards", 4, "--quiet"]}
    few["identify"] = ["--permutations", 10, "--bootstrap", 10, "--noise", 1000, "--quiet"]
    for name in ("prompts", "record", "identify", "look", "ablate", "report", "export", "cite"):
        words = [word for word in examples(name) if "study" in " ".join(word)][0]
        words = [str(model_folder) if "/Qwen" in f"/{word}" else word for word in words[1:]]
        words = ["0.5" if word == "0.05" else word for word in words]
        code, _, err = relneuron(*words, *few.get(name, ()))
        assert code == 0, (words, err)
    said = parts_of(run_of("run"))[0].partition("How long")[0]
    named = re.findall(r"\b[a-z]+\.(?:jsonl|json|csv|safetensors|html)\b", said)
    assert len(named) >= 11
    assert not [file for file in named if not (tmp_path / "study" / file).is_file()]


def test_the_page_of_run_tells_the_steps_in_order() -> None:
    text = page("run")
    steps = re.findall(r"^    (\w+)  ", text, re.M)
    assert steps == ["prompts", "record", "identify", "look", "ablate", "report"]
    assert len([words for words in examples("run") if words[1] == "run"]) == 3
    for word in ("How long", "What to try first", "relneuron demo", "goes on"):
        assert word in " ".join(text.split())
