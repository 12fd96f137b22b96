"""LoRA parameters, their gradients and the optimiser's state."""

from __future__ import annotations

from collections.abc import Sequence

from moeft.config.sft import Lora
from moeft.families import Family
from moeft.planning.weights import Weight, adapted

PARAMETER_BYTES = 4  # PEFT makes float32 adapters on 16-bit bases
HOST_OPTIMIZERS = ("adamw_moeft_host", "adamw_moeft_8bit")
ADAM_BYTES = 8.0  # two float32 moments
ADAM_8BIT_BYTES = 2 + 2 * 4 / 256  # two moments of one byte, and a float32 scale per 256 values of each
OPTIMIZER_BYTES = {"sgd": 0.0}


def adapter_parameters(weights: Sequence[Weight], family: Family, lora: Lora) -> dict[str, int]:
    """Elements of the factors by target; a target that this model lacks is left out.

    A weight ``[F, K]`` gets ``rank * (F + K)``, a stack of E experts E times that.
    """
    found: dict[str, int] = {}
    for target in lora.targets:
        rank = (lora.experts_rank or lora.rank) if target == "experts" else lora.rank
        shapes = [weight.shape for weight in adapted(weights, family, target)]
        count = sum(rank * (shape[0] if len(shape) > 2 else 1) * (shape[-2] + shape[-1]) for shape in shapes)
        if count:
            found[target] = count
    return found


def optimizer_bytes(name: str) -> tuple[float, str]:
    """Bytes of state per trained parameter on the device, and where the number comes from."""
    if name in HOST_OPTIMIZERS:
        return 0.0, "state in host memory"
    if "8bit" in name:
        return ADAM_8BIT_BYTES, "two 8-bit moments, a scale per 256 values"
    if name in OPTIMIZER_BYTES:
        return OPTIMIZER_BYTES[name], f"{name} keeps no state"
    if name.startswith(("adamw_torch", "adamw_apex", "adamw_hf")):
        return ADAM_BYTES, "two float32 moments"
    return ADAM_BYTES, f"{name} is not known here, counted as Adam with two float32 moments"
