"""Which code computes: the Rust core or PyTorch."""

from __future__ import annotations

import os

from torch import Tensor

from moeft.kernels.nf4.cpu import NAMES

VARIABLE = "MOEFT_KERNELS"
CHOICES = ("auto", "pytorch")


def in_core(x: Tensor) -> bool:
    """Whether the Rust core computes with these rows: on the CPU, in the dtypes that it has.

    ``MOEFT_KERNELS=pytorch`` leaves the layers to PyTorch's kernels on the CPU too, as on a GPU; packing and routing
    stay where they are.

    Raises:
        ValueError: If the variable is set to something else than "auto" or "pytorch".
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}, expected one of {CHOICES}")
    return choice == "auto" and x.device.type == "cpu" and x.dtype in NAMES
