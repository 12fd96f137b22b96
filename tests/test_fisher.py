"""The Fisher diagonal against one backward pass per sequence by autograd, and what a kill leaves of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

import moeft
from moeft import importance
from moeft.errors import CheckpointError, DataError
from moeft.importance import likelihood
from moeft.importance.groups import groups_within
from moeft.integration.fused_loss import PlainHead
from tests.interruption import KilledError, kill_at
from tests.tiny_models import save_tiny_model, token_ids
from tests.tiny_training import load

# A gradient passes at most 3 layers of about 10 products, forward and back, each over at most 96 terms; a sum of K
# terms in float32 is wrong by sqrt(K) * eps of its size, and a square by twice that.
TOLERANCE = 2 * 2 * 30 * 96**0.5 * 2**-24


def rows(count=3, length=20):
    ids = token_ids(count, length).tolist()
    return [{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i :]} for i, row in enumerate(ids)]


def naive(model, data):
    """Mean over sequences of the squared gradient of the summed log-probability, by autograd, named as on disk."""
    sums = {}
    model.requires_grad_(True)
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        counted = labels != -100
        model.zero_grad()
        log_probs[counted].gather(1, labels[counted, None]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.double() ** 2 / len(data)
    return {name: value.clone() for name, value in revert_weight_conversion(model, sums).items()}


def is_close(found, expected, tolerance=TOLERANCE):
    """Whether the error is small beside the whole; an expert without tokens must be exactly zero."""
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


def measure(folder, out, data=None, **options):
    importance.fisher(options.pop("model", None) or load(folder), data or rows(), out, base=folder, **options)
    return load_file(out / "fisher.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("gemma4", tmp_path_factory.mktemp("gemma4"))


@pytest.mark.parametrize("family", ["gemma4", "qwen3_moe", "gpt_oss", "granitemoe", "llama"])
def test_fisher_equals_autograd_one_sequence_at_a_time(family, tmp_path):
    folder = save_tiny_model(family, tmp_path / "base")
    expected = naive(load(folder), rows())
    found = measure(folder, tmp_path / "out", dtype=torch.float32)
    on_disk = {n: t.shape for n, t in load_file(folder / "model.safetensors").items() if n in found}
    assert on_disk == {name: value.shape for name, value in found.items()}
    assert sum("proj" in name or ".w1." in name or "linear.weight" in name for name in found) == len(found) > 5
    for name, value in found.items():
        assert is_close(value, expected[name]), name


def test_a_model_in_training_mode_is_measured_without_dropout(base, tmp_path):
    model = load(base, attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    found = measure(base, tmp_path / "out", model=model, dtype=torch.float32)
    expected = naive(load(base), rows())
    assert all(is_close(value, expected[name]) for name, value in found.items())
    assert model.training


def test_square_of_the_mean_gradient_is_another_thing(base):
    name = "model.layers.0.self_attn.q_proj.weight"
    model = load(base)
    apart = naive(model, rows(3))[name]
    together = (sum(signed(model, row, name) for row in rows(3)) / 3) ** 2
    assert not is_close(together, apart, 0.1)


def signed(model, row, name):
    model.zero_grad()
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    log_probs[labels != -100].gather(1, labels[labels != -100, None]).sum().backward()
    return model.get_parameter(name).grad.double()


@pytest.mark.parametrize("double_quant", [False, True])
def test_fisher_of_a_packed_model_is_that_of_its_restored_weights(double_quant, tmp_path):
    folder = save_tiny_model("qwen3_moe", tmp_path / "base")
    config = moeft.NF4Config(attention=True, mlp=True, double_quant=double_quant)
    packed = load(folder, quantization_config=config)
    restored = load(folder)
    for name, module in packed.named_modules():
        for weight in getattr(module, "packed_shapes", {}):
            value = moeft.kernels.nf4.dequantize(module.packed_weight(weight), dtype=torch.float32)
            restored.get_parameter(f"{name}.{weight}").data.copy_(value)
    found = measure(folder, tmp_path / "out", model=packed, dtype=torch.float32)
    expected = naive(restored, rows())
    assert any("experts" in name for name in found)
    for name, value in found.items():
        assert is_close(value, expected[name]), name


def test_packed_checkpoint_names_the_tensors_of_its_base(tmp_path):
    folder = save_tiny_model("mixtral", tmp_path / "base")
    moeft.checkpoint.quantize(folder, tmp_path / "packed", attention=True)
    found = measure(tmp_path / "packed", tmp_path / "out")
    assert found.keys() == measure(folder, tmp_path / "plain").keys()
    with safe_open(tmp_path / "out" / "fisher.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == moeft.checkpoint.fingerprint(folder)
        assert (file.metadata()["format"], file.metadata()["samples"]) == ("moeft-fisher-v1", "3")


def test_groups_do_not_change_the_result(base, tmp_path):
    at_once = measure(base, tmp_path / "a")
    largest = max(value.numel() for value in at_once.values())
    one_by_one = measure(base, tmp_path / "b", memory_bytes=4 * largest)
    assert all(torch.equal(at_once[name], one_by_one[name]) for name in at_once)


def test_groups_are_runs_that_fit():
    sizes = {"a": 2, "b": 2, "c": 3, "d": 1, "e": 4}
    assert groups_within(sizes, 16) == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(ValueError, match="e alone needs 16"):
        groups_within(sizes, 15)


def test_layer_importance_is_the_mean_over_a_layers_weights(base, tmp_path):
    found = measure(base, tmp_path / "out", dtype=torch.float32)
    saved = json.loads((tmp_path / "out" / "layer_importance.json").read_text())
    assert saved["format"] == "moeft-layer-importance-v1"
    assert list(saved["layers"]) == ["0", "1", "2"]
    for layer, mean in saved["layers"].items():
        values = [value.double().flatten() for name, value in found.items() if f"layers.{layer}." in name]
        assert mean == pytest.approx(float(torch.cat(values).mean()), rel=1e-6)


def test_sampled_labels_repeat_with_their_seed_and_keep_to_the_datas_places(base, tmp_path):
    one, again, other = (
        measure(base, tmp_path / str(i), labels="sampled", seed=seed) for i, seed in enumerate((0, 0, 9))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    unlabelled = [{**row, "labels": [-100] * len(row["labels"])} for row in rows(1)]
    nothing = measure(base, tmp_path / "none", unlabelled, labels="sampled")
    assert all(value.abs().sum() == 0 for value in nothing.values())


def test_sampled_labels_follow_the_models_distribution():
    generator = torch.Generator().manual_seed(0)
    head = PlainHead(torch.randn(5, 3, generator=generator), softcap=2.0)
    hidden = torch.randn(3, generator=generator)
    places, rows_drawn = torch.zeros(4000, dtype=torch.int64), 4000
    drawn = likelihood._sample(hidden.expand(rows_drawn, 3), head, places, seed=1)
    expected = (2.0 * torch.tanh(head.weight @ hidden / 2.0)).softmax(-1)
    share = drawn.bincount(minlength=5) / rows_drawn
    # Four standard deviations of a share.
    assert bool(((share - expected).abs() < 4 * (expected * (1 - expected) / rows_drawn).sqrt()).all())
    places[::2] = -100
    assert bool((likelihood._sample(hidden.expand(rows_drawn, 3), head, places, seed=1)[::2] == -100).all())


def test_interrupted_fisher_goes_on_and_mends_a_damaged_unit(base, tmp_path):
    whole = measure(base, tmp_path / "whole")
    memory_bytes = 4 * max(value.numel() for value in whole.values())
    with pytest.raises(KilledError):
        measure(base, tmp_path / "out", memory_bytes=memory_bytes, progress=kill_at(8))
    partial, journal = (tmp_path / "out" / f"fisher.safetensors.{end}" for end in ("partial", "journal"))
    finished = [json.loads(line)["unit"] for line in journal.read_text().splitlines()[1:]]
    assert finished
    assert not (tmp_path / "out" / "fisher.safetensors").exists()
    damage(partial)
    with journal.open("a") as file:
        file.write('{"unit": "torn')
    assert all(torch.equal(value, whole[name]) for name, value in measure(base, tmp_path / "out").items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fisher.safetensors", "layer_importance.json"]


def damage(partial):
    with safe_open(partial, "pt") as file:
        name = next(n for n in sorted(file.keys()) if file.get_tensor(n).abs().sum() > 0)
    content = bytearray(partial.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + header])[name]["data_offsets"][0]
    content[8 + header + start] ^= 1
    partial.write_bytes(content)


def test_continuing_with_other_rows_is_refused(base, tmp_path):
    with pytest.raises(KilledError):
        measure(base, tmp_path, progress=kill_at(2))
    with pytest.raises(CheckpointError, match="begun with other inputs or options"):
        measure(base, tmp_path, rows(2))


def test_bad_input_is_refused(base, tmp_path):
    with pytest.raises(DataError, match="no sequences"):
        importance.fisher(load(base), [], tmp_path, base=base)
    with pytest.raises(ValueError, match="labels is 'mine', expected one of"):
        measure(base, tmp_path / "a", labels="mine")
    with pytest.raises(ValueError, match=r"memory is 4 bytes, but .* alone needs"):
        measure(base, tmp_path / "b", memory_bytes=4)
    with pytest.raises(ValueError, match="did you mean 'experts'"):
        measure(base, tmp_path / "c", targets=["expert"])
    model = load(base)
    model.model.layers[2].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match="log-likelihood of sequence 0 is nan"):
        measure(base, tmp_path / "d", model=model)
    measure(base, tmp_path / "e")
    with pytest.raises(CheckpointError, match="exists; choose another output"):
        measure(base, tmp_path / "e")
