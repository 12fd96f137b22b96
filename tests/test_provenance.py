"""The run folder: what is recorded, when a run continues, and what survives a kill."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from moeft.errors import RunFolderError
from moeft.provenance import RunFolder, fingerprint
from moeft.provenance.environment import describe_environment
from moeft.provenance.files import to_json, write_json

RECIPE = {"lora": {"rank": 8}, "model": "base"}


@pytest.fixture
def start(tmp_path):
    """Start a run in ``run`` on the input ``rows.jsonl``."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n", encoding="utf-8")

    def start(recipe=None, seed=0, command="moeft sft"):
        return RunFolder.create(tmp_path / "run", command, recipe or RECIPE, {"train": rows}, seed=seed)

    return start


def test_run_json_says_what_ran_where(start, tmp_path):
    with start() as run:
        record = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert record["command"] == "moeft sft"
    assert record["recipe"] == RECIPE
    assert record["seed"] == 0
    assert record["status"] == "running"
    assert record["inputs"]["train"]["path"] == str(tmp_path / "rows.jsonl")
    assert record["versions"].keys() >= {"moeft", "python", "torch", "transformers", "peft"}
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_bytes"] > 1 << 28


def test_run_is_finished_after_the_block(start):
    with start() as run:
        pass
    assert RunFolder.open(run.path).status == "finished"


def test_run_is_failed_after_an_error_and_continues(start):
    run = start()
    run.event("stage", name="train", status="started")
    with pytest.raises(ZeroDivisionError, match="no rows"), run:
        raise ZeroDivisionError("no rows")
    assert RunFolder.open(run.path).status == "failed"
    assert run.events("failed")[0]["error"] == "ZeroDivisionError: no rows"
    with start() as again:
        assert again.record["attempts"] == 2
        assert again.events("start")[1]["changed"] == []
        assert [event["attempt"] for event in again.events("start")] == [1, 2]
        assert again.events("stage")[0]["name"] == "train"


def test_finished_run_says_so(start):
    with start():
        pass
    with pytest.raises(RunFolderError, match=r"finished at 20.*nothing is left to do"):
        start()


def test_another_recipe_is_refused_with_the_keys_that_differ(start):
    start().fail(KeyboardInterrupt())
    with pytest.raises(RunFolderError) as caught:
        start({"lora": {"rank": 16, "alpha": 4}, "model": "base"}, seed=1)
    message = str(caught.value)
    assert "lora.rank was 8, is now 16" in message
    assert "lora.alpha was None, is now 4" in message
    assert "seed was 0, is now 1" in message
    assert "model" not in message
    with start() as run:
        assert run.record["recipe"] == RECIPE


def test_changed_input_is_refused_by_its_name(start, tmp_path):
    start().fail(KeyboardInterrupt())
    (tmp_path / "rows.jsonl").write_text("{} \n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"inputs\.train\.sha256 was"):
        start()


def test_another_command_is_refused(start):
    start().fail(KeyboardInterrupt())
    with pytest.raises(RunFolderError, match="command was 'moeft sft', is now 'moeft demo'"):
        start(command="moeft demo")


def test_folder_with_other_files_is_refused_and_left_alone(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"not empty \(thesis\.tex\)"):
        start()
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_missing_input_is_an_os_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunFolder.create(tmp_path / "run", "moeft sft", RECIPE, {"train": tmp_path / "absent"})
    assert not (tmp_path / "run").exists()


def test_folder_in_use_is_refused(start):
    run = start()
    with pytest.raises(RunFolderError, match="another process is running"):
        start()
    run.finish()


@pytest.mark.parametrize(("text", "expected"), [('{"comm', "run.json:1:2 is not JSON"), ("[]", "lacks keys")])
def test_damaged_run_json_is_named(tmp_path, text, expected):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=re.escape(expected)):
        RunFolder.open(tmp_path)


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"it has no run\.json"):
        RunFolder.open(tmp_path)


def test_killed_run_continues_with_every_event(tmp_path):
    script = textwrap.dedent("""
        import sys
        from moeft.provenance import RunFolder
        run = RunFolder.create(sys.argv[1], "moeft sft", {"a": 1}, {})
        step = 0
        while True:
            step += 1
            run.event("train_log", step=step)
            if step == 50:
                print("ready", flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with open(tmp_path / "run" / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train_log", "st')
    steps = [event["step"] for event in RunFolder.open(tmp_path / "run").events("train_log")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 50
    with RunFolder.create(tmp_path / "run", "moeft sft", {"a": 1}, {}) as run:
        run.event("train_log", step=len(steps) + 1)
        assert [event["step"] for event in run.events("train_log")] == [*steps, len(steps) + 1]


def test_broken_line_in_the_middle_is_named(start):
    run = start()
    with open(run.path / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind"\n{"kind": "eval"}\n')
    with pytest.raises(RunFolderError, match=r"events\.jsonl:2 is not JSON"):
        run.events()
    run.finish()


def test_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "metrics.json", {"loss": 1.5})
    with pytest.raises(TypeError, match="has no JSON form"):
        write_json(tmp_path / "metrics.json", {"loss": object()})
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == {"loss": 1.5}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_absent_result_reads_as_none(start):
    with start() as run:
        assert run.read_json("metrics.json") is None
        run.write_json("metrics.json", {"loss": 1.0})
        assert run.read_json("metrics.json") == {"loss": 1.0}


def test_numbers_of_numpy_and_non_finite_ones_become_json(tmp_path):
    import numpy as np

    value = to_json({"loss": np.float32(0.5), "norm": math.nan, "steps": (np.int64(3), -math.inf), "path": tmp_path})
    assert value == {"loss": 0.5, "norm": None, "steps": [3, None], "path": str(tmp_path)}


def test_fingerprint_does_not_depend_on_where_a_folder_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "config.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / f".cache-{name}").write_text(name, encoding="utf-8")
    assert fingerprint(tmp_path / "a")["sha256"] == fingerprint(tmp_path / "b")["sha256"]
    (tmp_path / "b" / "sub" / "config.json").rename(tmp_path / "b" / "config.json")
    assert fingerprint(tmp_path / "a")["sha256"] != fingerprint(tmp_path / "b")["sha256"]


def test_fingerprint_of_a_large_file_notices_other_data_under_an_equal_header(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(20 << 20))
    before = fingerprint(path)
    assert before["bytes"] == 20 << 20
    with open(path, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"\x01" * (19 << 20))
    assert fingerprint(path)["sha256"] != before["sha256"]


def test_fingerprint_reads_the_last_byte_of_a_large_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes((17 << 20) + 1))
    before = fingerprint(path)["sha256"]
    with open(path, "r+b") as file:
        file.seek(17 << 20)
        file.write(b"\x01")
    assert fingerprint(path)["sha256"] != before


def test_environment_is_described_without_importing_torch():
    script = "import sys; from moeft.provenance import RunFolder; from moeft.provenance.environment import *; "
    script += "describe_environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_commit_is_that_of_the_package():
    commit = describe_environment()["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
