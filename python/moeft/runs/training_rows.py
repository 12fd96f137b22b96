"""The rows of a recipe: read, filtered, encoded and mixed for training; read for measuring."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.learning_rate import with_rate
from moeft.runs.launch import launched_sharded
from moeft.runs.learning_rate import default_rate_of
from moeft.runs.trained import trainer_defaults

if TYPE_CHECKING:
    from moeft.config import SftRecipe
    from moeft.config.sft import Data
    from moeft.data.chat import Encoded
    from moeft.data.composition import Composition
    from moeft.data.reading import RowStream
    from moeft.data.rejects import Reject
    from moeft.data.rows import Rows
    from moeft.training.sft import SFTConfig

Show = Callable[[str], None]


def data_files(recipe: SftRecipe) -> dict[str, Path]:
    """Files that training rows come from or are filtered by; a hub data set is told by its name and revision."""
    files: dict[str, Path] = {}
    filters = {"data": recipe.data.filters}
    for index, source in enumerate(recipe.data.train):
        if source.path is not None:
            files[f"train[{index}]"] = source.path
        if source.filters is not None:
            filters[f"train[{index}]"] = source.filters
    for name, section in filters.items():
        if section.contamination is not None:
            files |= {f"{name}.contamination[{i}]": path for i, path in enumerate(section.contamination.files)}
    return files


def sft_arguments(recipe: SftRecipe, output_dir: Path) -> SFTConfig:
    """Settings of the trainer, of which encoding needs a part."""
    from moeft.training.sft import SFTConfig

    return SFTConfig(
        output_dir=str(output_dir),
        train_on=recipe.data.train_on,
        max_length=recipe.data.max_length,
        on_too_long=recipe.data.on_too_long,
        packing=recipe.data.packing,
        reasoning=recipe.data.reasoning,
        cache_dir=str(recipe.data.cache_dir or recipe.output / "encoded"),
        **trainer_defaults(recipe, launched_sharded(recipe.training)),
        **with_rate(recipe.training, default_rate_of(recipe)),
    )


def training_rows(data: Data, tokenizer: Any, args: SFTConfig, show: Show) -> tuple[Encoded, Composition]:
    """Rows of all sources as one training set, with the rejects of all.

    Args:
        data: The recipe's section.
        tokenizer: Of the model.
        args: Of the trainer; the seed decides the order of a mixture.
        show: Where to print what each source holds, and the composition.
    """
    from moeft.data.composition import compose
    from moeft.data.source_keys import source_keys
    from moeft.data.sources import Sources
    from moeft.training.sft import encode_dataset

    sources = Sources(data, lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))
    keys = source_keys(data) if args.cache_dir is not None else [None] * len(data.train)
    encoded: list[Encoded] = []
    read: list[int] = []

    def rows_of(index: int) -> RowStream:
        read.append(index)
        return sources.stream(index)

    for index, (source, key) in enumerate(zip(data.train, keys, strict=True)):
        own = copy.copy(args)
        own.train_on = source.train_on or args.train_on
        part = encode_dataset(functools.partial(rows_of, index), tokenizer, own, content=key)
        show(f"{part.read}" + ("" if index in read else " (encoded by an earlier start)"))
        encoded.append(part)
    seed = args.seed if args.data_seed is None else args.data_seed
    mixed, composition = compose(data.train, encoded, seed)
    show(str(composition))
    return mixed, composition


def heldout_rows(data: Data, show: Show) -> Rows | None:
    """Held-out rows, read as training rows are, and not filtered; None if the recipe names none."""
    from moeft.data.reading import read_rows

    if data.eval is None:
        return None
    rows = read_rows(data.eval, format=data.format, turns=data.turns, max_reject_share=data.max_reject_share)
    show(f"held out: {rows}")
    return rows


def check_recipe(recipe: SftRecipe, show: Show) -> list[Reject]:
    """Read, filter, encode and mix the rows of a recipe as training would, and train nothing.

    Args:
        recipe: The recipe; of its model only the tokenizer is loaded.
        show: Where to print what each source holds, the rejects by reason, and the composition.

    Returns:
        All rejects, held-out rows included.

    Raises:
        MoeftError: As :func:`moeft.runs.sft.run` does for rows and the tokenizer.
    """
    from moeft.data.rejects import summary
    from moeft.runs.preview import load_tokenizer

    tokenizer, origin = load_tokenizer(recipe.model, recipe.data.chat_template)
    if origin is not None:
        show(f"chat template: {origin}")
    args = sft_arguments(recipe, recipe.output)
    args.cache_dir = None  # a look leaves nothing behind
    mixed, _ = training_rows(recipe.data, tokenizer, args, show)
    heldout = heldout_rows(recipe.data, show)
    rejects = mixed.rejects + (heldout.rejects if heldout else [])
    for line in summary(rejects):
        show(f"  {line}")
    return rejects
