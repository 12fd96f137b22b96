"""HostAdamW as a torch optimiser: groups, closures, schedulers, state, 16-bit parameters, bad input."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from moeft.training.optim import HostAdamW
from moeft.training.optim.staging import Staging


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 200), (7,)]  # the second is too small for 8-bit state
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def train(optimizer, steps, first=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_that_resumes_from_its_state_ends_with_identical_bits(dtype, bits):
    whole = parameters(dtype)
    train(HostAdamW(whole, lr=1e-2, state_bits=bits), 6)
    halves = parameters(dtype)
    first = HostAdamW(halves, lr=1e-2, state_bits=bits)
    train(first, 3)
    resumed = HostAdamW(halves, lr=1e-2, state_bits=bits)
    resumed.load_state_dict(saved_and_loaded(first.state_dict()))
    for p in halves:
        for key, value in first.state[p].items():
            other = resumed.state[p][key]
            assert (value.dtype, value.device) == (other.dtype, other.device) if key != "step" else value == other
    train(resumed, 3, first=3)
    assert all(torch.equal(*pair) for pair in zip(whole, halves, strict=True))


def test_loaded_state_is_a_copy():
    params = parameters()
    optimizer = HostAdamW(params)
    train(optimizer, 1)
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"])
    other = HostAdamW(parameters())
    other.load_state_dict(state)
    train(other, 1)
    assert torch.equal(state["state"][0]["exp_avg"], before[0]["exp_avg"])


@pytest.mark.parametrize(
    ("bits", "dtype", "master", "nbytes"),
    [
        (32, torch.float32, True, 8),
        (8, torch.float32, True, 2.03125),
        (8, torch.bfloat16, True, 6.03125),
        (32, torch.bfloat16, False, 8),
    ],
)
def test_state_takes_the_bytes_that_are_documented(bits, dtype, master, nbytes):
    param = torch.nn.Parameter(torch.zeros(64, 256, dtype=dtype))
    optimizer = HostAdamW([param], state_bits=bits, master_weights=master)
    train(optimizer, 1)
    tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == nbytes * param.numel()


def test_small_parameters_keep_32_bit_state():
    params = parameters()
    optimizer = HostAdamW(params, state_bits=8)
    train(optimizer, 1)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.uint8, torch.float32]


def test_groups_and_schedulers_set_the_rate_of_each_step():
    frozen, moving = parameters()[0], parameters()[0]
    start = moving.detach().clone()
    optimizer = HostAdamW([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(optimizer, 1)
    scheduler.step()
    assert torch.equal(frozen, start)
    # The first step of Adam has the size of its rate.
    torch.testing.assert_close((moving - start).abs(), torch.full_like(start, 0.5), rtol=1e-3, atol=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.25]


def test_closure_is_called_with_gradients_and_its_loss_returned():
    (param, _) = parameters()
    optimizer, start = HostAdamW([param], lr=0.1), param.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(start.square().sum().item())
    assert param.square().sum() < loss


def test_parameter_without_gradient_is_left_alone():
    first, second = parameters()
    optimizer, start = HostAdamW([first, second]), second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, start)
    assert second not in optimizer.state


def test_gradient_in_another_memory_order_is_read_in_order():
    ordered, other = parameters()[0], parameters()[0]
    gradient = torch.randn(30, 200)
    ordered.grad, other.grad = gradient, gradient.T.contiguous().T
    for param in (ordered, other):
        HostAdamW([param]).step()
    assert torch.equal(ordered, other)


def test_autograd_notices_that_a_step_changed_a_weight_it_had_saved():
    (param, _) = parameters()
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    HostAdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copied_optimizer_goes_on_alone():
    optimizer = HostAdamW(parameters(), state_bits=8)
    train(optimizer, 2)
    other = copy.deepcopy(optimizer)
    train(optimizer, 1, first=2)
    train(other, 1, first=2)
    for mine, theirs in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "lr is nan, expected a finite number"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), expected two numbers from 0 to below 1"),
        ({"state_bits": 16}, "state_bits is 16, expected 32 or 8"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HostAdamW(parameters(), **options)
    with pytest.raises(ValueError, match=message):
        HostAdamW([{"params": parameters(), **options}])


def test_rate_that_a_scheduler_broke_is_refused_before_anything_changes():
    params = parameters()
    optimizer, start = HostAdamW(params), params[0].detach().clone()
    optimizer.param_groups[0]["lr"] = float("inf")
    with pytest.raises(ValueError, match="lr is inf"):
        train(optimizer, 1)
    assert torch.equal(params[0], start)


def test_parameters_that_cannot_be_updated_are_refused():
    with pytest.raises(ValueError, match=r"a parameter is torch.float16, expected float32 or bfloat16"):
        HostAdamW(parameters(torch.float16))
    with pytest.raises(ValueError, match="expected a contiguous one"):
        HostAdamW([torch.nn.Parameter(torch.zeros(3, 4).T)])
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo, expected a dense one"):
        HostAdamW(table.parameters()).step()


def test_state_of_another_model_is_refused():
    optimizer = HostAdamW(parameters())
    train(optimizer, 1)
    other = HostAdamW([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(7))])
    with pytest.raises(ValueError, match=r"exp_avg has shape \(30, 200\), its parameter \(3,\)"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        HostAdamW(parameters()[:1]).load_state_dict(optimizer.state_dict())


def test_staging_passes_gradients_of_the_host_in_order_without_a_copy():
    params = parameters() + parameters()
    for number, p in enumerate(params):
        p.grad = torch.full_like(p, number)
    for p, gradient in zip(params, Staging().gradients(params), strict=True):
        assert gradient.data_ptr() == p.grad.data_ptr()


def test_staging_lends_memory_for_weights_and_sends_them():
    staging, params = Staging(), parameters(torch.bfloat16)
    for p in params:
        p.grad = torch.ones_like(p)
    for p, _ in zip(params, staging.gradients(params), strict=True):
        new = staging.outgoing(p)
        assert staging.outgoing(p) is new
        staging.send(new.fill_(3), p.data)
    assert all((p == 3).all() for p in params)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run on a machine with one")
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_on_a_gpu_get_the_bits_of_those_on_the_host(dtype, bits):
    on_host, on_gpu = parameters(dtype), parameters(dtype, "cuda")
    optimizers = [HostAdamW(params, state_bits=bits) for params in (on_host, on_gpu)]
    for optimizer in optimizers:
        train(optimizer, 5)
    for host, device in zip(on_host, on_gpu, strict=True):
        assert torch.equal(host, device.cpu())
        assert all(v.device.type == "cpu" for v in optimizers[1].state[device].values() if isinstance(v, torch.Tensor))
