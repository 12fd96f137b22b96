"""Memory that lives only inside one operation: the loss head's chunk, and the backward pass of an expert block.

Follows the code of ``kernels/linear_cross_entropy``, ``kernels/grouped_linear`` and ``kernels/experts``; the tests hold
the two constants to theirs, which this package must not import because they bring torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeft.config.sft import Quantization
from moeft.planning.adapters import rank_of
from moeft.planning.layers import Layer
from moeft.planning.settings import Settings
from moeft.planning.weights import FLOAT_BYTES, Weight

LOSS_CHUNK_ELEMENTS = 1 << 25
MOST_LOSS_CHUNK_ROWS = 1024
WORKSPACE_BYTES = 64 << 20
CARD_PER_WORKSPACE = 120  # of a card's memory, unless that is less
LOGIT_BUFFERS = 2  # float32 buffers of a chunk of logits that serve all chunks


def loss_chunk_rows(vocabulary: int, settings: Settings) -> int:
    """Rows of logits in memory at a time."""
    return max(1, min(MOST_LOSS_CHUNK_ROWS, LOSS_CHUNK_ELEMENTS // max(1, vocabulary), settings.tokens))


def loss_head_bytes(vocabulary: int, hidden: int, settings: Settings) -> int:
    """Buffers of a chunk of logits, its product in the compute type, and the hidden states of the rows that count."""
    element = FLOAT_BYTES[settings.dtype]
    rows = loss_chunk_rows(vocabulary, settings)
    return (4 * LOGIT_BUFFERS + element) * rows * vocabulary + element * settings.tokens * hidden


def expert_backward_bytes(layers: Sequence[Layer], settings: Settings) -> int:
    """Rows that the backward pass of the widest expert block holds at once.

    With R routed rows: gradients and gathered input make three tensors of the hidden width, activations and their
    gradients five of the expert's width.
    """
    element = FLOAT_BYTES[settings.dtype]
    return max(
        (element * settings.tokens * layer.top_k * (3 * layer.hidden + 5 * layer.expert) for layer in layers), default=0
    )


def expert_lora_bytes(layers: Sequence[Layer], settings: Settings) -> int:
    """Factors of one layer's experts in the compute type and in another order, and their gradients likewise."""
    if "experts" not in settings.lora.targets:
        return 0
    rank, element = rank_of(settings.lora, "experts"), FLOAT_BYTES[settings.dtype]
    parameters = max((rank * layer.experts * (2 * layer.hidden + 3 * layer.expert) for layer in layers), default=0)
    return 2 * element * parameters


def workspace_bytes(weights: Sequence[Weight], quantization: Quantization | None, settings: Settings) -> int:
    """Buffer into which packed weights are restored: some experts at a time, a linear layer whole."""
    packed = [weight for weight in weights if weight.packed]
    element = FLOAT_BYTES[settings.dtype]
    buffer = max(WORKSPACE_BYTES, (settings.card_bytes or 0) // CARD_PER_WORKSPACE)
    largest = 0
    for weight in packed:
        if len(weight.shape) == 2:
            size = element * weight.parameters
        else:
            one = element * weight.parameters // weight.shape[0]
            size = min(element * weight.parameters, max(one, buffer))
            if quantization is not None and quantization.double_quant:
                size += 4 * weight.parameters // quantization.block_size  # the absmax of the stack in float32
        largest = max(largest, size)
    return largest


def mask_bytes(layers: Sequence[Layer], settings: Settings) -> int:
    """Boolean masks of a micro-batch: one per kind of attention that needs one."""
    windows = {layer.window for layer in layers}
    needed = [window for window in windows if settings.masked or (window and settings.row_tokens > window)]
    return len(needed) * settings.rows * settings.row_tokens**2
