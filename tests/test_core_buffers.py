"""What the native core refuses before it touches memory."""

import threading

import numpy as np
import pytest

from moeft import _core


def unnest(codes=None, absmax2=None, out=None):
    """A call with one input of each kind and one output, all of them right unless given."""
    codes = np.zeros(4, np.uint8) if codes is None else codes
    absmax2 = np.ones(1, np.float32) if absmax2 is None else absmax2
    _core.nf4_unnest(codes, absmax2, 0.0, np.zeros(4, np.float32) if out is None else out)


def misaligned(length: int, dtype: type) -> np.ndarray:
    return np.zeros(length * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)


def test_right_buffers_pass():
    out = np.full(4, np.nan, np.float32)
    unnest(codes=np.full(4, 255, np.uint8), out=out)
    np.testing.assert_array_equal(out, 1.0)


def test_any_buffer_is_taken_not_only_numpy():
    out = bytearray(b"\xff" * 4)
    _core.nf4_nest(memoryview(np.ones(4, np.float32)), out, np.zeros(1, np.float32))
    assert out == b"\0" * 4


@pytest.mark.parametrize("out", [np.zeros(4), np.zeros(4, np.int32), misaligned(4, np.float32), [0.0] * 4])
def test_another_element_type_or_alignment_is_a_type_error(out):
    with pytest.raises(TypeError, match="out is not an aligned array of f32"):
        unnest(out=out)


def test_strided_arrays_are_refused():
    with pytest.raises(ValueError, match="codes is not C-contiguous"):
        unnest(codes=np.zeros(8, np.uint8)[::2])
    with pytest.raises(ValueError, match="out is not C-contiguous"):
        unnest(out=np.zeros((4, 2), np.float32)[:, 0])


def test_read_only_output_is_refused():
    out = np.zeros(4, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        unnest(out=out)


def test_read_only_input_is_taken():
    unnest(codes=bytes(4))


def test_output_that_overlaps_an_input_is_refused():
    memory = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="out and absmax2 overlap"):
        unnest(absmax2=memory[3:4], out=memory[:4])
    unnest(absmax2=memory[4:5], out=memory[:4])


def test_outputs_that_overlap_are_refused():
    shared = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="inverse and permutation overlap"):
        _core.bucket(np.zeros(3, np.int64), 1, shared, shared, np.zeros(2, np.int32))


def test_inputs_may_share_memory():
    memory = np.zeros(64, np.float32)
    out = np.full(64, np.nan, np.float32)
    _core.nf4_dequantize(memory.view(np.uint8)[:32], memory[:1], None, 0.0, 1, 64, 64, "nf4", out, "float32", 1)
    np.testing.assert_array_equal(out, 0.0)


def test_the_gil_is_released_during_the_work():
    values = np.zeros(1 << 25, np.float32)
    packed, absmax = np.empty(1 << 24, np.uint8), np.empty(1 << 19, np.float32)
    worker = threading.Thread(
        target=_core.nf4_quantize, args=(values, "float32", 1, len(values), 64, "nf4", packed, absmax, 1)
    )
    steps = 0
    worker.start()
    while worker.is_alive():
        steps += 1
    # Held through the call, the GIL would allow a handful of steps before and after it.
    assert steps > 1000
