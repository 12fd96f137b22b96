"""A parameter that is to be trained and gets no gradient is a mistake that would stay unseen for hours."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from moeft.errors import TrainingError

SHOWN = 5


class MissingGradients(TrainerCallback):
    """Checks the first step of a training: every trainable parameter took part in it.

    Experts without a token get gradients of zero, not none, so an adapter that the batch never reached passes.

    Args:
        shard_gradients: Whether the launcher keeps gradients elsewhere, as ZeRO does; nothing is checked then.
    """

    def __init__(self, shard_gradients: bool = False) -> None:
        self.shard_gradients = shard_gradients
        self._checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check again in every training, resumed ones included."""
        self._checked = self.shard_gradients

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for gradients that are missing.

        Raises:
            TrainingError: Naming the parameters.
        """
        if self._checked:
            return
        self._checked = True
        trained = [(name, p) for name, p in kwargs["model"].named_parameters() if p.requires_grad]
        missing = [name for name, parameter in trained if parameter.grad is None]
        if missing:
            listed = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
            raise TrainingError(
                f"{len(missing)} of {len(trained)} trainable parameters got no gradient in the first step: {listed}; "
                "the forward pass does not use them. Freeze them, or leave their target out of lora.targets"
            )
