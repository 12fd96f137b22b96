"""Which experts the tokens went to, counted on the device and read when Trainer logs.

T tokens, k experts per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from moeft.errors import UnsupportedModelError
from moeft.integration import model_family
from moeft.training.processes import total

STATE_KEY = "moeft.routing"


class RoutingMonitor(TrainerCallback):
    """Counts the tokens of every expert while training, of all processes together; padding is not counted.

    Hooks hang on the experts modules during training only and never wait for the device: they add to tensors there.
    Under activation checkpointing the recomputation counts too, which changes no share.

    Args:
        model: A transformers model, with or without a PEFT wrapper; one of an unknown family is not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(experts_modules(model))
        self._load: dict[str, Tensor] = {}  # float64 [E] since the last reading
        self._total: dict[str, Tensor] = {}  # float64 [E] since training began
        self._entropy: dict[str, Tensor] = {}  # float64 [2]: sum over tokens, tokens
        self._counted_T: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._paused = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hang up the hooks, with the counts of the checkpoint that is resumed."""
        self._remove()
        saved = state.stateful_callbacks.get(STATE_KEY, {})
        for name, module in self._modules.items():
            # Not where the experts lie: those that are streamed stay in host memory.
            options: Any = {"dtype": torch.float64, "device": args.device}
            experts = int(module.num_experts)  # type: ignore[arg-type]
            self._load[name] = torch.zeros(experts, **options)
            self._total[name] = torch.tensor(saved.get(name) or [0.0] * experts, **options)
            self._entropy[name] = torch.zeros(2, **options)
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the counts where Trainer saves them, if it is about to save."""
        if control.should_save:
            # Trainer logs after this, so what was counted since the last reading stays where it is.
            before, since = _on_host(self._total.values(), summed=True), _on_host(self._load.values())
            counted = [(a + b).tolist() for a, b in zip(before, since, strict=True)]
            state.stateful_callbacks[STATE_KEY] = dict(zip(self._total, counted, strict=True))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take down the hooks."""
        self._settle()
        self._remove()

    def see_mask(self, attention_mask: Tensor | None) -> None:
        """Take note of the padding of the coming micro-batch: ``[B, S]`` or ``[B, 2, S]``, zero for padding."""
        plain = attention_mask is not None and attention_mask.ndim < 4
        self._counted_T = attention_mask.reshape(-1).double() if plain and attention_mask is not None else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def read(self) -> dict[str, float]:
        """Figures since the last reading; empty for a model without experts. Every process must read.

        Returns:
            ``load_imbalance``: load of the busiest expert over the mean load, mean over layers; 1 is even.
            ``load_entropy``: entropy of the load over its largest value, mean over layers; 1 is even, 0 one expert.
            ``router_entropy``: entropy of a token's chosen weights over its largest value, mean over tokens and layers.
            ``idle_experts``: experts of all layers that have had no token since training began.
        """
        layers = [load for load in _on_host(self._load.values()) if load.sum() > 0]
        if not layers:
            return {}
        entropy, tokens = torch.stack(_on_host(self._entropy.values())).sum(0).tolist()
        figures = {
            "load_imbalance": _mean(float(load.max() / load.mean()) for load in layers),
            "load_entropy": _mean(_normalised_entropy(load) for load in layers),
            "router_entropy": entropy / max(tokens, 1),
        }
        return figures | {"idle_experts": sum(len(experts) for experts in self.idle_experts().values())}

    def idle_experts(self) -> dict[str, list[int]]:
        """Experts that have had no token since training began, by layer; layers that used all are left out."""
        self._settle()
        totals = dict(zip(self._total, _on_host(self._total.values(), summed=True), strict=True))
        idle = {name: (total == 0).nonzero().flatten().tolist() for name, total in totals.items()}
        return {name: experts for name, experts in idle.items() if experts}

    def summary(self) -> dict[str, Any] | None:
        """``experts`` of all layers, and ``idle`` of :meth:`idle_experts`; None for a model without experts."""
        experts = sum(total.numel() for total in self._total.values())
        return {"experts": experts, "idle": self.idle_experts()} if experts else None

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._paused or not module.training:
                return
            index_Tk = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            weight_Tk = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
            self._count(name, index_Tk, weight_Tk.detach())

        return count

    @torch.no_grad()
    def _count(self, name: str, index_Tk: Tensor, weight_Tk: Tensor) -> None:
        if self._load[name].device != index_Tk.device:  # a model whose layers lie on several
            for figures in (self._load, self._total, self._entropy):
                figures[name] = figures[name].to(index_Tk.device)
        load_E = self._load[name]
        counted_T = self._counted_T
        if counted_T is None or counted_T.numel() != index_Tk.shape[0]:
            counted_T = load_E.new_ones(index_Tk.shape[0])
        counted_T = counted_T.to(load_E.device, non_blocking=True)
        load_E.index_add_(0, index_Tk.reshape(-1), counted_T[:, None].expand(index_Tk.shape).reshape(-1))
        if index_Tk.shape[1] > 1:
            share_Tk = weight_Tk.double()
            share_Tk = share_Tk / share_Tk.sum(-1, keepdim=True)
            entropy_T = -torch.xlogy(share_Tk, share_Tk).sum(-1) / math.log(index_Tk.shape[1])
            self._entropy[name] += torch.stack(((entropy_T * counted_T).sum(), counted_T.sum()))

    def _settle(self) -> None:
        """Move what was counted since the last reading into the totals."""
        for name, load in self._load.items():
            self._total[name] += total(load)
            load.zero_()
            self._entropy[name].zero_()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path in the base model and module of the experts of every layer, below the wrappers of PEFT."""
    try:
        family = model_family.of_model(model)
    except UnsupportedModelError:
        return
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        innermost = isinstance(getattr(module, "num_experts", None), int) and not hasattr(module, "base_layer")
        if innermost and family.experts and family.below_layer(name) == family.experts:
            yield name, module


def _on_host(figures: Iterable[Tensor], summed: bool = False) -> list[Tensor]:
    """Figures of all layers in one copy to the host, summed over processes unless they are already."""
    figures = list(figures)
    if not figures:
        return []
    # A copy for each layer would wait for each; layers may lie on several devices.
    together = torch.cat([figure.to(figures[0].device) for figure in figures])
    together = (together if summed else total(together)).cpu()
    return list(together.split([len(figure) for figure in figures]))


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _normalised_entropy(load_E: Tensor) -> float:
    share_E = load_E / load_E.sum()
    return float(-torch.xlogy(share_E, share_E).sum()) / math.log(max(len(load_E), 2))
