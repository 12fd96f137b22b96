"""What a bad step says about itself: faults in real weights and rows, and where they are found."""

from __future__ import annotations

import math

import pytest
import torch

from moeft.errors import TrainingError
from moeft.training.diagnosis import diagnose
from tests.test_trainer_guard import Sink
from tests.tiny_training import packed_with_lora, sft_trainer, sums, tiny_tokenizer

BAD_ROW = 5


def rows_with_one_rare_token():
    rows = sums()
    rows[BAD_ROW] = {"prompt": "Z?", "completion": "Z"}
    return rows


def base_of(model):
    return model.get_base_model().model


def train(model, folder, **changes):
    sink = Sink()
    trainer = sft_trainer(model, folder, rows=rows_with_one_rare_token(), events=sink, **changes)
    trainer.train()
    return trainer, [event for event in sink.events if event["kind"] == "skipped_step"]


# Without a tied head, whose logits would spoil every row.
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_row_with_a_spoiled_token_is_named_with_the_embedding(checkpoints, name, tmp_path):
    model = packed_with_lora(checkpoints[name])
    (token,) = tiny_tokenizer()("Z").input_ids
    with torch.no_grad():
        base_of(model).embed_tokens.weight[token] = math.nan
    trainer, events = train(model, tmp_path, max_steps=6, num_train_epochs=1)
    assert trainer.skipped_steps == 1  # 24 rows in batches of 4: one epoch
    (event,) = events
    assert event["rows"] == (BAD_ROW,)
    assert event["module"] == "model.embed_tokens"
    assert event["detail"] == "its weight is not finite"


def spoil_norm(model):
    base_of(model).layers[1].post_attention_layernorm.weight.data[3] = math.inf
    return "model.layers.1.post_attention_layernorm", "its weight is not finite"


def spoil_packed_experts(model):
    experts = base_of(model).layers[0].mlp.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    experts.down_proj_absmax.fill_(math.inf)
    return "model.layers.0.mlp.experts", "its down_proj_absmax is not finite"


def spoil_adapter(model):
    lora = base_of(model).layers[1].self_attn.v_proj.lora_A["default"]
    lora.weight.data[0, 0] = math.nan
    return "model.layers.1.self_attn.v_proj.lora_A.default", "its weight is not finite"


@pytest.mark.parametrize("spoil", [spoil_norm, spoil_packed_experts, spoil_adapter])
def test_first_module_with_a_spoiled_weight_is_named(checkpoints, spoil, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    expected = spoil(model)
    _, events = train(model, tmp_path, max_steps=1)
    (event,) = events
    assert (event["module"], event["detail"]) == expected
    assert len(event["rows"]) == 4


def test_only_the_bad_micro_batch_of_a_step_is_looked_at(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    (token,) = tiny_tokenizer()("Z").input_ids
    base_of(model).embed_tokens.weight.data[token] = math.inf
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12, "max_steps": 1}
    _, events = train(model, tmp_path, **options)
    assert [event["rows"] for event in events] == [(BAD_ROW,)]


def test_error_after_too_many_bad_steps_says_where(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    spoil_norm(model)
    with pytest.raises(
        TrainingError, match=r"its weight is not finite in model\.layers\.1\.post_attention_layernorm, rows"
    ):
        train(model, tmp_path, max_skipped_steps=2)


def test_second_look_leaves_gradients_and_random_state_alone(checkpoints):
    model = packed_with_lora(checkpoints["qwen3_moe"]).train()
    ids = torch.tensor([[7, 8, 9], [10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = torch.get_rng_state()
    found = diagnose(model, lambda rows: model(**rows).loss, [batch], [], backward=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (found.module, found.places) == (None, ())
    assert "did not happen again" in str(found)


def test_rows_are_found_without_a_mask_and_named_by_place_if_the_set_lacks_them(checkpoints):
    model = packed_with_lora(checkpoints["mixtral"]).train()
    base_of(model).embed_tokens.weight.data[9] = math.nan
    ids = torch.tensor([[7, 8, 9, 0, 0], [7, 8, 10, 11, 12]])
    batch = {"input_ids": ids, "labels": ids}
    dataset = [{"input_ids": row} for row in ([7, 8], [7, 8, 10, 11, 12], [7, 8, 9])]

    def second_look(rows):
        return diagnose(model, lambda rows: model(**rows).loss, [batch], rows, backward=False)

    assert (second_look(dataset).places, second_look(dataset).rows) == ((0,), (2,))
    assert str(second_look(dataset)).endswith("in model.embed_tokens, rows 2 of the training set")
    assert str(second_look([])).endswith("in model.embed_tokens, rows 0 of the batch")
