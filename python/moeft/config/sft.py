"""The recipe of ``moeft sft``: supervised fine-tuning, of LoRA adapters or of weights in full, on chat rows."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from moeft.config.evaluation import Evaluation
from moeft.config.filters import Filters
from moeft.config.gate import Gate
from moeft.config.learning_rate import RangeTest
from moeft.config.memory import Memory
from moeft.config.protection import Protection
from moeft.config.ranges import expand
from moeft.config.recipe import Recipe, Section, one_or_many
from moeft.config.roles import Role, check_roles
from moeft.config.sources import (
    MAX_REJECT_SHARE,
    ChatTemplateName,
    FormatName,
    OnTooLong,
    Reasoning,
    Source,
    TrainOn,
    Turns,
)
from moeft.errors import RecipeError

Target = Literal["attention", "experts", "mlp"]
Dtype = Literal["bfloat16", "float16", "float32"]
BlockSize = Literal[64, 128, 256, 512, 1024, 2048, 4096]

_SET_ELSEWHERE = {
    "output_dir": "output",
    "resume_from_checkpoint": "output",
    "train_on": "data.train_on",
    "max_length": "data.max_length",
    "on_too_long": "data.on_too_long",
    "packing": "data.packing",
    "reasoning": "data.reasoning",
    "chat_template": "data.chat_template",
    "cache_dir": "data.cache_dir",
}
"""Trainer arguments that another key of the recipe decides."""

_OURS = (
    "max_skipped_steps",
    "check_frozen_base",
    "log_routing",
    "fused_norms",
    "document_attention",
    "loraplus_lr_ratio",
    "min_lr_ratio",
    "activation_checkpointing",
    "activation_offload",
)
"""Trainer arguments that moeft adds to those of transformers."""


class Quantization(Section):
    """Which weights are held in NF4 while training. Router, norms, embeddings and head stay in 16 bit."""

    experts: bool = Field(default=True, description="Hold expert weights in 4 bit")
    attention: bool = Field(default=False, description="Hold attention projections in 4 bit")
    mlp: bool = Field(default=False, description="Hold dense and shared-expert projections in 4 bit")
    double_quant: bool = Field(
        default=False, description="Quantise the block scales too; saves about 0.37 bit per weight"
    )
    block_size: BlockSize = Field(default=64, description="Weights per scale")


class Routing(Section):
    """Which experts count as routed to."""

    rows: int = Field(default=64, ge=1, description="Training rows to count, one forward pass each")
    min_share: float = Field(
        default=0.0, ge=0, lt=1, description="Smallest share of a layer's choices that an expert must have"
    )


class Lora(Section):
    """The adapter to train."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapter")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; null takes the rank, a scale of 1")
    targets: tuple[Target, ...] = Field(
        default=("attention", "experts"), min_length=1, description="Parts that get an adapter"
    )
    experts_rank: int | None = Field(default=None, ge=1, description="Rank of each expert's adapter; null takes `rank`")
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="Other ranks, by target (experts) or by one weight of it (experts.down_proj)"
    )
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Other alphas, by the same keys; null keeps the scale of the whole adapter"
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the inputs dropped while training; not with experts"
    )
    layers: tuple[int | str, ...] | None = Field(
        default=None, min_length=1, description='Decoder layers to adapt, such as [0, "4-7"]; null takes all'
    )
    experts: Literal["all", "routed"] | tuple[int | str, ...] = Field(
        default="all", description='Experts to adapt: all, those that the training rows are routed to, or [0, "8-15"]'
    )
    routing: Routing = Field(default_factory=Routing, description="How `experts: routed` chooses")
    stack_on: tuple[Path, ...] = Field(
        default=(), description="Trained adapters that stay active and frozen under the new one"
    )
    init_seed: int = Field(default=0, ge=0, description="Seed of the adapter's first weights")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the adapter's weights; bfloat16 halves them and their gradients"
    )

    @field_validator("ranks", "alphas", mode="after")
    @classmethod
    def _keys_name_targets(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if key.partition(".")[0] not in get_args(Target):
                raise ValueError(f"keys such as experts or experts.down_proj, below {', '.join(get_args(Target))}")
        return value

    @field_validator("layers", "experts", mode="after")
    @classmethod
    def _are_ranges(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, tuple):
            expand(value, str(info.field_name))
        return value

    @field_validator("dropout", mode="after")
    @classmethod
    def _not_on_experts(cls, value: float, info: ValidationInfo) -> float:
        if value and "experts" in info.data.get("targets", ()):
            raise ValueError("0 with experts, whose input cannot be dropped for the adapter alone")
        return value


class TuningData(Section):
    """What every command that tunes adapters needs to know of its rows."""

    if TYPE_CHECKING:  # Each command describes its own.
        chat_template: ChatTemplateName | Path | None
        max_length: int


class Data(TuningData):
    """Chat rows to train on, and which of their tokens count."""

    train: Annotated[
        tuple[Source, ...],
        BeforeValidator(one_or_many, json_schema_input_type=str | list[str | Source]),
        Field(min_length=1, description="File of rows, or a list of files and sources"),
    ]
    eval: Path | None = Field(default=None, description="File of held-out rows; null measures no held-out loss")
    train_on: TrainOn = Field(
        default="assistant",
        description="Tokens in the loss: every assistant turn, the last one, those behind the user's last one, those "
        "with `train: true`, or the whole row; a turn's own `train` decides for it, except with `all`",
    )
    reasoning: Reasoning = Field(
        default="keep", description="Train the assistant's thoughts, leave them out, or show them without training them"
    )
    chat_template: ChatTemplateName | Path | None = Field(
        default=None,
        description="One of these templates, or the path of a file; null takes the tokenizer's own, and that of the "
        "model's family if it has none",
    )
    max_length: int = Field(default=4096, ge=1, description="Longest row, and slots of a pack, in tokens")
    on_too_long: OnTooLong = Field(
        default="reject", description="Leave a longer row out, keep its first or last tokens, or cut it into several"
    )
    packing: bool = Field(
        default=False, description="Put several rows into each of `max_length` tokens, held-out rows too"
    )
    cache_dir: Path | None = Field(
        default=None, description="Folder of encoded rows, which runs may share; null takes one in the run folder"
    )
    format: FormatName | None = Field(default=None, description="Format of all rows; null tells each by its keys")
    turns: Turns = Field(
        default="strict",
        description="Order of turns: refuse any but the usual, trim turns at both ends first, or accept any",
    )
    max_reject_share: float = Field(
        default=MAX_REJECT_SHARE, ge=0, le=1, description="Largest share of a file's rows that may be unreadable"
    )
    filters: Filters = Field(default_factory=Filters, description="Training rows to leave out")


class Merge(Section):
    """A full checkpoint of the base with the trained adapter merged and the trained weights in place."""

    output: Path = Field(description="Folder of the merged checkpoint")
    base_model: Path | None = Field(default=None, description="16-bit checkpoint to merge into; null takes `model`")
    out_dtype: Dtype = Field(default="bfloat16", description="Type of the merged weights")
    verify: bool = Field(
        default=False,
        description="Prove adapter and merge against plain PEFT; loads the base several times in 32 and 64 bit",
    )


class TuningRecipe(Recipe):
    """What every command that tunes adapters needs to know."""

    model: Path = Field(description="Folder of the checkpoint to tune: 16-bit, or packed by `moeft quantize`")
    output: Path = Field(description="Run folder; a second start with the same recipe continues it")
    quantization: Quantization | None = Field(
        default=None, description="What to hold in 4 bit; null keeps the checkpoint as it is"
    )
    text_only: bool = Field(default=True, description="Load only the text part of a multimodal checkpoint")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    if TYPE_CHECKING:  # Each command has fields of its own for these.
        lora: Lora | None
        data: TuningData
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Generation on held-out rows")
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the trainer, by their names in transformers.TrainingArguments, and those that moeft "
        "adds: max_skipped_steps, check_frozen_base, log_routing, fused_norms, document_attention, loraplus_lr_ratio, "
        "min_lr_ratio, activation_checkpointing (none, keep_norm_inputs, full, auto), activation_offload",
    )
    protection: Protection | None = Field(
        default=None, description="What training must leave alone; null leaves nothing alone"
    )
    gate: Gate | None = Field(default=None, description="Capabilities that training must keep; null watches none")
    merge: Merge | None = Field(
        default=None, description="Full checkpoint after training; null leaves adapter and trained weights on their own"
    )

    def trained_roles(self) -> tuple[Role, ...]:
        """Roles of the model's own weights that train in full."""
        return ()

    def trained_adapters(self) -> list[str]:
        """Names of the adapters that train, in the model; ``default`` is the newest."""
        return ["default"]

    def adapters(self, folder: Path) -> list[Path]:
        """Folders of all adapters that the tuned model is made of, lowest first.

        Args:
            folder: Where those that train are saved: ``default`` in it, any other in a folder of its name.
        """
        return [*(self.lora.stack_on if self.lora else ()), folder]


