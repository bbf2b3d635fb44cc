"""Batches of 0 rows, and of fewer rows than parts: as in plain Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import SAMModel
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored

STEPS = {
    "first order": {},
    "secant": {"curvature": "secant"},
    "hvp": {"curvature": "hvp"},
    "fraction": {"ascent_fraction": 0.5},
    "previous": {"ascent_from": "previous"},
    "momentum": {"ascent_from": "momentum"},
    "3 splits": {"num_batch_splits": 3},
    "3 splits, fraction": {"num_batch_splits": 3, "ascent_fraction": 0.5},
    "every 2": {"ascent_every": 2},
    "FriendlySAM": rules.FriendlySAM(0.1),
    "LookSAM": rules.LookSAM(0.1, every=2),
}


def wrapped(net, options):
    if isinstance(options, rules.Rule):
        return SAMModel(net, options)
    return constant_lesam(net, **options)


def batches(sizes):
    """A dataset whose batches have these rows, which the graph knows not."""

    def generate():
        for i, rows in enumerate(sizes):
            yield classification_data(rows=rows, seed=i)

    signature = (
        tf.TensorSpec((None, 6), tf.float32),
        tf.TensorSpec((None,), tf.int64),
    )
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("name", STEPS)
def test_weights_are_finite_where_plain_keras_has_finite_ones(name, eagerly):
    plain = dense_net()
    for model in (plain, wrapped(dense_net(), STEPS[name])):
        model.compile(
            keras.optimizers.SGD(0.1), crossentropy(), run_eagerly=eagerly
        )
        model.fit(batches([8, 0, 8, 0]), steps_per_epoch=4, verbose=0)
        x, y = classification_data(rows=0)
        model.train_on_batch(x, y)
        assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("name", ["3 splits", "3 splits, fraction"])
def test_a_replica_without_rows(name):
    with mirrored(2).scope():
        model = wrapped(dense_net(), STEPS[name])
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
    x, y = classification_data(rows=9)
    history = model.fit(x, y, batch_size=4, verbose=0, shuffle=False)
    assert np.isfinite(history.history["loss"]).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


def net_with_state():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(4),
        ]
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_unknown_rows_are_split_as_known_ones(rows):
    """Parts without rows leave no statistics and draw no random numbers."""
    nets = [net_with_state(), net_with_state()]
    known = tf.data.Dataset.from_tensors(classification_data(rows=rows))
    for net, data in zip(nets, (known, batches([rows]))):
        model = constant_lesam(net, num_batch_splits=3)
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
        model.fit(data, steps_per_epoch=1, verbose=0)
    assert_same_weights(*nets)
