"""How large the inputs of each weight's columns are: sums of their squares over the tokens of some sequences.

Shapes: T tokens of one sequence, k experts per token, R rows of one expert, E experts, M matrices, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeft.errors import DataError
from moeft.importance.expert_gradients import ExpertGradients
from moeft.modules.nf4_experts import STACKS
from moeft.progress_bar import Callback


@dataclass
class SquaredInputs:
    """Sums of squared inputs, by the name of a linear layer or a stack of experts in the model.

    Attributes:
        sums: ``[M, K]`` float64 on the CPU; a linear layer is one matrix, a stack one for each expert.
        counts: ``[M]`` int64: tokens that were added up.
        sequences: Number of sequences.
        longest: Tokens of the longest one.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    longest: int = 0

    def add(self, name: str, matrix: int, matrices: int, x_RK: Tensor) -> None:
        """Add rows that one matrix of a weight is multiplied with."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(matrices, x_RK.shape[1], dtype=torch.float64)
            self.counts[name] = torch.zeros(matrices, dtype=torch.int64)
        self.sums[name][matrix] += x_RK.double().square().sum(0).cpu()
        self.counts[name][matrix] += len(x_RK)


@torch.no_grad()
def squared_inputs(
    model: Any,
    linears: Sequence[str],
    experts: Sequence[str],
    rows: Iterable[Sequence[int]],
    progress: Callback | None = None,
) -> SquaredInputs:
    """Run a model over sequences and add up the squares of what goes into its weights.

    Args:
        model: A causal language model, packed or not.
        linears: Module paths of linear layers.
        experts: Module paths of experts modules, whose two stacks are measured.
        rows: Token ids of each sequence.
        progress: Called with (done, 0, what) after each sequence.

    Raises:
        DataError: If there are no sequences, or an input is not finite.
        UnsupportedModelError: If an experts module is of a kind that moeft does not know.
    """
    found = SquaredInputs()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_linear_hook(found, name), with_kwargs=True)
        for name in linears
    ]
    for name in experts:
        module = model.get_submodule(name)
        hook = _experts_hook(found, name, ExpertGradients(name, module), module.num_experts)
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    training = model.training
    model.eval()
    try:
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
            found.sequences, found.longest = found.sequences + 1, max(found.longest, len(row))
            if progress is not None:
                progress(found.sequences, 0, "sequences")
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    if not found.sequences:
        raise DataError("there are no sequences to measure; give at least one")
    broken = [name for name, sums in found.sums.items() if not sums.isfinite().all()]
    if broken:
        raise DataError(f"what goes into {broken[0]} is not finite for some sequence; look at the rows and the model")
    return found


def _linear_hook(found: SquaredInputs, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())))
        found.add(name, 0, 1, x.reshape(-1, x.shape[-1]))

    return hook


def _experts_hook(found: SquaredInputs, name: str, block: ExpertGradients, count: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        x_TH, index_Tk = (*args, *kwargs.values())[:2]
        for expert, inputs in block.inputs(x_TH, index_Tk):
            for stack in STACKS:
                found.add(f"{name}.{stack}", expert, count, inputs[stack])

    return hook
