"""Encoded rows on disk: found again, made anew when anything differs or is damaged, shared by processes."""

import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import moeft.demo
from moeft.data.cache import cache_key, cached, file_key, rows_key
from moeft.data.chat import Encoded, encode
from moeft.data.example import ARRAYS
from moeft.data.rows import Reject, Row, Rows
from moeft.errors import DataError
from moeft.training.sft import SFTConfig, encode_dataset

BASE = Path(moeft.demo.__file__).parent / "base"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [Row(MESSAGES, 1), Row(MESSAGES[:1], 2), Row([*MESSAGES, *MESSAGES], 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def build(tokenizer):
    return lambda folder: encode(ROWS, tokenizer, folder=folder)


def never(folder: Path) -> Encoded:
    raise AssertionError("built although the cache holds the rows")


def same(left, right):
    arrays = all(np.array_equal(getattr(left.examples, name), getattr(right.examples, name)) for name in ARRAYS)
    return arrays and left.rejects == right.rejects and left.num_shortened == right.num_shortened


def test_second_start_finds_rows_and_rejects_in_mapped_files(tmp_path, build, tokenizer):
    first = cached(tmp_path, "key", build)
    again = cached(tmp_path, "key", never)
    assert same(first, encode(ROWS, tokenizer))
    assert same(again, first)
    assert isinstance(again.examples.input_ids, np.memmap)
    assert again.rejects == [Reject(2, "no turn is trained with train_on: assistant", "rows")]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["input_ids.bin", "offsets.bin", "cache.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_cache_is_built_anew_with_a_line_in_the_log(tmp_path, build, name, damage, caplog):
    expected = cached(tmp_path, "key", build)
    expected = Encoded(
        type(expected.examples)(*(np.array(getattr(expected.examples, n)) for n in ARRAYS)), expected.rejects
    )
    file = tmp_path / "key" / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[-1] ^= 255
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert same(cached(tmp_path, "key", build), expected)
    assert "is damaged; its rows are encoded anew" in caplog.text
    assert same(cached(tmp_path, "key", never), expected)


def test_of_two_processes_one_writes_and_both_read(tmp_path, build, tokenizer):
    def slow(folder):
        # The other process finishes while this one still builds.
        cached(tmp_path, "key", build)
        return build(folder)

    assert same(cached(tmp_path, "key", slow), encode(ROWS, tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_failure_leaves_nothing_behind(tmp_path, tokenizer):
    with pytest.raises(DataError):
        cached(tmp_path / "cache", "key", lambda folder: encode(ROWS[1:2], tokenizer, folder=folder))
    assert not list((tmp_path / "cache").iterdir())


def test_key_depends_on_rows_tokenizer_template_and_options(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    other = AutoTokenizer.from_pretrained(BASE)
    keys = [cache_key(file_key(file), tokenizer, {"max_length": 8})]
    assert cache_key(file_key(file), other, {"max_length": 8}) == keys[0]
    keys.append(cache_key(file_key(file), tokenizer, {"max_length": 9}))
    other.chat_template += " "
    keys.append(cache_key(file_key(file), other, {"max_length": 8}))
    other = AutoTokenizer.from_pretrained(BASE)
    other.add_tokens(["<new>"])
    keys.append(cache_key(file_key(file), other, {"max_length": 8}))
    file.write_text("two")
    keys.append(cache_key(file_key(file), tokenizer, {"max_length": 8}))
    assert len(set(keys)) == len(keys)


def test_saved_folder_of_rows_is_cached_as_a_file_is(tmp_path, tokenizer):
    Dataset.from_list([{"messages": MESSAGES}]).save_to_disk(tmp_path / "rows")
    settings = SFTConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), use_cpu=True)
    first, again = (encode_dataset(tmp_path / "rows", tokenizer, settings) for _ in range(2))
    assert same(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_in_memory_are_told_apart_by_everything_in_them_and_by_what_was_rejected():
    tools = [{"type": "function"}]
    trained = [MESSAGES[0], {**MESSAGES[1], "train": False}]
    variants = [
        [Row(MESSAGES, 1)],
        [Row(MESSAGES, 2)],
        [Row(MESSAGES, 1, tools)],
        [Row(trained, 1)],
        [Row([], 1, text="hi")],
    ]
    data_sets = [Rows(rows, [], "a") for rows in variants]
    data_sets += [Rows(variants[0], [], "b"), Rows(variants[0], [Reject(2, "no messages", "a")], "a")]
    assert len({rows_key(rows) for rows in data_sets}) == len(data_sets)
    assert rows_key(Rows(ROWS, [], "a")) == rows_key(Rows(list(ROWS), [], "a"))
