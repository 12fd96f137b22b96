"""Whether a model keeps the examples of a pack apart: asked of the model itself, not of a list of names."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeft.data.collate import PackingCollator
from moeft.data.packing import Pack
from moeft.errors import UnsupportedModelError
from moeft.integration.document_masks import DOCUMENT_ATTENTION, mask_documents
from moeft.integration.document_reading import attend_inside_documents
from moeft.integration.embedding_gradient import embedding_gradient

EXAMPLE_TOKENS = 4
logger = logging.getLogger(__name__)


def wants_flat_batches(model: Any) -> bool:
    """Whether the model's attention tells examples apart in a batch of one only, as flash attention does."""
    return "flash" in (model.config.get_text_config()._attn_implementation or "")


def wants_documents(model: Any, args: Any, packed: bool) -> bool:
    """Whether batches are to say where documents lie, since the model's attention then computes without masks.

    Where nothing is to be gained, on a CPU for rows of one example, nothing changes. What speaks against it is in the
    log, as a warning if the model was loaded with this attention.

    Args:
        model: The model, with or without adapters; its attention is set.
        args: A :class:`moeft.training.arguments.MoeConfig`.
        packed: Whether a row holds several examples.
    """
    config = model.config.get_text_config()
    is_asked = config._attn_implementation == DOCUMENT_ATTENTION
    device = model.get_input_embeddings().weight.device
    device = args.device if device.type == "cpu" else device  # where Trainer is about to move the model
    # The compiler cannot trace lists of lengths; with several GPUs in one process, batches are cut into pieces.
    if not args.document_attention or args.torch_compile or args.n_gpu > 1:
        return False
    if not (is_asked or packed or device.type == "cuda"):
        return False
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    reason = attend_inside_documents(model, dtype, device)
    if reason is not None:
        level = logging.WARNING if is_asked else logging.INFO
        logger.log(level, "this %s model attends with masks: %s", config.model_type, reason)
    return reason is None


def check_document_isolation(model: Any) -> None:
    """Make sure that no example of a pack is seen from another one: by the model's own masks, or else by ours.

    On a GPU a language model gets ours from the start, since making its own waits for the device.

    Args:
        model: A causal language model of transformers, with or without adapters.

    Raises:
        UnsupportedModelError: If an example is seen from another one all the same.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config() is base.config:  # a model of several kinds of input has more to mask
        mask_documents(base, on_host=False)
    if _keeps_apart(base) or (mask_documents(base) and _keeps_apart(base)):
        return
    config = base.config.get_text_config()
    kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ["of unknown kind"])))
    raise UnsupportedModelError(
        f"packing would let examples see each other in this {config.model_type} model: its layers ({kinds}) do not "
        f"all keep them apart with attention {config._attn_implementation!r}. Set packing to false; "
        "train_sampling_strategy: group_by_length saves padding too"
    )


def _keeps_apart(base: Any) -> bool:
    """Run a pack of two short examples: whether the second one is independent of the first.

    The last hidden states of the second example must have a gradient of exactly zero with respect to the embeddings of
    the first. Layers that carry a state from token to token (linear attention, state-space layers, convolutions) do not
    read position ids and fail.
    """
    gradient_SH = embedding_gradient(base, _batch(base), slice(EXAMPLE_TOKENS, None))
    return not gradient_SH[:EXAMPLE_TOKENS].any()


def _batch(model: Any) -> dict[str, Tensor]:
    # Ids that any vocabulary has; which ones does not matter.
    ids = np.arange(2 * EXAMPLE_TOKENS, dtype=np.int32) % 2 + 1
    pack: Pack = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": np.tile(np.arange(EXAMPLE_TOKENS, dtype=np.int32), 2),
    }
    batch = PackingCollator(0, wants_flat_batches(model))([pack])
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
