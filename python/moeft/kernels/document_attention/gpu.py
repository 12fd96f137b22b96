"""Attention inside documents by PyTorch's own kernels for sequences of varied length; masked pairs cost nothing.

FlashAttention (``torch.nn.attention.varlen``) knows windows and shared heads, and ends at a width of 256. Above it,
memory-efficient attention takes lengths too, for any width, but no window in its derivative. Neither was run on a GPU
for this project yet.

Not taken for wide heads: FlexAttention, which has to be compiled for each shape and whose tiles of 512 columns overflow
the shared memory of small cards; jagged nested tensors, a prototype, whose attention ends in the operator called here;
one call for each document, whose kernels are too small for a GPU where documents are short.

T tokens, H heads of queries, G heads of keys and values, D and E widths of a head
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeft.kernels.document_attention.documents import Documents
from moeft.kernels.document_attention.reference import repeated

OLDEST = (8, 0)
"""Compute capability of the oldest GPU that FlashAttention's kernels are for."""
DTYPES = (torch.bfloat16, torch.float16)
WIDEST_FLASH = 256
ALIGNED = 8
"""Columns that the kernels load at a time."""
CAUSAL_FROM_TOP_LEFT = 1


def has_kernel(q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, is_causal: bool) -> bool:
    """Whether one of the kernels takes these rows, on a device that has them; without a window if ``is_causal``."""
    if q_THD.device.type not in ("cuda", "meta") or not q_THD.dtype == k_TGD.dtype == v_TGE.dtype:
        return False
    return knows(q_THD.dtype, q_THD.shape[2], v_TGE.shape[2], is_causal)


def knows(dtype: torch.dtype, width: int, value_width: int, is_causal: bool) -> bool:
    """Whether there is a kernel for such rows; without a window if ``is_causal``."""
    if dtype not in DTYPES or width % ALIGNED or value_width % ALIGNED:
        return False
    return is_causal or takes_flash(width, value_width)


def takes_flash(width: int, value_width: int) -> bool:
    """Whether FlashAttention has kernels for such heads."""
    return width == value_width <= WIDEST_FLASH


def attend_documents(
    q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    """As :func:`moeft.kernels.document_attention.attend_documents`, for rows that :func:`has_kernel` accepts."""
    is_causal = window is None or window >= documents.longest
    if takes_flash(q_THD.shape[2], v_TGE.shape[2]):
        return _flash(q_THD, k_TGD, v_TGE, documents, None if is_causal else window, scale)
    return _memory_efficient(q_THD, k_TGD, v_TGE, documents, scale)


def _flash(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = documents.offsets(q_THD.device), documents.longest
    left = -1 if window is None else window - 1  # tokens before a query, which is not counted
    # Newer versions prefer cuDNN where there is no window, which plans anew for each number of tokens.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(
            q_THD,
            k_TGD,
            v_TGD,
            offsets,
            offsets,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0),
            **_sharing_heads(),
        )
    assert isinstance(out, Tensor)  # a pair where sums of weights are asked for too
    return out


@functools.cache
def _sharing_heads() -> dict[str, Any]:
    """The option by which newer versions allow fewer heads of keys; PyTorch 2.11 hands them to the kernel unasked."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _memory_efficient(q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, documents: Documents, scale: float | None) -> Tensor:
    heads = q_THD.shape[1]
    rows = (q_THD, repeated(k_TGD, heads), repeated(v_TGE, heads))
    # Backward takes 4 bytes for each value of queries that documents as long as the longest had, and splits the keys of
    # all into the same number of shares: so documents of similar length go together.
    lengths = [run.num_tokens for run in documents.runs]
    outputs = []
    for run, q_1RHD, k_1RHD, v_1RHE in zip(documents.runs, *(x[None].split(lengths, 1) for x in rows), strict=True):
        offsets = run.offsets(q_THD.device)
        outputs.append(
            torch.ops.aten._efficient_attention_forward(
                q_1RHD,
                k_1RHD,
                v_1RHE,
                None,
                offsets,
                offsets,
                run.longest,
                run.longest,
                0.0,
                CAUSAL_FROM_TOP_LEFT,
                True,
                scale=scale,
            )[0][0]
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
