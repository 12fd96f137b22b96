"""Multiple choice by log-probability: the choice that the model finds most probable is its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeft.errors import DataError
from moeft.evaluation.request import Answer, Choices
from moeft.evaluation.task import Item, Metric, Task, share

ACC = Metric("acc")
ACC_NORM = Metric("acc_norm")


def choice_item(key: str, context: str, choices: Sequence[str], gold: int, heading: str = "") -> Item:
    """An item of a question and its choices; ``heading`` is what stands above the examples of such questions.

    Raises:
        DataError: If there are fewer than two choices, or ``gold`` is none of them.
    """
    if len(choices) < 2 or not 0 <= gold < len(choices):
        raise DataError(f"item {key}: answer {gold} of {len(choices)} choices, expected at least two and one of them")
    request = Choices(context, tuple(f" {choice}" for choice in choices))
    return Item(key, request, {"gold": gold, "lengths": [len(choice) for choice in choices], "heading": heading})


def choice_task(name: str, items: Sequence[Item], normalised: bool = True) -> Task:
    """A task whose metrics are lm-eval's ``acc`` and, if choices are of several lengths, ``acc_norm``.

    ``acc_norm`` divides each log-probability by the characters of the choice.
    """
    return Task(name, tuple(items), (ACC, ACC_NORM) if normalised else (ACC,), _grade)


def _grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
    graded: list[Mapping[str, tuple[float, float]]] = []
    for item, answer in answered:
        log_probs = np.array(answer["log_probs"])
        reference: dict[str, Any] = item.reference
        per_character = log_probs / np.maximum(reference["lengths"], 1)
        graded.append(
            {
                ACC.name: share(int(log_probs.argmax()) == reference["gold"]),
                ACC_NORM.name: share(int(per_character.argmax()) == reference["gold"]),
            }
        )
    return graded
