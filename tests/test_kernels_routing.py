from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.kernels.routing import bucket, reference


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([32, 64]))
def test_routing_equals_the_reference_and_is_a_bijection(num_experts, tokens, top_k, seed, bits):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int32 if bits == 32 else torch.int64
    index = torch.randint(0, num_experts, (tokens, top_k), generator=generator).to(dtype)
    buckets = bucket(index, num_experts)
    for ours, theirs in zip(buckets, reference.bucket(index.flatten(), num_experts), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    rows = torch.arange(tokens * top_k)
    assert torch.equal(buckets.permutation[buckets.inverse], rows)
    assert torch.equal(buckets.permutation.sort().values, rows)
    assert torch.equal(buckets.offsets.diff().long(), torch.bincount(index.flatten().long(), minlength=num_experts))


@pytest.mark.parametrize("bad", [-1, 5])
def test_expert_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=str(bad)):
        bucket(torch.tensor([[0, 1], [bad, 2]]), 5)


def test_floating_indices_are_refused():
    with pytest.raises(ValueError, match="float32, expected int32 or int64"):
        bucket(torch.zeros(3, 2), 5)
