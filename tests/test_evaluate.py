"""Measuring tasks: answers kept and taken up again, failures marked, runs compared, the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import moeft.demo
from moeft.errors import DataError, MoeftError, RunFolderError
from moeft.evaluation.answers import AnswerCache
from moeft.evaluation.measure import TaskResult, measure
from moeft.evaluation.model_subject import ModelSubject
from moeft.evaluation.paired import holm, paired_change, paired_difference
from moeft.evaluation.request import Answer, Chat, Choices, Request, Text
from moeft.evaluation.results import compare, read_results, write_results
from moeft.evaluation.task import Item, Metric, Task, sampled, share
from moeft.evaluation.tasks import build_task
from moeft.evaluation.tasks.choice import choice_item, choice_task
from moeft.runs.evaluate import EvaluateSettings, run
from moeft.runs.evaluate import compare as compare_runs
from tests.tiny_models import tiny_model
from tests.tiny_training import tiny_tokenizer

BASE = Path(moeft.demo.__file__).parent / "base"


class Scripted:
    """A subject with known answers that counts what it is asked."""

    def __init__(self, answers: dict[str, Answer], stop_after: int | None = None) -> None:
        self.answers, self.stop_after = answers, stop_after
        self.asked: list[str] = []
        self.identity = {"model": "scripted"}

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for index, request in enumerate(requests):
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            text = request.messages[0]["content"]
            self.asked.append(text)
            yield index, self.answers[text]


def yes_task(count: int = 6) -> Task:
    """Is the reply yes?"""
    items = tuple(Item(str(i), Chat(({"role": "user", "content": f"q{i}"},))) for i in range(count))
    return Task("yes", items, (Metric("yes"),), lambda found: [{"yes": share(a["reply"] == "yes")} for _, a in found])


def replies(count: int = 6, wrong: Sequence[int] = ()) -> dict[str, Answer]:
    return {f"q{i}": {"reply": "no" if i in wrong else "yes"} for i in range(count)}


def test_second_start_asks_only_what_is_not_answered_yet(tmp_path):
    path = tmp_path / "answers.jsonl"
    stopped = Scripted(replies(), stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        measure(stopped, [yes_task()], AnswerCache(path))
    with path.open("a") as file:
        file.write('{"key": "torn')  # as a kill leaves it
    again = Scripted(replies())
    (result,) = measure(again, [yes_task()], AnswerCache(path))
    assert again.asked == ["q4", "q5"]
    assert result.estimate(result.metrics[0]).value == 1


def test_other_settings_or_another_model_find_no_answer(tmp_path):
    cache = AnswerCache(tmp_path / "answers.jsonl")
    measure(Scripted(replies()), [yes_task()], cache)
    warmer = Scripted(replies())
    measure(warmer, [sampled(yes_task(), 0.7, seed=1)], cache)
    other = Scripted(replies())
    other.identity = {"model": "another"}
    measure(other, [yes_task()], cache)
    assert len(warmer.asked) == len(other.asked) == 6


def test_failed_item_is_marked_left_out_and_tried_again(tmp_path):
    cache = AnswerCache(tmp_path / "answers.jsonl")
    answers = replies() | {"q2": {"error": "the server answered 500"}}
    (result,) = measure(Scripted(answers), [yes_task()], cache)
    assert result.failed == {"2": "the server answered 500"}
    estimate = result.estimate(result.metrics[0])
    assert (estimate.value, estimate.num) == (1, 5)
    again = Scripted(replies())
    measure(again, [yes_task()], cache)
    assert again.asked == ["q2"]


def test_run_in_which_all_items_failed_has_no_score():
    answers = {f"q{i}": {"error": "timeout"} for i in range(6)}
    with pytest.raises(DataError, match="task yes: all 6 items failed, the first with: timeout"):
        measure(Scripted(answers), [yes_task()])


def test_empty_replies_are_counted():
    answers = replies() | {"q1": {"reply": " \n"}}
    (result,) = measure(Scripted(answers), [yes_task()])
    assert result.empty == 1
    assert result.estimate(result.metrics[0]).value == pytest.approx(5 / 6)


def test_file_that_holds_no_answers_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(RunFolderError, match=r"rows.jsonl:1 is no answer"):
        AnswerCache(tmp_path / "rows.jsonl")


def test_few_items_are_flagged():
    (few,) = measure(Scripted(replies(29)), [yes_task(29)])
    (enough,) = measure(Scripted(replies(30)), [yes_task(30)])
    assert few.estimate(few.metrics[0]).is_of_few
    assert not enough.estimate(enough.metrics[0]).is_of_few


def test_choice_takes_the_most_probable_and_the_most_probable_by_length():
    task = choice_task("choices", [choice_item("1", "q", ["aa", "bbbbbb"], 1)])
    (figures,) = task.grade([(task.items[0], {"log_probs": [-3.0, -4.0]})])
    assert figures == {"acc": (0.0, 1.0), "acc_norm": (1.0, 1.0)}


def test_permutation_test_is_that_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is absent: pip install scipy")
    rng = np.random.default_rng(3)
    first = (rng.random(60) < 0.5).astype(float)
    second = np.where(rng.random(60) < 0.3, 1 - first, first)
    units = [np.stack([x, np.ones(60)], axis=1) for x in (first, second)]
    ours = paired_difference(*units, Metric("acc"))
    theirs = scipy_stats.permutation_test(
        (first, second), lambda a, b: np.mean(b) - np.mean(a), permutation_type="samples", n_resamples=9999, rng=1
    )
    assert ours.change.value == pytest.approx(second.mean() - first.mean())
    # Two estimates of p from 9999 draws each differ by at most 0.02 (4 standard errors at p = 0.5).
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_perplexity_is_compared_by_the_sums_of_items():
    first = np.array([[-10.0, 5], [-30.0, 10]])
    second = np.array([[-12.0, 5], [-33.0, 10]])
    found = paired_difference(first, second, Metric("ppl", "lower", "perplexity"))
    assert (found.first, found.second) == pytest.approx((np.exp(40 / 15), np.exp(45 / 15)))


def test_equal_runs_do_not_differ():
    units = np.array([[1.0, 1], [0.0, 1]])
    assert paired_difference(units, units, Metric("acc")).p_value == 1


@pytest.mark.parametrize(
    ("given", "corrected"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5], [0.5]), ([0.6, 0.7], [1.0, 1.0]), ([], [])],
)
def test_p_values_are_corrected_as_holm_does(given, corrected):
    assert holm(given) == pytest.approx(corrected)


def results(wrong: Sequence[int]) -> list[TaskResult]:
    return measure(Scripted(replies(80, wrong)), [yes_task(80)])


def test_real_difference_is_told_from_chance():
    (real,) = compare(results(range(20)), results(range(50)))
    assert real.verdict() == "worse"
    assert real.difference.change.value == pytest.approx(-30 / 80)
    (chance,) = compare(results(range(20)), results(range(1, 22)))
    assert chance.verdict() == "not told apart"


def test_runs_are_compared_on_what_both_answered(tmp_path):
    first, second = results(()), measure(Scripted(replies(60)), [yes_task(60)])
    (compared,) = compare(first, second)
    assert compared.difference.change.num == 60
    assert compared.only_one == 20
    with pytest.raises(DataError, match="no item in common"):
        compare(first, measure(Scripted(replies(60)), [sampled(yes_task(60), 1.0, 0)]))


def test_results_come_back_from_disk(tmp_path):
    found = results(range(3))
    write_results(tmp_path, found)
    (back,) = read_results(tmp_path)
    assert back.figures == found[0].figures
    assert back.estimate(back.metrics[0]) == found[0].estimate(found[0].metrics[0])
    (tmp_path / "results.json").write_text('{"tasks": [{"name": "x"}]}')
    with pytest.raises(RunFolderError, match="damaged or of another version"):
        read_results(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds no results.json; give the --out folder"):
        read_results(tmp_path / "nothing")


def test_model_answers_requests_of_all_kinds_at_once():
    subject = ModelSubject(tiny_model("qwen3_moe"), tiny_tokenizer())
    chat = Chat(({"role": "user", "content": "Hi"},), max_new_tokens=3)
    requests = [chat, Choices("2 + 2 is", (" 4", " 5")), Text("A text."), Choices("", ("empty", "context"))]
    answers = dict(subject.answer(requests))
    assert sorted(answers) == [0, 1, 2, 3]
    assert isinstance(answers[0]["reply"], str)
    assert len(answers[1]["log_probs"]) == len(answers[3]["log_probs"]) == 2
    assert answers[2]["tokens"] == 7


def test_what_cannot_be_scored_is_an_error_of_its_item_alone():
    subject = ModelSubject(tiny_model("qwen3_moe"), tiny_tokenizer(), max_length=16)
    fits, too_long = Choices("2 + 2 is", (" 4", " 5")), Choices("2 + 2 is", (" 4", " 5" * 40))
    answers = dict(subject.answer([too_long, fits]))
    assert "expected 1 to 16" in answers[0]["error"]
    assert len(answers[1]["log_probs"]) == 2
    subject.model.get_input_embeddings().weight.data[:] = torch.nan
    assert "not a finite number" in dict(subject.answer([fits]))[0]["error"]


def test_a_change_that_is_no_number_is_no_difference():
    nothing, something = np.zeros((6, 2)), np.array([[1.0, 4.0]] * 6)
    with np.errstate(invalid="ignore"):
        change, p_value = paired_change(nothing, something, lambda a, b: b[..., 0] / b[..., 1] - a[..., 0] / a[..., 1])
    assert np.isnan(change.value)
    assert p_value == 1.0


@pytest.mark.parametrize("model", ["http://localhost:1", "tuned.gguf"])
def test_an_adapter_for_what_is_served_is_refused(tmp_path, model):
    with pytest.raises(MoeftError, match="merge the adapter first"):
        run(EvaluateSettings(model, ("identity",), adapter=tmp_path), tmp_path / "out")


def test_sampling_depends_on_the_seed_alone():
    subject = ModelSubject(tiny_model("olmoe"), tiny_tokenizer())

    def reply(seed: int, temperature: float) -> str:
        chat = Chat(({"role": "user", "content": "Hi"},), 12, temperature=temperature, seed=seed)
        return dict(subject.answer([chat]))[0]["reply"]

    assert reply(1, 1.0) == reply(1, 1.0)
    assert reply(1, 1.0) != reply(2, 1.0)
    assert reply(1, 0.0) == reply(2, 0.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "piqa.jsonl"
    lines = [
        {"query": f"Question: what is {i}?", "choices": ["a stone", "some water"], "gold": i % 2} for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_command_measures_compares_and_refuses_to_begin_again(tmp_path, rows):
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "moeft.cli", "evaluate", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)

    asked = (BASE, "--tasks", f"piqa={rows}", "--dtype", "float32")
    first = command(*asked, "--out", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    assert "| piqa acc |" in first.stdout
    assert "(!) fewer than 30 items" in first.stdout
    again = command(*asked, "--out", tmp_path / "a")
    assert again.returncode == 1
    assert "nothing is left to do" in again.stderr
    compared = command("--compare", tmp_path / "a", tmp_path / "a")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("not told apart") == 2
    ignored = command("--compare", tmp_path / "a", tmp_path / "a", "--limit", "3")
    assert ignored.returncode == 2
    assert "--limit" in ignored.stderr
    assert command(BASE, "--tasks", "piqa").returncode == 2


def test_killed_command_goes_on_where_it_was(tmp_path):
    count = 500
    rows = tmp_path / "piqa.jsonl"
    lines = [
        {"query": f"{i} {i * 7} stones?", "choices": [f"{i} in a row", "none of them"], "gold": 0} for i in range(count)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    words = [sys.executable, "-m", "moeft.cli", "evaluate", BASE, "--tasks", f"piqa={rows}", "--dtype", "float32"]
    words = [*map(str, words), "--out", str(tmp_path / "out")]
    answers = tmp_path / "out" / "answers.jsonl"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (answers.is_file() and answers.stat().st_size):
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    kept = [line for line in answers.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    assert 0 < len(kept) < count
    again = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    found = answers.read_text("utf-8").splitlines(keepends=True)
    assert found[: len(kept)] == kept
    assert len({json.loads(line)["item"] for line in found}) == len(found) == count
    (result,) = read_results(tmp_path / "out")
    assert len(result.figures) == count


def test_base_and_adapter_do_not_share_answers(tmp_path, rows):
    import moeft
    from moeft.integration.loading import load
    from tests.tiny_models import randomise_lora

    model = moeft.add_lora(load(BASE, dtype="float32")[0], 2, targets=("attention",), seed=0)
    randomise_lora(model, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    cache = tmp_path / "shared.jsonl"
    settings = EvaluateSettings(str(BASE), (f"piqa={rows}",), dtype="float32")
    said: list[str] = []
    run(settings, tmp_path / "a", cache=cache, show=said.append)
    with_adapter = EvaluateSettings(str(BASE), (f"piqa={rows}",), tmp_path / "adapter", dtype="float32")
    run(with_adapter, tmp_path / "b", cache=cache, show=said.append)
    run(settings, tmp_path / "c", cache=cache, show=said.append)
    assert len(cache.read_text().splitlines()) == 10
    assert "not told apart" in compare_runs(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hellaswagg", "there is no task 'hellaswagg'; did you mean hellaswag"),
        ("piqa=missing.jsonl", r"task piqa: there is no missing.jsonl; baber/piqa on the Hugging Face hub has them"),
        ("perplexity", "task perplexity needs a file of rows, perplexity=FILE or --data FOLDER"),
    ],
)
def test_task_that_cannot_be_had_is_refused_before_anything_is_loaded(tmp_path, word, message):
    with pytest.raises(MoeftError, match=message):
        run(EvaluateSettings(str(tmp_path / "no-model"), (word,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_asked_is_refused_before_the_folder_is_made(tmp_path, rows):
    with pytest.raises(DataError, match="a server gives no log-probabilities"):
        run(EvaluateSettings("http://127.0.0.1:9", (f"piqa={rows}",)), tmp_path / "out")
    with pytest.raises(DataError, match="task piqa is given twice"):
        run(EvaluateSettings(str(BASE), (f"piqa={rows}", f"piqa={rows}")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"goal": "x"}', "task piqa: row 1 has the columns goal and cannot be read as a question"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "item 1: answer 2 of 2 choices"),
        ("{torn", "task piqa: .* row 1: malformed JSON"),
    ],
)
def test_row_that_is_no_question_is_refused(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        build_task("piqa", tmp_path / "rows.jsonl")


def test_data_folder_without_the_tasks_file_names_the_pattern(tmp_path):
    with pytest.raises(DataError, match=r"holds no piqa/\*.jsonl; give the file as piqa=FILE"):
        build_task("piqa", data=tmp_path)
