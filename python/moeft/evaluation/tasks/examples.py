"""Examples before questions of multiple choice: the same ones for all, so that a model reads them once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from moeft.errors import DataError
from moeft.evaluation.request import Choices
from moeft.evaluation.task import Item, Task

BETWEEN = "\n\n"


def with_examples(task: Task, shots: int, examples: Task | None = None) -> Task:
    """Show answered questions before each question, in the text that lm-eval makes with its ``first_n`` sampler.

    Args:
        task: A task of choices; one of another kind is returned as it is.
        shots: Examples before each question: the first under the same heading, such as a subject.
        examples: Where they come from; None takes them from the task, which then does not ask them.

    Raises:
        DataError: If there are not as many examples, or no question is left.
    """
    if shots < 0:
        raise DataError(f"task {task.name}: {shots} examples, expected 0 or more")
    if shots == 0 or not all(isinstance(item.request, Choices) for item in task.items):
        return task
    shown: defaultdict[str, list[Item]] = defaultdict(list)
    for item in task.items if examples is None else examples.items:
        if len(shown[item.reference["heading"]]) < shots:
            shown[item.reference["heading"]].append(item)
    taken = {item.key for of_heading in shown.values() for item in of_heading} if examples is None else set()
    asked = [item for item in task.items if item.key not in taken]
    if not asked:
        raise DataError(f"task {task.name}: all of its {len(task.items)} rows are examples; ask for fewer")
    texts: dict[str, str] = {}
    for heading in {item.reference["heading"]: None for item in asked}:
        if len(shown[heading]) < shots:
            about = f" under {heading.strip()!r}" if heading else ""
            raise DataError(f"task {task.name}: {len(shown[heading])} examples{about}, expected {shots}; ask for fewer")
        texts[heading] = heading + "".join(_answered(item) + BETWEEN for item in shown[heading])
    return replace(task, items=tuple(_below(texts[item.reference["heading"]], item) for item in asked))


def _answered(item: Item) -> str:
    assert isinstance(item.request, Choices)
    return item.request.context + item.request.continuations[item.reference["gold"]]


def _below(text: str, item: Item) -> Item:
    assert isinstance(item.request, Choices)
    return replace(item, request=replace(item.request, context=text + item.request.context))
