"""AdamW with stochastic rounding: right on average, exact where it can be, repeatable."""

from __future__ import annotations

import pytest
import torch

from moeft.training.optim.stochastic_adamw import StochasticAdamW, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rounding_hits_both_neighbours_and_the_value_on_average():
    torch.manual_seed(0)
    value = torch.randn(64) * 10.0 ** torch.randint(-20, 20, (64,))
    draws = round_stochastically(value.expand(4096, 64).contiguous(), generator())
    low, high = draws.amin(0).float(), draws.amax(0).float()
    gap = high - low
    assert ((low <= value) & (value <= high)).all()
    assert (gap <= value.abs() * 2**-7).all()
    # Each draw is one of two neighbours: its deviation is at most half the gap, of the mean of 4096 1/64 of that.
    assert ((draws.double().mean(0) - value.double()).abs() <= 5 * gap.double() / 128).all()
    chance = (value - low) / gap.clamp(min=1e-45)
    assert (gap[(chance > 0.01) & (chance < 0.99)] > 0).all()


def test_values_that_bfloat16_holds_and_infinities_stay():
    held = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, float("inf"), -float("inf")])
    for seed in range(20):
        assert torch.equal(round_stochastically(held, generator(seed)).float(), held)
    assert round_stochastically(torch.tensor([float("nan")]), generator()).isnan().all()


def test_small_updates_are_kept_on_average_where_rounding_to_nearest_loses_them():
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Adam's step on a constant gradient is the rate. One rounding deviates by at most 2^-9 (half a gap above 1), the
    # mean of 20,000 sums of ten by 2^-9 * sqrt(10 / 20000).
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 10 * 1e-4, abs=5 * 2**-9 * (10 / 20_000) ** 0.5)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal((nearest.float() - 1e-4).to(torch.bfloat16), nearest)


def test_float32_weights_step_as_torch_does():
    torch.manual_seed(1)
    start = torch.randn(33, 7)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pair = (StochasticAdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, foreach=False))
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_loaded_state_continues_bit_for_bit():
    torch.manual_seed(2)
    start, gradients = torch.randn(500).bfloat16(), torch.randn(6, 500).bfloat16()
    whole, half = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = StochasticAdamW([whole], lr=1e-3, seed=7)
    for grad in gradients:
        whole.grad = grad
        optimizer.step()
    first = StochasticAdamW([half], lr=1e-3, seed=7)
    for grad in gradients[:3]:
        half.grad = grad
        first.step()
    second = StochasticAdamW([half], lr=1e-3, seed=7)
    second.load_state_dict(first.state_dict())
    assert second.state[half]["exp_avg"].dtype == torch.float32
    for grad in gradients[3:]:
        half.grad = grad
        second.step()
    assert torch.equal(half, whole)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"float16, expected float32 or bfloat16"):
        StochasticAdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.float16))])
