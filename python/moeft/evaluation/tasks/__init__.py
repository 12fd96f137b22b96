"""Tasks by name. A new one is a function from rows to a :class:`~moeft.evaluation.task.Task` and a line here."""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeft.errors import DataError
from moeft.evaluation import suite
from moeft.evaluation.sources import Hub, Record, read_rows
from moeft.evaluation.task import Task
from moeft.evaluation.tasks import (
    benchmarks,
    identity,
    instructions,
    language,
    perplexity,
    refusal,
    scenes,
    short_instructions,
    style,
    tools,
)
from moeft.evaluation.tasks.examples import with_examples
from moeft.tool_protocols import PROTOCOLS


@dataclass(frozen=True)
class Kind:
    """How a task is made."""

    build: Callable[..., Task]
    """Takes rows, and the lists of phrases if it has any."""
    files: tuple[str, ...] = ()
    """Patterns of its file below a data folder; the first that fits is taken."""
    hub: Hub | None = None
    read: Callable[[Path], list[Record]] | None = None
    """How its file is read, if it is no plain file of rows."""
    built_in: Callable[[], list[Record]] | None = None
    """Rows that are asked where no file is given."""
    phrases: tuple[str, ...] = ()
    """Patterns of lists of phrases below a data folder."""
    has_protocol: bool = False
    """Whether the builder takes the protocol of calls of tools."""
    examples: tuple[str, ...] = ()
    """Patterns of the file below a data folder whose first rows are shown as examples; else the task's own are."""
    examples_hub: Hub | None = None
    """Where they are published."""


def _bfcl(name: str, file: str, is_called: bool = True) -> Kind:
    patterns = (f"bfcl/{file}.jsonl", f"bfcl/BFCL_v*_{file}.json")
    build = tools.called(name) if is_called else tools.not_called(name)
    return Kind(build, patterns, read=tools.bfcl_rows(name), has_protocol=True)


STYLE_LISTS = ("slop/antislop_phrases.jsonl", "slop/slopscore_words.txt")

TASKS = {
    "hellaswag": Kind(benchmarks.hellaswag, ("hellaswag/*.jsonl",), Hub("Rowan/hellaswag", "validation")),
    "piqa": Kind(benchmarks.piqa, ("piqa/*.jsonl",), Hub("baber/piqa", "validation")),
    "arc_easy": Kind(benchmarks.arc_easy, ("arc/arc_easy*.jsonl",), Hub("allenai/ai2_arc", "test", "ARC-Easy")),
    "arc_challenge": Kind(
        benchmarks.arc_challenge, ("arc/arc_challenge*.jsonl",), Hub("allenai/ai2_arc", "test", "ARC-Challenge")
    ),
    "mmlu": Kind(
        benchmarks.mmlu,
        ("mmlu/*test*.jsonl",),
        Hub("cais/mmlu", "test", "all"),
        examples=("mmlu/*dev*.jsonl",),
        examples_hub=Hub("cais/mmlu", "dev", "all"),
    ),
    "wikitext": Kind(
        perplexity.wikitext,
        ("wikitext*/test.txt",),
        perplexity.WIKITEXT,
        read=perplexity.wikitext_rows,
    ),
    "perplexity": Kind(perplexity.perplexity),
    "ifeval": Kind(instructions.ifeval, ("ifeval/ifeval*.jsonl",), Hub("google/IFEval", "train")),
    "ifbench": Kind(instructions.ifbench, ("ifbench/ifbench*.jsonl",), Hub("allenai/IFBench_test", "train")),
    "ifeval_short": Kind(short_instructions.ifeval_short, built_in=suite.ifeval_short),
    "style": Kind(style.style, phrases=STYLE_LISTS),
    "scenes": Kind(scenes.scenes, phrases=STYLE_LISTS),
    "bfcl_simple": _bfcl("bfcl_simple", "simple_python"),
    "bfcl_multiple": _bfcl("bfcl_multiple", "multiple"),
    "bfcl_parallel": _bfcl("bfcl_parallel", "parallel"),
    "bfcl_irrelevance": _bfcl("bfcl_irrelevance", "irrelevance", is_called=False),
    "refusal": Kind(refusal.refusal),
    "language": Kind(language.language, built_in=language.built_in),
    "identity": Kind(identity.identity),
}


