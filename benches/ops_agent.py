"""The ops pipeline on the embedded MoE: supervised calls, preference pairs, and rounds against what still fails.

    python benches/ops_agent.py --folder /tmp/ops-agent [--set stages.rounds.hard-rounds.rounds=2]

The folder gets the rows, ``recipes/demo-ops.yaml`` and the run; a second start goes on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from moeft.config.pipeline import PipelineRecipe
from moeft.demo import ops_agent, style_rows
from moeft.demo.ops_schema import ops_tools
from moeft.demo.run import BASE, THREADS
from moeft.runs.pipeline import run

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-ops.yaml"
TRAIN_ROWS, HELDOUT_ROWS, GENERAL_ROWS = 3000, 100, 40


def prepare(folder: Path, seed: int) -> Path:
    """Write rows, schemas and the recipe, and link the base; returns the recipe."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(BASE, target_is_directory=True)
    train, heldout = ops_agent.generate(seed, TRAIN_ROWS, HELDOUT_ROWS)
    general, _ = style_rows.generate(seed, GENERAL_ROWS, 1)
    for name, rows in (("calls", train), ("calls-heldout", heldout), ("general", general)):
        ops_agent.write_jsonl(rows, folder / "rows" / f"{name}.jsonl")
    (folder / "tools.json").write_text(json.dumps(ops_tools()))
    return Path(shutil.copy(RECIPE, folder / RECIPE.name))


def main() -> None:
    """Prepare, run, and print the report's tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="values of the recipe to replace"
    )
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    done = run(PipelineRecipe.load(prepare(options.folder, options.seed), options.set))
    print((done.path / "report.md").read_text().partition("## Stages")[0])


if __name__ == "__main__":
    main()
