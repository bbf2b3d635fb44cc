"""Trajectories of the paper's own optimizer class, in float64."""

import json
import pathlib

import keras
import numpy as np
import pytest

from tests.helpers import constant_lesam
from tests.helpers import crossentropy

FILES = sorted(pathlib.Path(__file__).with_name("golden").glob("*.npz"))


def golden_net(meta, golden):
    net = keras.Sequential(
        [
            keras.Input((meta["sizes"][0],)),
            *(
                keras.layers.Dense(units, activation=meta["activation"])
                for units in meta["sizes"][1:]
            ),
            keras.layers.Dense(meta["classes"]),
        ]
    )
    net.set_weights(weights_of(golden, "initial"))
    return net


def golden_optimizer(meta):
    if meta["optimizer"] == "adam":
        return keras.optimizers.Adam(
            meta["learning_rate"], epsilon=meta["adam_epsilon"]
        )
    return keras.optimizers.SGD(meta["learning_rate"], meta["momentum"])


def weights_of(golden, stage):
    return [golden[f"{stage}_{i}"] for i in range(6)]


def batches(golden, meta):
    rows = len(golden["x"])
    for step in range(meta["steps"]):
        start = step * meta["batch"] % rows
        stop = start + meta["batch"]
        yield golden["x"][start:stop], golden["y"][start:stop]


def test_all_four_are_here():
    assert len(FILES) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden_trajectory(file, float64):
    golden = np.load(file)
    meta = json.loads(str(golden["meta"]))
    net = golden_net(meta, golden)
    model = constant_lesam(
        net, meta["sigma"], meta["rho_max"], alpha=meta["alpha"]
    )
    model.compile(golden_optimizer(meta), crossentropy())

    logs, first = [], None
    for x, y in batches(golden, meta):
        model.reset_metrics()
        logs.append(model.train_on_batch(x, y, return_dict=True))
        first = first or net.get_weights()

    for name in ("rho", "loss", "gradient_norm"):
        np.testing.assert_allclose(
            [log[name] for log in logs], golden[name], rtol=1e-5
        )
    np.testing.assert_allclose(
        [log["loss"] + log["sharpness"] for log in logs],
        golden["perturbed_loss"],
        rtol=1e-5,
    )
    for stage, weights in (("step1", first), ("final", net.get_weights())):
        for found, expected in zip(weights, weights_of(golden, stage)):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
