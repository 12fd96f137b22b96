"""Weights of a model under the names that its checkpoint has for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from moeft.errors import CheckpointError
from moeft.integration import model_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head.weight"


def as_on_disk(model: PreTrainedModel, weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Rename weights, and take stacks apart where the checkpoint holds one tensor per expert.

    Args:
        model: The model they are of, without PEFT's wrapper.
        weights: Name in memory -> value.
        names: Names of all tensors of the checkpoint.

    Returns:
        Name on disk -> value; of tied embeddings, the head too where it is stored.

    Raises:
        CheckpointError: If the checkpoint has no place for a weight.
    """
    from transformers.core_model_loading import revert_weight_conversion

    family = model_family.of_model(model)
    found = {}
    for name, value in revert_weight_conversion(model, dict(weights)).items():
        prefixed = (family.disk_prefix or "model.") + name.removeprefix("model.")
        place = next((candidate for candidate in (name, prefixed) if candidate in names), None)
        if place is None:
            raise CheckpointError(f"the checkpoint holds no {name}, which was trained; is it the base of this run?")
        found[place] = value
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    embeddings = [value for name, value in found.items() if name.endswith("embed_tokens.weight")]
    if tied and embeddings and HEAD in names:
        found[HEAD] = embeddings[0]
    return found
