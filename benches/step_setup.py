"""The demo's trainer, as the demo builds it, and a wider model of random weights in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeft.config import SftRecipe
from moeft.demo.run import BASE, prepare
from moeft.provenance import RunFolder
from moeft.runs.context import RunContext
from moeft.runs.sft_data import input_files
from moeft.runs.sft_trainer import make_trainer
from moeft.training.sft import SFTTrainer

SEED = 0
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")


def silent(_: str) -> None:
    """Show nothing."""


@contextmanager
def demo_recipe(hidden: int | None = None) -> Iterator[SftRecipe]:
    """The demo's recipe with its data and its packed base, or one as deep and ``hidden`` wide, in a scratch folder."""
    with TemporaryDirectory(prefix="moeft-step-") as scratch:
        folder = Path(scratch)
        base = BASE if hidden is None else widened_base(folder / "base", hidden)
        yield prepare(folder, SEED, base, silent)


@contextmanager
def demo_trainer(recipe: SftRecipe, fused_norms: bool) -> Iterator[SFTTrainer]:
    """The trainer of ``moeft sft``, without an end in sight and without checkpoints."""
    recipe = recipe.model_copy(deep=True)
    recipe.training.update(max_steps=100_000, save_strategy="no", disable_tqdm=True, fused_norms=fused_norms)
    with RunFolder.create(recipe.output, "moeft sft", recipe.resolved(), input_files(recipe), SEED) as folder:
        yield make_trainer(RunContext(recipe, folder, silent))


def widened_base(folder: Path, hidden: int) -> Path:
    """A random checkpoint like the demo's base, every width but that of a head multiplied."""
    config = AutoConfig.from_pretrained(BASE)
    factor, rest = divmod(hidden, config.hidden_size)
    if rest or not factor:
        raise SystemExit(f"--hidden is {hidden}, expected a multiple of {config.hidden_size}")
    fields: dict[str, Any] = json.loads((BASE / "config.json").read_text("utf-8"))
    for widths in (fields, *fields["per_layer_config"].values()):
        widths |= {name: widths[name] * factor for name in WIDTHS if name in widths}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, folder)
    return folder
