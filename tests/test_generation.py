"""Batched greedy generation on the embedded base."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeft.demo
from moeft.errors import DataError
from moeft.evaluation.generation import generate_replies

BASE = Path(moeft.demo.__file__).parent / "base"
PROMPTS = ["Who goes there?", "Speak of the budget and of the peace of the world.", "What news, my lord?"]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def one_by_one(model, tokenizer, prompts, max_new_tokens):
    replies = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        replies.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def test_batched_replies_equal_unpadded_ones_in_the_order_of_the_prompts(model, tokenizer):
    expected = one_by_one(model.eval(), tokenizer, PROMPTS, 12)
    assert generate_replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=2) == expected
    assert all(expected)


def test_messages_are_accepted_as_prompts(model, tokenizer):
    as_messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    options = {"max_new_tokens": 6}
    assert generate_replies(model, tokenizer, as_messages, **options) == generate_replies(
        model, tokenizer, PROMPTS, **options
    )


def test_training_mode_and_padding_side_are_put_back(model, tokenizer):
    model.train()
    model.lm_head.eval()
    tokenizer.padding_side = "right"
    generate_replies(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    assert tokenizer.padding_side == "right"


def test_peft_model_generates_with_its_adapter(tokenizer):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    before = generate_replies(base, tokenizer, PROMPTS, max_new_tokens=8)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=True, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    assert generate_replies(wrapped, tokenizer, PROMPTS, max_new_tokens=8) == before
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    assert generate_replies(wrapped, tokenizer, PROMPTS, max_new_tokens=8) != before


def test_unusable_tokenizers_and_sizes_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="batch_size 0"):
        generate_replies(model, tokenizer, PROMPTS, batch_size=0)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a padding nor an end-of-sequence token"):
        generate_replies(model, tokenizer, PROMPTS)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        generate_replies(model, tokenizer, PROMPTS)


def test_tokenizer_without_a_padding_token_gives_the_same_replies(model, tokenizer):
    expected = generate_replies(model, tokenizer, PROMPTS, max_new_tokens=8)
    tokenizer.pad_token = None
    assert generate_replies(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert tokenizer.pad_token is None


def test_special_tokens_stay_if_asked_for_up_to_the_end_of_the_turn(model, tokenizer):
    prompts, options = ["hello", "a longer request"], {"max_new_tokens": 12}
    plain = generate_replies(model, tokenizer, prompts, **options)
    marked = generate_replies(model, tokenizer, prompts, skip_special_tokens=False, **options)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in marked]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == plain
    assert all(tokenizer.pad_token_id not in row and tokenizer.eos_token_id not in row for row in ids)
