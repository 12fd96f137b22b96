"""Models that are told where documents lie compute what they compute with masks, and the others are left alone."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
import transformers

import moeft
from moeft.data.collate import PackingCollator, PaddingCollator
from moeft.data.packing import pack
from moeft.data.pair_batches import PairCollator
from moeft.errors import UnsupportedModelError
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.document_reading import attend_inside_documents
from moeft.kernels.document_attention import gpu
from moeft.training.diagnosis import _rows_of
from moeft.training.preference.scores import score_pairs
from tests.library_attention import LibraryAttention
from tests.tiny_models import COMMON, CONFIGS, tiny_config, tiny_model, token_ids
from tests.tiny_preferences import encoded, policy
from tests.tiny_training import losses, packed_with_lora, sft_trainer, sums

OTHER_LAYERS = ("qwen3_next", "qwen3_5_moe", "granitemoehybrid", "minimax", "lfm2_moe")
NAMES = [name for name in CONFIGS if name not in (*OTHER_LAYERS, "gpt_oss")]
ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in (token_ids(1, length, seed=length)[0].tolist() for length in (30, 23, 17, 9, 5, 2))
]
PACKS = pack(ROWS, 33).packs
REAL = torch.tensor([[i < len(one["input_ids"]) for i in range(32)] for one in PACKS])


def results(model, batch, real):
    """Logits of real tokens, and gradients."""
    model.zero_grad()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[real]
    torch.manual_seed(0)
    (logits * torch.randn(logits.shape)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # Sums of a few hundred float32 products in another order, as in the tests of packs.
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("rows", ["packs", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_with_masks(name, rows):
    model = tiny_model(name)
    collator, batch = (PackingCollator, PACKS) if rows == "packs" else (PaddingCollator, ROWS)
    batches = [collator(0, documents=told)(batch) for told in (False, True)]
    real = REAL if rows == "packs" else batches[0]["attention_mask"].bool()
    expected = results(model, batches[0], real)
    assert attend_inside_documents(model) is None
    assert_close(results(model, batches[1], real), expected)
    assert_close(results(model, batches[0], real), expected)  # without documents, it is sdpa


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gemma4", "gemma4_e4b", "qwen3_moe"])
def test_kernels_of_a_gpu_are_asked_for_the_same_under_every_checkpointing(name, policy, monkeypatch):
    model = tiny_model(name).train()
    told = PackingCollator(0, documents=True)(PACKS)
    expected = results(model, {key: value for key, value in told.items() if key != "documents"}, REAL)
    assert attend_inside_documents(model) is None
    apply_checkpointing(model, policy)
    monkeypatch.setattr(gpu, "has_kernel", lambda *_, **__: True)
    monkeypatch.setattr(gpu, "WIDEST_FLASH", 16)  # the full layers of gemma4 are wider
    with LibraryAttention() as kernels:
        assert_close(results(model, told, REAL), expected)
    layers = model.config.num_hidden_layers
    assert len(kernels.calls) >= layers * (1 if policy == "none" else 2)
    windows = [call["window_size"] for kernel, call in kernels.calls if "varlen" in kernel]
    assert ([15, 0] in windows) == name.startswith("gemma4")  # 16 tokens, the query one of them
    assert any("efficient" in kernel for kernel, _ in kernels.calls) == name.startswith("gemma4")


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_generation_and_masks_of_a_caller_are_as_before(name):
    model = tiny_model(name)
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # on the left, as generation pads
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}

    def found():
        return model.generate(ids, **options), model(input_ids=ids, attention_mask=mask).logits

    expected = found()
    assert attend_inside_documents(model) is None
    assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))
    documents = {"documents": [[20], [20]]}  # which a call with a cache, or with a mask of its own, must not heed
    assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=True, **documents).logits, expected[1])
    own = torch.ones(20, 20, dtype=torch.bool).tril().triu(-3).expand(2, 1, -1, -1)
    masked = model(input_ids=ids, attention_mask=own, use_cache=False)
    assert torch.equal(model(input_ids=ids, attention_mask=own, use_cache=False, **documents).logits, masked.logits)


def test_model_can_be_copied_and_asked_again():
    model = tiny_model("llama")
    assert attend_inside_documents(model) is None
    again = copy.deepcopy(model)
    assert attend_inside_documents(again) is None
    assert len(again.model._forward_pre_hooks) == 1


def test_lengths_that_are_not_those_of_the_batch_are_refused():
    model = tiny_model("llama")
    attend_inside_documents(model)
    for documents in ([[20]], [[20], [19]], [[20], [20], [20]]):
        with pytest.raises(
            ValueError, match="the batch 20 in each of 2; give the lengths of all documents of each row"
        ):
            model(input_ids=token_ids(2, 20), documents=documents, use_cache=False)


def changed(name, **changes):
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        *((lambda name=name: tiny_model(name), "it has layers of other kinds: ") for name in OTHER_LAYERS),
        (lambda: tiny_model("gpt_oss"), "its attention is 'eager', not 'sdpa'"),
        (lambda: changed("llama", attention_dropout=0.1), "its attention has dropout 0.1"),
        (lambda: changed("phimoe", sliding_window=5), r"windows \[None, None\], expected \[5, 5\]"),
        (lambda: changed("gemma3", use_bidirectional_attention=True), "is_causal=False"),
        (lambda: tiny_model("llama").to("meta"), "need an NVIDIA GPU, not meta"),
    ],
)
def test_what_attention_inside_documents_does_not_know_keeps_masks(model, reason):
    model = model()
    before = model.config._attn_implementation
    found = attend_inside_documents(model)
    assert found is not None
    assert re.search(reason, found), found
    assert model.config._attn_implementation == before
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.bfloat16, "T4 is older than sm_80"),
        ((8, 0), torch.float32, "it computes in torch.float32, not in 16 bits"),
        ((8, 0), torch.float16, None),
    ],
)
def test_gpus_and_types_without_kernels_keep_masks(capability, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    model = tiny_model("llama", dtype)
    assert attend_inside_documents(model, device=torch.device("cuda")) == reason  # to which it is moved later
    assert model.config._attn_implementation == ("sdpa" if reason else "moeft_varlen")


@pytest.mark.parametrize(
    ("name", "changes", "widths"),
    [("llama", {"head_dim": 12}, r"\[\(12, 12\)\]"), ("gemma3", {"head_dim": 264}, r"\[\(264, 264\)\]")],
    ids=["no multiple of 8", "wide, with a window"],
)
def test_heads_without_a_kernel_keep_masks_on_a_gpu(name, changes, widths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = changed(name, **changes).to(torch.bfloat16)
    reason = attend_inside_documents(model, device=torch.device("cuda"))
    assert re.search(f"no kernel takes the widths of its heads, {widths}", reason), reason
    assert attend_inside_documents(model) is None  # a CPU computes with any


@pytest.mark.parametrize(("name", "unknown"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_scores_that_sdpa_would_get_wrong_are_refused_and_the_usual_attention_taken(name, unknown):
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = tiny_config(name) if name in CONFIGS else transformers.Gemma2Config(**COMMON, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="moeft_varlen")
    with pytest.raises(UnsupportedModelError, match=f"attends with {unknown}, which moeft_varlen does not know"):
        model(token_ids())
    assert f"attends with {unknown}" in attend_inside_documents(model)
    assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")
    assert model(token_ids()).logits.isfinite().all()


def test_model_that_keeps_documents_to_itself_is_found_out(monkeypatch):
    """That attention is told through keyword arguments is a habit of transformers, not a promise."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, documents=None, **k: forward(*a, **k)
    assert "mask" in attend_inside_documents(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_can_be_asked_for_by_name_while_loading(checkpoints):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["olmoe"], attn_implementation="moeft_varlen")
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["olmoe"])
    ids = token_ids(2, 9)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_collators_say_where_documents_lie_padding_included():
    batch = PackingCollator(0, documents=True)(PACKS)
    assert batch["documents"] == [[30, 2], [23, 9], [17, 5, 10]]
    assert PackingCollator(0, flatten=True, documents=True)(PACKS)["documents"] == [[30, 2, 23, 9, 17, 5]]
    padded = PaddingCollator(0, pad_to_multiple_of=32, documents=True)(ROWS)
    assert padded["documents"] == [[30, 2], [23, 9], [17, 15], [9, 23], [5, 27], [2, 30]]
    assert [row["documents"] for _, row in _rows_of(batch)] == [[[30, 2]], [[23, 9]], [[17, 5, 10]]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pairs_have_the_scores_that_they_have_with_masks(layout):
    model = policy()
    pairs = encoded().pairs
    pairs = [dict(pairs[i], reference=torch.zeros(2).numpy(), row=i) for i in range(3)]
    expected = score_pairs(model, PairCollator(0, layout)(pairs)).sums
    assert attend_inside_documents(model) is None
    batch = PairCollator(0, layout, documents=True)(pairs)
    torch.testing.assert_close(score_pairs(model, batch).sums, expected, rtol=1e-5, atol=1e-5)


def test_trainer_tells_documents_of_packs_unless_it_is_told_not_to(checkpoints, tmp_path):
    options = {"packing": True, "max_length": 90, "max_steps": 2}
    found = []
    for asked in (True, False):
        model = packed_with_lora(checkpoints["gemma4"])
        trainer = sft_trainer(model, tmp_path, document_attention=asked, **options)
        assert trainer.data_collator.documents == asked
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert not sft_trainer(packed_with_lora(checkpoints["gemma4"]), tmp_path).data_collator.documents  # rows, on a CPU


def test_attention_that_was_asked_for_and_cannot_be_had_is_warned_of(tmp_path, caplog):
    model = changed("llama", attention_dropout=0.1)
    model.set_attn_implementation("moeft_varlen")
    model = moeft.add_lora(model, 4)
    with caplog.at_level(logging.WARNING):
        trainer = sft_trainer(model, tmp_path, rows=sums(4))
    assert "this llama model attends with masks: its attention has dropout 0.1" in caplog.text
    assert not trainer.data_collator.documents
    assert model.config._attn_implementation == "sdpa"
