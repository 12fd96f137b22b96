"""Formats of rows: every way of writing a conversation gives the same messages."""

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.config.sources import FormatName
from moeft.data.formats import FORMATS
from moeft.data.preferences import read_preferences
from moeft.data.reading import read_rows
from moeft.errors import DataError
from tests.shared_data import SHARED, needs_shared_data

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LONG = [*CHAT, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOL = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
]


def one(row, **options):
    return read_rows([row], **options).rows[0]


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", {"messages": [{"role": "developer", "content": "Be short."}, *CHAT]}, [SYSTEM, *CHAT]),
        ("messages", {"messages": json.dumps(CHAT)}, CHAT),
        ("messages", {"messages": [{"role": r["role"], "content": [{"type": "text", "text": r["content"]}]}
                                   for r in CHAT]}, CHAT),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "bard", "value": "hello"}],
                      "system": "Be short."}, [SYSTEM, *CHAT]),
        ("sharegpt", {"conversations": CHAT}, CHAT),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}, CHAT),
        ("alpaca", {"instruction": "2+2?", "output": "4", "history": [["hi", "hello"]], "system": "Be short."},
         [SYSTEM, *LONG]),
        ("alpaca", {"instruction": "Add", "input": "2, 2", "output": "4"},
         [{"role": "user", "content": "Add\n2, 2"}, {"role": "assistant", "content": "4"}]),
        ("prompt_completion", {"prompt": "hi", "completion": "hello"}, CHAT),
        ("prompt_completion", {"prompt": LONG[:3], "completion": "4"},
         [LONG[0], {**LONG[1], "train": False}, *LONG[2:]]),
        ("prompt_response", {"prompt": "hi", "response": "hello"}, CHAT),
        ("prompt_response", {"question": "hi", "answer": "hello", "choices": ["a"]}, CHAT),
        ("prompt_response", {"system_prompt": "Be short.", "question": "hi", "response": "hello"}, [SYSTEM, *CHAT]),
        ("text", {"text": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"},
         CHAT),
        ("text", {"text": "<bos><|turn>system\nBe short.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
                          "<|channel>thought\nA greeting.\n<channel|>hello<turn|>\n"},
         [SYSTEM, CHAT[0], {**CHAT[1], "reasoning_content": "A greeting."}]),
        ("text", {"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
                          "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4"}, LONG),
        ("text", {"text": "USER: hi\n\n\nASSISTANT: hello <|endoftext|>"}, CHAT),
    ],
)  # fmt: skip
def test_formats_become_messages(format, row, expected):
    assert one(row).messages == expected
    assert one(row, format=format).messages == expected
    assert read_rows([row]).formats == {format: 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": WITH_TOOL, "tools": [SCHEMA]},
        {"messages": [WITH_TOOL[0],
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"id": "c1", "type": "function",
                           "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
                      {"role": "tool", "content": "4", "tool_call_id": "c1"}, WITH_TOOL[3]],
         "tools": json.dumps([SCHEMA["function"]])},
        {"messages": [WITH_TOOL[0],
                      {"role": "assistant", "content": None,
                       "function_call": {"name": "add", "arguments": '{"a": 2, "b": 2}'}},
                      {"role": "function", "name": "add", "content": "4"}, WITH_TOOL[3]],
         "functions": [SCHEMA["function"]]},
        {"messages": [WITH_TOOL[0],
                      {"role": "assistant", "content": [
                          {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'}]},
                      {"role": "tool", "content": [{"type": "text", "value": "4"}]}, WITH_TOOL[3]],
         "tools": [SCHEMA]},
        {"conversations": [{"from": "human", "value": "2+2?"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."}],
         "tools": json.dumps([SCHEMA["function"]])},
        {"system": 'SYSTEM: Use these -\n{"name": "add", "parameters": {"type": "object"}}\n',
         "chat": "USER: 2+2?\n\n\nASSISTANT: <functioncall> {\"name\": \"add\", \"arguments\": '{\"a\": 2, \"b\": 2}'} "
                 "<|endoftext|>\n\n\nFUNCTION RESPONSE: 4\n\n\nASSISTANT: It is 4. <|endoftext|>\n\n\n"},
    ],
    ids=["openai", "openai with JSON text", "openai before tools", "parts", "sharegpt", "glaive"],
)  # fmt: skip
def test_every_way_of_calling_tools_becomes_openais(row):
    read = one(row)
    messages = [message for message in read.messages if message["role"] != "system"]
    for message in messages:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", []):
            call.pop("id", None)
    assert messages == WITH_TOOL
    assert read.tools == [SCHEMA]


def test_text_and_calls_of_neighbouring_turns_become_one_turn():
    turns = [("human", "both?"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {}}'),
             ("function_call", '{"name": "g", "arguments": {}}'), ("observation", "1"), ("observation", "2"),
             ("gpt", "1 and 2.")]  # fmt: skip
    messages = one({"conversations": [{"from": role, "value": text} for role, text in turns]}).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "I look."
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["f", "g"]
    assert [message["name"] for message in messages[2:4]] == ["f", "g"]


def test_answers_are_named_by_the_identity_of_their_call():
    calls = [{"id": name, "function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    answers = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("g", "f")]
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}, *answers, CHAT[1]]
    assert [message["name"] for message in one({"messages": turns}).messages[2:4]] == ["g", "f"]


def test_flags_of_turns_are_kept_as_train():
    turns = [{**LONG[0], "weight": 0}, {**LONG[1], "weight": 0}, LONG[2], {**LONG[3], "train": True}]
    assert [message.get("train") for message in one({"messages": turns}).messages] == [None, False, None, True]


def test_reasoning_stands_beside_the_content():
    parts = [{"type": "reasoning", "value": "A greeting."}, {"type": "text", "text": "hello"}]
    for answer in ({"content": parts}, {"content": "hello", "reasoning_content": "A greeting."}):
        messages = one({"messages": [CHAT[0], {"role": "assistant", **answer}]}).messages
        assert messages[1] == {**CHAT[1], "reasoning_content": "A greeting."}


def test_text_without_markers_is_a_document():
    row = one({"text": " Once upon a time.\n"})
    assert (row.messages, row.text) == ([], " Once upon a time.\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
         "arguments of f are not valid JSON"),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "name of a called tool"),
        ({"messages": CHAT, "tools": "[{"}, "tools is text that is not valid JSON"),
        ({"messages": CHAT, "tools": [{"description": "x"}]}, r"tools\[0\] is an object without a name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]},
         r"messages\[0\].content\[0\] is of type 'image_url', expected text"),
        ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "only assistants are trained"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, r"messages\[1\].weight is 0.5"),
        ({"messages": CHAT, "label": False}, "label is false, which marks a bad answer"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "no"}]},
         r"conversations\[1\].value is text that is not valid JSON"),
        ({"conversations": [{"from": "system", "value": "x"}, *[]], "system": "y"}, "a system key and a system turn"),
        ({"instruction": "hi", "output": "x", "history": [["a"]]}, r"history\[0\] is a list, expected a pair"),
        ({"instruction": 1, "output": "x"}, "instruction is a number, expected a string"),
        ({"question": ["a"], "answer": "x"}, "question is a list, expected a string"),
        ({"text": "  "}, "text is empty"),
        ({"text": "<|turn>user\nhi<turn|>\n<|turn>wizard\nx<turn|>"}, "turn 2 is of role 'wizard'"),
        ({"text": "<|turn>user\nhi<turn|>lost<|turn>model\nx<turn|>"}, "text stands between turn 1 and the next"),
        ({"text": "<|turn>user\nhi<turn|>\n<|turn>model\n<|tool_call>call:f{}<tool_call|><turn|>"},
         "holds calls of tools"),
        ({"chat": "USER: hi ASSISTANT"}, "no assistant turn"),
        ({"chat": "USER: x\nASSISTANT: <functioncall> {broken"}, "a call cannot be read"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "preference pair"),
    ],
)  # fmt: skip
def test_broken_rows_say_what_was_expected(row, reason):
    with pytest.raises(DataError, match=reason):
        read_rows([row])


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("au a", "starts with a turn of role assistant, expected user; data.turns: trim"),
        ("sau a", "starts with a turn of role assistant"),
        ("uu a", "turn 2 is of role user after user, expected assistant"),
        ("u a a", "turn 3 is of role assistant after assistant, expected user"),
        ("u a s u a", "turn 3 is of role system, expected only as the first turn"),
        ("u a t a", "turn 3 is of role tool after assistant"),
        ("u a u", "the last turn is of role user, which nothing answers"),
    ],
)
def test_turns_out_of_order_are_refused_unless_any_is_asked_for(roles, reason):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    row = {"messages": [{"role": names[letter], "content": "x"} for letter in roles if letter != " "]}
    with pytest.raises(DataError, match=reason):
        read_rows([row])
    assert len(one(row, turns="any").messages) == len(row["messages"])


