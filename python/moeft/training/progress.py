"""What a run shows while it trains, and what it leaves in its folder."""

from __future__ import annotations

import resource
import time
from typing import Any, Protocol

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class EventSink(Protocol):
    """Anything that takes events, such as a run folder."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event."""


def peak_bytes() -> int:
    """Most memory this process has held: allocated on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Tokens per second between two readings."""

    def __init__(self) -> None:
        self.total_tokens = 0
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count tokens that went through the model."""
        self._tokens += tokens
        self.total_tokens += tokens

    def read(self) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return rate


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, with loss, tokens/s and peak memory beside it instead of printed dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Refresh the figures."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, {logs.get('tokens_per_second', 0):.0f} tok/s, "
                f"peak {logs.get('peak_bytes', 0) / 2**30:.2f} GiB"
            )


class EventLog(TrainerCallback):
    """Writes what Trainer logs as events of the run."""

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Training figures and held-out losses."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self.sink.event("eval", step=state.global_step, loss=logs["eval_loss"])
        elif "loss" in logs:
            keys = ("loss", "learning_rate", "tokens_per_second", "peak_bytes", "grad_norm")
            self.sink.event("train_log", step=state.global_step, **{key: logs[key] for key in keys if key in logs})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        if state.is_world_process_zero:
            self.sink.event("checkpoint", step=state.global_step, path=f"checkpoint-{state.global_step}")
