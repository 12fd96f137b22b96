"""Recipes of the stages that have no command with a recipe of its own: what their options are on a command line."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moeft.config.recipe import Recipe
from moeft.config.sft import Dtype, Target
from moeft.config.sources import CallProtocol, TrainOn


class FisherRecipe(Recipe):
    """As the options of ``moeft fisher``."""

    model: Path = Field(description="Folder of a checkpoint, 16-bit or packed")
    prompts: Path = Field(description="File of rows")
    rows: int = Field(default=200, ge=1, description="Rows to measure")
    labels: Literal["data", "sampled"] = Field(default="data", description="The rows' tokens, or the model's own")
    targets: tuple[Target, ...] | None = Field(default=None, description="Weights to measure; null takes all")
    train_on: TrainOn = Field(default="assistant", description="Tokens whose likelihood counts")
    max_length: int = Field(default=4096, ge=2, description="Longer rows are cut to this many tokens")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    seed: int = Field(default=0, ge=0, description="Of the choice of rows and of sampled labels")
    memory: str = Field(default="4GiB", description="Most memory of the sums")
    device: str = Field(default="cpu", description="Where to compute")


class SubspaceRecipe(Recipe):
    """As the options of ``moeft subspace``."""

    instruct: Path = Field(description="Folder of the instruct model")
    base: Path = Field(description="Folder of the model that it was tuned from")
    rank: int = Field(default=256, ge=1, description="Directions of every matrix")
    targets: tuple[Target, ...] | None = Field(default=None, description="Weights to decompose; null takes all")
    power_iterations: int = Field(default=2, ge=0, description="More are slower and closer to the exact ones")
    seed: int = Field(default=0, ge=0, description="Of the random sketch")
    device: str = Field(default="cpu", description="Where to compute")


class QuantizeRecipe(Recipe):
    """As the options of ``moeft quantize``."""

    model: Path = Field(description="Folder of a 16-bit checkpoint")
    attention: bool = Field(default=False, description="Pack attention projections too")
    mlp: bool = Field(default=False, description="Pack dense and shared-expert projections too")
    double_quant: bool = Field(default=False, description="Quantise the block scales too")


class HardPairsRecipe(Recipe):
    """As the options of ``moeft hard build``; the stage writes ``pairs.jsonl`` into its folder."""

    tools: Path = Field(description="Schemas of the tools, OpenAI's JSON")
    protocol: CallProtocol = Field(default="bracket", description="How calls are written")
    seeds: Path = Field(description="Chat rows with calls to make pairs from")
    count: int = Field(default=1000, ge=1, description="Hard pairs to make")
    easy: Path | None = Field(default=None, description="Preference rows to mix in")
    share: float = Field(default=0.3, gt=0, le=1, description="Share of hard pairs, with `easy`")
    exclude: tuple[Path, ...] = Field(default=(), description="Requests of an evaluation, not to be trained on")
    targets: Path | None = Field(default=None, description="targets.json of `moeft hard analyze`")
    reasoned_every: int = Field(
        default=5, ge=0, description="Every so-many-th pair keeps right reasoning in both answers; 0 for none"
    )
    augment: float = Field(default=0.3, ge=0, le=1, description="Share of requests asked in other words")
    seed: int = Field(default=0, ge=0, description="Of every choice")


class CompareRecipe(Recipe):
    """Models beside each other on held-out rows."""

    models: dict[str, Path] = Field(min_length=1, description="Folders by the name in the table; the first is the base")
    rows: dict[str, Path] = Field(
        default_factory=dict, description="Files of rows by the name in the table: nats per assistant token"
    )
    tool_calls: Path | None = Field(
        default=None, description="Requests with the right tool call: share of replies that match it exactly"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest reply in tokens")
    batch_size: int = Field(default=16, ge=1, description="Rows at once")
    dtype: Dtype = Field(default="float32", description="Type to compute in")

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not self.rows and self.tool_calls is None:
            raise ValueError("rows or tool_calls to compare the models on")
        return self
