"""Small nets, data and comparisons that several tests share."""

import functools

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel

CONSTANT = {"warmup": 0.0, "anneal": 0.0}


def crossentropy():
    """A loss of Keras's float type as it is now."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classification_data(rows=96, shape=(6,), classes=4, seed=0):
    """Random inputs and labels; enough where only arithmetic is tested."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, *shape)).astype(keras.config.floatx())
    return x, rng.integers(classes, size=rows)


def dense_net(inputs=6, units=8, classes=4, seed=0):
    """A tanh net whose initial weights depend on `seed` alone."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.Dense(classes),
        ]
    )


def noisy_net(seed=0):
    """Batch norm, dropout, noise, augmentation and an L2 regularizer."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.GaussianNoise(0.1),
            keras.layers.Conv2D(8, 3, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.3),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )


def train(model, x, y, *, optimizer=None, loss=None, seed=1, **kwargs):
    """Compiles and fits with the same shuffling and noise each time."""
    fit = {"batch_size": 32, "epochs": 3, "verbose": 0}
    for name in ("sample_weight", "class_weight", "shuffle", *fit):
        if name in kwargs:
            fit[name] = kwargs.pop(name)
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    model.compile(optimizer, loss or crossentropy(), **kwargs)
    keras.utils.set_random_seed(seed)
    return model.fit(x, y, **fit).history


def assert_same_weights(model, other):
    """Bit for bit."""
    weights, others = model.get_weights(), other.get_weights()
    assert len(weights) == len(others)
    for variable, a, b in zip(model.weights, weights, others):
        np.testing.assert_array_equal(a, b, err_msg=variable.path)


def assert_close_weights(model, other, **tolerance):
    """Within a tolerance of `np.testing.assert_allclose`."""
    for variable, a, b in zip(
        model.weights, model.get_weights(), other.get_weights()
    ):
        np.testing.assert_allclose(a, b, err_msg=variable.path, **tolerance)


def traces(model):
    """How often the train step was traced, and with which counter.

    Returns a list that grows by one with each call of `train_step` in
    Python: once a trace in a graph.
    """
    seen = []
    original = model.train_step

    def counting(data):
        seen.append(None)
        return original(data)

    model.train_step = counting
    return seen


@functools.cache
def mirrored(replicas):
    """One strategy for all tests of a process.

    The collectives of a second one would meet those of the first: in a group
    of another size, or of tensors of other shapes.
    """
    devices = [f"CPU:{i}" for i in range(replicas)]
    return tf.distribute.MirroredStrategy(devices)


def kernels_only(variable):
    """A choice of weights that prints the same in every process."""
    return "kernel" in variable.path


def constant_lesam(net, sigma=0.1, rho_max=None, **kwargs):
    """A LESAMModel with the same budget at every step, and no cap."""
    return LESAMModel(net, sigma, rho_max, **{**CONSTANT, **kwargs})
