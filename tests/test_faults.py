"""Numbers that are not finite, where plain Keras would have survived."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import constant_lesam
from tests.helpers import train


class Root(layers.Layer):
    """The square root, whose gradient at 0 is infinite."""

    def call(self, x):
        return tf.sqrt(x)


class Length(layers.Layer):
    """The norm, whose gradient at 0 is not a number."""

    def call(self, x):
        return tf.norm(x, axis=-1, keepdims=True)


def root_net():
    """Of a unit that is on at the weights, and off at `w + eps`."""
    keras.utils.set_random_seed(0)
    unit = layers.Dense(
        1,
        "relu",
        kernel_initializer=keras.initializers.Constant(0.1),
        bias_initializer=keras.initializers.Constant(0.1),
    )
    return keras.Sequential([keras.Input((4,)), unit, Root()])


def length_net():
    keras.utils.set_random_seed(0)
    units = layers.Dense(
        8, "relu", bias_initializer=keras.initializers.Constant(0.2)
    )
    return keras.Sequential([keras.Input((4,)), units, Length()])


def data(rows=64):
    x = np.abs(np.random.default_rng(0).normal(size=(rows, 4)))
    return x.astype("float32"), np.full((rows, 1), 0.9, "float32")


KINDS = {
    "sam": {"rule": rules.SAM(2.0)},
    "asam": {"rule": rules.ASAM(20.0)},
    "gsam": {"rule": rules.GSAM(2.0)},
    "looksam": {"rule": rules.LookSAM(2.0, every=2)},
    "friendly": {"rule": rules.FriendlySAM(2.0)},
    "fraction": {"rule": rules.SAM(2.0), "ascent": ascents.Fraction(0.5)},
    "every": {"rule": rules.SAM(2.0), "ascent": ascents.Every(2)},
    "previous": {"rule": rules.SAM(2.0), "ascent": ascents.Previous()},
    "momentum": {"rule": rules.SAM(2.0), "ascent": ascents.Momentum()},
    "parts": {"rule": rules.SAM(2.0), "num_batch_splits": 2},
    "lesam": {"budget": 5.0},
    "secant": {"budget": 5.0, "curvature": "secant"},
    "hvp": {"budget": 5.0, "curvature": "hvp"},
}
MODES = [{}, {"run_eagerly": True}, {"jit_compile": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_gradient_that_is_not_finite_is_not_applied(kind, mode):
    """The loss at `w + eps` is finite; its gradient is not."""
    for make in (root_net, length_net):
        net = make()
        model = SharpnessAwareModel(net, **KINDS[kind])
        train(
            *(model, *data()),
            **{"loss": "mse", "batch_size": 16, "epochs": 3, **mode},
            # So little that the units stay on at the weights themselves.
            optimizer=keras.optimizers.SGD(1e-4, momentum=0.9),
        )
        for weight in model.weights:
            assert np.isfinite(weight.numpy()).all(), (make, weight.path)


# Under XLA the gradient of a unit that is off is 0, whatever comes after it.
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_the_step_is_then_a_plain_one(mode):
    plain, net = root_net(), root_net()
    one = {"loss": "mse", "batch_size": 16, "epochs": 1, **mode}
    train(plain, *data(16), **one)
    history = train(SAMModel(net, rho=50.0), *data(16), **one)
    assert history["rho"] == [0.0]
    assert_close_weights(net, plain, atol=1e-7)


def test_a_loss_scale_is_lowered_by_a_bad_gradient():
    keras.config.set_dtype_policy("mixed_float16")
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    for options in ({}, {"ascent_from": "momentum"}, {"ascent_fraction": 0.5}):
        model = constant_lesam(net, 0.1, **options)
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=2.0**20
        )
        train(model, *data(), loss="mse", optimizer=optimizer, batch_size=8)
        assert float(optimizer.dynamic_scale) < 2.0**20
        assert np.isfinite(net.get_weights()[0]).all()


def test_sparse_gradients_that_are_not_finite():
    """Rows of an embedding, of which the passes see others."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Embedding(9, 4, embeddings_initializer="ones"),
            layers.GlobalAveragePooling1D(),
            layers.ReLU(),
            Length(),
        ]
    )
    x = np.random.default_rng(0).integers(9, size=(32, 2))
    for options in ({}, {"ascent_fraction": 0.5}):
        model = LESAMModel(net, 50.0, None, warmup=0, anneal=0, **options)
        train(model, x, np.full((32, 1), 9.0), loss="mse", batch_size=8)
        assert np.isfinite(net.get_weights()[0]).all()
