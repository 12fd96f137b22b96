"""The merged checkpoint of a run, and the proofs that it is the base with the adapter."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moeft.config.sft import Merge
from moeft.runs.context import RunContext
from moeft.runs.held_out import HeldOut

if TYPE_CHECKING:
    from moeft.training.trainer import MoeTrainer

PROOF_ROWS = 8


def is_merged(run: RunContext[Any], wanted: Merge) -> bool:
    """Whether an earlier start of this run merged: the folder appears only when it is complete."""
    return (wanted.output / "config.json").is_file() and any(
        event["name"] == "merge" for event in run.folder.events("stage")
    )


def check_mergeable(run: RunContext[Any], trainer: MoeTrainer, wanted: Merge) -> None:
    """Refuse before training what the merge would refuse after it, such as a layout that only transformers can read.

    Raises:
        AdapterError, CheckpointError: If the adapter as it is now does not fit the 16-bit base.
    """
    from moeft.merging import plan

    with TemporaryDirectory(dir=run.folder.path, prefix="mergeable-") as folder:
        trainer.model.save_pretrained(folder, selected_adapters=run.recipe.trained_adapters())
        plan(_recipe(run, wanted, Path(folder)))


def merge_adapters(run: RunContext[Any], wanted: Merge) -> None:
    """Merge the run's adapter, and those it is stacked on, into the 16-bit base."""
    from moeft.merging import merge

    report = merge(_recipe(run, wanted, run.folder.path / "adapter"), wanted.output)
    run.show(str(report))


def prove_merge(run: RunContext[Any], trainer: MoeTrainer, held_out: HeldOut, wanted: Merge) -> None:
    """Proofs against plain PEFT, and samples of base and merged checkpoint by plain transformers.

    Raises:
        ProofError: If a proof does not hold.
    """
    from moeft.merging.verify import prove, require

    base, adapter = _base(run, wanted), run.folder.path / "adapter"
    proofs = prove(base, trainer.model, adapter, wanted.output, trainer.sample_sequences(PROOF_ROWS))
    run.metrics["proofs"] = [proof.to_json() for proof in proofs]
    for proof in proofs:
        run.show(str(proof))
    held_out.sample_checkpoints(base, wanted.output, trainer.processing_class)
    require(proofs)


def _recipe(run: RunContext[Any], wanted: Merge, adapter: Path) -> dict[str, Any]:
    return {
        "merge_method": "lora",
        "base_model": _base(run, wanted),
        "models": [{"adapter": path} for path in run.recipe.adapters(adapter)],
        "out_dtype": wanted.out_dtype,
    }


def _base(run: RunContext[Any], wanted: Merge) -> Path:
    """The 16-bit checkpoint that the adapter is merged into."""
    return wanted.base_model or run.recipe.model
