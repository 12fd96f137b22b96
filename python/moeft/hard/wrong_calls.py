"""Pairs whose rejected answer calls wrongly: another tool, other arguments, or in a form that cannot be read.

Each function makes a draft from a request that has calls, or None where the request gives nothing to make it from.
"""

from __future__ import annotations

import json
import re
from typing import Any

from moeft.hard.draft import Draft, with_last_turn, with_wrong_calls
from moeft.hard.requests import Request
from moeft.hard.workshop import Workshop, is_single
from moeft.tool_protocols import ToolCall, ToolCallError

EDGES = ('O\'Brien "x"', "naïve-Ω", "  spaced  out ", "0", "-1", "007", "null", "a" * 120, "C:\\temp\\new")
"""Texts that careless code changes: quotes, other scripts, white space, numbers in words' clothing, paths."""


def tool_confusion(shop: Workshop, request: Request) -> Draft | None:
    """A valid call of a tool that is like the right one, or that was called in its place before."""
    index = shop.rng.randrange(len(request.calls))
    right = request.calls[index]
    name = shop.other_tool(right.name)
    wrong = None if name is None else shop.adapted(right, name)
    if wrong is None:
        return None
    return with_wrong_calls(shop, request, _replaced(request, index, wrong), f"{right.name} taken for {wrong.name}")


def wrong_params(shop: Workshop, request: Request) -> Draft | None:
    """One argument with another value, or a required one left out."""
    index = shop.rng.randrange(len(request.calls))
    right = request.calls[index]
    if not right.arguments:
        return None
    key = shop.rng.choice(sorted(right.arguments))
    arguments = dict(right.arguments)
    if key in shop.schemas.required(right.name) and shop.rng.random() < 0.25:
        del arguments[key]
        how = f"required {key} left out"
    else:
        value = shop.other_value(right.name, key, arguments[key])
        if value is None:
            return None
        how = f"{key} is {value!r} instead of {arguments[key]!r}"
        arguments[key] = value
    return with_wrong_calls(shop, request, _replaced(request, index, ToolCall(right.name, arguments)), how)


def format_break(shop: Workshop, request: Request) -> Draft | None:
    """The right call with a character missing, doubled or changed, so that it cannot be read."""
    chosen = shop.protocol.reply(request.said, request.calls)
    start = len(chosen) - len(shop.protocol.format(request.calls))
    marks = [i for i in range(start, len(chosen)) if not chosen[i].isalnum() and not chosen[i].isspace()]
    shop.rng.shuffle(marks)
    for place in marks:
        kept = {"left out": "", "doubled": chosen[place] * 2, "changed": shop.rng.choice("()'\"")}
        how = shop.rng.choice(sorted(kept))
        broken = chosen[:place] + kept[how] + chosen[place + 1 :]
        try:
            shop.protocol.parse(broken)
        except ToolCallError as error:
            what = f"{chosen[place]!r} {how} at character {place}: {error.reason}"
            return Draft(request.prompt, request.calls, chosen, broken, what)
    return None


def hallucination_guard(shop: Workshop, request: Request) -> Draft | None:
    """A call of a tool, or with a parameter, that does not exist, made of words of those that do."""
    index = shop.rng.randrange(len(request.calls))
    right = request.calls[index]
    other = shop.other_tool(right.name)
    if other is not None and shop.rng.random() < 0.6:
        # Tail of one name behind the head of another; cut at underscores, where names of tools are made of words.
        name = f"{right.name.partition('_')[0]}_{other.rpartition('_')[2]}"
        if name in shop.schemas.names:
            name = f"{right.name}_{other.rpartition('_')[2]}"
        if name in shop.schemas.names:
            return None
        wrong = ToolCall(name, right.arguments)
        return with_wrong_calls(shop, request, _replaced(request, index, wrong), f"invented tool {name}")
    foreign = sorted(
        {key for name in shop.schemas.names for key in shop.schemas.properties(name)}
        - set(shop.schemas.properties(right.name))
    )
    if not foreign or not shop.schemas.properties(right.name):
        return None
    key = shop.rng.choice(foreign)
    wrong = ToolCall(right.name, {**right.arguments, key: "auto"})
    return with_wrong_calls(shop, request, _replaced(request, index, wrong), f"invented parameter {key}")


