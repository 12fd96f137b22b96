"""Tiny random models of every family, with odd sizes where a layout bug would hide behind round ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILY_NAMES = ("gemma4", "qwen3_moe", "olmoe", "mixtral")
VOCABULARY = 192
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """Config of a model with a few ten thousand parameters."""
    if family == "gemma4":
        return transformers.Gemma4TextConfig(
            **COMMON,
            vocab_size_per_layer_input=VOCABULARY,
            intermediate_size=96,
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
            num_experts=7,
            top_k_experts=3,
            moe_intermediate_size=48,
            final_logit_softcapping=30.0,
            tie_word_embeddings=True,
        )
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **COMMON,
            intermediate_size=96,
            num_hidden_layers=3,
            head_dim=16,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            mlp_only_layers=[1],
        )
    if family == "olmoe":
        return transformers.OlmoeConfig(
            **COMMON, intermediate_size=32, num_hidden_layers=2, num_experts=5, num_experts_per_tok=2
        )
    if family == "mixtral":
        return transformers.MixtralConfig(
            **COMMON, intermediate_size=80, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
        )
    raise KeyError(family)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    """A model whose weights are large enough that experts and routing matter for the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_tiny_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Path:
    """Build and save one; returns its folder."""
    tiny_model(family, dtype, seed).save_pretrained(folder, **options)
    return folder


def token_ids(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomise_lora(model: torch.nn.Module, seed: int = 2, std: float = 0.1) -> None:
    """Fill every B, which starts at zero, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
