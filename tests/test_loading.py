"""moeft.load: the text model of a multimodal Gemma 4, whatever its form on disk, and damaged folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moeft
from moeft.errors import CheckpointError, UnsupportedModelError
from tests.test_quantizer import with_rounded_weights
from tests.tiny_models import save_tiny_model, tiny_config, token_ids
from tests.tiny_training import tiny_tokenizer

FORMS = ("16 bit", "quantised on load", "packed", "packed with its attention")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny Gemma 4 with a vision tower, as transformers saves it, and its tokenizer."""
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    text = tiny_config("gemma4").to_dict()
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert any(name.startswith("model.vision_tower.") for name in names)
    assert any(name.startswith("model.language_model.layers.0.experts.") for name in names)
    return folder


def load_form(folder, form, tmp_path, **options):
    if form == "16 bit":
        return moeft.load(folder, dtype="float32", **options)
    if form == "quantised on load":
        return moeft.load(folder, moeft.NF4Config(), dtype="float32", **options)
    moeft.checkpoint.quantize(folder, tmp_path / "packed", attention="attention" in form)
    return moeft.load(tmp_path / "packed", dtype="float32", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("form", FORMS)
def test_text_only_load_gives_the_logits_of_the_whole_model(multimodal, form, tmp_path):
    model, tokenizer = load_form(multimodal, form, tmp_path)
    assert type(model) is transformers.Gemma4ForCausalLM
    assert not any("vision" in name for name, _ in model.named_modules())
    whole = transformers.Gemma4ForConditionalGeneration.from_pretrained(multimodal, dtype=torch.float32)
    if form != "16 bit":
        moeft.audit(model, strict=True)
        with torch.no_grad():
            copy_rounded(model, whole.model.language_model)
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    assert tokenizer("1 + 1").input_ids == tiny_tokenizer()("1 + 1").input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def copy_rounded(packed, text_model):
    """Put what the packed text model restores into the text part of the whole one."""
    from moeft.kernels import nf4
    from moeft.modules import PackedModule

    for path, module in packed.named_modules():
        if isinstance(module, PackedModule):
            target = text_model.get_submodule(path.removeprefix("model."))
            for name in module.packed_shapes:
                getattr(target, name).copy_(nf4.dequantize(module.packed_weight(name), dtype=torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_text_only_model_saves_and_loads_again(multimodal, form, tmp_path):
    model, tokenizer = load_form(multimodal, form, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = moeft.load(tmp_path / "saved", dtype="float32")
    assert torch.equal(logits(again), logits(model))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model))


def test_fingerprint_is_that_of_the_multimodal_checkpoint(multimodal, tmp_path):
    expected = moeft.checkpoint.fingerprint(multimodal)
    for form in ("quantised on load", "packed"):
        model, _ = load_form(multimodal, form, tmp_path)
        assert model.config.quantization_config.base_fingerprint == expected


def test_whole_multimodal_model_can_be_packed_too(multimodal, tmp_path):
    model, _ = load_form(multimodal, "packed", tmp_path, text_only=False)
    assert type(model) is transformers.Gemma4ForConditionalGeneration
    moeft.audit(model, strict=True)
    text, _ = moeft.load(tmp_path / "packed", dtype="float32")
    torch.testing.assert_close(logits(model), logits(text))


def test_loading_a_multimodal_checkpoint_as_text_without_moeft_load_is_an_error(multimodal):
    text_config = transformers.AutoConfig.from_pretrained(multimodal).text_config
    with pytest.raises(CheckpointError, match=r"would stay random.*use moeft\.load"):
        transformers.Gemma4ForCausalLM.from_pretrained(
            multimodal, config=text_config, quantization_config=moeft.NF4Config()
        )


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in several files, with its tokenizer."""
    folder = save_tiny_model("olmoe", tmp_path / "sharded", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_text_model_in_shards_loads(sharded):
    model, _ = moeft.load(sharded, moeft.NF4Config(), dtype="float32")
    moeft.audit(model, strict=True)


@pytest.mark.parametrize("config", [None, moeft.NF4Config()], ids=["16 bit", "quantised on load"])
def test_missing_shard_is_named(sharded, config):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        moeft.load(sharded, config)


def test_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=shard.name):
        moeft.load(sharded)


def test_folder_without_weights_or_config_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        moeft.load(tmp_path / "absent")


def test_shapes_that_the_config_does_not_give_are_an_error(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"another shape|could not be converted"):
        moeft.load(folder)


def test_packed_text_only_model_equals_the_rounded_one_of_a_plain_checkpoint(checkpoints, tmp_path):
    moeft.checkpoint.quantize(checkpoints["gemma4"], tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    packed, _ = moeft.load(tmp_path / "packed", dtype="float32")
    expected = logits(with_rounded_weights(checkpoints["gemma4"], packed))
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-4)


def test_folder_without_a_tokenizer_loads_the_model_alone(checkpoint):
    model, tokenizer = moeft.load(checkpoint, dtype="float32")
    assert tokenizer is None
    assert model(input_ids=token_ids()).logits.isfinite().all()


def test_packed_checkpoint_is_not_loaded_as_if_packed_otherwise(checkpoint, tmp_path):
    moeft.checkpoint.quantize(checkpoint, tmp_path / "packed")
    moeft.load(tmp_path / "packed", moeft.NF4Config())
    with pytest.raises(CheckpointError, match="already packed, with attention False instead of True"):
        moeft.load(tmp_path / "packed", moeft.NF4Config(attention=True))


def test_multimodal_model_without_a_text_part_that_we_know_is_named(tmp_path):
    transformers.Qwen3VLMoeConfig().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="'qwen3_vl_moe', which transformers has no causal language model"):
        moeft.load(tmp_path)
