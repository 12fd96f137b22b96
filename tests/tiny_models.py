"""Tiny random models of every family, with odd sizes where a layout bug would hide behind round ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

# transformers 5.17 keeps the experts of Aria in modules of their own.
ARIA = ("aria",) if hasattr(transformers.models.aria.modeling_aria, "AriaTextTopKRouter") else ()
# One of each way in which experts are stored and named: most tests of experts run for these.
FAMILY_NAMES = ("gemma4", "qwen3_moe", "olmoe", "mixtral", "gpt_oss")
MOE_NAMES = (*FAMILY_NAMES, "qwen3_next", "qwen3_5_moe", "deepseek_v3", "glm4_moe", "granitemoe")
MOE_NAMES += ("granitemoehybrid", "minimax", "phimoe", "lfm2_moe", *ARIA)
DENSE_NAMES = ("gemma4_e4b", "gemma3", "llama", "qwen3")
# Mixture-of-Experts models of transformers that have no family file.
UNKNOWN_NAMES = ("flex_olmo", "dots1", "ernie4_5_moe")
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


LINEAR_ATTENTION: dict[str, Any] = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
CONFIGS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "gemma4": (
        transformers.Gemma4TextConfig,
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 7,
            "top_k_experts": 3,
            "moe_intermediate_size": 48,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **MOE,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 5,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        {"intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 5, "num_experts_per_tok": 2},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {"intermediate_size": 80, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        {
            **MOE,
            **LINEAR_ATTENTION,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 5,
            "shared_expert_intermediate_size": 28,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_only_layers": [2],
        },
    ),
    "qwen3_5_moe": (
        transformers.Qwen3_5MoeTextConfig,
        {
            **MOE,
            **LINEAR_ATTENTION,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_experts": 5,
            "shared_expert_intermediate_size": 28,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            **MOE,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 20,
        },
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        {
            **MOE,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "n_routed_experts": 5,
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoe": (
        transformers.GraniteMoeConfig,
        {
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "logits_scaling": 6.0,
        },
    ),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        {
            "intermediate_size": 20,
            "shared_intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "logits_scaling": 6.0,
        },
    ),
    "minimax": (
        transformers.MiniMaxConfig,
        {
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "block_size": 8,
        },
    ),
    "phimoe": (
        transformers.PhimoeConfig,
        {"intermediate_size": 20, "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "lfm2_moe": (
        transformers.Lfm2MoeConfig,
        {
            **MOE,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "aria": (
        transformers.AriaTextConfig,
        {
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "moe_num_experts": 5,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
    ),
    "gemma4_e4b": (
        transformers.Gemma4TextConfig,
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "hidden_size_per_layer_input": 24,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama": (transformers.LlamaConfig, {"intermediate_size": 96, "num_hidden_layers": 2}),
    "qwen3": (transformers.Qwen3Config, {"intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}),
    "flex_olmo": (
        transformers.FlexOlmoConfig,
        {"intermediate_size": 20, "num_hidden_layers": 2, "num_experts": 5, "num_experts_per_tok": 2},
    ),
    "dots1": (
        transformers.Dots1Config,
        {
            **MOE,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
    ),
    "ernie4_5_moe": (
        transformers.Ernie4_5_MoeConfig,
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 20,
            "num_hidden_layers": 2,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_layer_start_index": 1,
        },
    ),
}


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """Config of a model with a few ten thousand parameters."""
    config, options = CONFIGS[family]
    return config(**{**COMMON, **options})


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
