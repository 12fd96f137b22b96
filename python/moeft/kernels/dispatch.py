"""Which code computes: the Rust core, Triton's kernels, PyTorch's operations, or the definitions."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from moeft.kernels.dtypes import NAMES

VARIABLE = "MOEFT_KERNELS"
CHOICES = ("auto", "pytorch", "triton", "reference")
OLDEST = (8, 0)  # compute capability; before it, Triton has no matrix instructions for bfloat16

_logger = logging.getLogger(__name__)


def choice() -> str:
    """What ``MOEFT_KERNELS`` asks for.

    "auto" is the Rust core on the CPU, Triton's kernels on a GPU that has them, else PyTorch's operations. "pytorch"
    leaves the layers to PyTorch everywhere; packing, and routing on the CPU, stay where they are. "triton" makes a GPU
    without Triton's kernels an error; the CPU is served too under ``TRITON_INTERPRET=1``. "reference" takes the
    definitions of the expert block and the loss head, slow and with whole weights.

    Raises:
        ValueError: If the variable is set to something else.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} is {wanted!r}, expected one of {CHOICES}")
    return wanted


def in_core(x: Tensor) -> bool:
    """Whether the Rust core computes with these rows: on the CPU, in the dtypes that it has."""
    return choice() in ("auto", "triton") and not _interpreted() and x.device.type == "cpu" and x.dtype in NAMES


def in_triton(x: Tensor) -> bool:
    """Whether Triton's kernels compute with these rows: on a GPU that has them, in the dtypes of :func:`in_core`.

    Raises:
        ValueError: As :func:`has_triton`.
    """
    return x.dtype in NAMES and has_triton(x.device)


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels compute on a device: an NVIDIA GPU from sm_80 on.

    Raises:
        ValueError: If ``MOEFT_KERNELS=triton`` and a GPU cannot run them.
    """
    wanted = choice()
    if wanted not in ("auto", "triton"):
        return False
    if device.type == "cpu":
        return _interpreted()
    obstacle = _obstacle(device)
    if obstacle and wanted == "triton":
        raise ValueError(f"{VARIABLE} is 'triton', but {obstacle}; unset it, or set it to 'pytorch'")
    return obstacle is None


def _obstacle(device: torch.device) -> str | None:
    """Why a device cannot run Triton's kernels, said once in the log; None if it can."""
    return _find_obstacle(device)


# The compiler of PyTorch 2.11 cannot trace what happens in there, and is to call it instead. That is what
# torch.compiler.assume_constant_result does, after it has imported the compiler, which takes a second.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_obstacle(device: torch.device) -> str | None:
    obstacle = None
    if device.type != "cuda" or torch.version.hip:
        obstacle = f"Triton's kernels of moeft need an NVIDIA GPU, not {device.type} ({torch.version.hip or 'no HIP'})"
    elif importlib.util.find_spec("triton") is None:
        obstacle = "the package triton is not installed"
    elif (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        name = torch.cuda.get_device_name(device)
        obstacle = f"{name} is sm_{capability[0]}{capability[1]}, and Triton's kernels need sm_80 or newer"
    if obstacle and device.type != "meta":
        _logger.warning("%s: layers are restored from 4 bits and multiplied by PyTorch, which is slower", obstacle)
    return obstacle


def _interpreted() -> bool:
    return choice() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
