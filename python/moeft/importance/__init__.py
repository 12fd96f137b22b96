"""What matters in a model: Fisher information of weights, the instruct subspace, the size of what goes into weights."""

from moeft.importance.fisher_diagonal import FisherReport, fisher
from moeft.importance.instruct_subspace import SubspaceReport, subspace
from moeft.importance.squared_inputs import SquaredInputs, squared_inputs

__all__ = ["FisherReport", "SquaredInputs", "SubspaceReport", "fisher", "squared_inputs", "subspace"]
