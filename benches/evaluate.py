"""Items per second of ``moeft evaluate`` beside lm-eval's Hugging Face backend: same model in memory, same questions.

    python benches/evaluate.py MODEL --data ../shared/data --items 64

Both score in float32, in turns; lm-eval at the batch size that is fastest of those given. A task whose answers differ
has no row in the table. Needs ``pip install "moeft[eval]"``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeft.evaluation.model_subject import ModelSubject
from moeft.evaluation.task import Task
from moeft.evaluation.tasks import build_task
from moeft.provenance.environment import describe_environment

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "mmlu")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--items", type=int, default=64)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    words.add_argument("--tasks", nargs="+", default=list(TASKS))
    given = words.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    hardware = describe_environment()["hardware"]
    print(f"{given.model.name}, float32, {torch.get_num_threads()} threads of {hardware['cpu']}; ", end="")
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("lm_eval", "torch", "transformers")))
    print("| task | items | moeft, items/s | lm-eval, items/s | batch | faster | by CPU time |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in given.tasks:
        task = build_task(name, data=given.data, limit=given.items)
        print(row(task, model, tokenizer, given.batch_sizes, given.rounds), flush=True)


def row(task: Task, model: Any, tokenizer: Any, batch_sizes: list[int], rounds: int) -> str:
    """Measure one task in turns, and check that both find the same answers."""
    subjects: dict[Any, Callable[[], list[list[float]]]] = {"moeft": lambda: ours(task, model, tokenizer)}
    for size in batch_sizes:
        subjects[size] = theirs(task, model, tokenizer, size)
    wall: dict[Any, list[float]] = {name: [] for name in subjects}
    cpu: dict[Any, list[float]] = {name: [] for name in subjects}
    answers: dict[Any, list[list[float]]] = {}
    for _ in range(rounds):
        for name, score in subjects.items():
            start, busy = time.perf_counter(), time.process_time()
            answers[name] = score()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
    fastest = min(batch_sizes, key=lambda size: statistics.median(cpu[size]))
    for size in batch_sizes:
        for found, expected in zip(answers["moeft"], answers[size], strict=True):
            if not np.allclose(found, expected, rtol=1e-4, atol=1e-3):
                return f"| {task.name} | answers differ: {found} and {expected} | | | | | |"
    speed = {name: len(task.items) / statistics.median(wall[name]) for name in ("moeft", fastest)}
    cheaper = statistics.median(cpu[fastest]) / statistics.median(cpu["moeft"])
    return (
        f"| {task.name} | {len(task.items)} | {speed['moeft']:.2f} | {speed[fastest]:.2f} | {fastest} | "
        f"{speed['moeft'] / speed[fastest]:.1f} | {cheaper:.1f} |"
    )


def ours(task: Task, model: Any, tokenizer: Any) -> list[list[float]]:
    """Log-probabilities of each item's choices."""
    answers = dict(ModelSubject(model, tokenizer).answer([item.request for item in task.items]))
    return [answers[index]["log_probs"] for index in range(len(task.items))]


def theirs(task: Task, model: Any, tokenizer: Any, batch_size: int) -> Callable[[], list[list[float]]]:
    """The same by lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    instances = [
        Instance("loglikelihood", {}, (item.request.context, continuation), number)
        for number, item in enumerate(task.items)
        for continuation in item.request.continuations
    ]

    def score() -> list[list[float]]:
        found = iter(backend.loglikelihood(instances, disable_tqdm=True))
        return [[next(found)[0] for _ in item.request.continuations] for item in task.items]

    return score


if __name__ == "__main__":
    main()
