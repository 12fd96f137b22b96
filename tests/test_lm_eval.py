"""Multiple choice and perplexity against lm-eval's own Hugging Face backend, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeft.evaluation.measure import measure
from moeft.evaluation.model_subject import ModelSubject
from moeft.evaluation.tasks import build_task
from moeft.evaluation.tasks.benchmarks import hellaswag
from moeft.evaluation.tasks.perplexity import detokenise, wikitext_file
from tests.shared_data import SHARED, needs_shared_data
from tests.tiny_models import tiny_model
from tests.tiny_training import tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason='lm-eval is absent: pip install "moeft[eval]"')
pytestmark = [
    needs_shared_data,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]
ROWS = 8
MAX_LENGTH = 300
TASKS = {
    "hellaswag": ("hellaswag/hellaswag_val_2000.jsonl", "{{ctx}}", "{{gold}}", "endings"),
    "piqa": ("piqa/piqa_val_1838.jsonl", "{{query}}\nAnswer:", "{{gold}}", "choices"),
    "arc_easy": ("arc/arc_easy_1000.jsonl", "{{query}}\nAnswer:", "{{gold}}", "choices"),
    "arc_challenge": (
        "arc/arc_challenge_1150.jsonl",
        "Question: {{question.stem}}\nAnswer:",
        "{{(question.choices|map(attribute='label')|list).index(answerKey)}}",
        "{{question.choices|map(attribute='text')|list}}",
    ),
    "mmlu": (
        "mmlu/mmlu_test_2000.jsonl",
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "answer",
        ["A", "B", "C", "D"],
    ),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma4")  # sliding layers, whose window of 16 is shorter than any question


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The first rows of each task, and the beginnings of some pages."""
    folder = tmp_path_factory.mktemp("rows")
    for name, (file, *_) in TASKS.items():
        rows = (SHARED / file).read_text("utf-8").splitlines(keepends=True)[:ROWS]
        (folder / f"{name}.jsonl").write_text("".join(rows), "utf-8")
    pages = [page["page"][:900] for _, page in wikitext_file(SHARED / "wikitext2" / "test.txt")[:3]]
    (folder / "wikitext.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), "utf-8")
    return {name: folder / f"{name}.jsonl" for name in (*TASKS, "wikitext")}


@pytest.fixture(scope="module")
def expected(model, files) -> dict[str, dict]:
    """What lm-eval finds: metrics and samples of each task."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    configs = {
        name: {
            "output_type": "multiple_choice",
            "doc_to_text": context,
            "doc_to_target": target,
            "doc_to_choice": choices,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        for name, (_, context, target, choices) in TASKS.items()
    }
    configs["wikitext"] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": wikitext_detokenizer,
        "process_results": process_results,
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    rows = {"dataset_path": "json", "test_split": "test"}
    tasks = [
        ConfigurableTask(
            config={"task": name, **rows, "dataset_kwargs": {"data_files": {"test": str(files[name])}}, **config}
        )
        for name, config in configs.items()
    ]
    theirs = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=8, max_length=MAX_LENGTH, backend="causal")
    found = lm_eval.simple_evaluate(model=theirs, tasks=tasks, log_samples=True, bootstrap_iters=0)
    return {name: {"metrics": found["results"][name], "samples": found["samples"][name]} for name in configs}


def subject(model) -> ModelSubject:
    return ModelSubject(model, tiny_tokenizer(), max_length=MAX_LENGTH)


@pytest.mark.parametrize("name", list(TASKS))
def test_choices_score_as_in_lm_eval(model, files, expected, name):
    task = build_task(name, files[name])
    answers = dict(subject(model).answer([item.request for item in task.items]))
    for sample in expected[name]["samples"]:
        log_probs = [float(response[0][0]) for response in sample["resps"]]
        # Sums of up to 300 log-probabilities of about 5 nats, float32.
        assert answers[sample["doc_id"]]["log_probs"] == pytest.approx(log_probs, abs=300 * 5 * 2**-22)
    (result,) = measure(subject(model), [task])
    for metric in result.metrics:
        assert result.estimate(metric).value == expected[name]["metrics"][f"{metric.name},none"]


def test_wikitext_scores_as_in_lm_eval(model, files, expected):
    (result,) = measure(subject(model), [build_task("wikitext", files["wikitext"])])
    for metric in result.metrics[:3]:
        theirs = expected["wikitext"]["metrics"][f"{metric.name},none"]
        assert result.estimate(metric).value == pytest.approx(theirs, rel=1e-5)


def test_pages_are_written_as_lm_eval_writes_them():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    for _, row in wikitext_file(SHARED / "wikitext2" / "test.txt"):
        assert detokenise(row["page"]) == wikitext_detokenizer(row)


def test_columns_of_the_hub_become_the_questions_of_lm_eval():
    from lm_eval.tasks.hellaswag.utils import preprocess

    row = {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is  sitting [header] on a roof.",
        "ctx_b": "he [title] starts",
        "endings": ["pulls up [step] roofing. ", "is  done."],
        "label": "1",
    }
    (item,) = hellaswag([("1", row)]).items
    text = "Roof shingle removal: A man is  sitting [header] on a roof. He [title] starts"
    assert item.request.context == preprocess(text)
    assert list(item.request.continuations) == [f" {preprocess(ending)}" for ending in row["endings"]]
    assert item.reference["gold"] == 1


def test_examples_make_the_prompts_of_lm_eval(tmp_path):
    from lm_eval.api.task import ConfigurableTask

    (tmp_path / "mmlu").mkdir()
    for name, file in {"test": "mmlu_test_2000.jsonl", "dev": "mmlu_dev_285.jsonl"}.items():
        rows = (SHARED / "mmlu" / file).read_text("utf-8").splitlines(keepends=True)
        of_subject = [row for row in rows if '"high_school_biology"' in row][:5]
        (tmp_path / "mmlu" / f"{name}.jsonl").write_text("".join(of_subject), "utf-8")
    files = {name: str(tmp_path / "mmlu" / f"{name}.jsonl") for name in ("test", "dev")}
    _, context, target, choices = TASKS["mmlu"]
    theirs = ConfigurableTask(
        config={
            "task": "mmlu",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": 3,
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about high school biology.\n\n",
            "doc_to_text": context,
            "doc_to_target": target,
            "doc_to_choice": choices,
        }
    )
    theirs.build_all_requests(rank=0, world_size=1)
    expected = [instance.args for instance in theirs.instances]
    ours = build_task("mmlu", data=tmp_path, shots=3)
    found = [(item.request.context, choice) for item in ours.items for choice in item.request.continuations]
    assert found == expected
