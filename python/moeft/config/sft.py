"""The recipe of ``moeft sft``: supervised fine-tuning of LoRA adapters on chat rows."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moeft.config.recipe import Recipe, Section
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
}
"""Trainer arguments that another key of the recipe decides."""

_OURS = (
    "max_skipped_steps",
    "check_frozen_base",
    "log_routing",
    "loraplus_lr_ratio",
    "min_lr_ratio",
    "activation_checkpointing",
    "activation_offload",
)
"""Trainer arguments that moeft adds to those of transformers."""


def _one_or_many(value: Any) -> Any:
    # In JSON, where a tuple is a list, what a validator passes on has to be a tuple already.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Quantization(Section):
    """Which weights are held in NF4 while training. Router, norms, embeddings and head stay in 16 bit."""

    experts: bool = Field(default=True, description="Hold expert weights in 4 bit")
    attention: bool = Field(default=False, description="Hold attention projections in 4 bit")
    mlp: bool = Field(default=False, description="Hold dense and shared-expert projections in 4 bit")
    double_quant: bool = Field(
        default=False, description="Quantise the block scales too; saves about 0.37 bit per weight"
    )
    block_size: BlockSize = Field(default=64, description="Weights per scale")


class Lora(Section):
    """The adapter to train."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapter")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; null takes the rank, a scale of 1")
    targets: tuple[Target, ...] = Field(
        default=("attention", "experts"), min_length=1, description="Parts that get an adapter"
    )
    experts_rank: int | None = Field(default=None, ge=1, description="Rank of each expert's adapter; null takes `rank`")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank")
    init_seed: int = Field(default=0, ge=0, description="Seed of the adapter's first weights")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the adapter's weights; bfloat16 halves them and their gradients"
    )


class Data(Section):
    """Chat rows to train on, and which of their tokens count."""

    train: Annotated[
        tuple[Path, ...],
        BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="JSONL file of chat rows, or a list of such files"),
    ]
    eval: Path | None = Field(default=None, description="JSONL file of held-out rows; null measures no held-out loss")
    train_on: Literal["assistant", "last"] = Field(
        default="assistant", description="Tokens in the loss: every assistant turn, or only the last one"
    )
    max_length: int = Field(default=4096, ge=1, description="Longest row, and slots of a pack, in tokens")
    on_too_long: Literal["reject", "truncate", "truncate_left", "split"] = Field(
        default="reject", description="Leave a longer row out, keep its first or last tokens, or cut it into several"
    )
    packing: bool = Field(
        default=False, description="Put several rows into each of `max_length` tokens, held-out rows too"
    )


class Evaluation(Section):
    """Generation on held-out rows before and after training."""

    tool_calls: Path | None = Field(
        default=None, description="JSONL file of held-out requests with the right tool call"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest answer in tokens")
    batch_size: int = Field(default=16, ge=1, description="Requests answered at once")


class Merge(Section):
    """Merging the trained adapter into a full checkpoint."""

    output: Path = Field(description="Folder of the merged checkpoint")
    base_model: Path | None = Field(default=None, description="16-bit checkpoint to merge into; null takes `model`")
    out_dtype: Dtype = Field(default="bfloat16", description="Type of the merged weights")
    verify: bool = Field(
        default=False,
        description="Prove adapter and merge against plain PEFT; loads the base several times in 32 and 64 bit",
    )


class SftRecipe(Recipe):
    """Everything that ``moeft sft`` needs to know."""

    model: Path = Field(description="Folder of the checkpoint to tune: 16-bit, or packed by `moeft quantize`")
    output: Path = Field(description="Run folder; a second start with the same recipe continues it")
    quantization: Quantization | None = Field(
        default=None, description="What to hold in 4 bit; null keeps the checkpoint as it is"
    )
    text_only: bool = Field(default=True, description="Load only the text part of a multimodal checkpoint")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    lora: Lora = Field(default_factory=Lora, description="The adapter to train")
    data: Data = Field(description="Chat rows to train on")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Generation on held-out rows")
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the trainer, by their names in transformers.TrainingArguments, and those that moeft "
        "adds: max_skipped_steps, check_frozen_base, log_routing, loraplus_lr_ratio, min_lr_ratio, "
        "activation_checkpointing (none, keep_norm_inputs, full, auto), activation_offload",
    )
    merge: Merge | None = Field(default=None, description="Merge after training; null leaves the adapter on its own")


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
