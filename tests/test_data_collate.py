"""Padding of examples to a batch."""

import pytest
import torch

from moeft.data.collate import PaddingCollator

EXAMPLES = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]


def test_shorter_examples_are_padded_on_the_right():
    batch = PaddingCollator(pad_token_id=9)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_width_is_rounded_up_to_the_multiple(multiple, width):
    batch = PaddingCollator(0, pad_to_multiple_of=multiple)(EXAMPLES)
    assert all(tensor.shape == (2, width) for tensor in batch.values())


def test_unusable_options_are_refused():
    with pytest.raises(ValueError, match="pad_token_id is None"):
        PaddingCollator(None)
    with pytest.raises(ValueError, match="expected at least 1"):
        PaddingCollator(0, pad_to_multiple_of=0)
