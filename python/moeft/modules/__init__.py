"""Layers over the kernels. They know tensors and shapes, not model families."""

from moeft.modules.frozen_linear import FrozenLinear
from moeft.modules.nf4_experts import NF4Experts
from moeft.modules.nf4_linear import NF4Linear
from moeft.modules.packed import PackedModule

__all__ = ["FrozenLinear", "NF4Experts", "NF4Linear", "PackedModule"]
