"""The recipe of ``moeft hard iterate``: rounds of analysis, hard pairs and preference tuning."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from moeft.config.dpo import Preference
from moeft.config.gate import Gate as TrainingGate
from moeft.config.recipe import Recipe, Section
from moeft.config.sft import Dtype, Lora, Merge
from moeft.config.sources import CallProtocol, ChatTemplateName, PairLayout


class HardData(Section):
    """What pairs are made from, and what they must not hold."""

    tools: Path = Field(description="Schemas of the tools, OpenAI's JSON")
    protocol: CallProtocol = Field(default="bracket", description="How calls are written")
    seeds: Path = Field(description="Chat rows with calls to make pairs from, and to find failures on")
    heldout: Path = Field(description="Chat rows with the right calls that measure each round and are never trained on")
    easy: Path | None = Field(default=None, description="Preference rows to mix in")
    share: float = Field(default=0.3, gt=0, le=1, description="Share of hard pairs, with `easy`")
    pairs: int = Field(default=500, ge=1, description="Hard pairs of a round")
    probes: int = Field(default=200, ge=1, description="Seeds that are asked in a round to find failures")
    chat_template: ChatTemplateName | Path | None = Field(default=None, description="As in `moeft sft`")
    max_length: int = Field(default=4096, ge=2, description="Most tokens of prompt and answer")
    layout: PairLayout = Field(default="packed", description="As in `moeft dpo`")
    max_new_tokens: int = Field(default=128, ge=1, description="Longest reply")
    batch_size: int = Field(default=16, ge=1, description="Requests answered at once")


class Gate(Section):
    """What must not be lost: the loss on other rows."""

    rows: Path = Field(description="Chat rows of other tasks")
    max_rise: float = Field(default=0.05, ge=0, description="Largest rise of their loss over round 0, nats per token")


class IterateRecipe(Recipe):
    """Everything that ``moeft hard iterate`` needs to know."""

    model: Path = Field(description="Folder of the checkpoint")
    output: Path = Field(description="Run folder; each round has a folder in it")
    dtype: Dtype = Field(default="bfloat16", description="Type of the weights that are not in 4 bit")
    sft: Path | None = Field(
        default=None, description="Recipe of `moeft sft` to run first; rounds start from its adapter"
    )
    lora: Lora = Field(
        default_factory=Lora, description="The adapter to train; `stack_on` names those that rounds start from"
    )
    data: HardData = Field(description="Tools, seeds and held-out requests")
    preference: Preference = Field(default_factory=Preference, description="As in `moeft dpo`")
    training: dict[str, Any] = Field(default_factory=dict, description="Arguments of the trainer, for each round")
    rounds: int = Field(default=3, ge=1, description="Most rounds")
    min_gain: float = Field(
        default=0.0, ge=0, le=1, description="Gain in held-out accuracy that must be passed to go on"
    )
    gate: Gate | None = Field(default=None, description="Rows whose loss must not rise; null checks nothing")
    training_gate: TrainingGate | None = Field(
        default=None, description="`gate` of `moeft dpo` in every round, whose base is the policy that the round tunes"
    )
    merge: Merge | None = Field(
        default=None, description="Full checkpoint of the best round; null leaves its adapters on their own"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.sft is not None and self.lora.stack_on:
            raise ValueError("sft or lora.stack_on, and not both: rounds start from one of them")
        if self.merge is not None and self.merge.verify:
            raise ValueError("merge.verify: false, since it proves the merge of one adapter alone")
        return self
