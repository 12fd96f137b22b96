"""Load a model and its tokenizer in one call, completely or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeft import _core, families
from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.integration import loading_check, model_family
from moeft.integration.cpu_linears import multiply_in_core
from moeft.integration.placing import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeft.integration.nf4_config import NF4Config


PACKING = ("experts", "attention", "mlp", "double_quant", "block_size")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load(
    path: str | Path,
    config: NF4Config | None = None,
    text_only: bool = True,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a 16-bit or packed checkpoint and its tokenizer.

    Returns:
        The model, in evaluation mode, and its tokenizer; None if the folder has none.

    Raises:
        CheckpointError, UnsupportedModelError: As :func:`load_model`, whose arguments these are.
    """
    import transformers

    model = load_model(path, config, text_only, dtype, device)
    has_tokenizer = any((Path(path) / name).exists() for name in TOKENIZER_FILES)
    return model, transformers.AutoTokenizer.from_pretrained(path) if has_tokenizer else None


def load_model(
    path: str | Path,
    config: NF4Config | None = None,
    text_only: bool = True,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a 16-bit or packed checkpoint, in evaluation mode.

    Args:
        path: Folder of the checkpoint.
        config: Quantise while loading; not needed for a packed checkpoint.
        text_only: Of a multimodal checkpoint, load the language model alone.
        dtype: Of everything that is not packed.
        device: Where to put the model; default the CPU.

    Raises:
        CheckpointError: If the folder is no checkpoint, a shard is missing or damaged, or a weight is missing,
            misshapen, or cannot be converted.
        UnsupportedModelError: If the family is unknown and the model has no experts that can be read without its file.
    """
    import transformers

    from moeft.integration.nf4_config import QUANT_METHOD

    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; give the folder of a checkpoint, downloaded if need be")
    _core.tensors(str(path))  # Reads every header, so that a damaged shard is named before minutes of loading.
    model_config = transformers.AutoConfig.from_pretrained(path)
    family = _known_family(model_config.model_type)
    # A misshapen weight raises our own error below, which names it.
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    # transformers warns about a config that a packed checkpoint does not need.
    if config is not None and not _is_packed_alike(path, model_config, config):
        options["quantization_config"] = config
    is_packed = _packing(model_config).get("quant_method") == QUANT_METHOD
    if device is not None and not is_packed:  # packed bytes go from the files to the device without a stop
        options["device_map"] = {"": device}
    model_class = transformers.AutoModelForCausalLM
    text_config = getattr(model_config, "text_config", None)
    renaming: dict[str, str] = {}
    if text_only and text_config is not None and family and family.text_class and family.disk_prefix:
        quantization = getattr(model_config, "quantization_config", None)
        if quantization is not None:
            text_config.quantization_config = quantization
        model_class = getattr(transformers, family.text_class)
        renaming = {f"^{re.escape(family.disk_prefix)}": "model."}
        outer = family.disk_prefix.removesuffix("model.")  # an untied head lies beside the text model
        renaming[f"^{re.escape(outer)}lm_head\\."] = "lm_head."
        options |= {"config": text_config, "key_mapping": renaming}
    elif type(model_config) not in model_class._model_mapping:
        raise UnsupportedModelError(
            f"{path} has model_type {model_config.model_type!r}, which transformers has no causal language model for; "
            "moeft.load takes language models, and of multimodal ones the families that docs/families.md names"
        )
    model, info = model_class.from_pretrained(path, **options)
    loading_check.check(info["missing_keys"], info["mismatched_keys"], info.get("conversion_errors", {}))
    if family is None:
        model_family.of_model(model)
    if renaming:
        _forget(model, renaming)
    if device is not None and is_packed:
        place(model, device, sorted(path.glob("*.safetensors")))
    multiply_in_core(model)
    return model


def _known_family(model_type: str) -> families.Family | None:
    """The family's file, if there is one; a model without is judged by its modules, once it is built."""
    try:
        return families.for_model_type(model_type)
    except UnsupportedModelError:
        return None


def _forget(model: PreTrainedModel, renaming: dict[str, str]) -> None:
    """Let ``save_pretrained`` write the names of the model as it is, not those of the checkpoint it came from."""
    model._weight_conversions = [
        conversion for conversion in model._weight_conversions if renaming.keys().isdisjoint(conversion.source_patterns)
    ]


def _packing(model_config: Any) -> dict[str, Any]:
    """How a checkpoint is quantised; empty if it is not."""
    found = getattr(model_config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _is_packed_alike(path: str | Path, model_config: Any, config: NF4Config) -> bool:
    """Whether a checkpoint is packed as a config asks; one packed in another way is refused, not loaded as it is."""
    found = _packing(model_config)
    if not found:
        return False
    differing = [key for key in PACKING if found.get(key) != getattr(config, key)]
    if differing:
        asked = ", ".join(f"{key} {found.get(key)} instead of {getattr(config, key)}" for key in differing)
        raise CheckpointError(
            f"{path} is already packed, with {asked}; load it without a config, or pack the 16-bit checkpoint again"
        )
    return True
