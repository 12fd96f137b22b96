"""Attention over a prefix tree: each token sees the tokens on its way from the root, and no other branch.

Several continuations of one text then share its tokens in one forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"


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
        return {FULL: _additive(ancestors_SS, dtype), SLIDING: _additive(near_SS, dtype)}
    return _additive(ancestors_SS if kinds == {FULL} else near_SS, dtype)


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
    if kinds or config._attn_implementation not in ("sdpa", "eager"):
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
    embeddings: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    handle = embedding.register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            states = model.model(
                input_ids=torch.tensor([[1, 2, 1, 2, 2, 1]], device=device),
                position_ids=depth_S[None].to(device),
                attention_mask=tree_mask(model, ancestors_SS.to(device), depth_S.to(device)),
                use_cache=False,
            ).last_hidden_state
            (grad,) = torch.autograd.grad(states[0, -1].float().square().sum(), embeddings[0])
    except (TypeError, ValueError, RuntimeError):
        return False  # Such as a forward that takes no mask of this shape.
    finally:
        handle.remove()
    seen_S = grad[0].abs().amax(-1) > 0
    return bool((seen_S.cpu() == ancestors_SS[-1]).all())


def _additive(visible_SS: Tensor, dtype: torch.dtype) -> Tensor:
    # Scores take the mask by addition in every implementation that takes one at all; a bool mask is sdpa's alone.
    blocked = torch.finfo(dtype).min
    return torch.zeros(visible_SS.shape, dtype=dtype, device=visible_SS.device).masked_fill_(~visible_SS, blocked)[
        None, None
    ]
