"""``moeft evaluate``: tasks, subject, measurement and tables, in a run folder that a second start continues."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.progress_bar import step_bar
from moeft.provenance import RunFolder
from moeft.runs.measured import load

if TYPE_CHECKING:
    from moeft.evaluation.measure import TaskResult
    from moeft.evaluation.request import Subject
    from moeft.evaluation.results import Compared
    from moeft.evaluation.task import Task
    from moeft.serving import Server

CONTEXT = 4096
"""Tokens of a served conversation where ``max_length`` does not say."""


@dataclass(frozen=True)
class EvaluateSettings:
    """What decides the result; see ``moeft evaluate --help``."""

    model: str
    """Folder of a checkpoint, a GGUF file, or the URL of a server."""
    tasks: tuple[str, ...]
    """Names, each perhaps with a file: ``hellaswag`` or ``hellaswag=rows.jsonl``."""
    adapter: Path | None = None
    data: Path | None = None
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    samples: int = 1
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def is_server(self) -> bool:
        """Whether the model is behind a URL."""
        return self.model.startswith(("http://", "https://"))

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a file of llama.cpp, which is served while it is measured."""
        return not self.is_server and self.model.endswith(".gguf")


def run(
    settings: EvaluateSettings,
    out: Path,
    batch_size: int = 16,
    device: str = "cpu",
    cache: Path | None = None,
    show: Callable[[str], None] = print,
) -> RunFolder:
    """Evaluate a model, or continue an interrupted evaluation.

    Args:
        settings: What to measure.
        out: Run folder: ``results.json``, ``results.md``, ``answers.jsonl``, ``run.json``, ``events.jsonl``.
        batch_size: Replies generated at once, or requests that a server gets at once.
        device: Where to compute.
        cache: File of answers, which runs may share; None takes ``answers.jsonl`` in the folder.
        show: Where to print what is found.

    Raises:
        MoeftError: If the model, a task or its rows cannot be used; see the classes.
        ValueError: If settings exclude each other.
    """
    if settings.adapter is not None and (settings.is_server or settings.is_gguf):
        raise ValueError(
            f"an adapter acts on a checkpoint, not on {settings.model}; merge it, or export with --adapter"
        )
    tasks = _tasks(settings)  # Before the folder is made and the model is loaded: a typo answers at once.
    inputs = _inputs(settings)
    with (
        RunFolder.create(out, "moeft evaluate", dataclasses.asdict(settings), inputs, settings.seed) as folder,
        _subject(settings, folder, batch_size, device, show) as subject,
    ):
        _measure(folder, subject, tasks, cache or folder.path / "answers.jsonl", show)
    return folder


def compare(first: Path, second: Path, level: float = 0.95, seed: int = 0) -> str:
    """Table of two evaluations, and which of their differences are real.

    Args:
        first: Run folder of an evaluation.
        second: Another one, of the same tasks.
        level: Of the intervals, and of what counts as real.
        seed: Of the resampling.

    Raises:
        DataError: If they have no item in common.
        RunFolderError: If a folder holds no results.
    """
    from moeft.evaluation.results import compare as compare_results
    from moeft.evaluation.results import read_results
    from moeft.reports.evaluation import comparison_table

    found = compare_results(read_results(first), read_results(second), level=level, seed=seed)
    return comparison_table([row_of(compared, level) for compared in found], str(first), str(second), level)


def row_of(compared: Compared, level: float) -> dict[str, Any]:
    """A comparison as a line of a table, in plain JSON types."""
    change = compared.difference.change
    return {
        "task": compared.task,
        "metric": compared.metric.name,
        "first": compared.difference.first,
        "second": compared.difference.second,
        "change": change.value,
        "low": change.low,
        "high": change.high,
        "p": compared.p_corrected,
        "num": change.num,
        "is_of_few": change.is_of_few,
        "only_one": compared.only_one,
        "verdict": compared.verdict(level),
    }


def _tasks(settings: EvaluateSettings) -> list[list[Task]]:
    """Each task, once for every sample."""
    from moeft.evaluation.samples import draws
    from moeft.evaluation.tasks import build_task

    found = []
    for word in settings.tasks:
        name, _, file = word.partition("=")
        task = build_task(name, Path(file) if file else None, settings.data, settings.limit, settings.seed)
        found.append(draws(task, settings.samples, settings.temperature, settings.seed, settings.max_new_tokens))
    return found


def _inputs(settings: EvaluateSettings) -> dict[str, Path]:
    inputs = {} if settings.is_server else {"model": Path(settings.model)}
    if settings.is_gguf:
        from moeft.gguf import parts

        inputs |= {f"model part {number}": part for number, part in enumerate(parts(Path(settings.model))[1:], start=2)}
    if settings.adapter is not None:
        inputs["adapter"] = settings.adapter
    return inputs


@contextmanager
def _subject(
    settings: EvaluateSettings, folder: RunFolder, batch_size: int, device: str, show: Callable[[str], None]
) -> Iterator[Subject]:
    from moeft.evaluation.server_subject import ServerSubject

    identity: dict[str, Any] = {name: source["sha256"] for name, source in folder.record["inputs"].items()}
    if settings.is_server:
        yield ServerSubject(settings.model, parallel=batch_size, api_key=os.environ.get("OPENAI_API_KEY"))
        return
    if settings.is_gguf:
        with _served(settings, batch_size) as server:
            show(f"llama.cpp serves {settings.model} at {server.address}")
            identity |= {"context": settings.max_length or CONTEXT}
            yield ServerSubject(server.address, parallel=batch_size, identity=identity)
        return
    from moeft.evaluation.model_subject import ModelSubject
    from moeft.integration.lora import load_adapter

    model, tokenizer = load(Path(settings.model), settings.dtype, device, show)
    if settings.adapter is not None:
        model = load_adapter(model, settings.adapter)
    identity |= {"dtype": settings.dtype}
    yield ModelSubject(model, tokenizer, identity, batch_size=batch_size, max_length=settings.max_length)


def _served(settings: EvaluateSettings, batch_size: int) -> Server:
    import torch

    from moeft.serving import ServeOptions, Server

    options = ServeOptions(context=settings.max_length or CONTEXT, parallel=batch_size, threads=torch.get_num_threads())
    return Server(settings.model, options)


def _measure(
    folder: RunFolder, subject: Subject, tasks: Sequence[Sequence[Task]], cache: Path, show: Callable[[str], None]
) -> Mapping[str, TaskResult]:
    from moeft.evaluation.answers import AnswerCache
    from moeft.evaluation.measure import measure
    from moeft.evaluation.results import FILE, write_results
    from moeft.evaluation.samples import pooled
    from moeft.reports.evaluation import results_table

    with step_bar("evaluate", sys.stderr.isatty()) as advance:
        kept = AnswerCache(cache)
        results = [pooled(measure(subject, of_task, kept, advance)) for of_task in tasks]
    write_results(folder.path, results)
    text = results_table(folder.read_json(FILE)["tasks"])
    (folder.path / "results.md").write_text(text, encoding="utf-8")
    show(text)
    for result in results:
        for key, reason in result.failed.items():
            show(f"{result.name} item {key} failed: {reason}")
    return {result.name: result for result in results}
