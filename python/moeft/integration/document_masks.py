"""Masks that keep the examples of a pack apart, for models of transformers that do not build them from positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIDING = "full_attention", "sliding_attention"


def mask_documents(model: Any) -> bool:
    """Give a model masks from its ``position_ids`` when it is called without an attention mask and without a cache.

    transformers' mask functions tell examples apart by positions that start anew, but some models (gpt_oss in 5.23) do
    not pass positions to them. A hook on the decoder calls the same functions with positions. Whether the model then
    keeps examples apart is for the caller to find out.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.

    Returns:
        False, with nothing done, if the model has layers of other kinds than full and sliding attention.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    if not kinds <= {FULL, SLIDING}:
        return False
    decoder = model.base_model
    if not getattr(decoder, "masks_documents", False):
        decoder.masks_documents = True
        decoder.register_forward_pre_hook(_add_masks, with_kwargs=True)
    return True


def _add_masks(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    positions = kwargs.get("position_ids")
    rows = args[0] if args else kwargs.get("input_ids")
    rows = kwargs.get("inputs_embeds") if rows is None else rows
    cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
    if positions is None or rows is None or cached or kwargs.get("attention_mask") is not None or len(args) > 1:
        return None
    return args, {**kwargs, "attention_mask": _masks(decoder, rows, positions)}


def _masks(decoder: Any, rows: Tensor, positions: Tensor) -> Any:
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    options = {
        "config": decoder.config,
        # Read for shape, dtype and device alone.
        "inputs_embeds": torch.empty(*rows.shape[:2], 0, dtype=decoder.dtype, device=rows.device),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    kinds = set(getattr(decoder.config, "layer_types", None) or [FULL])
    if kinds == {FULL}:
        return create_causal_mask(**options)
    return {FULL: create_causal_mask(**options), SLIDING: create_sliding_window_causal_mask(**options)}


def as_added(visible_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention, and every other that takes a mask at all, adds to scores: ``[B, 1, S, S]`` of a dtype."""
    return torch.zeros_like(visible_BSS, dtype=dtype).masked_fill_(~visible_BSS, torch.finfo(dtype).min)[:, None]
