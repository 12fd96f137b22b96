"""Takes out of matrices what lies inside a subspace.

Shapes: E experts (absent for a single matrix), F rows, K columns, k directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Projector:
    """The part ``L L^T M R R^T`` of matrices ``M [E, F, K]``, of all experts at once.

    Args:
        left: ``L [E, F, k]``, orthonormal or zero columns; None leaves the rows alone.
        right: ``R [E, K, k]``, likewise for the columns.
    """

    def __init__(self, left: Tensor | None, right: Tensor | None) -> None:
        self.left = left
        self.right = right

    @property
    def nbytes(self) -> int:
        """Bytes of the bases."""
        return sum(basis.nbytes for basis in (self.left, self.right) if basis is not None)

    def coordinates(self, matrix: Tensor) -> Tensor:
        """``L^T M R``, float32; all that has to be remembered of a matrix to know how it changed inside."""
        found = matrix.float()
        if self.left is not None:
            found = self.left.mT @ found
        return found if self.right is None else found @ self.right

    def subtract_(self, matrix: Tensor, coordinates: Tensor, share: float) -> None:
        """``M -= share * L C R^T`` in place."""
        inside = coordinates if self.left is None else self.left @ coordinates
        matrix.sub_(inside if self.right is None else inside @ self.right.mT, alpha=share)


@contextmanager
def whole_float32() -> Iterator[None]:
    """Multiply in full float32 on a GPU meanwhile, whatever shorter format training may use."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
