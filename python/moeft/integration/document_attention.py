"""Attention that is told where documents lie, in place of a mask: ``attn_implementation="moeft_varlen"``.

A batch brings ``documents``, the lengths of the documents of each row in order, padding included. A hook before the
decoder makes one object of them, which transformers hands down to attention as it does every keyword argument. Without
documents this is transformers' ``sdpa``, with its masks: while generating, with a cache, with masks of a caller's own.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moeft.errors import UnsupportedModelError
from moeft.integration.document_masks import DOCUMENT_ATTENTION, SLIDING, attention_kinds
from moeft.kernels.document_attention import Documents, attend_documents

UNKNOWN_TO_SDPA = ("s_aux", "softcap")
"""Sinks and a cap of scores: transformers' ``sdpa`` leaves some of them out without a word."""


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[B, heads, S, width]`` in, ``[B, S, heads, width]`` out.

    Raises:
        UnsupportedModelError: If the scores of this attention have sinks or a cap, or if documents are given and it is
            more than causal attention with a window.
    """
    _refuse(module, [name for name in UNKNOWN_TO_SDPA if kwargs.get(name) is not None])
    if documents is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    is_causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") in (True, None)
    unknown = [] if is_causal else ["is_causal=False"]
    unknown += [] if kwargs.get("position_bias") is None else ["position_bias"]
    unknown += [] if key.shape[2] == query.shape[2] else ["keys of other tokens"]
    _refuse(module, unknown)
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value))
    out = attend_documents(q, k, v, documents, window=sliding_window, scale=scaling, dropout=dropout)
    if isinstance(documents, WatchedDocuments):
        documents.windows.append(sliding_window)
        documents.widths.append((q.shape[2], v.shape[2]))
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _refuse(module: nn.Module, unknown: Sequence[str]) -> None:
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which {DOCUMENT_ATTENTION} does not know; "
            "load the model with its own attention"
        )


# Registered when this is imported, which `moeft._autoload` does as soon as transformers' own registry is there.
ALL_ATTENTION_FUNCTIONS.register(DOCUMENT_ATTENTION, document_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(DOCUMENT_ATTENTION, sdpa_mask)


class WatchedDocuments(Documents):
    """Documents that remember how each layer attended inside them.

    Attributes:
        windows: The window of each layer.
        widths: Of each layer, that of a head's queries and keys, and that of its values.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.windows: list[int | None] = []
        self.widths: list[tuple[int, int]] = []


def take_documents(model: Any) -> None:
    """Let a model's decoder take ``documents``; calls without them stay as they are. Again changes nothing.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper, with ``sdpa`` attention or this one.
    """
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    decoder = model.base_model
    if not hasattr(decoder, "takes_documents"):
        # Before the hook that makes masks, which then finds that there is one.
        decoder.takes_documents = decoder.register_forward_pre_hook(_hand_down, prepend=True, with_kwargs=True)


def refuse_documents(model: Any) -> None:
    """Undo :func:`take_documents`, with the attention that transformers would choose."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    decoder = model.base_model
    if hasattr(decoder, "takes_documents"):
        decoder.takes_documents.remove()
        del decoder.takes_documents


def windows_of_layers(config: Any) -> list[int | None]:
    """The window of each layer of a text model of full and sliding layers; None where all tokens before are seen."""
    kinds = getattr(config, "layer_types", None) or attention_kinds(config) * config.num_hidden_layers
    return [config.sliding_window if kind == SLIDING else None for kind in kinds]


def _hand_down(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if "documents" not in kwargs:
        return None
    documents = kwargs.pop("documents")
    given = kwargs.get("attention_mask")
    has_mask = len(args) > 1 or isinstance(given, dict) or (given is not None and given.ndim > 2)
    cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
    if documents is None or has_mask or cached:
        return args, kwargs
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    if not isinstance(documents, Documents):
        documents = _checked(documents, *tokens.shape[:2])
    # transformers makes no mask where there is one of four axes. Attention does not read it, and one that would fails,
    # since no mask is made of integers: it is never taken for one that shows everything.
    mask = documents.offsets(tokens.device)[None, None, None]
    kinds = attention_kinds(decoder.config)
    masks = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
    return args, {**kwargs, "documents": documents, "attention_mask": masks}


def _checked(documents: Sequence[Sequence[int]], rows: int, tokens: int) -> Documents:
    if len(documents) != rows or any(sum(row) != tokens for row in documents):
        raise ValueError(
            f"documents have {[sum(row) for row in documents][:8]} tokens in {len(documents)} rows, the batch {tokens} "
            f"in each of {rows}; give the lengths of all documents of each row, padding as one more"
        )
    return Documents(length for row in documents for length in row)
