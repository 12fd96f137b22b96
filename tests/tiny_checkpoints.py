"""Tiny random checkpoints, plain PEFT adapters for them, and what lies in a folder."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.tiny_models import tiny_config

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def save_base(
    folder: Path, family: str | PreTrainedConfig, dtype: torch.dtype, seed: int = 0, **options: object
) -> Path:
    """Save a random model of a family or a config; every tensor that transformers starts at zero or one gets noise too.

    ``options`` go to ``save_pretrained``.
    """
    torch.manual_seed(seed)
    config = tiny_config(family) if isinstance(family, str) else family
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, **options)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, spread: float = 0.05, **options: object) -> Path:
    """Save a plain PEFT adapter of attention and experts with random factors; ``options`` go to ``LoraConfig``."""
    torch.manual_seed(seed)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "target_parameters": EXPERTS,
        "lora_dropout": 0.0,
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{**settings, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * spread
    model.save_pretrained(folder)
    return folder


def disk_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
