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
    from transformers import AutoTokenizer

    from moeft.data import templates
    from moeft.data.preview import Preview, previews
    from moeft.data.rows import read_rows
    from moeft.data.trained_turns import check_options

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} holds no tokenizer that transformers can load: {error}") from error
    options: dict[str, Any] = {
        "train_on": train_on or (data.train_on if data else "assistant"),
        "reasoning": data.reasoning if data else "keep",
        "max_length": data.max_length if data else None,
        "on_too_long": data.on_too_long if data else "reject",
    }
    check_options(options["train_on"], options["reasoning"])
    origin = templates.apply(tokenizer, chat_template or (data.chat_template if data else None), model_type(model))
    yield f"chat template: {origin or ('the tokenizer’s own' if tokenizer.chat_template else 'none')}"
    rows = read_rows(file)
    shown = 0
    for item in previews(rows.rows, tokenizer, **options):
        yield item
        shown += isinstance(item, Preview)
        if shown == count:
            break
    yield f"{shown} of {len(rows.rows)} rows shown"
    yield from rows.rejects


def model_type(folder: Path) -> str | None:
    """Of the checkpoint in a folder; None if it has no ``config.json``."""
    config = folder / "config.json"
    return json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
