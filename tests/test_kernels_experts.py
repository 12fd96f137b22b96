from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from moeft.kernels import ClampedSwiglu, ExpertLayout, ExpertLora, LoraFactors, experts, nf4
from moeft.kernels.experts import cpu, reference
from moeft.kernels.experts.spec import PLAIN

# One bf16 rounding is 0.0017 relative RMS; independent ones add in quadrature. Ten weigh on the longest chain: W, W x
# and the activation of each stack going forward, W and W^T g of each going back. Those of the LoRA terms are small
# beside them. Twice that is allowed. Float32 products of up to 64 terms stay under 1e-5.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * 0.0017 * 10**0.5}


@pytest.fixture(autouse=True, params=["auto", "pytorch"])
def kernels(request, monkeypatch):
    """Both ways through the block: the Rust core, and PyTorch's operations, which a GPU takes."""
    monkeypatch.setenv("MOEFT_KERNELS", request.param)


class Case:
    """Inputs of an expert block, unit variance."""

    def __init__(
        self,
        dtype,
        *,
        experts=7,
        hidden=64,
        inner=48,
        tokens=33,
        top_k=2,
        rank=4,
        packed=True,
        routing="any",
        layout=PLAIN,
        biased=False,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = randn(tokens, hidden)
        scores = torch.rand(tokens, experts, generator=generator)
        if routing == "one":  # every row on the first experts
            scores = -torch.arange(experts).repeat(tokens, 1).float()
        if routing == "hole":  # nobody chooses expert 3
            scores[:, 3] = -1
        self.index = scores.topk(top_k).indices
        self.weights = torch.rand(tokens, top_k, generator=generator, dtype=adapter_dtype)
        self.gate_up = randn(*layout.gate_up_shape(experts, inner, hidden)) / hidden**0.5
        self.down = randn(*((experts, inner, hidden) if layout.transposed else (experts, hidden, inner))) / inner**0.5
        biases = {"gate_up_bias": randn(experts, 2 * inner), "down_bias": randn(experts, hidden)} if biased else {}
        self.options = {"layout": layout, **biases}
        if packed:
            self.gate_up, self.down = nf4.quantize(self.gate_up), nf4.quantize(self.down)
        self.factors = [
            randn(experts * rank, hidden, dtype=adapter_dtype) / hidden**0.5,
            randn(2 * inner, rank * experts, dtype=adapter_dtype),
            randn(experts * rank, inner, dtype=adapter_dtype) / inner**0.5,
            randn(hidden, rank * experts, dtype=adapter_dtype),
        ]
        self.grad = randn(tokens, hidden)

    def run(self, block, activation=functional.silu):
        """Output and every gradient."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weights, *self.factors)]
        a_up, b_up, a_down, b_down = leaves[2:]
        lora = ExpertLora(LoraFactors(a_up, b_up, 0.5), LoraFactors(a_down, b_down, 2.0))
        out = block(leaves[0], self.index, leaves[1], self.gate_up, self.down, activation, lora, **self.options)
        out.backward(self.grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]


NAMES = ("out", "x", "top_k_weights", "a_up", "b_up", "a_down", "b_down")


def assert_equal_to_reference(case: Case, dtype: torch.dtype, activation=functional.silu) -> None:
    got = case.run(experts, activation)
    assert [t.dtype for t in got] == [dtype, dtype, *(f.dtype for f in (case.weights, *case.factors))]
    if dtype == torch.bfloat16:  # so that only our own roundings count
        case.x, case.grad = case.x.float(), case.grad.float()
    for name, ours, theirs in zip(NAMES, got, case.run(reference.experts, activation), strict=True):
        assert torch.isfinite(ours).all(), name
        error = (ours - theirs).double().norm() / theirs.double().norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["any", "one", "hole"])
def test_forward_and_every_gradient_equal_the_reference(dtype, routing):
    assert_equal_to_reference(Case(dtype, packed=dtype != torch.float64, routing=routing), dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 33, "inner": 17, "rank": 3},
        {"tokens": 1, "top_k": 1},
        {"experts": 1, "top_k": 1},
        {"top_k": 7},
        {"rank": 1},
    ],
    ids=str,
)
def test_odd_sizes_equal_the_reference(sizes):
    assert_equal_to_reference(Case(torch.float32, **sizes), torch.float32)


def test_gelu_equals_the_reference():
    gelu = torch.nn.GELU(approximate="tanh")
    assert_equal_to_reference(Case(torch.float32), torch.float32, gelu)


LAYOUTS = [ExpertLayout(transposed, interleaved) for transposed in (False, True) for interleaved in (False, True)]


# The gradient of a clamp jumps at its limit, where a bf16 rounding turns it on or off: bf16 gets a limit out of reach.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1.5), (torch.bfloat16, 99.0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_with_biases_equals_the_reference(layout, dtype, limit):
    case = Case(dtype, layout=layout, biased=True, routing="hole")
    assert_equal_to_reference(case, dtype, ClampedSwiglu(1.7, limit))


def test_transposed_stacks_compute_what_plain_ones_do():
    case = Case(torch.float32, packed=False)
    plain = case.run(experts)
    case.gate_up, case.down = case.gate_up.mT.contiguous(), case.down.mT.contiguous()
    case.options["layout"] = ExpertLayout(transposed=True)
    for ours, theirs in zip(case.run(experts), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("interleaved", [False, True])
def test_split_and_join_are_inverse(interleaved):
    layout, h = ExpertLayout(interleaved=interleaved), torch.randn(5, 14)
    gate, up = layout.split(h)
    assert gate.shape == up.shape == (5, 7)
    assert torch.equal(layout.join(gate, up), h)


@pytest.mark.parametrize(("layout", "activation"), [(LAYOUTS[0], functional.silu), (LAYOUTS[3], ClampedSwiglu(1.7, 2))])
def test_gradients_pass_gradcheck(layout, activation):
    biased = layout.transposed
    case = Case(
        torch.float64, experts=3, hidden=5, inner=4, tokens=6, rank=2, packed=False, layout=layout, biased=biased
    )
    inputs = [t.clone().requires_grad_() for t in (case.x, case.weights, *case.factors)]

    def block(x, weights, a_up, b_up, a_down, b_down):
        lora = ExpertLora(LoraFactors(a_up, b_up, 0.5), LoraFactors(a_down, b_down, 2.0))
        return experts(x, case.index, weights, case.gate_up, case.down, activation, lora, **case.options)

    assert torch.autograd.gradcheck(block, inputs)


def test_expert_without_rows_gets_zero_gradient():
    case = Case(torch.float32, routing="hole", rank=4)
    *_, a_up, b_up, a_down, b_down = case.run(experts)
    for a in (a_up, a_down):
        assert a.view(7, 4, -1)[3].abs().max() == 0
    for b in (b_up, b_down):
        assert b.view(b.shape[0], 4, 7)[..., 3].abs().max() == 0


def test_nothing_weight_sized_is_saved_for_backward():
    case = Case(torch.float32, experts=7, hidden=64, inner=48, tokens=5, rank=2)
    saved = []
    x, weights = case.x.clone().requires_grad_(), case.weights
    factors = [f.clone().requires_grad_() for f in case.factors]
    lora = ExpertLora(LoraFactors(*factors[:2]), LoraFactors(*factors[2:]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts(x, case.index, weights, case.gate_up, case.down, functional.silu, lora)
    rows = case.index.numel()
    largest = max(rows * 2 * 48, *(f.numel() for f in factors), case.x.numel())
    assert max(t.numel() for t in saved) <= largest
    assert largest < 7 * 64 * 48  # one stack


def test_result_is_deterministic():
    case = Case(torch.bfloat16)
    first, second = case.run(experts), case.run(experts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_lora_equals_zero_lora():
    case = Case(torch.float32)
    case.factors[1].zero_()
    case.factors[3].zero_()
    plain = experts(case.x, case.index, case.weights, case.gate_up, case.down, functional.silu)
    assert torch.equal(case.run(experts)[0], plain)


def test_autocast_computes_in_its_dtype_and_returns_the_dtype_of_x():
    case = Case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(case.x, case.index, case.weights, case.gate_up, case.down, functional.silu)
    bf16 = experts(case.x.bfloat16(), case.index, case.weights, case.gate_up, case.down, functional.silu)
    assert out.dtype == torch.float32
    assert torch.equal(out, bf16.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.full((33, 2), 7)}, "7"),
        ({"index": torch.zeros(33, 2)}, "top_k_index is torch.float32"),
        ({"x": torch.zeros(33, 63)}, r"expected \[tokens, 64\]"),
        ({"weights": torch.zeros(33, 3)}, r"expected \[33, k\]"),
        ({"gate_up": torch.zeros(7, 90, 64)}, r"gate_up has shape \(7, 90, 64\)"),
        ({"down": torch.zeros(7, 64)}, "3 axes"),
        ({"down": torch.zeros(7, 64, 48, requires_grad=True)}, "freeze the weight"),
        ({"options": {"layout": ExpertLayout(transposed=True)}}, r"expected \(7, 48, 128\).*both transposed"),
        ({"options": {"down_bias": torch.zeros(7, 48)}}, r"down_bias has shape \(7, 48\), expected \(7, 64\)"),
        ({"options": {"gate_up_bias": torch.zeros(7, 96, requires_grad=True)}}, "gate_up_bias requires a gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    case = Case(torch.float32)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        experts(case.x, case.index, case.weights, case.gate_up, case.down, functional.silu, **case.options)


def test_no_tokens_give_no_rows():
    case = Case(torch.float32, tokens=0)
    assert [tuple(t.shape) for t in case.run(experts)[:2]] == [(0, 64), (0, 64)]


def test_unknown_choice_of_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("MOEFT_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"MOEFT_KERNELS is 'cuda', expected one of"):
        Case(torch.float32).run(experts)


def test_core_knows_activations_by_what_they_are():
    assert (
        cpu.gate_of(functional.silu) == cpu.gate_of(torch.nn.SiLU()) == cpu.gate_of(ACT2FN["silu"]) == cpu.Gate("silu")
    )
    assert cpu.gate_of(ACT2FN["gelu_pytorch_tanh"]) == cpu.gate_of(torch.nn.GELU("tanh")) == cpu.Gate("gelu_tanh")
    assert cpu.gate_of(torch.nn.GELU()) is cpu.gate_of(torch.relu) is None


def test_operands_on_several_devices_are_refused():
    case = Case(torch.float32)
    with pytest.raises(ValueError, match=r"down is on meta, but x on cpu; move the layer to one device"):
        experts(case.x, case.index, case.weights, case.gate_up, torch.empty(7, 64, 48, device="meta"), functional.silu)


def test_reference_is_taken_when_asked_for(monkeypatch):
    monkeypatch.setenv("MOEFT_KERNELS", "reference")
    case = Case(torch.float32, biased=True)
    for ours, theirs in zip(case.run(experts), case.run(reference.experts), strict=True):
        assert torch.equal(ours, theirs)
