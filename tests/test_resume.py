"""Trainings that are killed and go on, as if nothing had been."""

import signal

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import train
from tests.test_package import run_python
from tests.test_package import start_python

# 6 epochs of 3 steps, with the warm-up and annealing that are the default.
TRAIN = """
import os
import signal
import sys
import keras
import numpy as np
import tensorflow as tf
from keras_lesam import LESAMModel

data, kill, resume, output = sys.argv[1:]


class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.kill("at an epoch", epoch == 3)

    def on_train_batch_end(self, batch, logs=None):
        self.kill("in an epoch", self.epoch == 3 and batch == 1)

    def kill(self, where, now):
        if kill == where and now:
            os.kill(os.getpid(), signal.SIGKILL)


def new_model():
    net = keras.Sequential([
        keras.Input((6, 6, 1)),
        keras.layers.Conv2D(4, 3, kernel_regularizer="l2"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dense(4),
    ])
    model = LESAMModel(net)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    return model


keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.normal(size=(96, 6, 6, 1)).astype("float32")
y = rng.integers(4, size=96)
if data == "tf.data":
    fit = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(32)}
else:
    fit = {"x": x, "y": y, "batch_size": 32, "shuffle": False}
if resume == "file":
    model = keras.models.load_model("epoch-03.keras")
    fit["initial_epoch"] = 3
else:
    model = new_model()
    fit["callbacks"] = [
        keras.callbacks.BackupAndRestore("backup", delete_checkpoint=False),
        keras.callbacks.ModelCheckpoint("epoch-{epoch:02d}.keras"),
        Kill(),
    ]
history = model.fit(epochs=6, verbose=0, **fit).history
np.savez(
    output, *model.get_weights(), *model.optimizer.variables, **history
)
"""


def training(directory, data="numpy", kill="never", resume="backup"):
    """Weights, optimizer variables and logs at the end of a process."""
    output = directory / "output.npz"
    run_python(TRAIN, data, kill, resume, output, cwd=directory)
    return dict(np.load(output))


def killed_training(directory, data, kill):
    output = directory / "output.npz"
    arguments = data, kill, "backup", output
    process = start_python(TRAIN, *arguments, cwd=directory)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (directory / "backup" / "latest.weights.h5").exists()
    assert not output.exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return training(tmp_path_factory.mktemp("uninterrupted"))


def assert_is_the_end_of(resumed, uninterrupted):
    """To the last bit, logs of the last three epochs included."""
    assert set(resumed) == set(uninterrupted)
    assert {"arr_0", "rho", "sharpness", "sigma"} <= set(resumed)
    assert len(uninterrupted["sigma"]) == 6
    for name, expected in uninterrupted.items():
        if not name.startswith("arr_"):
            expected = expected[3:]
        np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


@pytest.mark.parametrize(
    ("data", "kill"), [("numpy", "at an epoch"), ("tf.data", "in an epoch")]
)
def test_a_killed_process_is_resumed_by_another(
    data, kill, uninterrupted, tmp_path
):
    killed_training(tmp_path, data, kill)
    resumed = training(tmp_path, data)
    assert_is_the_end_of(resumed, uninterrupted)


def test_a_saved_model_goes_on_at_its_epoch(uninterrupted, tmp_path):
    killed_training(tmp_path, "numpy", "in an epoch")
    resumed = training(tmp_path, resume="file")
    assert_is_the_end_of(resumed, uninterrupted)


def budgets(**kwargs):
    x, y = classification_data(rows=96)
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    return train(LESAMModel(net, 0.1), x, y, **kwargs)["sigma"]


def test_half_of_a_training_is_not_a_training_of_half_the_length():
    """Were it, the tests above would not tell how epochs are counted."""
    whole, half = budgets(epochs=6), budgets(epochs=3)
    assert whole[:3] != half
    assert whole[3:] != half
    assert whole[2] == whole[3] == pytest.approx(0.1)


def dropout_net(units=8):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3, seed=5),
            keras.layers.Dense(4),
        ]
    )


def fit(model, epochs, *callbacks):
    x, y = classification_data(rows=96)
    model.compile(keras.optimizers.Adam(0.02), crossentropy())
    keras.utils.set_random_seed(1)
    model.fit(
        x, y, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )
    return model


def resumed(wrap, backup):
    """A training of 4 epochs, of which the first 2 by another model."""
    callback = keras.callbacks.BackupAndRestore(backup, delete_checkpoint=False)
    fit(wrap(dropout_net()), 2, callback)
    return fit(wrap(dropout_net()), 4, callback)


def test_random_layers_resume_as_in_plain_keras(tmp_path):
    """From their first seed: its state is not in a backup of Keras's."""
    plain = resumed(lambda net: net, tmp_path / "plain")
    model = resumed(lambda net: LESAMModel(net, sigma=0.0), tmp_path / "lesam")
    assert_same_weights(model, plain)
    with pytest.raises(AssertionError):
        assert_same_weights(fit(dropout_net(), 4), plain)
