"""moeft.load takes the text part of multimodal checkpoints of other families than Gemma 4, whatever its prefix."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import moeft
from tests.tiny_models import tiny_config, token_ids


def gemma3() -> transformers.PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=tiny_config("gemma3").to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5_moe() -> transformers.PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5MoeConfig(
        text_config=tiny_config("qwen3_5_moe").to_dict(),
        vision_config={**vision, "patch_size": 4, "num_position_embeddings": 16},
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize(
    ("build", "prefix", "experts"),
    [(gemma3, "language_model.model.", False), (qwen3_5_moe, "model.language_model.", True)],
)
def test_text_part_loads_in_16_bit_and_packed(build, prefix, experts, tmp_path):
    torch.manual_seed(0)
    whole = build()
    for parameter in whole.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    whole.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert f"{prefix}layers.1.self_attn.q_proj.weight" in names
    text, _ = moeft.load(tmp_path / "base", dtype="float32")
    torch.testing.assert_close(logits(text), logits(whole), rtol=1e-5, atol=1e-5)

    packing = {"experts": experts, "attention": True, "mlp": True}
    packed, _ = moeft.load(tmp_path / "base", moeft.NF4Config(**packing), dtype="float32")
    moeft.checkpoint.quantize(tmp_path / "base", tmp_path / "packed", **packing)
    streamed, _ = moeft.load(tmp_path / "packed", dtype="float32")
    streamed.save_pretrained(tmp_path / "again")
    again, _ = moeft.load(tmp_path / "again", dtype="float32")
    for other in (streamed, again):
        states = packed.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
