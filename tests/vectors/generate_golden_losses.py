"""Write golden_losses.json: the training losses of 20 steps on a tiny packed model of each family, float32.

Run: python -m tests.vectors.generate_golden_losses
Only a change that is meant to change the numbers may change the file; its commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.tiny_models import save_tiny_model
from tests.tiny_training import losses, packed_with_lora, sft_trainer

GOLDEN_LOSSES = Path(__file__).with_name("golden_losses.json")


def golden_losses(checkpoint: Path, folder: Path) -> list[float]:
    """Losses of the run; the seeds are those of tests/tiny_models.py and tests/tiny_training.py."""
    trainer = sft_trainer(packed_with_lora(checkpoint), folder, max_steps=20, lr_scheduler_type="cosine")
    trainer.train()
    return losses(trainer)


def main() -> None:
    from tests.tiny_models import FAMILY_NAMES

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        recorded = {
            family: golden_losses(save_tiny_model(family, root / family), root / "run") for family in FAMILY_NAMES
        }
    GOLDEN_LOSSES.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
