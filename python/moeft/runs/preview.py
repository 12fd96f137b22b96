"""``moeft data show``: which rows, with which tokenizer, template and options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.sft import Data
from moeft.errors import CheckpointError

if TYPE_CHECKING:
    from moeft.data.preview import Preview
    from moeft.data.rows import Reject


def preview(
    file: Path,
    model: Path,
    count: int,
    data: Data | None = None,
    chat_template: str | Path | None = None,
    train_on: str | None = None,
) -> Iterator[Preview | Reject | str]:
    """Encode the first rows of a file.

    Args:
        file: Rows.
        model: Folder of a checkpoint; its weights are not read.
        count: Rows to encode; those that are rejected on the way come on top.
        data: Options; None takes the defaults of a recipe.
        chat_template: In place of that of ``data``.
        train_on: In place of that of ``data``.

    Yields:
        Rows and rejects in the order of the file, and lines to say about the whole.

    Raises:
        CheckpointError: If the folder holds no tokenizer.
        DataError: If no row can be read, or the template is neither a name nor a file.
        ValueError: If ``train_on`` makes no sense.
    """
    from moeft.data.preview import Preview, previews
    from moeft.data.reading import read_rows
    from moeft.data.trained_turns import check_options

    options: dict[str, Any] = {
        "train_on": train_on or (data.train_on if data else "assistant"),
        "reasoning": data.reasoning if data else "keep",
        "max_length": data.max_length if data else None,
        "on_too_long": data.on_too_long if data else "reject",
    }
    check_options(options["train_on"], options["reasoning"])
    tokenizer, origin = load_tokenizer(model, chat_template or (data.chat_template if data else None))
    yield f"chat template: {origin or ('the tokenizer’s own' if tokenizer.chat_template else 'none')}"
    # A look: however many rows are rejected, the others are shown.
    rows = read_rows(file) if data is None else read_rows(file, format=data.format, turns=data.turns)
    shown = 0
    for item in previews(rows.rows, tokenizer, **options):
        yield item
        shown += isinstance(item, Preview)
        if shown == count:
            break
    yield f"{shown} of {len(rows.rows)} rows shown"
    yield from rows.rejects


def load_tokenizer(folder: Path, chat_template: str | Path | None) -> tuple[Any, str | None]:
    """The tokenizer of a checkpoint with the template to train with, and where another template than its own is from.

    Raises:
        CheckpointError: If the folder holds no tokenizer.
        DataError: If ``chat_template`` is neither a name nor a file.
    """
    from transformers import AutoTokenizer

    from moeft.data import templates

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
    config = folder / "config.json"
    model_type = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
    return tokenizer, templates.apply(tokenizer, chat_template, model_type)
