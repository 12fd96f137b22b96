"""IFEval and IFBench: replies checked by programs, with the checkers of lm-eval and of if-verifiable.

Source:
    Instruction-Following Evaluation for Large Language Models, https://arxiv.org/abs/2311.07911; Generalizing
    Verifiable Instruction Following, https://arxiv.org/abs/2507.02833. Loose accuracy forgives a first line, a last
    line and asterisks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeft.errors import DataError, MissingExtraError
from moeft.evaluation.request import Answer, Chat
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Item, Metric, Task

MAX_NEW_TOKENS = 1280
SAMPLE = "A reply of two parts.\n\nIt has words, 3 numbers and one question: is it long enough? Yes!"
METRICS = (
    Metric("prompt_strict"),
    Metric("instruction_strict"),
    Metric("prompt_loose"),
    Metric("instruction_loose"),
)
Verdicts = tuple[list[bool], list[bool]]
"""Of each instruction whether it is followed, strictly and loosely."""


def ifeval(rows: Sequence[Record]) -> Task:
    """Rows with ``prompt``, ``instruction_id_list`` and ``kwargs``, as Google publishes them."""
    return _task("ifeval", rows, _check_ifeval)


def ifbench(rows: Sequence[Record]) -> Task:
    """Rows with the same columns and the instructions of IFBench."""
    return _task("ifbench", rows, _check_ifbench)


def use_nltk_data(folder: Path) -> None:
    """Let the checkers find nltk's data in a folder, unless ``NLTK_DATA`` says where it is."""
    if folder.is_dir():
        os.environ.setdefault("NLTK_DATA", str(folder))


def _task(name: str, rows: Sequence[Record], check: Callable[[dict[str, Any], str], Verdicts]) -> Task:
    for line, row in rows:
        missing = [column for column in ("prompt", "instruction_id_list", "kwargs") if column not in row]
        if missing:
            raise DataError(f"task {name}: row {line} lacks {', '.join(missing)}; its columns are {', '.join(row)}")
    # What grading lacks is found now, and not behind hours of generation.
    with _same_draws():
        items = [
            Item(
                str(row.get("key", line)),
                Chat(({"role": "user", "content": row["prompt"]},), MAX_NEW_TOKENS),
                row,
                _fault(check, row),
            )
            for line, row in rows
        ]

    def grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
        with _same_draws():
            return [_figures(*check(item.reference, answer["reply"])) for item, answer in answered]

    return Task(name, tuple(items), METRICS, grade)


def _fault(check: Callable[[dict[str, Any], str], Verdicts], row: dict[str, Any]) -> str | None:
    """Why a row cannot be graded, such as for data that its checker lacks."""
    try:
        check(row, SAMPLE)
    except DataError as error:
        return str(error)
    return None


def _figures(strict: list[bool], loose: list[bool]) -> dict[str, tuple[float, float]]:
    return {
        "prompt_strict": (float(all(strict)), 1.0),
        "instruction_strict": (float(sum(strict)), float(len(strict))),
        "prompt_loose": (float(all(loose)), 1.0),
        "instruction_loose": (float(sum(loose)), float(len(loose))),
    }


def _check_ifeval(row: dict[str, Any], reply: str) -> Verdicts:
    with _checkers("ifeval", "lm-eval"):
        from lm_eval.tasks.ifeval.utils import process_results

        found = process_results({"key": 0, **row}, [reply])
    return found["inst_level_strict_acc"], found["inst_level_loose_acc"]


def _check_ifbench(row: dict[str, Any], reply: str) -> Verdicts:
    names = row["instruction_id_list"]
    with _checkers("ifbench", "if-verifiable"):
        from if_verifiable.common import evaluate_instructions
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT

        if unknown := [name for name in names if name not in INSTRUCTION_DICT]:
            raise KeyError(unknown[0])
        found, _ = evaluate_instructions(reply, names, row["kwargs"], row["prompt"], INSTRUCTION_DICT)
    if not found:  # An empty reply follows nothing.
        return [False] * len(names), [False] * len(names)
    return [verdict.strict_pass for verdict in found], [verdict.loose_pass for verdict in found]


@contextmanager
def _checkers(task: str, package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"task {task} needs {package}; install it with: pip install 'moeft[eval]'") from error
    except KeyError as error:
        raise DataError(f"task {task}: {package} has no checker for the instruction {error}") from error
    except (LookupError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"task {task}: the checkers lack nltk's data ({reason}); set NLTK_DATA to a folder with "
            "tokenizers/punkt_tab, or run: python -m nltk.downloader punkt_tab stopwords averaged_perceptron_tagger_eng"
        ) from error


@contextmanager
def _same_draws() -> Iterator[None]:
    """Checkers draw what an instruction leaves open, and languages are detected by sampling: both from a seed."""
    state = random.getstate()
    random.seed(0)
    try:
        from langdetect import DetectorFactory
    except ImportError:  # The checkers say so themselves.
        DetectorFactory = None
    before = getattr(DetectorFactory, "seed", None)
    if DetectorFactory is not None:
        DetectorFactory.seed = 0
    try:
        yield
    finally:
        random.setstate(state)
        if DetectorFactory is not None:
            DetectorFactory.seed = before
