"""Reports: what a run folder shows, and that nothing in it can break the page."""

import sys

import pytest

from moeft.errors import MissingExtraError, RunFolderError
from moeft.provenance import RunFolder
from moeft.reports import write_report
from moeft.reports.preference import rounds_section
from moeft.reports.text import fence, mib, number, percent, table

METRICS = {
    "bytes": {
        "before": {"experts": 10 << 20, "norms": 4096},
        "after": {"experts": 3 << 20, "norms": 4096, "lora": 1 << 20},
    },
    "heldout": {
        "before": {"loss": 4.5, "exact_match": 0.0, "rows": 200},
        "after": {"loss": 0.25, "exact_match": 0.785, "rows": 200},
    },
    "training": {
        "steps": 600,
        "seconds": 181.25,
        "tokens": 123456,
        "tokens_per_second": 681.1,
        "peak_bytes": 900 << 20,
        "skipped_steps": 1,
        "routing": {"experts": 40, "idle": {"model.layers.0.experts": [4], "model.layers.2.experts": [0, 1]}},
    },
    "plan": {"peak_allocated_bytes": 800 << 20},
    "data": {"training rows": 3000, "rejected rows": 2},
    "proofs": [
        {"name": "logits", "measured": 1.5e-7, "tolerance": 2e-6, "unit": "relative RMS", "ok": True, "how": "a | b"},
        {"name": "untouched tensors", "measured": 3, "tolerance": 0, "unit": "bytes", "ok": False, "how": "sha256"},
    ],
    "samples": [{"prompt": "```\nstop | it", "before": "the", "after": '[TOOL: stop unit="x"]', "reference": "r"}],
}


@pytest.fixture
def run(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n", encoding="utf-8")
    run = RunFolder.create(tmp_path / "run", "moeft demo", {"lora": {"rank": 16}}, {"train": rows}, seed=3)
    yield run
    run.finish()


def log_steps(run, losses):
    for step, loss in enumerate(losses, start=1):
        run.event("train_log", step=step, loss=loss, learning_rate=5e-3 / step)
    run.event("eval", step=len(losses), loss=0.5)


def picture_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_report_of_a_whole_run_shows_every_measurement(run):
    log_steps(run, [4.0, 2.0, 1.0])
    run.event("skipped_step", step=2, reason="gradient is NaN", module="model.norm", rows=[3, 8])
    run.event("frozen_base", sha256="ab" * 32, bytes=9, seconds=1.5, changed=[])
    run.event("stage", name="merge", status="done", seconds=1.5)
    run.write_json("metrics.json", METRICS)
    run.finish()
    text = write_report(run.path).read_text(encoding="utf-8")
    for line in (
        "# Report of `moeft demo`",
        f"Finished at {run.record['finished_at']}.",
        "**Proofs that do not hold: 1 of 2.**",
        "| 200 rows | before | after |",
        "| loss, nats per token | 4.5 | 0.25 |",
        "| tool calls that match exactly | 0.0 % | 78.5 % |",
        "| experts | 10 MiB | 3 MiB |",
        "| lora | – | 1 MiB |",
        "| **total** | 10 MiB | 4 MiB |",
        "| logits | holds | 1.5e-07 | 2e-06 | relative RMS |",
        "| untouched tensors | **does not hold** | 3 | 0 | bytes |",
        "- logits: a \\| b",
        "| trained tokens | 123,456 |",
        "| peak memory | 900 MiB |",
        "| 2 | gradient is NaN | model.norm | 3, 8 |",
        f"| frozen base | unchanged, SHA-256 {'ab' * 8}, hashed in 1.50 s |",
        "| experts without a token | 3 of 40 |",
        "| peak memory on a GPU, forecast | 800 MiB |",
        "| rejected rows | 2 |",
        "| merge | done | 1.5 |",
        "| seed | 3 |",
        "  rank: 16",
        '[TOOL: stop unit="x"]',
    ):
        assert line in text.splitlines(), line
    assert run.record["inputs"]["train"]["sha256"][:16] in text
    assert run.record["versions"]["torch"] in text


def test_pictures_lie_beside_the_report_that_links_them(run):
    log_steps(run, [4.0, 2.0])
    run.write_json("metrics.json", METRICS)
    text = write_report(run).read_text(encoding="utf-8")
    for name in ("loss.png", "bytes.png"):
        assert f"({name})" in text
        width, height = picture_size(run.path / name)
        assert width == 1120
        assert height > 300


def test_run_that_only_started_has_a_report(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "**Not finished**, status running." in text
    assert "## What ran" in text
    assert "## Proofs" not in text
    assert ".png" not in text


def test_failed_run_says_why(run):
    run.fail(ValueError("no rows\nleft"))
    assert "**Not finished**, status failed: ValueError: no rows left." in write_report(run).read_text(encoding="utf-8")


def test_step_without_a_finite_loss_does_not_stop_the_picture(run):
    log_steps(run, [4.0, float("nan"), 1.0])
    write_report(run)
    assert picture_size(run.path / "loss.png")[0] == 1120


def test_repeated_steps_of_a_continued_run_count_once_with_the_later_value():
    from moeft.reports.plots import _series

    events = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 9.0), (3, 9.5), (2, 3.0), (3, 2.0))]
    assert _series([*events, {"step": 4}], "loss") == ([1, 2, 3], [4.0, 3.0, 2.0])


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is no run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("picture", ["rounds/rounds.png", None])
def test_rounds_link_the_picture_that_was_drawn(picture):
    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6}
    rounds = [{"accuracy": accuracy, "gate_loss": None}]
    text = rounds_section("rounds", [{"seed": 0, "rounds": rounds, "best": 0, "ended": "1 round", "picture": picture}])
    assert text.count("![") == text.count("(rounds/rounds.png)") == (picture is not None)


def test_absent_matplotlib_names_the_extra(run, monkeypatch):
    log_steps(run, [4.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moeft\[report\]'"):
        write_report(run)


def test_drawing_leaves_the_style_of_the_user_alone(run):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    log_steps(run, [4.0, 3.0])
    write_report(run)
    assert dict(mpl.rcParams) == before


def test_fence_is_longer_than_any_run_of_backticks_inside():
    assert fence("a ```` b") == "`````\na ```` b\n`````\n"


def test_cells_cannot_break_out_of_a_table():
    assert table(["a", "b"], [["x | y", "two\nlines"]]).splitlines()[2] == "| x \\| y | two lines |"


def test_numbers_are_short_and_absent_ones_a_dash():
    assert [number(value) for value in (1234567, 0.000012345, None, True, "x")] == [
        "1,234,567",
        "1.234e-05",
        "–",
        "yes",
        "x",
    ]
    assert [mib(value) for value in (0, 2048, 3 << 20, 5000 << 20)] == ["0 MiB", "2 KiB", "3 MiB", "5,000 MiB"]
    assert [percent(value) for value in (0.0, 0.785, None)] == ["0.0 %", "78.5 %", "–"]


def test_run_that_packed_while_loading_reports_what_is_in_memory(run):
    run.write_json("metrics.json", {"bytes": {"after": METRICS["bytes"]["after"]}})
    assert "| component | in memory |" in write_report(run).read_text("utf-8")
