"""Every fault of tests/mutants has its text once in its module, and a test that is there."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT
from tests.mutants import MUTANTS, ROOMS
from tests.mutants.mutant import module_of


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_can_be_put_in_and_its_test_is_there(name: str) -> None:
    mutant = MUTANTS[name]
    text = (ROOT / module_of(name)).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    faulty = text.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))
    file, _, test = mutant.test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert test.partition("[")[0] in {getattr(node, "name", "") for node in tree.body}


@pytest.mark.parametrize("room", ROOMS)
def test_a_fault_stands_in_the_file_of_its_room(room: str) -> None:
    assert {name.partition(".")[0] for name in ROOMS[room]} == {room}
