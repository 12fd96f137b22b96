"""``moeft subspace``: one call, under a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeft.progress_bar import step_bar

if TYPE_CHECKING:
    from moeft.importance import SubspaceReport


def run(
    instruct: Path,
    base: Path,
    out: Path,
    rank: int,
    targets: Sequence[str] | None,
    power_iterations: int,
    seed: int,
    device: str,
) -> SubspaceReport:
    """Decompose the differences; arguments and errors as for :func:`moeft.importance.subspace`."""
    from moeft.importance import subspace

    with step_bar("subspace", True) as progress:
        return subspace(
            instruct,
            base,
            out,
            rank=rank,
            targets=targets,
            power_iterations=power_iterations,
            seed=seed,
            device=device,
            progress=progress,
        )
