"""A second start on the same sources reads, filters and tokenises nothing; any change of them is noticed."""

from __future__ import annotations

import json
import os

import pytest

from moeft.config.sft import Data
from moeft.errors import DataError
from moeft.runs.training_rows import training_rows
from moeft.training.sft import SFTConfig
from tests.tiny_training import sums, tiny_tokenizer

EARLIER = "(encoded by an earlier start)"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    """Two sources, the second with a duplicate of the first and a row that cannot be read."""
    train = [
        write(tmp_path / "a.jsonl", sums(40)),
        {"path": write(tmp_path / "b.jsonl", [*sums(30, offset=1), sums(1)[0], {"prompt": 1}]), "train_on": "last"},
    ]
    evaluation_set = write(tmp_path / "exam.jsonl", [{"question": "What is the capital of the Land of Oz in winter?"}])
    filters = {"duplicates": True, "contamination": {"files": [evaluation_set]}}
    return {"train": train, "filters": filters, "max_reject_share": 0.1}


def start(tmp_path, recipe, max_length=64):
    """Rows, composition and what was shown."""
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), max_length=max_length, use_cpu=True
    )
    shown = []
    data = Data.model_validate_json(json.dumps(recipe))
    encoded, composition = training_rows(data, tiny_tokenizer(), args, shown.append)
    return [row["input_ids"].tolist() for row in encoded.examples], encoded.rejects, composition.to_json(), shown


def test_second_start_gives_rows_rejects_and_composition_back(tmp_path, recipe):
    *first, shown = start(tmp_path, recipe)
    *again, shown_again = start(tmp_path, recipe)
    assert again == first
    assert first[2][1]["filtered"] == {"contamination": 0, "duplicates": first[2][1]["filtered"]["duplicates"]}
    assert len(first[1]) == sum(part["rejected"] for part in first[2])
    assert [line.removesuffix(f" {EARLIER}") for line in shown_again] == shown
    assert sum(EARLIER in line for line in shown_again) == 2


def rewrite_in_place(path):
    """Other bytes of the same length, under the same time of change."""
    before = path.stat()
    path.write_text(path.read_text().replace("Oz", "Ur").replace("7", "4"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, recipe: rewrite_in_place(folder / "a.jsonl"),
        lambda folder, recipe: rewrite_in_place(folder / "exam.jsonl"),
        lambda folder, recipe: recipe.update(turns="trim"),
        lambda folder, recipe: recipe.update(format="prompt_completion"),
        lambda folder, recipe: recipe.update(max_reject_share=0.2),
        lambda folder, recipe: recipe["filters"].update(duplicates=False),
        lambda folder, recipe: recipe["filters"].update(length={"max_turns": 9}),
        lambda folder, recipe: recipe["train"][1].update(system="Count."),
        lambda folder, recipe: recipe["train"][1].update(filters={}),
        lambda folder, recipe: recipe["train"].reverse(),
    ],
    ids=["bytes", "evaluation-set", "turns", "format", "share", "no-duplicates", "length", "system", "own", "order"],
)
def test_any_change_of_how_rows_are_read_is_noticed(tmp_path, recipe, change, request):
    start(tmp_path, recipe)
    change(tmp_path, recipe)
    *rows, shown = start(tmp_path, recipe)
    # A change of the second source alone leaves the first one as it was.
    is_of_second = request.node.callspec.id in ("system", "own")
    assert [EARLIER in line for line in shown[:2]] == [is_of_second, False]
    assert rows == list(start(tmp_path / "elsewhere", recipe)[:3])


def test_weights_and_names_do_not_make_rows_be_read_again(tmp_path, recipe):
    start(tmp_path, recipe)
    recipe["train"][1] |= {"name": "bees", "epochs": 2}
    assert sum(EARLIER in line for line in start(tmp_path, recipe)[3]) == 2


def test_damaged_cache_is_read_anew(tmp_path, recipe):
    *first, _ = start(tmp_path, recipe)
    for file in (tmp_path / "cache").glob("*/cache.json"):
        file.write_text(file.read_text().replace('"kept"', '"kepd"'))
    *again, shown = start(tmp_path, recipe)
    assert again == first
    assert not any(EARLIER in line for line in shown)


def test_refusal_of_a_file_is_not_cached(tmp_path, recipe):
    start(tmp_path, recipe)
    recipe["max_reject_share"] = 0
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.jsonl: 1 of 32 rows"):
            start(tmp_path, recipe)


def test_rows_of_an_added_source_are_compared_with_those_that_an_earlier_start_encoded(tmp_path, recipe):
    start(tmp_path, recipe)
    recipe["train"].append(write(tmp_path / "c.jsonl", [*sums(40), *sums(5, offset=3)]))
    *rows, shown = start(tmp_path, recipe)
    assert [EARLIER in line for line in shown[:3]] == [True, True, False]
    assert "40 by duplicates" in shown[2]
    assert rows == list(start(tmp_path / "elsewhere", recipe)[:3])
