"""Tables of Arrow: Parquet files, folders of ``datasets.save_to_disk``, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moeft.errors import DataError

BATCH_ROWS = 256


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Position and record of every row of a Parquet file; see :func:`moeft.data.files.open_records`."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file, or a cut-off one: {error}") from error
    rows = (row for batch in file.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
    return _numbered(rows)


def read_saved_dataset(folder: Path, split: str = "train") -> Iterator[tuple[int, Any]]:
    """Position and record of every row of a folder of ``datasets.save_to_disk``.

    Raises:
        DataError: If the folder holds none, or several without the wanted split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{folder} is a folder without a data set of datasets.save_to_disk: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{folder} holds the splits {', '.join(saved)}; give the folder of one of them")
        saved = saved[split]
    return _numbered(_rows(saved))


def read_hub_dataset(
    name: str, split: str = "train", revision: str | None = None, config: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Position and record of every row of a data set of the hub, or of the local cache.

    Args:
        name: ``owner/name``.
        split: Split to read.
        revision: Branch, tag or commit; None takes the newest.
        config: Part of a data set that has several, such as ``ARC-Easy``; None takes its default.

    Raises:
        DataError: If there is no such data set or split, or no connection.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # Of many kinds: no connection, no such repository, no such split, a script inside.
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the data set {name} (split {split}) cannot be had from the hub: {reason}. Without a connection, give the "
            "path of a file, or of a folder of datasets.save_to_disk"
        ) from error
    return _numbered(_rows(loaded))


def _rows(dataset: Any) -> Iterator[Any]:
    for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from batch.to_pylist()


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    # Arrow gives every object of a column the keys of all; the ones that a row never had are null.
    return enumerate(map(_without_nulls, rows), start=1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
