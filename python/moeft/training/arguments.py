"""Arguments of the trainer: those of transformers, with our defaults and additions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from moeft.config.optimizer import HOST_STATE_BITS, OWN_OPTIMIZERS, optimizer_problems
from moeft.training.layer_policies import check_policy_choice
from moeft.training.optim import host_options


@dataclass
class MoeConfig(TrainingArguments):
    """``TrainingArguments`` with the defaults that adapters on quantised experts want.

    ``optim`` takes three more names: ``adamw_moeft_host`` and ``adamw_moeft_8bit``, which are
    :class:`moeft.training.optim.HostAdamW` with 32- or 8-bit state, and ``adamw_moeft_stochastic``,
    :class:`moeft.training.optim.StochasticAdamW`. ``optim_args`` may set ``master_weights`` and ``min_8bit_size`` of
    the first two.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of the B factors by that of A; None for the same rate."}
    )
    min_lr_ratio: float | None = field(
        default=None, metadata={"help": "With a cosine schedule: last learning rate by the first, from 0 to 1."}
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Stop after this many steps in a row with a non-finite loss or gradient."}
    )
    check_frozen_base: bool = field(
        default=True,
        metadata={"help": "Hash what is frozen before and after training; a few seconds per GB and core."},
    )
    log_routing: bool = field(default=True, metadata={"help": "Count the tokens of every expert while training."})
    fused_norms: bool | None = field(
        default=None,
        metadata={
            "help": "Run norms in one pass: rows on a GPU, float32 rows on the CPU. They sum in another order than "
            "transformers' do. None for a GPU alone."
        },
    )
    document_attention: bool = field(
        default=True,
        metadata={
            "help": "Let attention compute inside documents without a mask: on a GPU, and on a CPU for packed rows. "
            "Models and types that it cannot serve keep masks."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Trainer's filter, which waits for the device twice a micro-batch; ours needs no wait."},
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rows are ours and hold no others."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in host memory; only a GPU gains."}
    )
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Loggers besides the run folder."})
    activation_checkpointing: bool | str | None = field(
        default=None,
        metadata={
            "help": '"none", "keep_norm_inputs", "full", or "auto", which is a plan or else "full"; true is as in '
            "transformers, with activation_checkpointing_kwargs."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Older name of activation_checkpointing, the only one in transformers 5.17."},
    )
    activation_offload: bool = field(
        default=False, metadata={"help": "Hold in host memory what layers keep for backward; only a GPU gains."}
    )

    def __post_init__(self) -> None:
        if problems := optimizer_problems(vars(self)):
            raise ValueError("; ".join(problems))
        given = dict(vars(self))
        if given["accelerator_config"] is None and self.dataloader_pin_memory:
            # A copy from pinned memory that blocks waits for all that the device was given before it.
            self.accelerator_config: Any = {"non_blocking": True}
        is_ours = given["optim"] in OWN_OPTIMIZERS
        if given["optim"] in HOST_STATE_BITS:
            host_options(given["optim_args"])
        elif is_ours and given["optim_args"]:
            raise ValueError(f"optim_args is {given['optim_args']!r}, expected none: {given['optim']} takes no options")
        if isinstance(policy := self.activation_checkpointing, str):
            check_policy_choice(policy)
            if policy == "none":
                self.activation_checkpointing = False
        # TrainingArguments takes names of its own enum only.
        self.optim: Any = "adamw_torch" if is_ours else given["optim"]
        super().__post_init__()
        if is_ours:
            self.optim = given["optim"]
        if self.min_lr_ratio is not None:
            self.lr_scheduler_type = SchedulerType.COSINE_WITH_MIN_LR
            options = vars(self)["lr_scheduler_kwargs"] or {}
            self.lr_scheduler_kwargs = {**options, "min_lr_rate": self.min_lr_ratio}
        # transformers 5.17 reads the older name alone.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = bool(self.activation_checkpointing)

    @property
    def fuses_norms(self) -> bool:
        """Whether norms run in one pass: as asked, else on a GPU alone."""
        return bool(self.device.type == "cuda" if self.fused_norms is None else self.fused_norms)
