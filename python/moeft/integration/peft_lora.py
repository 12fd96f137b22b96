"""LoRA on packed weights and on experts, as PEFT modules: saved in PEFT's own layout, loaded by plain PEFT."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora.layer as peft_layer
import torch
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeft.errors import AdapterError
from moeft.integration import experts_implementation
from moeft.kernels import ExpertLora, LoraFactors
from moeft.modules import NF4Experts, NF4Linear
from moeft.modules.nf4_experts import STACKS

MERGE_REFUSED = (
    "an adapter cannot be merged into 4-bit weights without rounding them again; "
    "save it and merge it into the 16-bit base with `moeft merge` or moeft.merging.merge"
)


class PackedLinearLora(peft_layer.Linear):
    """LoRA beside a packed linear layer."""

    def _get_in_out_features(self, module: NF4Linear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuse: see the message."""
        raise AdapterError(MERGE_REFUSED)


class ParamWrapper(peft_layer.ParamWrapper):
    """LoRA on one stack of packed experts, without a delta of the size of the stack.

    PEFT nests one wrapper per stack; the outer one runs the expert block once, with the factors of all. The class
    bears the name of its base because PEFT recognises wrappers that may be nested by that name.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = self.get_base_layer().packed_shapes[self.parameter_name]
        self.num_experts, rows, columns = shape
        self._param_ndim = len(shape)
        return (rows, columns) if self.get_base_layer().layout.transposed else (columns, rows)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see PEFT."""
        # PEFT takes [E, out, in] for [E, in, out] and then swaps. Ours are right, whatever release reads which shape.
        self._did_swap_in_out_features = True
        super().update_layer(*args, **kwargs)

    def factors(self) -> LoraFactors:
        """Factors of the active adapters as one pair, empty if there is none.

        The delta of two adapters is ``[s1 B1 | s2 B2] @ [A1; A2]``: one pair whose rank is the sum, exact, with
        temporaries of the size of the factors. Gradients reach each adapter that requires them.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return LoraFactors()
        pairs = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in active]
        if len(pairs) == 1:
            return LoraFactors(*pairs[0])
        a = torch.cat([a.view(self.num_experts, -1, a.shape[1]) for a, _, _ in pairs], dim=1)
        b = torch.cat([b.float() * scaling for _, b, scaling in pairs], dim=1)
        return LoraFactors(a.flatten(0, 1), b, 1.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the expert block with the factors of this wrapper and those nested in it."""
        self._check_forward_args(x, *args, **kwargs)
        factors, module = {}, self
        while isinstance(module, ParamWrapper):
            factors[module.parameter_name.removesuffix("_proj")] = module.factors()
            module = module.base_layer
        return module(x, *args, **kwargs, lora=ExpertLora(**factors))

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuse: see the message."""
        raise AdapterError(MERGE_REFUSED)


class UnpackedParamWrapper(ParamWrapper):
    """LoRA on one stack of ordinary experts that run through ``experts_implementation="moeft"``.

    With another implementation, or merged, it is PEFT's own wrapper.
    """

    _get_in_out_features = peft_layer.ParamWrapper._get_in_out_features
    update_layer = peft_layer.ParamWrapper.update_layer
    merge = peft_layer.ParamWrapper.merge

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the expert block with the factors of this wrapper and those nested in it."""
        if self.merged or not experts_implementation.is_active(self.get_base_layer()):
            return peft_layer.ParamWrapper.forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)


UnpackedParamWrapper.__name__ = "ParamWrapper"  # see there
LORA_MODULES = {NF4Experts: ParamWrapper, NF4Linear: PackedLinearLora}


def install() -> None:
    """Let PEFT put our LoRA modules on packed weights and our experts, whoever injects an adapter, from any config.

    PEFT's registry of custom modules hangs on one config object and is not saved, so a reloaded adapter would take
    packed bytes for an ordinary weight.
    """
    create = LoraModel._create_new_module
    if getattr(create, "knows_packed_weights", False):
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        lora_config._register_custom_module(LORA_MODULES)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        runs_here = isinstance(base, NF4Experts) or experts_implementation.is_active(base)
        if runs_here and (parameter := kwargs.get("parameter_name", STACKS[0])) not in STACKS:
            raise AdapterError(
                f"target_parameters names {parameter} of {type(base).__name__}, but moeft adapts only "
                f"{' and '.join(STACKS)} of experts; leave it out, or use transformers' own experts in 16 bit"
            )
        if "parameter_name" in kwargs and experts_implementation.is_active(base):
            lora_config._register_custom_module({type(base): UnpackedParamWrapper})
        return create(lora_config, adapter_name, target, **kwargs)

    create_new_module.knows_packed_weights = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)


install()  # here too, as PEFT may be imported first, and its import runs this file
