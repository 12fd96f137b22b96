"""FSDP2 over models with packed weights: which modules are sharded, and which every process holds whole."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from moeft.integration.checkpointing import decoder_layers
from moeft.kernels import dispatch
from moeft.modules import PackedModule


def shard_on_cpu(trainer: Any) -> None:
    """Let FSDP shard on the CPU too, where it is asked for and accelerate falls back to DDP without a word.

    PyTorch's kernels compute then: the memory of a tensor that the Rust core has seen as an array cannot be resized, as
    FSDP does with what it gathered.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    os.environ[dispatch.VARIABLE] = "pytorch"


def prepare_fsdp(accelerator: Any, model: nn.Module) -> None:
    """Tell accelerate's FSDP plugin what to shard: each decoder layer on its own, without its packed weights.

    Packed weights are replicated. FSDP casts what it gathers to the compute type, which would turn codes into numbers,
    and their statistics are buffers, which it never shards; in 4 bit the gain would be smallest and the traffic, a
    gather of all experts in every pass, largest.

    Args:
        accelerator: Of the trainer, with an FSDP plugin.
        model: The model to train, with its adapters.

    Raises:
        ValueError: If the plugin is of FSDP 1, which cannot leave parameters out one by one.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("moeft trains under FSDP 2; set fsdp_version: 2 in the configuration of accelerate")
    if not plugin.transformer_cls_names_to_wrap:
        # transformers names layers of all modalities, of which a text model has only some.
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in decoder_layers(model)})
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    if packed:
        for module in packed:
            module.to(accelerator.device)
        plugin.ignored_modules = packed
