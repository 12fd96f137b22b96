"""Stop a preference run that has lost what it was for: a collapsing margin, chosen answers that become unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from moeft.training.progress import EventSink

STATE_KEY = "moeft.stop_rules"


@dataclass(frozen=True)
class StopRules:
    """Bounds on logged figures; None switches a rule off.

    Raises:
        ValueError: If a bound makes no sense.
    """

    margin_collapse: float | None = None
    """Stop when the margin falls below this share of the largest that was logged."""
    max_chosen_drop: float | None = None
    """Stop when the chosen answer's log-probability per token is so many nats below the reference's."""
    patience: int = 3
    """Logs in a row that have to break a rule."""

    def __post_init__(self) -> None:
        if self.margin_collapse is not None and not 0 <= self.margin_collapse < 1:
            raise ValueError(f"margin_collapse is {self.margin_collapse}, expected a share from 0 to below 1")
        if self.max_chosen_drop is not None and not 0 < self.max_chosen_drop < float("inf"):
            raise ValueError(f"max_chosen_drop is {self.max_chosen_drop}, expected nats per token above 0")
        if self.patience < 1:
            raise ValueError(f"stop_patience is {self.patience}, expected at least 1")


class StopOnCollapse(TrainerCallback):
    """Watches the logs and stops training; what it has seen travels in the state that checkpoints save.

    Attributes:
        reason: Why training was stopped; None if it was not.
    """

    def __init__(self, rules: StopRules, events: EventSink | None) -> None:
        self.rules = rules
        self.events = events
        self.reason: str | None = None
        self._best = 0.0
        self._in_a_row = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from nothing, or from what the resumed checkpoint had seen."""
        self._best, self._in_a_row = state.stateful_callbacks.get(STATE_KEY, (0.0, 0))
        self.reason = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at one log of training figures."""
        if not logs or "rewards/margin" not in logs:
            return
        self._best = max(self._best, logs["rewards/margin"])
        broken = self._broken(logs)
        self._in_a_row = self._in_a_row + 1 if broken else 0
        state.stateful_callbacks[STATE_KEY] = [self._best, self._in_a_row]
        if broken and self._in_a_row >= self.rules.patience and self.reason is None:
            self.reason = f"{broken}, {self._in_a_row} logs in a row"
            control.should_training_stop = True
            if self.events is not None:
                self.events.event("stopped", step=state.global_step, reason=self.reason)

    def _broken(self, logs: dict[str, Any]) -> str | None:
        margin, drift = logs["rewards/margin"], logs.get("log_probs/chosen_drift")
        share, most = self.rules.margin_collapse, self.rules.max_chosen_drop
        if share is not None and self._best > 0 and margin < share * self._best:
            return f"the margin fell to {margin:.4g}, below {share:g} of its largest, {self._best:.4g}"
        if most is not None and drift is not None and drift < -most:
            return f"the chosen answers lost {-drift:.3g} nats per token, more than {most:g}"
        return None
