"""The recipe of ``moeft dpo``: preference tuning of LoRA adapters, on top of supervised ones or of none."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moeft.config.preference import LossName, PreferenceLoss, Reduction
from moeft.config.recipe import Section, one_or_many
from moeft.config.sft import Lora, TuningData, TuningRecipe
from moeft.config.sources import MAX_REJECT_SHARE, ChatTemplateName, PairLayout, PairTooLong, Reasoning


class PairData(TuningData):
    """Preference pairs to train on."""

    train: Annotated[
        tuple[Path, ...],
        BeforeValidator(one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="File of preference rows, or a list of files"),
    ]
    eval: Path | None = Field(default=None, description="File of held-out pairs; null measures none")
    reasoning: Reasoning = Field(
        default="keep", description="Compare the assistant's thoughts, leave them out, or show them without comparing"
    )
    chat_template: ChatTemplateName | Path | None = Field(default=None, description="As in `moeft sft`")
    max_length: int = Field(default=4096, ge=2, description="Most tokens of prompt and answer")
    on_too_long: PairTooLong = Field(
        default="reject", description="Leave a longer pair out, cut the ends of its answers, or the front of its prompt"
    )
    layout: PairLayout = Field(
        default="packed", description="Both answers in one row, the prompt once for both, or a row for each"
    )
    max_reject_share: float = Field(
        default=MAX_REJECT_SHARE, ge=0, le=1, description="Largest share of a file's rows that may be unreadable"
    )


class Preference(Section):
    """The loss, and when to stop early."""

    loss: LossName = Field(default="sigmoid", description="Loss over pairs; orpo and simpo need no reference")
    beta: float = Field(default=0.1, gt=0, description="Strength of the preference against the reference")
    log_probs: Reduction | None = Field(
        default=None, description="Sum over an answer's tokens or their mean; null as the loss is defined"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs whose preference is taken to be the wrong way round"
    )
    sft_weight: float | None = Field(
        default=None, ge=0, description="Weight of the chosen answer's loss per token; null is 1 with orpo, else 0"
    )
    simpo_margin: float = Field(default=0.5, ge=0, description="Of simpo: how much larger the chosen reward is to be")
    margin_collapse: float | None = Field(
        default=None, ge=0, lt=1, description="Stop when the reward margin falls below this share of its largest"
    )
    max_chosen_drop: float | None = Field(
        default=None, gt=0, description="Stop when chosen answers lose so many nats per token against the reference"
    )
    stop_patience: int = Field(default=3, ge=1, description="Logs in a row that have to break such a rule")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        loss = PreferenceLoss(
            self.loss, self.beta, self.log_probs, self.label_smoothing, self.sft_weight, self.simpo_margin
        )
        if self.max_chosen_drop is not None and not loss.needs_reference:
            raise ValueError(f"no max_chosen_drop with {self.loss}, which has no reference to compare with")
        return self


class ReferenceSettings(Section):
    """Log-probabilities under the reference: the policy as it is before training."""

    cache: Path | None = Field(
        default=None, description="Folder that runs may share; null takes `reference/` of the run folder"
    )
    verify: int = Field(default=4, ge=0, description="Cached pairs to compute again at the start")


class DpoRecipe(TuningRecipe):
    """Everything that ``moeft dpo`` needs to know."""

    lora: Lora = Field(default_factory=Lora, description="The adapter to train")
    data: PairData = Field(description="Preference pairs to train on")
    preference: Preference = Field(default_factory=Preference, description="The loss, and when to stop early")
    reference: ReferenceSettings = Field(
        default_factory=ReferenceSettings, description="Log-probabilities of the policy before training"
    )
    train: Literal["new", "both", "start"] = Field(
        default="new",
        description="Which adapters train: a new one on those of `lora.stack_on`, it and the last of these, or that "
        "last one alone, without a new one",
    )

    @model_validator(mode="after")
    def _has_what_trains(self) -> Self:
        if self.train != "new" and not self.lora.stack_on:
            raise ValueError(f"an adapter in lora.stack_on, which train: {self.train} trains on")
        return self

    @property
    def name_of_start(self) -> str:
        """Name, in the model, of the adapter that the policy starts from."""
        return f"below_{len(self.lora.stack_on) - 1}"

    def trained_adapters(self) -> list[str]:
        """Names of the adapters that train, in the model."""
        return ["default", self.name_of_start] if self.train == "both" else ["default"]

    def adapters(self, folder: Path) -> list[Path]:
        """Folders of all adapters that the tuned model is made of, lowest first."""
        below = list(self.lora.stack_on)
        if self.train != "new":
            below = below[:-1] + ([folder / self.name_of_start] if self.train == "both" else [])
        return [*below, folder]
