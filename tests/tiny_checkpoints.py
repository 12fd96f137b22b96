"""Tiny random MoE checkpoints of four families, and plain PEFT adapters for them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
CONFIGS = {
    "gemma4": lambda: Gemma4TextConfig(
        **COMMON,
        vocab_size_per_layer_input=96,
        intermediate_size=72,
        num_hidden_layers=3,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=16,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=True,
        num_experts=5,
        top_k_experts=2,
        moe_intermediate_size=20,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON,
        head_dim=12,
        num_hidden_layers=3,
        intermediate_size=72,
        moe_intermediate_size=20,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "mixtral": lambda: MixtralConfig(
        **COMMON, num_hidden_layers=2, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2
    ),
    "olmoe": lambda: OlmoeConfig(
        **COMMON, num_hidden_layers=2, intermediate_size=20, num_experts=5, num_experts_per_tok=2
    ),
}
FAMILIES = sorted(CONFIGS)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def tiny_model(family: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A random model; every tensor that transformers starts at zero or one gets noise too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def save_base(folder: Path, family: str, dtype: torch.dtype, seed: int = 0, **options: object) -> Path:
    """Save a tiny model; ``options`` go to ``save_pretrained``."""
    tiny_model(family, dtype, seed).save_pretrained(folder, **options)
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
