"""What the tests of preference tuning share: pairs, a policy with an adapter, and trainers over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moeft
from moeft.data.pairs import EncodedPairs, encode_pairs
from moeft.data.preferences import read_preferences
from tests.tiny_models import tiny_model
from tests.tiny_training import arguments, tiny_tokenizer


def pairs(count: int = 12) -> list[dict[str, str]]:
    """Rows that a tiny model can learn to prefer; prompts and answers of varied length."""
    return [
        {"prompt": f"{i} + {i + 1}?" + " hm" * (i % 5), "chosen": f"{2 * i + 1}!", "rejected": f"no{'?' * (i % 4)}"}
        for i in range(count)
    ]


def encoded(rows: list[Any] | None = None, **options: Any) -> EncodedPairs:
    return encode_pairs(read_preferences(pairs() if rows is None else rows), tiny_tokenizer(), **options)


def write_pairs(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def policy(family: str = "qwen3_moe", seed: int = 0) -> Any:
    """A tiny float32 model with a fresh adapter on attention and experts."""
    return moeft.add_lora(tiny_model(family), 4, targets=("attention", "experts"), seed=seed)


def dpo_trainer(
    model: Any, folder: Path, rows: Any = None, eval_dataset: Any = None, events: Any = None, **changes: Any
) -> moeft.DPOTrainer:
    """A DPOTrainer with these arguments."""
    return moeft.DPOTrainer(
        model=model,
        args=moeft.DPOConfig(**arguments(folder, **changes)),
        train_dataset=pairs() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        events=events,
    )
