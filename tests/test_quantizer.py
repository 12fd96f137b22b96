from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import moeft
from moeft.errors import AuditError, CheckpointError, UnsupportedModelError
from moeft.kernels import nf4
from moeft.modules import NF4Experts, NF4Linear, PackedModule
from tests.tiny_models import save_tiny_model, token_ids

ALL = {"experts": True, "attention": True, "mlp": True}
OPTIONS = [{}, ALL, {"double_quant": True}, {**ALL, "double_quant": True, "block_size": 128}]


def load(folder: Path, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def with_rounded_weights(folder: Path, packed: torch.nn.Module):
    """An ordinary model whose weights are those that the packed model restores."""
    plain = load(folder)
    with torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, PackedModule):
                for name in module.packed_shapes:
                    weight = nf4.dequantize(module.packed_weight(name), dtype=torch.float32)
                    getattr(plain.get_submodule(path.replace(".base_layer", "")), name).copy_(weight)
    return plain


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_equal_transformers_on_the_rounded_weights(checkpoint, options):
    packed = load(checkpoint, quantization_config=moeft.NF4Config(**options))
    expected = logits(with_rounded_weights(checkpoint, packed))
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_save_and_reload_give_identical_logits(checkpoint, options, tmp_path):
    packed = load(checkpoint, quantization_config=moeft.NF4Config(**options))
    packed.save_pretrained(tmp_path)
    reloaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(reloaded), logits(packed))
    assert reloaded.config.quantization_config.to_dict() == packed.config.quantization_config.to_dict()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streamed_checkpoint_equals_quantising_while_loading(checkpoint, options, tmp_path):
    moeft.checkpoint.quantize(checkpoint, tmp_path / "packed", **options)
    streamed = load(tmp_path / "packed")
    loaded = load(checkpoint, quantization_config=moeft.NF4Config(**options))
    theirs = loaded.state_dict()
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert (
        streamed.config.quantization_config.base_fingerprint
        == loaded.config.quantization_config.base_fingerprint
        == moeft.checkpoint.fingerprint(checkpoint)
    )


def test_reload_of_a_streamed_checkpoint_survives_another_save(checkpoint, tmp_path):
    moeft.checkpoint.quantize(checkpoint, tmp_path / "one", attention=True)
    first = load(tmp_path / "one")
    first.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")), logits(first))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bfloat16_model_packs_the_same_bytes_as_the_stream(tmp_path, double_quant):
    base = save_tiny_model("gemma4", tmp_path / "base", torch.bfloat16)
    moeft.checkpoint.quantize(base, tmp_path / "packed", double_quant=double_quant)
    streamed = load(tmp_path / "packed", torch.bfloat16).state_dict()
    config = moeft.NF4Config(double_quant=double_quant)
    for name, tensor in load(base, torch.bfloat16, quantization_config=config).state_dict().items():
        assert streamed[name].dtype == tensor.dtype, name
        assert torch.equal(tensor, streamed[name]), name


def test_every_expert_is_packed_and_the_rest_is_not(checkpoint):
    packed = load(checkpoint, quantization_config=moeft.NF4Config())
    kinds = {type(module) for module in packed.modules() if isinstance(module, PackedModule)}
    assert kinds == {NF4Experts}
    audit = moeft.audit(packed, strict=True)
    assert {row.component for row in audit.rows if row.dtype == "nf4"} == {"experts"}
    # 4 bits of code and a float32 per 64 elements; experts of a few thousand elements may end in a short block.
    assert 4.5 <= audit.expert_bits < 4.51


def test_audit_counts_every_parameter_and_buffer(checkpoint):
    plain = load(checkpoint)
    tensors = {id(t): t for t in plain.state_dict(keep_vars=True).values()}.values()
    audit = moeft.audit(plain)
    assert sum(row.parameters for row in audit.rows) == sum(t.numel() for t in tensors)
    assert sum(row.bytes for row in audit.rows) == sum(t.nbytes for t in tensors)


def test_strict_audit_refuses_experts_in_16_bit(checkpoint):
    with pytest.raises(AuditError, match="expert bytes are not 4-bit"):
        moeft.audit(load(checkpoint), strict=True)


def test_attention_and_mlp_are_packed_only_when_asked(checkpoints):
    packed = load(checkpoints["gemma4"], quantization_config=moeft.NF4Config(**ALL))
    linears = {name.split(".", 3)[-1] for name, module in packed.named_modules() if isinstance(module, NF4Linear)}
    attention = {f"self_attn.{p}_proj" for p in "qkvo"}
    assert linears == attention | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert isinstance(packed.model.layers[0].router.proj, torch.nn.Linear)


def test_skip_leaves_modules_alone(checkpoints):
    config = moeft.NF4Config(attention=True, skip=("router", "o_proj"))
    packed = load(checkpoints["gemma4"], quantization_config=config)
    assert isinstance(packed.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    assert isinstance(packed.model.layers[0].self_attn.q_proj, NF4Linear)


def test_casting_a_model_does_not_round_its_statistics(checkpoints):
    packed = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    before = {n: b.clone() for n, b in packed.named_buffers() if "absmax" in n}
    packed.to(torch.bfloat16)
    assert before
    for name, buffer in packed.named_buffers():
        if "absmax" in name:
            assert torch.equal(buffer, before[name])


def test_original_config_fields_survive_a_save(checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["gemma4"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["per_layer_config"]  # what transformers writes in their place
    original = {"global_head_dim": 32, "num_global_key_value_heads": 1, "some_note": "kept"}
    (base / "config.json").write_text(json.dumps(config | original))
    packed = load(base, quantization_config=moeft.NF4Config())
    packed.save_pretrained(tmp_path / "packed")
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert original.items() <= saved.items()
    assert set(config) <= set(saved)
    assert torch.equal(logits(load(tmp_path / "packed")), logits(packed))


def test_a_missing_weight_is_an_error_not_a_random_layer(checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["gemma4"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*layers\.1\.self_attn\.q_proj\.weight"):
        load(base, quantization_config=moeft.NF4Config())


def test_a_weight_that_is_not_finite_is_refused(checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["gemma4"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.experts.down_proj"][2, 3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.down_proj.*not finite"):
        load(base, quantization_config=moeft.NF4Config())


def test_a_model_of_an_unknown_family_is_refused(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not a known family, expected one of .*gemma4"):
        load(tmp_path, quantization_config=moeft.NF4Config())


@pytest.mark.parametrize(("first", "second"), [("moeft", "transformers"), ("transformers", "moeft")])
def test_packed_checkpoint_loads_in_a_new_process_whatever_is_imported_first(checkpoints, tmp_path, first, second):
    moeft.checkpoint.quantize(checkpoints["olmoe"], tmp_path / "packed")
    code = f"""
import {first}, {second}
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "packed")!r}, dtype="float32")
assert moeft.audit(model, strict=True).expert_bits < 5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="block_size is 60"):
        moeft.NF4Config(block_size=60)
    with pytest.raises(ValueError, match="no argument expert"):
        moeft.NF4Config(expert=True)


def test_older_spellings_in_a_config_do_not_change_the_loaded_one(checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["mixtral"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}
    del config["rope_parameters"], config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    expected = AutoConfig.from_pretrained(base)
    packed = load(base, quantization_config=moeft.NF4Config())
    assert packed.config.rope_parameters == expected.rope_parameters
    assert packed.config.dtype == torch.float32
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(packed))
