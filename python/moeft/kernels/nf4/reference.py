"""The definition of NF4 and FP4 in plain PyTorch, on any device. Byte-compatible with bitsandbytes 0.50.

Source: QLoRA, https://arxiv.org/abs/2305.14314, appendix E; the byte format and FP4 are those of bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.nf4.weight import NESTED_BLOCK, Codebook, Layout

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)
# fmt: on
SMALLEST_ABSMAX = 1e-38


def codes(codebook: Codebook, device: torch.device) -> Tensor:
    """The values of the 16 indices, float32."""
    return torch.tensor(NF4 if codebook == "nf4" else FP4, dtype=torch.float32, device=device)


def quantize(values: Tensor, layout: Layout, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Pack values to 4 bits.

    Args:
        values: ``groups * group_len`` floating-point values, any shape.
        layout: How they are cut into groups and blocks.
        codebook: The values that the codes stand for.

    Returns:
        ``packed`` uint8 ``[groups, ceil(group_len / 2)]`` and ``absmax`` float32 ``[groups, blocks]``.
    """
    x = values.reshape(layout.groups, layout.group_len).float()
    missing = layout.blocks * layout.block_size - layout.group_len
    x = torch.nn.functional.pad(x, (0, missing)).view(layout.groups, layout.blocks, layout.block_size)
    # Unlike a plain maximum, this one keeps NaN on every device.
    absmax = torch.where(x.isnan().any(-1), torch.nan, x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1))
    if missing:  # bitsandbytes clamps the absmax that it stores for a short block, and divides there
        absmax[:, -1] = torch.where(absmax[:, -1].isnan(), torch.nan, absmax[:, -1].clamp(min=SMALLEST_ABSMAX))
    divisor = absmax.clamp(min=SMALLEST_ABSMAX)[..., None]
    scaled = x * (1 / divisor)
    if missing:
        scaled[:, -1] = x[:, -1] / divisor[:, -1]
    scaled = scaled.clamp(-1, 1).view(layout.groups, -1)[:, : layout.group_len]
    scaled = torch.nn.functional.pad(scaled, (0, layout.group_len % 2))
    # Stable: of FP4's two zeros that of index 0 comes first, and takes zero itself.
    ascending, ranked = codes(codebook, x.device).sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    rank = torch.bucketize(scaled, midpoints)  # strictly above a midpoint moves up; NaN sorts last: 15
    index = ranked[rank].to(torch.uint8)
    return (index[:, 0::2] << 4) | index[:, 1::2], absmax


def dequantize(
    packed: Tensor, absmax: Tensor, layout: Layout, dtype: torch.dtype, codebook: Codebook = "nf4"
) -> Tensor:
    """Restore values: ``code * absmax`` in float32, then one rounding to ``dtype``. Returns ``[groups, group_len]``."""
    packed = packed.reshape(layout.groups, layout.packed_bytes)
    index = torch.stack((packed >> 4, packed & 15), -1).view(layout.groups, -1)[:, : layout.group_len]
    scale = absmax.reshape(layout.groups, layout.blocks).repeat_interleave(layout.block_size, 1)
    return (codes(codebook, packed.device)[index.long()] * scale[:, : layout.group_len]).to(dtype)


def restore_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor, dynamic_map: Tensor) -> Tensor:
    """First-level statistics of a double-quantised weight, float32 in the shape of ``codes``."""
    scale = absmax2.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return (dynamic_map[codes.flatten().long()] * scale + offset).view(codes.shape)
