"""NF4 from many threads at once and in forked children, with a time limit: a deadlock fails, it does not hang."""

import os
import subprocess
import sys

import pytest

# Large enough for the thread pool. Without torch, which takes seconds to import and whose own pool breaks in a fork.
SETUP = """
import os, threading
import numpy as np
from moeft import _core

SIZES = 3, 200_001, 64, "nf4"
values = np.random.default_rng(0).standard_normal(600_003, np.float32)

def pack_and_restore():
    packed, absmax = np.empty(3 * 100_001, np.uint8), np.empty(3 * 3126, np.float32)
    _core.nf4_quantize(values, "float32", *SIZES, packed, absmax, 2)
    restored = np.empty_like(values)
    _core.nf4_dequantize(packed, absmax, None, 0.0, *SIZES, restored, "float32", 2)
    return packed.tobytes() + restored.tobytes()

expected = pack_and_restore()

def repeat(times, wrong):
    for _ in range(times):
        if pack_and_restore() != expected:
            wrong.append(1)

def start(threads, times, wrong):
    running = [threading.Thread(target=repeat, args=(times, wrong)) for _ in range(threads)]
    for thread in running:
        thread.start()
    return running
"""

EIGHT_THREADS = """
wrong = []
for thread in start(8, 20, wrong):
    thread.join()
assert not wrong
"""

# Children are made while threads of the parent are at work, so that a fork meets every state of the pool.
FORKED_CHILDREN = """
wrong = []
running = start(2, 100, wrong)
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
def test_concurrent_calls_finish_and_agree(script):
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
