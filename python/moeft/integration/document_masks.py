"""Masks of packs and of padded rows, made from positions and padding without asking the device what they are.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIDING = "full_attention", "sliding_attention"
DOCUMENT_ATTENTION = "moeft_varlen"
"""Ours, which is ``sdpa`` where it is not told where documents lie (`document_attention.py`)."""
MASKED_ATTENTION = ("eager", "sdpa", DOCUMENT_ATTENTION)
"""Implementations of attention that take a mask as a tensor."""
ALIGNMENT = 8
"""Elements, of which the rows of a mask are to be multiples in memory."""


def mask_documents(model: Any, on_host: bool = True) -> bool:
    """Give a model masks of ours when it is called without a cache: of packs, and of padded rows.

    Packs are rows with ``position_ids`` and without an attention mask, padded rows those with one that says which
    tokens are no padding. transformers' mask functions tell examples apart by positions that start anew, but some
    models (gpt_oss in 5.23) do not pass positions to them. And they ask whether a row holds several examples, or any
    padding, at all, for each kind of layer, so that the host waits for the GPU in every forward pass. Whether the model
    keeps examples apart with masks of ours is for the caller to find out.

    Args:
        model: A causal language model of transformers, without a PEFT wrapper.
        on_host: Also where the model computes on the CPU, which waits for nothing.

    Returns:
        False, with nothing done, if the model has layers of other kinds than full and sliding attention, or attention
        that takes no mask.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in MASKED_ATTENTION or not set(attention_kinds(config)) <= {FULL, SLIDING}:
        return False
    decoder = model.base_model
    if not hasattr(decoder, "masks_documents_on_host"):
        decoder.masks_documents_on_host = False
        decoder.register_forward_pre_hook(_add_masks, with_kwargs=True)
    decoder.masks_documents_on_host |= on_host
    return True


def attention_kinds(config: Any) -> list[str]:
    """Kinds of attention layers; a model that does not list them has a window everywhere or nowhere."""
    listed = getattr(config, "layer_types", None)
    if listed:
        return sorted(set(listed))
    return [SLIDING if getattr(config, "sliding_window", None) is not None else FULL]


def masks_of(model: Any, visible_BSS: Tensor, position_ids_BS: Tensor) -> Any:
    """What to pass to a model as ``attention_mask``: ``[B, 1, S, S]``, or one for each kind of attention layer.

    Args:
        model: A causal language model of transformers, or its decoder.
        visible_BSS: Which keys a query sees where there is no window.
        position_ids_BS: Positions, in which a window counts; one row if they are the same in all.
    """
    config = model.config.get_text_config()
    kinds = attention_kinds(config)
    masks = {FULL: visible_BSS}
    if SLIDING in kinds:
        distance_BSS = position_ids_BS[:, :, None] - position_ids_BS[:, None, :]
        masks[SLIDING] = visible_BSS & (distance_BSS < config.sliding_window)
    if config._attn_implementation == "eager" or visible_BSS.device.type != "cpu":
        # On a GPU, PyTorch would make this of a bool mask in every layer, and keep it there for backward.
        dtype = model.get_input_embeddings().weight.dtype
        made = {kind: as_added(masks[kind], dtype) for kind in kinds}
    else:
        made = {kind: masks[kind][:, None] for kind in kinds}
    return made if len(kinds) > 1 else made[kinds[0]]


def as_added(visible_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention, and every other that takes a mask at all, adds to scores: ``[B, 1, S, S]`` of a dtype."""
    *rows, keys = visible_BSS.shape
    # Of rows that are no multiple of this, PyTorch's attention makes a copy in every layer, and keeps it for backward.
    stored = visible_BSS.new_zeros(*rows, -(-keys // ALIGNMENT) * ALIGNMENT, dtype=dtype)
    return stored[..., :keys].masked_fill_(~visible_BSS, torch.finfo(dtype).min)[:, None]


def causal(size: int, device: torch.device) -> Tensor:
    """Which keys a query sees when all belong together, ``[S, S]``."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()


def _add_masks(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    told_by = positions if mask is None else mask
    if not isinstance(told_by, Tensor) or told_by.ndim != 2 or len(args) > 1:
        return None
    if told_by.device.type == "cpu" and not decoder.masks_documents_on_host:
        return None
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return None
    visible = _visible(told_by) if mask is None else _visible_beside_padding(told_by)
    # Inside an example places are as far apart as positions, and the same in every row.
    places = torch.arange(told_by.shape[1], device=told_by.device)[None]
    return args, {**kwargs, "attention_mask": masks_of(decoder, visible, places)}


def _visible_beside_padding(mask_BS: Tensor) -> Tensor:
    """Keys before a query that are no padding, and itself: attention of a row that sees nothing is not defined."""
    size, device = mask_BS.shape[1], mask_BS.device
    itself = torch.eye(size, dtype=torch.bool, device=device)
    return mask_BS.bool()[:, None, :].logical_and(causal(size, device)).logical_or_(itself)


def _visible(positions_BS: Tensor) -> Tensor:
    """Keys before a query in the same example; an example begins where a position does not follow the last one."""
    begins_BS = torch.ones_like(positions_BS)
    begins_BS[:, 1:] = positions_BS.diff() != 1
    example_BS = begins_BS.cumsum(-1)
    same_BSS = example_BS[:, :, None] == example_BS[:, None, :]
    return same_BSS.logical_and_(causal(positions_BS.shape[1], positions_BS.device))
