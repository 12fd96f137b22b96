"""Routing of the native core against numpy's stable sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from moeft import _core


def bucket(top_k_index: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = top_k_index.size
    permutation, inverse = np.full(rows, -1, np.int64), np.full(rows, -1, np.int64)
    offsets = np.full(num_experts + 1, -1, np.int32)
    _core.bucket(top_k_index, num_experts, permutation, inverse, offsets)
    return permutation, inverse, offsets


@settings(max_examples=200)
@given(
    npst.arrays(st.sampled_from([np.int32, np.int64]), st.integers(0, 400), elements=st.integers(0, 12)),
    st.integers(13, 140),
)
def test_rows_are_sorted_stably(top_k_index, num_experts):
    permutation, inverse, offsets = bucket(top_k_index, num_experts)
    np.testing.assert_array_equal(permutation, np.argsort(top_k_index, kind="stable"))
    np.testing.assert_array_equal(permutation[inverse], np.arange(len(top_k_index)))
    counts = np.bincount(top_k_index, minlength=num_experts)
    np.testing.assert_array_equal(offsets, np.concatenate([[0], np.cumsum(counts)]))


def test_top_k_table_is_taken_row_by_row():
    table = np.array([[3, 1], [1, 3], [0, 3]])
    np.testing.assert_array_equal(bucket(table, 4)[0], [4, 1, 2, 0, 3, 5])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, 4])
def test_expert_out_of_range_is_named_with_its_row(dtype, bad):
    with pytest.raises(ValueError, match=f"top_k_index is {bad} at row 2, expected an expert in 0..4"):
        bucket(np.array([0, 3, bad, 1], dtype), 4)


def test_other_integer_types_are_refused():
    with pytest.raises(TypeError, match="top_k_index is not an aligned array of i64"):
        bucket(np.zeros(3, np.int16), 4)


def test_array_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="top_k_index is not C-contiguous; pass a contiguous copy"):
        bucket(np.zeros((4, 6), np.int64)[:, ::2], 4)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0], "offsets is 1 long"), ([1, 2], r"offsets\[0\] is 1"), ([0, 3, 2], "offsets is 2 after 3, expected ascend")],
)
def test_offsets_that_no_bucket_made_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        _core.load_statistics(np.array(offsets, np.int32))
