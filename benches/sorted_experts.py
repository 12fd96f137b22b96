"""A forward of Gemma-4 experts that sorts the rows by expert: equal to the stock one, and fast to train on a CPU."""

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextRouter

# T tokens, K experts per token, R = T*K rows, E experts, H hidden, F expert hidden


def use_sorted_experts() -> None:
    """Replace the forward of all Gemma-4 experts in this process."""
    Gemma4TextExperts.forward = _forward


def record_routing(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Record the routing of every forward.

    Returns:
        A list that gains, per layer, the router's probabilities ``[T, E]`` and the chosen experts ``[T, K]``; the
        caller clears it.
    """
    routings: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, Gemma4TextRouter):
            module.register_forward_hook(lambda _module, _inputs, output: routings.append((output[0], output[2])))
    return routings


def _forward(self: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    tokens, top_k = index_TK.shape
    order_R = index_TK.flatten().argsort(stable=True)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    counts = torch.bincount(index_TK.flatten(), minlength=self.num_experts).tolist()
    # unbind, not indexing: its backward writes one stacked gradient, not a full-size one per expert.
    gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    outputs = []
    for expert, rows_RH in enumerate(hidden_TH[order_R // top_k].split(counts)):
        gate, up = nn.functional.linear(rows_RH, gate_up[expert]).chunk(2, dim=-1)
        outputs.append(nn.functional.linear(self.act_fn(gate) * up, down[expert]))
    output_TKH = torch.cat(outputs)[inverse_R].view(tokens, top_k, -1)
    return torch.einsum("tkh,tk->th", output_TKH, weights_TK.to(output_TKH.dtype))
