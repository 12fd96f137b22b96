"""Small models and recipes that both mergekit and moeft merge."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

# What both take. `filter` is a part of a name for mergekit and a regular expression for moeft: these are both.
CASES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 0.31}}, {"model": "b", "parameters": {"weight": 0.85}}],
    },
    "linear_sum": {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.25}}],
        "parameters": {"normalize": False},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {
            "t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.3}, {"value": 0.6}]
        },
    },
    "slerp_ramp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": [0.1, 0.9]},
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [{"model": "a", "parameters": {"weight": 0.4}}, {"model": "b", "parameters": {"weight": 0.8}}],
    },
    "nuslerp_base": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.4}}, {"model": "b", "parameters": {"weight": 0.8}}],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": -0.4}}],
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.7, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.6}},
        ],
    },
    "ties_sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.7, "density": 0.25}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.9}},
        ],
        "parameters": {"normalize": False, "lambda": 1.2},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "parameters": {"density": 0.6, "gamma": 0.1},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "parameters": {"density": 0.6, "gamma": 0.1},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
    },
    "model_stock_rows": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
        "parameters": {"filter_wise": True},
    },
    "dare_linear": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1.0, "density": 0.5}}],
    },
    "della_linear": {
        "merge_method": "della_linear",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1.0, "density": 0.5, "epsilon": 0.3}}],
    },
    "passthrough": {
        "merge_method": "passthrough",
        "models": [{"model": "a", "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}}],
    },
}

# These drop weights at random: mergekit's numbers are torch's, so only statistics can agree.
RANDOM = ("dare_linear", "della_linear")


def save_models(folder: Path) -> None:
    """Save ``base`` and its fine-tunes ``a``, ``b`` and ``c``, far enough apart that slerp follows the arc.

    In float32: differences of bf16 weights have many equal magnitudes, and mergekit keeps any of them.
    """
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("a", "b", "c"), 1):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.Generator().manual_seed(9)
        model.save_pretrained(folder / name)
        tuned = {
            key: value
            + 0.02 * torch.randn(value.shape, generator=generator)
            + 0.015 * torch.randn(value.shape, generator=shared)
            for key, value in base.items()
        }
        save_file(tuned, folder / name / "model.safetensors", {"format": "pt"})


def run_mergekit(recipe: dict[str, Any], folder: Path, out: Path) -> None:
    """Merge with mergekit; model names are folders below ``folder``."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = yaml.safe_dump({**recipe, "dtype": "float32", "out_dtype": "bfloat16"})
    config = yaml.safe_load(text)
    for model in config["models"]:
        model["model"] = str(folder / model["model"])
    if "base_model" in config:
        config["base_model"] = str(folder / config["base_model"])
    options = MergeOptions(quiet=True, random_seed=1, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
