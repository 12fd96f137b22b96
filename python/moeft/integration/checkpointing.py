"""What each decoder layer keeps for backward: everything, the outputs of its blocks, or its input.

============================  ===================================================  =================================
policy                        kept of a layer, besides its input                   done again in backward
============================  ===================================================  =================================
``none``                      all that its operations save                         nothing
``keep_norm_inputs``          the output of each block: attention, dense layers,   norms and sums, then each block
                              experts, router; these are what its norms read       on its own
``full``                      nothing                                              the whole layer at once
============================  ===================================================  =================================

``keep_norm_inputs`` holds the insides of one block at a time in backward, where ``full`` holds those of a whole layer.
A router that is a block of its own, as in Gemma 4, chooses experts once; one inside a block sees the same input twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from moeft.errors import UnsupportedModelError
from moeft.integration.offloading import from_host, offload_to_host, to_host

POLICIES = ("none", "keep_norm_inputs", "full")


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model's text decoder that transformers can checkpoint, from first to last.

    Raises:
        UnsupportedModelError: If there are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [module for module in base.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(f"{type(base).__name__} has no layers that transformers can checkpoint; use 'none'")
    return layers


def apply_checkpointing(model: Any, policy: str | Sequence[str], offload: bool = False) -> None:
    """Set what each decoder layer keeps for backward, while the model is in training mode.

    Replaces what ``gradient_checkpointing_enable`` or an earlier call set. Loss and gradients do not change.

    Args:
        model: A transformers model, with or without adapters.
        policy: One of :data:`POLICIES` for all layers, or one for each.
        offload: Hold in host memory what layers keep, if they run on another device.

    Raises:
        ValueError: If a policy is unknown, or there is not one for each layer.
        UnsupportedModelError: If the model has no layers that can be checkpointed.
    """
    layers = decoder_layers(model)
    policies = [policy] * len(layers) if isinstance(policy, str) else list(policy)
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"checkpointing policy is {unknown[0]!r}, expected one of {', '.join(POLICIES)}")
    if len(policies) != len(layers):
        raise ValueError(f"{len(policies)} checkpointing policies for {len(layers)} layers, expected one for each")
    for layer, name in zip(layers, policies, strict=True):
        # These two attributes are how transformers itself switches a layer.
        layer.gradient_checkpointing = name != "none" or offload  # type: ignore[assignment]
        layer._gradient_checkpointing_func = _Runner(layer, name, offload)  # type: ignore[assignment]


class _Runner:
    """Runs a layer's forward under its policy; transformers calls it in place of the forward."""

    def __init__(self, layer: nn.Module, policy: str, offload: bool) -> None:
        self.layer = layer
        self.policy = policy
        self.offload = offload

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with offload_to_host(self.layer) if self.offload else nullcontext():
            if self.policy == "none":
                return function(*args)
            if self.policy == "keep_norm_inputs":
                function = _keeping_outputs(function, self.layer, self.offload)
            return checkpoint(function, *args, use_reentrant=False)


def _keeping_outputs(function: Callable[..., Any], layer: nn.Module, offload: bool) -> Callable[..., Any]:
    """A forward of the layer that computes the outputs of its blocks when it is called first, and recalls them later.

    Blocks are the children with a matrix: norms have none.
    """
    blocks = [child for child in layer.children() if any(p.ndim > 1 for p in child.parameters())]
    outputs: dict[nn.Module, Any] = {}

    def run(*args: Any) -> Any:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_replaced_forward(block, _Block(block, outputs, offload)))
            return function(*args)

    return run


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Swap the forward of this instance for a while; hooks around it, such as those of sharding, stay in force."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Block:
    """The forward of a block inside a layer that is checkpointed."""

    def __init__(self, block: nn.Module, outputs: dict[nn.Module, Any], offload: bool) -> None:
        self.block = block
        self.forward = block.forward
        self.outputs = outputs
        self.offload = offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Tensors go by position: checkpoint holds keyword arguments alive, and a block's input is the output of a norm,
        # which is not to be kept.
        by_name = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        others = {name: v for name, v in kwargs.items() if name not in by_name}
        if self.block in self.outputs:
            # The layer runs again because backward wants what this checkpoint saved the first time: its inputs.
            known = tree_map_only(_Kept, _Kept.tensor, self.outputs[self.block])
            return checkpoint(lambda *_: known, *args, *by_name.values(), use_reentrant=False)
        compute = partial(self.compute, len(args), tuple(by_name), others)
        result = checkpoint(compute, *args, *by_name.values(), use_reentrant=False)
        self.outputs[self.block] = tree_map_only(Tensor, lambda tensor: _Kept(tensor, self.offload), result)
        return result

    def compute(self, num_positional: int, names: Sequence[str], others: dict[str, Any], *values: Any) -> Any:
        named = dict(zip(names, values[num_positional:], strict=True))
        return self.forward(*values[:num_positional], **named, **others)


class _Kept:
    """A block's output until its layer runs again."""

    def __init__(self, tensor: Tensor, offload: bool) -> None:
        self.requires_grad = tensor.requires_grad
        self.version = tensor._version
        self.stored = to_host(tensor.detach()) if offload else tensor.detach()

    def tensor(self) -> Tensor:
        # A detached tensor counts changes in place together with the one it came from.
        if isinstance(self.stored, Tensor) and self.stored._version != self.version:
            raise RuntimeError(
                "a layer changed the output of a block in place, so the output cannot be kept; "
                "use activation_checkpointing: full"
            )
        return from_host(self.stored).detach().requires_grad_(self.requires_grad)
