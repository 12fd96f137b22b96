"""Log-probabilities of many token sequences: common beginnings run once, and the head runs on scored tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moeft.evaluation.prefix_tree import Scored, Tree, trees
from moeft.evaluation.turn_scores import evaluating
from moeft.integration.log_probs import edge_log_probs
from moeft.integration.tree_masks import reads_trees, tree_mask

CPU_ROW_TOKENS, GPU_ROW_TOKENS = 512, 4096


class Scorer:
    """Scores sequences under one model.

    Where the model takes a mask, sequences share rows as prefix trees; otherwise each is a row of its own, which
    costs time and changes no score.

    Args:
        model: A causal language model of transformers with a linear head, with or without adapters.
        row_tokens: Tokens of a row, about; by default 512 on a CPU, where longer rows gain nothing, else 4096.

    Attributes:
        shares: Whether common beginnings run once.
    """

    def __init__(self, model: Any, row_tokens: int | None = None) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model, self._base = model, base
        self._device = base.get_input_embeddings().weight.device
        self.row_tokens = row_tokens or (CPU_ROW_TOKENS if self._device.type == "cpu" else GPU_ROW_TOKENS)
        with evaluating(model):
            self.shares = reads_trees(base)

    def score(self, sequences: Sequence[Scored]) -> Iterator[tuple[int, float]]:
        """Yield the index of each sequence and the sum of its log-probabilities in nats, as rows are done.

        Raises:
            UnsupportedModelError: If the head is no linear layer.
        """
        for tree in trees(sequences, self.row_tokens, self.shares):
            # A model that is trained meanwhile is in its own mode between rows.
            with evaluating(self._model), torch.inference_mode():
                log_probs_E = self._run(tree)
            for number, edges in tree.sequences.items():
                yield number, float(log_probs_E[edges].sum())

    def _run(self, tree: Tree) -> torch.Tensor:
        """Log-probability of every edge, float64 on the CPU."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([tree.tokens], device=self._device)}
        if not tree.is_chain:
            depth_S = torch.tensor(tree.depths, device=self._device)
            ancestors_SS = torch.from_numpy(tree.ancestors()).to(self._device)
            inputs |= {
                "position_ids": depth_S[None],
                "attention_mask": tree_mask(self._base, ancestors_SS, depth_S),
            }
        places_E, labels_E = torch.tensor(list(tree.edges)).unbind(1)
        return edge_log_probs(self._model, places_E, labels_E, **inputs).double().cpu()
