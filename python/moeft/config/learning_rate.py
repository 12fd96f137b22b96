"""The learning rate of a recipe that leaves it open: a default by what trains, or ``auto``, found by a range test."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from moeft.config.recipe import Section

AUTO = "auto"
FULL_RATE, LORA_RATE, EXPERT_LORA_RATE = 1e-5, 2e-4, 1e-4


class RangeTest(Section):
    """How ``training.learning_rate: auto`` is found: a few steps at each rate, and how far the model moved."""

    limit: float | None = Field(
        default=None,
        gt=0,
        description="KL(base || model) that the whole run may reach, nats per token; null takes the gate's, or 0.3",
    )
    steps: int = Field(default=8, ge=1, description="Optimizer steps at each rate")
    lowest: float | None = Field(default=None, gt=0, description="First rate; null takes a tenth of the default one")
    highest: float | None = Field(default=None, gt=0, description="Last rate; null takes ten times the default one")
    per_decade: int = Field(default=3, ge=1, description="Rates in each factor of ten")
    seed: int = Field(default=0, ge=0, description="Of the rows that are trained on")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.lowest is not None and self.highest is not None and self.lowest > self.highest:
            raise ValueError("lowest at most as large as highest")
        return self

    def rates(self, default: float) -> list[float]:
        """The rates in rising order, from one end to the other, evenly spaced on a logarithmic scale.

        Args:
            default: Rate that the open ends of the range are taken from.
        """
        lowest = self.lowest or min(default / 10, self.highest or default)
        highest = self.highest or max(default * 10, lowest)
        # Less a little, so that rounding does not make one more of what is a whole number.
        intervals = math.ceil(math.log10(highest / lowest) * self.per_decade - 1e-9)
        return [lowest * (highest / lowest) ** (i / intervals) for i in range(intervals)] + [highest]


def default_rate(train: Sequence[str], lora_targets: Sequence[str]) -> float:
    """Learning rate of AdamW where a recipe gives none; docs/recipes.md has the reasons.

    Args:
        train: Roles of the weights that train in full.
        lora_targets: What the adapter changes; empty without one.
    """
    if train:
        return FULL_RATE
    return EXPERT_LORA_RATE if "experts" in lora_targets else LORA_RATE


def is_auto(training: Mapping[str, Any]) -> bool:
    """Whether a recipe's ``training`` wants the rate to be found."""
    return training.get("learning_rate") == AUTO


def with_rate(training: Mapping[str, Any], default: float) -> dict[str, Any]:
    """``training`` with a number for the rate: its own, or else the default one, from which a range test starts."""
    rate = training.get("learning_rate", AUTO)
    return {**training, "learning_rate": default if rate == AUTO else rate}
