"""``report.md`` of a run folder, from ``run.json``, ``events.jsonl`` and ``metrics.json``.

``metrics.json`` may hold any of these; a section without its numbers is left out:

================  ====================================================================================================
``bytes``         ``after`` and, if known, ``before``: bytes by component
``heldout``       ``before`` and ``after``: ``loss`` (nats per token), ``exact_match`` (share) and ``rows``; ``turns``
                  and ``recall``, lists of what :mod:`moeft.evaluation` measures; of preference pairs the figures of
                  ``docs/preference.md``
``training``      ``steps``, ``seconds``, ``tokens``, ``tokens_per_second``, ``peak_bytes``, ``skipped_steps``, and
                  ``routing``: ``experts`` and ``idle``, those without a token by layer
``plan``          ``peak_allocated_bytes`` as forecast; ``trainable_parameters``, ``parameters``, ``trainable_share``
``router_drift``  ``tokens``, means and ``layers`` of :class:`moeft.integration.router_drift.RouterDrift`
``data``          counts by name
``composition``   one object per source: rows, tokens and shares
``proofs``        list of ``name``, ``measured``, ``tolerance``, ``unit``, ``ok``, ``how``
``samples``       list of ``prompt``, ``before``, ``after``, ``reference``
================  ====================================================================================================
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moeft.provenance import RunFolder
from moeft.reports.gate import gate_section
from moeft.reports.held_out import held_out_sections
from moeft.reports.learning_rate import learning_rate_section
from moeft.reports.plots import plot_bytes, plot_loss
from moeft.reports.routing import routing_section
from moeft.reports.text import cell, facts, fence, mib, number, table
from moeft.reports.training_rows import data_section


def write_report(run: RunFolder | str | Path) -> Path:
    """Write ``report.md`` and its pictures ``loss.png`` and ``bytes.png`` into a run folder.

    Args:
        run: Run folder, or its path; finished or not.

    Returns:
        Path of ``report.md``.

    Raises:
        RunFolderError: If the path holds no run, or one of its files is damaged.
        MissingExtraError: If matplotlib is not installed.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    metrics = run.read_json("metrics.json") or {}
    sections = [
        _title(run, metrics),
        *held_out_sections(metrics.get("heldout")),
        _losses(run),
        gate_section(run),
        learning_rate_section(metrics.get("learning_rate"), run.path),
        _bytes(run, metrics.get("bytes")),
        _proofs(metrics.get("proofs")),
        _samples(metrics.get("samples")),
        _training(metrics.get("training"), metrics.get("plan"), run),
        routing_section(metrics.get("router_drift")),
        data_section(metrics.get("data"), metrics.get("composition")),
        _stages(run.events("stage")),
        _what_ran(run.record),
        _recipe(run.record),
    ]
    path = run.path / "report.md"
    path.write_text("\n".join(section for section in sections if section), encoding="utf-8")
    return path


def _title(run: RunFolder, metrics: Mapping[str, Any]) -> str:
    lines = [f"# Report of `{run.record['command']}`\n"]
    if run.status == "finished":
        lines.append(f"Finished at {run.record['finished_at']}.\n")
    else:
        errors = [event["error"] for event in run.events("failed")]
        reason = f": {cell(errors[-1])}" if run.status == "failed" and errors else ""
        lines.append(f"**Not finished**, status {run.status}{reason}.\n")
    proofs = metrics.get("proofs") or []
    if proofs:
        failed = sum(not proof["ok"] for proof in proofs)
        verdict = f"**Proofs that do not hold: {failed} of {len(proofs)}.**" if failed else "Every proof holds."
        lines.append(f"{verdict}\n")
    return "\n".join(lines)


def _losses(run: RunFolder) -> str:
    train_logs, evals = run.events("train_log"), run.events("eval")
    if not train_logs:
        return ""
    plot_loss(train_logs, evals, run.path / "loss.png")
    return "![Loss over optimizer steps](loss.png)\n"


def _bytes(run: RunFolder, sizes: Mapping[str, Any] | None) -> str:
    if not sizes:
        return ""
    before, after = sizes.get("before", {}), sizes["after"]
    if not before:  # packed while loading, or not packed: only what is in memory is known
        rows = [[name, mib(size)] for name, size in sorted(after.items(), key=lambda item: -item[1])]
        return "## Bytes per component\n\n" + table(["component", "in memory"], rows)
    plot_bytes(before, after, run.path / "bytes.png")
    names = sorted({**before, **after}, key=lambda name: before.get(name, 0), reverse=True)
    rows = [[name, *(mib(side[name]) if name in side else None for side in (before, after))] for name in names]
    total = ["**total**", mib(sum(before.values())), mib(sum(after.values()))]
    return (
        "## Bytes per component\n\n"
        + table(["component", "before", "after"], [*rows, total])
        + "\n![Bytes per component before and after](bytes.png)\n"
    )


