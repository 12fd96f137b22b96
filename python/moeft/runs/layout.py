"""Experts fused or taken apart, and the proof that what was not trained is the base's: a stage of pipelines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moeft.checkpoint import fuse_experts, unfuse_experts
from moeft.checkpoint.hashes import tensor_hashes
from moeft.config.stages import LayoutRecipe
from moeft.errors import ProofError
from moeft.provenance.files import write_json


def report_file(out: Path) -> Path:
    """Written last: a checkpoint with it is complete and, where that was asked for, proven.

    It lies beside the folder, since files in a checkpoint are copied along by what is made of it.
    """
    return out.with_name(f"{out.name}.proof.json")


def is_done(out: Path) -> bool:
    """Whether an earlier start came to its end."""
    return report_file(out).is_file()


def run(recipe: LayoutRecipe, out: Path, show: Callable[[str], None] = print) -> None:
    """Convert, unless an earlier start did, and compare with the base.

    Args:
        recipe: Direction, model and base.
        out: Folder of the new checkpoint; ``OUT.proof.json`` gets the hashes of what differs.
        show: Where to print.

    Raises:
        ProofError: If a tensor differs that was not to change, or names differ.
    """
    found: list[str] = []
    if not (out / "config.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        convert = fuse_experts if recipe.direction == "fuse" else unfuse_experts
        show(str(convert(recipe.model, out, progress=True)))
    report: dict[str, object] = {"direction": recipe.direction, "notes": found}
    if recipe.base is not None:
        ours, theirs = tensor_hashes(out), tensor_hashes(recipe.base)
        changed = _changed(ours, theirs, recipe.changed)
        equal = f"{len(theirs) - len(changed)} of {len(theirs)} tensors"
        found.append(f"{equal} have the SHA-256 of the base's, the {len(changed)} others are among the trained ones")
        report["changed"] = {name: {"sha256": ours[name], "base": theirs[name]} for name in changed}
    for line in found:
        show(line)
    write_json(report_file(out), report)


def _changed(ours: Mapping[str, str], theirs: Mapping[str, str], allowed: Sequence[str]) -> list[str]:
    """Names of the tensors that differ.

    Raises:
        ProofError: If one of them is not allowed to, or the names are not the same.
    """
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise ProofError(f"only one of both checkpoints has {_few(odd)}; is this the base, and in the same layout?")
    changed = sorted(name for name in ours if ours[name] != theirs[name])
    if wrong := [name for name in changed if not any(re.search(pattern, name) for pattern in allowed)]:
        raise ProofError(
            f"{len(wrong)} tensors differ from the base's and are not among `changed`: {_few(wrong)}; was more trained "
            "than the recipe says, or is this another base?"
        )
    return changed


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
