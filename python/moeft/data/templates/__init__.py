"""Chat templates for training: written for moeft, with ``{% generation %}`` marks around what the assistant writes.

Each renders the same text as the template that its models are published with, for the rows it accepts, and refuses
rows that it has no form for. ``docs/data.md`` says what each was compared with.
"""

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from moeft import families
from moeft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURN_MARKERS: dict[str, tuple[str, ...]] = {
    "gemma4": ("<|turn>", "<turn|>"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""Name of each shipped template -> tokens without which it makes no sense; the names are those of recipes."""

OF_FAMILY = {"gemma3": "gemma3", "gemma4": "gemma4", "qwen3": "qwen3", "qwen3_moe": "qwen3"}
"""Family -> template of its chat models, where one form serves all of them."""

PUBLISHED = {
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29": "gemma3",
    "603a42db292c25278e9b23d94c7abbe77453f13e26a053c43c5c2f900b4136f7": "gemma4",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen3",
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama3",
}
"""SHA-256 of published templates whose text a shipped one is proven to write."""


def apply(
    tokenizer: "PreTrainedTokenizerFast", wanted: str | Path | None = None, model_type: str | None = None
) -> str | None:
    """Give a tokenizer the chat template to train with.

    Args:
        tokenizer: Its own template stays if none is wanted.
        wanted: Name of a shipped template, or path of a file; None for the tokenizer's own, or if there is none for
            that of the model's family.
        model_type: The model's.

    Returns:
        Where another template came from, in words; None if the tokenizer keeps what it has, which may be none.

    Raises:
        DataError: If ``wanted`` is neither a name nor a file.
    """
    name = str(wanted) if wanted is not None else None if tokenizer.chat_template else _of_model(model_type)
    if name is None:
        return None
    template, origin = text_of(name), name
    if name in TURN_MARKERS:
        absent = missing_markers(tokenizer, name)
        if absent and wanted is None:
            return None
        origin = f"{name}, shipped with moeft" + (
            f"; the tokenizer spells {', '.join(absent)} in several tokens" if absent else ""
        )
    if template == tokenizer.chat_template:
        return None
    tokenizer.chat_template = template
    return origin


def missing_markers(tokenizer: "PreTrainedTokenizerFast", name: str) -> list[str]:
    """Turn markers of a shipped template that are no tokens of a tokenizer, which spells them in several."""
    vocabulary = tokenizer.get_vocab()
    return [marker for marker in TURN_MARKERS[name] if marker not in vocabulary]


def stand_in(template: str) -> tuple[str | None, bool]:
    """A shipped template that marks what another one, without marks, leaves open.

    Returns:
        Its name, and whether it is known to write the same text; if not, that has to be seen row by row.
    """
    known = PUBLISHED.get(hashlib.sha256(template.strip().encode()).hexdigest())
    if known is not None:
        return known, True
    fitting = [name for name, markers in TURN_MARKERS.items() if all(marker in template for marker in markers)]
    if "<think>" not in template and "qwen3" in fitting:
        fitting.remove("qwen3")
    return (fitting[0] if fitting else None), False


def _of_model(model_type: str | None) -> str | None:
    return next((OF_FAMILY.get(f.name) for f in families.all_families() if model_type in f.model_types), None)


@cache
def shipped(name: str) -> str:
    """Text of a shipped template, a key of :data:`TURN_MARKERS`."""
    return (resources.files(__name__) / f"{name}.jinja").read_text("utf-8")


def text_of(wanted: str | Path) -> str:
    """Text of a template by name or path.

    Raises:
        DataError: If it is neither, or the file is no UTF-8 text.
    """
    if str(wanted) in TURN_MARKERS:
        return shipped(str(wanted))
    path = Path(wanted)
    if not path.is_file():
        raise DataError(
            f"{path} is no file and no name of a chat template; expected a path or one of {', '.join(TURN_MARKERS)}"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no chat template: it is not UTF-8 text") from error
