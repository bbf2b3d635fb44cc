"""Files written by version 0.1.0, for test_old_files.py.

    pip install keras_lesam==0.1.0
    python tests/files_0_1/make.py

For each model a `.keras` file and a weights file, after two epochs, and the
weights of the inner model after one epoch more.
"""

import pathlib

import keras
import numpy as np

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import rules

HERE = pathlib.Path(__file__).parent
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
PLAIN = {"warmup": 0, "anneal": 0}
MODELS = {
    "lesam": lambda net: LESAMModel(
        *(net, 0.2, None),
        **{"warmup": 0.1, "anneal": 0.1, "total_steps": 40},
        **{"adaptive": True, "alpha": 0.1},
    ),
    "secant": lambda net: LESAMModel(net, 0.1, curvature="secant", **PLAIN),
    "schedule": lambda net: LESAMModel(net, SCHEDULE),
    "lesam_momentum": lambda net: LESAMModel(
        net, 0.1, ascent_from="momentum", **PLAIN
    ),
    "sam_every": lambda net: SAMModel(net, rules.SAM(SCHEDULE), ascent_every=3),
    "asam_previous": lambda net: SAMModel(
        net, rules.ASAM(0.3, eta=0.02), ascent_from="previous"
    ),
    "friendly": lambda net: SAMModel(net, rules.FriendlySAM(0.1, 0.8, 0.9)),
    "looksam": lambda net: SAMModel(
        net, rules.LookSAM(0.1, 0.6, 3), warmup=0.1, total_steps=40
    ),
}


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5)).astype("float32")
    return x, rng.integers(3, size=64)


def new_model(name):
    keras.utils.set_random_seed(1)
    net = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ],
        name="net",
    )
    model = MODELS[name](net)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, name="sgd"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, name="ce"),
        metrics=["accuracy"],
    )
    return model


def fit(model, epochs):
    model.fit(*data(), batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def main():
    keras.utils.set_random_seed(0)
    for name in MODELS:
        model = new_model(name)
        fit(model, epochs=2)
        model.save(HERE / f"{name}.keras")
        model.save_weights(HERE / f"{name}.weights.h5")
        fit(model, epochs=1)
        np.savez(HERE / f"{name}.npz", *model.model.get_weights())


if __name__ == "__main__":
    main()
