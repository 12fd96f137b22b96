"""An encoded row, many of them in flat arrays, and how a row that is too long is made to fit."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, get_args, overload

import numpy as np
from numpy.typing import NDArray

from moeft.config.sources import OnTooLong

IGNORE_INDEX = -100
"""Label of a token that is not trained, as in ``torch.nn.functional.cross_entropy``."""


Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Ids of a row ``[S]``, and which of them are trained ``[S]``."""

ARRAYS = {"input_ids": np.int32, "trained": np.bool_, "offsets": np.int64}
"""Arrays of :class:`Examples` and their types, in the order of its fields."""


def array_file(folder: Path, name: str) -> Path:
    """Where one of :data:`ARRAYS` lies: its entries, in the order of bytes of this machine."""
    return folder / f"{name}.bin"


class Example(TypedDict):
    """One encoded row; both arrays have one entry per token, int32."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Encoded rows in flat arrays, in memory or mapped from files: 5 bytes per token. Rows are made when asked for."""

    input_ids: NDArray[np.int32]
    """``[T]``, the tokens of all rows one after the other."""
    trained: NDArray[np.bool_]
    """``[T]``, which of them have a label."""
    offsets: NDArray[np.int64]
    """``[N + 1]``, where each row starts, and T."""

    @classmethod
    def of(cls, rows: Iterable[Tokens]) -> "Examples":
        """Join rows in memory, one after the other: no row is held twice."""
        ids, trained = io.BytesIO(), io.BytesIO()
        offsets = _append(rows, ids, trained)
        return cls(np.frombuffer(ids.getbuffer(), np.int32), np.frombuffer(trained.getbuffer(), np.bool_), offsets)

    @classmethod
    def written(cls, rows: Iterable[Tokens], folder: Path) -> "Examples":
        """Join rows in files of a folder, one after the other, and map them."""
        with open(array_file(folder, "input_ids"), "wb") as ids, open(array_file(folder, "trained"), "wb") as trained:
            offsets = _append(rows, ids, trained)
        offsets.tofile(array_file(folder, "offsets"))
        # A file without bytes cannot be mapped.
        return cls.mapped(folder) if offsets[-1] else cls.of(())

    @classmethod
    def mapped(cls, folder: Path) -> "Examples":
        """What :meth:`written` wrote into a folder, mapped into memory; it cannot be written to.

        Raises:
            OSError: If one of them is missing.
            ValueError: If one of them is empty or holds part of an entry.
        """
        arrays: list[Any] = [np.memmap(array_file(folder, name), dtype, "r") for name, dtype in ARRAYS.items()]
        return cls(*arrays)

    @classmethod
    def join(cls, parts: Sequence["Examples"]) -> "Examples":
        """Several data sets as one, in their order; a single one is left where it lies."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.input_ids) for part in parts)])
        return cls(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.trained for part in parts]),
            np.concatenate(
                [[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))], dtype=np.int64
            ),
        )

    def take(self, rows: NDArray[np.int64]) -> "Examples":
        """Copy some rows, in this order; a row may come more than once."""
        pieces = [slice(start, stop) for start, stop in zip(self.offsets[rows], self.offsets[rows + 1], strict=True)]
        return Examples.of((np.asarray(self.input_ids[piece]), np.asarray(self.trained[piece])) for piece in pieces)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, stop = self.offsets[index], self.offsets[index + 1]
        ids = np.asarray(self.input_ids[start:stop])
        return {"input_ids": ids, "labels": np.where(self.trained[start:stop], ids, np.int32(IGNORE_INDEX))}

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[N]``, tokens of each row."""
        return np.diff(self.offsets)

    @property
    def trained_lengths(self) -> NDArray[np.int64]:
        """``[N]``, tokens of each row that carry a label."""
        # np.add.reduceat would widen all of them at once, to 8 bytes per token.
        spans = zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)
        return np.fromiter((np.count_nonzero(self.trained[start:stop]) for start, stop in spans), np.int64, len(self))

    @cached_property
    def num_trained(self) -> int:
        """Tokens of all rows that carry a label."""
        return int(np.count_nonzero(self.trained))


def _append(rows: Iterable[Tokens], ids_file: BinaryIO, trained_file: BinaryIO) -> NDArray[np.int64]:
    """Write rows; returns ``[N + 1]``, where each of them starts, and where the last ends."""
    stops = [0]
    for ids, trained in rows:
        ids_file.write(np.asarray(ids, np.int32).tobytes())
        trained_file.write(np.asarray(trained, np.bool_).tobytes())
        stops.append(stops[-1] + len(ids))
    return np.array(stops, dtype=np.int64)


def check_length_options(max_length: int | None, on_too_long: str) -> None:
    """Refuse options that make no sense.

    Raises:
        ValueError: If ``max_length`` is below 1 or ``on_too_long`` unknown.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}, expected at least 1, or None for no limit")
    if on_too_long not in get_args(OnTooLong):
        raise ValueError(f"on_too_long is {on_too_long!r}, expected one of {', '.join(get_args(OnTooLong))}")


def fit(trained: NDArray[np.bool_], max_length: int | None, on_too_long: OnTooLong) -> tuple[list[slice], str]:
    """Say which parts of an encoded row to keep.

    Args:
        trained: ``[S]``, which tokens of the row have a label.
        max_length: Most tokens, or None for no limit.
        on_too_long: What to do with more. A piece of a row that is split has lost what stood before it, and a piece
            without a trained token is left out.

    Returns:
        Pieces with a trained token each, and why there are none if so.
    """
    length = len(trained)
    pieces = [slice(0, length)]
    if max_length is not None and length > max_length:
        if on_too_long == "reject":
            return [], f"{length} tokens, max_length is {max_length}"
        starts = {"truncate": [0], "truncate_left": [length - max_length], "split": range(0, length, max_length)}
        pieces = [slice(start, min(start + max_length, length)) for start in starts[on_too_long]]
    # The first label is never a target: the model predicts from the second token on.
    kept = [piece for piece in pieces if trained[piece][1:].any()]
    if kept:
        return kept, ""
    most = min(length, max_length or length)
    place = {"truncate_left": f"last {most}", "split": f"pieces of {most}"}.get(on_too_long, f"first {most}")
    return [], f"no trained token among the {place} of {length}"
