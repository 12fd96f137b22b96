"""The demo around its run; the run itself is `make demo`, which the continuous integration runs whole."""

from __future__ import annotations

import pytest

from moeft.demo.run import run
from moeft.errors import RunFolderError
from moeft.provenance import RunFolder


@pytest.fixture
def finished(tmp_path):
    with RunFolder.create(tmp_path / "run", "moeft sft", {}, {}, seed=0):
        pass
    return tmp_path


def test_finished_demo_is_not_run_again(finished):
    said = []
    folder = run(finished, 0, said.append)
    assert folder.path == finished / "run"
    assert "remove the folder to run it again" in said[0]
    assert not (finished / "data").exists()


def test_demo_with_another_seed_is_refused(finished):
    with pytest.raises(RunFolderError, match="holds a demo with seed 0, not 1"):
        run(finished, 1, lambda text: None)
