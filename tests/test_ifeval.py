"""The checkers of IFEval on the published replies of GPT-4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeft.evaluation.tasks import build_task

SHARED = next((folder / "shared" / "data" for folder in Path(__file__).parents if (folder / "shared").is_dir()), None)
pytestmark = [
    pytest.mark.skipif(SHARED is None, reason="needs shared/data, the project's test data, beside the checkout"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]


def test_checkers_reproduce_the_accuracies_of_the_published_replies():
    pytest.importorskip("lm_eval", reason='lm-eval is absent: pip install "moeft[eval]"')
    task = build_task("ifeval", data=SHARED)
    expected = json.loads((SHARED / "ifeval" / "expected_gpt4.json").read_text("utf-8"))["reproducible"]
    lines = (SHARED / "ifeval" / "gpt4_responses_540.jsonl").read_text("utf-8").splitlines()
    replies = {row["prompt"]: row["response"] for row in map(json.loads, lines)}
    answered = [
        (item, {"reply": replies[item.reference["prompt"]]})
        for item in task.items
        if int(item.key) not in expected["skip_keys"]
    ]
    graded = task.grade(answered)
    assert len(graded) == expected["prompts"]
    correct = [sum(figures[metric.name][0] for figures in graded) for metric in task.metrics]
    assert correct == expected["correct"]
    assert sum(figures["instruction_strict"][1] for figures in graded) == expected["instructions"]


def test_empty_reply_follows_no_instruction():
    pytest.importorskip("lm_eval", reason='lm-eval is absent: pip install "moeft[eval]"')
    task = build_task("ifeval", data=SHARED, limit=3)
    for figures in task.grade([(item, {"reply": "  "}) for item in task.items]):
        assert all(numerator == 0 < denominator for numerator, denominator in figures.values())


def test_ifbench_knows_every_instruction_of_its_prompts():
    registry = pytest.importorskip(
        "if_verifiable.ifbench.instructions_registry",
        reason='if-verifiable is absent: pip install "moeft[eval]"',
        exc_type=ImportError,
    )
    task = build_task("ifbench", data=SHARED)
    assert {name for item in task.items for name in item.reference["instruction_id_list"]} <= set(
        registry.INSTRUCTION_DICT
    )
    assert len(task.items) == 300
