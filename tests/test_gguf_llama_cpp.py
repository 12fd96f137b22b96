"""Exported files in llama.cpp itself: its next-token probabilities beside those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeft import gguf
from tests.test_gguf_export import BASE, save_model

llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


class GgmlGelu(torch.nn.Module):
    """GELU as ggml looks it up: from f16 to f16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def log_probabilities(path: Path, ids: list[int], count: int) -> dict[int, float]:
    """Those of the likeliest next tokens, by llama.cpp with caches in f32."""
    settings = llama_cpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {"prompt": ids, "n_predict": 1, "n_probs": count, "temperature": 0, "cache_prompt": False}
    answer: Any = llama_cpp.Server(settings).handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    (first,) = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
    return {token["id"]: token["logprob"] for token in first["top_logprobs"]}


@pytest.mark.parametrize("family", ["gemma4", "gemma3", "qwen3_moe", "olmoe", "llama"])
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    folder = BASE if family == "gemma4" else save_model(tmp_path / "model", family)
    gguf.export(folder, tmp_path / "m.gguf", type="f32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules():
        if "gemma" in family and hasattr(module, "act_fn"):
            module.act_fn = GgmlGelu()
    ids = [2, *torch.randint(20, model.config.vocab_size - 2, (40,), generator=torch.manual_seed(0)).tolist()]
    with torch.no_grad():
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
    theirs = log_probabilities(tmp_path / "m.gguf", ids, min(2000, len(ours) - 1))
    assert len(theirs) > 100
    found = torch.tensor(list(theirs.values()), dtype=torch.float64)
    difference = (found - ours[list(theirs)]).square().mean().sqrt().item()
    # Sums of float32 in another order; a wrong head, norm or frequency changes more than a thousandth of the spread.
    assert difference < 1e-4 * ours.std().item()
