"""Weights of a model from its config alone.

Source: ``modeling_gemma4.py``, ``modeling_qwen3_moe.py``, ``modeling_olmoe.py`` and ``modeling_mixtral.py`` of
transformers 5.23; the tests hold every shape to the models that these build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.families import Family
from moeft.planning.weights import Weight, component_of

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA_EXPERT_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")


def weights_from_config(family: Family, config: Mapping[str, Any]) -> list[Weight]:
    """Every parameter and persistent buffer of the text model that a config describes.

    Raises:
        UnsupportedModelError: If this family's shapes are not known here; headers tell them.
        CheckpointError: If a field is missing.
    """
    layer = LAYERS.get(family.name)
    if layer is None or config.get("hidden_size_per_layer_input"):
        raise UnsupportedModelError(
            f"the shapes of this {family.name} model cannot be told from its config alone; give a folder with weights"
        )
    try:
        named = list(_model(config, layer))
    except KeyError as error:
        raise CheckpointError(f"the config has no {error.args[0]}, which every {family.name} model has") from error
    return [Weight(name, shape, component_of(family, name)) for name, shape in named]


def _model(config: Mapping[str, Any], layer: Callable[[Mapping[str, Any], int], Named]) -> Named:
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        yield from ((f"model.layers.{index}.{name}", shape) for name, shape in layer(config, index))
    yield "model.norm.weight", (hidden,)
    if not _tied(config):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _tied(config: Mapping[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings")
    return str(config.get("model_type", "")).startswith("gemma") if tied is None else bool(tied)


def _gemma4_layer(config: Mapping[str, Any], index: int) -> Named:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    full = config["layer_types"][index] == "full_attention"
    # transformers writes `per_layer_config`, Google's own files the fields that it was made from.
    different = {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}  # "5" or "05"
    own = different.get(index, {})
    head_dim = own.get("head_dim") or (full and config.get("global_head_dim")) or config["head_dim"]
    kv_heads = own.get("num_key_value_heads") or (
        full and config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
    )
    kv_heads = kv_heads or config["num_key_value_heads"]
    has_value = not (full and config.get("attention_k_eq_v"))
    yield from _attention(hidden, heads * head_dim, kv_heads * head_dim, head_dim, head_dim, has_value)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield from ((f"{name}.weight", (hidden,)) for name in GEMMA_NORMS)
    yield "layer_scalar", (1,)
    yield from _mlp(hidden, config["intermediate_size"])
    if config.get("enable_moe_block"):
        experts = config["num_experts"]
        yield from ((f"{name}.weight", (hidden,)) for name in GEMMA_EXPERT_NORMS)
        yield "router.proj.weight", (experts, hidden)
        yield "router.scale", (hidden,)
        yield "router.per_expert_scale", (experts,)
        yield from _experts("experts", experts, hidden, config["moe_intermediate_size"])


def _qwen3_moe_layer(config: Mapping[str, Any], index: int) -> Named:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    yield from _plain_layer(config, head_dim, head_dim, head_dim)
    hidden, experts = config["hidden_size"], _num_experts(config)
    dense = index in (config.get("mlp_only_layers") or ()) or (index + 1) % (config.get("decoder_sparse_step") or 1)
    if dense or not experts:
        yield from _mlp(hidden, config["intermediate_size"])
    else:
        yield from _moe(hidden, experts, config["moe_intermediate_size"])


def _olmoe_layer(config: Mapping[str, Any], _: int) -> Named:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    # The norms of queries and keys span all heads.
    yield from _plain_layer(config, head_dim, config["hidden_size"], _kv_heads(config) * head_dim)
    yield from _moe(config["hidden_size"], _num_experts(config), config["intermediate_size"])


def _mixtral_layer(config: Mapping[str, Any], _: int) -> Named:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    yield from _plain_layer(config, head_dim, None, None)
    yield from _moe(config["hidden_size"], _num_experts(config), config["intermediate_size"])


def _plain_layer(config: Mapping[str, Any], head_dim: int, query_norm: int | None, key_norm: int | None) -> Named:
    hidden = config["hidden_size"]
    query, key = config["num_attention_heads"] * head_dim, _kv_heads(config) * head_dim
    yield from _attention(hidden, query, key, query_norm, key_norm, True)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _attention(
    hidden: int, query: int, key: int, query_norm: int | None, key_norm: int | None, has_value: bool
) -> Named:
    yield "self_attn.q_proj.weight", (query, hidden)
    yield "self_attn.k_proj.weight", (key, hidden)
    if has_value:
        yield "self_attn.v_proj.weight", (key, hidden)
    yield "self_attn.o_proj.weight", (hidden, query)
    if query_norm and key_norm:
        yield "self_attn.q_norm.weight", (query_norm,)
        yield "self_attn.k_norm.weight", (key_norm,)


def _mlp(hidden: int, inner: int) -> Named:
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _moe(hidden: int, experts: int, inner: int) -> Named:
    yield "mlp.gate.weight", (experts, hidden)
    yield from _experts("mlp.experts", experts, hidden, inner)


def _experts(module: str, experts: int, hidden: int, inner: int) -> Named:
    yield f"{module}.gate_up_proj", (experts, 2 * inner, hidden)
    yield f"{module}.down_proj", (experts, hidden, inner)


def _num_experts(config: Mapping[str, Any]) -> int:
    return config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


LAYERS: dict[str, Callable[[Mapping[str, Any], int], Named]] = {
    "gemma4": _gemma4_layer,
    "mixtral": _mixtral_layer,
    "olmoe": _olmoe_layer,
    "qwen3_moe": _qwen3_moe_layer,
}
