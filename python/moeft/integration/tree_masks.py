"""Attention over a prefix tree: each token sees the tokens on its way from the root, and no other branch.

Several continuations of one text then share its tokens in one forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeft.integration.document_masks import FULL, MASKED_ATTENTION, SLIDING, as_added
from moeft.integration.embedding_gradient import embedding_gradient


def tree_mask(model: Any, ancestors_SS: Tensor, depth_S: Tensor) -> Tensor | dict[str, Tensor]:
    """The ``attention_mask`` that makes a model read its row as a tree; positions have to be the depths.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.
        ancestors_SS: Whether the token of the column lies on the way to that of the row, itself included; bool.
        depth_S: Tokens before each one on its way, int64.

    Returns:
        ``[1, 1, S, S]`` to be added to attention scores; for a model with layers of several kinds, one per kind.
    """
    config = model.config.get_text_config()
    dtype = model.get_input_embeddings().weight.dtype
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    near_SS = ancestors_SS
    if window is not None:
        near_SS = ancestors_SS & (depth_S[:, None] - depth_S[None, :] < window)
    if SLIDING in kinds:
        return {FULL: as_added(ancestors_SS[None], dtype), SLIDING: as_added(near_SS[None], dtype)}
    return as_added((ancestors_SS if kinds == {FULL} else near_SS)[None], dtype)


def reads_trees(model: Any) -> bool:
    """Whether a model keeps branches apart and shows each what it shares, asked of the model itself.

    A stem of two tokens with two branches is run. The last hidden state of a branch must have a gradient of exactly
    zero with respect to the embeddings of the other one, and none of zero with respect to each token of the stem.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.
    """
    # Attention that takes no mask, and layers that carry a state from token to token, cannot be told what to see.
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds or config._attn_implementation not in MASKED_ATTENTION:
        return False
    depth_S = torch.tensor([0, 1, 2, 3, 2, 3])
    ancestors_SS = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    device = model.get_input_embeddings().weight.device
    inputs = {
        "input_ids": torch.tensor([[1, 2, 1, 2, 2, 1]], device=device),
        "position_ids": depth_S[None].to(device),
        "attention_mask": tree_mask(model, ancestors_SS.to(device), depth_S.to(device)),
    }
    try:
        gradient_SH = embedding_gradient(model, inputs, slice(-1, None))
    except (TypeError, ValueError, RuntimeError):
        return False  # Such as a forward that takes no mask of this shape.
    seen_S = gradient_SH.abs().amax(-1) > 0
    return bool((seen_S.cpu() == ancestors_SS[-1]).all())
