"""The section of a recipe that says where packed experts wait."""

from typing import Literal

from pydantic import Field

from moeft.config.recipe import Section


class Memory(Section):
    """Where the packed experts of a model wait while they are not computed with."""

    experts: Literal["resident", "stream", "auto"] = Field(
        default="resident",
        description="On the device; in host memory, from which each layer's are brought when it computes; or streamed "
        "only if they do not fit",
    )
    vram: str | int | None = Field(
        default=None, description="Memory of the card to plan for, such as 12GiB; null takes all that the GPU has"
    )
    backing: Literal["host", "disk"] = Field(
        default="host", description="Streamed experts in host memory, or in the files of a packed checkpoint"
    )
