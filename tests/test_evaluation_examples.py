"""Answered questions before each question: which ones are shown, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeft.errors import DataError
from moeft.evaluation.prefix_tree import Scored, trees
from moeft.evaluation.tasks import build_task


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def piqa(tmp_path) -> Path:
    rows = [{"query": f"Question: q{i}", "choices": ["no", "yes"], "gold": i % 2} for i in range(6)]
    return write(tmp_path / "piqa.jsonl", rows)


def mmlu_row(subject: str, number: int) -> dict:
    return {"subject": subject, "question": f"{subject} {number}?", "choices": list("wxyz"), "answer": number % 4}


def test_first_rows_are_shown_and_not_asked(piqa):
    task = build_task("piqa", piqa, shots=2)
    assert [item.key for item in task.items] == ["3", "4", "5", "6"]
    shown = "Question: q0\nAnswer: no\n\nQuestion: q1\nAnswer: yes\n\n"
    assert task.items[0].request.context == shown + "Question: q2\nAnswer:"


def test_a_smaller_sample_sees_the_same_examples(piqa):
    every = {item.key: item for item in build_task("piqa", piqa, shots=2).items}
    for item in build_task("piqa", piqa, shots=2, limit=2).items:
        assert item == every[item.key]


def test_examples_are_of_the_subject_that_is_asked_about(tmp_path):
    subjects = ("college_physics", "world_religions")
    write(tmp_path / "mmlu" / "test.jsonl", [mmlu_row(subject, i) for i in (7, 8) for subject in subjects])
    write(tmp_path / "mmlu" / "dev.jsonl", [mmlu_row(subject, i) for subject in subjects for i in range(3)])
    task = build_task("mmlu", data=tmp_path, shots=2)
    assert len(task.items) == 4
    physics, religions = (item.request.context for item in task.items[:2])
    assert physics.startswith("The following are multiple choice questions (with answers) about college physics.\n\n")
    assert physics.count("college_physics") == religions.count("world_religions") == 3
    assert "world" not in physics


def test_tasks_over_replies_have_no_examples(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "Write."}])
    assert build_task("refusal", rows, shots=3).items == build_task("refusal", rows).items


@pytest.mark.parametrize(
    ("shots", "message"),
    [(6, "all of its 6 rows are examples"), (-1, "-1 examples, expected 0 or more")],
)
def test_shots_that_leave_no_question_are_refused(piqa, shots, message):
    with pytest.raises(DataError, match=f"task piqa: {message}"):
        build_task("piqa", piqa, shots=shots)


def test_subject_with_too_few_examples_is_refused(tmp_path):
    write(tmp_path / "mmlu" / "test.jsonl", [mmlu_row("anatomy", 1)])
    write(tmp_path / "mmlu" / "dev.jsonl", [mmlu_row("anatomy", 2)])
    with pytest.raises(DataError, match=r"1 examples under '.*about anatomy.', expected 5; ask for fewer"):
        build_task("mmlu", data=tmp_path, shots=5)


@pytest.mark.parametrize("shared", [100, 1500])
def test_a_long_common_beginning_is_not_computed_for_every_question(shared):
    sequences = [Scored((*range(shared), *(shared + 100 * i + j for j in range(80))), shared + 79) for i in range(40)]
    places = sum(len(tree.tokens) for tree in trees(sequences, row_tokens=512))
    least = shared + 40 * 79
    assert least <= places < 1.2 * least
