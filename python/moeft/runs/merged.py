"""The full checkpoint of a run, and the proofs that it is the base with the adapter."""

from __future__ import annotations

import shutil
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
        AdapterError, CheckpointError: If the adapter, or a weight to train, as it is now does not fit the 16-bit base.
    """
    from moeft.merging import plan
    from moeft.runs.trained import check_places

    if trainer.trains_base:
        check_places(trainer, _base(run, wanted))
    place = run.folder.path if trainer.is_world_process_zero() else None  # the others do not write to the run
    with TemporaryDirectory(dir=place, prefix="mergeable-") as folder:
        if adapters := run.recipe.trained_adapters():
            trainer.model.save_pretrained(folder, selected_adapters=adapters)
        plan(_recipe(run, wanted, Path(folder)))


def merge(run: RunContext[Any], trainer: MoeTrainer, wanted: Merge) -> None:
    """Write the 16-bit base with the run's adapters merged and its trained weights in place.

    With trained weights the folder has another name until they are in it, so that it never appears without them.
    """
    from moeft.merging import manifest
    from moeft.merging import merge as merge_models
    from moeft.runs.trained import put_in_place

    unfinished = wanted.output.with_name(f"{wanted.output.name}.untrained")
    out = unfinished if trainer.trains_base else wanted.output
    if trainer.trains_base and (out / manifest.FILE).is_file():
        shutil.rmtree(out)  # of a start that was killed here
    run.show(str(merge_models(_recipe(run, wanted, run.folder.path / "adapter"), out)))
    if trainer.trains_base:
        put_in_place(trainer, run.folder.path / "trained", out)
        out.rename(wanted.output)


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
    base = _base(run, wanted)
    if run.recipe.lora is None:
        return {"merge_method": "passthrough", "models": [{"model": base}], "out_dtype": wanted.out_dtype}
    return {
        "merge_method": "lora",
        "base_model": base,
        "models": [{"adapter": path} for path in run.recipe.adapters(adapter)],
        "out_dtype": wanted.out_dtype,
    }


def _base(run: RunContext[Any], wanted: Merge) -> Path:
    """The 16-bit checkpoint that the adapter is merged into."""
    return wanted.base_model or run.recipe.model
