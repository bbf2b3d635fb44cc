"""The wheel, what importing it needs, and what its sources may use."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import keras_lesam

ROOT = Path(__file__).parents[1]
MODULES = ["keras_lesam"] + [
    f"keras_lesam.{module.name}"
    for module in pkgutil.iter_modules(keras_lesam.__path__)
]

# The modules that users call.
WITH_EXAMPLES = (
    *("_model", "_sam", "_wrapper", "callbacks", "curvature", "landscape"),
    *("rules", "_rule", "_sam_rules", "budgets", "ascents", "_operator"),
    *("_progress", "_loop", "_trainer"),
)


def start_python(code, *arguments, cwd, **environment):
    """Runs `code` in a new process that can import the package."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_python(code, *arguments, **kwargs):
    """Standard output of `code` in a new process, which must succeed."""
    process = start_python(code, *arguments, **kwargs)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    subprocess.run([*command, "-w", directory, ROOT], check=True)
    (path,) = directory.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "keras_lesam").glob("*.py")
    }
    assert "keras_lesam/_model.py" in expected
    names = zipfile.ZipFile(wheel).namelist()
    found = {name for name in names if ".dist-info/" not in name}
    assert found == {*expected, "keras_lesam/py.typed"}


def test_the_version_of_the_wheel_is_that_of_the_package(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    metadata = archive.read(name).decode()
    (version,) = re.findall(r"^Version: (.+)$", metadata, re.MULTILINE)
    assert keras_lesam.__version__ == version


def test_the_version_is_said_in_one_place():
    """And cited: a release compares both with its tag."""
    citation = (ROOT / "CITATION.cff").read_text()
    [cited] = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    assert cited == keras_lesam.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_the_wheel_runs_without_the_sources(wheel, tmp_path):
    code = "import keras_lesam; print(keras_lesam.LESAMModel.__module__)"
    code += "; print(keras_lesam.__file__)"
    output = run_python(code, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert output.split()[0] == "keras_lesam._model"
    assert str(wheel) in output


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy"])
def test_another_backend_is_refused_whether_installed_or_not(backend, tmp_path):
    process = start_python(
        "import keras_lesam", cwd=tmp_path, KERAS_BACKEND=backend
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: keras_lesam trains with the TensorFlow"
    )
    assert "KERAS_BACKEND=tensorflow" in last
    assert last.endswith(repr(backend))


@pytest.mark.parametrize("name", MODULES)
def test_only_public_modules_of_keras_and_tensorflow_are_used(name):
    source = inspect.getsource(importlib.import_module(name))
    private = r"keras\.src|(tensorflow|tf)\.python"
    assert re.search(private, "from keras.src import ops")
    assert not re.search(private, source)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    examples = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    assert doctest.testmod(module).failed == 0
    assert bool(examples) == (name.split(".")[-1] in WITH_EXAMPLES)
