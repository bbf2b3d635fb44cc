"""One of several workers, which tests/test_workers.py starts.

    TF_CONFIG=... python worker.py '{"curvature": "hvp"}' folder

Trains under `MultiWorkerMirroredStrategy`, or, without TF_CONFIG, on as many
logical CPUs of one process as the options say. Saves weights and logs.
"""

import json
import os
import pathlib
import signal
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel

ROWS, BATCH = 48, 12


def main(options, folder):
    strategy, index = new_strategy(options.pop("mirrored", None))
    epochs = options.pop("epochs", 3)
    callbacks = backup(options.pop("backup", False), folder, index)
    killed = options.pop("killed", None)
    if killed == index:
        callbacks.append(KillAfterTwoEpochs())
    x, y = data()
    with strategy.scope():
        model = new_model(**options)
    keras.utils.set_random_seed(2)
    history = model.fit(
        *(x, y),
        **{"epochs": epochs, "batch_size": BATCH, "shuffle": False},
        validation_data=(x, y),
        callbacks=callbacks,
        verbose=0,
    ).history
    results = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    # Rows of a batch come from all workers.
    outputs = model.predict(x, batch_size=BATCH, verbose=0)
    np.savez(
        folder / f"worker{index}.npz",
        *model.model.get_weights(),
        results=results,
        outputs=outputs,
        **{f"log_{name}": values for name, values in history.items()},
    )
    if index == 0:
        model.save(folder / "model.keras")
        model.export(folder / "exported", verbose=False)


def new_strategy(mirrored):
    if not mirrored:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        return tf.distribute.MultiWorkerMirroredStrategy(), resolver.task_id
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * mirrored,
    )
    devices = [f"CPU:{i}" for i in range(mirrored)]
    return tf.distribute.MirroredStrategy(devices), 0


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 6)).astype("float32")
    return x, rng.integers(4, size=ROWS)


def new_model(synchronized=False, **options):
    """Batch norm of its own each replica would have, as in Keras."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", kernel_regularizer="l2"),
            layers.BatchNormalization(synchronized=True)
            if synchronized
            else layers.LayerNormalization(),
            layers.Dense(4),
        ]
    )
    model = LESAMModel(net, 0.05, **options)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def backup(wanted, folder, index):
    """The chief saves; all restore what it saved."""
    if not wanted:
        return []
    every = {} if index == 0 else {"save_freq": 10**9}
    return [
        keras.callbacks.BackupAndRestore(
            folder / "backup", delete_checkpoint=False, **every
        )
    ]


class KillAfterTwoEpochs(keras.callbacks.Callback):
    """Dies without a word, in the middle of the third."""

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) == 10:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
