"""Let a causal language model compute its training loss without full logits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from moeft.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainHead(NamedTuple):
    """A head that is a matrix and perhaps a soft cap of its products."""

    weight: Tensor
    softcap: float | None


def plain_head(model: PreTrainedModel) -> PlainHead | None:
    """Head of a causal language model of transformers; None if it is not a plain linear layer over ``model.model``."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not hasattr(model, "model"):
        return None
    return PlainHead(head.weight, getattr(model.config.get_text_config(), "final_logit_softcapping", None))


def fuse_loss(model: PreTrainedModel) -> bool:
    """Replace the loss of this model instance by :func:`moeft.kernels.linear_cross_entropy`.

    Called with ``labels``, the model then returns the loss and no logits. The forward is replaced on the instance, so
    that wrappers of the model (DDP, FSDP, PEFT) keep calling it as before. A call that asks for router logits goes to
    the original forward, which adds their loss. Fusing again changes nothing.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.

    Returns:
        False if the model computes its loss in a way that this cannot replace: a head that is not a plain linear
        layer, or an auxiliary router loss.
    """
    head = plain_head(model)
    if head is None or getattr(model.config.get_text_config(), "output_router_logits", False):
        return False
    softcap = head.softcap
    original = model.forward
    if getattr(original, "loss_is_fused", False):
        return True

    @functools.wraps(original)
    def forward(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        if kwargs.get("output_router_logits"):
            return original(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = model.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        labels = labels.to(hidden.device)[:, 1:]
        loss = linear_cross_entropy(hidden[:, :-1], model.get_output_embeddings().weight, labels, softcap)
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        # A number of the host stays one: making it a tensor on a GPU would wait for the device.
        count = count.to(loss.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        return CausalLMOutputWithPast(loss=loss / count)

    forward.loss_is_fused = True  # type: ignore[attr-defined]
    model.forward = forward
    return True
