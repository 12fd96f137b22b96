"""Supervised fine-tuning on chat rows: the loss counts assistant tokens only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeft.data import cache, templates
from moeft.data.chat import Encoded, encode
from moeft.data.collate import PackingCollator, PaddingCollator
from moeft.data.example import check_length_options
from moeft.data.packing import Packed, pack
from moeft.data.reading import RowStream, read_rows
from moeft.data.rows import Rows
from moeft.data.trained_turns import check_options
from moeft.data.vocabulary import check_ids, check_vocabulary
from moeft.training.arguments import MoeConfig
from moeft.training.document_isolation import check_document_isolation, wants_documents, wants_flat_batches
from moeft.training.trainer import MoeTrainer

logger = logging.getLogger(__name__)
Dataset = str | Path | Iterable[Mapping[str, Any]] | Rows | Encoded
Unread = Callable[[], RowStream]
"""Rows that are read only if the cache does not hold them."""


@dataclass
class SFTConfig(MoeConfig):
    """``TrainingArguments`` and how chat rows become examples."""

    train_on: str = field(
        default="assistant",
        metadata={
            "help": 'Tokens in the loss: every "assistant" turn, the "last" one, the "completion" (turns behind the '
            'user\'s last one), "messages" with `train: true`, or "all". A turn\'s own `train` decides for it, except '
            'with "all".'
        },
    )
    reasoning: str = field(
        default="keep", metadata={"help": '"keep" thoughts, "strip" them, or "mask" them: shown and not trained.'}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Name of a template in moeft.data.templates, or a path; None: the tokenizer's."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder to keep encoded rows in for the next start; None for none."}
    )
    max_length: int | None = field(
        default=4096, metadata={"help": "Longest example, and slots of a pack, in tokens; None for no limit."}
    )
    on_too_long: str = field(
        default="reject", metadata={"help": '"reject", "truncate", "truncate_left" or "split" longer rows.'}
    )
    packing: bool = field(default=False, metadata={"help": "Put several examples into each row of max_length tokens."})

    def __post_init__(self) -> None:
        check_options(self.train_on, self.reasoning)
        check_length_options(self.max_length, self.on_too_long)
        if self.packing and self.max_length is None:
            raise ValueError("packing needs a max_length, the slots of a pack; it is None")
        super().__post_init__()


class SFTTrainer(MoeTrainer):
    """Trains a model, usually a PeftModel, on chat rows.

    Args:
        model: The model.
        args: Settings.
        train_dataset: File of rows, rows as mappings, or encoded rows; in any format of :mod:`moeft.data.formats`.
        eval_dataset: Held-out rows in the same form.
        processing_class: A fast tokenizer with a chat template.
        **kwargs: As for :class:`moeft.training.trainer.MoeTrainer`.

    Attributes:
        train_rows: What became of the training rows, rejects included.
        eval_rows: The same for held-out rows; None without any.
        train_packs: The training rows in packs; None without packing. Held-out rows are packed too.

    Raises:
        DataError: If no row can be used, or the template hides what the assistant said.
        UnsupportedModelError: If packs are asked for, and the model would let their examples see each other.
    """

    args: SFTConfig

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset,
        processing_class: Any,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        origin = templates.apply(processing_class, args.chat_template, model.config.model_type)
        if origin is not None:
            logger.info("chat template: %s", origin)
        self.train_rows = encode_dataset(train_dataset, processing_class, args, model)
        self.eval_rows = None if eval_dataset is None else encode_dataset(eval_dataset, processing_class, args, model)
        self.train_packs: Packed | None = None
        train: Sequence[Any] = self.train_rows.examples
        held_out: Sequence[Any] | None = None if self.eval_rows is None else self.eval_rows.examples
        if args.packing:
            check_document_isolation(model)
        documents = wants_documents(model, args, args.packing)
        collator: Any = PaddingCollator(padding_id(processing_class), documents=documents)
        if args.packing:
            assert args.max_length is not None
            seed = args.seed if args.data_seed is None else args.data_seed
            self.train_packs = pack(train, args.max_length, seed)
            train = self.train_packs.packs
            held_out = None if held_out is None else pack(held_out, args.max_length, seed).packs
            collator = PackingCollator(padding_id(processing_class), wants_flat_batches(model), documents)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None) or collator,
            **kwargs,
        )

    def tokens_of_epoch(self) -> tuple[int, int]:
        """Tokens of the training rows, and how many of them are trained."""
        return self.train_rows.num_tokens, self.train_rows.num_trained_tokens

    def sample_sequences(self, count: int) -> list[list[int]]:
        """Token ids of a few rows, held-out ones if there are any."""
        return [row["input_ids"].tolist() for row in (self.eval_rows or self.train_rows).examples[:count]]


def padding_id(tokenizer: Any) -> int:
    """Id that fills up rows. Any would do, since it is masked and has no label; many tokenizers name none."""
    return tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_dataset(
    dataset: Dataset | Unread, tokenizer: Any, args: SFTConfig, model: Any = None, content: str | None = None
) -> Encoded:
    """Turn rows in any accepted form into token ids and labels; from ``args.cache_dir``, if they are there.

    Args:
        dataset: The rows, or a function that reads them.
        tokenizer: A fast tokenizer.
        args: How to encode, and where the cache is.
        model: To train, whose embeddings must have room for all ids; None leaves that unchecked.
        content: Hash that stands for the rows in the cache; None takes that of the rows or of their file.

    Raises:
        DataError: If no row can be used, or the model has no embedding for a token.
    """
    if model is not None:
        check_vocabulary(tokenizer, _num_embeddings(model))
    encoded = dataset if isinstance(dataset, Encoded) else _encode(dataset, tokenizer, args, content)
    if model is not None:
        check_ids(encoded.examples, _num_embeddings(model))
    return encoded


def check_encoded(encoded: Encoded, tokenizer: Any, model: Any) -> None:
    """Refuse rows or a tokenizer with tokens that a model has no embedding for.

    Raises:
        DataError: Naming one of them.
    """
    check_vocabulary(tokenizer, _num_embeddings(model))
    check_ids(encoded.examples, _num_embeddings(model))


def _num_embeddings(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _encode(
    dataset: str | Path | Iterable[Mapping[str, Any]] | Rows | Unread,
    tokenizer: Any,
    args: SFTConfig,
    content: str | None,
) -> Encoded:
    options: dict[str, Any] = {
        "train_on": args.train_on,
        "reasoning": args.reasoning,
        "max_length": args.max_length,
        "on_too_long": args.on_too_long,
    }

    def rows() -> Rows | RowStream:
        return dataset if isinstance(dataset, Rows) else dataset() if callable(dataset) else read_rows(dataset)

    def build(folder: Path | None) -> Encoded:
        return encode(rows(), tokenizer, **options, folder=folder)

    if args.cache_dir is None:
        return build(None)
    if content is None:
        if isinstance(dataset, str | Path) and Path(dataset).exists():
            content = cache.file_key(dataset)
        else:
            read = rows()
            dataset = read.collect() if isinstance(read, RowStream) else read
            content = cache.rows_key(dataset)
    return cache.cached(args.cache_dir, cache.cache_key(content, tokenizer, options), build)
