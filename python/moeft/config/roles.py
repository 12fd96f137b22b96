"""Roles of a model's own parameters, by which a recipe chooses those that train in full."""

from collections.abc import Sequence
from typing import Literal

Role = Literal["attention", "experts", "router", "embeddings", "norms", "mlp"]


def check_roles(train: Sequence[str], targets: Sequence[str] = ()) -> None:
    """Refuse roles that are listed twice, or trained and adapted at once.

    Args:
        train: Roles that train in full.
        targets: Targets of the adapter beside them; empty without one.

    Raises:
        ValueError: Naming the role.
    """
    if repeated := sorted({role for role in train if list(train).count(role) > 1}):
        raise ValueError(f"train names {repeated[0]} more than once")
    if both := sorted(set(train) & set(targets)):
        raise ValueError(
            f"train and lora.targets both name {both[0]}, expected one of them: a weight that trains has no use for an "
            "adapter"
        )
