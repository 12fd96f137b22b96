"""Every family from a 16-bit base to a merged checkpoint: packed, trained, and proven against transformers and PEFT."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moeft
from moeft import families
from moeft.errors import UnsupportedModelError
from moeft.integration import model_family
from moeft.merging import verify
from tests.tiny_checkpoints import disk_tensors
from tests.tiny_models import CONFIGS, DENSE_NAMES, MOE_NAMES, UNKNOWN_NAMES, save_tiny_model, token_ids
from tests.tiny_training import load

STEPS = 4
# Linear layers in decoder layers that stay in 16 bit whatever is asked: routers, decay of linear attention, per-layer
# embeddings, mamba.
LEFT_ALONE = {
    "router.proj",
    "mlp.shared_expert_gate",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "linear_attn.in_proj_ba",
    "per_layer_input_gate",
    "per_layer_projection",
    "mamba.in_proj",
    "mamba.out_proj",
}


def train(model) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Chain:
    """A bf16 base, a model packed from it as far as possible, an adapter trained on that, and the merged checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"
        save_tiny_model(name, self.base, torch.bfloat16)
        self.packing = {"experts": name not in DENSE_NAMES, "attention": True, "mlp": True}
        packed = load(self.base, quantization_config=moeft.NF4Config(**self.packing))
        self.audit = moeft.audit(packed, strict=self.packing["experts"])
        self.modules = {n.split(".", 1)[-1]: type(m) for n, m in packed.model.layers.named_modules()}
        self.state = {n: tensor.clone() for n, tensor in packed.state_dict().items()}
        has_mlp = any(row.component == "mlp" and row.dtype == "nf4" for row in self.audit.rows)
        targets = ["attention", *(["experts"] if self.packing["experts"] else []), *(["mlp"] if has_mlp else [])]
        self.model = moeft.add_lora(packed, 4, targets=targets, seed=0)
        self.losses = train(self.model)
        self.model.save_pretrained(self.adapter)
        recipe = {"merge_method": "lora", "base_model": self.base, "models": [{"adapter": self.adapter}]}
        moeft.merging.merge(recipe, self.merged, progress=False)


@pytest.fixture(scope="module", params=[*MOE_NAMES, *DENSE_NAMES, *UNKNOWN_NAMES])
def chain(request, tmp_path_factory):
    return Chain(request.param, tmp_path_factory.mktemp(request.param))


def test_only_routers_and_their_kind_stay_in_16_bit(chain):
    left = {name for name, kind in chain.modules.items() if kind is nn.Linear}
    assert left <= LEFT_ALONE
    packed = {row.component for row in chain.audit.rows if row.dtype == "nf4"}
    assert packed - {"mlp"} == {"attention", *(["experts"] if chain.packing["experts"] else [])}


def test_streamed_checkpoint_equals_packing_while_loading(chain, tmp_path):
    moeft.checkpoint.quantize(chain.base, tmp_path / "packed", **chain.packing)
    streamed = load(tmp_path / "packed").state_dict()
    assert streamed.keys() == chain.state.keys()
    for name, tensor in chain.state.items():
        assert torch.equal(streamed[name], tensor), name


def test_training_lowers_the_loss(chain):
    assert chain.losses[-1] < chain.losses[0]


def test_every_proof_holds(chain):
    proofs = verify.prove(chain.base, chain.model, chain.adapter, chain.merged, token_ids(4, 20).tolist())
    verify.require(proofs)


def test_every_family_file_has_a_tiny_model():
    assert {family.name for family in families.all_families()} <= CONFIGS.keys()


def test_model_without_a_family_file_is_named_in_the_log_once(tmp_path, caplog):
    base = save_tiny_model("flex_olmo", tmp_path)
    model_family._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "moeft"):
        for _ in range(2):
            moeft.load(base, moeft.NF4Config(), dtype="float32")
    (record,) = caplog.records
    assert "'flex_olmo' has no family file, so its experts (model.layers.*.mlp.experts)" in record.getMessage()


def test_experts_of_sizes_that_grouped_mm_refuses_are_merged_and_proven(tmp_path, monkeypatch):
    # 18 floats are no multiple of 16 bytes.
    config, options = CONFIGS["olmoe"]
    monkeypatch.setitem(CONFIGS, "olmoe", (config, {**options, "intermediate_size": 18, "num_experts_per_tok": 1}))
    chain = Chain("olmoe", tmp_path)
    test_every_proof_holds(chain)
    whole = load(chain.base, experts_implementation="moeft")
    whole(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert whole.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0


def test_dense_model_of_sizes_that_divide_nothing_goes_the_whole_way(tmp_path, monkeypatch):
    config, options = CONFIGS["gemma4_e4b"]
    sizes = {"hidden_size": 52, "intermediate_size": 87, "num_attention_heads": 3, "num_key_value_heads": 1}
    heads = {"head_dim": 10, "global_head_dim": 22, "hidden_size_per_layer_input": 17, "vocab_size": 197}
    odd = {**options, **sizes, **heads, "vocab_size_per_layer_input": 197}
    monkeypatch.setitem(CONFIGS, "gemma4_e4b", (config, odd))
    chain = Chain("gemma4_e4b", tmp_path)
    test_streamed_checkpoint_equals_packing_while_loading(chain, tmp_path)
    test_every_proof_holds(chain)


def test_dense_model_has_no_experts_to_pack(tmp_path):
    base = save_tiny_model("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"this llama model has no experts.*experts=False"):
        load(base, quantization_config=moeft.NF4Config())


def test_text_part_of_a_larger_model_without_a_file_is_not_packed(tmp_path):
    base = save_tiny_model("flex_olmo", tmp_path / "base")
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in disk_tensors(base).items()}
    save_file(tensors, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl_moe"}), "utf-8")
    message = r'"qwen3_vl_moe".*at model.language_model.layers.*moeft.load could not read'
    with pytest.raises(UnsupportedModelError, match=message):
        moeft.checkpoint.quantize(base, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
