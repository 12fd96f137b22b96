"""Pages of checkpoint files that were read and are not needed any more."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

MIN_STEP_BYTES = 128 * 1024**2
STEPS = 64
# Bits of an entry of /proc/self/pagemap: https://docs.kernel.org/admin-guide/mm/pagemap.html
PAGEMAP = "/proc/self/pagemap"
PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


class MappedFiles:
    """Keeps what a loader reads from files from staying in this process's memory.

    Tensors of safetensors files are views of a mapping of the whole file, which lives as long as one of them: when some
    weights stay as they are, all that was read once to be packed would stay resident, beside what it became. Pages that
    are wanted again come back from the file. Does nothing outside of Linux.

    Args:
        files: The files, which must stay open while they are read.
    """

    def __init__(self, files: Sequence[str | Path] = ()) -> None:
        paths = [Path(file).resolve() for file in files]
        self.names = {os.fsencode(path) for path in paths}
        self.step_bytes = max(MIN_STEP_BYTES, sum(path.stat().st_size for path in paths) // STEPS)
        self.unreleased_bytes = 0

    def count_read(self, num_bytes: int) -> None:
        """Note that so much was read and is done with; every now and then, release the pages."""
        self.unreleased_bytes += num_bytes
        if self.unreleased_bytes >= self.step_bytes:
            self.release()

    def release(self) -> None:
        """Take the pages of the files out of this process's memory, but for files of which it changed a page."""
        self.unreleased_bytes = 0
        if sys.platform != "linux" or not self.names:
            return
        for start, end in self._mappings():
            _release(start, end)

    def _mappings(self) -> Iterator[tuple[int, int]]:
        """First address and end of every mapping of the files."""
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self.names:
                start, end = fields[0].split(b"-")
                yield int(start, 16), int(end, 16)


def give_back(tensors: Iterable[Tensor]) -> None:
    """Take the pages of tensors that are views of files out of this process's memory; others are left alone.

    Only whole pages of a tensor are released, and none of a tensor that was changed. Does nothing outside of Linux.
    """
    if sys.platform != "linux":
        return
    for tensor in tensors:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            _release(start, end)


def _release(start: int, end: int) -> None:
    if not _holds_changed_pages(start, end):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, end - start, mmap.MADV_DONTNEED)


def _holds_changed_pages(start: int, end: int) -> bool:
    """Whether a page differs from the file: it is then the process's own, and releasing it would undo the change."""
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            file.seek(start // mmap.PAGESIZE * 8)
            entries = np.frombuffer(file.read((end - start) // mmap.PAGESIZE * 8), np.uint64)
    except OSError:  # a sandbox without it, such as gVisor, does not say
        return True
    changed = (entries & SWAPPED != 0) | ((entries & PRESENT != 0) & (entries & OF_FILE == 0))
    return bool(changed.any()) or len(entries) * mmap.PAGESIZE < end - start
