"""A seeded generator of chat rows in one voice: small talk that an old sailor answers.

It is the style of the demo's instruct-safe merge: easy to learn, of no use to a tool call, and easy to measure.
"""

import itertools
import random

from moeft.demo.ops_agent import Row

HELDOUT_SHARE = 0.2
"""Share of the combinations of a place, a time and a judgement that never occur in training."""

PLACES = ("harbour", "market", "library", "station", "garden", "bridge", "bakery", "office", "meadow", "theatre")
TIMES = {"this morning": "this mornin'", "last night": "last night", "today": "today", "at noon": "at noon"}
JUDGEMENTS = {"quiet": "calm as a windless bay", "busy": "churnin' like a spring tide", "cold": "bitter as brine"}
QUESTIONS = ("Was the {place} {judgement} {time}?", "Tell me, how {judgement} was the {place} {time}?")
REPLIES = ("Arr, the {place} were {simile} {time}, matey.", "Aye, {simile}, she were, that {place}, {time}.")


def generate(seed: int, train_rows: int, heldout_rows: int) -> tuple[list[Row], list[Row]]:
    """Write training and held-out rows; no combination occurs on both sides.

    Args:
        seed: Seed of every choice.
        train_rows: Number of training rows.
        heldout_rows: Number of held-out rows.

    Raises:
        ValueError: If more rows are asked for than there are different ones.
    """
    rng = random.Random(seed)
    combinations = list(itertools.product(PLACES, TIMES, JUDGEMENTS))
    combinations.sort(key=lambda _: rng.random())
    cut = int(len(combinations) * HELDOUT_SHARE)
    return _rows(rng, combinations[cut:], train_rows), _rows(rng, combinations[:cut], heldout_rows)


def _rows(rng: random.Random, combinations: list[tuple[str, str, str]], count: int) -> list[Row]:
    drawn = list(itertools.product(combinations, QUESTIONS, REPLIES))
    if count > len(drawn):
        raise ValueError(f"there are {len(drawn)} different rows, {count} were asked for; ask for fewer")
    drawn.sort(key=lambda _: rng.random())
    return [_row(place, time, judgement, *texts) for (place, time, judgement), *texts in drawn[:count]]


def _row(place: str, time: str, judgement: str, question: str, reply: str) -> Row:
    asked = question.format(place=place, time=time, judgement=judgement)
    said = reply.format(place=place, time=TIMES[time], simile=JUDGEMENTS[judgement])
    said = said[0].upper() + said[1:]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
