"""Padding of encoded rows to a batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeft.data.chat import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from torch import Tensor


class PaddingCollator:
    """Pads examples on the right to the longest of the batch; a ``data_collator`` for ``transformers.Trainer``.

    Right padding keeps the positions of real tokens as they are without padding, and a causal model never looks at it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        """Set up the padding.

        Args:
            pad_token_id: Id that fills ``input_ids``.
            pad_to_multiple_of: Round the length up to a multiple of this.

        Raises:
            ValueError: If ``pad_token_id`` is None, or ``pad_to_multiple_of`` is below 1.
        """
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set tokenizer.pad_token, often to the end-of-sequence token")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}, expected at least 1")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, "Tensor"]:
        """Make a batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, S]`` int64 for B examples padded to S tokens;
            padding has mask 0 and label -100.
        """
        import torch

        multiple = self.pad_to_multiple_of
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for index, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[index, :length] = torch.tensor(example["input_ids"])
            attention_mask[index, :length] = 1
            labels[index, :length] = torch.tensor(example["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
