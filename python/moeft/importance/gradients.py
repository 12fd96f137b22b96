"""Squares of the gradients of chosen weights, sequence by sequence, while all weights stay frozen, packed ones too.

Hooks see what goes into a layer and the gradient of what comes out. The gradient of a weight is the product of the two:
formed for one matrix at a time, squared, added up and dropped. So there is never a gradient of a whole layer, let alone
of the model, and of packed experts one at a time is restored.

Shapes: T tokens of one sequence, k experts per token, E experts, F outputs, K inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from moeft.errors import UnsupportedModelError
from moeft.importance.expert_gradients import ExpertGradients


class SquaredGradients:
    """Adds squared gradients to accumulators; a context manager that takes its hooks down.

    Args:
        model: The model, all of whose parameters are frozen inside, and which is in evaluation mode there: dropout
            would measure another model, and checkpointed layers would run twice.
        accumulators: Name of a linear layer or a stack of experts in the model -> float32 tensor of its shape.
        first_layer: The lowest decoder layer that holds one of them: backward stops below it.
    """

    def __init__(self, model: nn.Module, accumulators: Mapping[str, Tensor], first_layer: nn.Module) -> None:
        self.model = model
        self._calls: dict[str, int] = defaultdict(int)
        self._handles: list[Any] = []
        self._was_training = False
        self._trained = [p for p in model.parameters() if p.requires_grad]
        stacks: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, total in accumulators.items():
            module, _, last = name.rpartition(".")
            if total.ndim == 3:
                stacks[module][last] = total
            else:
                self._watch(name, self._linear_hook(name, total))
        for name, totals in stacks.items():
            self._watch(name, self._experts_hook(name, totals))
        self._handles.append(first_layer.register_forward_pre_hook(_start_graph, with_kwargs=True))

    def next_sequence(self) -> None:
        """Begin another sequence."""
        self._calls.clear()

    def __enter__(self) -> Self:
        self._was_training = self.model.training
        self.model.eval()
        for parameter in self._trained:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self.model.train(self._was_training)
        for handle in self._handles:
            handle.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _watch(self, name: str, hook: Callable[..., None]) -> None:
        self._handles.append(self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))

    def _once(self, name: str) -> None:
        # The square of a sum is not the sum of the squares.
        self._calls[name] += 1
        if self._calls[name] > 1:
            raise UnsupportedModelError(
                f"{name} runs more than once for one sequence, so its gradient is a sum over the calls; leave its "
                "target out"
            )

    def _linear_hook(self, name: str, total_FK: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._once(name)
            x = (args[0] if args else kwargs["input"]).detach()

            def add(grad: Tensor) -> None:
                g_TF, x_TK = (t.reshape(-1, t.shape[-1]).to(_compute_dtype(t)) for t in (grad, x))
                square(g_TF.T @ x_TK, total_FK)

            output.register_hook(add)

        return hook

    def _experts_hook(self, name: str, totals: Mapping[str, Tensor]) -> Callable[..., None]:
        gradients = ExpertGradients(name, self.model.get_submodule(name))

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._once(name)
            x_TH, index_Tk, weight_Tk = (t.detach() for t in (*args, *kwargs.values())[:3])

            def add(grad_TH: Tensor) -> None:
                for expert, grads in gradients.each(x_TH, index_Tk, weight_Tk, grad_TH):
                    for stack, total in totals.items():
                        square(grads[stack], total[expert])

            output.register_hook(add)

        return hook


def square(grad: Tensor, total: Tensor) -> None:
    """Add the square of a gradient to its accumulator."""
    grad = grad.to(total.dtype)
    total.addcmul_(grad, grad)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _start_graph(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Let the graph begin with the hidden states that enter a layer."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
