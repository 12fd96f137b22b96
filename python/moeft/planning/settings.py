"""How a model is to be trained, as far as memory and speed depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moeft.config.memory import Memory
from moeft.config.protection import Protection
from moeft.config.sft import Lora, Quantization, SftRecipe
from moeft.errors import RecipeError

TRANSFORMERS_BATCH = 8  # per_device_train_batch_size of TrainingArguments
TRANSFORMERS_OPTIMIZER = "adamw_torch_fused"
CHECKPOINTING = ("none", "full", "keep_norm_inputs")


@dataclass(frozen=True)
class Settings:
    """What a plan assumes. The defaults are those of a plan without a recipe.

    Attributes:
        quantization: What is packed to NF4 while loading; None keeps the checkpoint as it is.
        lora: The adapter.
        train: Roles of weights that train in full.
        dtype: Type of what is not packed.
        text_only: Whether towers of other modalities are left out.
        max_length: Tokens per row; every row is taken to be this long.
        batch_size: Rows per micro-batch.
        packing: Whether a row holds several documents, which needs an attention mask.
        offload: Whether activations wait for backward in host memory.
        checkpointing: "none", "full" or "keep_norm_inputs".
        optimizer: Name as in ``TrainingArguments.optim``.
        memory: Where experts wait.
        protected_rank: Directions of the instruct subspace that ``protection`` holds for every matrix; None without it.
    """

    quantization: Quantization | None = field(default_factory=Quantization)
    lora: Lora = field(default_factory=Lora)
    train: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    text_only: bool = True
    max_length: int = 2048
    batch_size: int = 1
    packing: bool = False
    offload: bool = False
    checkpointing: str = "full"
    optimizer: str = TRANSFORMERS_OPTIMIZER
    memory: Memory = field(default_factory=Memory)
    protected_rank: int | None = None

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {self.checkpointing!r}, expected one of {', '.join(CHECKPOINTING)}")
        if self.max_length < 1 or self.batch_size < 1:
            raise ValueError(f"max_length is {self.max_length} and batch_size {self.batch_size}, expected 1 or more")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.max_length

    @property
    def adapter_dtype(self) -> str:
        """Type of the adapter: float32 unless the recipe has a key for it."""
        return getattr(self.lora, "dtype", "float32")

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask: rows of unequal length beside each other, or documents in one row."""
        return self.batch_size > 1 or self.packing


def read_settings(recipe: str | Path | SftRecipe | Settings | None) -> Settings:
    """Settings of a recipe file, a loaded recipe, or the defaults.

    Raises:
        OSError: If the file cannot be read.
        RecipeError: If it is no recipe of ``moeft sft``.
    """
    if recipe is None:
        return Settings()
    if isinstance(recipe, Settings):
        return recipe
    if not isinstance(recipe, SftRecipe):
        try:
            recipe = SftRecipe.load(recipe)
        except RecipeError as error:
            raise RecipeError(f"a plan reads recipes of `moeft sft`, and {error}") from error
    training = recipe.training
    return Settings(
        quantization=recipe.quantization,
        lora=recipe.lora or Lora().model_copy(update={"targets": ()}),
        train=recipe.train,
        dtype=recipe.dtype,
        text_only=recipe.text_only,
        max_length=recipe.data.max_length,
        batch_size=int(training.get("per_device_train_batch_size", TRANSFORMERS_BATCH)),
        packing=bool(_asked(recipe, "packing", False)),
        offload=bool(_asked(recipe, "activation_offload", False)),
        checkpointing=_checkpointing(recipe),
        optimizer=str(training.get("optim", _default_optimizer(recipe))),
        memory=recipe.memory,
        protected_rank=_protected_rank(recipe.protection),
    )


def _default_optimizer(recipe: SftRecipe) -> str:
    """What a run takes if the recipe names none: 16-bit weights that train get float32 masters in host memory."""
    return "adamw_moeft_host" if recipe.train and recipe.dtype == "bfloat16" else TRANSFORMERS_OPTIMIZER


def _protected_rank(protection: Protection | None) -> int | None:
    """The rank that a recipe names, or that of its file."""
    if protection is None or protection.strength == 0:
        return None
    if protection.rank is not None:
        return protection.rank
    try:
        with safe_open(protection.subspace, "numpy") as file:
            return int((file.metadata() or {})["rank"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(
            f"{protection.subspace} does not say its rank ({error}); make it with `moeft subspace`, or set "
            "protection.rank"
        ) from error


def _checkpointing(recipe: SftRecipe) -> str:
    default = "full" if recipe.training.get("gradient_checkpointing") else "none"
    policy = _asked(recipe, "activation_checkpointing", default)
    if isinstance(policy, bool):  # as transformers spells it
        return "full" if policy else "none"
    return "full" if policy == "auto" else str(policy)


def _asked(recipe: SftRecipe, key: str, default: Any) -> Any:
    """A key wherever the recipe's schema puts it: in ``training``, in ``data`` or on top."""
    for section in (recipe.training, recipe.data, recipe):
        value = section.get(key) if isinstance(section, dict) else getattr(section, key, None)
        if value is not None:
            return value
    return default
