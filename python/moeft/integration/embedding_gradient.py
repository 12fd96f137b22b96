"""What a token's hidden state depends on: the gradient with respect to the embeddings of a short row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def embedding_gradient(base: Any, inputs: dict[str, Any], seen_from: slice) -> Tensor:
    """Gradient of the last hidden states of some tokens with respect to the embeddings of all.

    Attention that masks a token gives it a weight of zero, which no rounding changes, so its gradient is exactly zero.

    Args:
        base: A causal language model of transformers, without a PEFT wrapper; its modes are put back afterwards.
        inputs: Arguments of its forward, for one row.
        seen_from: The tokens whose states count.

    Returns:
        ``[S, H]`` for S tokens.
    """
    embeddings: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    training = [module for module in base.modules() if module.training]
    handle = base.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            states = base.eval().base_model(**inputs, use_cache=False).last_hidden_state
            (grad,) = torch.autograd.grad(states[0, seen_from].float().square().sum(), embeddings[0])
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return grad[0]
