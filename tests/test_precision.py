"""Mixed precision: scaled losses, overflowing steps, small floats."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import train

PRECISION = {"mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}


def net(policy, seed=0):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(4, dtype="float32"),
        ]
    )


def one_step(policy, **options):
    x, y = classification_data(rows=32)
    wrapped = net(policy)
    model = constant_lesam(wrapped, 0.1, **options)
    history = train(model, x, y, epochs=1)
    return model, wrapped, history


@pytest.mark.parametrize("policy", PRECISION)
@pytest.mark.parametrize(
    "options", [{}, {"adaptive": True}, {"num_batch_splits": 2}], ids=str
)
def test_same_numbers_as_float32(policy, options):
    """rho, slope and rise from the same weights, loss scale undone."""
    _, expected_net, expected = one_step("float32", **options)
    _, found_net, found = one_step(policy, **options)
    tolerance = PRECISION[policy]
    for name in ("rho", "gradient_norm", "loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance)
    np.testing.assert_allclose(
        found["sharpness"], expected["sharpness"], rtol=10 * tolerance
    )
    for a, b in zip(found_net.get_weights(), expected_net.get_weights()):
        np.testing.assert_allclose(a, b, atol=tolerance)
        assert a.dtype == np.float32


@pytest.mark.parametrize("policy", ["float32", *PRECISION])
def test_the_loss_is_scaled_as_the_inner_model_needs(policy):
    wrapped = net(policy)
    keras.config.set_dtype_policy("float32")
    model = LESAMModel(wrapped)
    model.compile("sgd", crossentropy())
    scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scales == (policy == "mixed_float16")
    assert model.dtype_policy.name == policy


def scaled(initial_scale, **kwargs):
    return keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=initial_scale, **kwargs
    )


@pytest.mark.parametrize("scale", [2.0**4, 2.0**10, 2.0**14])
def test_rho_does_not_depend_on_the_loss_scale(scale):
    x, y = classification_data(rows=32)
    model = constant_lesam(net("mixed_float16"), 0.1)
    history = train(model, x, y, optimizer=scaled(scale), epochs=1)
    _, _, expected = one_step("float32")
    np.testing.assert_allclose(history["rho"], expected["rho"], rtol=5e-3)


def test_overflowing_steps_are_skipped_and_training_goes_on():
    """As in plain Keras: the scale falls until the gradients are finite."""
    x, y = classification_data(rows=32)
    scales, weights = [], []
    for wrap in (lambda inner: inner, constant_lesam):
        inner = net("mixed_float16")
        before = inner.get_weights()
        optimizer = scaled(2.0**24)
        model = wrap(inner)
        model.compile(optimizer, crossentropy())
        steps = []
        for _ in range(16):
            model.train_on_batch(x, y)
            scale = float(tf.convert_to_tensor(optimizer.dynamic_scale))
            moved = any(
                np.any(a != b) for a, b in zip(before, inner.get_weights())
            )
            steps.append((scale, moved))
        scales.append([scale for scale, _ in steps])
        weights.append(inner.get_weights())
        # No weight moves before the scale has come down; then they do.
        assert steps[0] == (2.0**23, False)
        assert steps[-1][1]
        assert all(np.isfinite(w).all() for w in inner.get_weights())
    assert scales[0] == scales[1]


def test_the_first_scale_is_not_baked_into_the_graph():
    """An optimizer not yet built must not fix its scale for good."""
    x, y = classification_data(rows=32)
    optimizer = scaled(2.0**4, dynamic_growth_steps=2)
    model = constant_lesam(net("mixed_float16"), 0.1, 0.5)
    model.compile(optimizer, crossentropy())
    norms = []
    for _ in range(6):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        norms.append(float(logs["gradient_norm"]))
    assert float(tf.convert_to_tensor(optimizer.dynamic_scale)) == 2.0**7
    assert max(norms) / min(norms) < 1.5


def test_logged_means_leave_overflowing_steps_out():
    x, y = classification_data(rows=320)
    model = constant_lesam(net("mixed_float16"), 0.1, 0.5)
    history = train(model, x, y, optimizer=scaled(2.0**20), epochs=1)
    for name in ("rho", "gradient_norm", "sharpness"):
        assert np.isfinite(history[name]).all()


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
def test_weights_of_small_floats(policy):
    """Norms are taken in float32 even where the weights are float16."""
    x, y = classification_data(rows=64)
    model = constant_lesam(net(policy), 0.1, 0.5)
    history = train(model, x, y, epochs=2)
    assert min(history["rho"]) > 0
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_mixed_precision_with_batch_norm_trains(jit_compile):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = classification_data(rows=64)
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Dense(4, dtype="float32"),
        ]
    )
    history = train(
        constant_lesam(inner, 0.05, 0.5),
        x,
        y,
        epochs=10,
        jit_compile=jit_compile,
    )
    assert history["loss"][-1] < history["loss"][0]


def test_float8_scales_are_not_weights():
    """What Keras keeps as "trainable" scales is overwritten, not descended."""
    x, y = classification_data(rows=32)
    results = []
    for wrap in (lambda inner: inner, lambda inner: constant_lesam(inner, 0.1)):
        inner = net("float32")
        inner.quantize("float8")
        train(wrap(inner), x, y, epochs=1)
        results.append(
            [
                v.numpy()
                for v in inner.trainable_variables
                if getattr(v, "overwrite_with_gradient", False)
            ]
        )
    assert results[0]
    for found, expected in zip(results[1], results[0]):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
@pytest.mark.parametrize("ascent_from", ["batch", "previous", "momentum"])
def test_weights_of_16_bits_are_perturbed(policy, ascent_from):
    """Where the radius is more than 65504 times the gradient."""
    x, y = classification_data(rows=32)
    wrapped = net(policy)
    keras.config.set_dtype_policy(policy)
    model = SAMModel(wrapped, rho=1.0, ascent_from=ascent_from)
    logs = []
    model.compile(
        keras.optimizers.SGD(0.1), lambda y, p: 1e-5 * crossentropy()(y, p)
    )
    for _ in range(3):
        model.reset_metrics()
        logs.append(model.train_on_batch(x, y, return_dict=True))
        for weight in model.weights:
            assert np.isfinite(np.float32(weight.numpy())).all()
    assert logs[-1]["rho"] == 1.0
    # The loss at w + eps: in steps of one pass it is the only one.
    if ascent_from == "batch":
        assert logs[-1]["sharpness"] > 0.1 * logs[-1]["loss"]
    else:
        assert logs[-1]["loss"] > 1.1 * logs[0]["loss"]
