"""The proofs hold for what moeft makes, and do not hold for what was tampered with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeft
from moeft.errors import ProofError
from moeft.merging import verify
from tests.tiny_models import FAMILY_NAMES, randomise_lora, save_tiny_model, token_ids

UNUSED, SAME_LOGITS, UNTOUCHED, ROUNDED, MERGED_LOGITS = range(5)


class Tune:
    """A bf16 base, an adapter trained on its packed form, and the merged checkpoint."""

    def __init__(self, family: str, folder: Path) -> None:
        self.base = save_tiny_model(family, folder / "base", torch.bfloat16)
        self.adapter, self.merged = folder / "adapter", folder / "merged"
        packed = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32, quantization_config=moeft.NF4Config()
        )
        self.model = moeft.add_lora(packed, 4, targets=("attention", "experts"), seed=0)
        randomise_lora(self.model, std=0.02)
        self.model.save_pretrained(self.adapter)
        recipe = {"merge_method": "lora", "base_model": self.base, "models": [{"adapter": self.adapter}]}
        moeft.merging.merge(recipe, self.merged, progress=False)

    def proofs(self, merged: Path | None = None) -> list[verify.Proof]:
        return verify.prove(self.base, self.model, self.adapter, merged or self.merged, token_ids(4, 20).tolist())

    def tampered(self, folder: Path, name: str, change) -> Path:
        """A copy of the merged checkpoint with one tensor changed in place."""
        shutil.copytree(self.merged, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def tune(request, tmp_path_factory):
    return Tune(request.param, tmp_path_factory.mktemp(request.param))


def test_every_proof_holds(tune):
    proofs = tune.proofs()
    verify.require(proofs)
    assert all(proof.ok for proof in proofs)
    assert proofs[SAME_LOGITS].tolerance > 0
    assert proofs[MERGED_LOGITS].tolerance > 0


def test_a_changed_bit_of_an_untouched_tensor_is_found(tune, tmp_path):
    def change(tensor):
        tensor.view(torch.int16)[0] ^= 1

    proofs = tune.proofs(tune.tampered(tmp_path / "tampered", "model.norm.weight", change))
    assert [proof.ok for proof in proofs][UNTOUCHED : ROUNDED + 1] == [False, True]
    with pytest.raises(ProofError, match="untouched tensors are byte-identical to the base: 1 tensors changed"):
        verify.require(proofs)


def test_a_merged_weight_one_step_off_is_found(tune, tmp_path):
    def change(tensor):
        tensor.view(torch.int16)[0, 0] += 1

    folder = tune.tampered(tmp_path / "tampered", "model.layers.0.self_attn.q_proj.weight", change)
    assert [proof.ok for proof in tune.proofs(folder)][UNTOUCHED : ROUNDED + 1] == [True, False]


def test_an_adapter_that_is_not_the_models_is_found(tune, tmp_path):
    file = tune.adapter / "adapter_model.safetensors"
    kept = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in tensors if "experts" in name and "lora_B" in name)
    tensors[name].zero_()
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        assert not tune.proofs()[SAME_LOGITS].ok
    finally:
        file.write_bytes(kept)
