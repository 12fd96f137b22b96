"""Imports point down the layers of the design, never up or sideways, lazy ones included."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeft

# Top of the stack first. Parts of one layer do not import each other, except in the last: those serve everyone.
LAYERS = (
    {"cli", "_autoload"},
    {"demo"},
    {"runs"},
    {"reports"},
    {"hard"},
    {"training", "merging", "evaluation", "gguf", "planning", "importance"},
    {"tool_protocols"},
    {"integration", "data", "serving"},
    {"modules"},
    {"kernels", "checkpoint", "adapters"},
    {"_core"},
    {"families"},
    {"config", "errors", "provenance", "progress_bar"},
)
DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
FOR_EVERYONE = len(LAYERS) - 1

# Parts that must be cheap to import: torch and its kind only inside a function.
LIGHT = {
    "",
    "_autoload",
    "cli",
    "checkpoint",
    "planning",
    "adapters",
    "families",
    "gguf",
    "serving",
    "config",
    "errors",
    "provenance",
    "progress_bar",
}
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "matplotlib"}


def imported_names(tree: ast.AST, module: list[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, wherever in it, in any spelling."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def broken_rule(importer: str, name: str, file: Path) -> str | None:
    """Rule that a part breaks by importing a dotted name, or None. The importer of ``moeft/__init__.py`` is ''."""
    root, _, rest = name.partition(".")
    if root == "triton" and not (importer == "kernels" and file.name == "triton.py"):
        return "triton is imported only in kernels/*/triton.py"
    if root != "moeft" or importer == "":
        return None
    part = rest.partition(".")[0]
    if part == "__version__":
        return None
    if part not in DEPTH:
        return f"{name} is part of the package's public face; import it from the file that defines it"
    if part == importer or DEPTH[part] == FOR_EVERYONE:
        return None
    if DEPTH[part] < DEPTH[importer]:
        return f"{importer} lies below {part} and must not import it"
    if DEPTH[part] == DEPTH[importer]:
        return f"{importer} and {part} are of one layer and must not import each other"
    return None


def module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that run when the file is imported: outside functions and ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def violations(package: Path) -> list[str]:
    """One line ``file:line: rule`` per import that breaks the layering of a package."""
    found = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package)
        module = ["moeft", *place.with_suffix("").parts]
        is_package = module[-1] == "__init__"
        module = module[:-1] if is_package else module
        importer = module[1] if len(module) > 1 else ""
        if importer and importer not in DEPTH:
            found.append(
                f"{place}:1: {importer} has no layer; add it to LAYERS in tests/test_imports.py and the design"
            )
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for line, name in imported_names(tree, module, is_package):
            if rule := broken_rule(importer, name, file):
                found.append(f"{place}:{line}: {rule}")
        if importer in LIGHT:
            found += [
                f"{place}:{line}: {importer or 'moeft'} must import {name} inside a function"
                for line, name in module_level_imports(tree)
                if name.partition(".")[0] in HEAVY
            ]
    return found


def test_imports_point_down():
    found = violations(Path(moeft.__file__).parent)
    assert not found, "\n".join(["imports against the layers of the design:", *found])


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "kernels/nf4.py",
            "import torch\nfrom moeft.training import sft",
            "kernels/nf4.py:2: kernels lies below training",
        ),
        ("modules/a.py", "def f():\n    import moeft.cli.sft", "modules/a.py:2: modules lies below cli"),
        (
            "training/sft.py",
            "from moeft.evaluation import x",
            "training/sft.py:1: training and evaluation are of one layer",
        ),
        ("data/rows.py", "from ..integration import audit", "data/rows.py:1: data and integration are of one layer"),
        ("data/deep/rows.py", "from ... import cli", "data/deep/rows.py:1: data lies below cli"),
        ("data/__init__.py", "from ..training import x", "data/__init__.py:1: data lies below training"),
        (
            "families/a.py",
            "import importlib\nimportlib.import_module('moeft.data')",
            "families/a.py:2: families lies below",
        ),
        ("errors.py", "from moeft import kernels", "errors.py:1: errors lies below kernels"),
        (
            "data/rows.py",
            "from moeft import NF4Config",
            "data/rows.py:1: moeft.NF4Config is part of the package's public",
        ),
        ("helpers/a.py", "", "helpers/a.py:1: helpers has no layer"),
        (
            "modules/triton.py",
            "import triton.language as tl",
            "modules/triton.py:1: triton is imported only in kernels",
        ),
        (
            "config/a.py",
            "try:\n    import torch\nexcept ImportError: pass",
            "config/a.py:2: config must import torch inside",
        ),
        ("__init__.py", "from transformers import Trainer", "__init__.py:1: moeft must import transformers inside"),
    ],
)
def test_import_against_the_layers_is_named_with_file_and_line(tmp_path, file, source, expected):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "cli/sft.py",
            "from moeft.config import SftRecipe\ndef f():\n    import torch\n    from moeft.training import sft",
        ),
        ("training/sft.py", "from moeft.data import rows\nfrom . import guards\nfrom moeft import _core, errors"),
        ("kernels/nf4/triton.py", "import triton"),
        ("provenance/a.py", "from moeft import __version__\nfrom moeft.config import Recipe"),
        ("__init__.py", "def __getattr__(name):\n    import moeft.training"),
        ("config/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_imports_with_the_layers_pass(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def test_importing_moeft_imports_no_framework():
    script = textwrap.dedent(f"""
        import sys
        import moeft
        print([name for name in {sorted(HEAVY)} if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
