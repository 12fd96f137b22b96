"""What matters in a model: the Fisher information of its weights, and the subspace in which it was instructed."""

from moeft.importance.fisher_diagonal import FisherReport, fisher
from moeft.importance.instruct_subspace import SubspaceReport, subspace

__all__ = ["FisherReport", "SubspaceReport", "fisher", "subspace"]
