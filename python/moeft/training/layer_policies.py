"""The setting ``activation_checkpointing`` applied to the layers of a model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from moeft.integration.checkpointing import POLICIES, apply_checkpointing

CHOICES = (*POLICIES, "auto")


def check_policy_choice(policy: str) -> None:
    """Refuse an unknown value.

    Raises:
        ValueError: If it is none of :data:`CHOICES`.
    """
    if policy not in CHOICES:
        close = difflib.get_close_matches(policy, CHOICES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"activation_checkpointing is {policy!r}, expected one of {', '.join(CHOICES)}{hint}")


class LayerPolicies(TrainerCallback):
    """Sets each layer's policy when training begins: ``Trainer`` has set its own for all layers just before.

    :meth:`apply` sets it earlier, for what takes steps before training.

    Args:
        model: The model to train.
        args: Arguments with ``activation_checkpointing`` and ``activation_offload``.
        plan: The policy of each layer that "auto" stands for; without one it is "full" for all.

    Raises:
        ValueError: If there is a plan and the setting is not "auto".
    """

    def __init__(self, model: Any, args: Any, plan: Sequence[str] | None = None) -> None:
        setting = args.activation_checkpointing
        if plan is not None and setting != "auto":
            raise ValueError(f"a checkpoint plan is for activation_checkpointing 'auto', which is {setting!r}")
        self.model = model
        self.args = args
        self.offload = args.activation_offload
        self.policy: str | Sequence[str] | None = setting if isinstance(setting, str) else None
        if setting == "auto":
            self.policy = "full" if plan is None else plan
        elif self.offload and self.policy is None:
            self.policy = "full" if setting else "none"

    def apply(self) -> None:
        """Set the policies, or where the setting is ``Trainer``'s own what it will set when training begins."""
        if self.policy is not None:
            apply_checkpointing(self.model, self.policy, self.offload)
        elif self.args.gradient_checkpointing:
            _checkpoint_as_trainer(self.model, self.args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the policies."""
        if self.policy is not None:
            self.apply()


def _checkpoint_as_trainer(model: Any, args: Any) -> None:
    # transformers 5.17 has the older names alone, and later ones warn of them.
    given = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    options = dict(given or {})
    by_layer = {"every_n_layers": options.pop("every_n_layers", 1), "offload": options.pop("offload", False)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options or None, **by_layer)
    else:
        model.gradient_checkpointing_enable(options or None, **by_layer)
