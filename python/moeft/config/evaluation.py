"""What a run measures on rows that are not trained on."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from moeft.config.recipe import Section


class Recall(Section):
    """Facts that are told in the first turn and asked for later on, as :mod:`moeft.evaluation.recall` does."""

    filler: Path = Field(description="Conversations whose exchanges stand between fact and question")
    distances: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="Exchanges between fact and question"),
    ] = (0, 2, 8)
    max_new_tokens: int = Field(default=0, ge=0, description="Length of replies to generate as well; 0 for none")


class Evaluation(Section):
    """Measurements on held-out rows before and after training."""

    tool_calls: Path | None = Field(
        default=None, description="JSONL file of held-out requests with the right tool call"
    )
    turn_perplexity: Path | None = Field(
        default=None, description="Held-out conversations: perplexity of the assistant's first, second, ... turn"
    )
    recall: Recall | None = Field(default=None, description="Whether the model still knows what it was told early on")
    max_new_tokens: int = Field(default=64, ge=1, description="Longest answer in tokens")
    batch_size: int = Field(default=16, ge=1, description="Requests answered at once")
    router_drift_rows: int | None = Field(
        default=None, ge=0, description="Rows on which routing is compared before and after; null takes 16 with `train`"
    )
