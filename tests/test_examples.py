"""The scripts under examples/, each once in its shortest form."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout


@pytest.mark.parametrize("script", ["quickstart", "defaults", "speed"])
def test_help(script):
    assert "usage:" in run(f"{script}.py", "--help")


def test_quickstart(tmp_path):
    output = run(
        *("quickstart.py", "--epochs", "2", "--data", "digits"),
        *("--seed", "1", "--output", str(tmp_path)),
    )
    for word in ("SGD", "LE-SAM", "accuracy", "sharpness", "ratio"):
        assert word in output
    assert (tmp_path / "quickstart.png").stat().st_size > 50_000
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()


def test_defaults(tmp_path):
    results = tmp_path / "results.jsonl"
    arguments = ["--quick", "--results", str(results)]
    first = run("defaults.py", *arguments)
    lines = results.read_text().splitlines()
    assert lines
    # Finished runs are not done again.
    assert run("defaults.py", *arguments) == first
    assert results.read_text().splitlines() == lines


def test_speed():
    output = run(
        *("speed.py", "--quick", "--nets", "dense", "--modes", "graph"),
    )
    assert "dense" in output
