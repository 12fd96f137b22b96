"""``moeft hard build`` and ``moeft hard analyze``: files in, files out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.data.files import open_records
from moeft.data.rejects import summary
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.hard.analysis import Analysis, analyze
from moeft.hard.build import Built, build, mixed
from moeft.hard.requests import HeldOutTexts, Request, read_requests
from moeft.hard.targets import Targets
from moeft.provenance import files
from moeft.runs.pictures import draw_picture
from moeft.tool_protocols import ToolProtocol

if TYPE_CHECKING:
    from moeft.hard.requests import Requests

Show = Callable[[str], None]


@dataclass(frozen=True)
class Toolbox:
    """The tools of an assistant and how it calls them."""

    schemas: ToolSchemas
    protocol: ToolProtocol

    @classmethod
    def read(cls, path: Path, name: str) -> Toolbox:
        """Read schemas and choose the protocol.

        Raises:
            DataError: If the file holds no schemas that can be used.
            ValueError: If there is no such protocol.
        """
        from moeft.tool_protocols import protocol

        return cls(ToolSchemas.read(path), protocol(name))

    def requests(self, path: Path, show: Show, held_out: HeldOutTexts | None = None) -> list[Request]:
        """Requests with their right calls, from a file of chat rows; what cannot be used is shown by reason."""
        read: Requests = read_requests(path, self.schemas, self.protocol, held_out)
        show(f"{path}: {len(read.requests)} requests, {len(read.rejects)} rows not used")
        for line in summary(read.rejects):
            show(f"  {line}")
        return read.requests


@dataclass(frozen=True)
class BuildSettings:
    """How many pairs, of which kind, beside how many easy ones."""

    count: int = 1000
    share: float = 0.3
    reasoned_every: int = 5
    augment_share: float = 0.3
    seed: int = 0


def build_pairs(
    tools: Toolbox,
    seeds: Path,
    out: Path,
    settings: BuildSettings,
    *,
    exclude: Sequence[Path] = (),
    easy: Path | None = None,
    targets: Targets | None = None,
    show: Show = print,
) -> Built:
    """Write hard pairs, mixed with easy ones, as JSON lines.

    Args:
        tools: Schemas and protocol.
        seeds: Chat rows to make pairs from.
        out: File to write, which must not exist.
        settings: How many, of which kind.
        exclude: Files of requests that must not be trained on, in neither hard nor easy pairs.
        easy: Preference rows to mix in.
        targets: Weights from an analysis.
        show: Where to print counts.

    Raises:
        DataError: If nothing can be made of a file.
        FileExistsError: If ``out`` is there already.
    """
    if not 0 < settings.share <= 1:
        raise ValueError(f"share is {settings.share}, expected above 0 and at most 1")
    if out.exists():
        raise FileExistsError(17, "is there already; choose another name, or remove it", str(out))
    held_out = None
    if exclude:
        held_out = HeldOutTexts(request.prompt for path in exclude for request in tools.requests(path, show))
    requests = tools.requests(seeds, show, held_out)
    built = build(
        tools.schemas,
        requests,
        tools.protocol,
        settings.count,
        held_out=held_out,
        targets=targets,
        reasoned_every=settings.reasoned_every,
        augment_share=settings.augment_share,
        seed=settings.seed,
    )
    show(str(built))
    hard = [pair.to_json() for pair in built.pairs]
    others = [] if easy is None else _easy(easy, held_out, show)
    rows = mixed(hard, others, settings.share, settings.seed) if others else hard
    kept = Counter(row.get("category") for row in rows)
    num_hard = sum(count for category, count in kept.items() if category is not None)
    show(f"{out}: {len(rows)} pairs, {num_hard} hard ({num_hard / len(rows):.0%})")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Under its name only when it is whole: a second start takes it as it is.
    unfinished = out.with_name(f"{out.name}.partial")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(out)
    return built


def analyze_replies(
    tools: Toolbox, requests: Sequence[Request], replies: Sequence[str], out: Path, show: Show = print
) -> Analysis:
    """Judge replies; write ``replies.jsonl``, ``analysis.json``, ``targets.json``, ``failures.md`` and a picture."""
    from moeft.reports.failures import write_failures

    found = analyze(requests, replies, tools.schemas, tools.protocol)
    out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [
        {"request": request.text, "reply": reply, "category": verdict.category, "reason": verdict.reason}
        for request, reply, verdict in zip(requests, replies, found.verdicts, strict=True)
    ]
    (out / "replies.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    files.write_json(out / "analysis.json", found.to_json())
    found.targets.write(out / "targets.json")
    failures = [record for record in records if record["category"]]
    draw_picture(lambda: write_failures(found.to_json(), failures, out), show)
    show(f"right replies: {found.accuracy}; failures: {found.failures or 'none'}")
    return found


def read_replies(path: Path) -> list[str]:
    """Replies from a file: one record each, a text or an object with ``reply``, in the order of the benchmark.

    Raises:
        DataError: If a record is something else.
    """
    replies = []
    for line, record in open_records(path):
        reply: Any = record.get("reply") if isinstance(record, dict) else record
        if not isinstance(reply, str):
            raise DataError(f"{path} line {line}: expected a text or an object with `reply`")
        replies.append(reply)
    return replies


def _easy(path: Path, held_out: HeldOutTexts | None, show: Show) -> list[dict[str, Any]]:
    """Rows of easy pairs that hold no held-out request.

    Raises:
        DataError: If there is none.
    """
    from moeft.data.preferences import read_preferences

    read = read_preferences(path)
    rows = []
    leaks = 0
    for row in read.rows:
        if held_out is not None and held_out.leak(row.prompt):
            leaks += 1
            continue
        tools = {} if row.tools is None else {"tools": row.tools}
        rows.append({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, **tools})
    show(f"{path}: {len(rows)} easy pairs, {len(read.rejects)} rejected, {leaks} hold held-out requests")
    if not rows:
        raise DataError(f"{path}: no easy pair is left to mix in; leave it out, or give rows of other requests")
    return rows
