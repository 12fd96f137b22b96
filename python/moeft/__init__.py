"""Fine-tune Mixture-of-Experts language models on the hardware people have.

Importing this package loads neither torch nor transformers: names resolve when they are first used, and the quantizer
is registered with transformers when that is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moeft import _autoload
from moeft._core import __version__

if TYPE_CHECKING:
    from moeft.integration.audit import Audit, audit
    from moeft.integration.loading import load
    from moeft.integration.lora import add_lora, load_adapter
    from moeft.integration.nf4_config import NF4Config
    from moeft.integration.routing_statistics import RoutingStatistics, routing_statistics
    from moeft.training.dpo import DPOTrainer
    from moeft.training.dpo_arguments import DPOConfig
    from moeft.training.sft import SFTConfig, SFTTrainer

__all__ = [
    "Audit",
    "DPOConfig",
    "DPOTrainer",
    "NF4Config",
    "RoutingStatistics",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "add_lora",
    "audit",
    "load",
    "load_adapter",
    "routing_statistics",
]

_HOMES = {
    "Audit": "moeft.integration.audit",
    "DPOConfig": "moeft.training.dpo_arguments",
    "DPOTrainer": "moeft.training.dpo",
    "NF4Config": "moeft.integration.nf4_config",
    "RoutingStatistics": "moeft.integration.routing_statistics",
    "SFTConfig": "moeft.training.sft",
    "SFTTrainer": "moeft.training.sft",
    "add_lora": "moeft.integration.lora",
    "audit": "moeft.integration.audit",
    "load": "moeft.integration.loading",
    "load_adapter": "moeft.integration.lora",
    "routing_statistics": "moeft.integration.routing_statistics",
}
_SUBPACKAGES = ("adapters", "checkpoint", "gguf", "importance", "kernels", "merging", "planning")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


_autoload.install()
