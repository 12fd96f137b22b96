"""Time of a step by operator, from PyTorch's profiler, with the calls of the Rust core made visible to it."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from moeft import _core

# First match wins; the profiler's own time of an operator, without those that it calls.
CATEGORIES = (
    ("matmul: PyTorch", r"aten::(mm|addmm|addmm_|bmm|baddbmm|mv|addmv)$"),
    ("matmul: attention kernel", r"aten::_scaled_dot_product_flash_attention"),
    ("matmul: expert block and products of the core", r"core::(experts|grouped_linear)"),
    ("core: rest", r"core::"),
    ("optimiser", r"fused_adam|[Oo]ptimizer|clip_grad|_foreach"),
    ("elementwise and other operators", r"aten::"),
    ("autograd and Python functions of it", r""),
)


class Operators:
    """Seconds per step by category; what no operator accounts for is Python."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.largest: dict[str, float] = {}

    def begin(self) -> None:
        self._names = core_calls_recorded()
        self._names.__enter__()
        self._profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)
        self._profile.__enter__()
        self._began = time.perf_counter()

    def end(self) -> None:
        wall = (time.perf_counter() - self._began) / self.steps
        self._profile.__exit__(None, None, None)
        self._names.__exit__(None, None, None)
        totals = {event.key: event.self_cpu_time_total * 1e-6 / self.steps for event in self._profile.key_averages()}
        self.seconds = {name: 0.0 for name, _ in CATEGORIES}
        for key, seconds in totals.items():
            self.seconds[next(name for name, pattern in CATEGORIES if re.search(pattern, key))] += seconds
        self.seconds["Python, in no operator"] = max(0.0, wall - sum(totals.values()))
        self.shares = {name: seconds / wall for name, seconds in self.seconds.items()}
        self.largest = dict(sorted(totals.items(), key=lambda item: -item[1])[:25])


@contextmanager
def core_calls_recorded() -> Iterator[None]:
    """Let the profiler see every call of the Rust core as ``core::<function>``."""
    functions = {name: getattr(_core, name) for name in dir(_core) if callable(getattr(_core, name))}
    for name, function in functions.items():
        setattr(_core, name, recorded(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(_core, name, function)


def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, visible under its name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"core::{name}"):
            return function(*args, **kwargs)

    return call
