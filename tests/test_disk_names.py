"""Names on disk against those that transformers writes and holds."""

from __future__ import annotations

import pytest

from moeft import families
from moeft.families.disk_names import DiskNames, split
from tests.tiny_checkpoints import disk_tensors
from tests.tiny_models import DENSE_NAMES, MOE_NAMES, save_tiny_model, tiny_model


@pytest.mark.parametrize("name", [*MOE_NAMES, *DENSE_NAMES])
def test_names_on_disk_become_those_of_the_model_in_memory_and_back(name, tmp_path):
    model = tiny_model(name)
    family = families.for_model_type(model.config.model_type)
    names, found, stacks = DiskNames(family), set(), {}
    for tensor in disk_tensors(save_tiny_model(name, tmp_path)):
        if (place := split(tensor)) is None:
            found.add(tensor)
        elif expert := names.expert(place[1]):
            stack = "down_proj" if expert[0] == "down" else "gate_up_proj"
            stacks.setdefault(f"{place[0]}.{family.experts}.{stack}", set()).add(place[1])
        else:
            memory = names.in_memory(place[1])
            assert names.on_disk(memory) == place[1]
            found.add(f"{place[0]}.{memory}")
    for path, disk in stacks.items():
        stack = path.rpartition(".")[2]
        assert set(names.of_stack(stack, len(disk) // (2 if stack == "gate_up_proj" else 1))) == disk
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert found | stacks.keys() == model.state_dict().keys() - tied


def test_family_that_is_unknown_has_the_same_names_in_both_places():
    names = DiskNames(None)
    assert names.expert("mlp.experts.0.gate_proj.weight") is None
    assert names.in_memory("block_sparse_moe.gate.weight") == names.on_disk("block_sparse_moe.gate.weight")