def _proofs(proofs: Sequence[Mapping[str, Any]] | None) -> str:
    if not proofs:
        return ""
    rows = [
        [
            proof["name"],
            "holds" if proof["ok"] else "**does not hold**",
            proof.get("measured"),
            proof.get("tolerance"),
            proof.get("unit") or "",
        ]
        for proof in proofs
    ]
    how = [f"- {cell(proof['name'])}: {cell(proof['how'])}" for proof in proofs if proof.get("how")]
    return (
        "## Proofs\n\n"
        + table(["proof", "verdict", "measured", "tolerance", "unit"], rows)
        + "".join(f"\n{line}" for line in how)
        + ("\n" if how else "")
    )


def _samples(samples: Sequence[Mapping[str, Any]] | None) -> str:
    blocks = []
    for number_, sample in enumerate(samples or (), start=1):
        parts = [f"### Sample {number_}\n"]
        for name, heading in (("prompt", "Prompt"), ("before", "Before"), ("after", "After"), ("reference", "Right")):
            if sample.get(name) is not None:
                parts.append(f"{heading}:\n\n{fence(sample[name])}")
        blocks.append("\n".join(parts))
    return "\n".join(["## Samples\n", *blocks]) if blocks else ""


def _training(training: Mapping[str, Any] | None, plan: Mapping[str, Any] | None, run: RunFolder) -> str:
    if not training:
        return ""
    peak, planned = training.get("peak_bytes"), (plan or {}).get("peak_allocated_bytes")
    routing = training.get("routing")
    hashes, logs, stops = run.events("frozen_base"), run.events("train_log"), run.events("stopped")
    text = "## Training\n\n" + facts(
        [
            ("weights that train", _trainable(plan)),
            ("optimizer steps", training.get("steps")),
            ("seconds", training.get("seconds")),
            ("trained tokens", training.get("tokens")),
            ("tokens per second", training.get("tokens_per_second")),
            ("peak memory", None if peak is None else mib(peak)),
            ("peak memory on a GPU, forecast", None if planned is None else mib(planned)),
            ("skipped steps", training.get("skipped_steps")),
            ("experts without a token", routing and _idle(routing)),
            ("load of the busiest expert over the mean, last log", logs[-1].get("load_imbalance") if logs else None),
            ("frozen base", _frozen(hashes[-1]) if hashes else None),
            ("stopped early", stops[-1]["reason"] if stops else None),
        ]
    )
    skipped = run.events("skipped_step")
    if skipped:
        rows = [
            [event["step"], event["reason"], event.get("module"), ", ".join(map(str, event.get("rows", ())))]
            for event in skipped
        ]
        text += "\n" + table(["skipped step", "reason", "first in", "training rows"], rows)
    return text


def _trainable(plan: Mapping[str, Any] | None) -> str | None:
    if not plan or "trainable_share" not in plan:
        return None
    return (
        f"{plan['trainable_parameters']:,}, {100 * plan['trainable_share']:.3g} % of the base's {plan['parameters']:,}"
    )


def _idle(routing: Mapping[str, Any]) -> str:
    return f"{sum(len(experts) for experts in routing['idle'].values())} of {routing['experts']}"


def _frozen(event: Mapping[str, Any]) -> str:
    verdict = f"{len(event['changed'])} tensors changed" if event["changed"] else "unchanged"
    return f"{verdict}, SHA-256 {event['sha256'][:16]}, hashed in {event['seconds']:.2f} s"


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    rows = [[event["name"], event["status"], event.get("seconds")] for event in stages]
    return "## Stages\n\n" + table(["stage", "status", "seconds"], rows)


def _what_ran(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    memory = hardware.get("memory_bytes")
    gpus = [f"{gpu['name']}, {number(gpu['memory_mib'])} MiB, driver {gpu['driver']}" for gpu in hardware["gpus"]]
    inputs = [
        [name, source["path"], mib(source["bytes"]), source["sha256"][:16]] for name, source in record["inputs"].items()
    ]
    return (
        "## What ran\n\n"
        + facts(
            [
                ("command", record["command"]),
                ("started", record["started_at"]),
                ("starts", record.get("attempts")),
                ("seed", record.get("seed")),
                ("commit", record.get("commit")),
                ("processor", f"{hardware['cpu']}, {number(hardware['cores'])} cores"),
                ("memory", None if memory is None else mib(memory)),
                ("GPU", "; ".join(gpus) or "none"),
                ("system", hardware["system"]),
                ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
            ]
        )
        + ("\n" + table(["input", "path", "size", "SHA-256 begins"], inputs) if inputs else "")
    )


def _recipe(record: Mapping[str, Any]) -> str:
    return "## Recipe\n\n" + fence(yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True), "yaml")