def test_trim_cuts_both_ends_and_keeps_the_system_turn():
    row = {"messages": [SYSTEM, CHAT[1], *LONG, CHAT[0]]}
    assert one(row, turns="trim").messages == [SYSTEM, *LONG]


def test_empty_turn_is_refused():
    with pytest.raises(DataError, match=r"turn 3 \(user\) is empty"):
        read_rows([{"messages": [*CHAT, {"role": "user", "content": " "}, CHAT[1]]}])


def test_forced_format_refuses_rows_of_another_and_names_are_checked():
    read = read_rows([{"messages": CHAT}, {"prompt": "hi", "completion": "hello"}], format="messages")
    assert [reject.line for reject in read.rejects] == [2]
    with pytest.raises(ValueError, match="format is 'openai', expected one of preference, messages"):
        read_rows([{"messages": CHAT}], format="openai")
    with pytest.raises(ValueError, match="turns is 'loose', expected one of strict"):
        read_rows([{"messages": CHAT}], turns="loose")


def test_mixed_file_is_read_row_by_row_and_counted_by_format():
    rows = [{"messages": CHAT}, {"prompt": "hi", "completion": "hello"}, {"messages": CHAT}]
    read = read_rows(rows)
    assert read.formats == {"messages": 2, "prompt_completion": 1}
    assert str(read) == "rows: messages 2, prompt_completion 1; 3 rows kept, 0 rejected"


