"""What tells one reference from another: everything that its log-probabilities depend on but the tokens."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from moeft.training.frozen_base import frozen_tensors, hash_tensor
from moeft.training.preference.starting_policy import StartingPolicy

_NAMES_OF_PLACES = ("_name_or_path", "transformers_version", "base_model_name_or_path", "inference_mode")


def reference_context(model: Any, start: StartingPolicy, precision: str) -> str:
    """Hash of a reference: base with its quantisation, adapters that act, config with the soft cap, and precision.

    All weights are hashed as they lie in memory, packed ones included, so that a base that differs in one bit, or in
    how it is quantised, is another one. A fresh adapter, which changes nothing, does not count; nor does where a
    checkpoint lies.

    Args:
        model: The policy before its first step.
        start: What of it trains and had an effect.
        precision: Of the forward pass, such as autocast's.

    Returns:
        32 hexadecimal digits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = {**dict(frozen_tensors(model)), **dict(start.parameters())}
    names = sorted(tensors)
    # hashlib lets go of the interpreter's lock, so threads hash side by side.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = list(pool.map(lambda name: hash_tensor(tensors[name]), names))
    acting = {name.split(".")[-2] for name in names if ".lora_" in name}
    adapters = {
        name: _settings(config.to_dict())
        for name, config in getattr(model, "peft_config", {}).items()
        if name in acting
    }
    described = [precision, _settings(base.config.to_dict()), adapters, list(zip(names, hashes, strict=True))]
    return hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if key not in _NAMES_OF_PLACES
    }
