"""What every byte of a model is: component, dtype, parameters, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from moeft import families
from moeft.errors import AuditError
from moeft.integration import model_family
from moeft.modules import PackedModule

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "adapter"


@dataclass(frozen=True)
class AuditRow:
    """Parameters of one component that share a dtype."""

    component: str  # one of families.COMPONENTS, or "adapter"
    dtype: str  # "nf4", or the name of a torch dtype
    parameters: int  # elements of the weights as the model computes with them
    bytes: int  # what they occupy, statistics included


@dataclass(frozen=True)
class Audit:
    """The whole model, row by row. ``str()`` is a table."""

    rows: tuple[AuditRow, ...]

    @property
    def expert_bits(self) -> float:
        """Bits per expert parameter, statistics included; 0 for a model without experts."""
        experts = [row for row in self.rows if row.component == "experts"]
        parameters = sum(row.parameters for row in experts)
        return 8 * sum(row.bytes for row in experts) / parameters if parameters else 0.0

    def bytes_by_component(self) -> dict[str, int]:
        """Bytes of each component."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.component] = totals.get(row.component, 0) + row.bytes
        return totals

    def __str__(self) -> str:
        lines = [f"{'component':<12}{'dtype':<10}{'parameters':>15}{'bytes':>16}"]
        lines += [f"{row.component:<12}{row.dtype:<10}{row.parameters:>15,}{row.bytes:>16,}" for row in self.rows]
        parameters, total = sum(row.parameters for row in self.rows), sum(row.bytes for row in self.rows)
        lines.append(f"{'total':<22}{parameters:>15,}{total:>16,}")
        if self.expert_bits:
            lines.append(f"experts: {self.expert_bits:.3f} bits per parameter")
        return "\n".join(lines)


def audit(model: PreTrainedModel | PeftModel, strict: bool = False) -> Audit:
    """Account for every parameter and persistent buffer of a model.

    Args:
        model: A transformers model of a known family, with or without a PEFT adapter.
        strict: Require that every expert parameter is 4-bit.

    Raises:
        AuditError: With ``strict``, if experts are not 4-bit or there are none; the message holds the table.
        UnsupportedModelError: If the family is unknown.
    """
    family = model_family.of_model(model)
    totals: dict[tuple[str, str], list[int]] = {}
    for component, dtype, parameters, size in _tensors(model, family):
        entry = totals.setdefault((component, dtype), [0, 0])
        entry[0] += parameters
        entry[1] += size
    order = (*families.COMPONENTS, ADAPTER)
    rows = [AuditRow(*key, *entry) for key, entry in totals.items()]
    result = Audit(tuple(sorted(rows, key=lambda row: (order.index(row.component), row.dtype))))
    if strict:
        _require_packed_experts(result)
    return result


def _require_packed_experts(result: Audit) -> None:
    experts = [row for row in result.rows if row.component == "experts"]
    total = sum(row.bytes for row in experts)
    wide = sum(row.bytes for row in experts if row.dtype != "nf4")
    if not experts:
        raise AuditError(f"the model has no experts, so none can be shown to be 4-bit\n{result}")
    if wide:
        raise AuditError(
            f"{wide:,} of {total:,} expert bytes are not 4-bit; load the model with "
            f"quantization_config=moeft.NF4Config()\n{result}"
        )


def _tensors(model: nn.Module, family: families.Family) -> Iterator[tuple[str, str, int, int]]:
    """Component, dtype, parameters and bytes of every tensor that a checkpoint would hold, shared ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = model_family.name_in_base(path)
        packed = module.packed_members() if isinstance(module, PackedModule) else {}
        in_packed = {member for members in packed.values() for member in members}
        for name in packed:
            weight = module.packed_weight(name)
            yield family.component(f"{own}.{name}"), "nf4", weight.shape.numel(), weight.nbytes
        tensors = dict(module.named_parameters(recurse=False))
        tensors |= {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        for name, tensor in tensors.items():
            if name in in_packed or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            component = ADAPTER if ".lora_" in f".{path}" else family.component(f"{own}.{name}")
            yield component, str(tensor.dtype).removeprefix("torch."), tensor.numel(), tensor.nbytes
