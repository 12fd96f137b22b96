"""Attention masks for two answers behind one prompt, which is computed once.

A token of an answer sees the prompt and its own answer up to itself; a sliding window counts positions, which go on
from the prompt in both answers, not places in the row.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeft.integration.document_masks import (
    FULL,
    MASKED_ATTENTION,
    SLIDING,
    attention_kinds,
    causal,
    masks_of,
)
from moeft.integration.embedding_gradient import embedding_gradient

PREFIX = 0
"""Segment of the prompt; every other number is an answer of its own."""
PROBE_TOKENS = 4


def prefix_masks(model: Any, segments_BS: Tensor, position_ids_BS: Tensor) -> Any:
    """What to pass to the model as ``attention_mask``.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper, that :func:`shares_prefix` accepts.
        segments_BS: Which part of a pair a token belongs to.
        position_ids_BS: Positions.

    Returns:
        A mask ``[B, 1, S, S]``, or one for each kind of attention layer.
    """
    return masks_of(model, _visible(segments_BS), position_ids_BS)


def shares_prefix(model: Any) -> bool:
    """Whether the model computes two answers behind one prompt as it would each of them alone.

    Asked of the model: the last hidden states of the second answer must have a gradient of exactly zero with respect
    to the embeddings of the first, and another one with respect to the prompt's. Layers that carry a state from token
    to token fail, and so do attention kernels that take no mask.

    Args:
        model: A causal language model of transformers, with or without adapters.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if config._attn_implementation not in MASKED_ATTENTION or not set(attention_kinds(config)) <= {FULL, SLIDING}:
        return False
    device = base.get_input_embeddings().weight.device
    segments = torch.arange(3, device=device).repeat_interleave(PROBE_TOKENS)[None]
    positions = torch.arange(3 * PROBE_TOKENS, device=device)[None] - PROBE_TOKENS * (segments == 2)
    inputs = {
        "input_ids": torch.arange(3 * PROBE_TOKENS, device=device)[None] % 2 + 1,  # ids that any vocabulary has
        "position_ids": positions,
        "attention_mask": prefix_masks(base, segments, positions),
    }
    gradient_SH = embedding_gradient(base, inputs, slice(2 * PROBE_TOKENS, None))
    prompt, first_answer = gradient_SH[:PROBE_TOKENS], gradient_SH[PROBE_TOKENS : 2 * PROBE_TOKENS]
    return bool(prompt.any()) and not first_answer.any()


def _visible(segments_BS: Tensor) -> Tensor:
    of_query, of_key = segments_BS[:, :, None], segments_BS[:, None, :]
    return causal(segments_BS.shape[1], segments_BS.device) & ((of_key == PREFIX) | (of_key == of_query))
