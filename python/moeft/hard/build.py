"""Hard preference pairs: drafts of every category, checked one by one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeft.data.rows import Message
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.hard.augment import augmented
from moeft.hard.categories import CALL_ONLY, CATEGORIES
from moeft.hard.draft import Draft
from moeft.hard.judge import judge
from moeft.hard.requests import HeldOutTexts, Request
from moeft.hard.targets import Targets
from moeft.hard.workshop import Workshop
from moeft.tool_protocols import ToolProtocol

TRIES = 30
"""Drafts that may fail, for each pair that is asked for, before a category is given up."""


@dataclass(frozen=True)
class HardPair:
    """A checked pair.

    Attributes:
        category: What is hard about it.
        how: How it was made.
        fault: Why the rejected answer is worse.
        reasoned: Whether both answers hold the same right reasoning.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    category: str
    how: str
    fault: str
    reasoned: bool
    tools: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """A row that :func:`moeft.data.preferences.read_preferences` reads."""
        return dict(vars(self))


@dataclass
class Built:
    """Pairs, and why other drafts are none."""

    pairs: list[HardPair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = Counter(pair.category for pair in self.pairs)
        lines = [f"  {name:24} {counts[name]:5}" for name in CATEGORIES]
        lines += [f"  dropped: {count} x {reason}" for reason, count in self.dropped.most_common()]
        return "\n".join([f"{len(self.pairs)} hard pairs", *lines])


def build(
    schemas: ToolSchemas,
    requests: Sequence[Request],
    protocol: ToolProtocol,
    count: int,
    *,
    held_out: HeldOutTexts | None = None,
    targets: Targets | None = None,
    reasoned_every: int = 5,
    augment_share: float = 0.3,
    seed: int = 0,
) -> Built:
    """Make pairs, spread over the categories as the targets say, or evenly.

    A category that the requests give nothing for leaves its share to the others.

    Args:
        schemas: The tools.
        requests: What pairs are made from; those without a call are not used.
        protocol: How calls are written.
        count: Pairs to make; fewer come out where the requests do not give so many different ones.
        held_out: Requests that must not be trained on.
        targets: Weights from an analysis.
        reasoned_every: Every so-many-th pair whose answers differ in a call alone keeps the right reasoning in both;
            0 for none.
        augment_share: Share of requests that are asked in other words.
        seed: Of every choice.

    Raises:
        DataError: If no request has a call, or no pair can be made.
        ValueError: If a number makes no sense.
    """
    if count < 1 or reasoned_every < 0 or not 0 <= augment_share <= 1:
        raise ValueError(
            f"count is {count}, reasoned_every {reasoned_every} and augment_share {augment_share}, expected at least "
            "1, at least 0, and a share"
        )
    usable = [request for request in requests if request.calls]
    if not usable:
        raise DataError("no request has a call of a tool, so there is nothing to corrupt")
    targets = targets or Targets()
    rng = random.Random(seed)
    shop = Workshop(schemas, usable, protocol, targets.confusion, rng)
    check = _Checker(schemas, protocol, held_out)
    weights = [targets.of_request(request) for request in usable]
    built = Built()
    misses: Counter[str] = Counter()
    share = targets.categories or dict.fromkeys(CATEGORIES, 1.0)
    open_names = [name for name in CATEGORIES if share.get(name, 0) > 0]
    made: Counter[str] = Counter()
    call_only = 0
    while len(built.pairs) < count and open_names:
        # The category that is furthest behind its share.
        name = min(open_names, key=lambda name: (made[name] + 1) / share[name])
        (request,) = rng.choices(usable, weights)
        is_reasoned = name in CALL_ONLY and reasoned_every > 0 and call_only % reasoned_every == reasoned_every - 1
        source = _reasoned(shop, request) if is_reasoned else request
        draft = CATEGORIES[name](shop, augmented(shop, source, augment_share))
        reason = "the request gives nothing for it" if draft is None else check(draft)
        if draft is None or reason is not None:
            built.dropped[f"{name}: {reason}"] += 1
            misses[name] += 1
            if misses[name] > TRIES * (made[name] + 1):
                open_names.remove(name)
            continue
        made[name] += 1
        call_only += name in CALL_ONLY
        built.pairs.append(_pair(draft, name, is_reasoned, check.fault, schemas))
    if not built.pairs:
        raise DataError(f"no pair could be made; first reasons: {built.dropped.most_common(3)}")
    return built


class _Checker:
    """Says why a draft is no pair; None if it is one, and then ``fault`` says why its rejected answer is worse."""

    def __init__(self, schemas: ToolSchemas, protocol: ToolProtocol, held_out: HeldOutTexts | None) -> None:
        self._schemas, self._protocol, self._held_out = schemas, protocol, held_out
        self._seen: set[str] = set()
        self.fault = ""

    def __call__(self, draft: Draft) -> str | None:
        schemas = self._schemas if draft.tools is None else ToolSchemas(draft.tools)
        said = self._protocol.parse(draft.chosen).said
        right = judge(draft.chosen, draft.calls, schemas, self._protocol, said)
        wrong = judge(draft.rejected, draft.calls, schemas, self._protocol, said)
        if right.category is not None:
            return f"the chosen answer is wrong: {right.category}"
        if wrong.category is None:
            return "the rejected answer is right too"
        if self._held_out is not None and self._held_out.leak(draft.prompt):
            return "holds a held-out request"
        key = json.dumps([draft.prompt, draft.chosen, draft.rejected], sort_keys=True)
        if key in self._seen:
            return "made before"
        self._seen.add(key)
        self.fault = wrong.reason
        return None


def _reasoned(shop: Workshop, request: Request) -> Request:
    """The request whose reference says why it calls."""
    if request.said:
        return request
    reasons = [
        f"This asks to {shop.words(call.name)}"
        + (f" with {', '.join(f'{key} {value}' for key, value in call.arguments.items())}" if call.arguments else "")
        for call in request.calls
    ]
    return replace(request, said=". ".join(reasons) + ".")


def _pair(draft: Draft, name: str, is_reasoned: bool, fault: str, schemas: ToolSchemas) -> HardPair:
    tools = schemas.tools if draft.tools is None else draft.tools
    return HardPair(draft.prompt, draft.chosen, draft.rejected, name, draft.how, fault, is_reasoned, tools)


def mixed(
    hard: Sequence[Mapping[str, Any]], easy: Sequence[Mapping[str, Any]], share: float, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Hard and easy rows in random order, with as many hard ones as the share says, and as many rows as that allows.

    Args:
        hard: Rows of hard pairs.
        easy: Other rows; with none, all hard ones come out.
        share: Of hard rows among all, above 0 and at most 1.
        seed: Of the order, and of which rows are left out.

    Raises:
        ValueError: If the share makes no sense.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected above 0 and at most 1")
    rng = random.Random(seed)
    if not easy or share == 1:
        rows = list(hard)
    else:
        total = min(len(hard) / share, len(easy) / (1 - share))
        num_hard = max(1, round(total * share))
        num_easy = min(len(easy), max(1, round(total) - num_hard))
        rows = rng.sample(list(hard), num_hard) + rng.sample(list(easy), num_easy)
    rng.shuffle(rows)
    return rows
