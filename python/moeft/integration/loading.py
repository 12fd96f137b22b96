"""Load a model and its tokenizer in one call, completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeft import families
from moeft.integration import loading_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeft.integration.nf4_config import NF4Config


def load(
    path: str | Path,
    config: NF4Config | None = None,
    text_only: bool = True,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a 16-bit or packed checkpoint.

    Args:
        path: Folder of the checkpoint.
        config: Quantise while loading; not needed for a packed checkpoint.
        text_only: Of a multimodal checkpoint, load the language model alone.
        dtype: Of everything that is not packed.
        device: Where to put the model; default the CPU.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: If a weight is missing, misshapen, or cannot be converted.
        UnsupportedModelError: If the family is unknown.
    """
    import transformers

    model_config = transformers.AutoConfig.from_pretrained(path)
    family = families.for_model_type(model_config.model_type)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if config is not None:
        options["quantization_config"] = config
    if device is not None:
        options["device_map"] = {"": device}
    model_class = transformers.AutoModelForCausalLM
    text_config = getattr(model_config, "text_config", None)
    if text_only and text_config is not None and family.text_class and family.multimodal_prefix:
        quantization = getattr(model_config, "quantization_config", None)
        if quantization is not None:
            text_config.quantization_config = quantization
        model_class = getattr(transformers, family.text_class)
        options |= {"config": text_config, "key_mapping": {f"^{family.multimodal_prefix}": "model."}}
    model, info = model_class.from_pretrained(path, **options)
    loading_check.check(info["missing_keys"], info["mismatched_keys"], info.get("conversion_errors", {}))
    return model, transformers.AutoTokenizer.from_pretrained(path)
