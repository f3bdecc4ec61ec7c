"""The attribution that several files read: of a Llama, made once, whole in its folder `out`."""

from __future__ import annotations

import pytest

from tests.kit.attribution_runs import Attributed


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Attributed:
    made = Attributed("llama", tmp_path_factory.mktemp("llama"))
    made.attribute(made.folder / "out")
    return made
