"""Where a recipe's training rows come from, how they are read, and how much of each source is used."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from moeft.config.filters import Filters
from moeft.config.recipe import Section

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "prompt_response", "glaive", "text"]
"""Formats that can be trained on; :data:`moeft.data.formats.FORMATS` has them."""
ChatTemplateName = Literal["gemma3", "gemma4", "chatml", "llama3", "qwen3"]
"""Chat templates that moeft ships, in :mod:`moeft.data.templates`."""
Turns = Literal["strict", "trim", "any"]
"""What becomes of a conversation whose turns are not in order, see :mod:`moeft.data.turns`."""
TrainOn = Literal["assistant", "last", "completion", "messages", "all"]
"""Every turn of the assistant; its last one; those behind the user's last one; those with ``train: true``; or every
token of the row. A turn's own ``train`` decides for it in every mode but ``all``."""
Reasoning = Literal["keep", "strip", "mask"]
"""Train the assistant's thoughts, leave them out of the text, or show them to the model without training them."""
OnTooLong = Literal["reject", "truncate", "truncate_left", "split"]
"""Leave a row out that is too long, keep its first tokens, keep its last tokens, or cut it into rows that fit."""
PairTooLong = Literal["reject", "truncate", "truncate_left"]
"""Leave a pair out that is too long, cut the ends of its answers, or the beginning of their prompt."""
PairLayout = Literal["padded", "packed", "shared_prefix"]
"""A row for each answer, both in one row, or the prompt once with both answers behind it."""
CallProtocol = Literal["bracket", "gemma", "openai", "glaive", "hermes", "python"]
"""How an assistant writes calls; :data:`moeft.tool_protocols.PROTOCOLS` has them."""
MAX_REJECT_SHARE = 0.05
"""Default of ``data.max_reject_share``."""


class Source(Section):
    """One file, folder or hub data set of training rows. A path alone stands for a source with the defaults."""

    path: Path | None = Field(default=None, description="File of rows, or folder of datasets.save_to_disk")
    hub: str | None = Field(default=None, description="Data set of the hub, owner/name, in place of a path")
    split: str = Field(default="train", description="Split of a hub data set")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub data set")
    name: str | None = Field(default=None, description="Name in tables; null takes that of the file")
    format: FormatName | None = Field(default=None, description="Format of all rows; null takes that of `data`")
    turns: Turns | None = Field(default=None, description="Accepted order of turns; null takes that of `data`")
    system: str | None = Field(default=None, description="System turn for conversations that have none")
    train_on: TrainOn | None = Field(default=None, description="Tokens in the loss; null takes that of `data`")
    filters: Filters | None = Field(default=None, description="Rows to leave out; null takes those of `data`")
    rows: int | None = Field(default=None, ge=1, description="Rows to draw for an epoch, repeated if there are fewer")
    weight: float | None = Field(
        default=None, ge=0, description="Share among the sources with a weight; 0 leaves the source out"
    )
    epochs: float = Field(
        default=1.0, gt=0, description="How often each row is used in an epoch; with a weight, at most so often"
    )

    @property
    def label(self) -> str:
        """Name in tables and messages."""
        return self.name or self.hub or (self.path.name if self.path else "")

    @property
    def is_mixed(self) -> bool:
        """Whether it asks for anything but all of its rows once."""
        return self.rows is not None or self.weight is not None or self.epochs != 1

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("path or hub, and only one of them")
        if self.rows is not None and (self.weight is not None or self.epochs != 1):
            raise ValueError("rows on its own: it decides what weight and epochs would")
        return self

    @model_serializer(mode="wrap")
    def _shortest(self, handler: SerializerFunctionWrapHandler) -> Any:
        # A path alone stays one, so that a run folder holds what the recipe says.
        values = handler(self)
        changed = {
            name: values[name]
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }
        return values["path"] if changed.keys() == {"path"} else changed
