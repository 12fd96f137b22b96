"""``moeft merge --verify``: proofs about a finished merge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from moeft.merging.settings import Recipe
    from moeft.merging.verify import Proof

ROWS, TOKENS = 4, 48
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle after a storm.",
    "List three reasons why rivers bend, and explain each of them in one sentence for a child of ten.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "What is the difference between a moral and a legal obligation? Give one example of each, then compare them.",
)
"""Probe prompts, where the checkpoint has a tokenizer."""


def run(recipe: Path, merged: Path, show: Callable[[str], None] = print) -> list[Proof]:
    """Check a merge against its inputs: every tensor, and for LoRA merges the logits.

    Args:
        recipe: The recipe file.
        merged: The checkpoint that was made with it.
        show: Where to print what is not checked.

    Returns:
        What was measured, whether it holds or not.

    Raises:
        MoeftError: If the recipe or its inputs cannot be used any more.
    """
    from moeft.merging.settings import Recipe
    from moeft.merging.verify_weights import prove_weights

    proofs = prove_weights(recipe, merged, show)
    content, folder = Recipe.read(recipe)
    read = Recipe(content, folder, 0)
    if read.method == "lora" and all(proof.ok for proof in proofs[:1]):
        proofs += _logits(read, merged, show)
    return proofs


def _logits(recipe: Recipe, merged: Path, show: Callable[[str], None]) -> list[Proof]:
    import torch

    from moeft.merging.tensors import DiskTensors
    from moeft.merging.verify_logits import prove_logits

    base = DiskTensors(recipe.base)
    needed = 6 * sum(torch.Size(base.shape(name)).numel() for name in base.names)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        show(f"logits were not compared: in float32 they take about {needed:,} bytes, this machine has {available:,}")
        return []
    factors = _factors(recipe)
    if factors is None:
        show("logits were not compared: weight, scale or normalize differ between tensors")
        return []
    dtype = getattr(torch, str(recipe.content.get("out_dtype") or _dtype(merged)))
    adapters = [(recipe.path(entry["adapter"]), factor) for entry, factor in zip(recipe.models, factors, strict=True)]
    return [prove_logits(recipe.base, adapters, merged, dtype, _probe(merged))]


def _factors(recipe: Recipe) -> list[float] | None:
    """What the delta of each adapter is multiplied by; None if that depends on the tensor."""
    parameters = [recipe.content.get("parameters") or {}, *(entry.get("parameters") or {} for entry in recipe.models)]
    if any(isinstance(value, list) for place in parameters for value in place.values()):
        return None
    weights = [float(recipe.value("weight", "", 1.0, entry)) for entry in recipe.models]
    by = sum(weights) if recipe.value("normalize", "", False) else 1.0
    return [weight * float(recipe.value("scale", "", 1.0)) / by for weight in weights]


def _dtype(folder: Path) -> str:
    """Type of most weights of a checkpoint, as its config says it."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    inner = config.get("text_config", {})
    return str(config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or "float32")


def _probe(folder: Path) -> Tensor:
    """``[B, S]`` tokens: prompts, or random ids where there is no tokenizer."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    if (folder / "tokenizer_config.json").is_file():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        length = min(TOKENS, *map(len, rows))
        return torch.tensor([row[:length] for row in rows])
    vocabulary = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    return torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
