"""The model whose neurons are counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")
