"""Remake ``mergekit.safetensors``: what mergekit 0.1.5 makes of small models.

Run it where mergekit is importable: ``python tests/vectors/make_mergekit.py``. mergekit computes in float32 and writes
bfloat16, as ours does.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.mergekit_cases import CASES, run_mergekit, save_models

VECTORS = Path(__file__).parent / "mergekit.safetensors"


def main() -> None:
    """Run every case and store the tensors of its output under ``case/name``."""
    vectors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_models(folder)
        for name, recipe in CASES.items():
            run_mergekit(recipe, folder, folder / name)
            for file in (folder / name).glob("*.safetensors"):
                vectors |= {f"{name}/{key}": value.clone() for key, value in load_file(file).items()}
    save_file(vectors, VECTORS, {"mergekit": "0.1.5"})


if __name__ == "__main__":
    main()
