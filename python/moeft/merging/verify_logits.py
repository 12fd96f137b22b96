"""Proof that a LoRA merge computes what base and adapters compute, by plain transformers and plain PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from moeft.merging.verify import SLACK, Proof, distance, load_plain, logits


def prove_logits(
    base: Path, adapters: Sequence[tuple[Path, float]], merged: Path, dtype: torch.dtype, input_ids: Tensor
) -> Proof:
    """Compare logits in float32, with one model in memory at a time.

    The merge rounds every weight that has a delta to the type of the output; nothing else may differ. So the bound is
    what rounding PEFT's own float32 merge costs on the same tokens, with 5 % for roundings that fall the other way as
    sums run in another order, and the float32 error of the comparison itself. That holds for the largest difference and
    for the root mean square, and the worse of them is the proof: a token that a rounding sends to another expert moves
    its own logits as far as a wrong weight does, but not those of all tokens.

    Args:
        base: Checkpoint that was merged into.
        adapters: Adapters, each with the factor of its delta.
        merged: The merged checkpoint.
        dtype: Type of the merged weights.
        input_ids: ``[B, S]`` tokens.
    """
    oracle = load_plain(base, torch.float32)
    before = oracle
    unmerged = None
    for adapter, factor in adapters:
        wrapped = PeftModel.from_pretrained(before, adapter)
        for module in wrapped.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and "default" in scaling:
                scaling["default"] *= factor
        # PEFT cannot have several adapters of experts active at once: all but the last are merged by it.
        unmerged = logits(wrapped, input_ids)
        before = wrapped.merge_and_unload()
    assert unmerged is not None
    exact = logits(before, input_ids)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.copy_(parameter.to(dtype))
    rounded = logits(before, input_ids)
    del before, oracle, wrapped
    got = logits(load_plain(merged, torch.float32), input_ids)
    proofs = [
        Proof(
            "logits of the merged checkpoint equal base and adapters in plain PEFT",
            measure(got, unmerged),
            1.05 * measure(rounded, unmerged) + SLACK * measure(exact, unmerged),
            unit,
            f"1.05 x what rounding PEFT's own merge to {str(dtype).removeprefix('torch.')} costs, and {SLACK:g} x the "
            "float32 error of the comparison",
        )
        for measure, unit in ((distance, "largest difference"), (_root_mean_square, "root mean square difference"))
    ]
    return max(proofs, key=lambda proof: (not proof.ok, proof.measured / (proof.tolerance or 1.0)))


def _root_mean_square(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()
