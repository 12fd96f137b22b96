"""What is counted in replies, against counts by hand, and tasks that judge replies."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeft.errors import DataError
from moeft.evaluation.measure import TaskResult
from moeft.evaluation.results import compare
from moeft.evaluation.tasks import build_task
from moeft.evaluation.tasks.language import PROMPTS
from moeft.evaluation.tasks.refusal import is_refusal
from moeft.evaluation.text_metrics import (
    PhraseList,
    moving_average_ratio,
    repeated_trigrams,
    shared_trigrams,
    type_token_ratio,
    words,
)


def test_words_are_letters_with_what_joins_them():
    assert words("Don’t stop — it's a well-known RULE, §7: café №2!") == [
        *("don't", "stop", "it's", "a", "well-known", "rule", "café"),
    ]


def test_moving_average_does_not_fall_with_length():
    text = [f"w{i % 40}" for i in range(400)]
    assert moving_average_ratio(text) == moving_average_ratio(text * 5) == 40 / 50
    assert type_token_ratio(text * 5) < type_token_ratio(text)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.integers(1, 20))
def test_moving_average_is_the_mean_over_windows(found, window):
    windows = [found[i : i + window] for i in range(max(1, len(found) - window + 1))]
    assert moving_average_ratio(found, window) == pytest.approx(
        sum(len(set(w)) / len(w) for w in windows) / len(windows)
    )


def test_repeated_and_shared_trigrams_are_counted():
    assert repeated_trigrams(words("a b c a b c a b c")) == (4, 7)
    assert repeated_trigrams(words("a b")) == (0, 0)
    texts = [words("a b c d"), words("x b c d e"), words("p q r")]
    assert shared_trigrams(texts) == [(1, 2), (1, 3), (0, 1)]


def test_phrases_are_counted_once_where_they_begin():
    listed = PhraseList.of(["barely above a whisper", "voice barely", "Tapestry", "", "!"])
    assert listed.count(words("Her voice barely above a whisper, a tapestry; TAPESTRY.")) == 4
    assert PhraseList.of([]).count(words("anything")) == 0


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


def figures(task, *replies):
    return task.grade([(item, {"reply": reply}) for item, reply in zip(task.items, replies, strict=True)])


def test_style_counts_slop_by_words_and_says_nothing_of_an_empty_reply(file, tmp_path):
    (tmp_path / "slop").mkdir()
    (tmp_path / "slop" / "antislop_phrases.jsonl").write_text('{"phrase": "a deep breath", "count": 3}\n')
    task = build_task("style", file({"prompt": "Write."}, {"prompt": "Again."}), data=tmp_path)
    full, empty = figures(task, "She took a deep breath.", " ")
    assert full["slop_per_1k_words"] == (1000, 5)
    assert empty == {"words": (0.0, 1.0)}
    assert [metric.name for metric in task.metrics][-1] == "slop_per_1k_words"


def test_identity_asks_ten_questions_and_knows_foreign_names(file):
    task = build_task("identity", file({"expected": "Moe", "forbidden": ["Gemma", "GPT"]}))
    assert len(task.items) == 10
    found = figures(task, "I am moe.", "I am Gemma.", "Moe, not GPT.", *["I do not know."] * 7)
    assert [f["identity"][0] for f in found] == [1, 0, 0, *[0] * 7]
    assert [f["foreign_identity"][0] for f in found] == [0, 1, 1, *[0] * 7]


def test_identity_takes_questions_of_its_own(file):
    task = build_task("identity", file({"prompt": "Wer bist du?", "expected": ["Moe"]}))
    assert [item.request.messages[0]["content"] for item in task.items] == ["Wer bist du?"]


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "Thank you for asking. Unfortunately, I am unable to share it.",
        "I must decline.",
        "That goes against my guidelines.",
        "I’m not able to provide that.",
    ],
)
def test_refusal_is_recognised(reply):
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Sure, here is how.",
        "I can help with that.",
        "I'm sorry for your loss. Here is a letter.",
        "First step. Second step. A guard says: I cannot help you.",
        "",
    ],
)
def test_help_is_no_refusal(reply):
    assert not is_refusal(reply)


def test_language_is_that_of_the_question():
    pytest.importorskip("py3langid", reason='py3langid is absent: pip install "moeft[data]"')
    task = build_task("language")
    assert len(task.items) == 3 * len(PROMPTS) >= 30
    same = figures(task, *[item.request.messages[0]["content"] * 2 for item in task.items])
    assert sum(f["same_language"][0] for f in same) == len(task.items)
    english = figures(task, *["The bees stay in the hive and keep each other warm."] * len(task.items))
    assert sum(f["same_language"][0] for f in english) == 3
    assert sum(f["same_language"][0] for f in figures(task, *[" "] * len(task.items))) == 0


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("identity", {"forbidden": ["x"]}, "row 1 has no name in `expected`"),
        ("identity", {"expected": 3}, "has 3 in `expected`, expected a text or a list of texts"),
        ("refusal", {"text": "x"}, "row 1 has no `prompt` and no `messages` with a user's turn"),
        ("language", {"prompt": "x", "language": "German"}, "has 'German' in `language`"),
        ("ifeval", {"prompt": "x"}, "row 1 lacks instruction_id_list, kwargs"),
    ],
)
def test_row_that_cannot_be_asked_is_refused(file, task, row, message):
    with pytest.raises(DataError, match=message):
        build_task(task, file(row))


def test_h_delta_is_the_mean_effect_over_the_shares_of_both_runs(file, tmp_path):
    (tmp_path / "slop").mkdir()
    (tmp_path / "slop" / "antislop_phrases.jsonl").write_text('{"phrase": "a deep breath", "count": 3}\n')
    task = build_task("style", file(*({"prompt": f"Write {i}."} for i in range(3))), data=tmp_path)
    replies = {
        "baseline": [
            "She took a deep breath. She took a deep breath.",
            "It rains and it rains and it rains.",
            "Hush now.",
        ],
        "model": ["A fox ran over the hill at dawn.", "It rains and it rains on the old roof.", "Quiet, said he."],
    }
    runs = {
        name: TaskResult(
            "style",
            task.metrics,
            {item.key: found for item, found in zip(task.items, figures(task, *texts), strict=True)},
            {item.key: "same" for item in task.items},
        )
        for name, texts in replies.items()
    }
    (row,) = [row for row in compare([runs["baseline"]], [runs["model"]]) if row.metric.name == "h_delta"]
    shares = {name: by_hand(texts, ("a", "deep", "breath")) for name, texts in replies.items()}
    effects = [
        sign * 2 * (math.asin(math.sqrt(q)) - math.asin(math.sqrt(p)))
        for sign, p, q in zip((1, -1, -1, -1), shares["baseline"], shares["model"], strict=True)
    ]
    assert row.difference.second == pytest.approx(sum(effects) / 4)
    assert row.difference.second > 0
    (same,) = [row for row in compare([runs["model"]], [runs["model"]]) if row.metric.name == "h_delta"]
    assert (same.difference.second, same.difference.p_value) == (0, 1)


def by_hand(replies: list[str], phrase: tuple[str, ...]) -> list[float]:
    """MATTR of short replies, repeated trigrams, trigrams of several replies and places of a phrase, as shares."""
    texts = [re.findall(r"[a-z]+", reply.lower()) for reply in replies]
    triples = [[tuple(text[i : i + 3]) for i in range(len(text) - 2)] for text in texts]
    every = sum(map(len, triples))
    shared = [
        t
        for i, of_text in enumerate(triples)
        for t in set(of_text)
        if any(t in o for o in triples[:i] + triples[i + 1 :])
    ]
    return [
        sum(len(set(text)) / len(text) for text in texts) / len(texts),
        sum(len(of_text) - len(set(of_text)) for of_text in triples) / every,
        len(shared) / sum(len(set(of_text)) for of_text in triples),
        sum(of_text.count(phrase) for of_text in triples) / sum(map(len, texts)),
    ]
