"""What the suites of a gate hold, and a recipe's gate with its suite in place."""

from __future__ import annotations

from importlib.util import find_spec

from moeft.config.gate import Gate, GateDivergence, GateTask
from moeft.errors import MissingExtraError

DIVERGENCE_LIMIT = 0.3
"""Nats per token: a choice.

On the embedded MoE 0.02 to 0.17 was seen at rates that kept the tasks, above 1 where they broke.
"""


def suite_tasks(suite: str) -> tuple[GateTask, ...]:
    """Tasks of a suite with their bounds.

    The same items are asked before and after, so a change is not blurred by which items were drawn, and bounds are
    changes: six questions of 64, five replies of 36, a tenth of a bit per byte.
    """
    from moeft.evaluation import suite as files

    scored = (
        GateTask(task="hellaswag", path=files.HELLASWAG, metric="acc_norm", change=0.1),
        GateTask(task="perplexity", path=files.TEXTS, metric="bits_per_byte", change=0.1),
    )
    if suite == "quick":
        return scored
    return (
        *scored,
        GateTask(task="ifeval_short", path=files.IFEVAL_SHORT, metric="prompt_strict", change=0.15),
        GateTask(task="language", metric="same_language", change=0.15),
    )


def with_suite(gate: Gate) -> Gate:
    """A gate whose suite is spelled out: tasks and divergence that the recipe names itself replace the suite's.

    Raises:
        MissingExtraError: If a task of the suite needs a package that is not installed.
    """
    if gate.suite is None:
        return gate
    own = {watched.task for watched in gate.tasks}
    added = tuple(watched for watched in suite_tasks(gate.suite) if watched.task not in own)
    if any(watched.task == "language" for watched in added) and find_spec("py3langid") is None:
        raise MissingExtraError(
            "the gate's suite tells languages by py3langid; install it with: pip install 'moeft[data]', or set "
            "gate.suite to quick, which generates nothing"
        )
    divergence = gate.divergence or GateDivergence(limit=DIVERGENCE_LIMIT)
    return gate.model_copy(update={"suite": None, "tasks": (*added, *gate.tasks), "divergence": divergence})
