"""The suite that comes with moeft: what it holds, that its checks are IFEval's, and that it watches a run."""

from __future__ import annotations

import json
from importlib import util

import pytest

from moeft.config.gate import Gate
from moeft.errors import DataError, MissingExtraError
from moeft.evaluation.sources import read_rows
from moeft.evaluation.tasks import build_task
from moeft.evaluation.tasks.short_instructions import CHECKS
from moeft.runs.gate import gate_files
from moeft.runs.gate_suite import suite_tasks, with_suite
from tests.shared_data import SHARED, needs_shared_data
from tests.test_gate import embedded, train, verdicts


def gate(**section) -> Gate:
    return Gate.model_validate_json(json.dumps(section))


def of_few(section: Gate, rows: int = 4) -> Gate:
    """A gate whose suite is spelled out, with a few items of each task."""
    whole = with_suite(section)
    tasks = tuple(watched.model_copy(update={"rows": rows}) for watched in whole.tasks)
    return whole.model_copy(update={"tasks": tasks, "divergence": whole.divergence.model_copy(update={"rows": rows})})


def test_gate_that_names_nothing_takes_the_whole_suite():
    found = with_suite(gate(every_steps=50))
    assert [watched.task for watched in found.tasks] == ["hellaswag", "perplexity", "ifeval_short", "language"]
    assert found.divergence.limit == 0.3
    assert gate_files(found).keys() == {"gate.tasks[0]", "gate.tasks[1]", "gate.tasks[2]"}


def test_task_and_divergence_of_the_recipe_replace_those_of_the_suite():
    own = {"task": "hellaswag", "rows": 5, "limit": 0.2}
    found = with_suite(gate(suite="quick", tasks=[own], divergence={"limit": 2.0}))
    assert [(watched.task, watched.rows) for watched in found.tasks] == [("perplexity", 64), ("hellaswag", 5)]
    assert found.divergence.limit == 2.0
    alone = gate(tasks=[own])
    assert with_suite(alone) is alone


def test_every_task_of_the_suite_has_enough_items_for_an_interval():
    for watched in suite_tasks("default"):
        task = build_task(watched.task, watched.path, None, watched.rows)
        assert len(task.items) >= 30
        assert watched.metric in {metric.name for metric in task.metrics}


def test_absent_language_detector_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr("moeft.runs.gate_suite.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"py3langid.*moeft\[data\].*gate.suite to quick"):
        with_suite(gate())
    assert len(with_suite(gate(suite="quick")).tasks) == 2


@needs_shared_data
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_short_checks_agree_with_those_of_lm_eval_on_published_replies():
    pytest.importorskip("lm_eval", reason='lm-eval is absent: pip install "moeft[eval]"')
    rows = read_rows("ifeval", SHARED / "ifeval" / "ifeval_541.jsonl", None)
    # IFEval asks for English too, which its detector does not see in "etchings" and "YES".
    of_one_word = {202, 2341}
    rows = [
        (line, row)
        for line, row in rows
        if set(row["instruction_id_list"]) <= CHECKS.keys() and row["key"] not in of_one_word
    ]
    replies = {
        row["prompt"]: row["response"]
        for _, row in read_rows("ifeval", SHARED / "ifeval" / "gpt4_responses_540.jsonl", None)
    }
    from moeft.evaluation.tasks.instructions import ifeval, use_nltk_data
    from moeft.evaluation.tasks.short_instructions import ifeval_short

    use_nltk_data(SHARED / "nltk_data")
    for change in (str, str.lower, str.upper, lambda reply: reply.replace(",", ""), lambda reply: "  "):
        asked = [change(replies[row["prompt"]]) for _, row in rows]
        graded = [
            task.grade([(item, {"reply": reply}) for item, reply in zip(task.items, asked, strict=True)])
            for task in (ifeval(rows), ifeval_short(rows))
        ]
        theirs, ours = ([figures["instruction_strict"] for figures in found] for found in graded)
        assert len(ours) > 80
        assert theirs == ours


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Say it."}, "needs `instruction_id_list`"),
        ({"prompt": "Say it.", "instruction_id_list": ["a"], "kwargs": []}, "as many `kwargs`"),
        ({"prompt": "x", "instruction_id_list": ["length:x"], "kwargs": [{}]}, "task ifeval knows them all"),
    ],
)
def test_row_that_cannot_be_checked_is_refused(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        build_task("ifeval_short", tmp_path / "rows.jsonl")


@pytest.mark.skipif(util.find_spec("py3langid") is None, reason="py3langid is absent: pip install 'moeft[data]'")
def test_suite_catches_a_destructive_rate_on_the_embedded_model_and_lets_a_sane_one_pass(tmp_path):
    settings = {"every_steps": 4, "budget": None, "every_epoch": False}
    _, caught, run = train(embedded, tmp_path / "destructive", of_few(gate(**settings)), learning_rate=0.3)
    assert verdicts(run) == [(0, "base"), (4, "roll_back")]
    assert {reading["name"] for reading in run.events("gate")[1]["readings"]} == {
        "hellaswag acc_norm",
        "perplexity bits_per_byte",
        "ifeval_short prompt_strict",
        "language same_language",
        "divergence",
    }
    assert "divergence is" in caught.stopped["reason"]
    quick = of_few(gate(**settings, suite="quick"))
    _, passed, run = train(embedded, tmp_path / "sane", quick, learning_rate=1e-3)
    assert verdicts(run) == [(0, "base"), (4, "passed")]
    assert passed.stopped is None
