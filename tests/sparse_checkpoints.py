"""Checkpoints of hundreds of megabytes that take no disk: a header, and zeros that no file system stores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import transformers
import transformers.quantizers  # registers ours, which must not be imported first

import moeft
from moeft.integration import model_family
from moeft.integration.quantizer import NF4Quantizer, replace_modules

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}


def write_sparse(config: transformers.PreTrainedConfig, folder: Path, packing: moeft.NF4Config | None = None) -> Path:
    """A bfloat16 checkpoint of a config, packed or not, whose weights are all zero; returns its folder."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = model.state_dict()
    if packing is not None:
        replace_modules(model, model_family.of_model(model), packing)
        tensors, _ = NF4Quantizer(packing).get_state_dict_and_metadata(model)
        config.quantization_config = packing.to_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(folder)
    return folder
