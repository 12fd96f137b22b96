"""The shipped chat templates: the text of the published ones, the right spans, and which is taken when."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import moeft.demo
from moeft.config.sources import ChatTemplateName
from moeft.data import templates
from moeft.data.chat import encode_messages
from moeft.data.rendering import Renderer
from moeft.data.rows import Row
from moeft.errors import DataError
from tests import real_models

BASE = Path(moeft.demo.__file__).parent / "base"
# Rendered by the published templates, as TRL 1.16.0 ships them.
VECTORS = json.loads((Path(__file__).parent / "vectors" / "chat_templates.json").read_text("utf-8"))
CASES = [(name, i) for name, published in VECTORS.items() for i in range(len(published["cases"]))]
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=12).map(lambda text: "x" + text)
SPACED = st.sampled_from(["hi", "hi\n", " hi  ", "a\n\nb\n\n", "é 😀 ", "same"]) | ANY_TEXT

CALL = {"type": "function", "id": "1", "function": {"name": "heat", "arguments": {"to": 20, "unit": "C"}}}
TOOLS = [{"type": "function", "function": {"name": "heat", "description": "Warm up", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    {"role": "user", "content": "Warm me."},
    {"role": "assistant", "content": "", "reasoning_content": "Cold.", "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "tool_call_id": "1"},
    {"role": "assistant", "content": "Warm now."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def spans_of(tokenizer, template, messages, **options):
    tokenizer.chat_template = template
    text, spans, untrained = Renderer(tokenizer, **options)(Row(messages, 1, TOOLS))
    return [text[span.start : span.stop] for span in spans], [text[span.start : span.stop] for span in untrained]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_shipped_template_writes_the_text_of_the_published_one(tokenizer, name, case):
    wanted = VECTORS[name]["cases"][case]
    text = tokenizer.apply_chat_template(
        wanted["messages"],
        tools=wanted["tools"],
        chat_template=templates.shipped(name),
        tokenize=False,
        **wanted["options"],
    )
    assert text == wanted["text"]


def test_recipes_know_every_shipped_template():
    assert set(get_args(ChatTemplateName)) == templates.TURN_MARKERS.keys()


def test_published_templates_are_known_by_the_hash_of_the_vectors():
    for name, published in VECTORS.items():
        assert templates.PUBLISHED[published["source"].split()[-1]] == name


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(st.sampled_from(["chatml", "llama3", "gemma3", "gemma4"]), st.lists(SPACED, min_size=2, max_size=6))
def test_generation_marks_and_prefixes_find_the_same_spans(tokenizer, name, contents):
    roles = ("user", "assistant") * len(contents)
    contents = contents[: len(contents) // 2 * 2]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    tokenizer.chat_template = templates.shipped(name)
    marked = Renderer(tokenizer)(Row(messages, 1))
    # Without the marks, and with nothing to stand in for them.
    tokenizer.chat_template = re.sub(
        r"(end)?generation -%", lambda match: "endif -%" if match[1] else "if true -%", tokenizer.chat_template
    )
    unmarked = Renderer(tokenizer)
    unmarked.marked_template = None
    by_prefixes = unmarked(Row(messages, 1))
    assert marked[0] == by_prefixes[0]
    assert [(s.start, s.stop) for s in marked[1]] == [(s.start, s.stop) for s in by_prefixes[1]]


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        (
            "gemma4",
            [
                '<|channel>thought\nCold.\n<channel|><|tool_call>call:heat{to:20,unit:<|"|>C<|"|>}<tool_call|>'
                "<|tool_response>",
                "Warm now.<turn|>",
            ],
        ),
        (
            "qwen3",
            [
                "<think>\nCold.\n</think>\n\n<tool_call>\n"
                '{"name": "heat", "arguments": {"to": 20, "unit": "C"}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nWarm now.<|im_end|>",
            ],
        ),
    ],
)
def test_calls_and_thoughts_are_trained_and_the_answers_of_tools_are_not(tokenizer, name, trained):
    assert spans_of(tokenizer, templates.shipped(name), WITH_TOOLS) == (trained, [])
    masked = spans_of(tokenizer, templates.shipped(name), WITH_TOOLS, reasoning="mask")
    assert masked == (trained, ["Cold."])
    stripped, _ = spans_of(tokenizer, templates.shipped(name), WITH_TOOLS, reasoning="strip")
    assert "Cold." not in "".join(stripped)
    last, _ = spans_of(tokenizer, templates.shipped(name), WITH_TOOLS, train_on="last")
    assert last == trained[1:]


def test_thoughts_are_masked_where_turns_are_found_by_prefixes(tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}"
        "{% endif %}{{ m.content + '#' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": " why\n"}]
    tokenizer.chat_template = template
    text, spans, untrained = Renderer(tokenizer, reasoning="mask")(Row(messages, 1))
    assert text == "user:q#assistant:(why)a#"
    assert [text[s.start : s.stop] for s in spans] == ["(why)a#"]
    assert [text[s.start : s.stop] for s in untrained] == ["why"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3"])
def test_template_without_a_form_for_tools_refuses_them(tokenizer, name):
    tokenizer.chat_template = templates.shipped(name)
    with pytest.raises(Exception, match="no form for tool"):
        Renderer(tokenizer)(Row(WITH_TOOLS, 1))


def test_answer_of_a_tool_without_a_call_is_refused(tokenizer):
    tokenizer.chat_template = templates.shipped("gemma4")
    messages = [WITH_TOOLS[0], WITH_TOOLS[2], WITH_TOOLS[3]]
    with pytest.raises(Exception, match="turn 2 is the answer of a tool, and no call stands before it"):
        Renderer(tokenizer)(Row(messages, 1))


def test_name_path_and_family_choose_the_template(tokenizer, tmp_path):
    own = tokenizer.chat_template = "own"
    assert templates.apply(tokenizer, model_type="gemma4_text") is None
    assert tokenizer.chat_template == own
    file = tmp_path / "mine.jinja"
    file.write_text("mine")
    assert templates.apply(tokenizer, file) == str(file)
    assert tokenizer.chat_template == "mine"
    assert "gemma3, shipped with moeft; the tokenizer spells <start_of_turn>" in templates.apply(tokenizer, "gemma3")
    assert tokenizer.chat_template == templates.shipped("gemma3")
    with pytest.raises(DataError, match="gemma5 is no file and no name of a chat template"):
        templates.apply(tokenizer, "gemma5")


def test_tokenizer_without_template_gets_that_of_its_family_if_it_has_the_tokens(tokenizer):
    for model_type, name in (("gemma4_text", "gemma4"), ("gemma3", None), ("llama", None), ("unheard_of", None)):
        tokenizer.chat_template = None
        templates.apply(tokenizer, model_type=model_type)
        assert tokenizer.chat_template == (name and templates.shipped(name))


@pytest.mark.slow
@pytest.mark.parametrize("folder", [real_models.gemma3_270m, real_models.smollm2_135m])
def test_real_tokenizers_train_the_reply_and_its_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder())
    templates.apply(tokenizer, model_type="gemma3_text")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüße 👋🏽 \n"}]
    for _ in range(2):
        example = encode_messages(messages, tokenizer)
        trained = tokenizer.decode(example["input_ids"][example["labels"] != -100])
        assert trained in ("Grüße 👋🏽<end_of_turn>", "Grüße 👋🏽 \n<|im_end|>")
        messages = [*messages, *messages][2:]
