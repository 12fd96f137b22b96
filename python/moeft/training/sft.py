"""Supervised fine-tuning on chat rows: the loss counts assistant tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeft.data.chat import Encoded, encode
from moeft.data.collate import PaddingCollator
from moeft.data.rows import Rows, read_rows
from moeft.training.trainer import MoeConfig, MoeTrainer

Dataset = str | Path | Iterable[Mapping[str, Any]] | Rows | Encoded


@dataclass
class SFTConfig(MoeConfig):
    """``TrainingArguments`` and how chat rows become examples."""

    train_on: str = field(
        default="assistant", metadata={"help": 'Tokens in the loss: every "assistant" turn, or only the "last" one.'}
    )
    max_length: int | None = field(default=2048, metadata={"help": "Longest example in tokens; None for no limit."})
    on_too_long: str = field(default="reject", metadata={"help": '"reject" or "truncate" longer rows.'})

    def __post_init__(self) -> None:
        if self.on_too_long not in ("reject", "truncate"):
            raise ValueError(f"on_too_long is {self.on_too_long!r}, expected 'reject' or 'truncate'")
        super().__post_init__()


class SFTTrainer(MoeTrainer):
    """Trains a model, usually a PeftModel, on chat rows.

    Args:
        model: The model.
        args: Settings.
        train_dataset: JSON-lines file, rows as mappings, or encoded rows. Rows have ``messages``, ``conversations``
            (ShareGPT) or ``prompt`` and ``completion``.
        eval_dataset: Held-out rows in the same form.
        processing_class: A fast tokenizer with a chat template.
        **kwargs: As for :class:`moeft.training.trainer.MoeTrainer`.

    Attributes:
        train_rows: What became of the training rows, rejects included.
        eval_rows: The same for held-out rows; None without any.

    Raises:
        DataError: If no row can be used, or the template hides what the assistant said.
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
        self.train_rows = encode_dataset(train_dataset, processing_class, args)
        self.eval_rows = None if eval_dataset is None else encode_dataset(eval_dataset, processing_class, args)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PaddingCollator(padding_id(processing_class))
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.train_rows.examples,
            eval_dataset=None if self.eval_rows is None else self.eval_rows.examples,
            processing_class=processing_class,
            **kwargs,
        )


def padding_id(tokenizer: Any) -> int:
    """Id that fills up rows. Any would do, since it is masked and has no label; many tokenizers name none."""
    return tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_dataset(dataset: Dataset, tokenizer: Any, args: SFTConfig) -> Encoded:
    """Turn rows in any accepted form into token ids and labels."""
    if isinstance(dataset, Encoded):
        return dataset
    rows = dataset if isinstance(dataset, Rows) else read_rows(dataset)
    return encode(
        rows,
        tokenizer,
        train_on=args.train_on,  # type: ignore[arg-type]  # checked by encode
        max_length=args.max_length,
        truncate=args.on_too_long == "truncate",
    )
