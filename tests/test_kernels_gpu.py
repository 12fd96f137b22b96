"""Triton's kernels on a GPU: equal to PyTorch's operations, without a wait for the device, inside a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

from moeft.integration.document_masks import mask_documents
from moeft.integration.document_reading import attend_inside_documents
from moeft.integration.fused_norms import fuse_norms
from moeft.kernels import experts, linear_cross_entropy, nf4
from moeft.kernels.document_attention import Documents, attend_documents
from moeft.kernels.experts import fused
from moeft.kernels.grouped_linear import config
from moeft.kernels.rms_norm import rms_norm
from moeft.kernels.routing import bucket
from tests.test_kernels_document_attention import masked
from tests.test_kernels_experts import NAMES, TOLERANCE, Case
from tests.test_kernels_rms_norm import VARIANTS, norm_of_transformers
from tests.tiny_models import tiny_model, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, sm_80 or newer"),
]
GELU = torch.nn.GELU(approximate="tanh")


class GpuCase(Case):
    """The inputs of a block on the GPU, bf16, with packed weights."""

    def __init__(self, **sizes):
        super().__init__(torch.bfloat16, **sizes)
        for name in ("x", "index", "weights", "grad"):
            setattr(self, name, getattr(self, name).cuda())
        self.factors = [factor.cuda() for factor in self.factors]
        self.gate_up, self.down = (
            nf4.quantize(nf4.dequantize(w).cuda(), double_quant=True) for w in (self.gate_up, self.down)
        )


@pytest.mark.parametrize("routing", ["any", "one", "hole"])
@pytest.mark.parametrize("path", ["fused", "workspace", "grouped_mm"])
def test_block_and_every_gradient_equal_pytorch(monkeypatch, routing, path):
    chosen = config.path_of_weight
    monkeypatch.setattr(config, "path_of_weight", lambda w, *a: path if isinstance(w, nf4.NF4Weight) else chosen(w, *a))
    case = GpuCase(hidden=256, inner=192, tokens=300, experts=8, routing=routing, rank=8)
    ours = case.run(experts, GELU)
    monkeypatch.setenv("MOEFT_KERNELS", "pytorch")
    for name, a, b in zip(NAMES, ours, case.run(experts, GELU), strict=True):
        assert float((a - b).double().norm() / b.double().norm()) <= TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("double_quant", [False, True])
def test_restored_bits_equal_the_definition(double_quant, monkeypatch):
    weight = nf4.quantize(torch.randn(3, 70, 66, device="cuda"), double_quant=double_quant)
    ours = nf4.dequantize(weight)
    monkeypatch.setenv("MOEFT_KERNELS", "pytorch")
    assert torch.equal(ours, nf4.dequantize(weight))


def test_step_does_not_wait_for_the_device():
    case = GpuCase(hidden=256, inner=192, tokens=300, experts=8, rank=8)
    head, labels = torch.randn(999, 256, device="cuda").bfloat16(), torch.randint(0, 999, (300,), device="cuda")

    def step():
        case.run(lambda *a, **k: experts(*a, **k), GELU)
        hidden = case.x.clone().requires_grad_()
        linear_cross_entropy(hidden, head, labels, 30.0).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_block_can_be_captured_in_a_cuda_graph():
    case = GpuCase(hidden=256, inner=192, tokens=64, experts=8, rank=8)
    weights = fused.Weights(case.gate_up, case.down)

    def block():
        buckets = bucket(case.index, 8)
        leaves = case.x, case.weights, *case.factors
        return fused.ExpertBlock.apply(*leaves, *buckets, weights, "gelu_tanh", (1.0, 1.0), True)

    expected = block()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


# Rounded to 16 bits, each time by 0.0017 relative RMS, are weights, their gradients, the output that backward reads,
# the gradient of keys for each head, and its sum over heads that share them; twice that.
ATTENTION = 2 * 0.0017 * 5**0.5


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("lengths", [[512, 512], [300, 1, 150, 61, 400, 112], [17]])
def test_attention_inside_documents_equals_a_mask_in_float32(lengths, width, window):
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, width) for heads in (4, 2, 2)]
    leaves = [torch.randn(*shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    ours = attend_documents(*leaves, Documents(lengths), window=window)
    theirs = masked(*exact, lengths, window, None)
    upstream = torch.randn(ours.shape, device="cuda").bfloat16()
    pairs = [(ours.detach(), theirs.detach())]
    pairs += zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, exact, upstream.float()), strict=True
    )
    for a, b in pairs:
        assert float((a - b).double().norm() / b.double().norm()) <= ATTENTION


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e4b", "llama"])
def test_model_that_is_told_of_documents_computes_what_masks_give_and_waits_for_nothing(name):
    model = tiny_model(name, torch.bfloat16).cuda().train()
    ids, lengths = token_ids(2, 48).cuda(), [[30, 18], [41, 7]]  # the last 7 are padding
    positions = torch.tensor([[*range(30), *range(18)], [*range(41), *([0] * 7)]], device="cuda")
    mask_documents(model)
    real = torch.arange(48, device="cuda") < torch.tensor([[48], [41]], device="cuda")

    def step(**options):
        model.zero_grad()
        states = model.model(input_ids=ids, position_ids=positions, use_cache=False, **options).last_hidden_state
        (states * real[..., None]).float().square().sum().backward()
        return [states.detach() * real[..., None], *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step()
    assert attend_inside_documents(model) is None
    step(documents=lengths)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(documents=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in found)
    # Roundings between layers, and a token that they send to another expert.
    assert float((found[0] - expected[0]).double().norm() / expected[0].double().norm()) <= 0.05


def test_weight_on_another_device_is_refused():
    case = GpuCase(hidden=64, inner=64)
    with pytest.raises(ValueError, match=r"gate_up is on cpu, but x on cuda:0; move the layer to one device"):
        experts(case.x, case.index, case.weights, nf4.dequantize(case.gate_up).cpu(), case.down, GELU)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(37, 2816), (5, 16, 256), (3, 7, 2, 512), (11, 90)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_norm_and_gradients_are_those_of_transformers(variant, shape, trained):
    norm = norm_of_transformers(variant, torch.bfloat16, shape[-1]).cuda().requires_grad_(trained)
    fused = copy.deepcopy(norm)
    assert fuse_norms(fused) == 1
    rows, grad = torch.randn(2, *shape, device="cuda").bfloat16()
    results, kept = [], []
    for function in (norm, fused):
        x = rows.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = function(x)
        out.backward(grad)
        results.append([out.detach(), x.grad, *([function.weight.grad] if trained else [])])
        if function is norm:
            kept.clear()
    assert sum(t.numel() for t in kept if t.dtype == torch.float32) <= rows.numel() // shape[-1]
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).double().norm() / theirs.double().norm()) <= TOLERANCE[torch.bfloat16]


def test_gradient_of_a_norm_s_weight_is_the_same_each_time():
    rows, grad = torch.randn(2, 70000, 256, device="cuda").bfloat16()
    weight = torch.randn(256, device="cuda").bfloat16().requires_grad_()
    first, second = (torch.autograd.grad(rms_norm(rows, weight, 1e-6), weight, grad)[0] for _ in range(2))
    assert torch.equal(first, second)
