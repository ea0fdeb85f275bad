"""Style: types, lint, spelling, annotations, and the names that the package offers."""

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

import purejaxppo

PACKAGE = Path(purejaxppo.__file__).parent
ROOT = PACKAGE.parent


@pytest.mark.parametrize(
    "tool",
    [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["codespell_lib", "purejaxppo", "tests", "README.md", "notebooks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"],
        ["basedpyright", "--pythonpath", sys.executable],
    ],
    ids=lambda tool: " ".join(tool[:2]),
)
def test_a_tool_finds_nothing(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_public_functions_are_annotated():
    annotated, missing = 0, []
    for path in PACKAGE.rglob("*.py"):
        for function in public_functions(ast.parse(path.read_text())):
            arguments = function.args
            some = [x for x in (arguments.vararg, arguments.kwarg) if x]
            for x in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *some]:
                if x.arg not in ("self", "cls"):
                    annotated += x.annotation is not None
                    missing += [f"{path.name}: {function.name}({x.arg})"] if x.annotation is None else []
    assert annotated > 500 and not missing


def public_functions(tree):
    """Functions of a module and methods of its classes, but private ones."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_a_star_import_replaces_no_builtin():
    assert not set(purejaxppo.__all__) & set(dir(builtins))


def test_lazy_names_are_visible_to_editors():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == purejaxppo.LAZY and shown.keys() < set(purejaxppo.__all__)
    assert all(hasattr(purejaxppo, name) for name in purejaxppo.__all__)
