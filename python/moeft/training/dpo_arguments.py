"""Arguments of the preference trainer: the loss, the reference, when to stop, and how pairs become batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from moeft.config.preference import PreferenceLoss
from moeft.config.sources import PairLayout, PairTooLong
from moeft.training.arguments import MoeConfig
from moeft.training.preference.stop_rules import StopRules


@dataclass
class DPOConfig(MoeConfig):
    """``TrainingArguments``, the loss, and how pairs become batches."""

    loss: str = field(default="sigmoid", metadata={"help": "sigmoid, sigmoid_norm, ipo, hinge, robust, orpo or simpo."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the preference against the reference."})
    log_probs: str | None = field(
        default=None, metadata={"help": '"sum" or "mean" over the tokens of an answer; None: as the loss is defined.'}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs whose preference is taken to be the wrong way round."}
    )
    sft_weight: float | None = field(
        default=None, metadata={"help": "Weight of the chosen answer's loss per token; None: 1 with orpo, else 0."}
    )
    simpo_margin: float = field(default=0.5, metadata={"help": "Of simpo: how much larger the chosen reward is to be."})
    layout: str = field(
        default="packed", metadata={"help": '"packed", "shared_prefix" or "padded": how two answers share a batch.'}
    )
    reasoning: str = field(
        default="keep", metadata={"help": '"keep" thoughts, "strip" them, or "mask" them: shown and not compared.'}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Name of a template in moeft.data.templates, or a path; None: the tokenizer's."}
    )
    max_length: int | None = field(default=4096, metadata={"help": "Most tokens of prompt and answer; None: any."})
    on_too_long: str = field(
        default="reject", metadata={"help": '"reject" longer pairs, "truncate" answers, or "truncate_left" prompts.'}
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder of log-probabilities under the reference, for all runs; None for none."}
    )
    reference_verify: int = field(default=4, metadata={"help": "Cached pairs to compute again at the start."})
    margin_collapse: float | None = field(
        default=None, metadata={"help": "Stop when the reward margin falls below this share of its largest."}
    )
    max_chosen_drop: float | None = field(
        default=None, metadata={"help": "Stop when chosen answers lose so many nats per token against the reference."}
    )
    stop_patience: int = field(default=3, metadata={"help": "Logs in a row that have to break such a rule."})

    def __post_init__(self) -> None:
        rules, loss = self.stop_rules, self.preference_loss
        if rules.max_chosen_drop is not None and not loss.needs_reference:
            raise ValueError(f"max_chosen_drop compares with a reference, which {loss.name} has not; leave it out")
        if self.layout not in get_args(PairLayout):
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(get_args(PairLayout))}")
        if self.on_too_long not in get_args(PairTooLong):
            raise ValueError(f"on_too_long is {self.on_too_long!r}, expected one of {', '.join(get_args(PairTooLong))}")
        if self.reference_verify < 0:
            raise ValueError(f"reference_verify is {self.reference_verify}, expected at least 0")
        super().__post_init__()

    @property
    def preference_loss(self) -> PreferenceLoss:
        """The loss with its numbers."""
        names = ("beta", "log_probs", "label_smoothing", "sft_weight", "simpo_margin")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return PreferenceLoss(self.loss, **options)  # type: ignore[arg-type]

    @property
    def stop_rules(self) -> StopRules:
        """When to stop early."""
        return StopRules(self.margin_collapse, self.max_chosen_drop, self.stop_patience)
