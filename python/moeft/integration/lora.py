"""Add LoRA to a model and save it so that plain PEFT loads it on the 16-bit base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM

from moeft import __version__, _core
from moeft.adapters.detect import detect
from moeft.adapters.folder import FINGERPRINT_KEY, AdapterFolder
from moeft.adapters.layout import HEADER_KEY, Layout
from moeft.config.ranges import Numbers
from moeft.errors import AdapterError
from moeft.integration import model_family, peft_lora, stacking
from moeft.integration.expert_subset import Experts, keep_experts
from moeft.integration.lora_targets import select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DROPOUT_ON_EXPERTS = (
    "an expert's delta is one product B A, as in PEFT, so its input cannot be dropped for it alone; "
    "use weight decay, a lower rank, or leave experts out"
)


class LoraModel(PeftModelForCausalLM):
    """A PeftModel that stamps the layout and the base's fingerprint into the adapters it saves."""

    def save_pretrained(self, save_directory: str, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the adapter in PEFT's layout; see ``PeftModel.save_pretrained``."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        stamp = {HEADER_KEY: Layout.PEFT.header, "moeft.version": __version__}
        fingerprint = base_fingerprint(self.get_base_model())
        if fingerprint is not None:
            stamp[FINGERPRINT_KEY] = fingerprint
        for file in Path(save_directory).rglob("adapter_model.safetensors"):
            _core.stamp_metadata(str(file), stamp)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights into an adapter; one that is there keeps its dtype. See ``PeftModel.load_adapter``."""
        # PEFT would turn a bfloat16 adapter into float32, and a run that resumes into another one.
        dtypes = {p.dtype for p in _factors(self, adapter_name)}
        loaded = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if len(dtypes) == 1:
            cast_adapter(self, dtypes.pop(), adapter_name)
        return loaded


def cast_adapter(model: PeftModel, dtype: torch.dtype, adapter_name: str = "default") -> None:
    """Give an adapter's weights another dtype; an optimiser must be made after it."""
    for factor in _factors(model, adapter_name):
        factor.data = factor.data.to(dtype)


def _factors(model: PeftModel, adapter_name: str) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name and f".{adapter_name}." in f"{name}."]


def add_lora(
    model: PreTrainedModel | PeftModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("attention",),
    *,
    experts_rank: int | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    layers: Numbers | None = None,
    experts: Experts = "all",
    name: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> PeftModel:
    """Add a trainable LoRA adapter and freeze everything else.

    On a model that has adapters already, the new one is stacked on them: those that are active stay so, frozen, and
    the new one trains.

    Args:
        model: A transformers model of a known family, packed or not, or what this or ``load_adapter`` returned.
        rank: Rank r of every factor pair; for experts, of each expert.
        alpha: The delta is scaled by ``alpha / r``; default ``rank``, a scale of 1.
        targets: Any of "attention", "experts", "mlp".
        experts_rank: Short for ``ranks={"experts": ...}``.
        ranks: Other ranks, by target ("experts") or by one weight of it ("experts.down_proj", "attention.q_proj").
        alphas: Other alphas by the same keys; where there is none, the scale is that of the whole adapter.
        rslora: Scale by ``alpha / sqrt(r)`` instead.
        dropout: Share of the inputs of A that is dropped while training; not with experts.
        layers: Decoder layers that get factors, as numbers and ranges such as ``[0, "4-7"]``; default all.
        experts: "all", the experts to change in every layer, or a mapping from layer to experts such as
            ``routing_statistics(...).routed()``. The others' factors are zero and stay so; this saves no memory.
        name: Name of the adapter, for a second one.
        seed: Seed of the initial A, for a reproducible adapter.
        dtype: Of the adapter's weights, float32 or bfloat16; default as PEFT does, float32 on a 16-bit base. A factor
            in bfloat16 takes half the memory and its gradient too; let its optimiser keep a float32 copy of it.

    Returns:
        A PeftModel; ``save_pretrained`` writes PEFT's ``target_parameters`` layout.

    Raises:
        ValueError: If a rank, an alpha, a target, a layer, an expert, dropout, name or dtype cannot be used.
        AdapterError: If a target matches nothing in the model, or the adapter cannot be stacked on those it has.
    """
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(DTYPES)}")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if dropout and "experts" in targets:
        raise ValueError(f"dropout is {dropout}, expected 0 with experts: {DROPOUT_ON_EXPERTS}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected a share from 0 to 1")
    ranks = dict(ranks or {})
    if experts_rank is not None and ranks.setdefault("experts", experts_rank) != experts_rank:
        raise ValueError(f"experts_rank is {experts_rank} and ranks['experts'] is {ranks['experts']}; give one of them")
    if experts != "all" and "experts" not in targets:
        raise ValueError(f"experts is {experts!r}, but targets is {tuple(targets)}; add 'experts' to it")
    alpha = rank if alpha is None else alpha
    family = model_family.of_model(base)
    chosen = select(base, family, targets, layers, rank, alpha, ranks, alphas or {}, rslora)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=chosen.linears,
        target_parameters=chosen.stacks or None,
        rank_pattern=chosen.rank_pattern,
        alpha_pattern=chosen.alpha_pattern,
        task_type="CAUSAL_LM",
    )
    peft_lora.install()
    with torch.random.fork_rng(enabled=seed is not None), warnings.catch_warnings():
        if seed is not None:
            torch.manual_seed(seed)
        # PEFT looks for rank_pattern keys among modules only and warns about stacks, although it applies them.
        warnings.filterwarnings("ignore", message=".*rank_pattern.*|.*alpha_pattern.*")
        if isinstance(model, PeftModel):
            stacking.add(model, config, name)
        else:
            stacking.check_name(name)
            model = LoraModel(model, config, adapter_name=name)
    keep_experts(model, family, name, experts)
    if dtype is not None:
        cast_adapter(model, DTYPES[str(dtype).removeprefix("torch.")], name)
    return model


