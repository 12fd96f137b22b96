"""NF4 of the native core against bitsandbytes, on random shapes and awkward values."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft import _core

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

dtypes = st.sampled_from(sorted(DTYPES))
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**32 - 1)


def carrier(tensor: torch.Tensor) -> np.ndarray:
    """The array that carries a tensor across: itself, or the bits of a 16-bit float."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def normal(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(DTYPES[dtype])


def quantize(values: torch.Tensor, groups: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    group_len = values.numel() // groups
    packed = np.full(groups * -(-group_len // 2), 0xAA, np.uint8)
    absmax = np.full(groups * -(-group_len // block_size), np.nan, np.float32)
    dtype = str(values.dtype).removeprefix("torch.")
    _core.nf4_quantize(carrier(values), dtype, groups, group_len, block_size, packed, absmax)
    return packed, absmax


def dequantize(packed: np.ndarray, absmax: np.ndarray, shape: tuple[int, ...], block_size: int, dtype: str):
    out = torch.full(shape, torch.nan, dtype=DTYPES[dtype])
    _core.nf4_dequantize(packed, absmax, shape[0], out[0].numel(), block_size, carrier(out), dtype)
    return out


def assert_equals_bitsandbytes(values: torch.Tensor, block_size: int) -> None:
    """Compare every group (first dimension) with bitsandbytes on that group alone."""
    packed, absmax = quantize(values, len(values), block_size)
    expected = [bnb.quantize_4bit(group, blocksize=block_size, quant_type="nf4") for group in values]
    np.testing.assert_array_equal(packed, np.concatenate([p.numpy().ravel() for p, _ in expected]))
    np.testing.assert_array_equal(absmax, np.concatenate([state.absmax.numpy() for _, state in expected]))


@settings(max_examples=150)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 200), block_sizes, dtypes, seeds)
def test_quantised_bytes_equal_bitsandbytes(groups, rows, columns, block_size, dtype, seed):
    assert_equals_bitsandbytes(normal((groups, rows, columns), dtype, seed), block_size)


@settings(max_examples=100)
@given(st.lists(st.floats(width=16), min_size=1, max_size=200), dtypes)
def test_non_finite_values_are_stored_as_bitsandbytes_stores_them(values, dtype):
    assert_equals_bitsandbytes(torch.tensor([values], dtype=torch.float32).to(DTYPES[dtype]), 64)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_16_bit_pattern_is_stored_as_bitsandbytes_stores_it(dtype):
    # NaN patterns are left to the test above: here one would hide the 31 other values of its block.
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    values = bits.view(torch.float16 if dtype == "float16" else torch.bfloat16)
    values = values[torch.isfinite(values)].to(DTYPES[dtype])
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    for order in (values, shuffled):
        assert_equals_bitsandbytes(order[None], 32)


def test_a_stack_large_enough_for_threads_equals_bitsandbytes():
    assert_equals_bitsandbytes(normal((3, 704, 417), "bfloat16", 0), 64)


@settings(max_examples=150)
@given(st.integers(1, 4), st.integers(1, 300), block_sizes, dtypes, seeds)
def test_dequantised_value_is_code_times_absmax_rounded_once(groups, group_len, block_size, dtype, seed):
    # Not bitsandbytes.dequantize_4bit: its CPU kernel is wrong when K % 32 == 0 and K % block_size != 0.
    packed, absmax = quantize(normal((groups, group_len), "float32", seed), groups, block_size)
    out = dequantize(packed, absmax, (groups, group_len), block_size, dtype)

    nibbles = np.stack([packed >> 4, packed & 15], 1).reshape(groups, -1)[:, :group_len]
    indices = torch.from_numpy(nibbles.astype(np.int64))
    scales = torch.from_numpy(absmax.reshape(groups, -1)).repeat_interleave(block_size, dim=1)[:, :group_len]
    code = bnb.get_4bit_type("nf4", device="cpu")
    assert torch.equal(out, (code[indices] * scales).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dequantised_value_equals_bitsandbytes_where_it_is_right(dtype):
    values = normal((1, 40, 256), dtype, 1)
    packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
    out = dequantize(packed.numpy().ravel(), state.absmax.numpy(), (1, 40, 256), 64, dtype)
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))


@settings(max_examples=100)
@given(st.integers(1, 40_000), st.floats(1e-6, 1e4), seeds)
def test_nested_scales_equal_bitsandbytes_for_its_offset(length, size, seed):
    values = normal((length,), "float32", seed) * size
    _, plain = bnb.quantize_4bit(values, blocksize=32, quant_type="nf4")
    _, nested = bnb.quantize_4bit(values, blocksize=32, quant_type="nf4", compress_statistics=True)
    absmax = plain.absmax.numpy()
    codes, absmax2 = np.full(len(absmax), 0xAA, np.uint8), np.full(-(-len(absmax) // 256), np.nan, np.float32)

    assert _core.nf4_nest(absmax, codes, absmax2, nested.offset.item()) == nested.offset.item()
    np.testing.assert_array_equal(codes, nested.absmax.numpy())
    np.testing.assert_array_equal(absmax2, nested.state2.absmax.numpy())

    restored = np.full_like(absmax, np.nan)
    _core.nf4_unnest(codes, absmax2, nested.offset.item(), restored)
    expected = bnb.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    np.testing.assert_array_equal(restored, expected.numpy())


def test_every_step_of_the_nested_code_equals_bitsandbytes():
    # 65535 steps, each with two values inside it, in blocks that begin with the 1.0 that is their absmax2.
    inside = np.linspace(-1, 1, 4 * 65535, dtype=np.float32)[: 1028 * 255].reshape(-1, 255)
    absmax = np.hstack([np.ones((len(inside), 1), np.float32), inside]).ravel()
    codes, absmax2 = np.empty(len(absmax), np.uint8), np.empty(len(inside), np.float32)
    _core.nf4_nest(absmax, codes, absmax2, 0.0)
    expected, _ = bnb.quantize_blockwise(torch.from_numpy(absmax), blocksize=256)
    np.testing.assert_array_equal(codes, expected.numpy())


def test_default_offset_is_the_mean_rounded_once():
    absmax = (np.random.default_rng(0).random(100_003) * 0.05).astype(np.float32)
    codes, absmax2 = np.empty(len(absmax), np.uint8), np.empty(391, np.float32)
    offset = _core.nf4_nest(absmax, codes, absmax2)
    assert offset == np.float32(absmax.astype(np.float64).mean())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_non_finite_value_is_found(dtype, bad):
    values = torch.zeros(5000, dtype=DTYPES[dtype])
    assert _core.nf4_first_non_finite(carrier(values), dtype) is None
    values[[4321, 4400]] = bad
    assert _core.nf4_first_non_finite(carrier(values), dtype) == 4321


def test_wrong_arguments_are_named():
    values, packed, absmax = np.zeros(64, np.float32), np.zeros(32, np.uint8), np.zeros(1, np.float32)
    with pytest.raises(ValueError, match='dtype is "int8", expected "float32", "bfloat16" or "float16"'):
        _core.nf4_quantize(values, "int8", 1, 64, 64, packed, absmax)
    with pytest.raises(TypeError, match="values is not an aligned array of u16"):
        _core.nf4_quantize(values, "bfloat16", 1, 64, 64, packed, absmax)
    with pytest.raises(ValueError, match="block_size is 48, expected a power of two"):
        _core.nf4_quantize(values, "float32", 1, 64, 48, packed, absmax)
    with pytest.raises(ValueError, match="values is 64 long, expected"):
        _core.nf4_quantize(values, "float32", 2, 64, 64, packed, absmax)
    with pytest.raises(ValueError, match="absmax is NaN at 0"):
        _core.nf4_nest(np.full(1, np.nan, np.float32), np.zeros(1, np.uint8), np.zeros(1, np.float32))
