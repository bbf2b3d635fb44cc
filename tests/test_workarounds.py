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
