"""The embedded base: its files, its chat template, and that it cannot do the demo's task yet."""

from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeft.demo
from moeft.demo.ops_agent import generate
from moeft.evaluation.generation import generate_replies
from moeft.evaluation.tool_score import score_tool_calls

BASE = Path(moeft.demo.__file__).parent / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def test_weights_stay_under_16_megabytes():
    assert (BASE / "model.safetensors").stat().st_size < 16_000_000


def test_template_renders_the_turns_the_base_was_trained_on(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "hello"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\nhello<turn|>\n"
    prompt = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"


def test_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(TemplateError, match="unknown role 'tool', expected system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_turn_markers_are_single_tokens_and_the_end_marker_stops_generation(tokenizer):
    config = AutoModelForCausalLM.from_pretrained(BASE).generation_config
    assert tokenizer.convert_tokens_to_ids(["<bos>", "<|turn>", "<turn|>"]) == [2, 4, 5]
    assert config.eos_token_id == [1, 5]


def test_base_answers_no_heldout_request(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    rows = generate(seed=0)[1][:30]
    prompts = [row["messages"][0]["content"] for row in rows]
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=40)
    score = score_tool_calls(replies, [row["messages"][1]["content"] for row in rows])
    assert (score.total.exact, score.total.valid) == (0, 0)
