"""Attention-only tuning with the gate beside tuning of every weight: what is gained and what is lost, in one report.

    python benches/capability_preserving.py --folder /tmp/kept --data ../shared/data
    python benches/capability_preserving.py --folder /tmp/kept-smollm2 --data ../shared/data --model smollm2-135m

The folder gets the rows, ``recipes/demo-capability-preserving.yaml`` and the run; a second start goes on. The embedded
MoE, which grew up on Shakespeare and speeches, is taught replies of assistants; an instruct model given by ``--model``
is taught Shakespeare. What the one is taught, the other must keep. The questions and texts of the report are none of
those that the gate asks.
"""

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from moeft.config import document
from moeft.config.pipeline import PipelineRecipe
from moeft.data.reading import read_rows
from moeft.demo import ops_agent
from moeft.demo.run import BASE
from moeft.evaluation import suite
from moeft.evaluation.tasks.perplexity import detokenise, wikitext_file
from moeft.runs.pipeline import run

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-capability-preserving.yaml"
LONGEST = 1000
"""Characters of a conversation, so that a step on a CPU stays short."""
HELDOUT = 40


def prepare(folder: Path, model: Path, data: Path, questions: int) -> None:
    """Write rows and recipe, and link the model."""
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(model.absolute(), target_is_directory=True)
    plays, plays_heldout = (plain(read_rows(data / "tinychat" / f"{name}.jsonl").rows) for name in ("train", "val"))
    replies = exchanges(lines(data / "toolcall" / "glaive_300.jsonl"))
    replies_heldout, replies = replies[:HELDOUT], replies[HELDOUT:]
    is_demo = model == BASE
    target, heldout = (replies, replies_heldout) if is_demo else (plays, plays_heldout)
    general = plays_heldout if is_demo else replies_heldout
    ops_agent.write_jsonl(target, rows / "target.jsonl")
    ops_agent.write_jsonl(heldout[:HELDOUT], rows / "target-heldout.jsonl")
    ops_agent.write_jsonl(general[:HELDOUT], rows / "general-heldout.jsonl")
    asked = {row["idx"] for row in lines(suite.HELLASWAG)}
    others = [row for row in lines(data / "hellaswag" / "hellaswag_val_2000.jsonl") if row["idx"] not in asked]
    ops_agent.write_jsonl(random.Random(0).sample(others, questions), rows / "hellaswag.jsonl")
    pages = (detokenise(page["page"]) for _, page in wikitext_file(data / "wikitext2" / "test.txt"))
    ops_agent.write_jsonl([{"text": page[: LONGEST // 2]} for page in pages][:HELDOUT], rows / "texts.jsonl")
    shutil.copy(RECIPE, folder / RECIPE.name)


def lines(path: Path) -> list[Any]:
    """Rows of JSON lines."""
    # splitlines() would also split at U+2028, which JSON's strings may hold.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def exchanges(conversations: Iterable[dict[str, Any]]) -> list[Any]:
    """Requests with the assistant's next words, without calls of tools, the short ones, each once."""
    found = {}
    for row in conversations:
        turns = row["conversations"]
        for asked, said in itertools.pairwise(turns):
            if (asked["from"], said["from"]) == ("human", "gpt") and len(asked["value"] + said["value"]) <= LONGEST:
                found[asked["value"]] = said["value"]
    pairs = ([{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in found.items())
    return [{"messages": pair} for pair in pairs]


def plain(rows: Iterable[Any]) -> list[Any]:
    """Conversations that end with the assistant, the short ones."""
    messages = ([{"role": m["role"], "content": m["content"]} for m in row.messages] for row in rows)
    return [{"messages": m} for m in messages if sum(len(str(turn["content"])) for turn in m) <= LONGEST]


def fit(folder: Path, steps: int | None, is_dense: bool, rate: float) -> None:
    """Fit the copied recipe to a length, and to a dense model of some hundred million parameters on a CPU."""
    content = document.read(folder / RECIPE.name)
    naive, gated = (content["stages"][name]["sft"] for name in ("naive", "gated"))
    for recipe in (naive, gated):
        if steps is not None:
            recipe["training"]["max_steps"] = steps
        if is_dense:
            recipe["train"] = [role for role in recipe["train"] if role not in ("experts", "router")]
            recipe["training"] |= {"per_device_train_batch_size": 4, "warmup_steps": 4}
            recipe["data"]["max_length"] = 128
    if steps is not None:
        gated["gate"]["every_steps"] = max(steps // 6, 1)
    if is_dense:
        naive["training"]["learning_rate"] = rate
        gated["range_test"] = {"lowest": rate / 10, "highest": rate, "steps": 4}
        gated["gate"] |= {"every_steps": steps, "budget": None}
    (folder / RECIPE.name).write_text(yaml.safe_dump(content, sort_keys=False))


def main() -> None:
    """Prepare the folder and run, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the project's test data")
    parser.add_argument("--model", type=Path, default=BASE, help="an instruct model; the demo's base by default")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--steps", type=int, help="150 by default, and 40 with --model")
    parser.add_argument("--rate", type=float, default=1e-4, help="with --model: of the run that trains every weight")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare(arguments.folder, arguments.model, arguments.data, arguments.questions)
    is_dense = arguments.model != BASE
    fit(arguments.folder, arguments.steps or (40 if is_dense else None), is_dense, arguments.rate)
    run(PipelineRecipe.load(arguments.folder / RECIPE.name))


if __name__ == "__main__":
    main()
