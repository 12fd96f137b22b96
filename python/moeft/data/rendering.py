"""Conversations to text, and the characters of it that the assistant wrote.

What the assistant wrote is known in one of three ways, best first:

1. The template marks it with ``{% generation %}``. It is rendered once, with marks (``moeft.data.marks``).
2. A shipped template that has marks writes the same text, but for what stands in front of the first turn. Which
   templates do is known for some (``templates.PUBLISHED``); for others it is seen anew in every row.
3. By prefixes. The turn of message ``i`` starts where the render of the messages before ``i`` with
   ``add_generation_prompt=True`` ends, so the role's header counts as prompt, as it does at generation time. It ends
   where the render of the messages up to and including ``i`` ends, less the white space that the template puts after
   its end-of-turn marker: generation stops at the marker. Both must be prefixes of the whole render; a template that
   rewrites earlier turns (one that drops their thoughts, for example) fails: no span could be trusted. It costs two
   renders per turn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from moeft.config.sources import Reasoning, TrainOn
from moeft.data import templates
from moeft.data.marks import MARKS, Marked, Span, has_generation, read_marks, with_marks
from moeft.data.rows import Message, Row
from moeft.data.trained_turns import for_template, trained_turns
from moeft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REFUSALS = (TemplateError, TypeError, ValueError)
"""What a template raises for messages that it has no form for, as do filters on values of another type."""


class Renderer:
    """Renders rows with the chat template of a tokenizer.

    Args:
        tokenizer: With a chat template, unless all rows are plain texts.
        train_on: Which turns are trained.
        reasoning: What becomes of the assistant's thoughts.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", train_on: TrainOn = "assistant", reasoning: Reasoning = "keep"
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.train_on = train_on
        self.reasoning = reasoning
        self.template: str = tokenizer.chat_template or ""
        self.marking = self.template if has_generation(self.template) else None
        self.is_same = self.marking is not None and self.marking in map(templates.shipped, templates.TURN_MARKERS)
        if self.template and self.marking is None:
            name, self.is_same = templates.stand_in(self.template)
            self.marking = None if name is None else templates.shipped(name)
        self.marked_template = None if self.marking is None else with_marks(self.marking)
        self.text_start, self.text_end = _text_marks(tokenizer, self.template)

    def __call__(self, row: Row) -> tuple[str, list[Span], list[Span]]:
        """Render a row.

        Returns:
            The text, the spans to train in their order, and the spans inside of them that are not.

        Raises:
            DataError: If the row cannot be told apart into turns, or nothing of it is to be trained.
            jinja2.exceptions.TemplateError: If the template refuses the messages.
        """
        if row.text is not None:
            text = self.text_start + row.text + self.text_end
            return _encodable(text), [Span(0, len(text))], []
        if not self.template:
            names = ", ".join(templates.TURN_MARKERS)
            raise DataError(f"the tokenizer has no chat template; set data.chat_template to a path or one of {names}")
        if any(map(_holds_mark, (value for message in row.messages for value in message.values()))):
            raise DataError("the text holds one of the noncharacters U+FDD0 to U+FDD4")
        wanted = trained_turns(row.messages, self.train_on)
        if not wanted and self.train_on != "all":
            raise DataError(f"no turn is trained with train_on: {self.train_on}")
        marked = self._mark(row) or self._by_prefixes(row, wanted)
        if self.train_on == "all":
            return _encodable(marked.text), [Span(0, len(marked.text))], marked.thoughts
        return _encodable(marked.text), self._choose(marked.turns, row.messages, wanted), marked.thoughts

    def _render(self, row: Row, template: str, *, marked: bool = False, upto: int | None = None, **options: Any) -> str:
        messages = for_template(row.messages[:upto], self.reasoning, marked=marked)
        return self.tokenizer.apply_chat_template(
            messages, tools=row.tools or None, chat_template=template, tokenize=False, **options
        )

    def _mark(self, row: Row) -> Marked | None:
        """The render with the spans of all turns; None if no template with marks writes this text."""
        if self.marked_template is None:
            return None
        if self.is_same:
            return read_marks(self._render(row, self.marked_template, marked=True))
        plain = self._render(row, self.template)
        if self.marking == self.template:
            marked = read_marks(self._render(row, self.marked_template, marked=True))
            if marked.text != plain:
                raise DataError(
                    "the chat template works on the text of its generation blocks, so they cannot be told; use a "
                    "template that only writes what they enclose"
                )
            return marked
        try:
            marked = read_marks(self._render(row, self.marked_template, marked=True, bos_token=""))
        except REFUSALS:
            return None
        front = len(plain) - len(marked.text)
        if not plain.endswith(marked.text):
            return None
        return Marked(plain, _moved(marked.turns, front), _moved(marked.thoughts, front))

    def _choose(self, turns: list[Span], messages: Sequence[Message], wanted: list[int]) -> list[Span]:
        """The spans of the wanted messages."""
        spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if wanted == spoken:
            return turns
        if all(span.message is not None for span in turns):
            return [span for span in turns if span.message in wanted]
        if len(turns) != len(spoken):
            raise DataError(
                f"the chat template marks {len(turns)} spans for {len(spoken)} turns of the assistant and does not "
                "call its loop variable `message`, so a turn cannot be chosen; train on all of them"
            )
        return [span for index, span in zip(spoken, turns, strict=True) if index in wanted]

    def _by_prefixes(self, row: Row, wanted: list[int]) -> Marked:
        whole = read_marks(self._render(row, self.template, marked=self.reasoning == "mask"))
        if self.reasoning == "mask" and self._render(row, self.template) != whole.text:
            raise DataError("the chat template works on the text of thoughts, so they cannot be masked; strip or keep")
        if self.train_on == "all":
            return whole
        return Marked(whole.text, [self._prefix_span(row, index, whole.text) for index in wanted], whole.thoughts)

    def _prefix_span(self, row: Row, index: int, text: str) -> Span:
        prompt = self._render(row, self.template, upto=index, add_generation_prompt=True)
        # The last turn ends where the whole render does; asking again would only cost time.
        is_last = index == len(row.messages) - 1
        whole = text if is_last else self._render(row, self.template, upto=index + 1)
        if not text.startswith(prompt) or not text.startswith(whole) or len(whole) < len(prompt):
            raise DataError(
                f"the chat template is not prefix-consistent: rendering the messages up to turn {index} alone gives "
                "other text than the whole conversation has there, so the assistant's tokens cannot be told. Use a "
                "template with generation marks or one that leaves earlier turns as they are, or train_on: last"
            )
        reply = whole[len(prompt) :]
        content = row.messages[index]["content"].strip()
        # Without an end-of-turn marker behind the content, the white space is what ends the turn, so it stays.
        if not content or not reply.rstrip().endswith(content):
            reply = reply.rstrip()
        return Span(len(prompt), len(prompt) + len(reply), index)


def _holds_mark(value: object) -> bool:
    return isinstance(value, str) and not value.isascii() and MARKS.search(value) is not None


def _moved(spans: list[Span], by: int) -> list[Span]:
    return [Span(span.start + by, span.stop + by, span.message) for span in spans]


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"half a surrogate pair, {text[error.start]!r}, is no character; mend the file") from error
    return text


def _text_marks(tokenizer: Any, template: str) -> tuple[str, str]:
    """What stands before and after a plain text.

    The first special token is written if the tokenizer adds it by itself or the chat template begins with it, since the
    model then never saw a row without. The last one is written whenever there is one: a text has an end.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    own = tokenizer("").input_ids
    begins = bool(bos) and (own[:1] == [tokenizer.bos_token_id] or "bos_token" in template)
    return (bos if begins else "", eos)
