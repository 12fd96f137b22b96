"""One layer of experts, forward and backward, with LoRA on every expert, beside PEFT and the frozen layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from harness import Case, Subject, peak_extra_bytes
from moeft.kernels import ExpertLora, LoraFactors, experts, nf4

TESTS = ("test_kernels_experts.py", "test_kernels_grouped_linear.py")
TOKENS, HIDDEN, INNER, EXPERTS, TOP_K, RANK = 512, 512, 256, 64, 8, 8
STACKS = ("gate_up_proj", "down_proj")


def cases() -> Iterator[Case]:
    """The layer in both types."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        yield _case(dtype, name)


def _case(dtype: torch.dtype, name: str) -> Case:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    layer = nn.ModuleDict({"experts": Qwen3MoeExperts(config).to(dtype)})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    packed = [nf4.quantize(getattr(layer["experts"], stack).detach()) for stack in STACKS]
    for stack, weight in zip(STACKS, packed, strict=True):
        getattr(layer["experts"], stack).data.copy_(nf4.dequantize(weight, dtype=dtype))
    dense = [getattr(layer["experts"], stack).detach().clone() for stack in STACKS]
    frozen = copy.deepcopy(layer["experts"]).requires_grad_(False)
    targets = [f"experts.{stack}" for stack in STACKS]
    theirs = get_peft_model(layer, LoraConfig(r=RANK, target_modules=[], target_parameters=targets))
    theirs = theirs.base_model.model["experts"]
    lora = _factors(theirs)

    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    index, weights = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices, torch.rand(TOKENS, TOP_K).to(dtype)

    def ours(stacks: list[Tensor | nf4.NF4Weight], lora: ExpertLora | None = None) -> Tensor:
        return experts(x, index, weights, *stacks, functional.silu, lora)

    # Both round what they keep to the dtype: a hundredth is far above that and far below a wrong expert.
    torch.testing.assert_close(ours(dense, lora), theirs(x, index, weights), rtol=1e-2, atol=1e-2)
    runs = {
        "moeft on NF4, LoRA": lambda: ours(packed, lora),
        "moeft on NF4, frozen": lambda: ours(packed),
        f"moeft on {name}, LoRA": lambda: ours(dense, lora),
        f"moeft on {name}, frozen": lambda: ours(dense),
        f"PEFT on {name}, LoRA": lambda: theirs(x, index, weights),
        f"transformers on {name}, frozen": lambda: frozen(x, index, weights),
    }
    steps = {label: (lambda run=run: run().sum().backward()) for label, run in runs.items()}
    for step in steps.values():
        step()
    return Case(
        f"experts, forward and backward, {name}: H {HIDDEN}, E {EXPERTS}, top {TOP_K}, I {INNER}, T {TOKENS}, r {RANK}",
        "tokens/s",
        {label: Subject(step, TOKENS) for label, step in steps.items()},
        {"peak_extra": {label: peak_extra_bytes(step) for label, step in steps.items()}},
    )


def _factors(wrapper: nn.Module) -> ExpertLora:
    """The factors that PEFT made, B no longer zero; the outer wrapper is that of down_proj."""
    pairs = {}
    for name, module in (("down", wrapper), ("gate_up", wrapper.base_layer)):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        nn.init.normal_(b, std=0.02)
        pairs[name] = LoraFactors(a, b, module.scaling["default"])
    return ExpertLora(**pairs)
