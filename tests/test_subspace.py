"""The instruct subspace against the exact decomposition, and what a kill leaves of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeft
from moeft import importance
from moeft.errors import CheckpointError
from moeft.importance import svd
from moeft.importance.disk import Disk
from tests.interruption import KilledError, kill_at
from tests.tiny_models import save_tiny_model
from tests.tiny_training import load

RANK = 5
EPS = 2**-23


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Instruct and base folder of some families."""
    root = tmp_path_factory.mktemp("pairs")
    families = ("gemma4", "qwen3_moe", "gpt_oss", "llama")
    return {f: tuple(save_tiny_model(f, root / f / str(seed), seed=seed) for seed in (0, 1)) for f in families}


def in_memory(folder):
    return {name: parameter.detach() for name, parameter in load(folder).named_parameters()}


def decaying(rows, columns, seed=0):
    """A matrix whose singular values fall by a factor of 0.97 each."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, min(rows, columns), generator=generator)).Q for n in (rows, columns))
    s = 0.97 ** torch.arange(min(rows, columns), dtype=torch.float32)
    return u * s @ v.T, s


@pytest.mark.parametrize("family", ["gemma4", "qwen3_moe", "gpt_oss", "llama"])
def test_subspace_is_the_exact_decomposition_of_every_matrix(family, pairs, tmp_path):
    it, pt = pairs[family]
    importance.subspace(it, pt, tmp_path / "s", rank=RANK)
    found = load_file(tmp_path / "s")
    tuned, base = in_memory(it), in_memory(pt)
    names = {name.rpartition(".")[0] for name in found}
    assert names == {n for n in tuned if "_proj" in n and "bias" not in n and "router" not in n}
    for name in names:
        difference = tuned[name].double() - base[name].double()
        if family == "gpt_oss" and difference.ndim == 3:
            difference = difference.mT
        s = torch.linalg.svdvals(difference)
        u_S, kept, v = found[f"{name}.U"] * found[f"{name}.S"][..., None, :], found[f"{name}.S"], found[f"{name}.V"]
        torch.testing.assert_close(kept.double(), s[..., :RANK], rtol=100 * EPS, atol=0)
        error = torch.linalg.matrix_norm(difference - u_S.double() @ v.double().mT)
        best = s[..., RANK:].square().sum(-1).sqrt()
        torch.testing.assert_close(error, best, rtol=1e-5, atol=0)
        residual = found[f"{name}.residual"][..., 0].double() * torch.linalg.matrix_norm(difference)
        torch.testing.assert_close(residual, error, rtol=1e-5, atol=0)


def test_sketch_finds_the_largest_directions_of_a_large_matrix():
    d, s = decaying(600, 700)
    found = svd.truncated_svd(d, 32, torch.Generator().manual_seed(0), power_iterations=3)
    # A power iteration squares the ratio of singular values twice over, less what the random start lacks in the
    # direction, at most 100 here: the 48th is 0.97^48 of the first, and (0.97^16)^6 * 100 of the 32nd is 5 %.
    assert float((found.s / s[:32] - 1).abs().max()) < 0.05**2
    eye = torch.eye(32)
    assert float((found.u.T @ found.u - eye).abs().max()) < 100 * EPS
    assert float((found.v.T @ found.v - eye).abs().max()) < 100 * EPS
    actual = (d - found.u * found.s @ found.v.T).norm() / d.norm()
    assert found.residual == pytest.approx(float(actual), rel=1e-4)
    best = float(s[32:].square().sum() / s.square().sum()) ** 0.5
    assert best * (1 - 1e-4) <= found.residual <= best * 1.01


def test_directions_beyond_the_rank_of_a_matrix_are_zero():
    low = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 30).tril()
    found = svd.truncated_svd(low, 6, torch.Generator())
    assert (found.s > 0).sum() == 3
    assert found.u[:, 3:].abs().sum() == found.v[:, 3:].abs().sum() == 0
    assert found.residual < 1e-3
    nothing = svd.truncated_svd(torch.zeros(4, 5), 2, torch.Generator())
    assert (float(nothing.u.abs().sum()), nothing.residual) == (0, 0)


def test_interrupted_subspace_goes_on_with_the_same_bits(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(svd, "EXACT_BELOW", 8)  # so that the sketch's seed matters
    it, pt = pairs["gemma4"]
    importance.subspace(it, pt, tmp_path / "whole", rank=RANK)
    with pytest.raises(KilledError):
        importance.subspace(it, pt, tmp_path / "s", rank=RANK, progress=kill_at(20))
    assert not (tmp_path / "s").exists()
    with pytest.raises(CheckpointError, match="begun with other inputs or options"):
        importance.subspace(it, pt, tmp_path / "s", rank=RANK + 1)
    importance.subspace(it, pt, tmp_path / "s", rank=RANK)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"s", "whole"}


def test_layout_on_disk_does_not_matter(pairs, tmp_path):
    it, pt = pairs["qwen3_moe"]
    moeft.checkpoint.fuse_experts(pt, tmp_path / "fused")
    importance.subspace(it, pt, tmp_path / "a", rank=RANK)
    importance.subspace(it, tmp_path / "fused", tmp_path / "b", rank=RANK)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_metadata_names_both_models(pairs, tmp_path):
    it, pt = pairs["llama"]
    report = importance.subspace(it, pt, tmp_path / "s", rank=RANK, layers=[1], targets=["attention"])
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.metadata()["base_fingerprint"] == moeft.checkpoint.fingerprint(it)
        assert file.metadata()["pt_fingerprint"] == moeft.checkpoint.fingerprint(pt)
    assert all("layers.1.self_attn" in name for name in report.residuals)
    assert "q_proj" in str(report)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 33}, r"rank is 33, but .*k_proj.weight is 32 x 64; give at most 32"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ["experts"]}, "targets holds 'experts', but .* has attention, mlp"),
        ({"layers": ["1-7"]}, "layers names 2, but the last layer"),
    ],
)
def test_bad_option_is_refused(pairs, tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        importance.subspace(*pairs["llama"], tmp_path / "s", **{"rank": RANK, **options})
    assert not list(tmp_path.iterdir())


def test_other_models_and_packed_ones_are_refused(pairs, tmp_path):
    it = pairs["gemma4"][0]
    with pytest.raises(CheckpointError, match=r"lacks .*, which .* has; are they kin"):
        importance.subspace(it, pairs["llama"][1], tmp_path / "s", rank=RANK)
    moeft.checkpoint.quantize(it, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="in 4 bit; give the 16-bit checkpoint"):
        importance.subspace(it, tmp_path / "packed", tmp_path / "s", rank=RANK)


def test_weights_in_8_bit_are_refused(pairs, tmp_path):
    it, pt = pairs["llama"]
    shutil.copytree(it, tmp_path / "fp8")
    tensors = load_file(it / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"holds {name} as F8_E4M3; give a 16- or 32-bit checkpoint"):
        importance.subspace(tmp_path / "fp8", pt, tmp_path / "s", rank=RANK)


def test_multimodal_checkpoint_gives_the_names_of_its_text_model(pairs, tmp_path):
    it, pt = pairs["gemma4"]
    whole = tmp_path / "whole"
    whole.mkdir()
    tensors = load_file(it / "model.safetensors")
    prefixed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    tower = {"model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": torch.zeros(4, 4)}
    save_file({**prefixed, **tower}, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps({"model_type": "gemma4"}))
    importance.subspace(it, pt, tmp_path / "a", rank=RANK)
    importance.subspace(whole, pt, tmp_path / "b", rank=RANK)
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    weight = Disk(whole).weights["model.layers.0.experts.down_proj"]
    assert weight.tensors == ("model.language_model.layers.0.experts.down_proj",)
    assert Disk(whole).canonical("model.language_model.layers.0.experts.down_proj") == weight.name


def test_missing_expert_is_named(pairs, tmp_path):
    it = pairs["qwen3_moe"][0]
    tensors = load_file(it / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((it / "config.json").read_text())
    with pytest.raises(CheckpointError, match="layer 2 lacks the up projection of expert 3"):
        Disk(tmp_path)
