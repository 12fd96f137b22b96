"""Layouts as arithmetic. Oracle: the einsum of each PEFT release, and unsloth's own reading of B."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeft.adapters.layout import STACKED, Layout, join, split

SIZES = st.integers(1, 5)


def deltas(layout, a, b, num_experts):
    """``[E, out, in]`` as the code that wrote the layout computes it."""
    a = a.reshape(num_experts, -1, a.shape[1])
    if layout.grouped:  # unsloth: weight_B.view(dim_B, num_experts, rank)
        b = b.reshape(b.shape[0], num_experts, -1).transpose(1, 2)
    else:
        b = b.reshape(b.shape[0], -1, num_experts)
    # PEFT 0.18.1 and 0.21.2, tuners/lora/layer.py, ParamWrapper.get_delta_weight
    return torch.einsum("ore,eri->eio" if layout.swapped else "ore,eri->eoi", b, a)


def factors(num_experts, rank, outputs, inputs):
    a, b = torch.randn(num_experts, rank, inputs), torch.randn(num_experts, outputs, rank)
    return a, b, torch.bmm(b, a)


@pytest.mark.parametrize("layout", STACKED)
def test_every_layout_means_the_same_deltas(layout):
    a, b, expected = factors(5, 3, 8, 6)
    saved = join(layout, a, b)
    torch.testing.assert_close(deltas(layout, *saved, 5), expected)
    assert all(factor.is_contiguous() for factor in saved)


def test_the_layouts_of_two_writers_differ_and_neither_fails_to_load():
    a, b, expected = factors(4, 3, 8, 8)
    for written in STACKED:
        for read in STACKED:
            same = torch.allclose(deltas(read, *join(written, a, b), 4), expected, atol=1e-5)
            assert same == (read is written), (written, read)


@given(st.sampled_from(STACKED), st.sampled_from(STACKED), SIZES, SIZES, SIZES, SIZES)
def test_there_and_back_gives_the_same_bits(first, second, num_experts, rank, outputs, inputs):
    a, b, _ = factors(num_experts, rank, outputs, inputs)
    saved = join(first, a, b)
    there = join(second, *split(first, *saved, num_experts))
    back = join(first, *split(second, *there, num_experts))
    assert all(torch.equal(x, y) for x, y in zip(back, saved, strict=True))


def test_headers_are_read_back():
    from moeft.adapters.layout import from_header

    assert [from_header(layout.header) for layout in Layout] == list(Layout)
    assert from_header("peft-0.1") is None
