"""What a step asks of the interpreter and the dispatcher: operators, Python calls, calls of the core, host reads."""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

READERS = ("item", "tolist", "cpu")
SCALAR_READS = ("_local_scalar_dense", "nonzero")  # a GPU would be waited for


class DispatchedOperators(TorchDispatchMode):
    """Operators that reach a kernel, views included, in the forward of layers and in the rest; scalars read by it."""

    def __init__(self, layers: list[nn.Module], steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.operators: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        self._layers = layers
        self._inside = False

    def begin(self) -> None:
        def enter(*_: Any) -> None:
            self._inside = True

        def leave(*_: Any) -> None:
            self._inside = False

        hooks = [(layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)) for layer in self._layers]
        self._hooks = [hook for pair in hooks for hook in pair]
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators["layer forward" if self._inside else "rest"] += 1
        if name in SCALAR_READS:
            self.host_reads[f"{'in a layer: ' if self._inside else ''}{caller()}"] += 1
        return func(*args, **(kwargs or {}))


class Calls:
    """Calls of Python functions, of the Rust core, and of methods that read a tensor's values into Python."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.python = 0
        self.core: Counter[str] = Counter()
        self.readers: Counter[str] = Counter()

    def begin(self) -> None:
        sys.setprofile(self._see)

    def end(self) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.python += 1
        elif event == "c_call" and getattr(argument, "__module__", None) == "moeft._core":
            self.core[argument.__name__] += 1
        elif event == "c_call" and argument.__name__ in READERS and isinstance(argument.__self__, torch.Tensor):
            place = frame.f_code.co_filename.rpartition("site-packages/")[2].rpartition("python/")[2]
            self.readers[f"{place}:{frame.f_code.co_name}: {argument.__name__}"] += 1


def caller() -> str:
    """File and function outside of torch that asked."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/torch/" not in frame.filename and "step_counts" not in frame.filename:
            place = frame.filename.rpartition("site-packages/")[2].rpartition("python/")[2]
            return f"{place}:{frame.name}"
    return "torch"
