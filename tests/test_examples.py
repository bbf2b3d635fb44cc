"""The scripts under examples/, each once in its shortest form."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.test_workers import free_ports

ROOT = pathlib.Path(__file__).parents[1]


def start(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        },
    )


def run(script, *arguments):
    process = start(script, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.mark.parametrize(
    "script",
    [
        *("quickstart", "defaults", "speed", "second_order", "curvature"),
        *("distributed", "scaling", "cifar", "gan", "distillation"),
        *("benchmark/run", "benchmark/speed"),
    ],
)
def test_help(script):
    assert "usage:" in run(f"{script}.py", "--help")


def test_quickstart(tmp_path):
    output = run(
        *("quickstart.py", "--epochs", "2", "--data", "digits"),
        *("--seed", "1", "--output", str(tmp_path)),
    )
    for word in ("SGD", "LE-SAM", "accuracy", "sharpness", "difference"):
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


def test_second_order(tmp_path):
    picture = tmp_path / "picture.png"
    output = run(
        *("second_order.py", "--quick", "--nets", "conv"),
        *("--output", str(picture)),
        *("--methods", "SGD", "secant", "gradient + rho H d"),
    )
    for word in ("SGD", "secant", "gradient + rho H d"):
        assert word in output
    assert picture.stat().st_size > 10_000


def test_benchmark_goes_on_where_it_was(tmp_path):
    """The lines that were lost are made again, and no other."""
    results = tmp_path / "results.jsonl"
    arguments = [
        *("benchmark/run.py", "--quick", "--tasks", "200 clean"),
        *("--methods", "SAM", "LE-SAM", "--jobs", "1"),
        *("--results", str(results), "--picture", str(tmp_path / "a.png")),
    ]
    first = run(*arguments)
    lines = results.read_text().splitlines()
    # Two seeds, and one that plain training tunes with; two costs.
    assert len(lines) == 3 * 2 + 1 + 2
    results.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    assert lines_of_tables(run(*arguments)) == lines_of_tables(first)
    again = results.read_text().splitlines()
    assert again[:8] == [*lines[:7], lines[7][:20]]
    assert len(again) == len(lines) + 1
    assert (tmp_path / "a.png").stat().st_size > 10_000


def lines_of_tables(output):
    return [line.split("|")[1] for line in output.splitlines() if "|" in line]


def test_benchmark_speed_without_the_other_libraries():
    """Those that are not installed have a row that says so."""
    output = run(
        *("benchmark/speed.py", "--quick", "--nets", "dense"),
        *("--libraries", "keras_lesam", "--methods", "SAM"),
    )
    rows = [line for line in output.splitlines() if line.startswith("| keras")]
    assert len(rows) == 2
    assert all("x |" in row for row in rows), output


def test_benchmark_report(tmp_path):
    """Of the runs that are there."""
    picture = tmp_path / "picture.png"
    output = run("benchmark/run.py", "--report", "--picture", str(picture))
    for word in ("LE-SAM secant", "Friendly SAM", "against SAM", "±"):
        assert word in output
    assert picture.stat().st_size > 10_000


def test_curvature(tmp_path):
    picture = tmp_path / "picture.png"
    output = run("curvature.py", "--quick", "--output", str(picture))
    for word in ("SGD", "SAM", "LE-SAM", "eigenvalues", "trace"):
        assert word in output
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_gan(plain, tmp_path):
    picture = tmp_path / "picture.png"
    output = run(
        *("gan.py", "--epochs", "2", "--every", "1"),
        *("--output", str(picture), *plain),
    )
    assert output.count("Epoch") == 2
    assert ("rho 0.000" in output) == bool(plain)
    assert "generator: loss" in output
    assert picture.stat().st_size > 1_000


def test_distillation():
    output = run("distillation.py", "--epochs", "2")
    for word in ("Teacher", "Student, plain", "Student, LE-SAM", "accuracy"):
        assert word in output


def test_scaling():
    output = run("scaling.py", "--quick", "--nets", "dense")
    for word in ("replica", "global", "collectives"):
        assert word in output


def test_distributed_on_two_logical_cpus(tmp_path):
    output = run(
        *("distributed.py", "--logical-cpus", "2", "--epochs", "2"),
        *("--scope", "global", "--folder", str(tmp_path)),
    )
    assert "Replicas: 2 (MirroredStrategy)" in output
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()


def test_distributed_in_two_processes(tmp_path):
    """Both exit well; the first one reports."""
    workers = [
        start("distributed.py", "--epochs", "2", "--folder", str(tmp_path), **c)
        for c in cluster(2)
    ]
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [w.returncode for w in workers] == [0, 0], outputs
    assert "Replicas: 2" in outputs[0]
    assert "Test accuracy" in outputs[0]
    assert "Test accuracy" not in outputs[1]
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()


def cluster(count):
    """The environment of each worker."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    for index in range(count):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": addresses}, "task": task}
        yield {"TF_CONFIG": json.dumps(config)}


def test_speed():
    output = run(
        *("speed.py", "--quick", "--nets", "dense", "--modes", "graph"),
    )
    assert "dense" in output
