"""Settings and fixtures of all tests: threads, offline mode, tiny random models of every family."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "2")
# Threads that spin while they wait make tiny models ten times slower on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import hypothesis
import pytest

from tests.tiny_models import FAMILY_NAMES, save_tiny_model

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("moeft", deadline=None)
hypothesis.settings.load_profile("moeft")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny random float32 checkpoint of each family, as transformers saves it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_tiny_model(family, root / family) for family in FAMILY_NAMES}


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def checkpoint(family: str, checkpoints: dict[str, Path]) -> Path:
    """Checkpoint folder of the family in turn; read-only by agreement."""
    return checkpoints[family]
