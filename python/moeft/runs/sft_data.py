"""What a run reads, and what became of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeft.config import SftRecipe
from moeft.runs.context import RunContext
from moeft.runs.gate import gate_files
from moeft.runs.training_rows import data_files

if TYPE_CHECKING:
    from moeft.training.sft import SFTTrainer


def input_files(recipe: SftRecipe) -> dict[str, Path]:
    """Files and folders that a run reads, by their place in the recipe; a second start compares them."""
    files = {"model": recipe.model, **data_files(recipe)}
    files |= {
        name: path
        for name, path in (
            ("eval", recipe.data.eval),
            ("tool_calls", recipe.evaluation.tool_calls),
            ("chat_template", recipe.data.chat_template),
        )
        if isinstance(path, Path)
    }
    if recipe.protection is not None:
        wanted = {"subspace": recipe.protection.subspace, "layer_importance": recipe.protection.layer_importance}
        files |= {f"protection.{name}": path for name, path in wanted.items() if path is not None}
    if recipe.gate is not None:
        files |= gate_files(recipe.gate)
    return files | {f"stack_on[{i}]": path for i, path in enumerate(recipe.lora.stack_on)}


def record_rows(run: RunContext, trainer: SFTTrainer) -> None:
    """Count rows, tokens and packs into the figures and write ``rejects.jsonl``."""
    from moeft.data.rejects import write_rejects

    counts: dict[str, float] = {
        "train_rows": len(trainer.train_rows.examples),
        "train_tokens": trainer.train_rows.num_tokens,
        "trained_tokens": trainer.train_rows.num_trained_tokens,
        "rejected_rows": len(trainer.train_rows.rejects),
        "shortened_rows": trainer.train_rows.num_shortened,
    }
    rejects = list(trainer.train_rows.rejects)
    if trainer.eval_rows is not None:
        counts |= {"heldout_rows": len(trainer.eval_rows.examples)}
        rejects += trainer.eval_rows.rejects
    write_rejects(rejects, run.folder.path / "rejects.jsonl")
    run.metrics["data"] = counts
    run.show(f"training rows: {trainer.train_rows}")
    if trainer.train_packs is not None:
        packs = trainer.train_packs
        counts |= {"packs": len(packs.packs), "packing_efficiency": packs.efficiency}
        run.show(f"packing: {packs}")
    if rejects:
        run.show(f"{len(rejects)} rows rejected, reasons in {run.folder.path / 'rejects.jsonl'}")
