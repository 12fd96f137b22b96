"""Pairwise accuracy on held-out hard pairs before and after ``moeft dpo``, on the embedded MoE after ``moeft sft``.

For each seed: train the demo's adapter on ops-agent rows, build hard pairs from those rows and held-out pairs
from requests whose combinations never occur in training, tune a second adapter, and measure.

    python benches/preference.py [--seeds 3] [--sft-steps 200] [--dpo-steps 80] [--pairs 390] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness import machine
from moeft.config.dpo import DpoRecipe
from moeft.demo.ops_schema import ops_tools
from moeft.demo.run import prepare
from moeft.runs import dpo, sft
from moeft.runs.hard import BuildSettings, Toolbox, build_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--dpo-steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=390, help="to train on; a third as many are held out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo does
    out = options.out or Path(tempfile.mkdtemp(prefix="preference-"))
    print(json.dumps(machine()))
    gains = []
    for seed in range(options.seeds):
        row = measure(out / f"seed-{seed}", seed, options)
        gains.append(row["after"]["log_probs/accuracy"] - row["before"]["log_probs/accuracy"])
        print(json.dumps(row))
    print(f"pairwise accuracy rose by {min(gains):.1%} to {max(gains):.1%} over {len(gains)} seeds")


def measure(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures of one seed."""
    recipe = prepare(folder, seed, show=lambda text: None)
    training = recipe.training | {"max_steps": options.sft_steps, "disable_tqdm": True, "use_cpu": True}
    tuned = recipe.model_copy(update={"training": training, "merge": None, "evaluation": type(recipe.evaluation)()})
    if not (folder / "run" / "adapter").is_dir():
        sft.run(tuned, show=lambda text: None)
    write_pairs(folder, seed, options.pairs)
    start = time.perf_counter()
    run = dpo.run(
        DpoRecipe.model_validate(
            {
                "model": recipe.model,
                "output": folder / "dpo",
                "dtype": recipe.dtype,
                "lora": {"rank": 8, "stack_on": (folder / "run" / "adapter",)},
                "data": {"train": (folder / "pairs.jsonl",), "eval": folder / "heldout-pairs.jsonl", "max_length": 512},
                "preference": {"beta": 0.1, "sft_weight": 0.1},
                "training": {
                    "max_steps": options.dpo_steps,
                    "per_device_train_batch_size": 8,
                    "learning_rate": 1e-3,
                    "logging_steps": 10,
                    "save_strategy": "no",
                    "seed": seed,
                    "use_cpu": True,
                    "disable_tqdm": True,
                },
            }
        ),
        show=lambda text: None,
    )
    held_out = run.read_json("metrics.json")["heldout"]
    return {"seed": seed, "dpo_seconds": round(time.perf_counter() - start, 1), **held_out}


def write_pairs(folder: Path, seed: int, pairs: int) -> None:
    """Pairs to train on from rows of supervised training, and held-out pairs from its held-out requests."""
    (folder / "tools.json").write_text(json.dumps(ops_tools()))
    tools = Toolbox.read(folder / "tools.json", "bracket")
    held_out = folder / "data" / "heldout.jsonl"
    for rows, name, count, exclude in (
        (held_out, "heldout-pairs.jsonl", pairs // 3, ()),
        (folder / "data" / "train.jsonl", "pairs.jsonl", pairs, (held_out,)),
    ):
        if not (folder / name).exists():
            settings = BuildSettings(count, seed=seed)
            build_pairs(tools, rows, folder / name, settings, exclude=exclude, show=lambda text: None)


if __name__ == "__main__":
    main()
