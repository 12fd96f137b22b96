"""One model as GGUF files of several types, proven if asked for: a stage of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from moeft.config.stages import ExportRecipe
from moeft.errors import ProofError, RecipeError
from moeft.provenance import RunFolder


def check(recipe: ExportRecipe) -> None:
    """Refuse what the export would refuse.

    Raises:
        RecipeError: If a type is unknown or given twice, or options exclude each other.
    """
    from moeft.gguf import FileType

    known = get_args(FileType)
    if wrong := [kind for kind in recipe.types if kind not in known]:
        raise RecipeError(f"types has {wrong[0]!r}, expected some of {', '.join(known)}")
    if len(set(recipe.types)) < len(recipe.types):
        raise RecipeError(f"types is {', '.join(recipe.types)}, expected each once")
    if recipe.verify and recipe.adapter is not None:
        raise RecipeError("verify compares with a checkpoint, which adapter does not write; merge it in a stage before")


def run(recipe: ExportRecipe, out: Path, show: Callable[[str], None] = print) -> RunFolder:
    """Write every file that an earlier start has not.

    Args:
        recipe: Model and types.
        out: Run folder: ``TYPE.gguf`` each, ``TYPE.Modelfile``, ``proof.txt``, ``metrics.json``.
        show: Where to print.

    Raises:
        MoeftError: If the model cannot be used; see the classes.
        ProofError: If ``verify`` finds a difference.
    """
    from moeft import gguf
    from moeft.gguf.ollama import modelfile

    check(recipe)
    places = {"model": recipe.model, "adapter": recipe.adapter, "imatrix": recipe.imatrix, "text": recipe.verify_text}
    inputs = {name: path for name, path in places.items() if path is not None}
    with RunFolder.create(out, "export", recipe.resolved(), inputs) as folder:
        options: dict[str, Any] = {
            "tensor_types": recipe.tensor_types,
            "adapter": recipe.adapter,
            "imatrix": recipe.imatrix,
        }
        notes = []
        for kind in recipe.types:
            file = folder.path / f"{kind}.gguf"
            if not file.exists():
                show(str(gguf.export(recipe.model, file, type=kind, progress=True, **options)))  # type: ignore[arg-type]
            if recipe.ollama:
                recipe_text = modelfile(recipe.model, file, recipe.context)
                file.with_suffix(".Modelfile").write_text(recipe_text, "utf-8")
            planned = gguf.plan(recipe.model, type=kind, **options)  # type: ignore[arg-type]
            notes.append(f"{file.name}: {file.stat().st_size:,} bytes, {planned.bits_per_weight:.2f} bits per weight")
        if recipe.verify:
            notes += _prove(recipe, folder, show)
        folder.write_json("metrics.json", {"notes": notes})
    return folder


def _prove(recipe: ExportRecipe, folder: RunFolder, show: Callable[[str], None]) -> list[str]:
    from moeft.runs.gguf_proof import prove

    files = [folder.path / f"{kind}.gguf" for kind in recipe.types]
    proof = prove(recipe.model, files, text=recipe.verify_text, imatrix=recipe.imatrix, show=show)
    (folder.path / "proof.txt").write_text(f"{proof}\n", "utf-8")
    show(str(proof))
    if problems := proof.problems():
        raise ProofError("\n".join(problems))
    return ["llama.cpp computes what transformers does; every block equals ggml's (proof.txt)"]
