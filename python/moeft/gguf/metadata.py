"""Keys and values that tell llama.cpp how a model computes, one function per architecture.

Source: the loaders of llama.cpp, ``src/models/*.cpp``, and ``gguf/constants.py`` for the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.gguf.config import TextConfig
from moeft.gguf.values import Metadata, Value, array, float32, string, uint32

Keys = dict[str, Value]


def metadata(name: str, config: TextConfig, title: str) -> Metadata:
    """All keys but those of the tokenizer and of the types.

    Args:
        name: The architecture.
        config: The model.
        title: What the model is called.

    Raises:
        CheckpointError: If the config lacks a field.
        UnsupportedModelError: If the model computes in a way that llama.cpp's architecture does not.
    """
    general = {"architecture": string(name), "type": string("model"), "name": string(title)}
    keys = {**_common(config), **_ARCHITECTURES[name](config)}
    return [(f"general.{key}", value) for key, value in general.items()] + [
        (f"{name}.{key}", value) for key, value in keys.items()
    ]


def _common(config: TextConfig) -> Keys:
    heads = config.get("num_attention_heads")
    return {
        "block_count": uint32(config.get("num_hidden_layers")),
        "context_length": uint32(config.get("max_position_embeddings")),
        "embedding_length": uint32(config.get("hidden_size")),
        "feed_forward_length": uint32(config.get("intermediate_size")),
        "attention.head_count": uint32(heads),
        "attention.head_count_kv": uint32(config.get("num_key_value_heads", default=heads)),
        "attention.layer_norm_rms_epsilon": float32(config.get("rms_norm_eps")),
        "attention.key_length": uint32(config.head_dim),
        "attention.value_length": uint32(config.head_dim),
        "rope.freq_base": float32(config.rope()["rope_theta"]),
        "vocab_size": uint32(config.get("vocab_size")),
    }


def _experts(config: TextConfig) -> Keys:
    return {
        "expert_count": uint32(config.get("num_experts", "num_local_experts")),
        "expert_used_count": uint32(config.get("num_experts_per_tok", "top_k_experts")),
    }


def _linear_scaling(config: TextConfig) -> Keys:
    rope = config.rope()
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return {}
    if kind != "linear":
        raise UnsupportedModelError(f"rope_type is {kind!r}, expected default, linear or llama3; moeft writes no other")
    return {"rope.scaling.type": string("linear"), "rope.scaling.factor": float32(rope["factor"])}


def _llama(config: TextConfig) -> Keys:
    if config.get("attention_bias", default=False) or config.get("mlp_bias", default=False):
        raise UnsupportedModelError("attention_bias or mlp_bias is set, expected a Llama without biases")
    return {"rope.dimension_count": uint32(config.head_dim), **_linear_scaling(config)}


def _olmoe(config: TextConfig) -> Keys:
    if config.get("clip_qkv", default=None) is not None:
        raise UnsupportedModelError("clip_qkv is set, which llama.cpp's olmoe does not know")
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", default=heads) != heads:
        raise UnsupportedModelError("heads share keys and values, which llama.cpp's olmoe does not know")
    if config.get("norm_topk_prob", default=False):
        raise UnsupportedModelError("norm_topk_prob is set, which llama.cpp's olmoe does not know")
    return {**_experts(config), **_linear_scaling(config)}


def _qwen3moe(config: TextConfig) -> Keys:
    if config.get("mlp_only_layers", default=[]) or config.get("decoder_sparse_step", default=1) != 1:
        raise UnsupportedModelError("some layers have no experts, but llama.cpp's qwen3moe has them in every layer")
    if not config.get("norm_topk_prob", default=False):
        raise UnsupportedModelError("norm_topk_prob is not set, but llama.cpp's qwen3moe always normalises")
    width = uint32(config.get("moe_intermediate_size"))
    return {**_experts(config), "expert_feed_forward_length": width, **_linear_scaling(config)}


def _gemma3(config: TextConfig) -> Keys:
    keys = {"attention.sliding_window": uint32(config.get("sliding_window")), **_linear_scaling(config)}
    pattern = config.get("layer_types", default=None)
    period = int(config.get("sliding_window_pattern", default=6))
    expected = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(len(pattern or ()))]
    if period != 6 or (pattern is not None and list(pattern) != expected):
        raise UnsupportedModelError("every sixth layer must have full attention, which llama.cpp's gemma3 assumes")
    keys["rope.freq_base_swa"] = float32(config.rope("sliding_attention")["rope_theta"])
    cap = config.get("final_logit_softcapping", default=None)
    return {**keys, **({"final_logit_softcapping": float32(cap)} if cap else {})}


def _gemma4(config: TextConfig) -> Keys:
    types = list(config.get("layer_types"))
    is_full = [kind == "full_attention" for kind in types]
    heads, head_dims = zip(*(_gemma4_heads(config, index, full) for index, full in enumerate(is_full)), strict=True)
    full_dim = max((dim for dim, full in zip(head_dims, is_full, strict=True) if full), default=config.head_dim)
    shared = int(config.get("num_kv_shared_layers", default=0))
    keys = {
        "attention.head_count_kv": array("int32", heads),
        "attention.key_length": uint32(full_dim),
        "attention.value_length": uint32(full_dim),
        "attention.key_length_swa": uint32(config.head_dim),
        "attention.value_length_swa": uint32(config.head_dim),
        "attention.sliding_window": uint32(config.get("sliding_window")),
        "attention.sliding_window_pattern": array("bool", [not full for full in is_full]),
        "attention.shared_kv_layers": uint32(shared),
        "rope.freq_base": float32(config.rope("full_attention")["rope_theta"]),
        "rope.freq_base_swa": float32(config.rope("sliding_attention")["rope_theta"]),
        "rope.dimension_count": uint32(full_dim),
        "rope.dimension_count_swa": uint32(config.head_dim),
        "embedding_length_per_layer_input": uint32(config.get("hidden_size_per_layer_input", default=0)),
    }
    if config.get("use_double_wide_mlp", default=False):
        width = int(config.get("intermediate_size"))
        keys["feed_forward_length"] = array(
            "int32", [width * (2 if shared and index >= len(types) - shared else 1) for index in range(len(types))]
        )
    cap = config.get("final_logit_softcapping", default=None)
    if cap:
        keys["final_logit_softcapping"] = float32(cap)
    if config.get("enable_moe_block", default=False):
        keys.update(_experts(config))
        keys["expert_feed_forward_length"] = uint32(config.get("moe_intermediate_size"))
    return keys


def _gemma4_heads(config: TextConfig, layer: int, is_full: bool) -> tuple[int, int]:
    """Heads of keys and values, and values of a head, of one layer, in either spelling."""
    own = {int(key): value for key, value in config.get("per_layer_config", default={}).items()}.get(layer, {})
    heads = own.get("num_key_value_heads") or (
        is_full
        and config.get("attention_k_eq_v", default=False)
        and config.get("num_global_key_value_heads", default=0)
    )
    head_dim = own.get("head_dim") or (is_full and config.get("global_head_dim", default=0)) or config.head_dim
    return int(heads or config.get("num_key_value_heads")), int(head_dim)


def rope_factors(name: str, config: TextConfig) -> list[float]:
    """What every rotary frequency is divided by; empty if nothing is. The tensor ``rope_freqs.weight``.

    Source: Llama 3's scaling as in transformers' ``modeling_rope_utils.py``; Gemma 4's proportional rotation.
    """
    rope = config.rope()
    kind = rope.get("rope_type", "default")
    if name == "gemma4":
        types = list(config.get("layer_types"))
        if "full_attention" not in types:
            return []
        head_dim = _gemma4_heads(config, types.index("full_attention"), True)[1]
        rotated = int(head_dim * float(rope.get("partial_rotary_factor", 1.0)) / 2)
        return [1.0] * rotated + [1e30] * (head_dim // 2 - rotated)
    if kind != "llama3":
        return []
    try:
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(rope["original_max_position_embeddings"])
    except KeyError as error:
        raise CheckpointError(f"the rotary parameters of {config.path} have no {error.args[0]}") from error
    factors = []
    for index in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (index / config.head_dim)
        smooth = (context / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else None
        factors.append(blended or (1.0 if smooth >= 1 else factor))
    return factors


_ARCHITECTURES: dict[str, Callable[[TextConfig], Keys]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llama": _llama,
    "olmoe": _olmoe,
    "qwen3moe": _qwen3moe,
}
