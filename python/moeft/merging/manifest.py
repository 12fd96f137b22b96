"""The manifest that the engine leaves beside a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from moeft import _core
from moeft.provenance.files import write_json

FILE = "moeft_merge.json"


def update_checksums(folder: Path, files: Iterable[str]) -> None:
    """Say anew what files of a merged checkpoint hold that were changed after the merge.

    Args:
        folder: The merged checkpoint.
        files: Names of the changed ones.
    """
    manifest = json.loads((folder / FILE).read_text("utf-8"))
    manifest["outputs"] |= {file: _core.checksum(folder / file) for file in files}
    write_json(folder / FILE, manifest)
