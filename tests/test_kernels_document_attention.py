"""Attention inside documents equals attention with a mask, forward and every gradient, by every path."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

from moeft.kernels.document_attention import Documents, attend_documents, gpu
from moeft.kernels.document_attention.documents import MOST_WASTE
from tests.library_attention import LibraryAttention

LENGTHS = [7, 1, 20, 3, 9]
HEADS, GROUPS = 4, 2


def inputs(width=8, value_width=8, dtype=torch.float64, device="cpu", lengths=LENGTHS):
    torch.manual_seed(0)
    shapes = (HEADS, width), (GROUPS, width), (GROUPS, value_width)
    return [torch.randn(sum(lengths), *s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def masked(q, k, v, lengths, window, scale):
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    place = torch.arange(len(q), device=q.device)
    distance = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (distance >= 0) & (distance < (window or len(q)))
    heads = (x.transpose(0, 1) for x in (q, *(x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))))
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale).transpose(0, 1)


def with_gradients(run, leaves):
    out = run(*leaves)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, dtype=out.dtype, device=out.device)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


WINDOWS = (None, 1, 4, 19, 20, 100)
CAUSAL = (None, 20, 100)  # no document is longer
CASES = [("cpu", 8, 12, window) for window in WINDOWS] + [("gpu", 8, 8, window) for window in WINDOWS]
CASES += [("gpu", *widths, window) for widths in ((8, 16), (264, 264)) for window in CAUSAL]


@pytest.mark.parametrize(("path", "width", "value_width", "window"), CASES)
def test_output_and_gradients_are_those_of_a_mask(path, width, value_width, window, monkeypatch):
    leaves = inputs(width, value_width)
    if path == "gpu":
        monkeypatch.setattr(gpu, "has_kernel", lambda *_, **__: True)
    kernels = LibraryAttention()
    with kernels if path == "gpu" else nullcontext():
        ours = with_gradients(lambda *x: attend_documents(*x, Documents(LENGTHS), window=window, scale=0.3), leaves)
    assert bool(kernels.calls) == (path == "gpu")
    for found, expected in zip(ours, with_gradients(lambda *x: masked(*x, LENGTHS, window, 0.3), leaves), strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_drops_weights_and_leaves_documents_apart():
    q, k, v = inputs()
    out = attend_documents(q, k, v, Documents(LENGTHS), dropout=0.5)
    assert not torch.allclose(out, attend_documents(q, k, v, Documents(LENGTHS)))
    (gradient,) = torch.autograd.grad(out[: LENGTHS[0]].sum(), v)
    assert not gradient[LENGTHS[0] :].any()


@pytest.mark.parametrize("window", [1, 60, 128, 129, 200])
def test_parts_of_a_long_document_see_the_window_before_them(window):
    lengths = [300, 150]
    leaves = inputs(lengths=lengths)
    ours = with_gradients(lambda *x: attend_documents(*x, Documents(lengths), window=window, scale=0.3), leaves)
    for found, expected in zip(ours, with_gradients(lambda *x: masked(*x, lengths, window, 0.3), leaves), strict=True):
        torch.testing.assert_close(found, expected)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=60))
def test_runs_are_all_documents_in_order_and_of_similar_length(lengths):
    runs = Documents(lengths).runs
    assert [length for run in runs for length in run.lengths] == lengths
    assert all(len(run.lengths) * run.longest <= MOST_WASTE * run.num_tokens for run in runs)


def test_rows_of_one_length_are_one_run():
    assert len(Documents([4096] * 4).runs) == 1


def test_offsets_are_copied_once():
    documents = Documents(LENGTHS)
    assert documents.offsets(torch.device("cpu")).tolist() == [0, 7, 8, 28, 31, 40]
    assert documents.offsets(torch.device("cpu")) is documents.offsets(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize(("width", "window"), [(64, None), (128, 16), (256, 1024), (512, None)])
def test_operators_of_pytorch_take_what_they_are_given(device, width, window):
    """Their own checks for a GPU, without one; the meta device also runs the derivatives."""
    with FakeTensorMode() if device == "cuda" else nullcontext():
        leaves = inputs(width, width, torch.bfloat16, device, [600, 300, 50, 50])
        out = attend_documents(*leaves, Documents([600, 300, 50, 50]), window=window)
        assert out.shape == leaves[0].shape
        name = type(out.grad_fn).__name__
        assert ("varlen" in name) == (width <= 256), name
        if device == "meta" and (width <= 256 or torch.__version__ >= "2.15"):  # 2.11 lacks an argument there
            out.sum().backward()
            assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


@pytest.mark.parametrize(
    ("change", "has_kernel"),
    [
        ({}, True),
        ({"width": 256, "value_width": 256}, True),
        ({"width": 512, "value_width": 512}, False),  # a window
        ({"width": 20, "value_width": 20}, False),
        ({"value_width": 16}, False),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_what_has_a_kernel_for_a_window(change, has_kernel):
    leaves = inputs(**({"dtype": torch.bfloat16, "device": "meta"} | change))
    assert gpu.has_kernel(*leaves, is_causal=False) == has_kernel
    wide = change.get("width", 8) == 512 or change.get("value_width") == 16
    assert gpu.has_kernel(*leaves, is_causal=True) == (has_kernel or wide)


def test_autocast_sets_the_type_as_it_does_for_attention_with_a_mask():
    leaves = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend_documents(*leaves, Documents(LENGTHS), scale=0.3)
        theirs = masked(*leaves, LENGTHS, None, 0.3)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # One rounding of an output is 0.0017 relative RMS; twice that.
    assert (ours - theirs).float().norm() <= 2 * 0.0017 * theirs.float().norm()


def test_unusable_arguments_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="documents have 39 tokens, the queries 40; give the padding too"):
        attend_documents(q, k, v, Documents([30, 9]))
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        attend_documents(q, k, v, Documents(LENGTHS), window=0)
    with pytest.raises(ValueError, match=r"keys are \[39, 2, 8\]"):
        attend_documents(q, k[1:], v, Documents(LENGTHS))
    with pytest.raises(ValueError, match="a divisor of the 3 heads of queries"):
        attend_documents(q[:, :3], k, v, Documents(LENGTHS))
    for lengths in ([], [0], [3, -1]):
        with pytest.raises(ValueError, match="lengths of documents"):
            Documents(lengths)
