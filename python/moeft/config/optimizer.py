"""Values of the trainer arguments that choose optimiser and schedule."""

import difflib
from collections.abc import Mapping
from typing import Any

from moeft.errors import RecipeError

HOST_STATE_BITS = {"adamw_moeft_host": 32, "adamw_moeft_8bit": 8}
"""Optimisers of moeft whose state lies in host memory, and the bits of that state."""

STOCHASTIC = "adamw_moeft_stochastic"
"""Optimiser of moeft that rounds 16-bit weights stochastically, on their device."""

OWN_OPTIMIZERS = (*HOST_STATE_BITS, STOCHASTIC)
"""Names of ``optim`` that moeft adds to those of transformers."""

COSINE = ("cosine", "cosine_with_min_lr")
"""Schedules that ``min_lr_ratio`` gives a floor."""


def default_optimizer(trains_in_full: bool, dtype: str) -> str | None:
    """What a run takes if the recipe names nothing: 16-bit weights that train get float32 masters in host memory.

    Returns:
        A name for ``optim``; None for the default of transformers.
    """
    return "adamw_moeft_host" if trains_in_full and dtype == "bfloat16" else None


def keeps_masters(optimizer: str | None, options: str | None) -> bool:
    """Whether an optimiser, by its name and its ``optim_args``, holds float32 masters of 16-bit weights."""
    is_off = "master_weights=false" in (options or "").replace(" ", "").lower()
    return optimizer in HOST_STATE_BITS and not is_off


def steps_in_backward(optimizer: str) -> bool:
    """Whether an optimiser of transformers changes each weight as soon as its gradient is there."""
    return "lomo" in optimizer or optimizer.endswith("_layerwise")


def optimizer_problems(training: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``optim``, ``lr_scheduler_type``, ``loraplus_lr_ratio`` and ``min_lr_ratio``.

    Args:
        training: Arguments of the trainer; those that are absent keep their defaults.

    Returns:
        One sentence per problem, naming the nearest known name.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    schedules = [kind.value for kind in SchedulerType]
    known = {"optim": [*OWN_OPTIMIZERS, *(kind.value for kind in OptimizerNames)], "lr_scheduler_type": schedules}
    problems = []
    for key, names in known.items():
        name = _value(training.get(key))
        if name is not None and name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            problems.append(f"{key} is {name!r}, which neither moeft nor transformers knows; {hint}")
    ratio = training.get("loraplus_lr_ratio")
    if ratio is not None and not (_is_number(ratio) and 0 < ratio < float("inf")):
        problems.append(f"loraplus_lr_ratio is {ratio!r}, expected a positive number; 1 trains A and B alike")
    floor, schedule = training.get("min_lr_ratio"), _value(training.get("lr_scheduler_type", "linear"))
    if floor is not None and not (_is_number(floor) and 0 <= floor <= 1):
        problems.append(f"min_lr_ratio is {floor!r}, expected a number from 0 to 1")
    if floor is not None and schedule in schedules and schedule not in COSINE:
        problems.append(f"min_lr_ratio is for a cosine schedule, not {schedule!r}; set lr_scheduler_type to 'cosine'")
    return problems


def validate_optimizer(training: Mapping[str, Any]) -> None:
    """Check optimiser and schedule of a recipe before anything is loaded.

    Raises:
        RecipeError: Naming every value that cannot be used.
    """
    if problems := [f"training.{problem}" for problem in optimizer_problems(training)]:
        raise RecipeError("\n  ".join(["the recipe's training section cannot be used:", *problems]))


def _value(name: Any) -> Any:
    """The name itself, of a member of an enum too."""
    return getattr(name, "value", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