def stale_context(shop: Workshop, request: Request) -> Draft | None:
    """A second request for the same tool, answered with the arguments of the first."""
    earlier = shop.sibling(request)
    if earlier is None:
        return None
    prompt = [*earlier.prompt, shop.called(earlier.calls), *_tool_turns(shop, earlier), *request.prompt]
    how = f"arguments of the earlier request {earlier.line}"
    return with_wrong_calls(shop, request, earlier.calls, how, prompt)


def edge_case(shop: Workshop, request: Request) -> Draft | None:
    """A value at the edge of what is allowed: one of a closed list in capitals, or any text with quotes or scripts."""
    found = [
        (index, key, value)
        for index, call in enumerate(request.calls)
        for key, value in call.arguments.items()
        if isinstance(value, str) and len(re.findall(rf"\b{re.escape(value)}\b", request.text)) == 1
    ]
    shop.rng.shuffle(found)
    for index, key, value in found:
        call = request.calls[index]
        is_closed = bool(shop.schemas.choices(call.name, key))
        asked = value.upper() if is_closed else shop.rng.choice(EDGES)
        right, wrong = (value, asked) if is_closed else (asked, _mangled(asked))
        calls = _replaced(request, index, ToolCall(call.name, {**call.arguments, key: right}))
        if right == wrong or shop.schemas.problem(call.name, calls[index].arguments):
            continue
        before, after = re.split(rf"\b{re.escape(value)}\b", request.text)
        mistaken = _replaced(request, index, ToolCall(call.name, {**call.arguments, key: wrong}))
        said = re.sub(rf"\b{re.escape(value)}\b", right.replace("\\", r"\\"), request.said)
        try:
            chosen, rejected = shop.protocol.reply(said, calls), shop.protocol.reply(said, mistaken)
        except ValueError:  # The protocol has no form for this text.
            continue
        prompt = with_last_turn(request.prompt, before + asked + after)
        return Draft(prompt, calls, chosen, rejected, f"{key} is asked for as {asked!r}, and called with {wrong!r}")
    return None


def recovery(shop: Workshop, request: Request) -> Draft | None:
    """A call that a tool refused with the error that its schema gives, called the same way again."""
    index = shop.rng.randrange(len(request.calls))
    right = request.calls[index]
    required = [key for key in shop.schemas.required(right.name) if key in right.arguments]
    if not required or not is_single(request):
        return None
    key = shop.rng.choice(required)
    failed = ToolCall(right.name, {name: value for name, value in right.arguments.items() if name != key})
    error = shop.schemas.problem(failed.name, failed.arguments)
    if error is None:
        return None
    calls = _replaced(request, index, failed)
    answer = shop.answered(right.name, json.dumps({"error": error.rpartition(": ")[2]}))
    prompt = [*request.prompt, shop.called(calls), answer]
    return with_wrong_calls(shop, request, calls, f"repeats the call that failed without {key}", prompt)


def _replaced(request: Request, index: int, call: ToolCall) -> tuple[ToolCall, ...]:
    return (*request.calls[:index], call, *request.calls[index + 1 :])


def _tool_turns(shop: Workshop, request: Request) -> list[Any]:
    """Answers to the calls of an earlier turn, where the template wants them, and what the assistant said then."""
    if shop.called(request.calls).get("tool_calls") is None:
        return []
    answers = [shop.answered(call.name, json.dumps({"ok": True})) for call in request.calls]
    return [*answers, {"role": "assistant", "content": request.after or "Done."}]


def _mangled(text: str) -> str:
    """What careless code makes of a text."""
    plain = text.strip().encode("ascii", "ignore").decode().replace('"', "").replace("'", "").replace("\\", "/")
    stripped = plain[:40].lstrip("0-") or "none"
    return stripped if stripped != text else text.upper()
