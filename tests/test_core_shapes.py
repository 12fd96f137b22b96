"""Shapes with nothing in them are refused by the core, not divided by."""

from types import SimpleNamespace

import numpy as np
import pytest

from moeft import _core


def stack(*shape: int) -> SimpleNamespace:
    values = np.ones(shape, np.float32)
    return SimpleNamespace(
        values=values,
        dtype="float32",
        codebook="nf4",
        shape=shape,
        transposed=False,
        bias=None,
        block_size=64,
        absmax=None,
        nested_absmax=None,
        nested_offset=0.0,
    )


def factors(experts: int, rank: int, outputs: int, inputs: int) -> SimpleNamespace:
    a, b = np.ones((experts * rank, inputs), np.float32), np.ones((outputs, rank * experts), np.float32)
    return SimpleNamespace(a=a, b=b, scaling=1.0)


def block(hidden: int, inner: int, rank: int | None = None) -> SimpleNamespace:
    """Two tokens, each to its own expert."""
    return SimpleNamespace(
        gate_up=stack(2, 2 * inner, hidden),
        down=stack(2, hidden, inner),
        gate_up_lora=None if rank is None else factors(2, rank, 2 * inner, hidden),
        down_lora=None,
        gate="silu",
        alpha=0.0,
        limit=0.0,
        interleaved=False,
        permutation=np.arange(2),
        offsets=np.arange(3, dtype=np.int32),
        weights=np.ones(2, np.float32),
        top_k=1,
        dtype="float32",
    )


def rows(width: int) -> np.ndarray:
    return np.ones((2, width), np.float32)


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_weights_without_rows_or_columns_are_refused(shape):
    x, out = rows(shape[2]), rows(shape[1])
    with pytest.raises(ValueError, match=r"weight is \[2, \d, \d\], expected experts of at least one row"):
        _core.grouped_linear(x, "float32", np.arange(3, dtype=np.int32), stack(*shape), False, out, 1)


@pytest.mark.parametrize(("hidden", "inner"), [(0, 3), (3, 0)])
def test_expert_blocks_without_hidden_or_inner_columns_are_refused(hidden, inner):
    h, x, out = rows(2 * inner), rows(hidden), rows(hidden)
    with pytest.raises(ValueError, match=r"gate_up is .* expected experts of at least one row and one column"):
        _core.experts_forward(block(hidden, inner), x, h, out, 1)
    with pytest.raises(ValueError, match=r"gate_up is .* expected experts of at least one row and one column"):
        _core.experts_backward(block(hidden, inner), x, h, x, out, np.ones(2, np.float32), None, None, 1)


def test_low_rank_factors_without_rank_are_refused():
    with pytest.raises(ValueError, match="lora rank is 0, expected at least 1"):
        _core.experts_forward(block(4, 3, rank=0), rows(4), rows(6), rows(4), 1)
    _core.experts_forward(block(4, 3, rank=1), rows(4), rows(6), rows(4), 1)
