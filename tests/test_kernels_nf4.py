"""The public packing functions: codebooks, direct reading of nested statistics, and what is refused."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from moeft.kernels import nf4
from moeft.kernels.nf4 import reference


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_a_weight_remembers_its_codebook(codebook):
    w = weight(3, 7, 33)
    packed = nf4.quantize(w, 32, codebook=codebook)
    expected, _ = bnb.quantize_4bit(w[2], blocksize=32, quant_type=codebook)
    assert torch.equal(packed.packed[2], expected.view(-1))

    restored = nf4.dequantize(packed, dtype=torch.float32)
    definition = reference.dequantize(packed.packed, packed.absmax, packed.layout, torch.float32, codebook)
    assert torch.equal(restored, definition.view(w.shape))
    assert torch.equal(nf4.dequantize(packed.experts(1, 3), dtype=torch.float32), restored[1:])


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_the_definition_packs_as_bitsandbytes(codebook):
    for length in (1, 63, 64, 65, 200):
        w = weight(length, dtype=torch.float32)
        w[:: max(length // 5, 1)] = 0.0
        packed, absmax = reference.quantize(w, nf4.Layout.of(w.shape, 64), codebook)
        expected, state = bnb.quantize_4bit(w, blocksize=64, quant_type=codebook)
        assert torch.equal(packed.view(-1), expected.view(-1))
        assert torch.equal(absmax.view(-1), state.absmax)


def test_nested_statistics_are_read_as_their_restored_form():
    w = weight(5, 64, 99)
    packed = nf4.quantize(w, double_quant=True)
    assert packed.nested is not None
    assert torch.equal(nf4.dequantize(packed), nf4.dequantize(nf4.restore_absmax(packed)))


def test_bad_weights_are_refused_with_their_name():
    w = weight(4, 64)
    with pytest.raises(ValueError, match=r"w is torch.int8, expected float32, bfloat16 or float16"):
        nf4.quantize(w.to(torch.int8))
    with pytest.raises(ValueError, match=r"w is empty, shape \(0, 64\), expected at least one value"):
        nf4.quantize(w[:0])
    with pytest.raises(ValueError, match=r"block_size is 48, expected one of \(32, 64,"):
        nf4.quantize(w, 48)
    with pytest.raises(ValueError, match=r"codebook is 'int4', expected one of \('nf4', 'fp4'\)"):
        nf4.quantize(w, codebook="int4")
    w[2, 5] = torch.inf
    with pytest.raises(ValueError, match=r"w has a value that is not finite \(inf\) at flat position 133"):
        nf4.quantize(w)


def test_a_strided_weight_is_packed_as_its_contiguous_copy():
    w = weight(64, 6).t()
    assert torch.equal(nf4.quantize(w).packed, nf4.quantize(w.contiguous()).packed)


def test_damaged_packed_weights_and_outputs_are_refused_with_their_name():
    packed = nf4.quantize(weight(4, 64), double_quant=True)
    nested = packed.nested
    for damaged, message in [
        (
            replace(packed, packed=packed.packed[:-1]),
            r"packed is torch.uint8 of 127 elements, expected torch.uint8 of 128",
        ),
        (replace(packed, packed=packed.packed.to(torch.int8)), r"packed is torch.int8 of 128 elements"),
        (replace(packed, absmax=packed.absmax[:3]), r"absmax is torch.uint8 of 3 elements, expected torch.uint8 of 4"),
        (replace(packed, nested=None), r"absmax is torch.uint8 of 4 elements, expected torch.float32 of 4"),
        (replace(packed, nested=replace(nested, absmax=torch.ones(2))), r"nested.absmax is torch.float32 of 2"),
        (replace(packed, codebook="int4"), r'codebook is "int4", expected "nf4" or "fp4"'),
    ]:
        with pytest.raises(ValueError, match=message):
            nf4.dequantize(damaged)
    with pytest.raises(ValueError, match=r"out is torch.int16"):
        nf4.dequantize(packed, out=torch.empty(256, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"expected a contiguous buffer of 256 elements"):
        nf4.dequantize(packed, out=torch.empty(512)[::2])
    shared = torch.zeros(1024, dtype=torch.uint8)
    inside = replace(packed, packed=shared[:128])
    with pytest.raises(ValueError, match=r"out and packed overlap"):
        nf4.dequantize(inside, out=shared.view(torch.float32))
