"""The tensors of a model as it will lie in memory: names, shapes, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeft.config.sft import Quantization
from moeft.families import Family

NESTED_BLOCK = 256  # first-level scales that share one of the second level
STACKS = ("gate_up_proj", "down_proj")
BUFFERS = ("layer_scalar", "e_score_correction_bias")  # persistent: in a checkpoint and in memory, never trained
KEPT_IN_FLOAT32 = ("e_score_correction_bias",)  # by transformers, whatever type the model is loaded in
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Words in tensor names that most models share -> component.
GUESSES = {
    ".experts": "experts",
    "embed_tokens": "embeddings",
    "lm_head": "embeddings",
    "_attn.": "attention",
    ".mlp.": "mlp",
}


@dataclass(frozen=True)
class Weight:
    """One parameter or persistent buffer.

    Attributes:
        name: Name in memory; a stack of experts is one weight.
        shape: As the model computes with it: ``[F, K]`` of a linear layer, ``[E, F, K]`` of a stack.
        component: One of ``families.COMPONENTS``, "norms" or "towers".
        packed: Whether it is held in NF4.
        fixed_bytes: Bytes of a tensor that keeps its type when the model is cast, such as integers; else None.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    packed: bool = False
    fixed_bytes: int | None = None

    @property
    def elements(self) -> int:
        """Elements, of a parameter or a buffer."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Elements that count as parameters: none in a buffer."""
        return 0 if self.name.rpartition(".")[2] in BUFFERS else self.elements

    def bytes(self, dtype: str, quantization: Quantization | None) -> int:
        """What it occupies in memory, statistics included."""
        if self.fixed_bytes is not None:
            return self.fixed_bytes
        if self.name.endswith(KEPT_IN_FLOAT32):
            return 4 * self.elements
        if self.packed and quantization is not None:
            return nf4_bytes(self.shape, quantization.block_size, quantization.double_quant)
        return self.elements * FLOAT_BYTES[dtype]


def nf4_bytes(shape: Sequence[int], block_size: int, double_quant: bool) -> int:
    """Bytes of codes and statistics of an NF4 weight; every expert of a stack is packed on its own."""
    groups = shape[0] if len(shape) > 2 else 1
    group_len = math.prod(shape) // groups
    codes, blocks = groups * -(-group_len // 2), groups * -(-group_len // block_size)
    if not double_quant:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4


def component_of(family: Family | None, name: str) -> str:
    """Component of a weight. Without a family it is guessed from the name."""
    module = name.rpartition(".")[0] or name
    last = module.rpartition(".")[2]
    if family is not None:
        component = family.component(name)
    else:
        component = next((part for word, part in GUESSES.items() if word in f".{name}"), "other")
    return "norms" if component in ("other", "attention") and "norm" in last else component


def adapted(weights: Sequence[Weight], family: Family, target: str) -> list[Weight]:
    """Weights that LoRA on a target (attention, mlp, experts) reaches."""
    return [weight for weight in weights if _is_linear(weight, family, target)]


def with_packing(weights: Sequence[Weight], family: Family, quantization: Quantization) -> list[Weight]:
    """Mark the weights that loading with this quantisation packs; routers never are."""
    wanted = [part for part in ("experts", "attention", "mlp") if getattr(quantization, part)]
    return [
        replace(weight, packed=any(_is_linear(weight, family, part) for part in wanted) and _not_router(weight))
        for weight in weights
    ]


def _is_linear(weight: Weight, family: Family, target: str) -> bool:
    below = family.below_layer(weight.name)
    if below is None:
        return False
    if target == "experts":
        return below in {f"{family.experts}.{stack}" for stack in STACKS}
    return below.removesuffix(".weight") in family.linears[target] and below.endswith(".weight")


def _not_router(weight: Weight) -> bool:
    return "router" not in weight.name.split(".")
