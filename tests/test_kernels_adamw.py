"""AdamW on the host: the core against its definition, torch's AdamW and bitsandbytes' AdamW8bit."""

from __future__ import annotations

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from moeft import _core
from moeft.kernels import adamw
from moeft.kernels.adamw import Moments, cpu, reference

RATE = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
MAPS = (cpu.dynamic_map(True), cpu.dynamic_map(False))
ULP = 2.0**-23


def gradients(count, *shape, seed=0):
    """Gradients whose elements differ in size by many powers of ten, so that ``eps`` and every code matter."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-8 * torch.rand(shape, generator=generator))
    return [torch.randn(shape, generator=generator) * size for _ in range(count)]


def weights(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["f32 grad", "bf16 grad"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "master"])
def test_core_equals_the_definition_bit_for_bit(kind, grad_dtype, bits):
    for shape in [(), (1,), (255,), (3, 256), (7, 111)]:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        ours, theirs = (weights(*shape).to(dtype) for _ in range(2))
        rounded = [torch.full(shape, torch.nan, dtype=torch.bfloat16) if kind == "master" else None for _ in range(2)]
        moments = [Moments.zeros(torch.Size(shape), bits) for _ in range(2)]
        for number, grad in enumerate(gradients(5, *shape), start=1):
            grad = grad.to(grad_dtype)
            adamw.step(ours, grad, moments[0], step=number, rounded=rounded[0], **RATE)
            reference.step(theirs, grad, moments[1], rounded[1], **RATE, step=number, maps=MAPS)
        assert torch.equal(ours, theirs)
        for name, value in vars(moments[0]).items():
            assert value is None or torch.equal(value, getattr(moments[1], name)), name
        if kind == "master":
            assert torch.equal(rounded[0], ours.bfloat16())


def test_any_number_of_threads_gives_the_same_bits():
    shape, results = (400, 401), []  # enough for the pool, and no whole number of blocks
    for threads in (1, 2):
        weight, moments = weights(*shape), Moments.zeros(torch.Size(shape), 8)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for number, grad in enumerate(gradients(2, *shape), start=1):
                adamw.step(weight, grad, moments, step=number, **RATE)
        finally:
            torch.set_num_threads(before)
        results.append((weight, *vars(moments).values()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_hundred_steps_are_as_near_to_exact_ones_as_those_of_torch():
    shape = (64, 100)
    ours, moments = weights(*shape), Moments.zeros(torch.Size(shape), 32)
    theirs, exact = (torch.nn.Parameter(weights(*shape).to(dtype)) for dtype in (torch.float32, torch.float64))
    peers = [torch.optim.AdamW([parameter], **RATE) for parameter in (theirs, exact)]
    for number, grad in enumerate(gradients(100, *shape), start=1):
        adamw.step(ours, grad, moments, step=number, **RATE)
        for parameter, peer in zip((theirs, exact), peers, strict=True):
            parameter.grad = grad.to(parameter.dtype)
            peer.step()
    error, their_error = (((w.double() - exact) / exact.abs().clamp(min=0.1)).detach() for w in (ours, theirs))
    # Both round about ten times a step, in other places: neither can be much nearer to the exact result.
    assert error.square().mean().sqrt() < 1.5 * their_error.square().mean().sqrt()
    # Each step rounds a weight twice, by half an ulp, and its update far below that.
    assert error.abs().max() < 100 * 2 * ULP


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_bitsandbytes(signed):
    code = bnb.create_dynamic_map(signed=signed)
    assert torch.equal(cpu.dynamic_map(signed), code)
    (values,) = gradients(1, 300 * 256 + 77)
    values[:64], values[512:768] = values[:64] * 1e-30, values[512:768] * 1e-42  # a denormal scale has no reciprocal
    values = values if signed else values.square()
    values[values == 0] = 1e-30
    codes, absmax = cpu.quantize(values, signed)
    their_codes, state = bnb.quantize_blockwise(values, code=code, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(codes, their_codes)
    assert torch.equal(cpu.dequantize(codes, absmax, signed), bnb.dequantize_blockwise(their_codes, state))


@pytest.mark.parametrize("signed", [True, False])
def test_zero_is_stored_as_zero(signed):
    values = torch.tensor([0.0, 1.0, 0.0, 0.5])
    codes, absmax = cpu.quantize(values, signed)
    assert cpu.dequantize(codes, absmax, signed)[values == 0].tolist() == [0.0, 0.0]
    assert cpu.dequantize(*cpu.quantize(torch.zeros(300), signed), signed).abs().max() == 0


def bitsandbytes_state(optimizer, parameter):
    state = optimizer.state[parameter]
    names = ("state1", "state2", "absmax1", "absmax2")
    return Moments(*(state[name].clone() for name in names))


def test_each_8bit_step_is_that_of_bitsandbytes():
    parameter = torch.nn.Parameter(weights(40, 256))
    peer = bitsandbytes.optim.AdamW8bit([parameter], **RATE)
    ours, moments = parameter.detach().clone(), Moments.zeros(parameter.shape, 8)
    differing = 0
    for number, grad in enumerate(gradients(120, *parameter.shape), start=1):
        parameter.grad = grad
        peer.step()
        adamw.step(ours, grad, moments, step=number, **RATE)
        theirs = bitsandbytes_state(peer, parameter)
        # Ten roundings of an update, which bias correction and 8-bit moments keep below some 30 learning rates.
        torch.testing.assert_close(ours, parameter.detach(), rtol=2 * ULP, atol=10 * ULP * 30 * RATE["lr"])
        torch.testing.assert_close(moments.exp_avg_absmax, theirs.exp_avg_absmax, rtol=4 * ULP, atol=0)
        torch.testing.assert_close(moments.exp_avg_sq_absmax, theirs.exp_avg_sq_absmax, rtol=4 * ULP, atol=0)
        for mine, other in ((moments.exp_avg, theirs.exp_avg), (moments.exp_avg_sq, theirs.exp_avg_sq)):
            gaps = (mine.int() - other.int()).abs()
            assert gaps.max() <= 1  # a value beside the border of two codes
            differing += int(gaps.sum())
        # From the same state into the next step: a code that differs would go on to differ.
        ours.copy_(parameter.detach())
        moments = theirs
    # A value within 4 ulp (4.8e-7 of itself) of one of 255 borders over a range of 2 may get either code: at most one
    # in 10,000. None of the 2.5 million did when this was written.
    assert differing < 1e-4 * 2 * 120 * parameter.numel()


def test_trajectory_in_8_bits_stays_with_that_of_bitsandbytes():
    parameter = torch.nn.Parameter(weights(40, 256))
    start, ours = parameter.detach().clone(), parameter.detach().clone()
    peer, moments = bitsandbytes.optim.AdamW8bit([parameter], **RATE), Moments.zeros(parameter.shape, 8)
    for number, grad in enumerate(gradients(120, *parameter.shape), start=1):
        parameter.grad = grad
        peer.step()
        adamw.step(ours, grad, moments, step=number, **RATE)
    moved, apart = (parameter.detach() - start).norm(), (parameter.detach() - ours).norm()
    # One code in 10,000 may differ at a step, by at most a tenth of its value: sqrt(1e-4) / 10. It was 2.4e-7.
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("bits", [32, 8])
def test_weight_without_gradient_moves_by_its_decay_alone(bits):
    weight, moments = weights(2, 512), Moments.zeros(torch.Size((2, 512)), bits)
    idle = torch.arange(1024).view(2, 512) % 4 == 1  # in every block, as experts without tokens are in B
    expected = weight[idle].clone()
    for number, grad in enumerate(gradients(50, 2, 512), start=1):
        adamw.step(weight, grad.masked_fill(idle, 0.0), moments, step=number, **RATE)
        expected *= 1 - RATE["lr"] * RATE["weight_decay"]
    torch.testing.assert_close(weight[idle], expected, rtol=50 * ULP, atol=0)


def test_master_copy_keeps_updates_that_bfloat16_loses():
    steps, rate = 100, {**RATE, "lr": 1e-4, "weight_decay": 0.0}
    plain, master = torch.ones(300, dtype=torch.bfloat16), torch.ones(300)
    rounded, moments = plain.clone(), [Moments.zeros(plain.shape, 32) for _ in range(2)]
    for number in range(1, steps + 1):
        adamw.step(plain, torch.ones(300), moments[0], step=number, **rate)
        adamw.step(master, torch.ones(300), moments[1], step=number, rounded=rounded, **rate)
    assert torch.equal(plain, torch.ones_like(plain))
    torch.testing.assert_close(rounded.float(), torch.full((300,), 1 - steps * rate["lr"]), rtol=2**-8, atol=0)


def arguments(**changes):
    shape = torch.Size((3, 4))
    defaults = {"param": torch.ones(shape), "grad": torch.ones(shape), "moments": Moments.zeros(shape, 32), "step": 1}
    return {**defaults, **RATE, **changes}


SHARED = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("nan")}, "lr is NaN, expected a finite number"),
        ({"lr": -1.0}, "lr is -1"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.9)}, "beta1 is 1, expected a number from 0 to below 1"),
        ({"betas": (0.9, -0.1)}, "beta2 is -0.1"),
        ({"step": 0}, "step is 0, expected at least 1"),
        ({"grad": torch.ones(11)}, "grad is 11 long, expected 12"),
        ({"moments": Moments.zeros(torch.Size((5,)), 32)}, "exp_avg is 5 long, expected 12"),
        ({"moments": Moments.zeros(torch.Size((600,)), 8)}, "exp_avg is 600 long, expected 12"),
        ({"rounded": torch.ones(2, dtype=torch.bfloat16)}, "rounded is 2 long, expected 12"),
        ({"rounded": torch.ones(3, 4)}, "rounded is torch.float32 beside a torch.float32 param, expected bfloat16"),
        ({"param": SHARED, "grad": SHARED}, "grad and param overlap"),
        ({"param": torch.ones(4, 3).T}, r"param has strides \(1, 3\), expected a contiguous tensor"),
        ({"grad": torch.ones(3, 4, dtype=torch.float16)}, "grad is torch.float16, expected float32 or bfloat16"),
        ({"param": torch.ones(3, 4, dtype=torch.float64)}, "param is torch.float64"),
        ({"grad": torch.ones(3, 4, device="meta")}, "grad is on meta, expected host memory"),
        (
            {"moments": Moments(torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 4))},
            "exp_avg is torch.uint8, expected torch.float32",
        ),
        (
            {"moments": Moments(*torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(2), torch.zeros(1))},
            "exp_avg_absmax is 2 long, expected 1, one per block of 256 weights",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_nothing_changes(changes, message):
    given = arguments(**changes)
    before = given["param"].clone()
    with pytest.raises(ValueError, match=message):
        adamw.step(**given)
    assert torch.equal(given["param"], before)


def test_core_refuses_one_scale_without_the_other_and_zero_threads():
    four, codes, rate = np.ones(4, np.float32), np.zeros(4, np.uint8), (1e-3, 0.9, 0.99, 1e-8, 0.0)
    with pytest.raises(ValueError, match="expected both for 8-bit moments or none"):
        _core.adamw_step(four, 2 * four, codes, codes.copy(), np.zeros(1, np.float32), None, None, *rate, 1, 1)
    with pytest.raises(ValueError, match="zero"):
        _core.adamw_step(four, 2 * four, 3 * four, 4 * four, None, None, None, *rate, 1, 0)
