"""Packed weights as members of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeft.kernels.nf4 import NESTED_BLOCK, Layout, NestedStatistics, NF4Weight

STATISTICS = ("_absmax", "_nested_absmax", "_nested_offset")


class PackedModule(nn.Module):
    """A module whose weights may be packed.

    The codes of a weight are a uint8 parameter under the weight's own name (transformers reports any other name as a
    missing key; PEFT looks for parameters). Its statistics are buffers ``<name>_absmax`` and, when double-quantised,
    ``<name>_nested_absmax`` and ``<name>_nested_offset``.
    """

    block_size: int

    def __init__(self) -> None:
        super().__init__()
        self.packed_shapes: dict[str, torch.Size] = {}

    def register_packed(
        self, name: str, shape: torch.Size, block_size: int, double_quant: bool, device: torch.device | str = "meta"
    ) -> None:
        """Make room for a packed weight of ``shape``."""
        layout = Layout.of(shape, block_size)
        stacked = len(shape) > 2
        self.block_size = block_size
        self.packed_shapes[name] = torch.Size(shape)
        codes = torch.empty(layout.packed_shape(stacked), dtype=torch.uint8, device=device)
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer(
            name + "_absmax", torch.empty(layout.absmax_shape(stacked), dtype=absmax_dtype, device=device)
        )
        if double_quant:
            nested_blocks = -(-layout.groups * layout.blocks // NESTED_BLOCK)
            # The default dtype is that of the model while transformers builds it, and would round them.
            for suffix, length in (("_nested_absmax", nested_blocks), ("_nested_offset", 1)):
                self.register_buffer(name + suffix, torch.empty(length, dtype=torch.float32, device=device))

    def expect_unpacked(self, dtype: torch.dtype) -> None:
        """Declare the codes, still on the meta device, as values of ``dtype``.

        transformers casts what it loads to the dtype of the parameter, up to some release even when it quantises.
        """
        for name in self.packed_shapes:
            declared = getattr(self, name).to(dtype)
            setattr(self, name, nn.Parameter(declared, requires_grad=False))

    def packed_weight(self, name: str) -> NF4Weight:
        """The packed weight of that name, sharing memory with the module."""
        nested = None
        if name + "_nested_absmax" in self._buffers:
            nested = NestedStatistics(getattr(self, name + "_nested_absmax"), getattr(self, name + "_nested_offset"))
        return NF4Weight(
            getattr(self, name).data, getattr(self, name + "_absmax"), self.packed_shapes[name], self.block_size, nested
        )

    def packed_members(self) -> dict[str, tuple[str, ...]]:
        """Name of each packed weight -> names of all tensors that hold it."""
        return {
            name: (name, *(name + suffix for suffix in STATISTICS if name + suffix in self._buffers))
            for name in self.packed_shapes
        }

    def set_packed(self, name: str, weight: NF4Weight) -> None:
        """Let a packed weight lie elsewhere: tensors of the same shapes, which the module then shares."""
        members = members_of(name, weight)
        setattr(self, name, nn.Parameter(members.pop(name), requires_grad=False))
        for member, tensor in members.items():
            setattr(self, member, tensor)

    def stays_in_place(self) -> bool:
        """Whether the packed weights ignore moves of the module, because something else brings them to its device."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow moves between devices, but never casts: ``model.to(bfloat16)`` must not round the statistics."""
        members = [member for names in self.packed_members().values() for member in names]
        staying = {id(getattr(self, member)) for member in members} if self.stays_in_place() else set()

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in staying:
                return tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def members_of(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """Tensors that hold a packed weight, under the names that :class:`PackedModule` gives them."""
    members = {name: weight.packed, name + "_absmax": weight.absmax}
    if weight.nested is not None:
        members |= {name + "_nested_absmax": weight.nested.absmax, name + "_nested_offset": weight.nested.offset}
    return members
