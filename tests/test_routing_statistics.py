"""Counting of routed tokens. Oracle: the router logits that transformers returns."""

from __future__ import annotations

import pytest
import torch

import moeft
from moeft.errors import UnsupportedModelError
from moeft.integration.routing_statistics import RoutingStatistics, routing_statistics
from tests.test_quantizer import load
from tests.tiny_models import token_ids


def rows(count=3):
    return [token_ids(1, 10 + index, seed=index)[0].tolist() for index in range(count)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_counts_are_the_top_k_of_the_router_logits(checkpoints, packed):
    model = load(checkpoints["qwen3_moe"], **({"quantization_config": moeft.NF4Config()} if packed else {}))
    statistics = routing_statistics(model, rows())
    expected = {}
    for row in rows():
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits
        for layer, router_logits in zip((0, 2), found, strict=True):
            chosen = router_logits.topk(2, dim=-1).indices.flatten()
            expected[layer] = expected.get(layer, 0) + torch.bincount(chosen, minlength=5)
    assert statistics.counts == {layer: tuple(counts.tolist()) for layer, counts in expected.items()}
    assert (statistics.rows, statistics.tokens) == (3, 33)


def test_every_family_is_counted_and_the_model_is_left_as_it_was(checkpoint, family):
    model = moeft.add_lora(load(checkpoint, quantization_config=moeft.NF4Config()), 2, targets=("experts",)).train()
    statistics = routing_statistics(model, rows(), max_rows=2)
    top_k = {"gemma4": 3}.get(family, 2)
    assert {sum(counts) for counts in statistics.counts.values()} == {statistics.tokens * top_k}
    assert statistics.rows == 2
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_below_the_share_are_left_out():
    statistics = RoutingStatistics(1, 50, {0: (0, 1, 9, 90), 3: (25, 25, 25, 25)})
    assert statistics.routed() == {0: (1, 2, 3), 3: (0, 1, 2, 3)}
    assert statistics.routed(0.05) == {0: (2, 3), 3: (0, 1, 2, 3)}
    assert statistics.table(0.05).splitlines()[1].split() == ["0", "4", "2", "99.0%", "3", "90.0%"]


@pytest.mark.parametrize(
    ("share", "message"),
    [(-0.1, "min_share is -0.1"), (1.0, "min_share is 1.0"), (0.5, "no expert of layer 3 got more")],
)
def test_share_that_leaves_nothing_is_refused(share, message):
    with pytest.raises(ValueError, match=message):
        RoutingStatistics(1, 50, {0: (1, 99), 3: (25, 25, 25, 25)}).routed(share)


def test_nothing_to_count_is_refused(checkpoints):
    model = load(checkpoints["olmoe"])
    with pytest.raises(ValueError, match="there are no rows"):
        routing_statistics(model, [])
    with pytest.raises(ValueError, match="max_rows is 0"):
        routing_statistics(model, rows(), max_rows=0)
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no layer with experts"):
        routing_statistics(model, rows())
