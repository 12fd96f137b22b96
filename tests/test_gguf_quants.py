"""GGUF blocks from Python, beside the quantisers of other people."""

import numpy as np
import pytest

from moeft import _core

BLOCKS = {"q4_0": (32, 18), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34)}
K_BLOCKS = {"q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210)}


def rows() -> np.ndarray:
    """Usual weights, one-sided ones, zeros, an outlier, and very small values."""
    values = np.random.default_rng(7).standard_normal((8, 1024)).astype(np.float32) * 0.02
    values[1] = np.abs(values[1])
    values[2, :300] = 0
    values[3, 17] = 40
    values[4] *= 1e-30
    return values


def quantize(kind: str, values: np.ndarray) -> np.ndarray:
    block_len, block_bytes = (BLOCKS | K_BLOCKS)[kind]
    blocks = np.full(values.size // block_len * block_bytes, 0xAA, np.uint8)
    _core.gguf_quantize(values.reshape(-1), kind, values.shape[1], None, blocks, 2)
    return blocks


@pytest.mark.parametrize("kind", [*BLOCKS, *K_BLOCKS])
def test_blocks_equal_those_of_libgguf(kind: str) -> None:
    libgguf = pytest.importorskip("libgguf", reason="needs ggml's quantisers: pip install libgguf")
    values = rows()
    theirs = libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[kind.upper()])
    assert quantize(kind, values).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("kind", [*BLOCKS, *K_BLOCKS])
def test_restored_values_equal_those_of_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs llama.cpp's reader: pip install gguf")
    values = rows()
    blocks, back = quantize(kind, values), np.full(values.size, np.nan, np.float32)
    _core.gguf_dequantize(blocks, kind, back)
    theirs = gguf.quants.dequantize(blocks.reshape(len(values), -1), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(back, theirs.reshape(-1))
