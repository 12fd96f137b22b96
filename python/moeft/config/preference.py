"""What a preference loss is made of: its name and numbers, checked in one place for recipes and for the trainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

LossName = Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "orpo", "simpo"]
Reduction = Literal["sum", "mean"]
"""Whether the log-probability of an answer is the sum over its tokens or their mean."""
REFERENCE_FREE = ("orpo", "simpo")
_MEAN = ("sigmoid_norm", "ipo", "orpo", "simpo")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "simpo")


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and its numbers.

    Raises:
        ValueError: If one of them makes no sense, alone or with the others.
    """

    name: LossName = "sigmoid"
    beta: float = 0.1
    """Strength of the preference against the reference; of ``orpo``, weight of the odds ratio."""
    log_probs: Reduction | None = None
    """Of answers, in the loss and in the logged rewards alike; None takes that of the loss."""
    label_smoothing: float = 0.0
    """Share of pairs whose preference is taken to be the wrong way round."""
    sft_weight: float | None = None
    """Weight of the chosen answer's mean loss per token; None is 1 with ``orpo`` and 0 otherwise."""
    simpo_margin: float = 0.5
    """Of ``simpo``: how much larger the chosen reward is to be."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the policy at its start."""
        return self.name not in REFERENCE_FREE

    @property
    def is_mean(self) -> bool:
        """Whether log-probabilities are means over tokens."""
        return self.log_probs == "mean" or (self.log_probs is None and self.name in _MEAN)

    @property
    def weight_of_sft(self) -> float:
        """The weight of the chosen answer's own loss."""
        if self.sft_weight is None:
            return 1.0 if self.name == "orpo" else 0.0
        return self.sft_weight

    def _problems(self) -> Iterator[str]:
        if self.name not in get_args(LossName):
            yield f"loss is {self.name!r}, expected one of {', '.join(get_args(LossName))}"
        if not 0 < self.beta < float("inf"):
            yield f"beta is {self.beta!r}, expected a positive number"
        if self.log_probs not in (None, *get_args(Reduction)):
            yield f"log_probs is {self.log_probs!r}, expected sum, mean or null"
        elif self.name == "sigmoid_norm" and self.log_probs == "sum":
            yield "log_probs is 'sum', but sigmoid_norm is the loss of means; take sigmoid for sums"
        if not 0 <= self.label_smoothing < 0.5:
            yield f"label_smoothing is {self.label_smoothing!r}, expected from 0 to below 0.5"
        elif self.label_smoothing and self.name not in _SMOOTHED:
            yield f"label_smoothing is for {', '.join(_SMOOTHED)}, not {self.name}"
        if self.sft_weight is not None and not 0 <= self.sft_weight < float("inf"):
            yield f"sft_weight is {self.sft_weight!r}, expected a number from 0"
        if not 0 <= self.simpo_margin < float("inf"):
            yield f"simpo_margin is {self.simpo_margin!r}, expected a number from 0"
