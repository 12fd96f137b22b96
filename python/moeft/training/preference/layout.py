"""Which layout of a pair a model can do: asked of the model itself."""

from __future__ import annotations

import logging
from typing import Any

from moeft.config.sources import PairLayout
from moeft.errors import UnsupportedModelError
from moeft.integration.shared_prefix import shares_prefix
from moeft.training.document_isolation import check_document_isolation, wants_flat_batches

logger = logging.getLogger(__name__)


def usable_layout(model: Any, wanted: str) -> PairLayout:
    """The layout that is asked for, or the next one that the model can do, said in the log."""
    if wanted == "shared_prefix":
        if shares_prefix(model):
            return "shared_prefix"
        logger.warning("this model cannot compute a prompt once for two answers; each answer gets its own")
        wanted = "packed"
    if wanted == "packed":
        try:
            check_document_isolation(model)
            if not wants_flat_batches(model):
                return "packed"
            reason = "its attention tells sequences apart in a batch of one only"
        except UnsupportedModelError as error:
            reason = str(error)
        logger.warning("both answers of a pair cannot share a row, so each gets one: %s", reason)
    return "padded"
