"""How a model is to be trained, as far as memory and speed depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moeft.config import document
from moeft.config.dpo import DpoRecipe
from moeft.config.memory import Memory
from moeft.config.optimizer import default_optimizer
from moeft.config.protection import Protection
from moeft.config.sft import Lora, Quantization, SftRecipe
from moeft.config.sources import PairLayout
from moeft.errors import RecipeError

TRANSFORMERS_BATCH = 8  # per_device_train_batch_size of TrainingArguments, and per_device_eval_batch_size
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
        max_length: Most tokens of a sequence; every sequence is taken to be this long.
        batch_size: Rows, or preference pairs, of a micro-batch.
        pairs: How two answers lie in a micro-batch of preference pairs; None for rows of one sequence.
        forward_batch_size: Pairs of a pass without gradients, which the reference and held-out pairs take.
        packing: Whether a row holds several documents, which needs an attention mask.
        offload: Whether activations wait for backward in host memory.
        checkpointing: "none", "full" or "keep_norm_inputs".
        optimizer: Name as in ``TrainingArguments.optim``.
        memory: Where experts wait.
        protected_rank: Directions of the instruct subspace that ``protection`` holds for every matrix; None without it.
        card_bytes: Memory of the card, of which its kernels take a share as workspace; None if it is not known.
        fused_norms: Whether norms on a card keep what they read as it is, and not as a float32 copy.
    """

    quantization: Quantization | None = field(default_factory=Quantization)
    lora: Lora = field(default_factory=Lora)
    train: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    text_only: bool = True
    max_length: int = 2048
    batch_size: int = 1
    pairs: PairLayout | None = None
    forward_batch_size: int = 1
    packing: bool = False
    offload: bool = False
    checkpointing: str = "full"
    optimizer: str = TRANSFORMERS_OPTIMIZER
    memory: Memory = field(default_factory=Memory)
    protected_rank: int | None = None
    card_bytes: int | None = None
    fused_norms: bool = True

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {self.checkpointing!r}, expected one of {', '.join(CHECKPOINTING)}")
        if self.max_length < 1 or self.batch_size < 1:
            raise ValueError(f"max_length is {self.max_length} and batch_size {self.batch_size}, expected 1 or more")

    @property
    def rows(self) -> int:
        """Rows of a micro-batch: two for each pair that is padded."""
        return self.batch_size * (2 if self.pairs == "padded" else 1)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: both answers of a pair with their prompts, unless each has a row."""
        # A shared prompt may be as short as a token, so at worst it saves nothing.
        return self.max_length * (2 if self.pairs in ("packed", "shared_prefix") else 1)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.row_tokens

    @property
    def adapter_dtype(self) -> str:
        """Type of the adapter: float32 unless the recipe has a key for it."""
        return getattr(self.lora, "dtype", "float32")

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask: rows of unequal length beside each other, or documents in one row."""
        return self.rows > 1 or self.packing or self.row_tokens > self.max_length


def read_settings(recipe: str | Path | SftRecipe | DpoRecipe | Settings | None) -> Settings:
    """Settings of a recipe file, a loaded recipe, or the defaults.

    Raises:
        OSError: If the file cannot be read.
        RecipeError: If it is no recipe of ``moeft sft`` or ``moeft dpo``.
    """
    if recipe is None:
        return Settings()
    if isinstance(recipe, Settings):
        return recipe
    if not isinstance(recipe, SftRecipe | DpoRecipe):
        try:
            recipe = _kind_of(recipe).load(recipe)
        except RecipeError as error:
            raise RecipeError(f"a plan reads recipes of `moeft sft` and `moeft dpo`, and {error}") from error
    training = recipe.training
    default = default_optimizer(bool(recipe.trained_roles()), recipe.dtype)
    return Settings(
        quantization=recipe.quantization,
        lora=recipe.lora or Lora().model_copy(update={"targets": ()}),
        train=recipe.trained_roles(),
        dtype=recipe.dtype,
        text_only=recipe.text_only,
        max_length=recipe.data.max_length,
        batch_size=int(training.get("per_device_train_batch_size", TRANSFORMERS_BATCH)),
        pairs=recipe.data.layout if isinstance(recipe, DpoRecipe) else None,
        forward_batch_size=int(training.get("per_device_eval_batch_size", TRANSFORMERS_BATCH)),
        packing=bool(_asked(recipe, "packing", False)),
        offload=bool(_asked(recipe, "activation_offload", False)),
        checkpointing=_checkpointing(recipe),
        optimizer=str(training.get("optim") or default or TRANSFORMERS_OPTIMIZER),
        memory=recipe.memory if isinstance(recipe, SftRecipe) else Memory(),
        protected_rank=_protected_rank(recipe.protection),
        fused_norms=bool(_asked(recipe, "fused_norms", True)),
    )


def _kind_of(path: str | Path) -> type[SftRecipe] | type[DpoRecipe]:
    """Which command a recipe file is for: sections that only pairs have tell it."""
    content = document.read(Path(path))
    data = content.get("data")
    is_of_pairs = {"preference", "reference"} & content.keys() or (isinstance(data, dict) and "layout" in data)
    return DpoRecipe if is_of_pairs else SftRecipe


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


def _checkpointing(recipe: SftRecipe | DpoRecipe) -> str:
    default = "full" if recipe.training.get("gradient_checkpointing") else "none"
    policy = _asked(recipe, "activation_checkpointing", default)
    if isinstance(policy, bool):  # as transformers spells it
        return "full" if policy else "none"
    return "full" if policy == "auto" else str(policy)


def _asked(recipe: SftRecipe | DpoRecipe, key: str, default: Any) -> Any:
    """A key wherever the recipe's schema puts it: in ``training``, in ``data`` or on top."""
    for section in (recipe.training, recipe.data, recipe):
        value = section.get(key) if isinstance(section, dict) else getattr(section, key, None)
        if value is not None:
            return value
    return default
