"""Recipes of the stages that have no command with a recipe of its own: what their options are on a command line."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moeft.config.recipe import Recipe, Section
from moeft.config.sft import Dtype, Target
from moeft.config.sources import TrainOn


class FisherRecipe(Recipe):
    """As the options of ``moeft fisher``."""

    model: Path = Field(description="Folder of a checkpoint, 16-bit or packed")
    prompts: Path = Field(description="File of rows")
    rows: int = Field(default=200, ge=1, description="Rows to measure")
    labels: Literal["data", "sampled"] = Field(default="data", description="The rows' tokens, or the model's own")
    targets: tuple[Target, ...] | None = Field(default=None, description="Weights to measure; null takes all")
    train_on: TrainOn = Field(default="assistant", description="Tokens whose likelihood counts")
    max_length: int = Field(default=4096, ge=2, description="Longer rows are cut to this many tokens")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    seed: int = Field(default=0, ge=0, description="Of the choice of rows and of sampled labels")
    memory: str = Field(default="4GiB", description="Most memory of the sums")
    device: str = Field(default="cpu", description="Where to compute")


class SubspaceRecipe(Recipe):
    """As the options of ``moeft subspace``."""

    instruct: Path = Field(description="Folder of the instruct model")
    base: Path = Field(description="Folder of the model that it was tuned from")
    rank: int = Field(default=256, ge=1, description="Directions of every matrix")
    targets: tuple[Target, ...] | None = Field(default=None, description="Weights to decompose; null takes all")
    power_iterations: int = Field(default=2, ge=0, description="More are slower and closer to the exact ones")
    seed: int = Field(default=0, ge=0, description="Of the random sketch")
    device: str = Field(default="cpu", description="Where to compute")


class QuantizeRecipe(Recipe):
    """As the options of ``moeft quantize``."""

    model: Path = Field(description="Folder of a 16-bit checkpoint")
    double_quant: bool = Field(default=False, description="Quantise the block scales too")


class CompareTask(Section):
    """A task of `moeft evaluate`."""

    task: str = Field(description="Name of the task")
    path: Path | None = Field(default=None, description="File of its rows; null looks in the stage's `data`")
    rows: int | None = Field(default=None, ge=1, description="Items, drawn by the stage's seed; null takes all")


class CompareRecipe(Recipe):
    """Models beside each other on held-out rows and tasks, each compared with the first."""

    models: dict[str, Path] = Field(min_length=1, description="Folders by the name in the table; the first is the base")
    rows: dict[str, Path] = Field(
        default_factory=dict, description="Files of rows by the name in the table: nats per assistant token"
    )
    tool_calls: Path | None = Field(
        default=None, description="Requests with the right tool call: share of replies that match it exactly"
    )
    tasks: tuple[CompareTask, ...] = Field(default=(), description="Tasks to measure")
    data: Path | None = Field(default=None, description="Folder of the tasks' files; null asks the hub")
    seed: int = Field(default=0, description="Of the choice of items")
    max_new_tokens: int = Field(default=64, ge=1, description="Longest reply to `tool_calls` in tokens")
    batch_size: int = Field(default=16, ge=1, description="Rows at once")
    dtype: Dtype = Field(default="float32", description="Type to compute in")

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not self.rows and self.tool_calls is None and not self.tasks:
            raise ValueError("rows, tasks or tool_calls to compare the models on")
        names = [*self.rows, *(task.task for task in self.tasks)]
        if len(set(names)) < len(names):
            raise ValueError("each task once, and no rows of its name: results go by these names")
        return self
