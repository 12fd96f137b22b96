"""Filters of rows: what each leaves out, with its reason, and what it keeps."""

import json
import subprocess
import sys
import textwrap

import pytest

from moeft.config.filters import Filters
from moeft.data.filters import build_filters
from moeft.data.reading import RowReader, RowStream
from moeft.errors import DataError

STORY = (
    "The keeper of the lighthouse climbed the stairs every evening at six, lit the lamp, and wrote the names of the "
    "ships that passed into a book which nobody but the harbour master ever opened again after the winter had gone."
)


def chat(request, answer, **row):
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}], **row}


def left_out(rows, count_tokens=None, **filters):
    """Line -> reason of every row that the filters leave out."""
    wanted = Filters.model_validate_json(json.dumps(filters))
    read = RowStream(RowReader(rows), filters=build_filters(wanted, count_tokens)).collect()
    assert len(read.rows) + len(read.rejects) == len(rows)
    assert sum(read.filtered.values()) == len(read.rejects)
    return {reject.line: reject.reason for reject in read.rejects}


def test_bounds_count_turns_characters_and_tokens():
    rows = [chat("ab", "cd"), chat("ab", "cd ef gh"), {"messages": chat("a", "b")["messages"] * 2}, chat("ab", "cd ef")]
    assert left_out(rows, length={"max_turns": 2}) == {3: "length: 4 turns, at most 2 are wanted"}
    assert left_out(rows, length={"min_characters": 6}) == {1: "length: 5 characters, at least 6 are wanted"}
    reasons = left_out(rows, lambda text: len(text.split()), length={"min_tokens": 3, "max_tokens": 3})
    assert reasons == {
        1: "length: 2 tokens, at least 3 are wanted",
        2: "length: 4 tokens, at most 3 are wanted",
        3: "length: 4 tokens, at most 3 are wanted",
    }
    with pytest.raises(ValueError, match="no tokenizer to count"):
        left_out(rows, length={"min_tokens": 3})


def test_duplicates_are_told_by_words_and_roles():
    rows = [chat("Hi there", "hello"), chat("hi  THERE", "hello\n"), chat("hi", "there hello"), {"text": "Hi there"}]
    assert left_out(rows, duplicates=True) == {2: "duplicates: equals rows line 1"}


def test_calls_with_other_arguments_are_no_duplicates():
    def call(city):
        calls = [{"name": "f", "arguments": {"city": city}}]
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    assert left_out([{"messages": call("Rome")}, {"messages": call("Oslo")}], duplicates=True) == {}


def test_first_of_near_duplicates_is_kept():
    pytest.importorskip("rensa", reason="needs the extra 'data'")
    edited = STORY.replace("six", "seven")
    rows = [chat("Tell me", STORY), chat("Tell me", edited), chat("Tell me", STORY[: len(STORY) // 2] * 2)]
    assert list(left_out(rows, near_duplicates={"threshold": 0.6})) == [2]
    assert left_out(rows, near_duplicates={"threshold": 0.95}) == {}


def test_estimated_similarity_is_that_of_the_sets_of_runs():
    pytest.importorskip("rensa", reason="needs the extra 'data'")
    words = [f"w{i}" for i in range(3000)]
    rows = [{"text": " ".join(words[:2000])}, {"text": " ".join(words[200:2200])}]  # 1800 of 2200 words: 0.818
    reason = left_out(rows, near_duplicates={"threshold": 0.5, "words": 1, "permutations": 4096})[2]
    estimate = float(reason.partition("is ")[2].partition("%")[0]) / 100
    # The estimate is a mean of 4096 draws: standard error 0.006, rounded to 0.01.
    assert abs(estimate - 1800 / 2200) < 4 * 0.006 + 0.005


def test_signatures_do_not_depend_on_the_process():
    pytest.importorskip("rensa", reason="needs the extra 'data'")
    script = textwrap.dedent("""
        import rensa
        signature = rensa.RMinHash(16, 0)
        signature.update(["a b c", "d e f", "é"])
        print(signature.digest())
    """)
    runs = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}).stdout
            for seed in ("1", "2")}  # fmt: skip
    assert len(runs) == 1
    assert "[" in runs.pop()


