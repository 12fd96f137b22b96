"""Items per second of ``moeft evaluate`` beside lm-eval's Hugging Face backend: same model in memory, same questions.

    python benches/evaluate.py MODEL --data ../shared/data --items 64 --shots 5

Both score in float32, in turns; lm-eval at the batch size that is fastest of those given. A task whose answers differ
has no row in the table. ``fewer operations`` is what sharing alone can give: multiplications of weights that lm-eval
needs, padding apart, by those that moeft needs. With examples, questions of one subject follow each other, as in whole
data sets. Needs ``pip install "moeft[eval]"``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeft.evaluation.continuations import encode_continuation
from moeft.evaluation.model_subject import ModelSubject, model_length
from moeft.evaluation.prefix_tree import trees
from moeft.evaluation.scoring import CPU_ROW_TOKENS
from moeft.evaluation.task import Task
from moeft.evaluation.tasks import build_task
from moeft.provenance.environment import describe_environment

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "mmlu")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--items", type=int, default=64)
    words.add_argument("--shots", type=int, default=0)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    words.add_argument("--tasks", nargs="+", default=list(TASKS))
    given = words.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    hardware = describe_environment()["hardware"]
    print(f"{given.model.name}, float32, {torch.get_num_threads()} threads of {hardware['cpu']}; ", end="")
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("lm_eval", "torch", "transformers")))
    columns = ("task", "items", "tokens, moeft", "lm-eval", "fewer operations", "items/s, moeft", "lm-eval", "batch")
    print(f"| {' | '.join(columns)} | faster | by CPU time |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    cost = operations(model)
    rows = []
    for name in given.tasks:
        task = build_task(name, data=given.data, limit=None if given.shots else given.items, shots=given.shots)
        # The sort is stable, so items of one heading stay in their order.
        items = sorted(task.items, key=lambda item: item.reference["heading"])[: given.items]
        rows.append(
            measured(replace(task, items=tuple(items)), model, tokenizer, given.batch_sizes, given.rounds, cost)
        )
        print(rows[-1], flush=True)
    if equal := [row for row in rows if row.is_equal]:
        print(total(equal))


@dataclass(frozen=True)
class Row:
    """Of one task."""

    task: str
    items: int
    tokens: tuple[int, int]
    """Of moeft and of lm-eval."""
    operations: tuple[float, float]
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]
    batch: int | None
    is_equal: bool = True

    def __str__(self) -> str:
        if not self.is_equal:
            return f"| {self.task} | answers differ |" + " |" * 8
        ours, theirs = (self.items / seconds for seconds in self.seconds)
        return (
            f"| {self.task} | {self.items} | {self.tokens[0]} | {self.tokens[1]} | {_ratio(self.operations)} | "
            f"{ours:.2f} | {theirs:.2f} | {self.batch or ''} | {_ratio(self.seconds)} | {_ratio(self.cpu_seconds)} |"
        )


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[1] / pair[0]:.1f}"


def total(rows: list[Row]) -> Row:
    """All tasks one after the other."""

    def summed(of_row: Callable[[Row], tuple[float, float]]) -> tuple[float, float]:
        return sum(of_row(row)[0] for row in rows), sum(of_row(row)[1] for row in rows)

    tokens = summed(lambda row: row.tokens)
    return Row(
        "all",
        sum(row.items for row in rows),
        (int(tokens[0]), int(tokens[1])),
        summed(lambda row: row.operations),
        summed(lambda row: row.seconds),
        summed(lambda row: row.cpu_seconds),
        None,
    )


def measured(
    task: Task, model: Any, tokenizer: Any, batch_sizes: list[int], rounds: int, cost: tuple[float, float]
) -> Row:
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
    is_equal = all(
        np.allclose(found, expected, rtol=1e-4, atol=1e-3)
        for size in batch_sizes
        for found, expected in zip(answers["moeft"], answers[size], strict=True)
    )
    tokens, scored = computed(task, tokenizer, model_length(model.config))
    body, head = cost
    return Row(
        task.name,
        len(task.items),
        tokens,
        (tokens[0] * body + scored * head, tokens[1] * (body + head)),
        (statistics.median(wall["moeft"]), statistics.median(wall[fastest])),
        (statistics.median(cpu["moeft"]), statistics.median(cpu[fastest])),
        fastest,
        is_equal,
    )


def computed(task: Task, tokenizer: Any, max_length: int) -> tuple[tuple[int, int], int]:
    """Tokens that run through the layers in moeft and in lm-eval, padding apart, and those that moeft's head scores."""
    sequences = [
        encode_continuation(tokenizer, item.request.context, continuation, max_length)
        for item in task.items
        for continuation in item.request.continuations
    ]
    rows = list(trees(sequences, CPU_ROW_TOKENS))
    # lm-eval runs a context once if all of its continuations are one token.
    inputs: Counter[tuple[int, ...]] = Counter(sequence.tokens[:-1] for sequence in sequences)
    once = {sequence.tokens[:-1] for sequence in sequences if len(sequence.tokens) - sequence.first == 1}
    lm_eval = sum(len(tokens) * (1 if tokens in once else count) for tokens, count in inputs.items())
    return (sum(len(row.tokens) for row in rows), lm_eval), sum(len(row.edges) for row in rows)


def operations(model: Any) -> tuple[float, float]:
    """Multiplications for a token in the layers, and in the head."""
    head = model.get_output_embeddings().weight
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)
    return counter.get_total_flops() / 2, float(head.numel())


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
