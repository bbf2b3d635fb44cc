"""How the package is built: sizes, imports, annotations, docstrings."""

import ast
import importlib
import inspect
from pathlib import Path

import keras
import pytest

import keras_lesam
from tests.helpers import dense_net
from tests.test_package import MODULES
from tests.test_package import ROOT
from tests.test_package import run_python

SOURCES = sorted((ROOT / "keras_lesam").glob("*.py"))
EVERY = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def lines(node):
    return node.end_lineno - node.lineno + 1


def body_lines(function):
    """Those of the body, without the docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@EVERY
def test_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert lines(node) <= 250, node.name
        elif isinstance(node, ast.FunctionDef):
            assert body_lines(node) <= 40, node.name


def imports(path):
    """Modules of the package that a module needs to be imported."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.module == "keras_lesam":
            found |= {alias.name for alias in node.names}
        elif node.module and node.module.startswith("keras_lesam."):
            found.add(node.module.split(".")[1])
    return found & {source.stem for source in SOURCES}


def test_there_is_no_import_cycle():
    graph = {path.stem: imports(path) for path in SOURCES}
    done = set()

    def visit(name, above):
        assert name not in above, [*above, name]
        if name in done:
            return
        for other in graph[name]:
            visit(other, [*above, name])
        done.add(name)

    for name in graph:
        visit(name, [])


@EVERY
def test_everything_is_annotated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *(a for a in (node.args.vararg, node.args.kwarg) if a),
        ]
        for argument in arguments:
            if argument.arg not in ("self", "cls"):
                assert argument.annotation, (node.name, argument.arg)
        assert node.returns is not None, node.name


PUBLIC = [name for name in MODULES if "._" not in name]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), public


@pytest.mark.parametrize("module", ["curvature", "callbacks", "landscape"])
def test_modules_are_loaded_when_they_are_named(module, tmp_path):
    code = f"""
import sys
import keras_lesam
assert "keras_lesam.{module}" not in sys.modules
assert "{module}" in dir(keras_lesam)
assert "{module}" in keras_lesam.__all__
print(keras_lesam.{module}.__name__)
"""
    assert run_python(code, cwd=tmp_path).strip() == f"keras_lesam.{module}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(keras_lesam, "nothing")  # noqa: B009


@pytest.mark.parametrize(
    "method",
    ["fit", "compile", "evaluate", "train_on_batch", "test_on_batch"],
)
@pytest.mark.parametrize(
    "name", ["LESAMModel", "SAMModel", "SharpnessAwareModel"]
)
def test_signatures_are_those_of_keras(name, method):
    model = getattr(keras_lesam, name)(dense_net())
    stock = dense_net()
    found = inspect.signature(getattr(model, method))
    assert found == inspect.signature(getattr(stock, method))
    assert inspect.getdoc(getattr(keras_lesam, name)).count("Args:") == 1
    assert keras.Model.fit is not type(model).fit


def test_the_layout_of_tests_names_every_module_with_a_contract():
    tests = {path.stem for path in (Path(__file__).parent).glob("test_*.py")}
    assert {"test_passes", "test_step", "test_state", "test_rules"} <= tests
