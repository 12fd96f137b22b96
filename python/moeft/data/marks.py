"""Marks in a chat template that survive rendering, so that spans are read off the text, wherever a template puts them.

transformers counts the characters that were rendered before a ``{% generation %}`` block, which goes wrong inside of
macros and captured blocks. Here the block itself writes a character before and after its text. They are noncharacters
of Unicode, reserved for use inside a program; a row that holds one is refused.
"""

import re
from dataclasses import dataclass

TURN, AFTER_INDEX, END_TURN, THOUGHT, END_THOUGHT = map(chr, range(0xFDD0, 0xFDD5))
MARKS = re.compile("[\ufdd0-\ufdd4]")
INDEX_KEY = "moeft_index"
"""Key of a message that holds its index; a template that writes whole messages would show it, and is found out."""

_BLOCK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_TURN = re.compile(f"{TURN}([0-9]*){AFTER_INDEX}")


@dataclass(frozen=True)
class Span:
    """Characters ``[start, stop)`` of a rendered text."""

    start: int
    stop: int
    message: int | None = None
    """Index of the message that they belong to, if the template tells."""


@dataclass(frozen=True)
class Marked:
    """A rendered text without its marks, and what they enclosed."""

    text: str
    turns: list[Span]
    thoughts: list[Span]


def has_generation(template: str) -> bool:
    """Whether a template says what the assistant writes."""
    return any(match[2] is None for match in _BLOCK.finditer(template))


def with_marks(template: str) -> str:
    """A template whose generation blocks write marks. The marks are made by blocks, as white space is trimmed alike."""
    index = f"{{{{ message.{INDEX_KEY} if message is defined and message is mapping }}}}"

    def mark(match: re.Match[str]) -> str:
        before, end, after = match.groups()
        if end:
            return f"{{%{before} if true %}}{END_TURN}{{% endif %}}{{% endgeneration {after}%}}"
        return f"{{%{before} generation %}}{{% if true %}}{TURN}{index}{AFTER_INDEX}{{% endif {after}%}}"

    return _BLOCK.sub(mark, template)


def read_marks(rendered: str) -> Marked:
    """Take the marks out of a rendered text; spans without a character are left out."""
    pieces: list[str] = []
    length = position = 0
    turn: tuple[int, int | None] | None = None
    thought = 0
    turns: list[Span] = []
    thoughts: list[Span] = []
    for match in MARKS.finditer(rendered):
        if match.start() < position:
            continue
        pieces.append(rendered[position : match.start()])
        length += len(pieces[-1])
        position = match.end()
        if match[0] == TURN:
            index = _TURN.match(rendered, match.start())
            assert index is not None
            turn = (length, int(index[1]) if index[1] else None)
            position = index.end()
        elif match[0] == END_TURN and turn is not None:
            turns.append(Span(turn[0], length, turn[1]))
        elif match[0] == THOUGHT:
            thought = length
        elif match[0] == END_THOUGHT:
            thoughts.append(Span(thought, length))
    pieces.append(rendered[position:])
    return Marked(
        "".join(pieces),
        [span for span in turns if span.start < span.stop],
        [span for span in thoughts if span.start < span.stop],
    )
