"""NF4 on the CPU beside bitsandbytes; the limits are reading, and writing as glibc writes large memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from harness import Case, Subject
from moeft.kernels import nf4

TESTS = ("test_nf4_core.py", "test_kernels_nf4.py")
EXPERTS, ROWS, COLUMNS = 16, 1408, 2816  # a slice of one gate_up stack of Gemma-4 26B-A4B
NAMES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}


def cases() -> Iterator[Case]:
    """Quantise and dequantise, for each type of weight."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _case(dtype)


def _case(dtype: torch.dtype) -> Case:
    w = torch.randn(EXPERTS, ROWS, COLUMNS).mul_(0.02).to(dtype)
    flat, out = w.view(-1, COLUMNS), torch.empty_like(w)
    ours, (packed, state) = nf4.quantize(w), quantize_4bit(flat, quant_type="nf4", blocksize=64)
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    assert torch.equal(nf4.dequantize(ours, out=out).view(flat.shape), dequantize_4bit(packed, state))
    nested = nf4.quantize(w, double_quant=True)
    count, size = w.numel(), w.nbytes
    moved = size + ours.nbytes
    words = w.view(-1).view(torch.int64)
    return Case(
        f"NF4, {NAMES[dtype]}, {EXPERTS} x {ROWS} x {COLUMNS}",
        "elements/s",
        {
            "quantise, moeft": Subject(lambda: nf4.quantize(w), count, moved, "limit: read the values"),
            "quantise, double, moeft": Subject(lambda: nf4.quantize(w, double_quant=True), count, moved),
            "quantise, bitsandbytes": Subject(lambda: quantize_4bit(flat, quant_type="nf4", blocksize=64), count),
            "limit: read the values": Subject(words.max, count, size),
            "dequantise into a buffer, moeft": Subject(
                lambda: nf4.dequantize(ours, out=out), count, size, "limit: write the values"
            ),
            "dequantise, double, into a buffer, moeft": Subject(
                lambda: nf4.dequantize(nested, out=out), count, size, "limit: write the values"
            ),
            "dequantise, bitsandbytes": Subject(lambda: dequantize_4bit(packed, state), count, size),
            "limit: write the values": Subject(lambda: ctypes.memset(out.data_ptr(), 1, size), count, size),
        },
    )
