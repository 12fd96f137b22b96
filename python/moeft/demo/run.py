"""``moeft demo``: the main job on the embedded base, from data to a merged checkpoint, with proofs."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from moeft import checkpoint
from moeft.config import SftRecipe
from moeft.demo.ops_agent import generate, write_jsonl
from moeft.errors import RunFolderError
from moeft.provenance import RunFolder
from moeft.reports.markdown import write_report
from moeft.runs import sft

TRAIN_ROWS, HELDOUT_ROWS = 3000, 200
BASE = Path(str(resources.files(__package__) / "base"))
# Matrices of this size gain nothing from a second thread, and waiting for it doubled the time of a step.
THREADS = 1


def run(out: Path, seed: int = 0, show: Callable[[str], None] = print) -> RunFolder:
    """Quantise, fine-tune, merge and prove. An interrupted demo continues, a finished one only says so.

    Args:
        out: Folder for everything: ``data/``, ``packed/``, ``merged/``, and the run folder ``run/``.
        seed: Seed of the data, the adapter and the order of rows.
        show: Where to print.

    Returns:
        The run folder, which holds ``report.md``.

    Raises:
        ProofError: If a proof does not hold.
        RunFolderError: If ``out`` holds a demo with another seed.
    """
    torch.set_num_threads(THREADS)
    out = Path(out).absolute()
    finished = _finished(out / "run", seed)
    if finished is not None:
        show(f"{out} holds this demo, finished at {finished.record['finished_at']}; remove the folder to run it again")
        show(f"Report: {finished.path / 'report.md'}")
        return finished
    folder = sft.run(prepare(out, seed, show=show), show)
    report = write_report(folder)
    figures = folder.read_json("metrics.json")["heldout"]
    show(
        f"held-out tool calls exactly right: {figures['before']['exact_match']:.0%} before, "
        f"{figures['after']['exact_match']:.0%} after; held-out loss {figures['before']['loss']:.3f} before, "
        f"{figures['after']['loss']:.3f} after"
    )
    show(f"Report: {report}")
    return folder


def prepare(out: Path, seed: int, base: Path = BASE, show: Callable[[str], None] = print) -> SftRecipe:
    """Write the rows and pack the base, where that has not happened yet.

    Args:
        out: Folder for ``data/`` and ``packed/``.
        seed: Seed of the data, the adapter and the order of rows.
        base: Checkpoint to train; the embedded one by default.
        show: Where to print.

    Returns:
        The recipe of the run.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    train, heldout = generate(seed, TRAIN_ROWS, HELDOUT_ROWS)
    write_jsonl(train, out / "data" / "train.jsonl")
    write_jsonl(heldout, out / "data" / "heldout.jsonl")
    show(f"{len(train)} rows to train on, {len(heldout)} held out whose combinations never occur in training")
    if not (out / "packed").exists():
        show(str(checkpoint.quantize(base, out / "packed", progress=True)))
    return _recipe(base, out, seed)


def _finished(path: Path, seed: int) -> RunFolder | None:
    """The demo's run folder if it was run to its end; refuses another seed before its data overwrites this one's."""
    if not (path / "run.json").exists():
        return None
    folder = RunFolder.open(path)
    if folder.record["seed"] != seed:
        raise RunFolderError(
            f"{path.parent} holds a demo with seed {folder.record['seed']}, not {seed}; use another --out"
        )
    return folder if folder.status == "finished" else None


def _recipe(base: Path, out: Path, seed: int) -> SftRecipe:
    places = {
        "model": out / "packed",
        "output": out / "run",
        "data.train": out / "data" / "train.jsonl",
        "data.eval": out / "data" / "heldout.jsonl",
        "evaluation.tool_calls": out / "data" / "heldout.jsonl",
        "merge.base_model": base,
        "merge.output": out / "merged",
    }
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    overrides += [f"training.seed={seed}", f"lora.init_seed={seed}"]
    return SftRecipe.load(Path(str(resources.files(__package__) / "recipe.yaml")), overrides)
