"""What a run reads, and what became of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeft.config import SftRecipe
from moeft.runs.context import RunContext
from moeft.runs.inputs import shared_input_files
from moeft.runs.training_rows import data_files

if TYPE_CHECKING:
    from moeft.training.sft import SFTTrainer


EXAMPLE_CHARACTERS = 400
"""Most characters that are shown of a run of tokens."""


def input_files(recipe: SftRecipe) -> dict[str, Path]:
    """Files and folders that a run reads, by their place in the recipe; a second start compares them."""
    files = data_files(recipe)
    files |= {
        name: path
        for name, path in (("eval", recipe.data.eval), ("chat_template", recipe.data.chat_template))
        if isinstance(path, Path)
    }
    return files | shared_input_files(recipe)


def show_example(run: RunContext[SftRecipe], trainer: SFTTrainer) -> None:
    """The first training row as the model sees it, with what is trained in brackets."""
    from moeft.data.preview import bracketed, runs_of

    run.show("first example, ⟦trained⟧:")
    run.show(bracketed(runs_of(trainer.train_rows.examples[0], trainer.processing_class), EXAMPLE_CHARACTERS))


def record_rows(run: RunContext[SftRecipe], trainer: SFTTrainer) -> None:
    """Count rows, tokens and packs into the figures and write ``rejects.jsonl``."""
    from moeft.data.rejects import summary, write_rejects

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
        run.show(f"{len(rejects)} rows rejected, listed in rejects.jsonl of the run folder:")
        for line in summary(rejects):
            run.show(f"  {line}")
