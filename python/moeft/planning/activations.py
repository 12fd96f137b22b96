"""Bytes that the forward pass keeps for the backward pass, from the structure of a layer.

Counted tensor by tensor as PyTorch saves them: a norm of transformers keeps its input in float32, a fused one as it is,
scaled-dot-product attention its operands and output, a product both factors, a frozen linear layer nothing. LoRA keeps
the input of a layer and the rank-sized product. The tests hold the sums to
``torch.autograd.graph.saved_tensors_hooks``.

T tokens, S tokens per row, e bytes per element of the compute type.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeft.planning.adapters import rank_of
from moeft.planning.layers import Layer, Traits
from moeft.planning.settings import Settings
from moeft.planning.weights import FLOAT_BYTES

FLASH_HEAD_DIM = 256  # above it, transformers repeats keys and values for every query head before attention
F32 = 4
INT64 = 8


def saved_bytes(layers: Sequence[Layer], traits: Traits, settings: Settings) -> int:
    """Bytes alive when the forward pass of a micro-batch ends, without the loss head's own gradient."""
    tokens, element = settings.tokens, FLOAT_BYTES[settings.dtype]
    hidden = layers[-1].hidden
    last_norm = _norm(tokens, hidden, 1, traits, settings)
    if settings.checkpointing == "full":
        return len(layers) * element * tokens * hidden + last_norm
    if settings.checkpointing == "keep_norm_inputs":
        return sum(_kept_outputs(layer, traits, settings) for layer in layers) + last_norm
    rotary = 2 * element * settings.row_tokens * sum({layer.window: layer.head_dim for layer in layers}.values())
    # The first norm reads embeddings, which need no gradient.
    unneeded = _norm(tokens, hidden, 1, traits, settings)
    return sum(layer_bytes(layer, traits, settings) for layer in layers) + last_norm + rotary - unneeded


def head_gradient_bytes(layers: Sequence[Layer], settings: Settings) -> int:
    """Bytes that the loss keeps: the gradient of the hidden states, and the positions of the rows that count."""
    return settings.tokens * (FLOAT_BYTES[settings.dtype] * layers[-1].hidden + INT64)


def layer_bytes(layer: Layer, traits: Traits, settings: Settings) -> int:
    """Bytes that one layer keeps when nothing of it is recomputed."""
    return (
        _norms(layer, traits, settings)
        + _attention(layer, traits, settings)
        + _mlp(layer, settings)
        + _experts(layer, settings)
    )


def recomputed_bytes(layer: Layer, traits: Traits, settings: Settings) -> int:
    """Bytes of one layer while backward runs through it again: all of it, or its norms and its largest block."""
    if settings.checkpointing == "full":
        return layer_bytes(layer, traits, settings)
    attention, mlp, experts = _attention(layer, traits, settings), _mlp(layer, settings), _experts(layer, settings)
    blocks = (attention, mlp, experts) if traits.parallel_experts else (attention, mlp + experts)
    return _norms(layer, traits, settings) + max(blocks)


def is_masked(layer: Layer, settings: Settings) -> bool:
    """Whether attention of this layer takes a mask instead of its plain causal form."""
    return settings.masked or (layer.window is not None and settings.row_tokens > layer.window)


def _norm(tokens: int, width: int, rows: int, traits: Traits, settings: Settings) -> int:
    """Input, in float32 unless the norm is fused, and the statistics of every row."""
    if settings.fused_norms:
        return tokens * (FLOAT_BYTES[settings.dtype] * width + F32 * rows)
    return F32 * tokens * (width + rows * traits.norm_statistics)


def _keeps_what_it_reads(settings: Settings) -> bool:
    """Whether a norm keeps the very tensor that it reads, which others may keep as well, and no copy of its own."""
    return settings.fused_norms or settings.dtype == "float32"


def _kept_outputs(layer: Layer, traits: Traits, settings: Settings) -> int:
    """Under "keep_norm_inputs": the input of a layer and the output of each of its blocks, a router's choice too."""
    tokens, parallel = settings.tokens, traits.parallel_experts and layer.experts > 0
    blocks = 2 + (parallel and layer.mlp > 0)  # attention; feed-forward, in one or with experts beside it
    router = tokens * (F32 * layer.experts + (F32 + INT64) * layer.top_k) if parallel else 0
    return FLOAT_BYTES[settings.dtype] * tokens * layer.hidden * (1 + blocks) + router


def _norm_inputs(layer: Layer, traits: Traits) -> int:
    return layer.norms - (traits.shared_norm_inputs if layer.experts else 0)


def _norms(layer: Layer, traits: Traits, settings: Settings) -> int:
    tokens = settings.tokens
    router = traits.router_norm and layer.experts > 0
    total = layer.norms + router
    inputs = _norm_inputs(layer, traits) if _keeps_what_it_reads(settings) else total
    return _norm(tokens, inputs * layer.hidden, total, traits, settings)


def _attention(layer: Layer, traits: Traits, settings: Settings) -> int:
    tokens, element = settings.tokens, FLOAT_BYTES[settings.dtype]
    masked = is_masked(layer, settings)
    repeated = masked or layer.head_dim > FLASH_HEAD_DIM
    key = layer.query if repeated else layer.key
    saved = element * tokens * (2 * layer.query + 2 * key) + F32 * tokens * layer.heads
    if masked:
        saved += element * settings.rows * settings.row_tokens**2
    if layer.qk_norm_rows:
        saved += _norm(tokens, layer.query + layer.key, layer.qk_norm_rows, traits, settings)
        if traits.value_norm:
            own_input = layer.value_projection or not _keeps_what_it_reads(settings)
            saved += _norm(tokens, layer.key * own_input, layer.key // layer.head_dim, traits, settings)
    if "attention" in settings.lora.targets:
        inputs = 2 + layer.value_projection
        ranks = rank_of(settings.lora, "attention") * (inputs + 1)
        saved += _lora(settings, layer.hidden, inputs, layer.query, ranks, shared=True)
    return saved


def _mlp(layer: Layer, settings: Settings) -> int:
    if not layer.mlp:
        return 0
    saved = 3 * FLOAT_BYTES[settings.dtype] * settings.tokens * layer.mlp
    if "mlp" in settings.lora.targets:
        saved += _lora(settings, layer.hidden, 2, layer.mlp, 3 * rank_of(settings.lora, "mlp"), shared=False)
    return saved


def _lora(settings: Settings, hidden: int, readers: int, output_width: int, ranks: int, *, shared: bool) -> int:
    """Inputs that adapters keep: of ``readers`` layers of the hidden state, and of the layer that ends the block.

    The readers share one tensor in the model's type, and the output layer of attention reads what attention keeps
    already (``shared``). With dropout PEFT computes: each layer keeps a copy of its own.
    """
    element, adapter = FLOAT_BYTES[settings.dtype], FLOAT_BYTES[settings.adapter_dtype]
    if settings.lora.dropout:
        element = adapter
    else:
        readers, output_width = 1, 0 if shared else output_width
    return settings.tokens * (element * (hidden * readers + output_width) + adapter * ranks)


def _experts(layer: Layer, settings: Settings) -> int:
    if not layer.experts:
        return 0
    tokens, element, rows = settings.tokens, FLOAT_BYTES[settings.dtype], settings.tokens * layer.top_k
    router = F32 * tokens * (layer.experts + 1) + (F32 + INT64) * rows
    block = element * tokens * layer.hidden + element * rows * 2 * layer.expert + (F32 + 2 * INT64) * rows
    if "experts" in settings.lora.targets:
        block += 2 * element * rows * rank_of(settings.lora, "experts")
    return router + block
