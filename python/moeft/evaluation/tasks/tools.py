"""Calls of tools: the questions of the Berkeley Function-Calling Leaderboard, or rows of the same columns.

Source:
    https://gorilla.cs.berkeley.edu/leaderboard.html; its prompts are not these, so scores compare models here alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.data.tool_schemas import ToolSchemas, in_json_schema
from moeft.errors import DataError
from moeft.evaluation.replied_calls import replied_calls
from moeft.evaluation.request import Answer, Chat
from moeft.evaluation.sources import Record, read_rows
from moeft.evaluation.task import Figures, Item, Metric, Task, share
from moeft.evaluation.tool_match import TYPES, accepts

MAX_NEW_TOKENS = 512
METRICS = (Metric("match"), Metric("valid"))
WRITTEN = "python"
"""The protocol of models whose chat template shows no tools: functions and form stand in the prompt."""
PROMPT = (
    "You can call the functions below. If they can do what is asked, and all that they require is said, answer with "
    "calls alone, in the form [name(parameter=value, ...), name(...)], with values as in Python. Otherwise answer in "
    "words.\n\n"
)


def called(name: str) -> Callable[..., Task]:
    """A builder of a task in which the functions of ``ground_truth`` are to be called.

    ``match`` is the share of replies whose calls the leaderboard's rules accept, ``valid`` that of replies with calls
    that are all well-formed and fit the functions.
    """
    return lambda rows, protocol=None: _task(name, rows, protocol, is_called=True)


def not_called(name: str) -> Callable[..., Task]:
    """A builder of a task in which nothing is to be called: ``match`` is the share of replies without a call."""
    return lambda rows, protocol=None: _task(name, rows, protocol, is_called=False)


def bfcl_rows(name: str) -> Callable[[Path], list[Record]]:
    """A reader of the leaderboard's files, which keep the accepted calls in a file of their own.

    That is ``<name>_answers.jsonl`` beside the questions, or ``possible_answer/`` with a file of the same name.
    """

    def read(path: Path) -> list[Record]:
        rows = read_rows(name, path, None)
        beside = (path.with_name(f"{path.stem}_answers{path.suffix}"), path.parent / "possible_answer" / path.name)
        answers = next((file for file in beside if file.is_file()), None)
        if answers is None:
            return rows
        accepted = {row.get("id"): row.get("ground_truth") for _, row in read_rows(name, answers, None)}
        return [
            (line, {**row, "ground_truth": accepted[row["id"]]} if row.get("id") in accepted else row)
            for line, row in rows
        ]

    return read


def _task(name: str, rows: Sequence[Record], protocol: str | None, *, is_called: bool) -> Task:
    items = [_item(name, line, row, protocol, is_called) for line, row in rows]

    def grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
        return [_figures(item, answer, protocol, is_called) for item, answer in answered]

    return Task(name, tuple(items), METRICS, grade)


def _item(name: str, line: str, row: dict[str, Any], protocol: str | None, is_called: bool) -> Item:
    try:
        ((*messages,), *more) = row["question"]
        functions = [dict(function) for function in row["function"]]
        accepted = [dict(wanted) for wanted in row["ground_truth"]] if is_called else []
        if more or not messages or not functions or (is_called and not accepted):
            raise ValueError("expected one turn, and at least one function and one call")
        _check_types(functions, accepted)
        schemas = ToolSchemas([_schema(function) for function in functions])
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"task {name}: row {line} has the columns {', '.join(row)} and cannot be read as a question with functions "
            f"({type(error).__name__}: {error}); docs/evaluation.md lists the columns of each task"
        ) from error
    if protocol == WRITTEN:
        shown = PROMPT + "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        chat = Chat(({"role": "system", "content": shown}, *messages), MAX_NEW_TOKENS)
    else:
        chat = Chat(tuple(messages), MAX_NEW_TOKENS, tools=tuple(schemas.tools))
    reference = {"functions": functions, "accepted": accepted, "schemas": schemas}
    return Item(str(row.get("id", line)), chat, reference)


def _check_types(functions: Sequence[Mapping[str, Any]], accepted: Sequence[Mapping[str, Any]]) -> None:
    """What matching takes for granted."""
    for function in functions:
        for schema in function["parameters"]["properties"].values():
            items = [schema["items"]] if schema["type"] in ("array", "tuple") else []
            for kind in (part["type"] for part in (schema, *items)):
                if kind not in TYPES:
                    raise ValueError(
                        f"{function['name']} has a parameter of type {kind!r}, expected {', '.join(TYPES)}"
                    )
    for wanted in accepted:
        ((called_name, values),) = wanted.items()
        if called_name not in [function["name"] for function in functions]:
            raise ValueError(f"{called_name} is accepted and not described")
        if not all(isinstance(of_parameter, list) for of_parameter in values.values()):
            raise ValueError(f"the accepted values of {called_name} are no lists")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """As APIs and chat templates want it: JSON Schema's types, and a name without dots."""
    parameters = in_json_schema(function["parameters"])
    return {
        "type": "function",
        "function": {**function, "name": function["name"].replace(".", "_"), "parameters": parameters},
    }


def _figures(item: Item, answer: Answer, protocol: str | None, is_called: bool) -> Figures:
    functions, accepted, schemas = (item.reference[name] for name in ("functions", "accepted", "schemas"))
    calls = replied_calls(answer, schemas, protocol)
    fits = calls is not None and all(
        schemas.problem(call.name.replace(".", "_"), call.arguments) is None for call in calls
    )
    if not is_called:  # A call that cannot be read calls nothing.
        return {"match": share(not calls), "valid": share(fits)}
    if not calls:
        return {"match": share(False), "valid": share(False)}
    return {"match": share(accepts(accepted, calls, functions)), "valid": share(fits)}