def test_too_many_rejects_stop_with_a_summary_by_reason():
    rows = [{"messages": CHAT}] * 17 + [{"messages": [{"role": role}]} for role in "xy"] + [{"a": 1}]
    assert len(read_rows(rows, max_reject_share=0.15).rejects) == 3
    with pytest.raises(DataError) as raised:
        read_rows(rows, max_reject_share=0.05)
    message = str(raised.value)
    assert "3 of 20 rows (15.0%) cannot be used, at most 5.0%" in message
    assert "2 x messages[0].role is 'x'" in message
    assert "(first: line 18)" in message


@needs_shared_data
@pytest.mark.parametrize(
    ("file", "format", "rows", "calls"),
    [("toolcall/glaive_300", "sharegpt", 300, 211), ("toolcall/reasoning_50", "messages", 50, 68),
     ("tinychat/val", "messages", 136, 0), ("ifeval/gpt4_responses_540", "prompt_response", 540, 0)],
)  # fmt: skip
def test_real_files_are_read_whole(file, format, rows, calls):
    read = read_rows(SHARED / f"{file}.jsonl")
    assert (read.formats, read.rejects) == ({format: rows}, [])
    turns = [message for row in read.rows for message in row.messages]
    assert sum(len(message.get("tool_calls", [])) for message in turns) == calls
    assert all(message["name"] for message in turns if message["role"] == "tool")


keys = st.sampled_from(["type", "name", "function", "arguments"]) | st.text(max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
turn_keys = ("role", "from", "content", "value", "tool_calls", "function_call", "train", "name", "reasoning_content")
roles = st.sampled_from(("user", "assistant", "tool", "human", "gpt", "function_call", "observation"))
pieces = ["<|turn>", "<turn|>", "user\n", "model\n", "<|channel>thought\n", "<start_of_turn>", "\n", "x"]
pieces += ["USER: ", "ASSISTANT: ", "\nSYSTEM:", "<functioncall> {", "}"]
values = st.one_of(
    json_values,
    st.lists(st.sampled_from(pieces), max_size=8).map("".join),
    st.lists(st.dictionaries(st.sampled_from(turn_keys), roles | json_values, max_size=4), max_size=4),
)
row_keys = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "chat", "system"]
row_keys += ["tools", "instruction", "output", "history", "question", "answer"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(row_keys), values, min_size=1, max_size=4), max_size=5))
def test_rows_of_any_content_are_used_or_rejected(rows):
    for turns in ("strict", "trim", "any"):
        read = read_rows([{"messages": CHAT}, *rows], turns=turns)
        assert sorted([row.line for row in read.rows] + [reject.line for reject in read.rejects]) == list(
            range(1, len(rows) + 2)
        )
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert len(read_preferences([pair, *rows]).rejects) <= len(rows)


def test_recipes_name_every_format_that_can_be_trained_on():
    assert set(get_args(FormatName)) == FORMATS.keys() - {"preference"}


def test_every_format_has_a_row_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in text] == []
