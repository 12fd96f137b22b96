"""Routing of the native core against numpy's stable sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from moeft import _core


def bucket(expert_index: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = expert_index.size
    permutation, inverse = np.full(rows, -1, np.int64), np.full(rows, -1, np.int64)
    offsets = np.full(num_experts + 1, -1, np.int32)
    _core.bucket(expert_index, num_experts, permutation, inverse, offsets)
    return permutation, inverse, offsets


@settings(max_examples=200)
@given(
    npst.arrays(st.sampled_from([np.int32, np.int64]), st.integers(0, 400), elements=st.integers(0, 12)),
    st.integers(13, 140),
)
def test_rows_are_sorted_stably(expert_index, num_experts):
    permutation, inverse, offsets = bucket(expert_index, num_experts)
    np.testing.assert_array_equal(permutation, np.argsort(expert_index, kind="stable"))
    np.testing.assert_array_equal(permutation[inverse], np.arange(len(expert_index)))
    counts = np.bincount(expert_index, minlength=num_experts)
    np.testing.assert_array_equal(offsets, np.concatenate([[0], np.cumsum(counts)]))


def test_top_k_table_is_taken_row_by_row():
    table = np.array([[3, 1], [1, 3], [0, 3]])
    np.testing.assert_array_equal(bucket(table, 4)[0], [4, 1, 2, 0, 3, 5])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, 4])
def test_expert_out_of_range_is_named_with_its_row(dtype, bad):
    with pytest.raises(ValueError, match=f"expert_index is {bad} at row 2, expected an expert in 0..4"):
        bucket(np.array([0, 3, bad, 1], dtype), 4)


def test_other_integer_types_are_refused():
    with pytest.raises(TypeError, match="expert_index is not an aligned array of i64"):
        bucket(np.zeros(3, np.int16), 4)
