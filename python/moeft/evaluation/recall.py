"""Whether a model still knows at turn n what it was told in turn 1.

A fact is told, a number of unrelated exchanges follows, and the fact is asked for. The model is right where it gives
the true answer more probability than every wrong one. The wrong answers of a fact are the true ones of others, so what
a model likes to say anyway helps and hurts alike, and a model that forgets is right by chance alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeft.data.rows import Message, Row
from moeft.errors import DataError
from moeft.evaluation.generation import generate_replies
from moeft.evaluation.statistics import Estimate, bootstrap
from moeft.evaluation.turn_scores import score_turns


@dataclass(frozen=True)
class Fact:
    """Something that a user says of himself, and the question about it."""

    statement: str
    reply: str
    question: str
    answer: str
    distractors: tuple[str, ...]


@dataclass(frozen=True)
class Recall:
    """Figures at one distance; their units are facts."""

    distance: int
    """Exchanges between the fact and the question."""
    accuracy: Estimate
    """Share of facts whose answer is the most probable of all candidates."""
    margin: Estimate
    """Log-probability of the answer less that of the most probable wrong one, in nats."""
    chance: float
    """Accuracy of a model that knows nothing."""
    generated: Estimate | None = None
    """Share of greedy replies that contain the answer; None if none were generated."""


_THINGS = ("dog", "boat", "sister", "village", "favourite colour", "instrument")
_ANSWERS = {
    "dog": ("Bruno", "Pepper", "Rusty", "Luna"),
    "boat": ("Swallow", "Meridian", "Osprey", "Juniper"),
    "sister": ("Clara", "Ingrid", "Maya", "Teresa"),
    "village": ("Ashford", "Lindale", "Norwood", "Brackley"),
    "favourite colour": ("green", "purple", "orange", "white"),
    "instrument": ("cello", "flute", "harp", "trumpet"),
}
_VERBS = {"favourite colour": ("is", "What is"), "instrument": ("is the", "What is")}


def facts() -> list[Fact]:
    """24 facts about six things, each with the three other answers to the same question as distractors."""
    found = []
    for thing in _THINGS:
        verb, ask = _VERBS.get(thing, ("is called", "What is the name of"))
        for answer in _ANSWERS[thing]:
            others = tuple(other for other in _ANSWERS[thing] if other != answer)
            statement = f"Please remember this: my {thing} {verb} {answer}."
            found.append(Fact(statement, "I will remember that.", f"{ask} my {thing}?", answer, others))
    return found


def recall(
    model: Any,
    tokenizer: Any,
    filler: Sequence[Row],
    *,
    distances: Sequence[int] = (0, 2, 8),
    of: Sequence[Fact] | None = None,
    max_new_tokens: int = 0,
    batch_size: int = 8,
    level: float = 0.95,
    seed: int = 0,
) -> list[Recall]:
    """Ask for facts at several distances.

    Args:
        model: As for :func:`moeft.evaluation.turn_scores.score_turns`.
        tokenizer: Its tokenizer, with a chat template.
        filler: Conversations whose exchanges stand between fact and question; those that hold an answer are left out.
        distances: Exchanges between fact and question.
        of: Facts; None takes :func:`facts`.
        max_new_tokens: Length of replies to generate as well; 0 for none.
        batch_size: Conversations at a time.
        level: Of the confidence intervals.
        seed: Of the choice of exchanges and of the resampling.

    Raises:
        DataError: If there are fewer suitable exchanges than the largest distance, or no facts.
        ValueError: If a distance is negative.
    """
    asked = facts() if of is None else list(of)
    if not asked:
        raise DataError("no facts to ask for, expected at least one")
    if min(distances, default=-1) < 0:
        raise ValueError(f"distances are {list(distances)}, expected at least one, and none below 0")
    exchanges = check_filler(filler, distances, asked)
    rng = random.Random(seed)
    chance = sum(1 / (1 + len(fact.distractors)) for fact in asked) / len(asked)
    found: list[Recall] = []
    for distance in distances:
        prompts = [_prompt(fact, rng.sample(exchanges, distance)) for fact in asked]
        margins = _margins(model, tokenizer, prompts, asked, batch_size)
        hits: Estimate | None = None
        if max_new_tokens:
            sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
            replies = generate_replies(model, tokenizer, prompts, **sizes)
            right = [fact.answer.lower() in reply.lower() for fact, reply in zip(asked, replies, strict=True)]
            hits = bootstrap(right, level=level, seed=seed)
        accuracy = bootstrap([margin > 0 for margin in margins], level=level, seed=seed)
        found.append(Recall(distance, accuracy, bootstrap(margins, level=level, seed=seed), chance, hits))
    return found


def check_filler(
    filler: Sequence[Row], distances: Sequence[int], of: Sequence[Fact] | None = None
) -> list[list[Message]]:
    """The exchanges of some conversations that may stand between a fact and its question.

    Raises:
        DataError: If there are fewer than the largest distance.
    """
    exchanges = _exchanges(filler, facts() if of is None else of)
    if len(exchanges) < max(distances):
        raise DataError(
            f"the filler holds {len(exchanges)} exchanges without an answer to the facts, expected at least "
            f"{max(distances)}; give more conversations"
        )
    return exchanges


def _margins(
    model: Any, tokenizer: Any, prompts: Sequence[list[Message]], asked: Sequence[Fact], batch_size: int
) -> list[float]:
    rows = [
        Row([*prompt, {"role": "assistant", "content": f"{candidate}."}], line)
        for line, (prompt, fact) in enumerate(zip(prompts, asked, strict=True), start=1)
        for candidate in (fact.answer, *fact.distractors)
    ]
    scores = iter(score_turns(model, tokenizer, rows, last_only=True, batch_size=batch_size))
    margins = []
    for fact in asked:
        right = next(scores)[0].log_prob
        margins.append(right - max(next(scores)[0].log_prob for _ in fact.distractors))
    return margins


def _prompt(fact: Fact, between: Sequence[list[Message]]) -> list[Message]:
    told: list[Message] = [
        {"role": "user", "content": fact.statement},
        {"role": "assistant", "content": fact.reply},
    ]
    return [*told, *(turn for exchange in between for turn in exchange), {"role": "user", "content": fact.question}]


def _exchanges(filler: Sequence[Row], asked: Sequence[Fact]) -> list[list[Message]]:
    """Pairs of a request and its reply that hold none of the answers."""
    answers = [answer.lower() for fact in asked for answer in (fact.answer, *fact.distractors)]
    found = []
    for row in filler:
        for user, assistant in zip(row.messages, row.messages[1:], strict=False):
            text = f"{user['content']}\n{assistant['content']}".lower()
            if (user["role"], assistant["role"]) == ("user", "assistant") and not any(a in text for a in answers):
                found.append([user, assistant])
    return found
