from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.kernels.routing import bucket, load_statistics, reference


def random_index(num_experts: int, tokens: int, top_k: int, seed: int) -> torch.Tensor:
    return torch.randint(0, num_experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(st.integers(4, 12), st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([32, 64]))
def test_routing_equals_the_reference_and_is_a_bijection(num_experts, tokens, top_k, seed, bits):
    index = random_index(num_experts, tokens, top_k, seed).to(torch.int32 if bits == 32 else torch.int64)
    buckets = bucket(index, num_experts)
    for ours, theirs in zip(buckets, reference.bucket(index.flatten(), num_experts), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    rows = torch.arange(tokens * top_k)
    assert torch.equal(buckets.permutation[buckets.inverse], rows)
    assert torch.equal(buckets.permutation.sort().values, rows)
    assert torch.equal(buckets.counts.long(), torch.bincount(index.flatten().long(), minlength=num_experts))


def test_an_index_that_is_not_contiguous_is_read_in_its_own_order():
    index = random_index(6, 3, 7, 0).T
    assert not index.is_contiguous()
    assert torch.equal(bucket(index, 6).permutation, bucket(index.contiguous(), 6).permutation)


@settings(max_examples=60)
@given(st.integers(2, 140), st.integers(1, 40), st.integers(0, 2**31))
def test_load_statistics_equal_those_of_torch(num_experts, tokens, seed):
    buckets = bucket(random_index(num_experts, tokens, 2, seed), num_experts)
    load, counts = load_statistics(buckets), buckets.counts.double()
    entropy = torch.distributions.Categorical(probs=counts).entropy()
    torch.testing.assert_close(load.entropy, entropy)
    torch.testing.assert_close(load.normalized_entropy, entropy / math.log(num_experts))
    torch.testing.assert_close(load.coefficient_of_variation, counts.std(correction=0) / counts.mean())
    for ours, definition in zip(load, reference.load_statistics(buckets.offsets), strict=True):
        torch.testing.assert_close(ours, definition)


@pytest.mark.parametrize(
    ("index", "num_experts", "expected"),
    [
        ([[0, 1], [2, 3]], 4, (math.log(4), 1.0, 0.0)),
        ([[2, 2], [2, 2]], 4, (0.0, 0.0, math.sqrt(3))),
        ([[0], [0]], 1, (0.0, 1.0, 0.0)),
        (torch.empty(0, 2, dtype=torch.int64), 4, (0.0, 0.0, 0.0)),
        (torch.empty(0, 1, dtype=torch.int64), 1, (0.0, 0.0, 0.0)),
    ],
    ids=["even", "one expert has all", "a single expert", "no rows", "no rows, a single expert"],
)
def test_load_statistics_at_the_ends_of_their_range(index, num_experts, expected):
    buckets = bucket(torch.as_tensor(index), num_experts)
    for path in (load_statistics(buckets), reference.load_statistics(buckets.offsets)):
        assert [value.item() for value in path] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("index", "num_experts", "message"),
    [
        ([[0, 1], [-1, 2]], 5, "top_k_index is -1 at row 2, expected an expert in 0..5"),
        ([[0, 1], [5, 2]], 5, "top_k_index is 5 at row 2, expected an expert in 0..5"),
        ([[0, 1, 2]], 2, "top_k_index has 3 choices per token, expected at most num_experts = 2"),
        ([[0, 1]], -1, "num_experts is -1, expected at least 1"),
        ([0, 1], 5, r"top_k_index has the shape \[2\], expected \[tokens, k\]"),
        ([[0.0, 1.0]], 5, "top_k_index is torch.float32, expected int32 or int64"),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected(index, num_experts, message):
    with pytest.raises(ValueError, match=message):
        bucket(torch.tensor(index), num_experts)
