"""Answers on disk, one line each, so that a second start asks only what is not answered yet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moeft.errors import RunFolderError
from moeft.evaluation.request import Answer
from moeft.evaluation.task import Item
from moeft.provenance import files

VERSION = 1
"""To be raised when the same model answers the same request otherwise, such as after a change of encoding."""


class AnswerCache:
    """Answers by a hash of subject, task, item and request; a failure is not kept, so that it is tried again.

    Args:
        path: JSON-lines file, made if missing; None keeps answers in memory alone.

    Raises:
        RunFolderError: If a whole line of the file is no answer.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        if path is None:
            return
        files.drop_torn_line(path)
        for number, line in enumerate(files.read_lines(path), start=1):
            if not isinstance(line.get("key"), str) or not isinstance(line.get("answer"), dict):
                raise RunFolderError(f"{path}:{number} is no answer: expected `key` and `answer`; is it another file?")
            self._answers[line["key"]] = line["answer"]

    def get(self, key: str) -> Answer | None:
        """The answer, if it is there."""
        return self._answers.get(key)

    def put(self, key: str, task: str, item: Item, answer: Answer) -> None:
        """Keep an answer; one that holds an error is left out."""
        if "error" in answer:
            return
        self._answers[key] = answer
        if self._path is not None:
            files.append_line(self._path, {"key": key, "task": task, "item": item.key, "answer": answer})


def answer_key(identity: dict[str, Any], task: str, item: str, request: dict[str, Any]) -> str:
    """SHA-256 over everything that the answer depends on."""
    content = [VERSION, identity, task, item, request]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
