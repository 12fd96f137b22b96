"""Which tensors of a GGUF file hold the linear layers and stacks of experts of a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moeft.families import Family
from moeft.gguf.architectures import architecture_of

# The router stays in f32, so nobody asks how large its inputs are.
ROUTER = "ffn_gate_inp"


@dataclass
class WeightNames:
    """Modules of a model and the tensors of a file.

    Attributes:
        linears: Module path of a linear layer -> name of its tensor.
        experts: Module path of experts -> parameter of a stack -> names of its tensors.
    """

    linears: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)

    def tensors(self) -> Mapping[str, tuple[str, ...]]:
        """Module path of a linear layer, or of a stack of experts with its parameter -> names of tensors."""
        stacks = {f"{path}.{stack}": names for path, found in self.experts.items() for stack, names in found.items()}
        return {path: (name,) for path, name in self.linears.items()} | stacks


def weight_names(family: Family, modules: Iterable[str]) -> WeightNames:
    """Find the modules that become tensors of decoder layers.

    Args:
        family: The model's.
        modules: Paths of all modules of the model.

    Raises:
        UnsupportedModelError: If moeft does not know the family's tensors in llama.cpp.
    """
    architecture, found = architecture_of(family), WeightNames()
    for path in modules:
        below = family.below_layer(path)
        if below is None:
            continue
        layer = path.removesuffix(f".{below}").rpartition(".")[2]
        name = architecture.layer.get(f"{below}.weight")
        if name is not None and not name.startswith(ROUTER) and "norm" not in name:
            found.linears[path] = f"blk.{layer}.{name}"
        elif below == family.experts:
            experts = {part: f"blk.{layer}.{tensor}" for part, tensor in architecture.experts.items()}
            gate_up = [experts[part] for part in ("gate_up", "gate", "up") if part in experts]
            found.experts[path] = {"gate_up_proj": tuple(gate_up), "down_proj": (experts["down"],)}
    return found