def test_other_languages_are_left_out_and_short_rows_kept():
    pytest.importorskip("py3langid", reason="needs the extra 'data'")
    german = "Der Wärter des Leuchtturms stieg jeden Abend um sechs die Treppe hinauf und zündete die Lampe an, danach."
    french = "Le gardien du phare montait chaque soir l'escalier à six heures et allumait la lampe pour les navires."
    rows = [chat("Tell me", STORY), chat("Erzähl", german), chat("Raconte", french), chat("Hallo", "Guten Tag")]
    assert left_out(rows, language={"keep": "en"}) == {
        2: "language: is in language 'de'",
        3: "language: is in language 'fr'",
    }
    assert list(left_out(rows, language={"keep": ["en", "de"]})) == [3]
    with pytest.raises(ValueError, match=r"filters.language.keep holds 'english', expected codes such as en"):
        left_out(rows, language={"keep": "english"})


def test_rows_with_a_piece_of_an_evaluation_set_are_left_out(tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(
        json.dumps({"key": 1, "nested": [{"prompt": STORY}]}) + "\n" + json.dumps({"q": "Why is the sky so very blue?"})
    )
    piece = " ".join(STORY.split()[5:18]).upper().replace(" ", "  ,")
    rows = [
        chat("Copy", "so: " + piece),
        chat("Copy", " ".join(STORY.split()[5:17]) + " other"),
        chat("why is the sky, so very blue", "It scatters."),
        chat("Why is the sky blue?", "It scatters."),
        chat("They ask: why is the sky so very blue?", "It scatters."),
    ]
    reasons = left_out(rows, contamination={"files": str(heldout)})
    assert list(reasons) == [1, 3]
    assert reasons[1].startswith("contamination: holds 'climbed the stairs every evening")
    assert reasons[1].endswith("as heldout.jsonl does")


def test_evaluation_set_without_texts_is_refused(tmp_path):
    (tmp_path / "short.jsonl").write_text('{"a": "too short", "b": 3}')
    with pytest.raises(DataError, match="no text has 7 words"):
        left_out([chat("a", "b")], contamination={"files": [str(tmp_path / "short.jsonl")]})
    with pytest.raises(FileNotFoundError):
        left_out([chat("a", "b")], contamination={"files": [str(tmp_path / "absent.jsonl")]})


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("weather", {"city": "Rome", "days": 3}, None),
        ("weather", {"city": "Rome"}, None),
        ("weather", {"days": 3}, "'city' is a required property"),
        ("weather", {"city": 7}, "7 is not of type 'string'"),
        ("wether", {"city": "Rome"}, "no tool of the row (offered: weather)"),
    ],
)
def test_calls_are_held_to_the_schemas_of_their_row(name, arguments, problem):
    pytest.importorskip("jsonschema", reason="needs the extra 'data'")
    schema = {"type": "dict", "properties": {"city": {"type": "str"}, "days": {"type": "int"}}, "required": ["city"]}
    turns = chat("?", "It is warm.")["messages"]
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]},
             {"role": "tool", "content": "warm"}]  # fmt: skip
    row = {"messages": [turns[0], *calls, turns[1]], "tools": [{"name": "weather", "parameters": schema}]}
    reasons = left_out([row, chat("no", "calls")], tool_calls=True)
    assert (1 in reasons) == (problem is not None)
    assert problem is None or problem in reasons[1]


def test_first_filter_that_refuses_gives_the_reason_and_later_ones_do_not_see_the_row():
    rows = [chat("a", "b"), chat("long enough", "b"), chat("long enough", "b")]
    assert left_out(rows, length={"min_characters": 5}, duplicates=True) == {
        1: "length: 3 characters, at least 5 are wanted",
        3: "duplicates: equals rows line 2",
    }
