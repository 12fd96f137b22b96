"""The quantisation config that users pass to ``from_pretrained`` and find in ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moeft.kernels.nf4 import BLOCK_SIZES

QUANT_METHOD = "moeft_nf4"


class NF4Config(QuantizationConfigMixin):
    """Which components of a model become 4-bit NormalFloat, and how.

    Routers, norms, embeddings and the head always keep their 16 bits.

    Args:
        experts: Quantise the stacks of experts.
        attention: Quantise the projections of attention.
        mlp: Quantise dense feed-forward layers beside or instead of experts.
        double_quant: Quantise the statistics too: 0.516 instead of 0.5625 bytes per parameter.
        block_size: Elements that share one absmax, a power of two from 32 to 4096.
        skip: Names of modules to leave alone; a module is skipped if part of its dotted path equals one of them.
        base_fingerprint: Fingerprint of the checkpoint that was quantised; filled in by moeft.

    Raises:
        ValueError: If the block size is not one of those above, or an argument is unknown.
    """

    def __init__(
        self,
        experts: bool = True,
        attention: bool = False,
        mlp: bool = False,
        double_quant: bool = False,
        block_size: int = 64,
        skip: tuple[str, ...] | list[str] = ("router",),
        base_fingerprint: str | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            known = "experts, attention, mlp, double_quant, block_size, skip"
            raise ValueError(f"NF4Config has no argument {', '.join(sorted(unknown))}, expected some of {known}")
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {block_size}, expected one of {BLOCK_SIZES}")
        self.quant_method = QUANT_METHOD
        self.experts = experts
        self.attention = attention
        self.mlp = mlp
        self.double_quant = double_quant
        self.block_size = block_size
        self.skip = list(skip)
        self.base_fingerprint = base_fingerprint

    def wants(self, component: str) -> bool:
        """Whether a component is to be quantised."""
        return component in ("experts", "attention", "mlp") and bool(getattr(self, component))

    def skips(self, name: str) -> bool:
        """Whether a module is left alone whatever its component."""
        return not set(self.skip).isdisjoint(name.split("."))
