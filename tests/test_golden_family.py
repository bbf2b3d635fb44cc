"""Trajectories of independent implementations, in float64.

Made by golden_family/make.py from tf-keras, optax and pytorch_optimizer. What
those do otherwise, and why there is no file of it, is in the README.
"""

import json
import pathlib

import keras
import numpy as np
import pytest

from keras_lesam import SAMModel
from keras_lesam import rules
from tests.helpers import crossentropy

FILES = sorted(pathlib.Path(__file__).with_name("golden_family").glob("*.npz"))


def weights_of(golden, stage):
    count = sum(name.startswith(f"{stage}_") for name in golden.files)
    return [golden[f"{stage}_{i}"] for i in range(count)]


def net_of(golden):
    """The net of the file, at its initial weights."""
    initial = weights_of(golden, "initial")
    if len(initial) == 1:
        stack = [keras.layers.Dense(4, use_bias=False)]
    else:
        hidden = keras.layers.Dense(8, activation="tanh")
        stack = [hidden, keras.layers.Dense(4)]
    net = keras.Sequential([keras.Input((6,)), *stack])
    net.set_weights(initial)
    return net


def test_all_are_here():
    assert len(FILES) == 8


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden_trajectory(file, float64):
    golden = np.load(file)
    meta = json.loads(str(golden["meta"]))
    net = net_of(golden)
    model = SAMModel(net, getattr(rules, meta["rule"])(**meta["arguments"]))
    optimizer = keras.optimizers.SGD(meta["learning_rate"], meta["momentum"])
    model.compile(optimizer, crossentropy())
    rows = len(golden["x"])
    for step in range(meta["steps"]):
        start = step * meta["batch"] % rows
        batch = slice(start, start + meta["batch"])
        model.train_on_batch(golden["x"][batch], golden["y"][batch])
    # Keras keeps learning rates in float32.
    for found, expected in zip(net.get_weights(), weights_of(golden, "final")):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert not np.allclose(found, 0)
