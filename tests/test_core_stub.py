"""The stub of the native core says what the built module has."""

import ast
import inspect
from pathlib import Path

import moeft
from moeft import _core

STUB = ast.parse((Path(moeft.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CONSTANTS = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}


def test_stub_names_what_the_module_has():
    classes = {node.name for node in STUB.body if isinstance(node, ast.ClassDef)}
    built = {name for name in dir(_core) if name == "__version__" or not name.startswith("__")}
    assert set(FUNCTIONS) | CONSTANTS | classes == built


def test_stub_has_the_built_signatures():
    for name, node in FUNCTIONS.items():
        stub = [(arg.arg, False) for arg in node.args.args]
        for i in range(len(node.args.defaults)):
            stub[-1 - i] = (stub[-1 - i][0], True)
        built = inspect.signature(getattr(_core, name)).parameters.values()
        assert stub == [(p.name, p.default is not p.empty) for p in built], name


def test_every_function_of_the_stub_is_documented():
    assert [name for name, node in FUNCTIONS.items() if not ast.get_docstring(node)] == []
