"""PyTorch's attention kernels for sequences of varied length, as its documentation defines them, without a GPU.

Inside :class:`LibraryAttention` the operators that a GPU would run compute on the CPU, pair by pair; derivatives too.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VARLEN = ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward")
EFFICIENT = ("aten::_efficient_attention_forward", "aten::_efficient_attention_backward")
CAUSAL_FROM_TOP_LEFT = 1


class LibraryAttention(TorchDispatchMode):
    """Stands in for the kernels.

    Attributes:
        calls: Name and arguments, by name, of each call of a forward.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().split(".")[0]
        if name not in VARLEN + EFFICIENT:
            return function(*arguments, **(keywords or {}))
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | (keywords or {})
        q, k, v = given["query"], given["key"], given["value"]
        is_efficient = name in EFFICIENT
        if is_efficient:
            assert q.shape[2] == k.shape[2]  # shares no heads
            q, k, v = q[0], k[0], v[0]
        attention = Attention(q, k, v, given, is_efficient)
        if name.endswith("backward"):
            upstream = next(value for key, value in given.items() if key.startswith("grad_out"))
            gradients = attention.backward(upstream[0] if is_efficient else upstream)
            return (*(x[None] for x in gradients), torch.empty(0)) if is_efficient else gradients
        self.calls.append((name, given))
        if is_efficient:
            assert given["compute_log_sumexp"]
            out, none = attention.forward()[None], torch.empty(0)
            return out, none, none, none, given["max_seqlen_q"], given["max_seqlen_k"]
        return attention.forward(), torch.empty(0), torch.zeros(2, dtype=torch.uint64)


class Attention:
    """Every pair inside a sequence that the arguments let be seen; heads of keys serve neighbours among the queries."""

    def __init__(self, q, k, v, given, is_efficient):
        if is_efficient:
            assert given["custom_mask_type"] == CAUSAL_FROM_TOP_LEFT
            assert given["dropout_p"] == 0
            offsets, longest, left = given["cu_seqlens_q"], given["max_seqlen_q"], -1
        else:
            assert q.shape[2] == v.shape[2] <= 256
            offsets, longest, (left, right) = given["cu_seq_q"], given["max_q"], given["window_size"]
            assert right == 0
            assert given["is_causal"] == (left == -1)
        assert offsets.dtype == torch.int32
        assert offsets[-1] == len(q)
        assert longest == int(offsets.diff().max())
        self.shared = q.shape[1] // k.shape[1]
        self.q, self.k, self.v = q, k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        self.scale = given["scale"] if given.get("scale") is not None else q.shape[2] ** -0.5
        place = torch.arange(len(q))
        sequence = torch.bucketize(place, offsets[1:], right=True)
        distance = place[:, None] - place[None]  # of a key before its query
        seen = (sequence[:, None] == sequence[None]) & (distance >= 0)
        seen &= (distance <= left) if left >= 0 else True
        scores = torch.einsum("qhd,khd->hqk", self.q, self.k) * self.scale
        self.weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)

    def forward(self):
        return torch.einsum("hqk,khd->qhd", self.weights, self.v)

    def backward(self, upstream):
        of_v = torch.einsum("hqk,qhd->khd", self.weights, upstream)
        of_weights = torch.einsum("qhd,khd->hqk", upstream, self.v)
        of_scores = self.weights * (of_weights - (of_weights * self.weights).sum(-1, keepdim=True)) * self.scale
        of_q = torch.einsum("hqk,khd->qhd", of_scores, self.k)
        of_k = torch.einsum("hqk,qhd->khd", of_scores, self.q)
        return of_q, *(x.unflatten(1, (-1, self.shared)).sum(2) for x in (of_k, of_v))
