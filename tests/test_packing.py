"""Packs: how they are filled, and that a model sees in them what it sees in rows of their own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from moeft.data.collate import PackingCollator, PaddingCollator, count_tokens
from moeft.data.packing import pack
from moeft.errors import DataError, UnsupportedModelError
from moeft.integration.document_masks import as_added, mask_documents
from moeft.integration.fused_loss import fuse_loss
from moeft.training.document_isolation import check_document_isolation
from moeft.training.length_grouping import SeededLengthGroupedSampler
from tests.tiny_models import COMMON, FAMILY_NAMES, tiny_model, token_ids
from tests.tiny_training import adapter_weights, load, losses, packed_with_lora, sft_trainer, sums

LONG = {"prompt": "Say it.", "completion": "a reply much longer than the others"}


def examples(lengths):
    """Rows of random ids whose first labels do not count, as those of a prompt; the very first one does."""
    rows = [token_ids(1, length, seed=index)[0].tolist() for index, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [ids[0], -100, *ids[2:]]} for ids in rows]


def sizes(packed):
    """Lengths of the examples of each pack."""
    starts = [[i for i, p in enumerate(one["position_ids"]) if p == 0] for one in packed.packs]
    ends = [[*s[1:], len(one["position_ids"])] for s, one in zip(starts, packed.packs, strict=True)]
    return [[e - s for s, e in zip(*pair, strict=True)] for pair in zip(starts, ends, strict=True)]


def test_longest_goes_first_and_each_where_it_leaves_the_least_room():
    assert sizes(pack(examples([2, 3, 7, 5, 4, 6, 3]), 10)) == [[7, 3], [6, 4], [5, 3, 2]]


@given(st.lists(st.integers(2, 32), min_size=1, max_size=40), st.integers(32, 48))
def test_every_example_is_in_one_pack_and_no_two_packs_would_fit_in_one(lengths, max_length):
    packed = pack([{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)], max_length)
    found = sorted(
        i for one in packed.packs for i, p in zip(one["input_ids"], one["position_ids"], strict=True) if p == 0
    )
    assert found == list(range(len(lengths)))
    loads = sorted(len(one["input_ids"]) for one in packed.packs)
    assert loads[-1] <= max_length
    assert len(loads) < 2 or loads[0] + loads[1] > max_length
    assert packed.efficiency == pytest.approx(sum(lengths) / (len(loads) * max_length))


def test_packs_depend_on_the_seed_alone():
    rows = examples([5] * 12)
    assert pack(rows, 10, seed=1) == pack(rows, 10, seed=1)
    assert pack(rows, 10, seed=1) != pack(rows, 10, seed=2)


def test_positions_start_anew_and_no_example_predicts_the_next():
    first, second = examples([3, 4])
    (one,) = pack([first, second], 8).packs
    assert one["input_ids"].tolist() == second["input_ids"] + first["input_ids"]
    assert one["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert one["labels"].tolist() == [-100, *second["labels"][1:], -100, *first["labels"][1:]]


def test_example_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="2 of 3 examples are longer than max_length 4, the longest has 9 tokens"):
        pack(examples([9, 4, 5]), 4)
    with pytest.raises(ValueError, match="0 of 0 examples"):
        pack([], 4)


def test_collated_packs_are_padded_with_tokens_that_are_alone_and_not_counted():
    packs = pack(examples([6, 5, 3]), 8).packs
    batch = PackingCollator(0)(packs)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert (batch["labels"][0, 6:] == -100).all()
    assert count_tokens(batch) == 14
    flat = PackingCollator(0, flatten=True)(packs)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert count_tokens(flat) == 14


# Not gpt_oss, which knows eager attention only.
SDPA_NAMES = (*(name for name in FAMILY_NAMES if name != "gpt_oss"), "llama")


def model_of(name, attention="sdpa"):
    if name == "llama":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**COMMON, num_hidden_layers=2, intermediate_size=96)
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(name)
    model.set_attn_implementation(attention)
    fuse_loss(model)
    return model.train()


def forward_backward(model, batch):
    """Loss, gradients, and what each expert layer was asked for each real token."""
    routed = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: routed.append(args[1]))
        for name, module in model.named_modules()
        if name.endswith("experts")
    ]
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, routed


# Rows on both sides of gemma4's sliding window of 16, and one token short of a pack.
ROWS = examples([30, 23, 17, 9, 5, 2])


@pytest.mark.parametrize("layout", ["padded packs", "flat"])
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in SDPA_NAMES), ("gemma4", "eager"), ("gpt_oss", "eager")]
)
def test_packed_rows_give_the_loss_gradients_and_routing_of_rows_of_their_own(name, attention, layout):
    model = model_of(name, attention)
    check_document_isolation(model)  # gives gpt_oss its masks
    packs = pack(ROWS, 33).packs
    order = [row for one in packs for row in ROWS if contains(one, row)]
    assert len(order) == len(ROWS)
    assert len(packs) == 3
    apart = PaddingCollator(0)(order)
    expected, theirs, their_routes = forward_backward(model, apart)
    packed = PackingCollator(0, flatten=layout == "flat")(packs)
    loss, ours, our_routes = forward_backward(model, packed)
    # Sums of a few hundred float32 products in another order, as in the tests of the fused loss.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        error = (ours[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{parameter}: {error:.1e}"
    real = torch.cat(
        [torch.arange(len(one["input_ids"])) + i * packed["input_ids"].shape[1] for i, one in enumerate(packs)]
    )
    real = real if layout != "flat" else slice(None)
    for their_index, our_index in zip(their_routes, our_routes, strict=True):
        assert torch.equal(our_index[real], their_index[apart["attention_mask"].flatten().bool()])


def contains(one, row):
    text = one["input_ids"].tolist()
    return any(
        text[i : i + len(row["input_ids"])] == row["input_ids"] for i, p in enumerate(one["position_ids"]) if p == 0
    )


@pytest.mark.parametrize("name", SDPA_NAMES)
def test_isolation_holds_for_attention_and_leaves_the_model_as_it_was(name):
    model = model_of(name)
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    check_document_isolation(model)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_model_whose_own_masks_ignore_positions_is_given_masks():
    model = model_of("gpt_oss", "eager")
    alone = {"input_ids": token_ids(1, 6), "use_cache": False}
    packed = {"input_ids": token_ids(1, 12), "position_ids": torch.tensor([[*range(6)] * 2]), "use_cache": False}
    with torch.no_grad():
        before, leaking = model(**alone).logits, model(**packed).logits
        check_document_isolation(model)
        check_document_isolation(model)
        assert torch.equal(model(**alone).logits, before)
        assert not torch.allclose(model(**packed).logits[:, 6:], leaking[:, 6:])
    assert len(model.model._forward_pre_hooks) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*SDPA_NAMES, "mixtral_window"])
def test_our_masks_give_the_bits_of_the_models_own(name, attention):
    model = model_of(name.removesuffix("_window"), attention)
    if name.endswith("_window"):
        model.config.sliding_window = 5  # without a list of layers, it holds for all
    positions = torch.tensor([[*range(20), *range(3), 0, 0], [*range(1), *range(24)]])  # two of padding; a lone token
    batch = {"input_ids": token_ids(2, 25), "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
        seen = []
        assert mask_documents(model)
        model.model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
        assert torch.equal(model(**batch).logits, expected)
    assert seen[0] is not None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*SDPA_NAMES, "mixtral_window", "gpt_oss"])
def test_our_masks_of_padded_rows_give_the_bits_of_the_models_own(name, attention, side):
    model = model_of(name.removesuffix("_window"), "eager" if name == "gpt_oss" else attention)
    if name.endswith("_window"):
        model.config.sliding_window = 5
    mask = torch.ones(3, 25, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 22)):  # more than a window of 16, whose tokens would see nothing
        mask[row, 25 - padding :] = 0
    mask = mask if side == "right" else mask.flip(1)
    batch = {"input_ids": token_ids(3, 25), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
        assert mask_documents(model)
        seen = []
        model.model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
        ours = model(**batch).logits
    assert torch.equal(ours[mask != 0], expected[mask != 0])
    assert ours.isfinite().all()
    assert seen[0] is not mask


def test_added_masks_are_stored_as_attention_on_a_gpu_wants_them():
    added = as_added(torch.ones(2, 13, 13, dtype=torch.bool).tril(), torch.bfloat16)
    assert added.shape == (2, 1, 13, 13)
    assert all(stride % 8 == 0 for stride in added.stride()[:-1])
    assert torch.equal(added == 0, torch.ones(2, 1, 13, 13, dtype=torch.bool).tril())


def test_masks_for_a_gpu_leave_the_cpu_to_the_models_own():
    model = model_of("gemma4")
    seen = []
    assert mask_documents(model, on_host=False)
    model.model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw.get("attention_mask")), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=token_ids(1, 6), position_ids=torch.arange(6)[None], use_cache=False)
    assert seen == [None]


def test_model_with_linear_attention_is_refused_with_the_reason():
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    config = transformers.Qwen3NextConfig(
        **COMMON,
        **linear,
        linear_value_head_dim=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(
        UnsupportedModelError, match=r"qwen3_next model: its layers \(full_attention, linear_attention\)"
    ):
        check_document_isolation(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_a_step_on_packs_is_the_step_on_their_rows(checkpoints, name, tmp_path):
    results = []
    rows = [*sums(15), LONG]
    for packing in (False, True):
        model = packed_with_lora(checkpoints[name])
        options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "per_device_train_batch_size": 16}
        trainer = sft_trainer(
            model, tmp_path, rows=rows, eval_dataset=sums(7, offset=1), max_length=90, packing=packing, **options
        )
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        results.append((losses(trainer)[0], evaluated, adapter_weights(model), trainer))
    (loss, evaluated, weights, apart), (packed_loss, packed_evaluated, packed_weights, packed) = results
    assert packed.train_packs.efficiency > 0.75
    assert len(packed.train_dataset) < len(apart.train_dataset) / 2
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_evaluated == pytest.approx(evaluated, rel=1e-6)
    assert packed.throughput.total_tokens == apart.throughput.total_tokens == apart.train_rows.num_tokens
    for key, weight in weights.items():
        torch.testing.assert_close(packed_weights[key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "at"),
    [({"packing": True, "max_length": 90}, 3), ({"train_sampling_strategy": "group_by_length"}, 3),
     ({"train_sampling_strategy": "group_by_length"}, 6)],
    ids=["packing", "grouped by length", "grouped by length, between epochs"],
)  # fmt: skip
def test_resumed_run_ends_with_identical_weights(checkpoints, options, at, tmp_path):
    rows = [row | {"completion": row["completion"] * (1 + i % 5)} for i, row in enumerate(sums(24))]
    options = options | {"max_steps": 9, "save_strategy": "steps", "save_steps": 3}
    size = 2 if options.get("packing") else 4
    options["per_device_train_batch_size"] = size
    options |= {"rows": rows, "eval_dataset": sums(5)}
    whole = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, **options)
    assert len(whole.get_train_dataloader()) in (5, 6)
    whole.evaluate()  # which a resumed run does not repeat
    whole.train()
    resumed = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert losses(resumed) == losses(whole)
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight), name


def test_grouping_by_length_leaves_less_padding(checkpoints, tmp_path):
    rows = [row | {"completion": "x" * (1 + 7 * (i % 8))} for i, row in enumerate(sums(64))]
    padding = []
    for strategy in ("random", "group_by_length"):
        trainer = sft_trainer(
            load(checkpoints["olmoe"]), tmp_path, rows=rows, train_sampling_strategy=strategy, max_steps=-1
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(len(mask) for mask in masks) == 64
        padding.append(sum(int((mask == 0).sum()) for mask in masks))
    assert padding[1] < padding[0] / 3


def test_each_epoch_groups_by_length_in_another_order_that_the_seed_repeats():
    rows = examples([2 + i % 9 for i in range(40)])
    orders = []
    for seed, epoch in ((1, 0), (1, 0), (1, 1), (7, 0)):
        sampler = SeededLengthGroupedSampler(4, rows, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_unusable_options_are_refused(checkpoints, tmp_path):
    model = load(checkpoints["olmoe"])
    with pytest.raises(ValueError, match="packing needs a max_length"):
        sft_trainer(model, tmp_path, packing=True, max_length=None)
    with pytest.raises(
        ValueError, match="on_too_long is 'cut', expected one of reject, truncate, truncate_left, split"
    ):
        sft_trainer(model, tmp_path, on_too_long="cut")
    with pytest.raises(DataError, match=r"no row is left to train on.*tokens, max_length is 5"):
        sft_trainer(model, tmp_path, packing=True, max_length=5)
