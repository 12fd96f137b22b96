"""Hashes of what the rows of a recipe's sources depend on, so that a cache can answer before anything is read."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from moeft.data.cache import file_key, text_key

if TYPE_CHECKING:
    from moeft.config.filters import Filters
    from moeft.config.sft import Data
    from moeft.config.sources import Source

_PACKAGES = {"tool_calls": "jsonschema", "language": "py3langid", "near_duplicates": "rensa"}
"""Filter -> the package whose version may decide."""


def source_keys(data: Data) -> list[str | None]:
    """One hash per training source: of the bytes of its files, and of how they are read and filtered.

    Filters of ``data`` that compare rows see the sources one after the other, so earlier sources count as well then.

    Returns:
        None for a source that is not known before it is read: a data set of the hub, and what is compared with one.

    Raises:
        FileNotFoundError: If a file does not exist.
    """
    keys: list[str | None] = []
    compared: list[str | None] = []
    for source in data.train:
        before = compared if source.filters is None and data.filters.compare_rows else []
        key = None if source.path is None or None in before else text_key(_own(source, data), *filter(None, before))
        keys.append(key)
        if source.filters is None:
            compared.append(key)
    return keys


def _own(source: Source, data: Data) -> str:
    filters = data.filters if source.filters is None else source.filters
    how = {
        "format": source.format or data.format,
        "turns": source.turns or data.turns,
        "system": source.system,
        "max_reject_share": data.max_reject_share,
        "filters": filters.model_dump(mode="json"),
        "compared_with": [] if filters.contamination is None else [file_key(f) for f in filters.contamination.files],
        "packages": _versions(filters),
    }
    assert source.path is not None
    return text_key(file_key(source.path), json.dumps(how, sort_keys=True))


def _versions(filters: Filters) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, package in _PACKAGES.items():
        if getattr(filters, name):
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # Reading says so, if it comes to that.
                found[package] = None
    return found
