"""The ``moeft`` command as a user runs it: one process each, exit code, what is on stdout and stderr."""

import functools
import os
import signal
import subprocess
import sys

import pytest

from moeft import __version__
from moeft.provenance import RunFolder

COMMANDS = (
    *("plan", "quantize", "sft", "evaluate", "data", "fisher", "subspace", "merge", "layout", "adapter", "report"),
    "demo",
)
SLOW_IMPORTS = ("torch", "transformers", "peft", "datasets", "matplotlib", "numpy", "pydantic")


def moeft(*arguments):
    # A width of its own, so that help does not wrap by the terminal of whoever runs the tests.
    environment = {**os.environ, "COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "moeft.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_lists_every_command():
    done = moeft("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = moeft(command, "--help")
    assert done.returncode == 0
    assert f"Usage: moeft {command}" in done.stdout


def test_help_imports_nothing_slow():
    script = (
        "import sys, moeft.cli\n"
        "try: moeft.cli.main(['--help'])\n"
        f"finally: print('imported:', [name for name in {SLOW_IMPORTS} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "imported: []" in done.stdout


def test_version_is_that_of_the_native_core():
    assert moeft("--version").stdout == f"moeft {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--colour",), "--colour"),
        (("report", "--colour", "run"), "--colour"),
        (("quantise", "a", "b"), "No such command 'quantise'"),
        (("sft",), "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_it(arguments, expected):
    done = moeft(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr


def test_missing_recipe_is_one_line(tmp_path):
    done = moeft("sft", tmp_path / "absent.yaml")
    assert done.returncode == 1
    assert done.stderr == f"moeft: error: {tmp_path / 'absent.yaml'}: No such file or directory\n"
    assert done.stdout == ""


def test_recipe_problems_are_printed_without_a_traceback(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output: run\ndata: {train: rows.jsonl}\n", encoding="utf-8")
    done = moeft("sft", tmp_path / "recipe.yaml", "lora.rnak=8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"moeft: error: {tmp_path / 'recipe.yaml'} has 2 problems:"
    assert "lora.rnak: unknown key; did you mean lora.rank?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_anywhere_shows_the_traceback(tmp_path, place):
    arguments = ["report", tmp_path]
    arguments.insert(place, "--debug")
    done = moeft(*arguments)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "RunFolderError" in done.stderr


def test_report_prints_where_it_is(tmp_path):
    with RunFolder.create(tmp_path / "run", "moeft sft", {"lora": {"rank": 8}}, {}):
        pass
    done = moeft("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'report.md'}\n"
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8").startswith("# Report of `moeft sft`")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which Windows does not have")
def test_interrupt_is_one_line_and_130(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    command = [sys.executable, "-m", "moeft.cli", "sft", str(recipe)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs inherit none
    ) as process:
        try:
            with open(recipe, "w", encoding="utf-8"):  # opens when the command reads it, and gives nothing
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output, errors) == (130, "", "moeft: interrupted\n")
