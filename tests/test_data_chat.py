"""Chat rows to ids and labels: which tokens are trained, under several templates."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import moeft.demo
from moeft.data.chat import encode, encode_messages
from moeft.data.reading import read_rows
from moeft.data.rows import Row
from moeft.errors import DataError

BASE = Path(moeft.demo.__file__).parent / "base"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERLESS = (
    "{% for m in messages %}{{ m.role.upper() + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last or m.role == 'user' else '...') + '<eos>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
USER_FIRST = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the first turn must be the user') }}{% endif %}" + CHATML
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who goes there?"},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": "What news?"},
    {"role": "assistant", "content": "None, my lord."},
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def trained_text(tokenizer, example):
    """Decode each run of trained tokens."""
    runs, previous = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label != -100:
            assert label == token
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


def as_lists(example):
    return {key: value.tolist() for key, value in example.items()}


def row(*contents, line=1):
    roles = ("user", "assistant") * len(contents)
    return Row([{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)], line)


def test_assistant_turns_are_trained_with_their_end_marker_only(tokenizer):
    example = encode_messages(CHAT, tokenizer)
    assert trained_text(tokenizer, example) == ["A friend.<turn|>", "None, my lord.<turn|>"]


def test_last_trains_only_the_last_assistant_turn(tokenizer):
    example = encode_messages(CHAT, tokenizer, train_on="last")
    assert trained_text(tokenizer, example) == ["None, my lord.<turn|>"]
    followed = encode_messages([*CHAT, {"role": "user", "content": "Go."}], tokenizer, train_on="last")
    assert trained_text(tokenizer, followed) == ["None, my lord.<turn|>"]


def test_spans_agree_with_the_generation_marks_of_the_template(tokenizer):
    example = encode_messages(CHAT, tokenizer)
    marked = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert example["input_ids"].tolist() == marked["input_ids"]
    assert [label != -100 for label in example["labels"]] == [bool(mask) for mask in marked["assistant_masks"]]


def test_prompt_tokens_are_those_the_model_sees_when_it_generates(tokenizer):
    example = encode_messages(CHAT, tokenizer, train_on="last")
    start = next(index for index, label in enumerate(example["labels"]) if label != -100)
    prompt = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)
    assert example["input_ids"][:start].tolist() == prompt["input_ids"]


def test_bos_of_the_template_is_not_doubled_by_the_tokenizer(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert encode_messages(CHAT, tokenizer)["input_ids"].tolist().count(tokenizer.bos_token_id) == 1


def test_markers_that_are_not_special_tokens_still_end_the_span(tokenizer):
    tokenizer.chat_template = CHATML
    example = encode_messages(CHAT, tokenizer)
    assert trained_text(tokenizer, example) == ["A friend.<|im_end|>", "None, my lord.<|im_end|>"]


def test_template_without_marker_trains_the_white_space_that_ends_the_turn(tokenizer):
    tokenizer.chat_template = MARKERLESS
    assert trained_text(tokenizer, encode_messages(CHAT, tokenizer)) == ["A friend.\n\n", "None, my lord.\n\n"]


def test_token_across_the_start_of_a_reply_is_trained(tokenizer):
    tokenizer.chat_template = MARKERLESS.replace(":\n", ": ")
    assert trained_text(tokenizer, encode_messages(CHAT, tokenizer)) == [" A friend.\n\n", " None, my lord.\n\n"]


def test_template_that_rewrites_earlier_turns_is_an_error(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match="not prefix-consistent"):
        encode_messages(CHAT, tokenizer)
    example = encode_messages(CHAT, tokenizer, train_on="last")
    assert trained_text(tokenizer, example) == ["None, my lord.<eos>"]


def test_row_that_the_template_refuses_is_a_reject_with_its_line(tokenizer):
    tokenizer.chat_template = USER_FIRST
    encoded = encode([Row(CHAT, 1), row("hi", "hello", line=2)], tokenizer)
    assert len(encoded.examples) == 1
    assert [(reject.line, "first turn must be the user" in reject.reason) for reject in encoded.rejects] == [(1, True)]


def test_long_row_is_rejected_or_truncated(tokenizer):
    rows = [row("hi", "hello", line=1), row("hi", "word " * 50, line=2)]
    whole = encode(rows[1:], tokenizer).examples[0]
    rejected = encode(rows, tokenizer, max_length=32)
    assert len(rejected.examples) == 1
    assert rejected.rejects[0].line == 2
    assert rejected.rejects[0].reason == f"{len(whole['input_ids'])} tokens, max_length is 32"
    truncated = encode(rows, tokenizer, max_length=32, on_too_long="truncate")
    assert truncated.rejects == []
    assert as_lists(truncated.examples[1]) == {key: value[:32] for key, value in as_lists(whole).items()}


def test_left_truncation_keeps_the_end_of_the_reply(tokenizer):
    rows = [row("hi", "word " * 50)]
    whole = encode(rows, tokenizer).examples[0]
    shortened = encode(rows, tokenizer, max_length=32, on_too_long="truncate_left")
    assert len(shortened.examples) == 1
    assert as_lists(shortened.examples[0]) == {key: value[-32:] for key, value in as_lists(whole).items()}
    assert shortened.num_shortened == 1
    assert str(shortened).endswith(", 0 rejected, 1 shortened")


def test_split_row_is_whole_but_for_pieces_without_a_trained_token(tokenizer):
    rows = [row("prompt " * 40, "word " * 50), row("hi", "hello", line=2)]
    whole, short = encode(rows, tokenizer).examples
    split = encode(rows, tokenizer, max_length=32, on_too_long="split")
    *pieces, last = split.examples
    assert as_lists(last) == as_lists(short)
    assert split.num_shortened == 1
    assert all(len(piece["input_ids"]) <= 32 for piece in pieces)
    untrained = next(i for i, label in enumerate(whole["labels"]) if label != -100) // 32
    assert untrained > 0
    for key, value in as_lists(whole).items():
        assert [token for piece in pieces for token in piece[key]] == value[32 * untrained :]


def test_row_that_ends_in_a_long_request_is_rejected_when_its_end_is_kept(tokenizer):
    messages = [*row("hi", "hello").messages, {"role": "user", "content": "word " * 99}]
    encoded = encode([Row(messages, 1), row("hi", "hello", 2)], tokenizer, max_length=32, on_too_long="truncate_left")
    assert len(encoded.examples) == 1
    assert "no trained token among the last 32 of" in encoded.rejects[0].reason


def test_pieces_of_one_token_have_nothing_to_predict(tokenizer):
    with pytest.raises(DataError, match="no trained token among the pieces of 1 of"):
        encode([row("hi", "hello")], tokenizer, max_length=1, on_too_long="split")


def test_row_whose_reply_is_cut_off_is_rejected(tokenizer):
    rows = [row("hi", "hello", line=1), row("word " * 50, "hello", line=2)]
    encoded = encode(rows, tokenizer, max_length=32, on_too_long="truncate")
    assert len(encoded.examples) == 1
    assert "no trained token among the first 32 of" in encoded.rejects[0].reason


def test_totals_count_rows_tokens_and_rejects(tokenizer, tmp_path):
    read = read_rows(
        [{"prompt": "hi", "completion": "hello"}, {"prompt": "hi"}, {"prompt": "a " * 99, "completion": "b"}]
    )
    encoded = encode(read, tokenizer, max_length=40)
    example = encoded.examples[0]
    trained = sum(label != -100 for label in example["labels"])
    assert (encoded.num_tokens, encoded.num_trained_tokens) == (len(example["input_ids"]), trained)
    assert [reject.line for reject in encoded.rejects] == [2, 3]
    assert str(encoded) == f"1 rows, {encoded.num_tokens} tokens, {trained} trained, 2 rejected"
    encoded.write_rejects(tmp_path / "rejects.jsonl")
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2


def test_no_row_left_is_an_error_with_the_first_reasons(tokenizer):
    with pytest.raises(DataError, match=r"no row is left.*line 1: \d+ tokens, max_length is 4"):
        encode([row("hi", "hello")], tokenizer, max_length=4)


def test_unusable_tokenizers_and_options_are_refused(tokenizer):
    with pytest.raises(ValueError, match="train_on is 'first'"):
        encode([row("hi", "hello")], tokenizer, train_on="first")
    with pytest.raises(ValueError, match="on_too_long is 'cut', expected one of reject, truncate"):
        encode([row("hi", "hello")], tokenizer, on_too_long="cut")
    with pytest.raises(ValueError, match="max_length is 0"):
        encode([row("hi", "hello")], tokenizer, max_length=0)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode([row("hi", "hello")], tokenizer)


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_trained_text_is_the_trimmed_replies_whatever_the_characters(tokenizer_of_module, turns):
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    example = encode_messages(messages, tokenizer_of_module)
    assert trained_text(tokenizer_of_module, example) == [reply.strip() + "<turn|>" for _, reply in turns]


@pytest.fixture(scope="module")
def tokenizer_of_module():
    return AutoTokenizer.from_pretrained(BASE)
