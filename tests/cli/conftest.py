"""A corpus of three groups and the study of it that several files read: made once, by commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.corpus_commands import make_study, write_texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def study(model_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its groups have neurons."""
    return make_study(model_folder, corpus, tmp_path_factory.mktemp("study") / "s")
