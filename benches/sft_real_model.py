"""``moeft sft`` on a real Gemma 3 beside plain transformers, PEFT and bitsandbytes: same rows, order, seeds and steps.

    python benches/sft_real_model.py --model GEMMA3 --rows SHAREGPT.json --out RESULTS.json

The recipe is ``recipes/gemma3-4b-response-only.yaml`` with model, rows and lengths replaced. Each run is a process of
its own, so that its peak of memory is known. Beside moeft on NF4 run plain PEFT on the 16-bit base with three seeds of
the adapter, whose spread is the noise that a difference is held against; and plain PEFT on the values that bitsandbytes
restores from NF4, which differs from moeft in the code alone. All compute in float32. ``--only`` starts some of them;
results of earlier starts in ``--out`` stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "recipes" / "gemma3-4b-response-only.yaml"
SEED = 3407
RUNS = ("moeft NF4", "plain 16-bit", "plain on NF4's values", "plain 16-bit, seed 1", "plain 16-bit, seed 2")


def main() -> None:
    """Run what is asked for, one process after another, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a Gemma 3 checkpoint")
    parser.add_argument("--rows", type=Path, required=True, help="conversations in any format")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=32, help="conversations at the end of the rows, held out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=RUNS, default=RUNS)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measured(args)))
        return
    found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in args.only:
        command = [sys.executable, __file__, "--run", name]
        for option in ("model", "rows", "out", "steps", "max_length", "heldout", "threads"):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "RAYON_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    show(found)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process, with its settings, time and peak of memory."""
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(args, Path(folder))
        start = time.perf_counter()
        result = with_moeft(recipe) if args.run == RUNS[0] else with_plain(recipe, args.run)
        seconds = time.perf_counter() - start
    settings = {"steps": args.steps, "max_length": args.max_length, "threads": args.threads, "torch": torch.__version__}
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result | {"peak_bytes": peak_bytes, "seconds": seconds, "settings": settings}


def load_recipe(args: argparse.Namespace, folder: Path) -> Any:
    """The recipe on these rows, of which the last are held out."""
    from moeft.config import SftRecipe
    from moeft.data.reading import read_rows

    rows = read_rows(args.rows, turns="trim").rows
    for name, part in (("train", rows[: args.steps * 16]), ("heldout", rows[-args.heldout :])):
        lines = (json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    values = {
        "model": args.model.absolute(),
        "output": folder / "run",
        "dtype": "float32",
        "data.train": folder / "train.jsonl",
        "data.eval": folder / "heldout.jsonl",
        "data.max_length": args.max_length,
        "training.max_steps": args.steps,
        "training.use_cpu": True,
        "training.disable_tqdm": True,
        "training.save_strategy": '"no"',
    }
    return SftRecipe.load(RECIPE, [f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
                                   for key, value in values.items()])  # fmt: skip


def with_moeft(recipe: Any) -> dict[str, Any]:
    """The run as a user starts it."""
    from safetensors import safe_open

    from moeft.runs.sft import run

    folder = run(recipe, show=lambda text: print(text, file=sys.stderr))
    metrics = folder.read_json("metrics.json")
    with safe_open(folder.path / "adapter" / "adapter_model.safetensors", "pt") as file:
        trainable = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return {
        "trainable_parameters": trainable,
        "losses": [log["loss"] for log in folder.events("train_log")],
        "heldout": {when: figures["loss"] for when, figures in metrics["heldout"].items()},
        "train_seconds": metrics["training"]["seconds"],
        "tokens_per_second": metrics["training"]["tokens_per_second"],
        "data": metrics["data"],
    }


def with_plain(recipe: Any, name: str) -> dict[str, Any]:
    """The same steps without moeft, on the rows that moeft's templates and masks made."""
    sys.path.append(str(RECIPE.parent.parent))
    from tests import plain_sft

    from moeft.runs.preview import load_tokenizer
    from moeft.runs.training_rows import heldout_rows, sft_arguments, training_rows
    from moeft.training.sft import encode_dataset

    tokenizer, _ = load_tokenizer(recipe.model, recipe.data.chat_template)
    args = sft_arguments(recipe, recipe.output)
    train, _ = training_rows(recipe.data, tokenizer, args, lambda text: None)
    heldout = encode_dataset(heldout_rows(recipe.data, lambda text: None), tokenizer, args)
    seed = int(name.rpartition("seed ")[2]) if "seed" in name else SEED
    rows, held_out = (
        [{key: values.tolist() for key, values in row.items()} for row in part.examples] for part in (train, heldout)
    )
    return plain_sft.train(
        recipe.model,
        tokenizer,
        rows,
        held_out,
        recipe.lora.rank,
        recipe.lora.alpha,
        seed,
        rounded="NF4" in name,
        output_dir=str(recipe.output),
        **recipe.training | {"optim": "adamw_8bit"},
    )


def show(found: dict[str, Any]) -> None:
    """One line per run, and how far apart the curves are."""
    print(f"{'':24}{'trains':>12}{'peak GB':>9}{'seconds':>9}{'first':>8}{'last 5':>8}{'held out':>18}")
    for name, run in found.items():
        held = f"{run['heldout']['before']:.4f} {run['heldout']['after']:.4f}"
        print(
            f"{name:24}{run['trainable_parameters']:>12,}{run['peak_bytes'] / 1e9:>9.2f}{run['seconds']:>9.0f}"
            f"{run['losses'][0]:>8.4f}{statistics.mean(run['losses'][-5:]):>8.4f}{held:>18}"
        )
    names = list(found)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            gaps = [a - b for a, b in zip(found[left]["losses"], found[right]["losses"], strict=True)]
            print(f"{left} less {right}: mean {statistics.mean(gaps):+.4f}, largest {max(map(abs, gaps)):.4f} nats")


if __name__ == "__main__":
    main()
