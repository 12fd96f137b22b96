"""Chat rows: accepted shapes, and reasons for every row that is refused."""

import json
from types import MappingProxyType

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeft.data.reading import read_rows
from moeft.data.rejects import Reject
from moeft.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": None, "prompt": "hi", "completion": "hello", "id": 3},
        MappingProxyType({"messages": CHAT}),
    ],
)
def test_every_shape_becomes_the_same_messages(row):
    assert read_rows([row]).rows[0].messages == CHAT


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "the row is a list, expected an object"),
        ({}, "keys are none"),
        ({"txt": "hi"}, "keys are txt; expected messages, conversations, prompt and completion, or"),
        ({"prompt": "hi"}, "keys are prompt"),
        ({"messages": "hi"}, "messages is a string, expected a list"),
        ({"messages": ["hi"]}, r"messages\[0\] is a string, expected an object"),
        ({"messages": [{"role": "tool", "content": "x"}, *CHAT]}, "starts with a turn of role tool, expected user"),
        ({"messages": [{"role": "owner", "content": "x"}, *CHAT]}, r"messages\[0\].role is 'owner', expected one of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\].role is \['user'\]"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is None"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is missing or null"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is a number, expected a string"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is 'alien'"),
        ({"prompt": "hi", "completion": 3}, "completion is a number, expected a list"),
        ({"messages": CHAT[:1]}, "no assistant turn with text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "no assistant turn with text"),
        ({"messages": []}, "no assistant turn with text"),
    ],
)
def test_row_of_wrong_shape_says_what_was_expected(row, reason):
    with pytest.raises(DataError, match=reason):
        read_rows([row])


def test_bad_lines_are_listed_with_numbers_and_good_ones_kept(tmp_path):
    good = json.dumps({"messages": CHAT})
    path = write(
        tmp_path / "chat.jsonl",
        good,
        '{"messages": [',
        "",
        "null",
        json.dumps({"messages": CHAT[:1]}),
        b"\xff\xfe\n",
        good,
    )
    read = read_rows(path)
    assert [row.line for row in read.rows] == [1, 7]
    assert [reject.line for reject in read.rejects] == [2, 4, 5, 6]
    assert "malformed JSON at column 15" in read.rejects[0].reason
    assert "not UTF-8" in read.rejects[3].reason


def test_rejects_file_has_one_json_object_per_reject(tmp_path):
    path = write(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}), "nonsense")
    read = read_rows(path)
    read.write_rejects(tmp_path / "rejects.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [Reject(**record) for record in written] == read.rejects
    assert written[0]["line"] == 2
    assert written[0]["source"] == str(path)


def test_line_separators_inside_text_do_not_end_a_row(tmp_path):
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "a\u2028b\u0085c"}]}
    path = write(tmp_path / "chat.jsonl", json.dumps(row, ensure_ascii=False))
    assert read_rows(path).rows[0].messages == row["messages"]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = write(tmp_path / "chat.jsonl", b"\xef\xbb\xbf" + json.dumps({"messages": CHAT}).encode() + b"\r\n")
    assert read_rows(path).rows[0].messages == CHAT


def test_deeply_nested_json_is_a_reject(tmp_path):
    path = write(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}), "[" * 200_000)
    assert "malformed JSON" in read_rows(path).rejects[0].reason


def test_data_without_one_usable_row_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 rows can be used.*line 1: malformed JSON"):
        read_rows(write(tmp_path / "chat.jsonl", "{", "{"))
    with pytest.raises(DataError, match="rows has no rows"):
        read_rows([])


def test_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "absent.jsonl")


def test_dataset_rows_read_as_a_list_does():
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    read = read_rows(datasets.Dataset.from_list(rows))
    assert [row.messages for row in read.rows] == [CHAT]
    assert [reject.line for reject in read.rejects] == [2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | json_values, "content": json_values}
)


@given(st.lists(json_values | st.fixed_dictionaries({"messages": st.lists(turn, max_size=3)}), max_size=4))
def test_every_row_is_either_usable_or_rejected(rows):
    read = read_rows([{"messages": CHAT}, *rows])
    lines = [row.line for row in read.rows] + [reject.line for reject in read.rejects]
    assert sorted(lines) == list(range(1, len(rows) + 2))