def build_task(
    name: str,
    file: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int = 0,
    tool_protocol: str | None = None,
) -> Task:
    """Make a task.

    Args:
        name: One of ``TASKS``.
        file: Its rows; None looks in ``data``, and else asks the hub.
        data: Folder of a data set each, such as ``hellaswag/rows.jsonl``.
        limit: Most items, drawn by the seed; None takes all.
        seed: Of the drawing.
        shots: Answered questions shown before each question of multiple choice; see :func:`with_examples`.
        tool_protocol: How calls of tools are written, of ``tool_protocols.PROTOCOLS``; ``python`` also writes the tools
            into the prompt. None takes calls of any protocol.

    Raises:
        DataError: If there is no such task or protocol, or its rows cannot be had or read.
    """
    kind = _kind(name)
    if tool_protocol is not None and tool_protocol not in PROTOCOLS:
        raise DataError(f"there is no tool protocol {tool_protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    examples = _examples(name, kind, file, data) if shots else None
    file = task_file(name, file, data)
    rows = _rows(name, kind, file)
    if not rows:
        raise DataError(f"task {name}: {file or kind.hub} holds no row")
    if data is not None:
        instructions.use_nltk_data(data / "nltk_data")
    lists = [path for pattern in kind.phrases if data is not None for path in sorted(data.glob(pattern))]
    if kind.phrases:
        task = kind.build(rows, lists)
    elif kind.has_protocol:
        task = kind.build(rows, tool_protocol)
    else:
        task = kind.build(rows)
    return _subset(with_examples(task, shots, examples), limit, seed)


def task_file(name: str, file: Path | None, data: Path | None) -> Path | None:
    """The file of a task's rows: the one that is given, else that below a data folder.

    Args:
        name: One of ``TASKS``.
        file: What was given.
        data: As of :func:`build_task`.

    Returns:
        None if neither is given, or the task has no usual place in the folder.

    Raises:
        DataError: If there is no such task, or the folder holds no file for it.
    """
    kind = _kind(name)
    if file is not None or data is None or not kind.files:
        return file
    for pattern in kind.files:
        if matches := sorted(data.glob(pattern)):
            return matches[0]
    raise DataError(
        f"task {name}: {data} holds no {' or '.join(kind.files)}; give the file as {name}=FILE, or leave --data out to "
        + (f"take {kind.hub} from the hub" if kind.hub else "see docs/evaluation.md for where to get one")
    )


def _examples(name: str, kind: Kind, file: Path | None, data: Path | None) -> Task | None:
    """Questions of their own file or split; None where the task's own rows have to do."""
    if data is not None:
        files = [path for pattern in kind.examples for path in sorted(data.glob(pattern))]
        return kind.build(read_rows(name, files[0], None)) if files else None
    if file is None and kind.examples_hub is not None:
        return kind.build(read_rows(name, None, kind.examples_hub))
    return None


def _rows(name: str, kind: Kind, file: Path | None) -> list[Record]:
    if file is None and kind.built_in is not None:
        return kind.built_in()
    if file is not None and kind.read is not None:
        return kind.read(file)
    return read_rows(name, file, kind.hub)


def _kind(name: str) -> Kind:
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(TASKS)}"
    raise DataError(f"there is no task {name!r}; {hint}")


def _subset(task: Task, limit: int | None, seed: int) -> Task:
    if limit is not None and limit < 1:
        raise DataError(f"task {task.name}: limit is {limit}, expected at least 1")
    if limit is None or limit >= len(task.items):
        return task
    chosen = sorted(random.Random(f"{seed} {task.name}").sample(range(len(task.items)), limit))
    return dataclasses.replace(task, items=tuple(task.items[index] for index in chosen))
