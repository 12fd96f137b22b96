"""Which turns of a conversation are trained, and what becomes of the assistant's thoughts."""

from collections.abc import Sequence
from typing import Any, get_args

from moeft.config.sources import Reasoning, TrainOn
from moeft.data.marks import END_THOUGHT, INDEX_KEY, THOUGHT
from moeft.data.rows import Message
from moeft.errors import DataError


def check_options(train_on: str, reasoning: str) -> None:
    """Refuse options that do not exist.

    Raises:
        ValueError: Naming those that do.
    """
    for name, value, choices in (("train_on", train_on, TrainOn), ("reasoning", reasoning, Reasoning)):
        if value not in get_args(choices):
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}")


def trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Indices of the trained messages, all of the assistant.

    Raises:
        DataError: If a turn of somebody else is to be trained.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, message in enumerate(messages):
        if message.get("train") and message["role"] != "assistant":
            raise DataError(f"messages[{index}].train is true, but only turns of the assistant can be trained")
    if train_on == "all":
        return turns
    request = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    chosen = {
        "assistant": turns,
        "last": turns[-1:],
        "completion": [index for index in turns if index > request],
        "messages": [],
    }[train_on]
    return [index for index in turns if messages[index].get("train", index in chosen)]


def for_template(messages: Sequence[Message], reasoning: Reasoning, *, marked: bool) -> list[dict[str, Any]]:
    """Messages as a template gets them.

    Args:
        messages: Of a row.
        reasoning: What becomes of thoughts.
        marked: Write marks: the index of each message, and around thoughts that are to be masked.
    """
    prepared: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        fields: dict[str, Any] = {key: value for key, value in message.items() if key != "train"}
        thought = fields.get("reasoning_content")
        if reasoning == "strip":
            fields.pop("reasoning_content", None)
        elif reasoning == "mask" and thought:
            # A template that trims a thought would not see its white space behind a mark.
            thought = thought.strip()
            fields["reasoning_content"] = f"{THOUGHT}{thought}{END_THOUGHT}" if marked and thought else thought
        if marked:
            fields[INDEX_KEY] = index
        prepared.append(fields)
    return prepared
