"""Real processes on loopback, under `MultiWorkerMirroredStrategy`."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lesam

WORKER = pathlib.Path(__file__).with_name("worker.py")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(folder, options, config=None):
    environment = {
        **os.environ,
        "PYTHONPATH": str(WORKER.parents[1]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if config is not None:
        environment["TF_CONFIG"] = json.dumps(config)
    return subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(options), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(count, folder, **options):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    return [
        start(
            folder,
            options,
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            },
        )
        for index in range(count)
    ]


def finish(processes, folder):
    """What each worker saved."""
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
    return [
        dict(np.load(folder / f"worker{index}.npz"))
        for index in range(len(processes))
    ]


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(
            value, expected[name], err_msg=name, **tolerance
        )


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"perturbation_scope": "replica", "curvature": "secant"}),
        (2, {"perturbation_scope": "global", "synchronized": True}),
        (3, {"perturbation_scope": "global", "curvature": "hvp"}),
    ],
    ids=lambda value: value if isinstance(value, int) else value.values(),
)
def test_workers_are_a_mirror_in_several_processes(tmp_path, count, options):
    """Fit with validation, evaluate, predict; save and export by the chief."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    [expected] = finish([start(mirror, {"mirrored": count, **options})], mirror)
    found = finish(start_workers(count, tmp_path, **options), tmp_path)
    for worker in found[1:]:
        assert_same(worker, found[0], rtol=0)
    assert_same(found[0], expected, rtol=1e-4, atol=1e-5)
    assert {"log_rho", "log_val_loss", "log_val_accuracy"} <= set(expected)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, keras_lesam.LESAMModel)
    for i, weight in enumerate(loaded.model.get_weights()):
        np.testing.assert_array_equal(weight, found[0][f"arr_{i}"])
    served = tf.saved_model.load(str(tmp_path / "exported"))
    assert served.serve(np.zeros((2, 6), "float32")).shape == (2, 4)


def test_a_killed_worker_ends_all_and_they_resume_together(tmp_path):
    options = {"epochs": 4, "backup": True, "total_steps": 16}
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = finish(start_workers(2, whole, **options), whole)

    processes = start_workers(2, tmp_path, killed=1, **options)
    begin = time.monotonic()
    assert processes[1].wait(timeout=120) == -9
    output, _ = processes[0].communicate(timeout=200)
    assert processes[0].returncode != 0, output[-3000:]
    assert time.monotonic() - begin < 200
    assert not (tmp_path / "worker0.npz").exists()

    found = finish(start_workers(2, tmp_path, **options), tmp_path)
    for worker, other in zip(found, expected):
        # The logs are of the epochs that were left.
        assert_same(
            {k: v for k, v in worker.items() if not k.startswith("log_")},
            {k: v for k, v in other.items() if not k.startswith("log_")},
            rtol=0,
        )
        assert len(worker["log_loss"]) == 2
        np.testing.assert_array_equal(worker["log_rho"], other["log_rho"][2:])
