"""Layers over the kernels. They know tensors and shapes, not model families."""

from moeft.modules.nf4_experts import NF4Experts
from moeft.modules.nf4_linear import NF4Linear
from moeft.modules.packed import PackedModule

__all__ = ["NF4Experts", "NF4Linear", "PackedModule"]
