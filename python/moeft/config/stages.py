"""Recipes of the stages that have no command with a recipe of its own: what their options are on a command line."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moeft.config.recipe import Recipe, Section, one_or_many
from moeft.config.sft import Dtype, Target
from moeft.config.sources import CallProtocol, TrainOn


class FisherRecipe(Recipe):
    """As the options of ``moeft fisher``."""

    model: Path = Field(description="Folder of a checkpoint, 16-bit or packed")
    prompts: Path = Field(description="File of rows")
    rows: int = Field(default=200, ge=1, description="Rows to measure")
    labels: Literal["data", "sampled", "generated"] = Field(
        default="data", description="The rows' tokens, the model's own in their places, or its own replies to prompts"
    )
    targets: tuple[Target, ...] | None = Field(default=None, description="Weights to measure; null takes all")
    train_on: TrainOn = Field(default="assistant", description="Tokens whose likelihood counts")
    max_length: int = Field(default=4096, ge=2, description="Longer rows are cut to this many tokens")
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of a generated reply")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    seed: int = Field(default=0, ge=0, description="Of the choice of rows, of sampled labels and of replies")
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
    attention: bool = Field(default=False, description="Pack attention projections too")
    mlp: bool = Field(default=False, description="Pack dense and shared-expert projections too")
    double_quant: bool = Field(default=False, description="Quantise the block scales too")


class CompareTask(Section):
    """A task of `moeft evaluate`."""

    task: str = Field(description="Name of the task")
    path: Path | None = Field(default=None, description="File of its rows; null looks in the stage's `data`")
    rows: int | None = Field(default=None, ge=1, description="Items, drawn by the stage's seed; null takes all")


class HardPairsRecipe(Recipe):
    """As the options of ``moeft hard build``; the stage writes ``pairs.jsonl`` into its folder."""

    tools: Path = Field(description="Schemas of the tools, OpenAI's JSON")
    protocol: CallProtocol = Field(default="bracket", description="How calls are written")
    seeds: Path = Field(description="Chat rows with calls to make pairs from")
    count: int = Field(default=1000, ge=1, description="Hard pairs to make")
    easy: Path | None = Field(default=None, description="Preference rows to mix in")
    share: float = Field(default=0.3, gt=0, le=1, description="Share of hard pairs, with `easy`")
    exclude: tuple[Path, ...] = Field(default=(), description="Requests of an evaluation, not to be trained on")
    targets: Path | None = Field(default=None, description="targets.json of `moeft hard analyze`")
    reasoned_every: int = Field(
        default=5, ge=0, description="Every so-many-th pair keeps right reasoning in both answers; 0 for none"
    )
    augment: float = Field(default=0.3, ge=0, le=1, description="Share of requests asked in other words")
    seed: int = Field(default=0, ge=0, description="Of every choice")


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


class ScenesRecipe(Recipe):
    """Dialogue as scenes in a tool protocol, filtered by validity, cut into rows to train on and to evaluate."""

    rows: Annotated[
        tuple[Path, ...],
        BeforeValidator(one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="Files of chat rows in any format"),
    ]
    protocol: CallProtocol = Field(default="bracket", description="How calls are written")
    tools: Path | None = Field(default=None, description="JSON file of schemas; null takes `say` and `choose`")
    prose: tuple[str, ...] = Field(
        default=("text", "choices"), min_length=1, description="Arguments of the tools that hold prose, for `scenes`"
    )
    system: str | None = Field(default=None, description="System turn of every row")
    narrator: str = Field(default="Narrator", min_length=1, description="Speaker of lines that name none")
    heldout: int = Field(default=50, ge=1, description="Rows that are kept from training")
    seed: int = Field(default=0, ge=0, description="Of the choice of held-out rows")


class LayoutRecipe(Recipe):
    """As ``moeft layout``, with a proof that what was not trained is the base's, byte for byte."""

    direction: Literal["fuse", "unfuse"] = Field(description="Experts into stacks, or stacks into experts")
    model: Path = Field(description="Folder of a 16- or 32-bit checkpoint")
    base: Path | None = Field(
        default=None, description="Checkpoint of the same layout to compare with, tensor by tensor"
    )
    changed: tuple[str, ...] = Field(
        default=(), description="Regular expressions of names; all other tensors have to equal the base's"
    )

    @field_validator("changed", mode="after")
    @classmethod
    def _are_expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"a regular expression, not {pattern!r}: {error}") from error
        return value

    @model_validator(mode="after")
    def _compares_what_changed(self) -> Self:
        if self.changed and self.base is None:
            raise ValueError("base, the checkpoint that `changed` is compared with; without it nothing is proven")
        return self


class ExportRecipe(Recipe):
    """As the options of ``moeft export gguf``, for several types of one model."""

    model: Path = Field(description="Folder of a 16- or 32-bit checkpoint")
    types: tuple[str, ...] = Field(default=("q4_k_m",), min_length=1, description="One file each: TYPE.gguf")
    tensor_types: dict[str, str] = Field(
        default_factory=dict, description="Type of the tensors whose name a regular expression finds"
    )
    adapter: Path | None = Field(default=None, description="Adapter trained on the model, merged while writing")
    imatrix: Path | None = Field(default=None, description="Importance matrix")
    ollama: bool = Field(default=False, description="Write a Modelfile beside each file")
    context: int = Field(default=4096, ge=1, description="Tokens of a conversation, for the Modelfile")
    verify: bool = Field(default=False, description="Load the files in llama.cpp and compare them with the model")
    verify_text: Path | None = Field(default=None, description="Text to compare on; null takes one that is built in")


class EvaluateRecipe(Recipe):
    """As the options of ``moeft evaluate``, for models beside each other."""

    models: dict[str, Path] = Field(
        min_length=1, description="Folders or GGUF files by the name in the table; the first is the base"
    )
    tasks: dict[str, Path | None] = Field(min_length=1, description="Names, each with its file of rows or null")
    data: Path | None = Field(default=None, description="Folder of the tasks' files and lists")
    limit: int | None = Field(default=None, ge=1, description="Most items of a task")
    shots: int = Field(default=0, ge=0, description="Answered questions before each one of multiple choice")
    tool_protocol: CallProtocol | None = Field(
        default=None, description="How calls of tools are written; null takes calls of any protocol"
    )
    samples: int = Field(default=1, ge=1, description="Replies to each prompt, of as many seeds")
    temperature: float = Field(default=0.0, ge=0, description="Of replies; 0 takes the most probable tokens")
    max_new_tokens: int | None = Field(default=None, ge=1, description="Longest reply; null keeps the tasks' own")
    max_length: int | None = Field(default=None, ge=2, description="Positions to use; null takes all")
    batch_size: int = Field(default=16, ge=1, description="Replies at once")
    dtype: Dtype = Field(default="bfloat16", description="Of weights that are not in 4 bit; GGUF files have their own")
    seed: int = Field(default=0, ge=0, description="Of the choice of items, and the first of the samples")
