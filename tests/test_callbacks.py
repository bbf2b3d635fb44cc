"""Keras's callbacks, and a user's own, in `fit` of a wrapper."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from keras_lesam import LESAMModel
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import traces

LOGS = ["gradient_norm", "loss", "rho", "sharpness", "sigma"]


def compiled(model, learning_rate=0.1):
    model.compile(keras.optimizers.Adam(learning_rate), crossentropy())
    return model


def fit(model, *callbacks, epochs=4, **kwargs):
    """Three steps an epoch."""
    x, y = classification_data(rows=96)
    return model.fit(
        x,
        y,
        epochs=epochs,
        callbacks=list(callbacks) or None,
        shuffle=False,
        verbose=0,
        **kwargs,
    ).history


def overfit(model, callback):
    """Labels are random: what is learnt makes the validation loss worse."""
    validation = classification_data(rows=64, seed=7)
    history = fit(model, callback, epochs=8, validation_data=validation)
    losses = history["val_loss"]
    assert losses[-1] > min(losses) + 0.01
    return validation, min(losses)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_backup_and_restore(tmp_path):
    backup = tmp_path / "backup"
    expected = compiled(LESAMModel(dense_net()))
    history = fit(expected)
    with pytest.raises(KeyboardInterrupt):
        fit(
            compiled(LESAMModel(dense_net())),
            keras.callbacks.BackupAndRestore(backup),
            Interrupt(),
        )
    assert backup.exists()
    model = compiled(LESAMModel(dense_net(seed=1)))
    resumed = fit(model, keras.callbacks.BackupAndRestore(backup))
    assert not backup.exists()
    assert_same_weights(model, expected)
    assert resumed == {name: values[2:] for name, values in history.items()}


def test_checkpoints_of_the_best_weights(tmp_path):
    path = tmp_path / "best.weights.h5"
    model = compiled(constant_lesam(dense_net()))
    callback = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=True, save_best_only=True
    )
    validation, best = overfit(model, callback)
    other = compiled(constant_lesam(dense_net(seed=1)))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    assert other.evaluate(*validation, verbose=0) == pytest.approx(best, 1e-6)


def test_checkpoints_of_the_best_model(tmp_path):
    path = tmp_path / "best.keras"
    model = compiled(constant_lesam(dense_net()))
    callback = keras.callbacks.ModelCheckpoint(path, save_best_only=True)
    validation, best = overfit(model, callback)
    loaded = keras.models.load_model(path)
    assert type(loaded) is LESAMModel
    assert loaded.evaluate(*validation, verbose=0) == pytest.approx(best, 1e-6)


def test_early_stopping_restores_the_best_weights():
    model = compiled(constant_lesam(dense_net()))
    callback = keras.callbacks.EarlyStopping(
        patience=2, restore_best_weights=True
    )
    validation, best = overfit(model, callback)
    assert 0 < callback.stopped_epoch < 7
    for trained in (model, model.model):
        trained.compile(loss=crossentropy())
        loss = trained.evaluate(*validation, verbose=0)
        assert loss == pytest.approx(best, 1e-6)


def scalars(directory):
    """Values by epoch of all scalars in the event files of a directory."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["tensors"]:
        if name.startswith("epoch_"):
            protos = [event.tensor_proto for event in events.Tensors(name)]
            found[name] = [float(tf.make_ndarray(p)) for p in protos]
    return found


def test_tensorboard(tmp_path):
    model = compiled(LESAMModel(dense_net(), 0.1))
    callback = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    validation = classification_data(rows=32, seed=7)
    history = fit(model, callback, validation_data=validation)
    found = scalars(tmp_path / "train")
    for name in LOGS:
        np.testing.assert_allclose(
            found[f"epoch_{name}"], history[name], rtol=1e-6
        )
    assert min(found["epoch_rho"]) > 0
    assert min(found["epoch_sharpness"]) > 0
    names = set(scalars(tmp_path / "validation"))
    assert {"epoch_loss"} <= names
    assert not names & {"epoch_rho", "epoch_sharpness"}


def test_csv_logger(tmp_path):
    path = tmp_path / "log.csv"
    model = compiled(LESAMModel(dense_net()))
    validation = classification_data(rows=32, seed=7)
    history = fit(
        model, keras.callbacks.CSVLogger(path), validation_data=validation
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", *LOGS, "val_loss"]
    for name in [*LOGS, "val_loss"]:
        assert [float(row[name]) for row in rows] == history[name]


class Assign(keras.callbacks.Callback):
    """Gives `sigma` a value an epoch; counts the traces at their ends."""

    def __init__(self, values, seen):
        super().__init__()
        self.values = values
        self.seen = seen
        self.counts = []

    def on_epoch_begin(self, epoch, logs=None):
        self.model.sigma = self.values[epoch]

    def on_epoch_end(self, epoch, logs=None):
        self.counts.append(len(self.seen))


def test_sigma_assigned_between_epochs_takes_effect_without_a_retrace():
    values = [0.1, 0.3, 0.02, 0.2]
    model = compiled(constant_lesam(dense_net()))
    callback = Assign(values, traces(model))
    history = fit(model, callback)
    np.testing.assert_allclose(history["sigma"], values, rtol=1e-6)
    assert np.argsort(history["sharpness"]).tolist() == [2, 0, 3, 1]
    assert callback.counts[0] > 0
    assert set(callback.counts) == {callback.counts[0]}


def test_sigma_assigned_to_and_from_zero_is_traced_once_each():
    values = [0.1, 0.0, 0.1, 0.0, 0.2]
    model = compiled(constant_lesam(dense_net()))
    callback = Assign(values, traces(model))
    history = fit(model, callback, epochs=5)
    np.testing.assert_allclose(history["sigma"], values, rtol=1e-6)
    assert (np.array(history["sharpness"]) > 0).tolist() == [
        sigma > 0 for sigma in values
    ]
    assert callback.counts[0] < callback.counts[1]
    assert set(callback.counts[1:]) == {callback.counts[1]}


def test_a_callback_list_of_the_caller():
    x, y = classification_data(rows=96)
    expected = fit(compiled(LESAMModel(dense_net())))
    assert len(set(expected["sigma"])) > 1
    model = compiled(LESAMModel(dense_net()))
    epochs = []
    callbacks = keras.callbacks.CallbackList(
        [
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: epochs.append(epoch)
            )
        ],
        add_history=True,
        model=model,
        epochs=4,
        steps=3,
    )
    history = model.fit(
        x, y, epochs=4, callbacks=callbacks, shuffle=False, verbose=0
    )
    assert history.history == expected
    assert epochs == [0, 1, 2, 3]


def test_learning_rate_scheduler():
    rates = [0.1, 0.0, 0.05, 0.0]
    weights = []
    model = compiled(constant_lesam(dense_net()))
    history = fit(
        model,
        keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch]),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())
        ),
    )
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
    kernels = [values[0] for values in weights]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])
    np.testing.assert_array_equal(kernels[2], kernels[3])


@pytest.mark.parametrize("monitor", ["loss", "sharpness", "val_loss"])
def test_reduce_learning_rate_on_plateau(monitor):
    model = compiled(constant_lesam(dense_net()))
    history = fit(
        model,
        keras.callbacks.ReduceLROnPlateau(
            monitor, mode="min", factor=0.5, patience=1, min_delta=100.0
        ),
        validation_data=classification_data(rows=32, seed=7),
    )
    rates = [0.1, 0.1, 0.05, 0.025]
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0125)
