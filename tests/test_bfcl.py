"""Calls of tools against verdicts of the leaderboard's own checker, and replies from question to score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeft.data.templates import shipped
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.evaluation.model_subject import ModelSubject
from moeft.evaluation.replied_calls import replied_calls
from moeft.evaluation.tasks import build_task
from moeft.evaluation.tool_match import accepts
from moeft.tool_protocols import PROTOCOLS, ToolCall
from tests.shared_data import SHARED, needs_shared_data
from tests.tiny_models import tiny_model
from tests.tiny_training import tiny_tokenizer

VECTORS = Path(__file__).parent / "vectors" / "bfcl.jsonl"
AREA = {
    "name": "geometry.area",
    "description": "Area of a triangle.",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "integer"}, "unit": {"type": "string"}},
        "required": ["base"],
    },
}
ROW = {
    "id": "simple_0",
    "question": [[{"role": "user", "content": "Area with base 10?"}]],
    "function": [AREA],
    "ground_truth": [{"geometry.area": {"base": [10], "unit": ["cm", ""]}}],
}
RIGHT = ToolCall("geometry_area", {"base": 10, "unit": "CM"})


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def figures(task, *answers: dict) -> list[dict[str, float]]:
    graded = task.grade([(task.items[0], answer) for answer in answers])
    return [{name: numerator for name, (numerator, _) in of_item.items()} for of_item in graded]


@needs_shared_data
def test_verdicts_are_those_of_the_leaderboard():
    rows = {}
    for name in ("bfcl_simple", "bfcl_multiple", "bfcl_parallel"):
        rows |= {item.key: item.reference for item in build_task(name, data=SHARED).items}
    for line in VECTORS.read_text("utf-8").splitlines():
        vector = json.loads(line)
        row, calls = rows[vector["id"]], [ToolCall(*call) for call in vector["calls"]]
        assert accepts(row["accepted"], calls, row["functions"]) == vector["accepted"], vector


@needs_shared_data
@pytest.mark.parametrize("name", PROTOCOLS)
def test_right_calls_count_in_every_protocol(name):
    task = build_task("bfcl_parallel", data=SHARED, limit=20, tool_protocol=name)
    for item in task.items:
        accepted = [next(iter(wanted.items())) for wanted in item.reference["accepted"]]
        # Names as APIs and the bracket protocol take them, without dots.
        calls = [
            ToolCall(f.replace(".", "_"), {k: v[0] for k, v in values.items() if v[0] != ""}) for f, values in accepted
        ]
        if any(isinstance(value, dict) for call in calls for value in call.arguments.values()):
            continue  # Values of a dict have lists of their own.
        ((of_item,),) = [task.grade([(item, {"reply": PROTOCOLS[name].format(calls)})])]
        assert of_item["match"] == (1, 1)


@pytest.mark.parametrize(
    ("answer", "match", "valid"),
    [
        ({"reply": PROTOCOLS["hermes"].format([RIGHT])}, 1, 1),
        ({"reply": 'geometry.area(base=10, unit="cm")'}, 1, 1),
        ({"reply": '[TOOL: geometry_area base="10"]'}, 1, 1),
        ({"reply": "[TOOL: geometry_area base='10']"}, 1, 1),
        ({"reply": "", "tool_calls": [{"function": {"name": "geometry_area", "arguments": '{"base": 10}'}}]}, 1, 1),
        ({"reply": PROTOCOLS["hermes"].format([ToolCall("geometry_area", {"base": 11})])}, 0, 1),
        ({"reply": PROTOCOLS["hermes"].format([ToolCall("geometry_area", {"base": "ten"})])}, 0, 0),
        ({"reply": PROTOCOLS["hermes"].format([ToolCall("geometry_area", {"base": "10"})])}, 0, 0),
        ({"reply": '[TOOL: geometry_area base="ten"]'}, 0, 0),
        ({"reply": PROTOCOLS["hermes"].format([RIGHT, RIGHT])}, 0, 1),
        ({"reply": "<tool_call>{base}</tool_call>"}, 0, 0),
        ({"reply": "", "tool_calls": [{"function": {"name": "geometry_area", "arguments": "{"}}]}, 0, 0),
        ({"reply": "It is 25."}, 0, 0),
        ({"reply": ""}, 0, 0),
    ],
)
def test_replies_are_read_in_any_protocol(tmp_path, answer, match, valid):
    task = build_task("bfcl_simple", write(tmp_path / "rows.jsonl", ROW))
    assert figures(task, answer) == [{"match": match, "valid": valid}]


def test_calls_of_another_protocol_do_not_count_when_one_is_asked_for():
    text = PROTOCOLS["hermes"].format([RIGHT])
    schemas = ToolSchemas([AREA])
    assert replied_calls({"reply": text}, schemas, "hermes") == replied_calls({"reply": text}, schemas) == (RIGHT,)
    assert replied_calls({"reply": text}, schemas, "gemma") == ()


def test_where_nothing_is_to_be_called_words_are_right(tmp_path):
    task = build_task("bfcl_irrelevance", write(tmp_path / "rows.jsonl", {**ROW, "ground_truth": None}))
    words, call, broken = figures(
        task, {"reply": "I cannot."}, {"reply": PROTOCOLS["openai"].format([RIGHT])}, {"reply": "<tool_call>{"}
    )
    assert (words, call, broken) == ({"match": 1, "valid": 1}, {"match": 0, "valid": 1}, {"match": 1, "valid": 0})


def test_answers_are_read_from_the_file_of_answers(tmp_path):
    question = {key: value for key, value in ROW.items() if key != "ground_truth"}
    answer = {"id": ROW["id"], "ground_truth": ROW["ground_truth"]}
    write(tmp_path / "bfcl" / "simple_python.jsonl", question)
    write(tmp_path / "bfcl" / "simple_python_answers.jsonl", answer)
    write(tmp_path / "v4" / "bfcl" / "BFCL_v4_simple_python.json", question)
    write(tmp_path / "v4" / "bfcl" / "possible_answer" / "BFCL_v4_simple_python.json", answer)
    for folder in (tmp_path, tmp_path / "v4"):
        assert build_task("bfcl_simple", data=folder).items[0].reference["accepted"] == ROW["ground_truth"]


def test_tools_are_offered_as_schemas_or_written_into_the_prompt(tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROW)
    offered = build_task("bfcl_simple", rows).items[0].request
    function = offered.tools[0]["function"]
    assert (function["name"], function["parameters"]["type"]) == ("geometry_area", "object")
    written = build_task("bfcl_simple", rows, tool_protocol="python").items[0].request
    assert written.tools == ()
    assert "geometry.area" in written.messages[0]["content"]


def test_model_sees_the_tools_or_is_not_asked(tmp_path):
    requests = [build_task("bfcl_simple", write(tmp_path / "rows.jsonl", ROW)).items[0].request]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = shipped("qwen3")
    subject = ModelSubject(tiny_model("qwen3_moe"), tokenizer)
    assert "reply" in dict(subject.answer(requests))[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match=r"the chat template leaves tools out.*--tool-protocol python"):
        dict(subject.answer(requests))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": []}, "row 1 has the columns .* and cannot be read as a question with functions"),
        ({"function": [{"name": "f"}]}, "KeyError: 'parameters'"),
        ({"ground_truth": [{"g": {}}]}, "g is accepted and not described"),
        ({"ground_truth": [{"geometry.area": {"base": 10}}]}, "the accepted values of geometry.area are no lists"),
        ({"ground_truth": None}, "TypeError"),
        (
            {"function": [{**AREA, "parameters": {"properties": {"base": {"type": "Circle"}}}}]},
            "parameter of type 'Circle'",
        ),
    ],
)
def test_row_that_is_no_question_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        build_task("bfcl_simple", write(tmp_path / "rows.jsonl", {**ROW, **change}))


def test_unknown_protocol_and_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no tool protocol 'xml', expected one of bracket, gemma"):
        build_task("bfcl_simple", write(tmp_path / "rows.jsonl", ROW), tool_protocol="xml")
    with pytest.raises(DataError, match=r"task bfcl_simple: there is no .*; docs/evaluation.md says where to get them"):
        build_task("bfcl_simple", tmp_path / "missing.jsonl")
