"""Whether a model attends inside documents that it is told of: asked of the model itself."""

from __future__ import annotations

from typing import Any

import torch

from moeft.errors import UnsupportedModelError
from moeft.integration.document_attention import WatchedDocuments, refuse_documents, take_documents, windows_of_layers
from moeft.integration.document_masks import DOCUMENT_ATTENTION, FULL, SLIDING, attention_kinds
from moeft.integration.embedding_gradient import embedding_gradient
from moeft.kernels.document_attention import gpu

EXAMPLE_TOKENS = 4


def attend_inside_documents(
    model: Any, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str | None:
    """Let a model take ``documents`` in place of masks, if it then computes what it computes with masks.

    A pack of two short examples is run: every layer must have attended inside documents, with the window that the
    config says, and no gradient may flow from the second example to the first.

    Args:
        model: A causal language model of transformers, with or without adapters.
        dtype: Type in which attention will compute, where autocast sets another than that of the embeddings.
        device: Where the model will compute, if it is not there yet.

    Returns:
        Why it does not; the model is then as it was, with transformers' attention if it had this one. None if it does.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = base.get_input_embeddings().weight
    device, dtype = device or weight.device, dtype or weight.dtype
    reason = _obstacle(base, device, dtype)
    if reason is None:
        try:
            take_documents(base)
            reason = _fault(base, device, dtype)
        except (TypeError, ValueError, RuntimeError, UnsupportedModelError) as error:
            reason = str(error)
    if reason is not None and base.config.get_text_config()._attn_implementation == DOCUMENT_ATTENTION:
        refuse_documents(base)
    return reason


def _obstacle(base: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What speaks against it before the model is run."""
    config = base.config.get_text_config()
    if config is not base.config:
        return "it has more kinds of input than text, whose tokens see each other in both directions"
    if config._attn_implementation not in ("sdpa", DOCUMENT_ATTENTION):
        return f"its attention is {config._attn_implementation!r}, not 'sdpa'"
    if not set(attention_kinds(config)) <= {FULL, SLIDING}:
        return f"it has layers of other kinds: {', '.join(attention_kinds(config))}"
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention has dropout {config.attention_dropout}"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"kernels that take documents need an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < gpu.OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None if dtype in gpu.DTYPES else f"it computes in {dtype}, not in 16 bits"


def _fault(base: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong when the model takes a pack of two documents."""
    documents, here = WatchedDocuments([EXAMPLE_TOKENS] * 2), base.get_input_embeddings().weight.device
    inputs = {
        "input_ids": torch.arange(2 * EXAMPLE_TOKENS, device=here)[None] % 2 + 1,  # ids that any vocabulary has
        "position_ids": torch.arange(EXAMPLE_TOKENS, device=here).repeat(2)[None],
        "documents": documents,
    }
    with torch.autocast(here.type, dtype, enabled=dtype in gpu.DTYPES and here.type == "cuda"):
        gradient_SH = embedding_gradient(base, inputs, slice(EXAMPLE_TOKENS, None))
    expected = windows_of_layers(base.config)
    if documents.windows != expected:
        return f"its layers attend with windows {documents.windows}, expected {expected}"
    layers = zip(documents.widths, documents.windows, strict=True)
    if device.type == "cuda" and not all(gpu.knows(dtype, *widths, window is None) for widths, window in layers):
        return f"no kernel takes the widths of its heads, {sorted(set(documents.widths))}, with its windows"
    if gradient_SH[:EXAMPLE_TOKENS].any() or not gradient_SH[EXAMPLE_TOKENS:].any():
        return "one example of a pack sees another one"
    return None
