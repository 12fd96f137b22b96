"""The part of the trainer that writes and reads checkpoints: adapters and weights that train, and nothing frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from moeft.errors import CheckpointError
from moeft.integration import stacking
from moeft.training import trained_weights
from moeft.training.sharding import shard_on_cpu

FSDP_OPTIMIZER_FILES = ("optimizer.bin", "optimizer_0")


class TrainableCheckpoints(Trainer):
    """Trainer whose checkpoints hold what trains, put together from the shards of all processes."""

    model: Any

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the weights."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def trains_base(self) -> bool:
        """Whether weights of the model itself train, beside an adapter or without one."""
        return any(p.requires_grad and ".lora_" not in name for name, p in self.model.named_parameters())

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate; see ``transformers.Trainer``."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def save_adapter(self, folder: str | Path, names: Sequence[str] = ("default",)) -> None:
        """Save adapters, the newest alone by default, in PEFT's layout; every process must call it."""
        weights = trained_weights.gather(self.model) if self.is_sharded else None
        self.model.save_pretrained(
            str(folder), selected_adapters=list(names), state_dict=weights, is_main_process=self.args.should_save
        )

    def save_trained_weights(self, folder: str | Path) -> None:
        """Save the weights of the model itself that train; every process must call it."""
        weights = trained_weights.of_base(trained_weights.gather(self.model))
        if self.args.should_save:
            trained_weights.save(weights, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapters in PEFT's layout, and of the model's own weights those that train."""
        folder = self.args.output_dir if output_dir is None else output_dir
        has_adapter = isinstance(self.model, PeftModel)
        if has_adapter and self.is_sharded:
            self._save(folder, state_dict=trained_weights.gather(self.model))
        elif has_adapter or not self.trains_base:
            super().save_model(folder, _internal_call)
        if self.trains_base:
            self.save_trained_weights(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the frozen model too, all of it, at every checkpoint.
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            files = (FSDP_OPTIMIZER_FILES, (OPTIMIZER_NAME,))
            own, other = files if self.is_fsdp_enabled else reversed(files)
            found = {path.name for path in Path(checkpoint).iterdir()}
            if found.isdisjoint(own) and not found.isdisjoint(other):
                raise CheckpointError(
                    f"{checkpoint} holds the optimiser state of a run {'without' if self.is_fsdp_enabled else 'with'} "
                    "FSDP; continue as it was started, or begin a new run from its weights"
                )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # its checkpoints hold the shards of all processes
            super()._load_best_model()
            return
        # Trainer looks for files of whole models, and of one adapter.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            # Called twice: before the model is sharded, and after.
            trained_weights.load(self.model, folder, adapters=True)
            return
        # Of a stack, transformers 5.17 leaves out the adapter `default`, and later ones activate the first one alone.
        if isinstance(self.model, PeftModel) and len(self.model.peft_config) > 1:
            stacking.restore(self.model, folder)
        elif isinstance(self.model, PeftModel) or not self.trains_base:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.trains_base:
            trained_weights.load(self.model, folder)
