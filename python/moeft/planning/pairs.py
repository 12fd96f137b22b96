"""Memory of preference pairs beside that of other rows: states of answers, and the pass that the reference takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeft.planning import activations, transients
from moeft.planning.layers import Layer, Traits
from moeft.planning.settings import Settings
from moeft.planning.weights import FLOAT_BYTES


def answer_state_bytes(hidden: int, settings: Settings) -> int:
    """States from which compared tokens are predicted, gathered by pair and answer."""
    return FLOAT_BYTES[settings.dtype] * settings.tokens * hidden


def forward_pass_bytes(
    layers: Sequence[Layer], traits: Traits, vocabulary: int, workspace: int, settings: Settings
) -> int:
    """Most bytes beside weights in a pass without gradients over ``forward_batch_size`` pairs.

    Nothing is kept from layer to layer but the hidden states; in a layer, at most what it would keep for its backward
    pass is alive, with the restored weights and the output of every routed row.
    """
    settings = replace(settings, batch_size=settings.forward_batch_size)
    element, hidden = FLOAT_BYTES[settings.dtype], layers[-1].hidden
    states = element * settings.tokens * hidden
    in_layer = max(
        activations.layer_bytes(layer, traits, settings) + element * settings.tokens * layer.top_k * layer.hidden
        for layer in layers
    )
    in_head = transients.loss_head_bytes(vocabulary, hidden, settings) + answer_state_bytes(hidden, settings)
    return 2 * states + transients.mask_bytes(layers, settings) + max(in_layer + workspace, in_head)
