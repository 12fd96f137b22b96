"""What transformers says about some tokens, computed as near to llama.cpp as float32 allows.

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

GREEDY_TOKENS = 3


@dataclass(frozen=True)
class Reference:
    """Sequences and what the model says about them.

    Attributes:
        sequences: Token ids.
        log_probs: Of every next token ``[T, V]``, float32, one per sequence.
        greedy: What the model writes after the first half of each sequence.
    """

    sequences: list[list[int]]
    log_probs: list[Tensor]
    greedy: list[list[int]]

    @property
    def spread(self) -> float:
        """Standard deviation of the log-probabilities, the measure of a difference."""
        return float(torch.stack([of_sequence.std() for of_sequence in self.log_probs]).mean())

    def perplexity(self) -> float:
        """Of the sequences, their first tokens left out."""
        losses = [
            -of_sequence[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            for ids, of_sequence in zip(self.sequences, self.log_probs, strict=True)
        ]
        return float(torch.cat(losses).double().mean().exp())


def reference(model: Any, sequences: Sequence[Sequence[int]]) -> Reference:
    """Run a model over sequences.

    Args:
        model: A causal language model in float32.
        sequences: Token ids, two or more each.
    """
    with ggml_gelu(model), torch.inference_mode():
        log_probs = [_log_probs(model, ids) for ids in sequences]
        greedy = [_greedy(model, ids[: len(ids) // 2]) for ids in sequences]
    return Reference([list(ids) for ids in sequences], log_probs, greedy)


@contextmanager
def ggml_gelu(model: nn.Module) -> Iterator[None]:
    """Let a model compute GELU as ggml does on a CPU, from a table of 16-bit values.

    Without it the differences of Gemma's are fifty times larger and hide what is looked for.
    """
    modules: list[Any] = [module for module in model.modules() if _is_tanh_gelu(getattr(module, "act_fn", None))]
    activations = [module.act_fn for module in modules]
    for module in modules:
        module.act_fn = _TableGelu()
    try:
        yield
    finally:
        for module, activation in zip(modules, activations, strict=True):
            module.act_fn = activation


class _TableGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x.half().float(), approximate="tanh").half().float()


def _is_tanh_gelu(activation: Any) -> bool:
    if not callable(activation):
        return False
    x = torch.linspace(-3, 3, 7)
    y = activation(x)
    return torch.allclose(y, functional.gelu(x, approximate="tanh"), atol=1e-6)


def _log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    logits_TV = model(torch.tensor([list(ids)])).logits[0].float()
    return torch.log_softmax(logits_TV, -1)


def _greedy(model: Any, ids: Sequence[int]) -> list[int]:
    found = list(ids)
    for _ in range(GREEDY_TOKENS):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]
