"""The checkers of IFEval on the published replies of GPT-4."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from moeft.evaluation.measure import measure
from moeft.evaluation.tasks import build_task
from tests.shared_data import SHARED, needs_shared_data

pytestmark = [
    needs_shared_data,
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


def test_item_whose_checker_lacks_its_data_is_marked_and_not_asked(tmp_path, monkeypatch):
    pytest.importorskip(
        "if_verifiable.ifbench.instructions_registry",
        reason='if-verifiable is absent: pip install "moeft[eval]"',
        exc_type=ImportError,
    )
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    rows = [
        {
            "key": "stop",
            "prompt": "Write.",
            "instruction_id_list": ["ratio:stop_words"],
            "kwargs": [{"percentage": 10}],
        },
        {"key": "odd", "prompt": "Write.", "instruction_id_list": ["no:such"], "kwargs": [{}]},
        {"key": "emoji", "prompt": "Write.", "instruction_id_list": ["format:emoji"], "kwargs": [{}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    asked: list[str] = []

    class Subject:
        identity: ClassVar[dict[str, str]] = {}

        def answer(self, requests):
            asked.extend(request.messages[0]["content"] for request in requests)
            return ((index, {"reply": "Fine. \N{GRINNING FACE}"}) for index in range(len(requests)))

    (result,) = measure(Subject(), [build_task("ifbench", tmp_path / "rows.jsonl")])
    assert asked == ["Write."]
    assert list(result.figures) == ["emoji"]
    assert "python -m nltk.downloader punkt_tab stopwords" in result.failed["stop"]
    assert "no checker for the instruction 'no:such'" in result.failed["odd"]
