"""Held-out loss, tool calls and conversations of a run, before and after training, with samples for the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.runs.context import RunContext
from moeft.runs.conversations import Conversations
from moeft.runs.replies import HeldOutCalls

if TYPE_CHECKING:
    from moeft.training.trainer import MoeTrainer


class HeldOut:
    """Measures a run's model on what it does not train on.

    Args:
        run: The run; its figures gain ``heldout`` and ``samples``.

    Raises:
        DataError: If a row of held-out tool calls cannot be used, or a file of conversations cannot be read.
    """

    def __init__(self, run: RunContext[Any]) -> None:
        self._run = run
        path = run.recipe.evaluation.tool_calls
        self._calls = None if path is None else HeldOutCalls(path, run.recipe.evaluation)
        self._conversations = Conversations(run.recipe, run.show)

    def is_measured(self, when: str) -> bool:
        """Whether an earlier start of the run has these figures."""
        return when in self._run.metrics.get("heldout", {})

    def measure(self, trainer: MoeTrainer, when: str) -> None:
        """Loss and scores of the trainer's model, ``before`` or ``after`` training."""
        figures: dict[str, Any] = {}
        if trainer.eval_dataset is not None:
            measured = trainer.evaluate()
            names = ("loss", *trainer.logged_figures)
            figures |= {name: measured[f"eval_{name}"] for name in names if f"eval_{name}" in measured}
        if self._calls is not None:
            scores, replies = self._calls.score(trainer.model, trainer.processing_class)
            figures |= scores
            self._keep(self._calls, replies, when)
        if figures:
            self._run.show(f"held out {when} training: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        figures |= self._conversations.measure(trainer.model, trainer.processing_class)
        self._run.metrics.setdefault("heldout", {})[when] = figures

    def sample_checkpoints(self, base: Path, merged: Path, tokenizer: Any) -> None:
        """Replace the samples by those of base and merged checkpoint, from plain transformers, and show them."""
        if self._calls is None:
            return
        for when, checkpoint in (("before", base), ("after", merged)):
            self._keep(self._calls, self._calls.sample_replies(checkpoint, self._run.recipe.dtype, tokenizer), when)
        for sample in self._run.metrics["samples"]:
            lines = [sample["prompt"], f"before: {sample['before']}", f"after:  {sample['after']}"]
            self._run.show("\n  ".join(lines))

    def _keep(self, calls: HeldOutCalls, replies: list[str], when: str) -> None:
        samples = self._run.metrics.setdefault("samples", calls.samples())
        for sample, reply in zip(samples, replies, strict=True):
            sample[when] = reply
