"""Values of the trainer arguments that transformers takes as they are and stumbles over later."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moeft.errors import RecipeError

_COUNTS = ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
"""Arguments that have to be whole numbers from 1."""


def validate_trainer_values(training: Mapping[str, Any]) -> None:
    """Check that what has to be a number is one.

    Args:
        training: Arguments of the trainer; those that are absent keep their defaults.

    Raises:
        RecipeError: Naming every value that cannot be used.
    """
    from transformers import TrainingArguments

    numbers = {
        field.name: field.default for field in dataclasses.fields(TrainingArguments) if _is_number(field.default)
    }
    problems = []
    for name, value in training.items():
        if name in _COUNTS:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"training.{name} is {value!r}, expected a whole number from 1")
        elif name in numbers and not _is_number(value):
            problems.append(f"training.{name} is {value!r}, expected a number; its default is {numbers[name]}")
    if problems:
        raise RecipeError("\n  ".join(["the recipe's training section cannot be used:", *problems]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
