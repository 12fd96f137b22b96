"""The recipe's section ``protection``, and the names of the files that it reads."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from moeft.config.recipe import Section

FISHER_FORMAT = "moeft-fisher-v1"
LAYER_IMPORTANCE_FORMAT = "moeft-layer-importance-v1"
SUBSPACE_FORMAT = "moeft-subspace-v1"


class Protection(Section):
    """What training must leave alone: the subspace in which an instruct model differs from its base."""

    subspace: Path = Field(description="File of `moeft subspace`")
    derived: bool = Field(
        default=False,
        description="The model to train was made from the file's instruct model, by a merge for example: names and "
        "shapes are compared, the fingerprint is not",
    )
    mode: Literal["scale_mask", "project"] = Field(
        default="project",
        description="scale_mask: damp the gradient inside the subspace; project: the gradient and the update",
    )
    strength: float = Field(default=1.0, ge=0, le=1, description="Share that is taken away: 1 all, 0 nothing")
    layer_importance: Path | None = Field(
        default=None, description="layer_importance.json of `moeft fisher`; null protects all layers alike"
    )
    rank: int | None = Field(default=None, ge=1, description="First directions of the file to use; null takes all")
