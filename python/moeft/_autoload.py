"""Register with transformers and PEFT when they are imported, not when moeft is: ``import moeft`` loads no torch."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# Module that holds a registry -> our module that registers when it is imported.
REGISTRIES = {
    "transformers.quantizers.auto": "moeft.integration.register",
    "transformers.integrations.moe": "moeft.integration.register_experts",
    "transformers.modeling_utils": "moeft.integration.document_attention",
    "peft.tuners.lora.model": "moeft.integration.peft_lora",
}


def install() -> None:
    """Register now where the registry is imported already, elsewhere as soon as it is."""
    for registry, register in REGISTRIES.items():
        if registry in sys.modules:
            importlib.import_module(register)
        else:
            sys.meta_path.insert(0, _Finder(registry, register))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, through the finders that come after it, and registers when that module has run."""

    def __init__(self, registry: str, register: str) -> None:
        self.registry = registry
        self.register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.register)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: str) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.register)
