"""Add LoRA to a model and save it so that plain PEFT loads it on the 16-bit base."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModelForCausalLM

from moeft import __version__, _core, families
from moeft.errors import AdapterError
from moeft.integration import model_family, peft_lora
from moeft.modules.nf4_experts import STACKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("attention", "experts", "mlp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUT = "peft-0.19.1"  # expert factors: A [E * r, in] expert-major, B [out, r * E] expert fastest
FINGERPRINT_KEY = "moeft.base_fingerprint"


class LoraModel(PeftModelForCausalLM):
    """A PeftModel that stamps the layout and the base's fingerprint into the adapters it saves."""

    def save_pretrained(self, save_directory: str, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the adapter in PEFT's layout; see ``PeftModel.save_pretrained``."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        stamp = {"moeft.layout": LAYOUT, "moeft.version": __version__}
        fingerprint = base_fingerprint(self.get_base_model())
        if fingerprint is not None:
            stamp[FINGERPRINT_KEY] = fingerprint
        for file in Path(save_directory).rglob("adapter_model.safetensors"):
            _core.stamp_metadata(str(file), stamp)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights into an adapter; one that is there keeps its dtype. See ``PeftModel.load_adapter``."""
        # PEFT would turn a bfloat16 adapter into float32, and a run that resumes into another one.
        dtypes = {p.dtype for p in self._factors(adapter_name)}
        loaded = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if len(dtypes) == 1:
            self.cast_adapter(dtypes.pop(), adapter_name)
        return loaded

    def cast_adapter(self, dtype: torch.dtype, adapter_name: str = "default") -> None:
        """Give an adapter's weights another dtype; an optimiser must be made after it."""
        for factor in self._factors(adapter_name):
            factor.data = factor.data.to(dtype)

    def _factors(self, adapter_name: str) -> list[torch.nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".lora_" in name and f".{adapter_name}." in f"{name}."]


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("attention",),
    *,
    experts_rank: int | None = None,
    rslora: bool = False,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoraModel:
    """Add a trainable LoRA adapter and freeze everything else.

    Args:
        model: A transformers model of a known family, packed or not.
        rank: Rank r of every factor pair; for experts, of each expert.
        alpha: The delta is scaled by ``alpha / r``; default ``rank``, a scale of 1.
        targets: Any of "attention", "experts", "mlp".
        experts_rank: Another rank for the experts, with the same scale as the others.
        rslora: Scale by ``alpha / sqrt(r)`` instead.
        seed: Seed of the initial A, for a reproducible adapter.
        dtype: Of the adapter's weights, float32 or bfloat16; default as PEFT does, float32 on a 16-bit base. A factor
            in bfloat16 takes half the memory and its gradient too; let its optimiser keep a float32 copy of it.

    Returns:
        A PeftModel; ``save_pretrained`` writes PEFT's ``target_parameters`` layout.

    Raises:
        ValueError: If the rank is not positive or exceeds a targeted weight, or a target or dtype is unknown.
        AdapterError: If a target matches nothing in the model.
    """
    family = model_family.of_model(model)
    _check(rank, experts_rank, targets)
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(DTYPES)}")
    alpha = rank if alpha is None else alpha
    modules = {t: _linears(model, family, t) for t in targets if t != "experts"}
    stacks = _stacks(model, family) if "experts" in targets else []
    for target, found in [*modules.items(), *([("experts", stacks)] if "experts" in targets else [])]:
        if not found:
            raise AdapterError(f"target {target!r} matches nothing in this {family.name} model; leave it out")
    _check_rank_fits(model, rank, [name for names in modules.values() for name in names])
    experts_rank = experts_rank or rank
    other = experts_rank != rank
    same_scale = (experts_rank / rank) ** (0.5 if rslora else 1.0)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=sorted(name for names in modules.values() for name in names),
        target_parameters=sorted(stacks) or None,
        rank_pattern=dict.fromkeys(stacks, experts_rank) if other else {},
        alpha_pattern=dict.fromkeys(stacks, alpha * same_scale) if other else {},
        task_type="CAUSAL_LM",
    )
    peft_lora.install()
    with torch.random.fork_rng(enabled=seed is not None), warnings.catch_warnings():
        if seed is not None:
            torch.manual_seed(seed)
        # PEFT looks for rank_pattern keys among modules only and warns about stacks, although it applies them.
        warnings.filterwarnings("ignore", message=".*rank_pattern.*|.*alpha_pattern.*")
        adapted = LoraModel(model, config)
    if dtype is not None:
        adapted.cast_adapter(DTYPES[str(dtype).removeprefix("torch.")])
    return adapted


def load_adapter(model: PreTrainedModel, path: str | Path, trainable: bool = False) -> LoraModel:
    """Load a saved adapter onto its base, packed or not, using every key.

    Raises:
        AdapterError: If the adapter belongs to another base, or a key of it or of the model is left over.
    """
    from peft import load_peft_weights
    from safetensors import safe_open

    path = Path(path)
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        stamped = (file.metadata() or {}).get(FINGERPRINT_KEY)
    actual = base_fingerprint(model)
    if stamped and actual and stamped != actual:
        raise AdapterError(
            f"{path} was trained on a base with fingerprint {stamped}, this base has {actual}; load the right base"
        )
    peft_lora.install()
    loaded = LoraModel.from_pretrained(model, path, is_trainable=trainable)
    names = {n.replace(".default.", ".") for n, _ in loaded.named_parameters() if ".lora_" in n}
    names ^= set(load_peft_weights(str(path), device="cpu"))
    if names:
        raise AdapterError(f"{len(names)} adapter keys do not match the model, first {sorted(names)[0]}; wrong base?")
    return loaded


def base_fingerprint(model: PreTrainedModel) -> str | None:
    """Fingerprint of the 16-bit checkpoint a model came from; None if it did not come from a local folder."""
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        return getattr(quantization, "base_fingerprint", None)
    folder = Path(getattr(config, "_name_or_path", None) or "")
    return _core.fingerprint(str(folder)) if next(folder.glob("*.safetensors"), None) else None


def _check(rank: int, experts_rank: int | None, targets: Sequence[str]) -> None:
    for name, value in (("rank", rank), ("experts_rank", experts_rank)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, expected a positive number")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ValueError(f"targets is {tuple(targets)}, expected some of {TARGETS}")


def _linears(model: PreTrainedModel, family: families.Family, component: str) -> list[str]:
    paths = family.linears[component]
    return [name for name, _ in model.named_modules() if family.below_layer(name) in paths]


def _stacks(model: PreTrainedModel, family: families.Family) -> list[str]:
    experts = [name for name, _ in model.named_modules() if family.below_layer(name) == family.experts]
    return [f"{name}.{stack}" for name in experts for stack in STACKS]


def _check_rank_fits(model: PreTrainedModel, rank: int, names: Sequence[str]) -> None:
    for name in names:
        module: Any = model.get_submodule(name)
        smallest = min(module.in_features, module.out_features)
        if rank > smallest:
            raise ValueError(f"rank is {rank}, but {name} has only {smallest} rows or columns; choose a smaller rank")
