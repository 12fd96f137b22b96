"""Let a causal language model compute its training loss without full logits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from moeft.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Fields of configs by which models of transformers scale their logits."""


class PlainHead(NamedTuple):
    """A head that is a matrix and perhaps a soft cap of its products."""

    weight: Tensor
    softcap: float | None


def plain_head(model: PreTrainedModel) -> PlainHead | None:
    """Head of a causal language model of transformers, over :func:`head_states`.

    Returns:
        None if it is not a plain linear layer over ``model.model``, or its products are scaled in an unknown way.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not hasattr(model, "model"):
        return None
    if _logit_scale(model) is None:
        return None
    return PlainHead(head.weight, getattr(model.config.get_text_config(), "final_logit_softcapping", None))


def head_states(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """``[B, S, H]``, what goes into the head of a model that :func:`plain_head` knows, for arguments of its forward.

    These are the last hidden states, times the factor by which some models scale their logits.
    """
    hidden: Tensor = model.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    scale = _logit_scale(model)
    assert scale is not None
    return hidden if scale == 1 else hidden * scale


def _logit_scale(model: Any) -> float | None:
    """Factor of a model's logits; None if its config names one whose meaning is not known."""
    config = model.config.get_text_config()
    named = {name: getattr(config, name, None) for name in LOGIT_SCALES}
    scales = {name: float(value) for name, value in named.items() if value not in (None, 1)}
    if not scales:
        return 1.0
    # Granite divides by what HyperCLOVA X, under the same name, multiplies by.
    is_granite = scales.keys() == {"logits_scaling"} and config.model_type.startswith("granite")
    return 1 / scales["logits_scaling"] if is_granite else None


def fuse_loss(model: PreTrainedModel) -> bool:
    """Replace the loss of this model instance by :func:`moeft.kernels.linear_cross_entropy`.

    Called with ``labels``, the model then returns the loss and no logits. The forward is replaced on the instance, so
    that wrappers of the model (DDP, FSDP, PEFT) keep calling it as before. A call that asks for router logits goes to
    the original forward, which adds their loss. Fusing again changes nothing.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.

    Returns:
        False if the model computes its loss in a way that this cannot replace: a head that is not a plain linear
        layer, logits that are scaled in an unknown way, or an auxiliary router loss.
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

        hidden = head_states(model, *args, **kwargs)
        labels = labels.to(hidden.device)[:, 1:]
        loss = linear_cross_entropy(hidden[:, :-1], model.get_output_embeddings().weight, labels, softcap)
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        # A number of the host stays one: making it a tensor on a GPU would wait for the device.
        count = count.to(loss.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        return CausalLMOutputWithPast(loss=loss / count)

    forward.loss_is_fused = True  # type: ignore[attr-defined]
    model.forward = forward
    return True
