"""Shared by the parts: arguments, the device, tables, what is trained."""

import argparse
import json
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import rules

CONSTANT = {"warmup": 0, "anneal": 0}
METHODS = {
    "LE-SAM": lambda net: LESAMModel(net, 0.1, 0.5, **CONSTANT),
    "secant": lambda net: LESAMModel(
        net, 0.1, 0.5, curvature="secant", **CONSTANT
    ),
    "hvp": lambda net: LESAMModel(net, 0.1, 0.5, curvature="hvp", **CONSTANT),
    "forward over reverse": lambda net: LESAMModel(
        *(net, 0.1, 0.5),
        curvature="hvp",
        hvp_method="forward_over_reverse",
        **CONSTANT,
    ),
    "LookSAM": lambda net: SAMModel(net, rules.LookSAM(0.1, every=4)),
    "momentum": lambda net: LESAMModel(
        net, 0.1, 0.5, ascent_from="momentum", **CONSTANT
    ),
    "SAM": lambda net: SAMModel(net, rho=0.1),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--pictures", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    args.end = time.monotonic() + args.seconds
    return args


def device():
    """Return the device to run on: a GPU, if there is one."""
    return "/GPU:0" if tf.config.list_physical_devices("GPU") else "/CPU:0"


def describe():
    """Print where this runs."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name")
        for gpu in gpus
    ]
    print(
        f"{', '.join(map(str, names)) or 'no GPU'}; "
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}",
        flush=True,
    )


class Table:
    """Figures with limits, saved at once and printed worst first.

    Args:
        path: File for the lines of JSON.
    """

    def __init__(self, path):
        self._path = path
        self._path.unlink(missing_ok=True)
        self.rows = []

    def add(self, check, figure, limit):
        """Add what was found, which is right up to a limit.

        Args:
            check: String, what was compared.
            figure: Float, how far apart; nan is wrong.
            limit: Float.
        """
        row = {"check": check, "figure": float(figure), "limit": limit}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def attempt(self, check, limit, measure):
        """Add what `measure()` returns; an exception is as wrong as can be."""
        start = time.monotonic()
        try:
            figure = measure()
        except Exception as error:
            print(f"{check}: {type(error).__name__}: {str(error)[:500]}")
            figure = np.inf
        self.add(f"{check} ({time.monotonic() - start:.0f} s)", figure, limit)

    def tell(self):
        """Print the table; return how many figures are beyond their limits."""
        badness = [
            np.inf if np.isnan(r["figure"]) else r["figure"] / (r["limit"] or 1)
            for r in self.rows
        ]
        wrong = 0
        for i in np.argsort(badness)[::-1]:
            row = self.rows[i]
            is_wrong = not row["figure"] <= row["limit"]
            wrong += is_wrong
            print(
                f"{'WRONG' if is_wrong else 'right':6}"
                f"{row['figure']:10.2e} of {row['limit']:7.0e}  {row['check']}"
            )
        print(f"{wrong} wrong of {len(self.rows)}", flush=True)
        return wrong


def small_net(seed=0):
    """Build convolutions with batch norm and dropout, of known weights."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(16, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("gelu"),
            keras.layers.Conv2D(32, 3, strides=2),
            keras.layers.Activation("tanh"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def small_data(rows=640):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 16, 16, 3)).astype("float32")
    return x, rng.integers(10, size=rows)


def fit(net, method, *, jit, optimizer=None, where=None, epochs=2, **options):
    """Train on the small data, 20 steps by default; return the history."""
    with tf.device(where or device()):
        model = method(net)
        model.compile(
            optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit,
        )
        x, y = small_data()
        return model.fit(
            *(x, y),
            **{"batch_size": 64, "shuffle": False, "verbose": 0, **options},
            epochs=epochs,
        ).history


def distance(net, other, start):
    """Return how far two trainings ended apart, over how far they went."""
    apart = moved = 0.0
    for a, b, c in zip(
        net.get_weights(), other.get_weights(), start.get_weights()
    ):
        apart += np.sum((a.astype("f8") - b) ** 2)
        moved += np.sum((b.astype("f8") - c) ** 2)
    return float(np.sqrt(apart / moved))
