"""``moeft fisher``: rows, model, measurement, picture, in a run folder that a second start continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.data import templates
from moeft.data.chat import Encoded
from moeft.errors import DataError
from moeft.progress_bar import step_bar
from moeft.provenance import RunFolder
from moeft.runs.measured import draw, encode, load
from moeft.runs.own_replies import own_replies, read_prompts
from moeft.runs.pictures import draw_picture

PICTURE = "layer_importance.png"


@dataclass(frozen=True)
class FisherSettings:
    """What decides the result; see ``moeft fisher --help``."""

    model: Path
    prompts: Path
    rows: int = 200
    labels: str = "data"
    targets: tuple[str, ...] | None = None
    chat_template: str | None = None
    train_on: str = "assistant"
    max_length: int = 4096
    max_new_tokens: int = 256
    dtype: str = "bfloat16"
    seed: int = 0


def run(
    settings: FisherSettings,
    out: Path,
    memory_bytes: int,
    device: str = "cpu",
    show: Callable[[str], None] = print,
) -> RunFolder:
    """Measure, or continue an interrupted measurement.

    Args:
        settings: What to measure.
        out: Run folder: ``fisher.safetensors``, ``layer_importance.json`` and ``.png``, ``metrics.json``,
            ``rejects.jsonl``, ``run.json``, ``events.jsonl``, and of generated labels ``replies.jsonl``.
        memory_bytes: Most memory of the sums; a second start may choose another.
        device: Where to compute.
        show: Where to print what is found.

    Raises:
        MoeftError: If model, rows or options cannot be used; see the classes.
        ValueError: If an option is out of its range.
    """
    inputs = {"model": settings.model, "prompts": settings.prompts}
    if settings.chat_template is not None:
        templates.text_of(settings.chat_template)  # A typo answers before the model is loaded.
        if settings.chat_template not in templates.TURN_MARKERS:
            inputs["chat_template"] = Path(settings.chat_template)
    with RunFolder.create(out, "moeft fisher", dataclasses.asdict(settings), inputs, settings.seed) as folder:
        if not (folder.path / "fisher.safetensors").exists():  # A kill may have come between it and the picture.
            _measure(settings, folder, memory_bytes, device, show)
        layers = folder.read_json("layer_importance.json")["layers"]
        means = {int(layer): mean for layer, mean in layers.items()}
        from moeft.reports.plots import plot_layer_importance

        draw_picture(lambda: plot_layer_importance(means, folder.path / PICTURE), show)
    return folder


def _measure(
    settings: FisherSettings, folder: RunFolder, memory_bytes: int, device: str, show: Callable[[str], None]
) -> None:
    from moeft.importance import fisher

    model, tokenizer = load(settings.model, settings.dtype, device, show, settings.chat_template)
    encoded = _encode(settings, folder, model, tokenizer)
    encoded.write_rejects(folder.path / "rejects.jsonl")
    rows = draw(encoded.examples, settings.rows, settings.seed)
    show(f"{encoded}; {len(rows)} of them are measured")
    with step_bar("fisher", True) as progress:
        report = fisher(
            model,
            rows,
            folder.path,
            base=settings.model,
            targets=settings.targets,
            labels=settings.labels,  # type: ignore[arg-type]  # checked there
            memory_bytes=memory_bytes,
            seed=settings.seed,
            progress=progress,
        )
    show(str(report))
    figures = {"samples": report.samples, "labels": report.tokens, "seconds": report.seconds, "layers": report.layers}
    folder.write_json("metrics.json", {"fisher": figures})


def _encode(settings: FisherSettings, folder: RunFolder, model: Any, tokenizer: Any) -> Encoded:
    if settings.labels != "generated":
        try:
            return encode(settings.prompts, tokenizer, settings.train_on, settings.max_length)
        except DataError as error:
            raise DataError(f"{error}; labels generated measures prompts without replies") from error
    with step_bar("fisher", True) as progress:
        rows = own_replies(
            model,
            tokenizer,
            read_prompts(settings.prompts),
            folder.path / "replies.jsonl",
            count=settings.rows,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            progress=progress,
        )
    return encode(rows, tokenizer, "last", settings.max_length)
