"""Whether the instruct-safe merge keeps the instruct score while the style moves, beside the unprotected merge.

    python benches/instruct_safe_merge.py --folder /tmp/instruct-safe [--seeds 3]
    python benches/instruct_safe_merge.py --folder /tmp/instruct-safe --model gemma3-270m --rows sharegpt.jsonl

The folder gets the rows, the recipe of ``recipes/demo-instruct-safe-merge.yaml`` and the run; a second start goes on.
With ``--model``, a dense base without instruct tuning: conversations of ``--rows`` are what it is taught and must keep.
"""

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from moeft.config import document
from moeft.config.pipeline import PipelineRecipe
from moeft.data.reading import read_rows
from moeft.demo import ops_agent, style_rows
from moeft.demo.run import BASE
from moeft.runs.pipeline import run

RECIPES = Path(__file__).parent.parent / "recipes"
PIPELINE, STYLE = "demo-instruct-safe-merge.yaml", "demo-style-sft.yaml"
LONGEST_REPLY = 300
"""Characters of a conversation's reply, so that a step on a CPU stays short."""


def prepare(folder: Path, model: Path, instruct: tuple[list[Any], list[Any]]) -> None:
    """Write rows and recipes, and link the base."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(model.absolute(), target_is_directory=True)
    style, heldout = style_rows.generate(0, 360, 60)
    rows = {"instruct": instruct[0], "instruct-heldout": instruct[1], "style-heldout": heldout}
    rows |= {f"style-{part}": style[part::4] for part in range(4)}
    for name, content in rows.items():
        ops_agent.write_jsonl(content, folder / "rows" / f"{name}.jsonl")
    for name in (PIPELINE, STYLE):
        shutil.copy(RECIPES / name, folder / name)


def conversations(path: Path, count: int) -> list[Any]:
    """First requests and replies of a file, the short ones."""
    pairs = (row.messages[:2] for row in read_rows(path, turns="any").rows)
    plain = ([{"role": m["role"], "content": m["content"]} for m in pair] for pair in pairs)
    short = (pair for pair in plain if sum(len(str(m["content"])) for m in pair) < LONGEST_REPLY)
    right = (pair for pair in short if [m["role"] for m in pair] == ["user", "assistant"])
    return [{"messages": pair} for pair in itertools.islice(right, count)]


def make_dense(folder: Path, steps: int) -> None:
    """Fit the copied recipes to a dense model of some hundred million parameters on a CPU."""
    content, style = document.read(folder / PIPELINE), document.read(folder / STYLE)
    for recipe in (content["stages"]["instruct"]["sft"], style):
        recipe["lora"]["targets"] = ["attention", "mlp"]
        recipe["training"] |= {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 5e-4}
    content["stages"]["instruct"]["sft"]["training"]["max_steps"] = 2 * steps
    content["stages"]["fisher"]["fisher"] |= {"rows": 16, "memory": "2GiB"}
    content["stages"]["subspace"]["subspace"]["targets"] = ["attention", "mlp"]
    del content["stages"]["comparison"]["compare"]["tool_calls"]
    for name, recipe in ((PIPELINE, content), (STYLE, style)):
        (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))


def main() -> None:
    """Prepare, run, and print the report's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="another base than the embedded one; needs --rows")
    parser.add_argument("--rows", type=Path, help="conversations for another base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each adapter of another base")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.model is None:
        prepare(options.folder, BASE, ops_agent.generate(0, 2000, 100))
    else:
        found = conversations(options.rows, 240)
        prepare(options.folder, options.model, (found[40:], found[:40]))
        make_dense(options.folder, options.steps)
    seeds = json.dumps(list(range(options.seeds)))
    done = run(PipelineRecipe.load(options.folder / PIPELINE, [f"seeds={seeds}"]))
    print((done.path / "report.md").read_text().partition("## Stages")[0])


if __name__ == "__main__":
    main()
