"""Remake ``bfcl.jsonl``: verdicts of the Berkeley Function-Calling Leaderboard's own checker on right and spoilt calls.

    pip download --no-deps bfcl-eval==2026.3.23 && unzip bfcl_eval-*.whl -d bfcl
    python tests/vectors/generate_bfcl.py bfcl ../shared/data/bfcl

Calls are drawn from the accepted values; most are then changed in one place. The questions stay in the data folder.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent / "bfcl.jsonl"
JUNK = [1, 1.0, True, "x", [], {}, "", None, [1], ["a"], {"a": 1}, [{"a": 1}], [1.5]]
KEPT = {True: 70, False: 110}


def main(package: str, data: Path) -> None:
    """Draw calls for every question, and keep some of each verdict."""
    check = checker(package)
    rng = random.Random(0)
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for category in ("simple_python", "multiple", "parallel"):
        questions, answers = (read(data / f"{category}{part}.jsonl") for part in ("", "_answers"))
        for question, answer in zip(questions, answers, strict=True):
            for _ in range(4):
                calls = [spoilt(*drawn(wanted, rng), rng) for wanted in answer["ground_truth"]]
                verdict = check(question["function"], calls, answer["ground_truth"], category)
                found[verdict].append({"id": question["id"], "calls": calls, "accepted": verdict})
    kept = [vector for verdict, vectors in found.items() for vector in rng.sample(vectors, KEPT[verdict])]
    VECTORS.write_text("".join(json.dumps(vector) + "\n" for vector in kept), "utf-8")


def checker(package: str) -> Any:
    """The leaderboard's checker, without the clients of all vendors that its table of models imports."""
    sys.path.insert(0, package)
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    sys.modules[models.__name__] = models
    for language in ("java", "js"):
        parser = types.ModuleType(f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter")
        setattr(parser, f"{language}_type_converter", None)
        sys.modules[parser.__name__] = parser
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    return lambda functions, calls, accepted, category: ast_checker(
        functions, [{name: arguments} for name, arguments in calls], accepted, Language.PYTHON, category, "any"
    )["valid"]


def drawn(wanted: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A call that is accepted."""
    ((name, values),) = wanted.items()
    chosen = {key: value(accepted, rng) for key, accepted in values.items()}
    return name, {key: of_key for key, of_key in chosen.items() if of_key != "" or rng.random() < 0.1}


def value(accepted: list[Any], rng: random.Random) -> Any:
    """One of the accepted values; those of dicts have lists of their own."""
    chosen = rng.choice(accepted)
    if isinstance(chosen, dict):
        return {key: of_key for key, inner in chosen.items() if (of_key := value(inner, rng)) != ""}
    if isinstance(chosen, list) and chosen and all(isinstance(item, dict) for item in chosen):
        return [value([item], rng) for item in chosen]
    return chosen


def spoilt(name: str, arguments: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The call, as a rule changed in one place."""
    kind = rng.random()
    key = rng.choice([*arguments, "unknown"])
    if kind < 0.1:
        arguments.pop(key, None)
    elif kind < 0.7:
        arguments[key] = changed(arguments.get(key), rng)
    return (f"{name}x" if kind > 0.95 else name), arguments


def changed(old: Any, rng: random.Random) -> Any:
    """Nearly the same value, or quite another one."""
    if rng.random() < 0.3:
        return rng.choice(JUNK)
    if isinstance(old, str):
        return rng.choice([old.upper(), old.replace(" ", ""), f"{old}.", f"{old}s"])
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return rng.choice([float(old), int(old), old + 1, str(old)])
    if isinstance(old, list) and old:
        return rng.choice([old[::-1], [*old, old[0]], [changed(item, rng) for item in old]])
    if isinstance(old, dict) and old:
        inner = rng.choice(list(old))
        return {**old, inner: changed(old[inner], rng)}
    return rng.choice(JUNK)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
