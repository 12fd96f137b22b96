"""Proofs about an adapter and the checkpoint merged from it, against plain transformers and plain PEFT.

Tolerances are derived, not chosen: the rounding error of the oracle itself, measured on the same inputs, times a small
factor that each proof states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeft.errors import ProofError
from moeft.integration.experts_implementation import takes_grouped_mm
from moeft.kernels import nf4
from moeft.merging.tensors import DiskTensors, same_bytes
from moeft.modules import PackedModule
from moeft.modules.nf4_experts import STACKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many times the oracle's own rounding error ours may be: both are sums of as many roundings in another order, so
# their sizes agree to a factor near one; the largest of many logits varies by another two.
SLACK = 4.0


@dataclass(frozen=True)
class Proof:
    """One statement, measured."""

    name: str
    measured: float
    tolerance: float
    unit: str
    how: str

    @property
    def ok(self) -> bool:
        """Whether the statement holds."""
        return self.measured <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain types for a metrics file."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        verdict = "ok    " if self.ok else "FAILED"
        return f"{verdict} {self.name}: {self.measured:.3g} {self.unit} (at most {self.tolerance:.3g}: {self.how})"


def require(proofs: list[Proof]) -> None:
    """Raise unless every proof holds.

    Raises:
        ProofError: Listing those that do not.
    """
    failed = [str(proof) for proof in proofs if not proof.ok]
    if failed:
        raise ProofError("\n".join(failed))


def prove(base: Path, tuned: PeftModel, adapter: Path, merged: Path, rows: Sequence[Sequence[int]]) -> list[Proof]:
    """All proofs about an adapter and its merge, on rows of token ids cut to the shortest."""
    length = min(map(len, rows))
    input_ids = torch.tensor([list(row[:length]) for row in rows])
    return prove_adapter(base, tuned, adapter, input_ids) + prove_merge(base, adapter, merged, input_ids)


def prove_adapter(base: Path, tuned: PeftModel, adapter: Path, input_ids: Tensor) -> list[Proof]:
    """Show that plain PEFT uses the whole adapter and computes what the packed model computes.

    Args:
        base: 16-bit checkpoint that was packed.
        tuned: The packed model with the adapter, as it was saved. It is moved to the CPU and to float32, in which the
            proofs compute; packed weights stay packed.
        adapter: The saved adapter.
        input_ids: ``[B, S]`` tokens to compute logits of.
    """
    saved = load_peft_weights(str(adapter), device="cpu")
    loaded = PeftModel.from_pretrained(load_plain(base, torch.bfloat16), adapter)
    in_model = {name.replace(".default.", "."): p for name, p in loaded.named_parameters() if ".lora_" in name}
    unused = set(saved) ^ set(in_model)
    unused |= {name for name in saved.keys() & in_model if not torch.equal(saved[name], in_model[name].to(saved[name]))}
    del loaded, in_model

    tuned = tuned.to("cpu").float()
    tuned_f32 = logits(tuned, input_ids)
    oracle = PeftModel.from_pretrained(_with_rounded_weights(base, tuned), adapter)
    theirs_f32 = logits(oracle, input_ids)
    oracle.get_base_model().set_experts_implementation("eager")  # the only one that computes in float64
    exact = logits(oracle.double(), input_ids)
    return [
        Proof("plain PEFT loads every adapter key on the bf16 base", len(unused), 0, "keys unused", "all must be used"),
        Proof(
            "logits equal plain PEFT on the NF4-rounded weights",
            distance(tuned_f32, exact),
            SLACK * distance(theirs_f32, exact),
            "largest difference from float64",
            f"{SLACK:g} x the float32 rounding error of PEFT itself",
        ),
    ]


def prove_merge(base: Path, adapter: Path, merged: Path, input_ids: Tensor) -> list[Proof]:
    """Show that a merged checkpoint holds the base, the adapter, and nothing else.

    Args:
        base: 16-bit checkpoint that was merged into.
        adapter: The adapter.
        merged: The merged checkpoint.
        input_ids: ``[B, S]`` tokens to compute logits of.
    """
    oracle = PeftModel.from_pretrained(load_plain(base, torch.float32), adapter)
    unmerged = logits(oracle, input_ids)
    touched = {name.partition(".lora_")[0] for name in load_peft_weights(str(adapter), device="cpu")}
    touched = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in touched}
    theirs = oracle.merge_and_unload()
    ours = load_plain(merged, torch.float32)
    farthest = _half_steps_apart(ours, theirs, touched)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded, got = logits(theirs, input_ids), logits(ours, input_ids)
    return [
        Proof(
            "untouched tensors are byte-identical to the base",
            sum(1 for _ in _changed_tensors(base, merged, touched)),
            0,
            "tensors changed",
            "none may change",
        ),
        Proof(
            "merged weights are PEFT's float32 merge, rounded once",
            farthest,
            1,
            "half bf16 steps at the farthest element",
            "rounding to nearest moves a value by no more",
        ),
        Proof(
            "logits of the merged checkpoint equal plain PEFT on the bf16 base",
            distance(got, unmerged),
            1.05 * distance(rounded, unmerged),
            "largest difference",
            "what rounding PEFT's own merge to bf16 costs, and 5 % for sums in another order",
        ),
    ]


def load_plain(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A checkpoint in plain transformers, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if not takes_grouped_mm(p for name, p in model.named_parameters() if name.endswith(STACKS)):
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model: Any, input_ids: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` in float64."""
    return model.eval()(input_ids=input_ids, use_cache=False).logits.double()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors."""
    return (a - b).abs().max().item()


@torch.no_grad()
def _with_rounded_weights(base: Path, packed: PeftModel) -> PreTrainedModel:
    """An ordinary float32 model that holds the values a packed model restores."""
    plain = load_plain(base, torch.float32)
    for path, module in packed.get_base_model().named_modules():
        if isinstance(module, PackedModule):
            target = plain.get_submodule(path.replace(".base_layer", ""))
            for name in module.packed_shapes:
                nf4.dequantize(module.packed_weight(name), out=getattr(target, name).data)
    return plain


def _half_steps_apart(ours: Any, theirs: Any, touched: set[str]) -> float:
    """Largest distance of a merged bf16 weight from the float32 merge, in half steps of bf16 at that value.

    The two float32 sums run over the rank in another order; the last bit of the largest value is granted for that.
    """
    farthest = 0.0
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[0] in touched:
            exact = expected[name].detach()
            noise = exact.abs().max() * torch.finfo(torch.float32).eps
            half_step = torch.exp2(exact.abs().clamp(min=torch.finfo(torch.float32).tiny).log2().floor() - 8)
            apart = ((parameter.detach() - exact).abs() - noise) / half_step
            farthest = max(farthest, apart.max().item())
    return farthest


def _changed_tensors(base: Path, merged: Path, touched: set[str]) -> Iterator[str]:
    """Tensors that no delta belongs to and that are not byte-identical, and names on disk that are gone or new."""
    yield from DiskTensors(base).names ^ DiskTensors(merged).names
    before, after = load_plain(base, "auto").state_dict(), load_plain(merged, "auto").state_dict()
    for name, tensor in before.items():
        if name.rpartition(".")[0] not in touched and not same_bytes(tensor, after[name]):
            yield name
