"""The bracket protocol: what it accepts, where it refuses, and how replies are scored."""

import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeft.evaluation.tool_score import Tally, score_tool_calls
from moeft.tool_protocols.bracket import (
    ToolCall,
    ToolCallError,
    canonical,
    exact_match,
    format_tool_call,
    parse_tool_call,
)

identifiers = st.text(string.ascii_letters + "_", min_size=1, max_size=1).flatmap(
    lambda first: st.text(string.ascii_letters + string.digits + "_", max_size=8).map(lambda rest: first + rest)
)
values = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=20)
calls = st.builds(ToolCall, identifiers, st.dictionaries(identifiers, values, max_size=4))


@given(calls)
def test_parse_reads_what_format_writes(call):
    assert parse_tool_call(format_tool_call(call)) == call


@given(calls)
def test_canonical_does_not_depend_on_the_order_of_arguments(call):
    turned = ToolCall(call.name, dict(reversed(call.arguments.items())))
    assert canonical(format_tool_call(call)) == canonical(format_tool_call(turned))
    assert parse_tool_call(canonical(format_tool_call(call))) == call


@given(calls, st.data())
def test_removing_any_character_never_leaves_the_same_call(call, data):
    text = format_tool_call(call)
    position = data.draw(st.integers(0, len(text) - 1))
    assert not exact_match(text[:position] + text[position + 1 :], text)


@given(st.text(st.sampled_from('[]TOL: ab="\\\n'), max_size=30))
def test_any_text_is_read_or_refused_at_a_position_inside_it(text):
    try:
        call, position = parse_tool_call(text), None
    except ToolCallError as error:
        call, position = None, error.position
    if call is None:
        assert 0 <= position <= len(text)
    else:
        assert format_tool_call(call) == text


def test_escapes_are_undone_inside_values():
    assert parse_tool_call(r'[TOOL: say text="a \"b\" c:\\d"]').arguments == {"text": 'a "b" c:\\d'}


def test_call_without_arguments_is_valid():
    assert parse_tool_call("[TOOL: ping]") == ToolCall("ping", {})


def test_brackets_and_equals_signs_inside_a_value_are_text():
    assert parse_tool_call('[TOOL: say text="a=b] [TOOL: x"]').arguments == {"text": "a=b] [TOOL: x"}


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, "expected '[TOOL: '"),
        ("Sure. [TOOL: ping]", 0, "expected '[TOOL: '"),
        ("[TOOL:ping]", 0, "expected '[TOOL: '"),
        ("[TOOL: ]", 7, "the name of a tool"),
        ("[TOOL: 2nd]", 7, "the name of a tool"),
        ('[TOOL: a  b="c"]', 9, "the name of an argument"),
        ('[TOOL: a b = "c"]', 10, "expected '=\"'"),
        ("[TOOL: a b=c]", 10, "expected '=\"'"),
        ('[TOOL: a b="c" b="d"]', 15, "given twice"),
        ('[TOOL: a b="c]', 14, "closing"),
        (r'[TOOL: a b="c\n"]', 13, "after a backslash"),
        ('[TOOL: a b="c\nd"]', 13, "closing"),
        ('[TOOL: a b="c"', 14, "or ']'"),
        ('[TOOL: a b="c",d="e"]', 14, "or ']'"),
        ('[TOOL: a b="c"] ', 15, "text after the call"),
        ("[TOOL: a][TOOL: b]", 9, "text after the call"),
    ],
)
def test_invalid_call_says_where_and_why(text, position, reason):
    with pytest.raises(ToolCallError, match="not a tool call") as caught:
        parse_tool_call(text)
    assert caught.value.position == position
    assert reason in str(caught.value)


def test_error_survives_pickling():
    with pytest.raises(ToolCallError) as caught:
        parse_tool_call("[TOOL: a")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.text, copy.position, str(copy)) == ("[TOOL: a", 8, str(caught.value))


@pytest.mark.parametrize(
    "call", [ToolCall("two words"), ToolCall("", {}), ToolCall("a", {"b-c": "d"}), ToolCall("a", {"b": "c\nd"})]
)
def test_format_refuses_what_the_protocol_cannot_hold(call):
    with pytest.raises(ValueError, match="protocol"):
        format_tool_call(call)


def test_exact_match_ignores_the_order_of_arguments_only():
    reference = '[TOOL: a b="1" c="2"]'
    assert exact_match('[TOOL: a c="2" b="1"]', reference)
    assert not exact_match('[TOOL: a c="1" b="2"]', reference)
    assert not exact_match('[TOOL: a b="1"]', reference)
    assert not exact_match('[TOOL: b b="1" c="2"]', reference)
    assert not exact_match(reference + "\n", reference)


def test_exact_match_refuses_an_invalid_reference():
    with pytest.raises(ToolCallError):
        exact_match("[TOOL: a]", "a")


def test_score_counts_exact_and_valid_replies_per_tool():
    references = ['[TOOL: a x="1"]', '[TOOL: a x="2"]', '[TOOL: b x="1"]', "[TOOL: c]"]
    score = score_tool_calls(['[TOOL: a x="1"]', '[TOOL: a x="1"]', "no idea", "[TOOL: c]"], references)
    assert score.per_tool == {"a": Tally(2, 2, 1), "b": Tally(1, 0, 0), "c": Tally(1, 1, 1)}
    assert (score.total, score.exact_share, score.valid_share) == (Tally(4, 3, 2), 0.5, 0.75)
    assert str(score) == "2 of 4 exact (50.0%), 3 valid (75.0%)"


def test_score_refuses_lists_that_do_not_pair_up():
    with pytest.raises(ValueError, match="2 replies for 1"):
        score_tool_calls(["a", "b"], ["[TOOL: a]"])
    with pytest.raises(ValueError, match="no replies"):
        score_tool_calls([], [])
