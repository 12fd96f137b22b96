"""All tool protocols: what is written is read back, and any other text is read or refused at a position inside it."""

from __future__ import annotations

import json
import keyword
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.data.templates import shipped
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.tool_protocols import PROTOCOLS, ToolCall, ToolCallError, protocol
from tests.shared_data import SHARED, needs_shared_data
from tests.tiny_training import tiny_tokenizer

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=12)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
scalars = texts | numbers | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts.filter(bool), inner, max_size=3),
    max_leaves=8,
)
TOKENIZER = tiny_tokenizer()
few = settings(max_examples=40, deadline=None)
calls = st.lists(st.builds(ToolCall, names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3)
MARKS = ("[TOOL: ", "<|tool_call>", "<tool_call|>", "<functioncall>", "<|endoftext|>", '<|"|>', "call:", "f", "{", "}")
pieces = st.lists(
    st.sampled_from([*MARKS, "[", "]", "'", '"', "=", ":", ",", "1", "\\", " ", "\n", '"name"', '"arguments"', "null"]),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("name", PROTOCOLS)
@few
@given(written=calls)
def test_what_is_written_is_read_back(name, written):
    try:
        text = PROTOCOLS[name].format(written)
    except ValueError as error:  # a text that holds a mark of the protocol, or a name that Python keeps for itself
        if name == "python":
            assert any(map(keyword.iskeyword, (call.name for call in written)))
            return
        assert name in ("gemma", "glaive")
        assert any(mark in str(error) for mark in MARKS)  # noqa: PT017
        return
    assert list(PROTOCOLS[name].parse(text).calls) == written


@pytest.mark.parametrize("name", PROTOCOLS)
@few
@given(text=pieces)
def test_any_text_is_read_or_refused_at_a_position_inside_it(name, text):
    try:
        PROTOCOLS[name].parse(text)
    except ToolCallError as error:
        assert 0 <= error.position <= len(text)  # noqa: PT017


@pytest.mark.parametrize("name", PROTOCOLS)
@few
@given(written=calls, data=st.data())
def test_a_broken_call_is_no_other_error(name, written, data):
    try:
        text = PROTOCOLS[name].format(written)
    except ValueError:
        return
    place = data.draw(st.integers(0, len(text) - 1))
    try:
        PROTOCOLS[name].parse(text[:place] + data.draw(pieces) + text[place + 1 :])
    except ToolCallError as error:
        assert error.position <= len(error.text)  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "text", "position", "reason"),
    [
        ("bracket", "So: [TOOL: f a='[1,']", 19, "no valid JSON"),
        ("bracket", "[TOOL: f a='[1]' b=\"x\"", 22, "or ']'"),
        ("bracket", "[TOOL: f a='[1]\n']", 15, "no line break"),
        ("bracket", '[TOOL: f a=\'{"k": 1, "k": 2}\']', 12, "key 'k' is given twice"),
        ("bracket", "[TOOL:f]", 0, "expected '[TOOL: '"),
        ("gemma", "<|tool_call>call:f{a:tru}<tool_call|>", 21, "no valid JSON"),
        ("gemma", '<|tool_call>call:f{a:<|"|>x}', 28, "expected <|"),
        ("gemma", "<|tool_call>call:f{a:1,a:2}<tool_call|>", 23, "given twice"),
        ("gemma", "<|tool_call>call:f{}", 20, "expected '<tool_call|>'"),
        ("gemma", "<|tool_call>call:f{a:" + "[" * 80, 85, "nested deeper"),
        ("openai", '{"name": "f", "arguments": {"a": NaN}}', 0, "no JSON number"),
        ("openai", '{"name": "f"} and', 13, "text after the JSON value"),
        ("openai", '{"nam": "f"}', 0, "the name of a called tool"),
        ("openai", '[{"name": "f", "arguments": "{"}]', 0, "not valid JSON"),
        ("glaive", "ok <functioncall> {name}", 19, "a call cannot be read"),
        ("hermes", 'So: <tool_call>\n{"name": "f"}', 29, "expected </tool_call>"),
        ("hermes", "<tool_call>f</tool_call>", 11, "no valid JSON"),
        ("python", "[f(a=1), 2]", 0, "calls of functions alone"),
        ("python", "[f(1)]", 0, "an argument without a name"),
        ("python", "f(a=1, a=2)", 0, "a"),
        ("python", " f(a=1) is it", 1, "calls of functions alone"),
        ("python", "f(a=1) was it", 0, "no calls in Python's words"),
        ("python", "f(a=1, **{'a': 2})", 0, "an argument twice"),
        ("python", "f(a=" + "(" * 300, 0, "no calls in Python's words"),
        ("python", "f(a=" + "b+" * 3000 + "c)", 0, "no calls in Python's words"),
        ("python", "f(a=" + "-" * 100_000 + "c)", 0, "no calls in Python's words"),
    ],
)
def test_errors_say_where_and_why(name, text, position, reason):
    with pytest.raises(ToolCallError) as caught:
        PROTOCOLS[name].parse(text)
    assert (caught.value.position, reason in caught.value.reason) == (position, True), caught.value


