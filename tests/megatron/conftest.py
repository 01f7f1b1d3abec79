"""A folder with small random models, shared by the jobs of all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_jobs import write_models


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs of these tests work: models under ``models``."""
    folder = tmp_path_factory.mktemp("megatron")
    write_models(folder / "models")
    return folder
