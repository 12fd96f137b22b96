"""Triton's kernels on the CPU, run by ``test_kernels_triton.py`` in a process of its own:

    TRITON_INTERPRET=1 MOEFT_KERNELS=triton python -m pytest tests/triton_interpreted.py

Float32 throughout: the interpreter reads bfloat16 operands of a dot product as integers.
"""

from __future__ import annotations

import sys

import pytest
import torch

from moeft.kernels import experts, linear_log_probs, nf4
from moeft.kernels.experts import fused, gpu, operator, reference
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear import gpu as grouped
from moeft.kernels.grouped_linear import reference as grouped_reference
from moeft.kernels.grouped_outer.gpu import grouped_outer
from moeft.kernels.linear_cross_entropy import reference as head_reference
from moeft.kernels.nf4 import gpu as nf4_gpu
from moeft.kernels.routing import Buckets
from moeft.kernels.routing import cpu as routing_core
from moeft.kernels.routing import gpu as routing
from tests.test_kernels_experts import NAMES, TOLERANCE, Case

GELU = torch.nn.GELU(approximate="tanh")


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block_size"), [((3, 70, 66), 64), ((5,), 32), ((2, 33, 17), 128), ((70, 128), 64)])
def test_restored_weights_equal_the_core_bit_for_bit(shape, block_size, double_quant, codebook):
    weight = nf4.quantize(torch.randn(shape), block_size, double_quant, codebook)
    for dtype in (torch.float32, torch.float16):
        out = torch.full(shape, float("nan"), dtype=dtype)
        nf4_gpu.dequantize(weight, out)
        assert torch.equal(out, nf4.dequantize(weight, dtype=dtype))


def test_a_range_of_experts_is_restored():
    weight = nf4.quantize(torch.randn(5, 9, 31), double_quant=True)  # nested blocks cross experts
    out = torch.full((2, 9, 31), float("nan"))
    nf4_gpu.dequantize(weight, out, 2, 4)
    assert torch.equal(out, nf4.dequantize(weight, dtype=torch.float32)[2:4])


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(33, 2, 7), (300, 8, 128), (1, 1, 1), (0, 2, 4)])
def test_routing_equals_the_core(tokens, top_k, num_experts):
    index = torch.rand(tokens, num_experts).topk(top_k).indices
    found = routing.bucket(index.flatten().int(), num_experts)
    for ours, theirs in zip(found, routing_core.bucket(index, num_experts), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


# Counts of rows: none, one, more than a tile, all; sizes: cut at 64, odd, half a byte past a row, blocks across rows.
@pytest.mark.parametrize(
    ("counts", "rows", "columns", "block_size"),
    [((5, 0, 33, 1, 17), 96, 128, 64), ((0, 40, 0), 33, 17, 32), ((3, 30), 40, 44, 64), ((0, 0), 40, 44, 64)],
)
@pytest.mark.parametrize("path", ["fused", "workspace"])
def test_grouped_products_equal_the_definition(counts, rows, columns, block_size, path, monkeypatch):
    monkeypatch.setattr(config, "workspace_bytes", lambda _: 2 * rows * columns * 4)  # two experts at a time
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    weight = nf4.quantize(torch.randn(len(counts), rows, columns), block_size, double_quant=block_size == 64)
    dense = nf4.dequantize(weight, dtype=torch.float32)
    x, g, low = torch.randn(sum(counts), columns), torch.randn(sum(counts), rows), torch.randn(sum(counts), 5)
    b, a = torch.randn(len(counts), rows, 5), torch.randn(len(counts), 5, columns)
    tiles = grouped.Tiles.of(offsets, sum(counts))
    forward = grouped.grouped_linear(x, weight, tiles, low_rank=grouped.LowRank(low, b, 0.7), path=path)
    expected = grouped_reference.grouped_linear(x, dense, offsets)
    expected += 0.7 * grouped_reference.grouped_linear(low, b, offsets)
    torch.testing.assert_close(forward, expected, rtol=1e-5, atol=1e-4)
    back = grouped.grouped_linear(g, weight, tiles, transpose=True, low_rank=grouped.LowRank(low, a, 0.7), path=path)
    expected = grouped_reference.grouped_linear(g, dense.mT, offsets)
    expected += 0.7 * grouped_reference.grouped_linear(low, a.mT, offsets)
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-4)
    outer = grouped_outer(g, x, offsets, scaling=2.0)
    torch.testing.assert_close(outer, 2 * grouped_reference.grouped_outer(g, x, offsets), rtol=1e-5, atol=1e-4)


