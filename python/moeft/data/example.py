"""An encoded row, and how one that is too long is made to fit."""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

IGNORE_INDEX = -100
"""Label of a token that is not trained, as in ``torch.nn.functional.cross_entropy``."""

OnTooLong = Literal["reject", "truncate", "truncate_left", "split"]
"""Leave a row out that is too long, keep its first tokens, keep its last tokens, or cut it into rows that fit."""


class Example(TypedDict):
    """One encoded row; both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]


def check_length_options(max_length: int | None, on_too_long: str) -> None:
    """Refuse options that make no sense.

    Raises:
        ValueError: If ``max_length`` is below 1 or ``on_too_long`` unknown.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}, expected at least 1, or None for no limit")
    if on_too_long not in get_args(OnTooLong):
        raise ValueError(f"on_too_long is {on_too_long!r}, expected one of {', '.join(get_args(OnTooLong))}")


def fit(example: Example, max_length: int | None, on_too_long: OnTooLong) -> tuple[list[Example], str]:
    """Make an example fit.

    Args:
        example: An encoded row.
        max_length: Most tokens, or None for no limit.
        on_too_long: What to do with more. A piece of a row that is split has lost what stood before it, and a piece
            without a trained token is left out.

    Returns:
        Examples with a trained token each, and why there are none if so.
    """
    length = len(example["input_ids"])
    pieces = [example]
    if max_length is not None and length > max_length:
        if on_too_long == "reject":
            return [], f"{length} tokens, max_length is {max_length}"
        starts = {"truncate": [0], "truncate_left": [length - max_length], "split": range(0, length, max_length)}
        pieces = [_piece(example, start, max_length) for start in starts[on_too_long]]
    # The first label is never a target: the model predicts from the second token on.
    trained = [piece for piece in pieces if num_trained(piece["labels"][1:])]
    if trained:
        return trained, ""
    kept = min(length, max_length or length)
    place = {"truncate_left": f"last {kept}", "split": f"pieces of {kept}"}.get(on_too_long, f"first {kept}")
    return [], f"no trained token among the {place} of {length}"


def num_trained(labels: Sequence[int]) -> int:
    """Labels that are not :data:`IGNORE_INDEX`."""
    return sum(label != IGNORE_INDEX for label in labels)


def _piece(example: Example, start: int, length: int) -> Example:
    stop = start + length
    return {"input_ids": example["input_ids"][start:stop], "labels": example["labels"][start:stop]}