class SftRecipe(TuningRecipe):
    """Everything that ``moeft sft`` needs to know."""

    train: tuple[Role, ...] = Field(
        default=(), description="Weights of the model itself to train in full, by role; all others stay frozen"
    )
    lora: Lora | None = Field(
        default_factory=lambda known: None if known.get("train") else Lora(),
        description="The adapter to train; null trains none, which is the default beside `train`",
    )
    data: Data = Field(description="Chat rows to train on")
    range_test: RangeTest = Field(
        default_factory=RangeTest, description="How `training.learning_rate: auto` finds the rate"
    )
    memory: Memory = Field(default_factory=Memory, description="Where packed experts wait: on the device or off it")

    @field_validator("train", mode="after")
    @classmethod
    def _can_train(cls, value: tuple[Role, ...], info: ValidationInfo) -> tuple[Role, ...]:
        if value and info.data.get("dtype") == "float16":
            raise ValueError("dtype bfloat16 or float32 with it: updates of float16 weights underflow")
        check_roles(value)
        return value

    @field_validator("lora", mode="after")
    @classmethod
    def _something_trains(cls, value: Lora | None, info: ValidationInfo) -> Lora | None:
        if value is None and info.data.get("train") == ():
            raise ValueError("an adapter, or roles in `train`: there is nothing to train")
        check_roles(info.data.get("train", ()), () if value is None else value.targets)
        return value

    def trained_roles(self) -> tuple[Role, ...]:
        """Roles of the model's own weights that train in full."""
        return self.train

    def trained_adapters(self) -> list[str]:
        """Names of the adapters that train, in the model; none where only weights of the model do."""
        return [] if self.lora is None else super().trained_adapters()


def validate_training_fields(names: Iterable[str]) -> None:
    """Check the keys of ``training`` against ``transformers.TrainingArguments`` and what moeft adds.

    Separate from :meth:`SftRecipe.load` because it imports transformers, which takes seconds.

    Raises:
        RecipeError: Naming every key that is no trainer argument, or that another key of the recipe decides.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} | set(_OURS)
    problems = []
    for name in names:
        if name in _SET_ELSEWHERE:
            problems.append(f"training.{name}: set it with `{_SET_ELSEWHERE[name]}`")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean training.{close[0]}?" if close else ""
            problems.append(f"training.{name}: not an argument of transformers.TrainingArguments{hint}")
    if problems:
        raise RecipeError("\n  ".join(["the recipe's training section cannot be used:", *problems]))
