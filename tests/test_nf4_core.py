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

CODEBOOKS = ["nf4", "fp4"]

codebooks = st.sampled_from(CODEBOOKS)
dtypes = st.sampled_from(sorted(DTYPES))
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**32 - 1)


def carrier(tensor: torch.Tensor) -> np.ndarray:
    """The array that carries a tensor across: itself, or the bits of a 16-bit float."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def normal(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(DTYPES[dtype])


def quantize(
    values: torch.Tensor, groups: int, block_size: int, codebook: str = "nf4", threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    group_len = values.numel() // groups
    packed = np.full(groups * -(-group_len // 2), 0xAA, np.uint8)
    absmax = np.full(groups * -(-group_len // block_size), np.nan, np.float32)
    dtype = str(values.dtype).removeprefix("torch.")
    _core.nf4_quantize(carrier(values), dtype, groups, group_len, block_size, codebook, packed, absmax, threads)
    return packed, absmax


def dequantize(packed: np.ndarray, absmax: np.ndarray, shape: tuple[int, ...], block_size: int, dtype: str, **options):
    out = torch.full(shape, torch.nan, dtype=DTYPES[dtype])
    absmax2, offset = options.get("nested", (None, 0.0))
    sizes = (shape[0], out[0].numel(), block_size, options.get("codebook", "nf4"))
    _core.nf4_dequantize(packed, absmax, absmax2, offset, *sizes, carrier(out), dtype, options.get("threads", 1))
    return out


def assert_equals_bitsandbytes(values: torch.Tensor, block_size: int, codebook: str = "nf4", threads: int = 1) -> None:
    """Compare every group (first dimension) with bitsandbytes on that group alone."""
    packed, absmax = quantize(values, len(values), block_size, codebook, threads)
    expected = [bnb.quantize_4bit(group, blocksize=block_size, quant_type=codebook) for group in values]
    np.testing.assert_array_equal(packed, np.concatenate([p.numpy().ravel() for p, _ in expected]))
    np.testing.assert_array_equal(absmax, np.concatenate([state.absmax.numpy() for _, state in expected]))


@settings(max_examples=150)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 200), block_sizes, dtypes, seeds, codebooks)
def test_quantised_bytes_equal_bitsandbytes(groups, rows, columns, block_size, dtype, seed, codebook):
    assert_equals_bitsandbytes(normal((groups, rows, columns), dtype, seed), block_size, codebook)


@settings(max_examples=100)
@given(st.lists(st.floats(width=16), min_size=1, max_size=200), dtypes, codebooks)
def test_non_finite_values_are_stored_as_bitsandbytes_stores_them(values, dtype, codebook):
    assert_equals_bitsandbytes(torch.tensor([values], dtype=torch.float32).to(DTYPES[dtype]), 64, codebook)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_values_on_and_beside_every_midpoint_are_stored_as_bitsandbytes_stores_them(codebook):
    ascending = bnb.get_4bit_type(codebook, device="cpu").sort().values
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    below, above = (torch.nextafter(midpoints, torch.full((), towards)) for towards in (-2.0, 2.0))
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])
    block = torch.cat([torch.ones(1), below, midpoints, above, zeros])
    for values in (block, -block, block * 1e-38, block * 3e38):
        assert_equals_bitsandbytes(torch.nn.functional.pad(values, (0, 64 - len(block)))[None], 64, codebook)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_16_bit_pattern_is_stored_as_bitsandbytes_stores_it(dtype, codebook):
    # NaN patterns are left to the test above: here one would hide the 31 other values of its block.
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    values = bits.view(torch.float16 if dtype == "float16" else torch.bfloat16)
    values = values[torch.isfinite(values)].to(DTYPES[dtype])
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    for order in (values, shuffled):
        assert_equals_bitsandbytes(order[None], 32, codebook)


def test_a_stack_large_enough_for_threads_equals_bitsandbytes():
    assert_equals_bitsandbytes(normal((3, 704, 417), "bfloat16", 0), 64, threads=2)


@settings(max_examples=150)
@given(st.integers(1, 4), st.integers(1, 300), block_sizes, dtypes, seeds, codebooks)
def test_dequantised_value_is_code_times_absmax_rounded_once(groups, group_len, block_size, dtype, seed, codebook):
    # Not bitsandbytes.dequantize_4bit: its CPU kernel is wrong when K % 32 == 0 and K % block_size != 0.
    packed, absmax = quantize(normal((groups, group_len), "float32", seed), groups, block_size, codebook)
    out = dequantize(packed, absmax, (groups, group_len), block_size, dtype, codebook=codebook)

    nibbles = np.stack([packed >> 4, packed & 15], 1).reshape(groups, -1)[:, :group_len]
    indices = torch.from_numpy(nibbles.astype(np.int64))
    scales = torch.from_numpy(absmax.reshape(groups, -1)).repeat_interleave(block_size, dim=1)[:, :group_len]
    code = bnb.get_4bit_type(codebook, device="cpu")
    assert torch.equal(out, (code[indices] * scales).to(DTYPES[dtype]))


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dequantised_value_equals_bitsandbytes_where_it_is_right(dtype, codebook):
    values = normal((1, 40, 256), dtype, 1)
    packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type=codebook)
    out = dequantize(packed.numpy().ravel(), state.absmax.numpy(), (1, 40, 256), 64, dtype, codebook=codebook)
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


@pytest.mark.parametrize("threads", [1, 2])
def test_nested_scales_are_read_as_their_restored_form(threads):
    shape = (3, 600_001)  # a group's codes start anywhere in a second-level block
    packed, absmax = quantize(normal(shape, "bfloat16", 0), 3, 64)
    codes, absmax2 = np.empty(len(absmax), np.uint8), np.empty(-(-len(absmax) // 256), np.float32)
    offset = _core.nf4_nest(absmax, codes, absmax2)
    restored = np.empty_like(absmax)
    _core.nf4_unnest(codes, absmax2, offset, restored)
    direct = dequantize(packed, codes, shape, 64, "bfloat16", nested=(absmax2, offset), threads=threads)
    assert torch.equal(direct, dequantize(packed, restored, shape, 64, "bfloat16"))


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

    def refuse(message, error=ValueError, dtype="float32", sizes=(1, 64, 64), codebook="nf4", threads=1):
        with pytest.raises(error, match=message):
            _core.nf4_quantize(values, dtype, *sizes, codebook, packed, absmax, threads)
        if error is ValueError:
            with pytest.raises(error, match=message.replace("values", "out")):
                _core.nf4_dequantize(packed, absmax, None, 0.0, *sizes, codebook, values, dtype, threads)

    refuse('dtype is "int8", expected "float32", "bfloat16" or "float16"', dtype="int8")
    refuse("values is not an aligned array of u16", TypeError, dtype="bfloat16")
    refuse("block_size is 48, expected a power of two", sizes=(1, 64, 48))
    refuse("values is 64 long, expected", sizes=(2, 64, 64))
    refuse("groups is -1, expected 0 or more", sizes=(-1, 64, 64))
    refuse("group_len is -64, expected 0 or more", sizes=(1, -64, 64))
    refuse("block_size is -64, expected 0 or more", sizes=(1, 64, -64))
    refuse('codebook is "int4", expected "nf4" or "fp4"', codebook="int4")
    refuse("threads is 0, expected 1 or more", threads=0)
    with pytest.raises(ValueError, match=r"absmax2 is 2 long, expected ceil\(codes / 256\) = 1"):
        _core.nf4_dequantize(
            packed, np.zeros(1, np.uint8), np.zeros(2, np.float32), 0.0, 1, 64, 64, "nf4", values, "float32", 1
        )
    with pytest.raises(ValueError, match="absmax is NaN at 0"):
        _core.nf4_nest(np.full(1, np.nan, np.float32), np.zeros(1, np.uint8), np.zeros(1, np.float32))
