"""The data sets that some tests read: ``shared/data`` in a folder above, laid out as ``docs/evaluation.md`` says."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = next((above / "shared" / "data" for above in Path(__file__).parents if (above / "shared").is_dir()), None)
needs_shared_data = pytest.mark.skipif(
    SHARED is None, reason="shared/data is in no folder above: get the data sets that docs/evaluation.md names"
)
