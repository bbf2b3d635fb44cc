"""The tool that runs Keras's own tests on wrapped models."""

import importlib.util
import pathlib
import subprocess
import sys

import keras
import pytest

from tests.test_package import ROOT

TOOL = ROOT / "tools" / "keras_tests.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("keras_tests", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


keras_tests = load_tool()


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def counts(output, variant):
    """The numbers in the row of a variant."""
    (row,) = (x for x in output.splitlines() if x.startswith(f"| {variant} |"))
    return [int(cell) for cell in row.strip("| ").split(" | ")[1:]]


SAMPLE = """
import nothing_of_this_name
import numpy as np

import keras
from keras.src import models
from keras.src.trainers.trainer import Trainer


def net():
    return keras.Sequential([keras.layers.Dense(1)])


class Own(keras.Model):
    def train_step(self, data):
        return {}


class Mixed(Trainer, keras.layers.Dense):
    def __init__(self, units):
        keras.layers.Dense.__init__(self, units)
        Trainer.__init__(self)


def train(model, **kwargs):
    return model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, **kwargs)


class TestSample:
    def test_compiled(self):
        models = [net()]
        model = models[0]
        model.compile("sgd", "mse")
        assert "rho" in train(model).history
        assert type(model).__name__ == "LESAMModel"

    def test_assigned(self):
        model = net()
        assert type(model).__name__ == "LESAMModel"

    def test_mixed(self):
        model = Mixed(1)
        model.compile("sgd", "mse")
        assert "rho" in train(model).history

    def test_of_a_callback(self):
        callback = keras.callbacks.Callback()
        callback.set_model(net())
        callback.model.compile("sgd", "mse")
        assert "rho" in train(callback.model).history

    def test_refused(self):
        model = Own()
        model.compile("sgd", "mse")

    def test_no_model(self):
        layer = keras.layers.Dense(1)
        assert type(layer).__name__ == "Dense"

    def test_counts_the_logs(self):
        model = net()
        model.compile("sgd", "mse")
        assert list(train(model).history) == ["loss"]

    def test_fails_in_any_case(self):
        model = net()
        nothing_of_this_name.call(model)
"""


def test_what_becomes_of_a_test(tmp_path):
    folder = tmp_path / "src" / "trainers"
    folder.mkdir(parents=True)
    (folder / "sample_test.py").write_text(SAMPLE)
    (folder / "broken_test.py").write_text("from keras import nothing_such")
    process = run(
        *("--tests", folder.parent, "--variant", "climb"),
        *("--folder", tmp_path / "kept"),
    )
    output = process.stdout
    assert process.returncode == 1, process.stderr
    assert counts(output, "climb") == [4, 1, 0, 1], output
    assert "Of the other tests 1 make no model" in output
    assert "2 fail without a wrapper, too" in output
    refused, _, failed = output.partition("## Refused")[2].partition("## Fai")
    assert "`model` has training logic of its own" in refused
    assert "- trainers_sample_test test_refused\n" in refused
    assert "- trainers_sample_test test_counts_the_logs\n" in failed
    assert "broken_test" in failed
    assert "100%" in process.stderr
    assert (tmp_path / "kept" / "climb.log").exists()


def test_keras_itself():
    """A part of it, where Keras has come with its tests."""
    process = run("--quick", "--files", "early_stopping_test", "cloning_test")
    source = pathlib.Path(keras.__file__).parent / "src"
    if list(source.glob("callbacks/*_test.py")):
        assert process.returncode == 0, process.stdout
        passed, _, cannot_apply, failed = counts(process.stdout, "climb")
        assert passed > 8
        assert cannot_apply > 5
        assert failed == 0
        assert "- models_cloning_test test_call_fn\n" in process.stdout
    else:
        assert process.returncode == 1
        assert f"distribution of version {keras.__version__}" in process.stderr


def record(test, kind=None, models=1, **kwargs):
    line = {"test": test, "kind": kind, "models": models}
    return {**line, "error": "said", "refusal": None, **kwargs}


LISTED = "models_cloning_test.py::CloneModelTest::test_call_fn"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (record("a.py::test"), "passed"),
        (record("a.py::test", models=0), "no model"),
        (record("a.py::test", "Skipped"), "skipped"),
        (record("a.py::test", "ValueError"), "failed"),
        (record("a.py::test", "ValueError", refusal="`a`"), "refused"),
        (record("b.py::test", "ValueError"), "fails without a wrapper"),
        (record("c.py::test", "ImportError"), "failed"),
        (record(LISTED, "TypeError"), "can't apply"),
    ],
)
def test_outcomes(found, expected):
    plain = {
        "a.py::test": record("a.py::test"),
        "b.py::test": record("b.py::test", "ValueError"),
        LISTED: record(LISTED),
    }
    assert keras_tests.outcome(found, "climb", plain)[0] == expected


def test_numbers_of_plain_training_are_those_of_zero_budget(monkeypatch):
    reasons = {keras_tests.NUMBERS: ["*::test_number"]}
    monkeypatch.setattr(keras_tests, "CANNOT_APPLY", reasons)
    name = "a.py::test_number"
    plain = {name: record(name)}
    for variant, expected in {"climb": "can't apply", "zero": "failed"}.items():
        found = keras_tests.outcome(record(name, "E"), variant, plain)
        assert found[0] == expected


def test_what_the_list_need_not_have_is_named(monkeypatch):
    reasons = {"it is so": ["*::test_a", "*::test_b", "*::test_c"]}
    monkeypatch.setattr(keras_tests, "CANNOT_APPLY", reasons)
    runs = {"climb": {n: record(n, "E") for n in ("x::test_a", "x::test_d")}}
    runs["climb"]["x::test_b"] = record("x::test_b")
    plain = {name: record(name) for name in runs["climb"]}
    judged = keras_tests.judge(runs, plain)
    assert list(keras_tests.stale(judged)) == ["*::test_b", "*::test_c"]
    assert judged["failed", "climb", "E: said"] == {"x::test_d"}
