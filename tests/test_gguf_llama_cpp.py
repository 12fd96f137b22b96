"""Exported files in llama.cpp itself: its next-token probabilities beside those of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeft import gguf
from moeft.evaluation.ggml_reference import reference
from moeft.evaluation.llama_cpp import compare
from moeft.serving import ServeOptions, Server
from tests.test_gguf_export import BASE, save_model

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


@pytest.mark.parametrize("family", ["gemma4", "gemma4_e4b", "gemma3", "qwen3_moe", "olmoe", "llama"])
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    folder = BASE if family == "gemma4" else save_model(tmp_path / "model", family)
    gguf.export(folder, tmp_path / "m.gguf", type="f32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [2, *torch.randint(20, model.config.vocab_size - 2, (30,), generator=torch.manual_seed(0)).tolist()]
    spoken = reference(model, [ids])
    with Server(tmp_path / "m.gguf", ServeOptions(context=64, threads=1, exact=True)) as server:
        found = compare(server.client, spoken)
    # Sums of float32 in another order; a wrong head, norm or frequency changes more than a thousandth of the spread.
    assert found.error() < 1e-4
    assert found.perplexity == pytest.approx(spoken.perplexity(), rel=1e-4)
    assert found.greedy == 1
