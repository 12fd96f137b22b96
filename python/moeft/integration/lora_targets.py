"""Which weights of a model get LoRA factors, and of which rank and scale."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeft import families
from moeft.config.ranges import Numbers, expand
from moeft.errors import AdapterError
from moeft.modules import PackedModule
from moeft.modules.nf4_experts import STACKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("attention", "experts", "mlp")


@dataclass(frozen=True)
class Weight:
    """One weight that gets factors."""

    name: str  # of the linear layer or the stack of experts, in the model
    target: str  # one of TARGETS
    below: str  # name below its decoder layer
    layer: int
    smallest: int  # of its input and output sizes

    @property
    def keys(self) -> tuple[str, str]:
        """Keys under which a rank or an alpha may be given, the more precise one first."""
        return f"{self.target}.{self.below.rpartition('.')[2]}", self.target


@dataclass(frozen=True)
class Selection:
    """Every weight that gets factors, with what differs from the adapter's own rank and alpha.

    Attributes:
        weights: The weights, sorted by name.
        rank_pattern: Name below the decoder layer -> rank, as PEFT writes it.
        alpha_pattern: The same for alpha.
    """

    weights: tuple[Weight, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @property
    def linears(self) -> list[str]:
        """Names of the linear layers."""
        return [weight.name for weight in self.weights if weight.target != "experts"]

    @property
    def stacks(self) -> list[str]:
        """Names of the stacks of experts."""
        return [weight.name for weight in self.weights if weight.target == "experts"]


def select(
    model: PreTrainedModel,
    family: families.Family,
    targets: Sequence[str],
    layers: Numbers | None,
    rank: int,
    alpha: float,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rslora: bool,
) -> Selection:
    """Find the weights; see :func:`moeft.add_lora` for the arguments.

    Raises:
        ValueError: If a target, a key, a layer, a rank or an alpha cannot be used.
        AdapterError: If a target matches nothing.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"targets is {tuple(targets)}, expected some of {TARGETS}{_nearest(unknown[0], TARGETS)}")
    if not targets:
        raise ValueError(f"targets is empty, expected some of {TARGETS}")
    for what, given in (("rank", {"": rank, **ranks}), ("alpha", {"": alpha, **alphas})):
        for key, value in given.items():
            if not (value > 0 and math.isfinite(value)) or (what == "rank" and value != int(value)):
                expected = "a positive whole number" if what == "rank" else "a positive number"
                raise ValueError(f"{f'{what}s[{key!r}]' if key else what} is {value}, expected {expected}")
    everywhere = [weight for target in TARGETS for weight in weights(model, family, target)]
    chosen = _in_targets(everywhere, targets, family.name)
    if layers is not None:
        chosen = _in_layers(chosen, expand(layers, "layers"), targets)
    _check_keys({**ranks, **alphas}, chosen)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for weight in chosen:
        own_rank = next((ranks[key] for key in weight.keys if key in ranks), rank)
        same_scale = alpha * (own_rank / rank) ** (0.5 if rslora else 1.0)
        own_alpha = next((alphas[key] for key in weight.keys if key in alphas), same_scale)
        if own_rank > weight.smallest:
            raise ValueError(
                f"rank is {own_rank}, but {weight.name} has only {weight.smallest} rows or columns; "
                "choose a smaller rank"
            )
        if own_rank != rank:
            rank_pattern[weight.below] = own_rank
        if own_alpha != alpha:
            alpha_pattern[weight.below] = own_alpha
    return Selection(tuple(sorted(chosen, key=lambda weight: weight.name)), rank_pattern, alpha_pattern)


def weights(model: PreTrainedModel, family: families.Family, target: str) -> list[Weight]:
    """Every weight of a target, in the order of the modules."""
    found = []
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "")
        below = family.below_layer(name)
        if below is None or hasattr(module, "base_layer"):  # A wrapper of PEFT: what it wraps comes by itself.
            continue
        layer = int(name.removesuffix(f".{below}").rpartition(".")[2])
        if target == "experts" and below == family.experts:
            for stack in STACKS:
                found.append(
                    Weight(f"{name}.{stack}", target, f"{below}.{stack}", layer, min(_shape(module, stack)[1:]))
                )
        elif target != "experts" and below in family.linears[target]:
            linear: Any = module
            found.append(Weight(name, target, below, layer, min(linear.in_features, linear.out_features)))
    return found


def _shape(experts: Any, stack: str) -> Sequence[int]:
    return experts.packed_shapes[stack] if isinstance(experts, PackedModule) else getattr(experts, stack).shape


def _in_targets(weights: Sequence[Weight], targets: Sequence[str], family: str) -> list[Weight]:
    existing = [target for target in TARGETS if any(weight.target == target for weight in weights)]
    for target in targets:
        if target not in existing:
            raise AdapterError(
                f"target {target!r} matches nothing in this {family} model, leave it out; it has {', '.join(existing)}"
            )
    return [weight for weight in weights if weight.target in targets]


def _in_layers(weights: Sequence[Weight], layers: tuple[int, ...], targets: Sequence[str]) -> list[Weight]:
    last = max(weight.layer for weight in weights)
    if layers[-1] > last:
        raise ValueError(f"layers names {layers[-1]}, but the last layer with a target is {last}")
    for target in targets:
        having = {weight.layer for weight in weights if weight.target == target}
        if not having & set(layers):
            raise AdapterError(
                f"target {target!r} matches nothing in layers {list(layers)}; it is in layers {sorted(having)}"
            )
    return [weight for weight in weights if weight.layer in layers]


def _check_keys(keys: Mapping[str, float], weights: Sequence[Weight]) -> None:
    known = list(dict.fromkeys(key for weight in weights for key in reversed(weight.keys)))
    for key in keys:
        if key not in known:
            raise ValueError(
                f"ranks or alphas name {key!r}, expected a target or a weight of one: {', '.join(known)}"
                f"{_nearest(key, known)}"
            )


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
