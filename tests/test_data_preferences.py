"""Preference rows: every way of writing a pair gives the same prompt and answers."""

import pytest

from moeft.data.preferences import read_preferences
from moeft.errors import DataError

USER = {"role": "user", "content": "hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("hello", "go away"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "hello"},
         "rejected": {"from": "gpt", "value": "go away"}},
    ],
    ids=["texts", "messages", "answers hold the prompt", "shared turns", "LLaMA-Factory"],
)  # fmt: skip
def test_every_way_of_writing_a_pair_is_the_same_row(row):
    read = read_preferences([row]).rows[0]
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [GOOD], [BAD])


def test_system_and_tools_belong_to_the_row():
    row = {"system": "Be short.", "prompt": "hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}
    read = read_preferences([row]).rows[0]
    assert [message["role"] for message in read.prompt] == ["system", "user"]
    assert read.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi", "chosen": "x"}, "rejected is missing; expected prompt, chosen and rejected"),
        ({"prompt": "hi", "chosen": "x", "rejected": "x"}, "chosen and rejected are equal"),
        ({"prompt": "hi", "chosen": "x", "rejected": " "}, "prompt and rejected: no assistant turn with text"),
        ({"prompt": [GOOD], "chosen": "x", "rejected": "y"}, "prompt and chosen: the conversation starts with"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "chosen does not begin with"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "prompt is a number, expected a list"),
        (7, "the row is a number"),
    ],
)
def test_unusable_pairs_say_why(row, reason):
    with pytest.raises(DataError, match=reason):
        read_preferences([row])


def test_too_many_rejects_stop():
    good = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    assert len(read_preferences([good, {}]).rejects) == 1
    with pytest.raises(DataError, match=r"1 of 2 rows \(50.0%\) cannot be used"):
        read_preferences([good, {}], max_reject_share=0.05)