def test_what_is_said_stands_apart_from_calls():
    call = ToolCall("f", {"a": [1, "b'c"]})
    for name in ("bracket", "gemma", "glaive", "hermes"):
        reply = PROTOCOLS[name].parse("Let me see. " + PROTOCOLS[name].format([call]))
        assert (reply.said.strip(), reply.calls) == ("Let me see.", (call,))
        assert PROTOCOLS[name].parse("It is sunny [today].").calls == ()
    message = {
        "content": "Let me see.",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert PROTOCOLS["openai"].parse(json.dumps(message)).said == "Let me see."
    assert PROTOCOLS["openai"].parse("[today] it is sunny").calls == ()


def test_python_values_are_those_of_json_or_the_text_that_stands_there():
    (call,) = PROTOCOLS["python"].parse("[m.f(a=(1, -2.5), b={'k': None}, c=today, d=3 * x, e=1e999, f={1: 2})]").calls
    expected = {"a": [1, -2.5], "b": {"k": None}, "c": "today", "d": "3 * x", "e": "1e309", "f": "{1: 2}"}
    assert call == ToolCall("m.f", expected)
    kept = [ToolCall("f", {"a": 1, "from": "here"})]
    assert PROTOCOLS["python"].format(kept) == "[f(a=1, **{'from': 'here'})]"
    assert PROTOCOLS["python"].parse("It is sunny (today).").calls == ()


@few
@given(written=calls)
def test_hermes_reads_what_qwens_chat_template_writes(written):
    functions = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in written]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": functions}]
    text = TOKENIZER.apply_chat_template(turns, chat_template=shipped("qwen3"), tokenize=False)
    assert PROTOCOLS["hermes"].parse(text).calls == tuple(written)


def test_true_is_not_one_and_one_is_one_point_zero():
    assert ToolCall("f", {"a": 1}) == ToolCall("f", {"a": 1.0})
    assert ToolCall("f", {"a": True}) != ToolCall("f", {"a": 1})
    assert ToolCall("f", {"a": [True]}) != ToolCall("f", {"a": [1]})


@few
@given(written=calls)
def test_gemma_reads_what_its_chat_template_writes(written):
    functions = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in written]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": functions}]
    text = TOKENIZER.apply_chat_template(turns, chat_template=shipped("gemma4"), tokenize=False)
    try:
        expected = PROTOCOLS["gemma"].format(written)
    except ValueError:
        return
    if all(re.fullmatch(r"\w+", key) for call in written for key in _keys(dict(call.arguments))):
        assert PROTOCOLS["gemma"].parse(text).calls == tuple(written)
        assert expected in text


def _keys(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="no tool protocol 'xml', expected one of bracket, gemma"):
        protocol("xml")


TOOLS = [
    {"name": "scale", "parameters": {"type": "object", "properties": {"count": {"type": "integer"},
     "dry": {"type": "boolean"}, "name": {"type": "string"}}, "required": ["count"]}},
    {"name": "stop"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("scale", {"count": 2}, None),
        ("stop", {}, None),
        ("scale", {}, "'count' is a required property"),
        ("scale", {"count": "two"}, "is not of type 'integer'"),
        ("scale", {"count": 2, "speed": 1}, "'speed', which is no parameter"),
        ("start", {}, "'start', which is no tool"),
    ],
)
def test_calls_are_held_to_their_schemas(name, arguments, problem):
    found = ToolSchemas(TOOLS).problem(name, arguments)
    assert found is None if problem is None else problem in found


def test_texts_become_the_numbers_that_a_schema_wants():
    schemas = ToolSchemas(TOOLS)
    typed = schemas.typed("scale", {"count": "3", "dry": "true", "name": "4"})
    assert typed == {"count": 3, "dry": True, "name": "4"}
    for text in ("three", "NaN", "Infinity", "1e999", "[" * 100_000):
        assert schemas.typed("scale", {"count": text}) == {"count": text}


@pytest.mark.parametrize(
    ("tools", "reason"),
    [([], "there are no tools"), ([{"name": "a"}, {"name": "a"}], "names must differ"), ("{", "not valid JSON")],
)
def test_schemas_that_cannot_be_used_say_why(tools, reason):
    with pytest.raises(DataError, match=reason):
        ToolSchemas(tools)


@needs_shared_data
def test_calls_of_real_dialogues_survive_every_protocol():
    from moeft.data.reading import read_rows

    rows = read_rows(SHARED / "toolcall" / "glaive_300.jsonl", turns="any").rows
    found = [call["function"] for row in rows for m in row.messages for call in m.get("tool_calls", [])]
    assert len(found) > 200
    for function in found:
        call = ToolCall(function["name"], function["arguments"])
        for name in PROTOCOLS:
            assert PROTOCOLS[name].parse(PROTOCOLS[name].format([call])).calls == (call,)
