"""Mixtures: how many rows of each source, in which order, and that a resumed run meets the same ones."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeft.config import SftRecipe
from moeft.config.sft import Data
from moeft.config.sources import Source
from moeft.data.chat import encode
from moeft.data.composition import compose
from moeft.data.mixture import Share, interleave, rows_of_epoch
from moeft.data.reading import read_rows
from moeft.data.sources import Sources
from moeft.errors import DataError, RecipeError
from tests.tiny_training import adapter_weights, losses, packed_with_lora, sft_trainer, sums, tiny_tokenizer


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([Share("a", 10), Share("b", 4)], [10, 4]),
        ([Share("a", 10, epochs=0.5), Share("b", 4, epochs=2.5)], [5, 10]),
        ([Share("a", 10, rows=3), Share("b", 4, rows=9)], [3, 9]),
        ([Share("a", 100, weight=3), Share("b", 10, weight=1)], [30, 10]),
        ([Share("a", 100, weight=0.75), Share("b", 10, weight=0.25, epochs=2)], [60, 20]),
        ([Share("a", 100, weight=1), Share("b", 10, weight=0)], [100, 0]),
        ([Share("a", 100, weight=1), Share("b", 50, weight=1), Share("c", 7)], [50, 50, 7]),
    ],
)
def test_rows_of_an_epoch_follow_weights_rows_and_epochs(shares, expected):
    assert rows_of_epoch(shares) == expected


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(DataError, match="the weights of a, b are all 0"):
        rows_of_epoch([Share("a", 10, weight=0), Share("b", 10, weight=0)])
    with pytest.raises(DataError, match=r"source b has weight 0\.001, which is less than one row"):
        rows_of_epoch([Share("a", 10, weight=1), Share("b", 10, weight=0.001)])


sources = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=4)


@given(sources, st.integers(0, 3))
def test_rows_are_repeated_only_after_every_row_came_and_every_part_has_the_proportions(sizes_and_counts, seed):
    sizes, counts = map(list, zip(*sizes_and_counts, strict=True))
    order = interleave(sizes, counts, seed)
    assert order == interleave(sizes, counts, seed)
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        rows = [row for where, row in order if where == source]
        assert len(rows) == count
        for start in range(0, count, size):
            assert len(set(rows[start : start + size])) == len(rows[start : start + size])
    # Between two rows of one source, another gives at most its share of the way plus one.
    for stop in range(len(order)):
        done = [sum(where == source for where, _ in order[:stop]) for source in range(len(sizes))]
        parts = [part / count for part, count in zip(done, counts, strict=True) if count]
        assert max(parts) - min(parts) <= 2 / min(count for count in counts if count)


def test_other_seeds_give_other_orders():
    assert len({tuple(interleave([20, 20], [20, 40], seed)) for seed in range(4)}) == 4


def mixed(seed=3):
    given = [
        Source(path=Path("a.jsonl"), weight=2.0),
        Source(path=Path("b.jsonl"), weight=1.0, epochs=2.0, name="bees"),
    ]
    read = [read_rows(sums()), read_rows(sums(5, offset=1))]
    return compose(given, [encode(rows, tiny_tokenizer()) for rows in read], seed)


def test_composition_counts_what_is_trained():
    encoded, composition = mixed()
    first, second = composition.to_json()
    assert (first["rows"], second["rows"]) == (20, 10)
    assert (first["available"], second["available"]) == (24, 5)
    assert first["tokens"] + second["tokens"] == encoded.num_tokens
    assert first["trained_tokens"] + second["trained_tokens"] == encoded.num_trained_tokens
    assert first["share_of_rows"] == 2 / 3
    header, line, other = str(composition).splitlines()
    assert header.split()[:2] == ["source", "format"]
    figures = [str(first[name]) for name in ("tokens", "trained_tokens")]
    shares = ["66.7%", f"{first['share_of_trained_tokens']:.1%}"]
    assert line.split() == ["a.jsonl", "prompt_completion", "0", "24", "20", *figures, *shares]
    assert other.startswith("bees")


def test_whole_sources_keep_the_order_of_their_files():
    read = [read_rows(sums(3)), read_rows(sums(2, offset=1))]
    parts = [encode(rows, tiny_tokenizer()) for rows in read]
    encoded, _ = compose([Source(path=Path(name)) for name in "ab"], parts, 0)
    expected = [row["input_ids"].tolist() for part in parts for row in part.examples]
    assert [row["input_ids"].tolist() for row in encoded.examples] == expected


def test_run_on_a_mixture_that_is_stopped_inside_an_epoch_ends_with_identical_weights(checkpoints, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, mixed()[0], **options)
    whole.train()
    resumed = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path / "again", mixed()[0], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight), name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sources_are_read_with_their_own_settings(tmp_path):
    answer = {"role": "assistant", "content": "x"}
    chats = [{"messages": [answer, {"role": "user", "content": f"{i}?"}, answer]} for i in range(3)]
    data = Data.model_validate_json(json.dumps({
        "train": [
            write(tmp_path / "a.jsonl", [*sums(10), *sums(2)]),
            {"path": write(tmp_path / "b.jsonl", chats), "turns": "trim", "system": "Be short.", "name": "b"},
            {"path": write(tmp_path / "c.jsonl", sums(12)), "filters": {}},
        ],
        "filters": {"duplicates": True},
    }))  # fmt: skip
    sources = Sources(data)
    first, second, third = (sources.stream(index).collect() for index in range(3))
    assert [message["role"] for message in second.rows[0].messages] == ["system", "user", "assistant"]
    assert first.filtered == {"duplicates": 2}
    assert third.filtered == {}
    assert str(first) == f"{tmp_path / 'a.jsonl'}: prompt_completion 12; 10 rows kept, 2 rejected, 2 by duplicates"


def test_duplicates_across_sources_are_found(tmp_path):
    train = [write(tmp_path / name, sums(4)) for name in ("a.jsonl", "b.jsonl")]
    data = Data.model_validate_json(json.dumps({"train": train, "filters": {"duplicates": True}}))
    with pytest.raises(DataError, match=r"b.jsonl: the filters leave no row \(duplicates 4\)"):
        Sources(data).stream(1).collect()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{}", "data.train[0]: found {}, expected path or hub, and only one of them"),
        ("{path: a, hub: b}", "expected path or hub, and only one of them"),
        ("{path: a, rows: 3, weight: 1}", "expected rows on its own"),
        ("{path: a, weight: -1}", "data.train[0].weight: found -1, expected greater than or equal to 0"),
        ("{path: a, epochs: 0}", "data.train[0].epochs: found 0, expected greater than 0"),
        ("{path: a, wieght: 1}", "data.train[0].wieght: unknown key; did you mean data.train[0].weight?"),
        ("{path: a, filters: {contamination: {}}}", "data.train[0].filters.contamination.files: missing; it"),
        ("{path: a, train_on: lst}", "data.train[0].train_on: found 'lst', expected 'assistant'"),
        ("{path: a, format: openai}", "data.train[0].format: found 'openai', expected 'messages'"),
    ],
)  # fmt: skip
def test_source_that_makes_no_sense_is_named_by_its_place(tmp_path, source, problem):
    (tmp_path / "r.yaml").write_text(f"model: m\noutput: o\ndata: {{train: [{source}]}}\n")
    with pytest.raises(RecipeError) as raised:
        SftRecipe.load(tmp_path / "r.yaml")
    assert problem in str(raised.value)


def test_paths_of_sources_and_filters_count_from_the_recipe(tmp_path):
    text = "{path: a.jsonl, weight: 2}, b.jsonl, {hub: owner/name, filters: {contamination: {files: c.jsonl}}}"
    (tmp_path / "r.yaml").write_text(f"model: m\noutput: o\ndata: {{train: [{text}]}}\n")
    recipe = SftRecipe.load(tmp_path / "r.yaml")
    assert [source.path for source in recipe.data.train] == [tmp_path / "a.jsonl", tmp_path / "b.jsonl", None]
    assert recipe.data.train[2].filters.contamination.files == (tmp_path / "c.jsonl",)
    resolved = recipe.resolved()["data"]["train"]
    assert resolved[:2] == [{"path": str(tmp_path / "a.jsonl"), "weight": 2.0}, str(tmp_path / "b.jsonl")]
