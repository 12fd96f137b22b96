"""The core from many threads at once and in forked children, with a time limit: a deadlock fails, it does not hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import os, threading
import core_kernels

def run():
    return [result.tobytes() for result in core_kernels.run_all(2)]

expected = [result.tobytes() for result in core_kernels.run_all(1)]

def repeat(times, wrong):
    for _ in range(times):
        if run() != expected:
            wrong.append(1)

def start(threads, times, wrong):
    running = [threading.Thread(target=repeat, args=(times, wrong)) for _ in range(threads)]
    for thread in running:
        thread.start()
    return running
"""

EIGHT_THREADS = """
wrong = []
for thread in start(8, 12, wrong):
    thread.join()
assert not wrong
"""

# Children are made while threads of the parent are at work, so that a fork meets every state of the pool.
FORKED_CHILDREN = """
wrong = []
running = start(2, 50, wrong)
children = []
for _ in range(12):
    child = os.fork()
    if child == 0:
        repeat(2, wrong)
        os._exit(len(wrong))
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
for thread in running:
    thread.join()
assert codes == [0] * 12 and not wrong, (codes, wrong)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
@pytest.mark.parametrize("script", [EIGHT_THREADS, FORKED_CHILDREN], ids=["eight_threads", "forked_children"])
def test_concurrent_calls_finish_and_equal_those_of_one_thread(script):
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + script]
    folder = Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
