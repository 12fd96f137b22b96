"""Chat rows to token ids and labels, with any fast tokenizer that has a chat template.

The algorithm, per row:

1. Render the whole conversation once: this text, and no other, is what the model sees.
2. Find the span of an assistant turn ``i`` from prefix renders. It starts where the render of the messages before
   ``i`` with ``add_generation_prompt=True`` ends, so the role header counts as prompt, as it does at generation time.
   It ends where the render of the messages up to and including ``i`` ends, less the white space that the template puts
   after its end-of-turn marker: generation stops at the marker, so nothing behind it is ever wanted.
3. Both prefixes must really be prefixes of the whole render. A template that rewrites earlier turns (one that drops
   their reasoning, for example) fails this check, and there is no span that could be trusted.
4. Tokenise the whole render once, without adding special tokens: the template writes its own, and a second ``<bos>``
   would be a token that the model never sees when it generates. Character offsets map spans to tokens; a token is
   trained if any of its characters is inside a span. All other labels are -100.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from moeft.data.example import IGNORE_INDEX, Example, OnTooLong, check_length_options, fit, num_trained
from moeft.data.rows import Message, Reject, Row, Rows, write_rejects
from moeft.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "last"]


@dataclass(frozen=True)
class Encoded:
    """Encoded rows in their order, and every row that was left out, with its reason."""

    examples: list[Example]
    rejects: list[Reject]
    num_shortened: int = 0
    """Rows that were truncated or split to fit ``max_length``."""

    @classmethod
    def join(cls, parts: "Iterable[Encoded]") -> "Encoded":
        """Several data sets as one, in their order."""
        parts = list(parts)
        return cls(
            [example for part in parts for example in part.examples],
            [reject for part in parts for reject in part.rejects],
            sum(part.num_shortened for part in parts),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry a label."""
        return sum(num_trained(example["labels"]) for example in self.examples)

    def write_rejects(self, path: "str | Path") -> None:
        """Write the rejects as JSON lines, ``{"source", "line", "reason"}``."""
        write_rejects(self.rejects, path)

    def __str__(self) -> str:
        return (
            f"{len(self.examples)} rows, {self.num_tokens} tokens, {self.num_trained_tokens} trained, "
            f"{len(self.rejects)} rejected" + (f", {self.num_shortened} shortened" if self.num_shortened else "")
        )


def encode(
    rows: Rows | Iterable[Row],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    on_too_long: OnTooLong = "reject",
) -> Encoded:
    """Encode rows; those that cannot be trained on join the rejects of ``rows``.

    Args:
        rows: From ``read_rows``.
        tokenizer: A fast tokenizer with a chat template.
        train_on: Train every assistant turn, or only the last one.
        max_length: Most tokens of an example.
        on_too_long: What becomes of a longer row: "reject" lists it, "truncate" keeps its first tokens,
            "truncate_left" its last ones, and "split" cuts it into several examples.

    Raises:
        DataError: If the tokenizer cannot be used, the template is not prefix-consistent, or no row is left.
        ValueError: If ``train_on``, ``max_length`` or ``on_too_long`` makes no sense.
    """
    _check(tokenizer, train_on)
    check_length_options(max_length, on_too_long)
    source = "rows"
    rejects: list[Reject] = []
    if isinstance(rows, Rows):
        rejects += rows.rejects
        source, rows = rows.source, rows.rows
    examples: list[Example] = []
    num_shortened = 0
    for row in rows:
        try:
            example = encode_messages(row.messages, tokenizer, train_on=train_on)
        except TemplateError as error:
            rejects.append(Reject(row.line, f"the chat template refuses the row: {error}", source))
            continue
        fitting, reason = fit(example, max_length, on_too_long)
        if not fitting:
            rejects.append(Reject(row.line, reason, source))
        examples += fitting
        num_shortened += bool(fitting) and fitting[0] is not example
    if not examples:
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{source}: no row is left to train on. First reasons: {first or 'there were no rows'}")
    return Encoded(examples, sorted(rejects, key=lambda reject: reject.line), num_shortened)


def encode_messages(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerFast", *, train_on: TrainOn = "assistant"
) -> Example:
    """Encode one conversation by the algorithm at the top of this module.

    Raises:
        DataError: If the template is not prefix-consistent.
        jinja2.exceptions.TemplateError: If the template refuses the messages.
    """
    text = _render(tokenizer, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(tokenizer, messages, index, text) for index in (turns[-1:] if train_on == "last" else turns)]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    labels = [
        token if any(begin < end and start < stop for start, end in spans) else IGNORE_INDEX
        for token, (begin, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]
    return {"input_ids": list(encoding["input_ids"]), "labels": labels}


def _check(tokenizer: Any, train_on: str) -> None:
    if train_on not in ("assistant", "last"):
        raise ValueError(f"train_on is {train_on!r}, expected 'assistant' or 'last'")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or use an instruct model's")


def _render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)


def _span(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
    """Character span of assistant turn ``index`` in the whole render ``text``."""
    prompt = _render(tokenizer, messages[:index], generation_prompt=True)
    # The last turn ends where the whole render does; asking again would only cost time.
    whole = text if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
    if not text.startswith(prompt) or not text.startswith(whole) or len(whole) < len(prompt):
        raise DataError(
            f"the chat template is not prefix-consistent: rendering the messages up to turn {index} alone gives other "
            "text than the whole conversation has there, so the assistant's tokens cannot be told. Use a template that "
            "leaves earlier turns as they are, or train_on='last'"
        )
    reply = whole[len(prompt) :]
    content = messages[index]["content"].strip()
    # Without an end-of-turn marker behind the content, the white space is what ends the turn, so it stays.
    if not content or not reply.rstrip().endswith(content):
        reply = reply.rstrip()
    return len(prompt), len(prompt) + len(reply)
