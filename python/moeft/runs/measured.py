"""A model and the rows that something about it is measured on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.errors import CheckpointError

if TYPE_CHECKING:
    from moeft.data.chat import Encoded


def load(
    path: Path, dtype: str, device: str, show: Callable[[str], None], chat_template: str | Path | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer, with the chat template asked for, or the family's where the tokenizer has none.

    Raises:
        CheckpointError: If the folder is no checkpoint with a tokenizer.
        DataError: If ``chat_template`` is neither a name nor a file.
    """
    from moeft.data import templates
    from moeft.integration import experts_implementation, experts_module, loading

    model, tokenizer = loading.load(path, dtype=dtype, device=None if device == "cpu" else device)
    if tokenizer is None:
        raise CheckpointError(f"{path} holds no tokenizer; copy that of the base beside the weights")
    origin = templates.apply(tokenizer, chat_template, model.config.model_type)
    if origin is not None:
        show(f"chat template: {origin}")
    if any(experts_module.is_fused(module) for module in model.modules()):
        # transformers' own kernel refuses some sizes in bfloat16 on the CPU.
        model.set_experts_implementation(experts_implementation.NAME)
    return model, tokenizer


def available_device() -> str:
    """``cuda`` if there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def encode(rows: Path | Sequence[Any], tokenizer: Any, train_on: str, max_length: int) -> Encoded:
    """The rows of a file, or those given; longer ones are cut."""
    from moeft.data import chat
    from moeft.data.reading import read_rows

    return chat.encode(
        read_rows(rows),
        tokenizer,
        train_on=train_on,  # type: ignore[arg-type]  # checked there
        max_length=max_length,
        on_too_long="truncate",
    )


def draw(examples: Sequence[Any], rows: int, seed: int) -> list[Any]:
    """Rows at random, since files are often sorted by topic, in the order of the file."""
    count = min(rows, len(examples))
    chosen = sorted(random.Random(seed).sample(range(len(examples)), count))
    return [{key: values.tolist() for key, values in examples[i].items()} for i in chosen]
