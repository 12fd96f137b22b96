"""Recipes: what loads, what is refused, and what the message says."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import moeft
from moeft.config import SftRecipe, json_schema, validate_training_fields
from moeft.config.document import parse
from moeft.errors import RecipeError

MINIMAL = "model: base\noutput: run\ndata: {train: train.jsonl}\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=MINIMAL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        SftRecipe.load(path, overrides)
    return str(caught.value)


def test_defaults_are_filled_in(recipe_file):
    recipe = SftRecipe.load(recipe_file())
    assert recipe.lora.rank == 16
    assert recipe.lora.targets == ("attention", "experts")
    assert recipe.quantization is None
    assert recipe.data.train_on == "assistant"


def test_paths_count_from_the_folder_of_the_recipe(recipe_file, tmp_path):
    recipe = SftRecipe.load(recipe_file("model: /abs/base\noutput: ../run\ndata: {train: [a.jsonl, d/b.jsonl]}\n"))
    assert recipe.model == Path("/abs/base")
    assert recipe.output == tmp_path / "../run"
    assert [source.path for source in recipe.data.train] == [tmp_path / "a.jsonl", tmp_path / "d/b.jsonl"]


def test_overridden_paths_count_from_the_current_folder(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")
    recipe = SftRecipe.load(path, ["output=out", "merge={output: merged}"])
    assert recipe.output == tmp_path / "shell" / "out"
    assert recipe.merge.output == tmp_path / "shell" / "merged"
    assert recipe.data.train[0].path == tmp_path / "train.jsonl"


def test_home_is_expanded(recipe_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert SftRecipe.load(recipe_file(), ["model=~/base"]).model == Path("/home/someone/base")


def test_override_with_an_exponent_is_a_number(recipe_file):
    recipe = SftRecipe.load(recipe_file(), ["training.learning_rate=1e-4"])
    assert recipe.training == {"learning_rate": 1e-4}


def test_override_opens_a_section_that_is_null(recipe_file):
    recipe = SftRecipe.load(recipe_file(MINIMAL + "quantization: null\n"), ["quantization.attention=true"])
    assert recipe.quantization.attention is True
    assert recipe.quantization.experts is True


def test_last_override_wins(recipe_file):
    assert SftRecipe.load(recipe_file(), ["lora.rank=4", "lora.rank=8"]).lora.rank == 8


@pytest.mark.parametrize("override", ["lora.rank", "=3", "lora..rank=3", ".rank=3"])
def test_override_that_is_not_key_value_is_refused(recipe_file, override):
    assert "is not key=value" in message_of(recipe_file(), [override])


def test_override_below_a_value_is_refused(recipe_file):
    assert "model holds text, which has no keys below it" in message_of(recipe_file(), ["model.path=x"])


def test_override_with_broken_yaml_is_refused(recipe_file):
    assert "'lora.targets=[a'" in message_of(recipe_file(), ["lora.targets=[a"])


def test_unknown_key_names_the_nearest_with_its_full_path(recipe_file):
    message = message_of(recipe_file(), ["lora.rnak=8"])
    assert "lora.rnak: unknown key; did you mean lora.rank?" in message


def test_key_of_another_section_is_named(recipe_file):
    assert "rank: unknown key; did you mean protection.rank or lora.rank?" in message_of(recipe_file(), ["rank=8"])


def test_unknown_key_with_nothing_near_lists_the_keys(recipe_file):
    assert "data.zzz: unknown key; keys here are train, eval, train_on" in message_of(recipe_file(), ["data.zzz=1"])


def test_wrong_type_says_found_and_expected(recipe_file):
    assert "lora.rank: found 'sixteen', expected a valid integer" in message_of(recipe_file(), ["lora.rank=sixteen"])


@pytest.mark.parametrize(
    "override", ["lora.rank='16'", "text_only=1", "lora.rank=1.0", "lora.alpha=.inf", "lora.rank=0"]
)
def test_values_are_not_coerced(recipe_file, override):
    key = override.split("=")[0]
    assert f"{key}: found " in message_of(recipe_file(), [override])


def test_item_of_a_list_is_named_by_its_position(recipe_file):
    assert "lora.targets[1]: found 'head', expected" in message_of(recipe_file(), ["lora.targets=[experts, head]"])


def test_every_problem_is_listed_at_once(recipe_file):
    message = message_of(recipe_file("output: run\ndata: {}\nlora: {rnak: 1, alpha: high}\n"))
    assert "has 4 problems" in message
    for problem in (
        "model: missing",
        "data.train: missing; it is file of rows".lower(),
        "lora.rnak:",
        "lora.alpha: found 'high'",
    ):
        assert problem in message.lower()


def test_repeated_key_is_refused_with_its_line(recipe_file):
    message = message_of(recipe_file(MINIMAL + "model: other\n"))
    assert "recipe.yaml:4:1" in message
    assert "'model' is given twice" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "holds a list"),
        ("", "holds nothing"),
        ("a: [\n", "not valid YAML"),
        ("1: x\n", "a key must be text"),
        ("a: !!timestamp 2024-01-31\n", "a value that a recipe cannot"),
        ("a: &a [*a]\n", "cannot"),
    ],
)
def test_file_that_is_no_mapping_is_refused(recipe_file, text, expected):
    assert expected in message_of(recipe_file(text))


def test_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\n")
    assert "not UTF-8" in message_of(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        SftRecipe.load(tmp_path / "absent.yaml")


def test_recipe_is_read_only(recipe_file):
    recipe = SftRecipe.load(recipe_file())
    with pytest.raises(ValidationError):
        recipe.text_only = False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E3", 5000.0), ("1.5", 1.5), (".5", 0.5), ("-3", -3), ("0", 0), ("010", 10),
        ("1_000", "1_000"), ("12:30", "12:30"), ("2024-01-31", "2024-01-31"), ("no", "no"), ("on", "on"),
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None), ("e4", "e4"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


# What YAML cannot hold unescaped: control characters, surrogates, non-characters.
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn")), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_parse_reads_back_what_json_writes(value):
    assert parse(json.dumps(value, ensure_ascii=False)) == value


def test_resolved_recipe_loads_to_the_same_recipe(recipe_file, tmp_path):
    recipe = SftRecipe.load(recipe_file(), ["quantization={}", "merge.output=m", "training={max_steps: 3}"])
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(recipe.resolved()), encoding="utf-8")
    assert SftRecipe.load(again) == recipe


def test_every_key_has_a_description():
    schema = json_schema(SftRecipe)
    sections = [schema, *schema["$defs"].values()]
    without = [
        key for section in sections for key, value in section["properties"].items() if not value.get("description")
    ]
    assert len(sections) == 19
    assert without == []


def test_schema_lets_train_be_one_path_or_a_list():
    train = json_schema(SftRecipe)["$defs"]["Data"]["properties"]["train"]
    assert {option["type"] for option in train["anyOf"]} == {"string", "array"}


def test_the_recipe_of_the_demo_loads():
    recipe = SftRecipe.load(Path(moeft.__file__).parent / "demo" / "recipe.yaml")
    validate_training_fields(recipe.training)


def test_trainer_arguments_of_transformers_are_accepted():
    validate_training_fields(["learning_rate", "max_steps", "per_device_train_batch_size", "lr_scheduler_type"])


def test_unknown_trainer_arguments_are_all_named_with_the_nearest():
    with pytest.raises(RecipeError) as caught:
        validate_training_fields(["learning_rat", "output_dir", "max_steps"])
    message = str(caught.value)
    assert "training.learning_rat: not an argument of transformers.TrainingArguments; did you mean" in message
    assert "training.learning_rate" in message
    assert "training.output_dir: set it with `output`" in message
    assert "max_steps" not in message
