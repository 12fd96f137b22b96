"""The callback that measures, decides and acts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from moeft.errors import TrainingError
from moeft.provenance import files
from moeft.training.gate.bounds import Bound, Reading
from moeft.training.gate.good_weights import GoodWeights

if TYPE_CHECKING:
    from moeft.training.progress import EventSink

STATE_KEY = "moeft.gate"


class CapabilityGate(TrainerCallback):
    """Measures capabilities at step 0, every so many steps, every epoch and at the end, and acts on a breach.

    The base's readings are taken once and kept in the folder, with the last weights that passed: a run that continues
    is held to the same base, and one that was stopped stays stopped. Add it to a trainer with ``add_callback``, behind
    those that measure time.

    Args:
        measure: Takes the readings of the model in training; must leave weights and random states alone.
        bounds: Name of a reading -> how bad it may be; readings without one are recorded only.
        folder: Where to keep base and weights; made if missing.
        every_steps: Measure after so many steps; None for no such rhythm.
        every_epoch: Measure after every epoch.
        action: ``warn``, ``halve_lr``, ``roll_back`` or ``stop``.
        budget: Share of training time that measurements may take; one that is due waits until it can be paid. The
            base's and the last one are always taken. None sets no limit.
        prepared_seconds: Spent already on remembering the base, which counts as the base's.
        events: Where to record.
        show: Where to print.

    Attributes:
        base: The base's readings by name.
        seconds: Spent on measurements, the base's apart.
        base_seconds: Spent on the base's.
        training_seconds: Spent on steps.
        stopped: What stopped training, or None.
    """

    def __init__(
        self,
        measure: Callable[[], Sequence[Reading]],
        bounds: Mapping[str, Bound],
        folder: Path,
        *,
        every_steps: int | None = None,
        every_epoch: bool = True,
        action: str = "roll_back",
        budget: float | None = 0.05,
        prepared_seconds: float = 0.0,
        events: EventSink | None = None,
        show: Callable[[str], None] = print,
    ) -> None:
        self.base: dict[str, Reading] = {}
        self.seconds = self.training_seconds = 0.0
        self.base_seconds = prepared_seconds
        self.stopped: dict[str, Any] | None = None
        self._measure, self._bounds, self._folder = measure, bounds, folder
        self._every_steps, self._every_epoch, self._action, self._budget = every_steps, every_epoch, action, budget
        self._events, self._show = events, show
        self._good = GoodWeights(folder / "good.safetensors")
        self._last_seconds = 0.0
        self._measured_at: int | None = None
        self._is_due = False
        self._step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the base, or take its readings from an earlier start.

        Raises:
            TrainingError: If the base itself breaks a bound, weights are sharded, or the base's readings are lost.
        """
        if args.deepspeed or args.fsdp:
            raise TrainingError("the gate needs whole weights; train without DeepSpeed and FSDP, or without a gate")
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._folder / "base.json"
        if kept.exists():
            found = files.read_json(kept)
            self.base_seconds = found["seconds"]
            self.base = {reading["name"]: _reading(reading) for reading in found["readings"]}
        elif state.global_step > 0:
            raise TrainingError(f"{kept} is missing, and the base is gone since step 1; start a new run")
        else:
            self._measure_base(kwargs["model"], kept)
        self.seconds, self.training_seconds, self._last_seconds = state.stateful_callbacks.get(
            STATE_KEY, (0.0, 0.0, self.base_seconds)
        )
        stopped = self._folder / "stopped.json"
        if stopped.exists():
            self.stopped = files.read_json(stopped)
            if self._action == "roll_back":
                self._good.restore(kwargs["model"])
            control.should_training_stop = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time and can be paid, or if this is the last step."""
        self.training_seconds += time.perf_counter() - self._step_began
        self._is_due |= self._every_steps is not None and state.global_step % self._every_steps == 0
        if state.global_step >= state.max_steps or (self._is_due and self._is_affordable()):
            self._check(state, control, **kwargs)
        self._remember(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, or as soon as it can be paid."""
        if not self._every_epoch or self._measured_at == state.global_step:
            return
        self._is_due = True
        if self._is_affordable():
            self._check(state, control, **kwargs)
            self._remember(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what it has cost."""
        if self.training_seconds:
            share = self.seconds / self.training_seconds
            self._show(
                f"capability gate: {self.seconds:.1f} s, {share:.1%} of training; base, once: {self.base_seconds:.1f} s"
            )

    def summary(self) -> dict[str, Any]:
        """Cost and outcome, for the figures of a run."""
        return {
            "seconds": self.seconds,
            "base_seconds": self.base_seconds,
            "share": self.seconds / self.training_seconds if self.training_seconds else None,
            "stopped": self.stopped,
        }

    def _measure_base(self, model: Any, kept: Path) -> None:
        readings, seconds = self._timed()
        self.base_seconds += seconds
        self.base = {reading.name: reading for reading in readings}
        breaches = self._breaches(readings)
        self._record(0, readings, breaches, "base", self.base_seconds)
        found = ", ".join(_said(reading) for reading in readings)
        self._show(f"capability gate: the base has {found}; measured in {self.base_seconds:.1f} s")
        if breaches:
            raise TrainingError(
                f"the base itself breaks the gate: {'; '.join(breaches)}. No training can be held to that; loosen the "
                "bound, or bound the change against the base instead of the value"
            )
        self._good.save(model, 0)
        files.write_json(kept, {"seconds": self.base_seconds, "readings": [r.to_json() for r in readings]})

    def _check(self, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_due, self._measured_at = False, state.global_step
        readings, self._last_seconds = self._timed()
        self.seconds += self._last_seconds
        breaches = self._breaches(readings)
        verdict = self._action if breaches else "passed"
        self._record(state.global_step, readings, breaches, verdict, self._last_seconds)
        if not breaches:
            self._show(f"capability gate at step {state.global_step}: passed; {', '.join(map(_said, readings))}")
            if state.is_world_process_zero:
                self._good.save(kwargs["model"], state.global_step)
            return
        reason = "; ".join(breaches)
        if self._action == "halve_lr":
            halve_rate(kwargs["optimizer"], kwargs["lr_scheduler"])
        if self._action in ("warn", "halve_lr"):
            self._show(f"capability gate at step {state.global_step}: {reason}; {_CONSEQUENCE[self._action]}")
            return
        good = self._good.restore(kwargs["model"]) if self._action == "roll_back" else None
        self.stopped = {"step": state.global_step, "reason": reason, "rolled_back_to": good}
        if state.is_world_process_zero:
            files.write_json(self._folder / "stopped.json", self.stopped)
        control.should_training_stop = True
        went = "" if good is None else f"went back to the weights of step {good} and "
        self._show(f"capability gate at step {state.global_step}: {reason}; {went}stopped")

    def _timed(self) -> tuple[list[Reading], float]:
        start = time.perf_counter()
        readings = list(self._measure())
        return readings, time.perf_counter() - start

    def _breaches(self, readings: Sequence[Reading]) -> list[str]:
        found = (self._bounds[r.name].breach(r, self.base[r.name]) for r in readings if r.name in self._bounds)
        return [breach for breach in found if breach is not None]

    def _is_affordable(self) -> bool:
        return self._budget is None or self.seconds + self._last_seconds <= self._budget * self.training_seconds

    def _record(
        self, step: int, readings: Sequence[Reading], breaches: list[str], verdict: str, seconds: float
    ) -> None:
        if self._events is not None:
            found = [reading.to_json() for reading in readings]
            self._events.event("gate", step=step, verdict=verdict, breaches=breaches, readings=found, seconds=seconds)

    def _remember(self, state: Any) -> None:
        state.stateful_callbacks[STATE_KEY] = [self.seconds, self.training_seconds, self._last_seconds]


_CONSEQUENCE = {"warn": "training goes on", "halve_lr": "the learning rate is halved"}


def halve_rate(optimizer: Any, scheduler: Any) -> None:
    """Halve the learning rate of all steps to come; the scheduler's state carries it through checkpoints."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        if "initial_lr" in group:
            group["initial_lr"] *= 0.5
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * 0.5 for rate in scheduler.base_lrs]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what Trainer logs


def _said(reading: Reading) -> str:
    return f"{reading.name} {reading.value:.4g}{' (fewer than 30 items)' if reading.is_of_few else ''}"


def _reading(found: Mapping[str, Any]) -> Reading:
    # NaN has no place in JSON.
    values: dict[str, Any] = {key: float("nan") if value is None else value for key, value in found.items()}
    return Reading(**values)
