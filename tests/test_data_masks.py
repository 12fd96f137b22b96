"""From spans of characters to trained tokens, and which turns are trained."""

import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import moeft.demo
from moeft.data.chat import encode, encode_messages
from moeft.data.marks import Span, read_marks, with_marks
from moeft.data.rows import Reject, Row
from moeft.data.tokens import as_written, fast_tokenizer, trained_tokens
from moeft.data.vocabulary import check_ids, check_vocabulary
from moeft.errors import DataError

BASE = Path(moeft.demo.__file__).parent / "base"
MARKED = (
    "{% for message in messages %}{{ message.role + ':' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def byte_level(trim_offsets=True):
    """A byte-level tokenizer as GPT-2's, whose post-processor cuts white space from offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator(["user: hello there\n\nassistant:  hi  \n\n"] * 9, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TOKENIZERS = {"byte fallback": AutoTokenizer.from_pretrained(BASE), "byte level": byte_level()}


def trained_text(tokenizer, example):
    return tokenizer.decode(example["input_ids"][example["labels"] != -100])


@settings(max_examples=80)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text(st.sampled_from("ab \n\té€😀👋🏽xyz") | st.characters(codec="utf-8"), min_size=1, max_size=30),
    st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
@example("byte fallback", "00ER", (3, 3))
def test_tokens_with_a_character_in_the_span_are_trained(name, text, bounds):
    start, stop = sorted(min(bound, len(text)) for bound in bounds)
    with as_written(fast_tokenizer(TOKENIZERS[name])) as backend:
        encoding = backend.encode(text, add_special_tokens=False)
    # The definition, over all offsets; an empty span has no character, inside of a token too.
    expected = [start < stop and begin < stop and start < end for begin, end in encoding.offsets]
    assert trained_tokens(encoding, [Span(start, stop)]).tolist() == expected
    # Every character of the text is in a token: no offset was cut.
    assert {c for begin, end in encoding.offsets for c in range(begin, end)} == set(range(len(text)))


def test_tokenizer_is_left_as_it_was():
    tokenizer = byte_level()
    backend = fast_tokenizer(tokenizer)
    backend.enable_truncation(3)
    before = backend.to_str()
    with as_written(backend):
        assert len(backend.encode("hello hello hello hello")) > 3
    assert backend.to_str() == before


def test_untrained_parts_win_over_the_spans_around_them():
    with as_written(fast_tokenizer(TOKENIZERS["byte level"])) as backend:
        encoding = backend.encode("abcdef", add_special_tokens=False)
    assert trained_tokens(encoding, [Span(1, 6)], [Span(2, 4)]).tolist() == [False, True, False, False, True, True]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("reply", ["hi  ", "hi\n\n", "hi\t \n", " "])
def test_reply_that_ends_in_white_space_does_not_train_what_follows(name, reply):
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = MARKED
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "|next"},
        {"role": "assistant", "content": "same"},
        {"role": "user", "content": "same"},
    ]
    example = encode_messages(messages, tokenizer)
    assert trained_text(tokenizer, example) == reply + "same"


def test_marks_survive_macros_and_captured_blocks():
    template = (
        "{% macro say(message) %}{% generation %}{{ message.content }}{% endgeneration %}{% endmacro %}"
        "{% for message in messages %}{% set text %}{{ say(message) }}{% endset %}{{ '[' ~ text ~ ']' }}{% endfor %}"
    )
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert trained_text(tokenizer, encode_messages(messages, tokenizer)) == "onetwo"
    assert trained_text(tokenizer, encode_messages(messages, tokenizer, train_on="last")) == "two"


def test_template_that_works_on_generated_text_is_refused():
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = (
        "{% for message in messages %}{% set text %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% endset %}{{ text | trim }}{% endfor %}"
    )
    with pytest.raises(DataError, match="works on the text of its generation blocks"):
        encode_messages([{"role": "assistant", "content": " one "}], tokenizer)


@pytest.mark.parametrize("dashes", [("", ""), ("-", ""), ("", "-"), ("-", "-")])
def test_marks_leave_the_white_space_of_a_template_as_it_was(dashes):
    before, after = dashes
    template = f"a \n  {{%{before} generation {after}%}}\n  b \n{{%{before} endgeneration {after}%}}\n c"
    tokenizer = TOKENIZERS["byte level"]
    plain, marked = (
        tokenizer.apply_chat_template([{"role": "user"}], chat_template=text, tokenize=False)
        for text in (template, with_marks(template))
    )
    assert read_marks(marked).text == plain


TURNS = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "B", "train": False},
    {"role": "assistant", "content": "C"},
]


@pytest.mark.parametrize(
    ("train_on", "flags", "trained"),
    [
        ("assistant", {}, "AC"),
        ("assistant", {4: False}, "A"),
        ("last", {}, "C"),
        ("last", {1: True}, "AC"),
        ("completion", {}, "C"),
        ("completion", {3: True}, "BC"),
        ("messages", {1: True}, "A"),
        ("messages", {3: True, 4: True}, "BC"),
        ("all", {}, "user:1assistant:Auser:2assistant:Bassistant:C"),
    ],
)
def test_mode_and_flags_decide_which_turns_are_trained(train_on, flags, trained):
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = MARKED
    messages = [{**turn, "train": flags[i]} if i in flags else turn for i, turn in enumerate(TURNS)]
    assert trained_text(tokenizer, encode_messages(messages, tokenizer, train_on=train_on)) == trained


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "1", "train": True}, TURNS[1]], r"messages\[0\].train is true, but only"),
        ([TURNS[0], TURNS[3]], "no turn is trained with train_on: assistant"),
        ([TURNS[0], {"role": "assistant", "content": "\ufdd0"}], "noncharacters"),
        ([TURNS[0], {"role": "assistant", "content": "\ud83d"}], "half a surrogate pair"),
    ],
)
def test_row_that_cannot_be_trained_is_a_reject(messages, reason):
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = MARKED
    listed = Reject(3, "broken", "file")
    encoded = encode([Row(TURNS, 1), Row(messages, 2), listed], tokenizer)
    assert len(encoded.examples) == 1
    assert [reject.line for reject in encoded.rejects] == [2, 3]
    with pytest.raises(DataError, match=reason):
        encode([Row(messages, 2)], tokenizer)


def test_order_of_rows_is_kept_over_chunks(monkeypatch):
    monkeypatch.setattr("moeft.data.chat.CHUNK_CHARACTERS", 40)
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = MARKED
    rows = [Row([{"role": "assistant", "content": f"reply {i}"}], i) for i in range(50)]
    encoded = encode(iter(rows), tokenizer)
    assert [trained_text(tokenizer, example) for example in encoded.examples] == [f"reply {i}" for i in range(50)]
    assert encoded.num_trained_tokens == sum((example["labels"] != -100).sum() for example in encoded.examples)


def test_rows_that_are_encoded_are_let_go(monkeypatch, tmp_path):
    monkeypatch.setattr("moeft.data.chat.CHUNK_CHARACTERS", 40)
    tokenizer = TOKENIZERS["byte level"]
    tokenizer.chat_template = MARKED
    alive: set[int] = set()
    most = 0

    def watched():
        nonlocal most
        for index in range(200):
            row = Row([{"role": "assistant", "content": f"reply {index}"}], index)
            alive.add(index)
            weakref.finalize(row, alive.discard, index)
            most = max(most, len(alive))
            yield row

    encoded = encode(watched(), tokenizer, folder=tmp_path)
    assert len(encoded.examples) == 200
    assert most < 20


def test_plain_text_is_trained_whole_and_ends():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    example = encode([Row([], 1, text="Once upon a time")], tokenizer).examples[0]
    assert tokenizer.decode(example["input_ids"]) == "<bos>Once upon a time<eos>"
    assert np.array_equal(example["labels"], example["input_ids"])
    tokenizer.chat_template = None
    example = encode([Row([], 1, text="Once upon a time")], tokenizer).examples[0]
    assert tokenizer.decode(example["input_ids"]) == "Once upon a time<eos>"


def test_tokenizer_with_ids_beyond_the_embeddings_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    check_vocabulary(tokenizer, 4096)
    with pytest.raises(DataError, match="the model has 4000 embeddings, and 96 tokens of the tokenizer"):
        check_vocabulary(tokenizer, 4000)
    tokenizer.add_tokens(["<picture>"])
    check_vocabulary(tokenizer, 4096)
    encoded = encode([Row([], 1, text="see <picture>")], tokenizer)
    with pytest.raises(DataError, match="hold the token id 4096, and the model has embeddings for 4096 tokens"):
        check_ids(encoded.examples, 4096)
    tokenizer.pad_token = "<picture>"
    with pytest.raises(DataError, match="such as '<picture>' with id 4096"):
        check_vocabulary(tokenizer, 4096)
