"""A safetensors file that is written tensor by tensor, in any order, and survives a kill between two of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moeft.errors import CheckpointError
from moeft.provenance.files import append_line, drop_torn_line, read_lines

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """The header is written first, then tensors go to their places; ``finish`` gives the file its name.

    Until then it is ``<path>.partial``, beside ``<path>.journal`` with the hash of the header and a line per finished
    unit: its tensors, their hash, and facts to remember. A second start with the same header goes on from there, and
    reads finished units again to verify them. Whatever decides the content therefore belongs into the metadata.

    Attributes:
        path: The final name.
        finished: Unit -> the facts that it was finished with.

    Args:
        path: File to make; must not exist.
        specs: Every tensor.
        metadata: For the header.

    Raises:
        CheckpointError: If ``path`` exists, or what is left of an earlier start has another header.
        OSError: If the disk is too small, or a file cannot be written.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path = Path(path).absolute()
        if self.path.exists():
            raise CheckpointError(f"{self.path} exists; choose another output, or remove it")
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._journal = self.path.with_name(self.path.name + ".journal")
        header, self._offsets, self._size = _header(specs, metadata)
        self._specs = dict(specs)
        self.finished: dict[str, dict[str, Any]] = {}
        plan = hashlib.sha256(header).hexdigest()
        if self._partial.exists() and self._journal.exists():
            self._resume(plan)
        else:
            self._start(header, plan)
        self._file = open(self._partial, "r+b")  # noqa: SIM115  (closed by __exit__)

    def write(self, name: str, value: Tensor, first: int = 0) -> None:
        """Put a tensor, or rows of its first axis from ``first`` on, into its place; it is cast to its dtype."""
        spec = self._specs[name]
        row_bytes = spec.nbytes // spec.shape[0] if first else 0
        self._file.seek(self._offsets[name] + first * row_bytes)
        for part in value.detach().reshape(-1).split(CHUNK_BYTES):
            self._file.write(part.to("cpu", spec.dtype).view(torch.uint8).numpy().data)

    def commit(self, unit: str, names: Iterable[str], **facts: Any) -> None:
        """Note that all tensors of a unit are on the disk."""
        names = list(names)
        self._file.flush()
        os.fsync(self._file.fileno())
        line = {"unit": unit, "tensors": names, "sha256": self._hash(names), "facts": facts}
        append_line(self._journal, line)
        self.finished[unit] = facts

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        os.replace(self._partial, self.path)
        self._journal.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _start(self, header: bytes, plan: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self._size:
            raise OSError(f"{self.path} takes {self._size:,} bytes, but only {free:,} are free; make room")
        self._journal.unlink(missing_ok=True)
        with open(self._partial, "wb") as file:
            file.write(header)
            file.truncate(self._size)
            os.fsync(file.fileno())
        append_line(self._journal, {"header": plan})

    def _resume(self, plan: str) -> None:
        drop_torn_line(self._journal)
        lines = read_lines(self._journal)
        if not lines or lines[0].get("header") != plan:
            raise CheckpointError(
                f"{self._partial} was begun with other inputs or options; go back to those, or remove it and "
                f"{self._journal.name}"
            )
        self._file = open(self._partial, "r+b")  # noqa: SIM115
        with self._file:
            for line in lines[1:]:
                if self._hash(line["tensors"]) == line["sha256"]:
                    self.finished[line["unit"]] = line["facts"]

    def _hash(self, names: Iterable[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            self._file.seek(self._offsets[name])
            left = self._specs[name].nbytes
            while left and (chunk := self._file.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header, place of every tensor in the file, and size of the file."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = offset + spec.nbytes
        entries[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + entries[name]["data_offsets"][0] for name in specs}
    return len(text).to_bytes(8, "little") + text, places, start + offset
