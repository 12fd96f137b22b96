"""Scores of labels against log-softmax over the model's own full logits."""

from __future__ import annotations

import pytest
import torch

from moeft.errors import UnsupportedModelError
from moeft.integration.log_probs import token_log_probs
from tests.tiny_models import randomise_lora, tiny_model, token_ids
from tests.tiny_training import packed_with_lora


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_scores_and_their_gradients_are_those_of_full_logits(checkpoints, name):
    model = packed_with_lora(checkpoints[name])
    randomise_lora(model)
    ids = token_ids(2, 20)
    labels = ids.clone()
    labels[:, :6] = -100
    weights = torch.tensor([[1.0], [-0.7]])  # a chosen and a rejected reply
    theirs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    theirs = torch.where(labels[:, 1:] == -100, 0.0, theirs)
    ours = token_log_probs(model, labels, input_ids=ids, chunk_rows=8)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for a, b in zip(*(torch.autograd.grad((s * weights).sum(), trained) for s in (ours, theirs)), strict=True):
        # Sums of a few hundred float32 products in another order, as in the tests of the fused loss.
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)


def test_head_that_is_not_plain_is_refused():
    model = tiny_model("olmoe")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="the head of OlmoeForCausalLM is no linear layer without bias"):
        token_log_probs(model, token_ids(), input_ids=token_ids())
