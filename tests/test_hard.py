"""Hard pairs and failure analysis: every pair is right on one side and wrong on the other for the reason it states."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeft.data.preferences import read_preferences
from moeft.data.tool_schemas import ToolSchemas
from moeft.demo.ops_agent import generate
from moeft.demo.ops_schema import ops_tools
from moeft.errors import DataError
from moeft.evaluation.statistics import wilson
from moeft.hard.analysis import analyze
from moeft.hard.augment import ORDERS, augmented
from moeft.hard.build import build, mixed
from moeft.hard.categories import CALL_ONLY, CATEGORIES
from moeft.hard.judge import judge
from moeft.hard.requests import HeldOutTexts, Request, read_requests
from moeft.hard.targets import Targets
from moeft.tool_protocols import PROTOCOLS, ToolCall, ToolCallError
from tests.tiny_preferences import write_pairs

SCHEMAS = ToolSchemas(ops_tools())
BRACKET = PROTOCOLS["bracket"]
OPEN_TOOLS = [
    {"name": "send_mail", "description": "Send a mail", "parameters": {"type": "object", "properties": {
        "to": {"type": "string"}, "urgent": {"type": "boolean"}}, "required": ["to"]}},
    {"name": "send_fax", "description": "Send a fax", "parameters": {"type": "object", "properties": {
        "to": {"type": "string"}, "pages": {"type": "integer"}}, "required": ["to", "pages"]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def material():
    """Requests to make pairs from, and held-out ones."""
    train, held_out = generate(0, 150, 45)
    return [read_requests(rows, SCHEMAS, BRACKET).requests for rows in (train, held_out)]


@pytest.fixture(scope="module")
def built(material):
    train, held_out = material
    return build(SCHEMAS, train, BRACKET, 195, held_out=HeldOutTexts(r.prompt for r in held_out), seed=1)


def test_every_category_has_its_share(built):
    assert set(Counter(pair.category for pair in built.pairs).items()) == {(name, 15) for name in CATEGORIES}


def test_chosen_answers_are_valid_and_rejected_ones_are_worse_for_their_reason(built):
    for pair in built.pairs:
        schemas = ToolSchemas(pair.tools)
        chosen = BRACKET.parse(pair.chosen)
        for call in chosen.calls:
            assert schemas.problem(call.name, call.arguments) is None, pair
        verdict = judge(pair.rejected, chosen.calls, schemas, BRACKET, chosen.said)
        assert verdict.category is not None
        assert verdict.reason == pair.fault
        assert pair.how


@pytest.mark.parametrize(
    ("category", "verdicts"),
    [
        ("tool_confusion", {"tool_confusion"}),
        ("wrong_params", {"wrong_params"}),
        ("format_break", {"format_break"}),
        ("hallucination_guard", {"hallucination_guard"}),
        ("stale_context", {"wrong_params"}),
        ("recovery", {"wrong_params"}),
        ("edge_case", {"wrong_params"}),
        ("multi_tool", {"multi_tool"}),
        ("overthinking", {"overthinking"}),
        ("missing_tool", {"missing_tool"}),
        ("premature_answer", {"premature_answer"}),
        ("refusal_when_answerable", {"refusal_when_answerable"}),
        ("adversarial_user", {"premature_answer", "tool_confusion"}),
    ],
)
def test_a_category_is_judged_as_what_it_is(built, category, verdicts):
    for pair in built.pairs:
        if pair.category == category:
            chosen = BRACKET.parse(pair.chosen)
            found = judge(pair.rejected, chosen.calls, ToolSchemas(pair.tools), BRACKET, chosen.said)
            assert found.category in verdicts, pair


def test_no_pair_comes_twice_or_holds_a_held_out_request(built, material):
    keys = {json.dumps([pair.prompt, pair.chosen, pair.rejected]) for pair in built.pairs}
    assert len(keys) == len(built.pairs)
    texts = {request.text.lower().strip(" .") for request in material[1]}
    for pair in built.pairs:
        for message in pair.prompt:
            assert message["content"].lower().strip(" .") not in texts


def test_seeds_that_are_held_out_are_left_out_however_they_are_put(material):
    train, _ = material
    shouted = [train[0].prompt, [{"role": "user", "content": train[1].text.upper().replace(" ", "  ") + "!!"}]]
    rows = [{"messages": [*r.prompt, {"role": "assistant", "content": BRACKET.format(r.calls)}]} for r in train[:4]]
    read = read_requests(rows, SCHEMAS, BRACKET, HeldOutTexts(shouted))
    assert [reject.line for reject in read.rejects] == [1, 2]
    inside = HeldOutTexts([[{"role": "user", "content": "drain atlas in asia"}]])
    assert inside.leak([{"role": "user", "content": "Hello. Please drain atlas in Asia, then rest."}])
    assert inside.leak([{"role": "user", "content": "drain atlas in europe"}]) is None


def test_every_nth_pair_keeps_right_reasoning_and_corrupts_the_call_alone(built):
    alike = [pair for pair in built.pairs if pair.category in CALL_ONLY]
    reasoned = [pair for pair in alike if pair.reasoned]
    assert len(reasoned) == len(alike) // 5
    for pair in reasoned:
        said = BRACKET.parse(pair.chosen).said
        assert said.strip()
        assert pair.rejected.startswith(said.strip())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"categories": 3}, "categories holds something else"),
        ({"categories": {"tool_confusion": "much"}}, "categories holds something else"),
        ({"categories": {"nonsense": 1.0}}, "no category has a weight above 0"),
        ({"tools": {"drain_node": -1}}, "tools holds something else"),
        ({"confusion": {"drain_node": 5}}, r"confusion\.drain_node holds something else"),
        ({"more": {}}, "holds no targets"),
    ],
)
def test_targets_that_make_no_sense_are_refused(tmp_path, changes, reason):
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({"categories": {}, "tools": {}, "confusion": {}} | changes))
    with pytest.raises(DataError, match=reason):
        Targets.read(path)


def test_right_reasoning_names_the_values_of_the_right_call(material):
    train, _ = material
    found = build(SCHEMAS, train, BRACKET, 60, targets=Targets({"edge_case": 1.0}), reasoned_every=1, seed=5).pairs
    assert found
    for pair in found:
        reply = BRACKET.parse(pair.chosen)
        for value in reply.calls[0].arguments.values():
            assert str(value) in reply.said, pair


def test_requests_in_other_words_stay_sentences():
    shop = SimpleNamespace(rng=random.Random(0), requests=[])
    for text, orders in (("Hi, I need to check my bill.", False), ("Could you drain atlas in asia", True)):
        request = Request([{"role": "user", "content": text}], (), "", "", 1)
        found = {augmented(shop, request, 1.0).text for _ in range(60)}
        assert len(found) > 4
        assert not any("require to" in other for other in found), found
        assert any(other.startswith(ORDERS) for other in found) == orders, found


def test_the_same_seed_makes_the_same_pairs_and_another_seed_others(material, built):
    train, held_out = material
    options = {"held_out": HeldOutTexts(r.prompt for r in held_out)}
    assert build(SCHEMAS, train, BRACKET, 195, seed=1, **options).pairs == built.pairs
    assert build(SCHEMAS, train, BRACKET, 195, seed=2, **options).pairs != built.pairs


def test_pairs_are_preference_rows(built, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [pair.to_json() for pair in built.pairs])
    read = read_preferences(path)
    assert (len(read.rows), read.rejects) == (len(built.pairs), [])


@pytest.mark.parametrize("name", ["gemma", "openai", "glaive"])
def test_pairs_are_made_in_every_protocol(name):
    rows = [
        {"messages": [{"role": "user", "content": f"Send a mail to {who}."}, {"role": "assistant", "content": "",
         "tool_calls": [{"function": {"name": "send_mail", "arguments": {"to": who}}}]}]}
        for who in ("Ann", "Bob", "Cleo", "Dan")
    ]  # fmt: skip
    schemas, protocol = ToolSchemas(OPEN_TOOLS), PROTOCOLS[name]
    requests = read_requests(rows, schemas, protocol).requests
    found = build(schemas, requests, protocol, 60, seed=3)
    counts = Counter(pair.category for pair in found.pairs)
    assert set(counts) >= set(CATEGORIES) - {"wrong_params"}
    read = read_preferences([pair.to_json() for pair in found.pairs])
    assert read.rejects == []


def test_a_confusion_that_was_seen_is_what_is_trained_against(material):
    targets = Targets({"tool_confusion": 1.0}, {}, {name: {"page_oncall": 1.0} for name in SCHEMAS.names})
    found = build(SCHEMAS, material[0], BRACKET, 20, targets=targets)
    assert {pair.category for pair in found.pairs} == {"tool_confusion"}
    for pair in found.pairs:
        wanted, called = (BRACKET.parse(text).calls[0].name for text in (pair.chosen, pair.rejected))
        assert "page_oncall" in (wanted, called)


@settings(max_examples=40, deadline=None)
@example(num_hard=30, num_easy=7, share=0.6)  # both counts round up
@given(num_hard=st.integers(1, 60), num_easy=st.integers(1, 200), share=st.floats(0.05, 1))
def test_the_share_of_hard_rows_is_the_one_asked_for(num_hard, num_easy, share):
    rows = mixed([{"category": "x"}] * num_hard, [{}] * num_easy, share)
    hard = sum("category" in row for row in rows)
    assert hard >= 1
    assert abs(hard - share * len(rows)) <= 1.5


def test_shares_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="share is 0"):
        mixed([{}], [{}], 0)


TOOLS = ("restart_service", {"service": "mail", "environment": "live"})


@pytest.mark.parametrize(
    ("reply", "category"),
    [
        ('[TOOL: restart_service service="mail" environment="live"]', None),
        ('[TOOL: restart_service environment="live" service="mail"]', None),
        ('On it. [TOOL: restart_service service="mail" environment="live"]', None),
        ('[TOOL: restart_service service="mail" environment="test"]', "wrong_params"),
        ('[TOOL: restart_service service="mail"]', "wrong_params"),
        ('[TOOL: restart_service service="mail" environment="live" force="1"]', "hallucination_guard"),
        ('[TOOL: restart_mail service="mail"]', "hallucination_guard"),
        ('[TOOL: purge_cache service="mail" region="asia"]', "tool_confusion"),
        ('[TOOL: restart_service service="mail" environment="live"', "format_break"),
        ("Done, mail is up again.", "premature_answer"),
        ("I'm sorry, I cannot do that.", "refusal_when_answerable"),
        ("", "premature_answer"),
        ("x" * 300 + '[TOOL: restart_service service="mail" environment="live"]', "overthinking"),
    ],
)
def test_replies_are_judged(reply, category):
    assert judge(reply, [ToolCall(*TOOLS)], SCHEMAS, BRACKET).category == category


def test_a_call_where_none_is_wanted_is_a_missing_tool():
    assert judge('[TOOL: drain_node host="nova"]', [], SCHEMAS, BRACKET).category == "missing_tool"
    assert judge("No tool of mine does that.", [], SCHEMAS, BRACKET).category is None


@given(st.text(max_size=40))
def test_any_reply_has_a_verdict(text):
    verdict = judge(text, [ToolCall(*TOOLS)], SCHEMAS, BRACKET)
    assert verdict.category in CATEGORIES


def test_an_analysis_counts_tools_and_aims_at_what_failed(material):
    requests = material[1]
    replies = [BRACKET.format(request.calls) for request in requests]
    drains = [index for index, request in enumerate(requests) if request.calls[0].name == "drain_node"]
    for index in drains:
        replies[index] = replies[index].replace("drain_node", "reboot_host")
    found = analyze(requests, replies, SCHEMAS, BRACKET)
    assert found.failures == {"tool_confusion": len(drains)}
    assert found.confusion["drain_node"] == {"reboot_host": len(drains)}
    assert found.accuracy.value == 1 - len(drains) / len(requests)
    assert found.tools["drain_node"].recall.value == 0
    assert found.tools["drain_node"].precision is None
    reboot = found.tools["reboot_host"]
    assert reboot.recall.value == 1
    assert reboot.precision.value == 0.5
    assert reboot.precision.low < 0.5 < reboot.precision.high
    assert found.targets.confusion == {"drain_node": {"reboot_host": len(drains)}}
    weights = found.targets.categories
    assert weights["tool_confusion"] > 10 * weights["format_break"] > 0
    assert max(found.targets.tools, key=found.targets.tools.get) == "drain_node"


def test_replies_that_do_not_fit_the_requests_are_refused(material):
    with pytest.raises(ValueError, match="1 replies for 45 requests"):
        analyze(material[1], ["x"], SCHEMAS, BRACKET)


@pytest.mark.parametrize(("successes", "num"), [(0, 10), (5, 10), (10, 10), (99, 100)])
def test_wilson_intervals_are_those_of_the_formula(successes, num):
    """Both ends solve (p - share)^2 = z^2 p (1 - p) / n."""
    found = wilson(successes, num)
    for p in (found.low, found.high):
        assert (p - successes / num) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / num, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "[TOOL: nothing]"}]},
         "'nothing', which is no tool"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "[TOOL: "}]},
         "the name of a tool at character 7"),
        ({"messages": [{"role": "user", "content": "hi"},
         {"role": "assistant", "content": '[TOOL: drain_node host="moon" region="asia"]'}]}, "'moon' is not one of"),
    ],
)  # fmt: skip
def test_seeds_that_cannot_be_used_say_why(row, reason):
    with pytest.raises(DataError, match="no row is a request") as caught:
        read_requests([row], SCHEMAS, BRACKET)
    assert reason in str(caught.value)


def test_requests_without_calls_make_no_pairs():
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    with pytest.raises(DataError, match="nothing to corrupt"):
        build(SCHEMAS, read_requests(rows, SCHEMAS, BRACKET).requests, BRACKET, 5)


def test_bracket_numbers_are_held_to_the_schema():
    schemas, call = ToolSchemas(OPEN_TOOLS), ToolCall("send_fax", {"to": "Ann", "pages": 3})
    assert judge('[TOOL: send_fax to="Ann" pages="3"]', [call], schemas, BRACKET).category is None
    with pytest.raises(ToolCallError):
        BRACKET.parse("[TOOL: send_fax pages='three']")
