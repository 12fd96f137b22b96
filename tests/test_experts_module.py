"""An experts module is used only if it computes what its attributes and its family's file say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeft import families
from moeft.errors import UnsupportedModelError
from moeft.integration import experts_module
from moeft.kernels import ClampedSwiglu, ExpertLayout
from tests.tiny_models import MOE_NAMES, UNKNOWN_NAMES, tiny_model


def experts_of(family: str) -> nn.Module:
    return next(module for module in tiny_model(family).modules() if experts_module.is_fused(module))


@pytest.mark.parametrize("name", MOE_NAMES)
def test_every_family_file_says_what_transformers_builds(name):
    module = experts_of(name)
    spec = experts_module.read("experts", module, families.for_model_type(module.config.model_type))
    if name == "gpt_oss":
        assert spec == experts_module.ExpertsModule(
            ExpertLayout(True, True), ClampedSwiglu(module.alpha, module.limit), True
        )
    else:
        layout = ExpertLayout(transposed=name == "aria")
        assert spec == experts_module.ExpertsModule(layout, module.act_fn, False)


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
def test_attributes_suffice_without_a_family_file(name):
    assert experts_module.read("experts", experts_of(name)).layout == ExpertLayout(False, False)


def test_module_is_read_on_the_meta_device():
    assert experts_module.read("experts", experts_of("gpt_oss").to("meta")).biased


def transpose_flag(module):
    module.is_transposed = True


def swap_stacks(module):
    module.gate_up_proj, module.down_proj = module.down_proj, module.gate_up_proj


def other_gate(module):
    module._apply_gate = lambda h: h.chunk(2, dim=-1)[0]


def other_order(module):
    module._apply_gate = lambda h: module.act_fn(h.chunk(2, dim=-1)[1]) * h.chunk(2, dim=-1)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: setattr(module, "has_gate", False), r"'has_gate': False.*NF4Config\(experts=False"),
        (lambda module: setattr(module, "has_post_expert_norm", True), "'has_post_expert_norm': True"),
        (lambda module: setattr(module, "is_sparse", True), r"\['is_sparse'\]"),
        (lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(3))), r"parameters \['scale'\]"),
        (
            lambda module: module.register_parameter("down_proj", None),
            "not hold gate_up_proj, down_proj",
        ),
        (transpose_flag, r"gate_up_proj \[5, 40, 64\] and down_proj \[5, 64, 20\], expected \[E, H, 2I\]"),
        (swap_stacks, r"expected \[E, 2I, H\]"),
        (other_gate, "_apply_gate gives neither"),
        (other_order, "_apply_gate gives neither"),
    ],
)
def test_what_is_not_known_is_refused_and_named(change, message):
    module = experts_of("qwen3_moe")
    change(module)
    with pytest.raises(UnsupportedModelError, match=message):
        experts_module.read("model.layers.0.mlp.experts", module)


def test_layout_that_differs_from_the_family_file_is_named():
    with pytest.raises(UnsupportedModelError, match="transposed is True, expected False; interleaved is True"):
        experts_module.read("experts", experts_of("gpt_oss"), families.for_model_type("qwen3_moe"))
