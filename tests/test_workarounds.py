"""Each fails once what it works around is mended upstream."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import _workarounds
from tests.helpers import constant_lesam
from tests.helpers import dense_net


def kernel_gradient(x, kernel):
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        loss = tf.reduce_mean(tf.nn.conv2d(x, kernel, 1, "SAME") ** 2)
    return tape.gradient(loss, kernel)


def in_a_branch(x, kernel):
    return tf.cond(
        tf.reduce_sum(kernel) < 1e9,
        lambda: kernel_gradient(x, kernel),
        lambda: tf.zeros_like(kernel),
    )


def seconds(function, *args):
    compiled = tf.function(function, jit_compile=True)
    compiled(*args)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        compiled(*args).numpy()
        times.append(time.perf_counter() - start)
    return min(times)


def test_xla_on_cpu_is_slow_at_convolutions_in_branches():
    """jax-ml/jax#12868: then `has_fast_conditionals` can go."""
    x = tf.random.uniform((64, 32, 32, 16))
    kernel = tf.random.normal((3, 3, 16, 16))
    slow, fast = (
        seconds(in_a_branch, x, kernel),
        seconds(kernel_gradient, x, kernel),
    )
    assert slow > 3 * fast


def test_only_xla_on_cpu_does_without_conditionals():
    model = constant_lesam(dense_net())
    model.compile("sgd", "mse", jit_compile=True)
    assert not _workarounds.has_fast_conditionals(model)
    model.compile("sgd", "mse", jit_compile=False)
    assert _workarounds.has_fast_conditionals(model)


def test_recompute_grad_loses_the_gradient_of_tensors():
    """Then `refuse_rematerialized_layers` can go."""
    weight, x = tf.constant(3.0), tf.constant(2.0)

    @tf.recompute_grad
    def product(x):
        return weight * x

    with tf.GradientTape() as tape:
        tape.watch([weight, x])
        y = product(x)
    gradients = tape.gradient(y, [weight, x])
    assert gradients[0] is None
    assert gradients[1] == 3.0


def test_masks_have_no_public_name():
    """Then `map_with_masks` can use it."""
    layer = keras.layers.Embedding(4, 2, mask_zero=True)
    outputs = layer(np.array([[1, 0]]))
    np.testing.assert_array_equal(outputs._keras_mask, [[True, False]])
    assert not hasattr(keras.ops, "get_keras_mask")
    joined = _workarounds.map_with_masks(
        lambda *t: tf.concat(t, 0), [outputs, outputs]
    )
    np.testing.assert_array_equal(joined._keras_mask, [[True, False]] * 2)


def test_keras_cannot_load_a_model_compiled_without_optimizer(tmp_path):
    """Then `forget_compile` can go."""
    net = dense_net()
    net.compile(optimizer=None, loss="mse")
    net.save(tmp_path / "net.keras")
    with pytest.raises(AttributeError, match=r"'NoneType'.*'build'"):
        keras.saving.load_model(tmp_path / "net.keras")


def pooled_square(x):
    """Its second derivative is 2 at the largest number of each window."""
    return tf.reduce_sum(tf.nn.max_pool2d(x, 2, 2, "VALID") ** 2)


def second_derivative_of_pooling(x, v):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = pooled_square(x)
        gradient = tape.gradient(y, x)
    return outer.gradient(gradient, x, output_gradients=v)


def test_xla_rounds_the_second_derivative_of_max_pooling():
    """Then `refuse_xla` and `has_max_pooling` can go."""
    rng = np.random.default_rng(0)
    # Alike in their first 16 bits, the numbers of a window get mixed up.
    x = tf.constant(1 + 1e-4 * rng.normal(size=(1, 8, 8, 1)), tf.float32)
    v = tf.constant(rng.normal(size=x.shape), tf.float32)
    right = tf.function(second_derivative_of_pooling)(x, v)
    xla = tf.function(second_derivative_of_pooling, jit_compile=True)(x, v)
    error = np.abs(xla - right).max() / np.abs(right).max()
    assert error > 0.01


def test_forward_mode_has_no_rule_for_loops():
    """Of layers that keep an array of their steps: `refuse_unsupported`."""
    layer = keras.layers.SimpleRNN(2)
    x = tf.ones((1, 3, 2))
    layer(x)

    @tf.function(autograph=False)
    def slope(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            y = layer(x)
        return accumulator.jvp(y)

    with pytest.raises(TypeError, match="variant"):
        slope(x)


def test_built_layers_take_no_new_weights():
    """When they do, or Keras has a public way, `unlocked` can go."""
    layer = keras.layers.Dense(1)
    layer.build((None, 2))

    def add():
        layer.add_weight(shape=(), name="late")

    with pytest.raises(ValueError, match="already built"):
        add()
    with _workarounds.unlocked(layer):
        add()
    assert [w.name for w in layer.weights] == ["kernel", "bias", "late"]
    with pytest.raises(ValueError, match="already built"):
        add()
