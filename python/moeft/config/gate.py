"""The recipe's section ``gate``: capabilities that training must keep, and what happens when it does not."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moeft.config.recipe import Section

Action = Literal["warn", "halve_lr", "roll_back", "stop"]
Suite = Literal["default", "quick"]


class GateBound(Section):
    """How far a capability may fall; any bound that is given has to hold."""

    limit: float | None = Field(
        default=None, description="Worst value that is allowed; the base has to keep it too, or training does not start"
    )
    change: float | None = Field(default=None, gt=0, description="Largest change for the worse against the base")
    intervals: float | None = Field(
        default=None, gt=0, description="The same in half-widths of the base's interval; 1 is what chance explains"
    )

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.limit is None and self.change is None and self.intervals is None:
            raise ValueError("at least one of limit, change and intervals")
        return self


class GateTask(GateBound):
    """A task of `moeft evaluate` to watch."""

    task: str = Field(description="Name of the task")
    path: Path | None = Field(default=None, description="File of its rows; null looks in the gate's `data`")
    rows: int = Field(default=64, ge=1, description="Items, drawn by the gate's seed")
    metric: str | None = Field(default=None, description="Metric to bound; null takes the task's first one")


class GateDivergence(Section):
    """Divergence from the base on general prompts: KL(base || model), nats per token."""

    path: Path | None = Field(
        default=None,
        description="File of rows, in any format of docs/data.md; null takes the base's own replies to 32 prompts",
    )
    limit: float = Field(gt=0, description="Largest divergence that is allowed; the base has 0")
    rows: int = Field(default=32, ge=1, description="Rows, drawn by the gate's seed")
    max_length: int = Field(default=256, ge=2, description="First tokens of a row that are compared")


class Gate(Section):
    """Capabilities measured before, during and at the end of training."""

    tasks: tuple[GateTask, ...] = Field(default=(), description="Tasks to watch; one of the suite's is replaced")
    divergence: GateDivergence | None = Field(
        default=None, description="Divergence from the base to watch; null takes the suite's"
    )
    suite: Suite | None = Field(
        default_factory=lambda known: None if known.get("tasks") or known.get("divergence") else "default",
        description="Tasks and divergence that come with moeft, beside those named here; `quick` has no task that "
        "generates. It is `default` where neither tasks nor divergence are named",
    )
    data: Path | None = Field(default=None, description="Folder of the tasks' files; null asks the hub")
    every_steps: int | None = Field(default=None, ge=1, description="Measure after so many steps")
    every_epoch: bool = Field(default=True, description="Measure after every epoch")
    action: Action = Field(
        default="roll_back",
        description="On a breach: say so, halve the learning rate, go back to the last good weights and stop, or stop",
    )
    budget: float | None = Field(
        default=0.05,
        gt=0,
        description="Largest share of training time to spend; a measurement waits until it can be paid, except the "
        "base's and the last one. null sets no limit",
    )
    seed: int = Field(default=0, description="Of the choice of rows")

    @model_validator(mode="after")
    def _watches_something(self) -> Self:
        if not self.tasks and self.divergence is None and self.suite is None:
            raise ValueError("suite, tasks or divergence; a gate that watches nothing protects nothing")
        names = [watched.task for watched in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("each task once")
        return self
