"""Operations on tensors, one folder each: ``reference.py`` is the definition, the other files are faster paths."""

from moeft.kernels import nf4, routing
from moeft.kernels.experts import Activation, ClampedSwiglu, ExpertLayout, ExpertLora, LoraFactors, experts
from moeft.kernels.grouped_linear import grouped_linear
from moeft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs, linear_logits
from moeft.kernels.nf4 import NF4Weight

__all__ = [
    "Activation",
    "ClampedSwiglu",
    "ExpertLayout",
    "ExpertLora",
    "LoraFactors",
    "NF4Weight",
    "experts",
    "grouped_linear",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_logits",
    "nf4",
    "routing",
]