def test_gathered_rows_equal_copied_ones():
    counts, top_k = (7, 0, 14, 1), 2
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    weight = nf4.quantize(torch.randn(4, 64, 64))
    tokens, permutation = torch.randn(11, 64), torch.randperm(22)
    tiles = grouped.Tiles.of(offsets, 22)
    copied = grouped.grouped_linear(tokens[permutation // top_k], weight, tiles)
    assert torch.equal(grouped.grouped_linear(tokens, weight, tiles, permutation=permutation, top_k=top_k), copied)


@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ({"routing": "hole", "hidden": 64, "inner": 64, "tokens": 20}, GELU),
        ({"routing": "one", "hidden": 33, "inner": 17, "rank": 3, "tokens": 20}, torch.nn.functional.silu),
        ({"tokens": 1, "top_k": 1, "packed": False}, GELU),
    ],
    ids=str,
)
def test_expert_block_and_every_gradient_equal_the_reference(sizes, activation, monkeypatch):
    case = Case(torch.float32, **sizes)
    called = []
    forward = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda *a: called.append(1) or forward(*a))
    got = case.run(experts, activation)
    assert called, "Triton's kernels did not run"
    for name, ours, theirs in zip(NAMES, got, case.run(reference.experts, activation), strict=True):
        assert relative(ours, theirs) <= TOLERANCE[torch.float32], name


def test_no_tokens_give_no_rows_and_zero_gradients():
    case = Case(torch.float32, tokens=0, hidden=64, inner=64)
    out, x, weights, *factors = case.run(experts, GELU)
    assert out.shape == x.shape == (0, 64)
    assert weights.numel() == 0
    assert all(f.abs().max() == 0 for f in factors)


@pytest.mark.parametrize(("vocabulary", "softcap", "chunk_rows"), [(5003, 30.0, 3), (97, None, None)])
def test_loss_head_equals_the_definition(vocabulary, softcap, chunk_rows):
    hidden, head, coefficients = torch.randn(7, 40), torch.randn(vocabulary, 40), torch.randn(7)
    labels = torch.randint(0, vocabulary, (7,))
    labels[2], labels[0] = -100, vocabulary - 1
    results = []
    for function, options in ((linear_log_probs, {"chunk_rows": chunk_rows}), (head_reference.linear_log_probs, {})):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        out = function(*leaves, labels, softcap, **options)
        (out * coefficients).sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert results[0][0][2] == 0


def test_loss_head_reads_labels_that_do_not_lie_next_to_each_other():
    hidden, head, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(0, 20, (6, 2))[:, 0]
    assert labels.stride() == (2,)
    expected = head_reference.linear_log_probs(hidden, head, labels)
    torch.testing.assert_close(linear_log_probs(hidden, head, labels), expected)


def test_nothing_is_kept_for_backward_where_gradients_are_off():
    case, calls = Case(torch.float32, hidden=16, inner=16, tokens=3, experts=3), []
    x, forward = case.x.requires_grad_(), gpu.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "forward", lambda *a: calls.append(forward(*a)) or calls[0])
        experts(x, case.index, case.weights, case.gate_up, case.down, GELU)
    ((_, saved),) = calls
    assert [tensor.numel() for tensor in saved] == [0, 0, 0]


def test_label_out_of_range_is_nan_and_no_stray_read():
    found = linear_log_probs(torch.randn(2, 8), torch.randn(20, 8), torch.tensor([3, 20]))
    assert torch.isfinite(found[0])
    assert torch.isnan(found[1])


def operator_arguments(rank):
    case = Case(torch.float32, hidden=16, inner=16, tokens=3, rank=max(1, rank), experts=3)
    factors = case.factors if rank else [None] * 4
    routing_tensors = routing.bucket(case.index.flatten(), 3)
    weights = fused.Weights(case.gate_up, case.down)
    leaves = (tensor.mT.contiguous().mT for tensor in (case.x, case.weights))  # rows do not lie next to each other
    return (*leaves, *routing_tensors, *fused.stacks(weights), *factors, 0.5, 2.0, "silu")


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_operators_pass_opcheck(rank):
    arguments = operator_arguments(rank)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.experts_forward, (*arguments, True), test_utils=checks)
    out, *saved = operator.experts_forward(*arguments, True)
    torch.library.opcheck(operator.experts_backward, (torch.randn_like(out), *arguments, *saved), test_utils=checks)


def test_block_compiles_without_a_graph_break(monkeypatch):
    # On the CPU the core sorts rows, which cannot be traced; a GPU takes the operator.
    block = sys.modules["moeft.kernels.experts"]
    monkeypatch.setattr(block, "bucket", lambda index, number: Buckets(*routing.bucket(index.flatten(), number)))
    case = Case(torch.float32, hidden=16, inner=16, tokens=3, experts=3)
    expected = case.run(experts, GELU)
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for name, ours, theirs in zip(NAMES, case.run(compiled, GELU), expected, strict=True):
        assert torch.equal(ours, theirs), name
