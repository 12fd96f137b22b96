"""A card with less memory than the one that is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpu_harness import Bench
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear.gpu import release_workspaces

GIB = 1 << 30


@contextmanager
def memory_cap(bench: Bench, gib: int) -> Iterator[None]:
    """Let the process take only so much of the device's memory, and size its workspace as a card of that size would.

    What the CUDA context takes (about 0.45 GB) comes on top, so peaks tell more than that a step ran.
    """
    is_cuda = bench.device.type == "cuda"
    with workspace_of(gib * GIB):
        if is_cuda:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
        try:
            yield
        finally:
            if is_cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def workspace_of(memory_bytes: int) -> Iterator[None]:
    """Restore experts through the buffer that a card of so much memory gets, instead of this one's."""
    before = os.environ.get(config.WORKSPACE_VARIABLE)
    os.environ[config.WORKSPACE_VARIABLE] = str(config.share_of(memory_bytes) >> 20)
    config.workspace_bytes.cache_clear()
    release_workspaces()
    try:
        yield
    finally:
        if before is None:
            del os.environ[config.WORKSPACE_VARIABLE]
        else:
            os.environ[config.WORKSPACE_VARIABLE] = before
        config.workspace_bytes.cache_clear()
        release_workspaces()
