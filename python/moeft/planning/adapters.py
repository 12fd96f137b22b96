"""LoRA parameters, their gradients and the optimiser's state."""

from __future__ import annotations

from collections.abc import Container, Sequence

from moeft.config.optimizer import HOST_STATE_BITS, STOCHASTIC
from moeft.config.sft import Lora
from moeft.families import Family
from moeft.planning.weights import Weight, adapted

HOST_OPTIMIZERS = tuple(HOST_STATE_BITS)
ADAM_BYTES = 8.0  # two float32 moments
ADAM_8BIT_BYTES = 2 + 2 * 4 / 256  # two moments of one byte, and a float32 scale per 256 values of each
OPTIMIZER_BYTES = {"sgd": 0.0}
PROTECTED = ("attention", "experts", "mlp")  # what files of `moeft subspace` hold


def adapter_parameters(weights: Sequence[Weight], family: Family, lora: Lora) -> dict[str, int]:
    """Elements of the factors by target; a target that this model lacks is left out.

    A weight ``[F, K]`` gets ``rank * (F + K)``, a stack of E experts E times that.
    """
    found: dict[str, int] = {}
    for target in lora.targets:
        count = sum(_factors(weight, rank_of(lora, target, weight.name)) for weight in adapted(weights, family, target))
        if count:
            found[target] = count
    return found


def subspace_bytes(weights: Sequence[Weight], family: Family, trained: Container[str], rank: int) -> int:
    """Bytes of the bases U and V, in float32, that ``protection`` holds beside every matrix that trains.

    Adapters on a weight and the weight itself take the same. ``trained`` names targets of adapters and roles in full.

    A matrix ``[F, K]`` has at most ``min(F, K)`` directions, a stack that many for each expert.
    """
    found = [weight for target in PROTECTED if target in trained for weight in adapted(weights, family, target)]
    return 4 * sum(_factors(weight, min(rank, *weight.shape[-2:])) for weight in found)


def rank_of(lora: Lora, target: str, name: str = "") -> int:
    """Rank of the adapter of one weight, or of a target."""
    own = getattr(lora, "ranks", {})
    last = name.removesuffix(".weight").rpartition(".")[2]
    default = (lora.experts_rank or lora.rank) if target == "experts" else lora.rank
    return own.get(f"{target}.{last}", own.get(target, default))


def _factors(weight: Weight, rank: int) -> int:
    *stack, rows, columns = weight.shape
    return rank * (stack[0] if stack else 1) * (rows + columns)


def optimizer_bytes(name: str) -> tuple[float, str]:
    """Bytes of state per trained parameter on the device, and where the number comes from."""
    if name in HOST_OPTIMIZERS:
        return 0.0, "state in host memory"
    if "8bit" in name:
        return ADAM_8BIT_BYTES, "two 8-bit moments, a scale per 256 values"
    if name in OPTIMIZER_BYTES:
        return OPTIMIZER_BYTES[name], f"{name} keeps no state"
    if name.startswith(("adamw_torch", "adamw_apex", "adamw_hf", STOCHASTIC)):
        return ADAM_BYTES, "two float32 moments"
    return ADAM_BYTES, f"{name} is not known here, counted as Adam with two float32 moments"


def host_optimizer_bytes(name: str, trained: int, element_bytes: int) -> int:
    """Bytes of state in host memory when training runs on the CPU.

    Args:
        name: Optimiser.
        trained: Parameters that train.
        element_bytes: Bytes of one of them; those of two bytes have a float32 copy in moeft's own optimisers.
    """
    if name not in HOST_OPTIMIZERS:
        return round(trained * optimizer_bytes(name)[0])
    moments = ADAM_8BIT_BYTES if name.endswith("8bit") else ADAM_BYTES
    return round(trained * (moments + (4 if element_bytes < 4 else 0)))
