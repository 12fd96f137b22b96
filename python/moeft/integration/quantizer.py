"""The transformers quantizer: packs weights while they load, and loads packed checkpoints without a 16-bit copy.

In memory a packed weight keeps the name of the parameter it replaces. On disk it must not: ``save_pretrained`` turns
fused stacks of several families back into one tensor per expert and would take packed bytes for such a stack. So
``experts.gate_up_proj`` is ``experts.gate_up_nf4.packed`` on disk, with its statistics beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from moeft import _core, families
from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.integration import config_fields, experts_module, loading_check, model_family
from moeft.integration.mapped_files import MappedFiles
from moeft.kernels import nf4
from moeft.modules import NF4Experts, NF4Linear, PackedModule
from moeft.modules.nf4_experts import STACKS
from moeft.modules.packed import members_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps

    from moeft.integration.nf4_config import NF4Config

# Name of a packed weight in memory -> on disk.
DISK_NAMES = {"gate_up_proj": "gate_up_nf4", "down_proj": "down_nf4", "weight": "weight_nf4"}
DISK_SUFFIXES = {
    "": ".packed",
    "_absmax": ".absmax",
    "_nested_absmax": ".nested_absmax",
    "_nested_offset": ".nested_offset",
}


class NF4Quantizer(HfQuantizer):
    """Quantizer of ``quant_method`` "moeft_nf4"; see :class:`moeft.NF4Config`."""

    requires_calibration = False
    quantization_config: NF4Config
    files: MappedFiles

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed models can be saved and loaded again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on a packed model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Weights that are not packed can train without an adapter; transformers' trainer asks under this name."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from moeft.integration import peft_lora  # PEFT imports models, which import this module

        family = model_family.of_model(model)
        replaced = replace_modules(model, family, self.quantization_config)
        if not self.pre_quantized:
            for module in replaced:
                module.expect_unpacked(model.dtype)
        loading_check.require_complete(model)
        peft_lora.install()
        self.files = MappedFiles(checkpoint_files or ())
        if not self.pre_quantized and checkpoint_files:
            self.quantization_config.base_fingerprint = _core.fingerprint(str(Path(checkpoint_files[0]).parent))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Our renamings serve loading only: reversed, "weight" would match every weight there is.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions or []
            if not any("_nf4" in pattern for pattern in conversion.source_patterns)
        ]
        config_fields.keep_original(model.config)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint tensor goes into a packed weight."""
        module_name, _, name = param_name.rpartition(".")
        try:
            module: Any = model.get_submodule(module_name)
        except AttributeError:
            return False
        return isinstance(module, PackedModule) and name in module.packed_shapes

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs one parameter while it loads."""
        from transformers.core_model_loading import ConversionOps

        config, files = self.quantization_config, self.files

        class PackNF4(ConversionOps):
            def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
                packed: dict[str, Tensor] = {}
                for name, value in input_dict.items():
                    tensor = value[0] if isinstance(value, list) else value
                    try:
                        weight = nf4.quantize(tensor, config.block_size, config.double_quant)
                    except ValueError as error:
                        raise CheckpointError(f"{name} cannot be quantised: {error}") from error
                    packed |= members_of(name, weight)
                    files.count_read(tensor.nbytes)
                return packed

        return PackNF4()

    def get_weight_conversions(self) -> list[Any]:
        """Renamings from the names on disk to those in memory."""
        from transformers.core_model_loading import WeightRenaming

        if not self.pre_quantized:
            return []
        return [
            WeightRenaming(rf"\.{disk}\{suffix_on_disk}$", f".{name}{suffix}")
            for name, disk in DISK_NAMES.items()
            for suffix, suffix_on_disk in DISK_SUFFIXES.items()
        ]

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """State dict with packed weights under their names on disk."""
        renamed = dict(_disk_names(model))
        return {renamed.get(name, name): tensor for name, tensor in model.state_dict().items()}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise NotImplementedError(
            "a moeft model is not restored in place; load the 16-bit base checkpoint instead, "
            "or use moeft.kernels.nf4.dequantize on single weights"
        )


def replace_modules(model: nn.Module, family: families.Family, config: NF4Config) -> list[PackedModule]:
    """Put packed modules, still without bytes, in the place of those that a config names, and return them.

    Raises:
        UnsupportedModelError: If the model has none of what the config names.
    """
    replaced: list[PackedModule] = []
    found = set()
    for name, module in list(model.named_modules()):
        below = family.below_layer(name)
        component = family.component(name)
        if below is None or config.skips(name) or not config.wants(component):
            continue
        if below == family.experts:
            replacement: PackedModule = _packed_experts(name, module, family, config)
        elif isinstance(module, nn.Linear) and below in family.linears.get(component, ()):
            replacement = NF4Linear(module, config.block_size, config.double_quant)
        else:
            continue
        model.set_submodule(name, replacement)
        replaced.append(replacement)
        found.add(component)
    # Dense feed-forward layers are pure extra: many families have none.
    for component in ("experts", "attention"):
        if config.wants(component) and component not in found:
            raise UnsupportedModelError(
                f"NF4Config({component}=True), but this {family.name} model has no {component} that moeft knows; "
                f"load it with NF4Config({component}=False, ...)"
            )
    return replaced


def _packed_experts(name: str, module: nn.Module, family: families.Family, config: NF4Config) -> NF4Experts:
    spec = experts_module.read(name, module, family)
    gate_up, down = (getattr(module, stack).shape for stack in STACKS)
    return NF4Experts(
        gate_up,
        down,
        spec.activation,
        config.block_size,
        config.double_quant,
        spec.layout,
        **experts_module.biases(module),
    )


def _disk_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name in memory and name on disk of every tensor of every packed weight."""
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            for weight, members in module.packed_members().items():
                for member in members:
                    disk = DISK_NAMES[weight] + DISK_SUFFIXES[member.removeprefix(weight)]
                    yield f"{path}.{member}", f"{path}.{disk}"