def load_adapter(
    model: PreTrainedModel | PeftModel, path: str | Path, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Load a saved adapter onto its base, packed or not, using every key.

    On a model that has adapters already it is stacked on them: those that are active stay so, frozen.

    Raises:
        ValueError: If the name is taken or cannot be used.
        AdapterError: If the adapter belongs to another base, cannot be stacked on those the model has, or a key of it
            or of the model is left over.
    """
    from peft import load_peft_weights

    path = Path(path)
    saved = AdapterFolder(path)
    found = detect(saved)
    if found.layout is not Layout.PEFT:
        found_out = f"is in layout {found.layout}" if found.layout else f"cannot be told from others: {found.reason}"
        raise AdapterError(f"{path} {found_out}; write it in PEFT's with `moeft adapter convert --to peft`")
    stamped = saved.metadata.get(FINGERPRINT_KEY)
    actual = base_fingerprint(model.get_base_model() if isinstance(model, PeftModel) else model)
    if stamped and actual and stamped != actual:
        raise AdapterError(
            f"{path} was trained on a base with fingerprint {stamped}, this base has {actual}; load the right base"
        )
    peft_lora.install()
    if isinstance(model, PeftModel):
        stacking.load(model, path, trainable, name)
    else:
        stacking.check_name(name)
        config = LoraConfig.from_pretrained(str(path))
        config.inference_mode = not trainable
        model = LoraModel(model, config, adapter_name=name)  # from_pretrained would make PEFT's own class
        model.load_adapter(str(path), name, is_trainable=trainable)
    parts = (parameter.split(f".{name}.") for parameter, _ in model.named_parameters() if ".lora_" in parameter)
    names = {".".join(part) for part in parts if len(part) == 2}
    names ^= set(load_peft_weights(str(path), device="cpu"))
    if names:
        raise AdapterError(f"{len(names)} adapter keys do not match the model, first {sorted(names)[0]}; wrong base?")
    return model


def base_fingerprint(model: PreTrainedModel) -> str | None:
    """Fingerprint of the 16-bit checkpoint a model came from; None if it did not come from a local folder."""
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        return getattr(quantization, "base_fingerprint", None)
    folder = Path(getattr(config, "_name_or_path", None) or "")
    return _core.fingerprint(str(folder)) if next(folder.glob("*.safetensors"), None) else None
