"""Every stage of the command line is a function of `relneuron.stages`, with its options' class."""

from __future__ import annotations

import inspect

import pytest

import relneuron
from relneuron.artifact.options import Options
from relneuron.cli.main import stages as commands
from relneuron.study import stages

# Commands that are no stage; `run` is relneuron.run.
NO_STAGE = {"demo", "run", "import", "export", "cite", "bench", "doctor", "plan"}


def test_every_command_is_there() -> None:
    named = {stage.name for stage in commands()} - NO_STAGE
    assert named - set(stages.__all__) == set()


@pytest.mark.parametrize("name", stages.__all__)
def test_every_name_is_a_function_or_options_with_words(name: str) -> None:
    found = getattr(relneuron.stages, name)
    assert found.__doc__
    if name.endswith("Options"):
        assert issubclass(found, Options)
    else:
        assert inspect.isfunction(found)


def test_names_are_listed_and_others_are_none() -> None:
    assert relneuron.stages is stages
    assert {*stages.__all__} <= {*dir(stages)}
    with pytest.raises(AttributeError, match="module 'relneuron.stages' has no attribute 'recrod'"):
        stages.recrod  # noqa: B018
