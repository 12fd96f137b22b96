"""What a run shows while it trains, and what it leaves in its folder."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from moeft.training.processes import total_count

STATE_KEY = "moeft.throughput"
ROUTING_KEYS = ("load_imbalance", "load_entropy", "router_entropy", "idle_experts")


class EventSink(Protocol):
    """Anything that takes events, such as a run folder."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event."""


def peak_bytes() -> int:
    """Most memory this process has held: allocated on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput(TrainerCallback):
    """Tokens, of all processes, and seconds of training steps; not of loading data, evaluation and checkpoints.

    Tokens are counted where the batches lie, and read when something is logged or saved: a step waits for no device.
    The totals travel in the state that Trainer saves with each checkpoint: after a resume they cover every step that
    the weights have seen, and none of those that were lost.

    Attributes:
        total_tokens: Tokens of all steps, without padding, up to the last reading, checkpoint or end of training.
        total_seconds: Time of all steps.
    """

    def __init__(self) -> None:
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._step_tokens: Tensor | int = 0
        self._unread: Tensor | int = 0  # of finished steps that are not in the total yet, of this process
        self._read_at = (0, 0.0)
        self._step_began = 0.0
        self._device: torch.device | str = "cpu"

    def add(self, tokens: Tensor | int) -> None:
        """Count tokens that went through the model in this step; a scalar may lie on any device."""
        self._step_tokens = self._step_tokens + tokens

    def read(self) -> float:
        """Tokens per second of the steps since the last reading. Every process must read."""
        self._settle()
        tokens, seconds = self._read_at
        self._read_at = (self.total_tokens, self.total_seconds)
        return (self.total_tokens - tokens) / max(self.total_seconds - seconds, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from zero, or from the totals of the checkpoint that is resumed."""
        self.total_tokens, self.total_seconds = state.stateful_callbacks.get(STATE_KEY, (0, 0.0))
        self._read_at = (self.total_tokens, self.total_seconds)
        self._unread = 0
        self._device = args.device

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._step_tokens = 0
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock; put the totals where Trainer saves them, if it is about to save."""
        self.total_seconds += time.perf_counter() - self._step_began
        self._unread = self._unread + self._step_tokens
        if control.should_save:
            self._save(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the totals where Trainer saves them: it may save at the end of an epoch."""
        self._save(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the totals up to date."""
        self._save(state)

    def _save(self, state: Any) -> None:
        self._settle()
        state.stateful_callbacks[STATE_KEY] = [self.total_tokens, self.total_seconds]

    def _settle(self) -> None:
        self.total_tokens += total_count(int(self._unread), self._device)
        self._unread = 0


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, with loss, tokens/s and peak memory beside it instead of printed dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Refresh the figures; a held-out loss gets a line of its own."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, lr {logs.get('learning_rate', 0):.2e}, "
                f"{logs.get('tokens_per_second', 0):.0f} tok/s, peak {logs.get('peak_bytes', 0) / 2**30:.2f} GiB"
            )


class EventLog(TrainerCallback):
    """Writes what Trainer logs as events of the run.

    Args:
        sink: Where to.
        figures: Names of a task's own figures; of held-out rows they stand behind ``eval_`` in logs.
    """

    def __init__(self, sink: EventSink, figures: tuple[str, ...] = ()) -> None:
        self.sink = sink
        self.figures = figures

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Training figures and held-out losses."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            own = {key: logs[f"eval_{key}"] for key in self.figures if f"eval_{key}" in logs}
            self.sink.event("eval", step=state.global_step, loss=logs["eval_loss"], **own)
        elif "loss" in logs:
            keys = (
                "loss",
                "learning_rate",
                "tokens_per_second",
                "peak_bytes",
                "grad_norm",
                *ROUTING_KEYS,
                *self.figures,
            )
            self.sink.event("train_log", step=state.global_step, **{key: logs[key] for key in keys if key in logs})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        if state.is_world_process_zero:
            self.sink.event("checkpoint", step=state.global_step, path=f"checkpoint-{state.global_step}")


class AtTrainBegin(TrainerCallback):
    """Calls a function once, when training begins and every weight is where training has it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.function()
